"""How plots look: two themes, one palette that colour-blind readers can tell apart, and figures to PNGs."""

from __future__ import annotations

import importlib.util
import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanoquant.report.content import Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

WIDTH = 9.6
"""Inches of every figure."""
DOTS = 150
"""Dots an inch in the PNGs; the page shows them at half the dots, sharp on dense screens."""
MARKERS = "osD^vPX*"
MAP = "viridis"
"""Sequential colours, dark to bright, that rise evenly for every kind of colour vision."""


@dataclass(frozen=True)
class Theme:
    """Colours of one page; ``lines`` are Okabe and Ito's, adapted to the paper."""

    paper: str
    ink: str
    faint: str
    hole: str
    """Where a value is missing."""
    lines: tuple[str, ...]


LIGHT = Theme(
    paper="#ffffff",
    ink="#1c2127",
    faint="#c9cfd6",
    hole="#e4e7eb",
    lines=("#0072b2", "#d55e00", "#009e73", "#aa4499", "#8a6d00", "#56b4e9", "#6b7280"),
)
DARK = Theme(
    paper="#171b20",
    ink="#e3e7eb",
    faint="#434b55",
    hole="#2a3038",
    lines=("#56b4e9", "#ee8434", "#2fbf98", "#dd8fc4", "#e0c34a", "#a8d8f5", "#9aa4b0"),
)
Draw = Callable[["Figure", Theme], None]


def check_matplotlib() -> None:
    """Raise ValueError where matplotlib is missing, before anything is read."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "nanoquant report needs matplotlib for its plots; pip install 'nanoquant[plots]'"
        )


def plot(name: str, height: float, draw: Draw, caption: str, alt: str) -> Plot:
    """Draw a figure in both themes.

    Args:
        name: of the PNG, without its ending.
        height: inches.
        draw: puts axes on the figure; called once a theme.
        caption: what to read from it.
        alt: what it shows, for those who can't see it.
    """
    light, dark = (_png(draw, theme, height) for theme in (LIGHT, DARK))
    return Plot(name, light, dark, (int(WIDTH * 100), int(height * 100)), caption, alt)


def _png(draw: Draw, theme: Theme, height: float) -> bytes:
    """The figure as PNG bytes, the same for the same data whatever the user's matplotlibrc says."""
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", _settings(theme)]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")  # names in any script
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, theme)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=DOTS, metadata={"Software": None})
    return _with_palette(stream.getvalue())


def _with_palette(png: bytes) -> bytes:
    """The image with 256 colours, a third of the bytes; plots have few."""
    from PIL import Image

    stream = io.BytesIO()
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image = image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def _settings(theme: Theme) -> dict[str, Any]:
    """Settings of matplotlib for a theme."""
    from cycler import cycler

    ink = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor")
    return {
        "font.size": 10,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.labelsize": 10,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "text.parse_math": False,  # names may have dollar signs
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.edgecolor": theme.faint,
        "grid.color": theme.faint,
        "grid.alpha": 0.5,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.6,
        "axes.prop_cycle": cycler(color=theme.lines),
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        **dict.fromkeys(ink, theme.ink),
    }


def colour_map(theme: Theme) -> Colormap:
    """The map of heat maps, with the theme's colour for holes."""
    import matplotlib

    return matplotlib.colormaps[MAP].with_extremes(bad=theme.hole)


def depth_colour(theme: Theme, place: int, count: int) -> Any:  # noqa: ANN401
    """Colour of the ``place``-th of ``count`` ordered lines; the ends that vanish on the paper are cut."""
    import matplotlib

    low, high = (0.0, 0.88) if theme is LIGHT else (0.3, 1.0)
    return matplotlib.colormaps[MAP](low + (high - low) * place / max(1, count - 1))


def whole_ticks(axis: Any) -> None:  # noqa: ANN401
    """Ticks at whole numbers only: blocks and steps."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def log_axis(axes: Axes, low: float, high: float) -> None:
    """A logarithmic y axis up to ``high``, over 12 decades at most, with plain numbers that fit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low = max(low, 1e-12 * high)
    decades = math.log10(high / low)
    subs = (1.0,) if decades > 4 else (1.0, 2.0, 5.0) if decades > 1 else range(1, 10)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def heat_map(
    axes: Axes,
    theme: Theme,
    values: list[list[float]],
    kinds: list[str],
    blocks: list[int],
    top: float,
) -> Any:  # noqa: ANN401
    """Draw values (kinds, blocks) from 0 to ``top``, NaN as holes, and return the image for a colour bar."""
    image = axes.imshow(
        values,
        aspect="auto",
        cmap=colour_map(theme),
        vmin=0,
        vmax=top if top > 0 else 1.0,
        interpolation="nearest",
    )
    axes.grid(False)
    axes.set_yticks(range(len(kinds)), kinds)
    step = max(1, -(-len(blocks) // 16))
    axes.set_xticks(range(0, len(blocks), step), [str(b) for b in blocks[::step]])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image
