"""The figures of a benchmark for people: tables, and a roofline plot."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from nanoquant.benchmark.config import PARTS
from nanoquant.benchmark.linears import CODEBOOKS
from nanoquant.checkpoint_files import read_json
from nanoquant.console import table

NEEDED = {"date", "versions", "device", "absent", "finished", *PARTS}
"""Keys of what a run leaves, whole or not."""
PLACES = {None: "cache unknown", True: "cache", False: "memory"}
"""Where weights come from, by whether they may be in a cache."""
SIZE = (9, 6)
"""Of the plot, inches."""


def read_results(file: str, plot: bool) -> dict[str, Any]:
    """Results as ``nanoquant bench --json`` wrote them, after a run or in the middle of one.

    Args:
        file: to read.
        plot: whether they are going to be drawn.

    Raises:
        ValueError: there is no such file, it holds something else, or no linear shapes to draw.
    """
    if not Path(file).is_file():
        raise ValueError(f"--show {file}: there is no such file; give one that --json wrote")
    results = read_json(Path(file))
    lacking = sorted(NEEDED - results.keys())
    if lacking:
        raise ValueError(
            f"--show {file}: this is no file that nanoquant bench --json wrote, it lacks {', '.join(lacking)}"
        )
    if plot and not results["shapes"]:
        raise ValueError(f"--show {file}: there are no linear shapes in it to plot")
    return results


def report(results: dict[str, Any]) -> str:
    """All figures as text: the device and its roofs, a table for each part, and what is absent."""
    parts = [_device(results), *_linears(results["shapes"], "linear shapes")]
    parts += [*_linears(results["chain"], "all linears of the model in a row")]
    parts += [*_models(results["model"])]
    absent = [f"{_where(item)}: {item['what']}: {item['why']}" for item in results["absent"]]
    if absent:
        parts.append("\n".join(["not measured:", *absent]))
    return "\n\n".join(parts)


def _device(results: dict[str, Any]) -> str:
    device, versions = results["device"], results["versions"]
    cache = device["cache_bytes"]
    rows = [] if results["finished"] else [["unfinished", "only what was measured before the end"]]
    rows += [
        ["device", f"{device['name']}, {device['threads']} threads"],
        ["date", results["date"]],
        ["versions", ", ".join(f"{name} {value}" for name, value in versions.items() if value)],
        ["last cache, bytes", "unknown" if cache is None else f"{cache:,}"],
        ["weights rotate over, bytes", f"{device['rotation_bytes']:,}"],
        [
            f"copy, read + write, {PLACES[device['in_cache']]}, GB/s",
            number(device["copy_gb_per_s"], ".1f"),
        ],
        ["bf16 matmul, TFLOP/s", number(device["matmul_tflop_per_s"], ".3f")],
    ]
    return "\n".join(f"{name}: {value}" for name, value in rows)


def _linears(rows: list[dict[str, Any]], title: str) -> list[str]:
    """A table for each model: of its shapes, or of the chain of all its linears."""
    tables = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        shaped = "d_out" in own[0]
        header = ["out x in" if shaped else "linears", "rank", "bits", "tokens", "implementation"]
        header += ["us", "spread", "GB/s", "of copy", "x bf16", "error", "weights from"]
        lines = [_line(row, shaped) for row in own]
        if not shaped:
            lines, header = ([[*line[:1], *line[2:]] for line in lines], [header[0], *header[2:]])
        tables.append(f"{_depth(own[0])}, {title}\n{table(lines, header)}")
    return tables


def _line(row: dict[str, Any], shaped: bool) -> list[str]:
    return [
        f"{row['d_out']} x {row['d_in']}" if shaped else str(row["linears"]),
        str(row.get("rank", "")),
        f"{row['bits']:g}",
        str(row["tokens"]),
        _implementation(row),
        number(row["microseconds"], ".1f"),
        number(row["spread"], ".0%"),
        number(row["gb_per_s"], ".2f"),
        number(row["fraction_of_copy"], ".3f"),
        number(row["ratio_to_dense"], ".2f"),
        number(row.get("relative_error"), ".1e"),
        PLACES[row["in_cache"]],
    ]


def _implementation(row: dict[str, Any]) -> str:
    """Its name, with the codebooks of a shape and the kernel that served."""
    name, kernel = row["implementation"], row.get("kernel")
    if name.startswith(CODEBOOKS) and "codebooks" in row:
        name = name.replace(CODEBOOKS, f"{CODEBOOKS} {row['codebooks']}")
    return f"{name} ({kernel})" if kernel else name


def _models(rows: list[dict[str, Any]]) -> list[str]:
    """A table for each model of how it decodes."""
    header = ["arm", "tokens/s", "ms/token", "spread", "x bf16", "weights, bytes", "peak, bytes"]
    tables = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        lines = [
            [
                row["arm"],
                number(row["tokens_per_s"], ".2f"),
                number(row["milliseconds"], ".2f"),
                number(row["spread"], ".0%"),
                number(row["ratio_to_dense"], ".2f"),
                number(row["weight_bytes"], ","),
                number(row["peak_bytes"], ","),
            ]
            for row in own
        ]
        title = (
            f"{_depth(own[0])}, random weights, decoding after {own[0]['context']} tokens; the peak is "
            "without what the libraries take"
        )
        tables.append(f"{title}\n{table(lines, header)}")
    return tables


def _depth(row: dict[str, Any]) -> str:
    """The model, and that it was cut if it was."""
    if row["layers"] == row["of_layers"]:
        return f"{row['model']}, all {row['layers']} layers"
    return f"{row['model']}, only {row['layers']} of {row['of_layers']} layers"


def _where(item: dict[str, Any]) -> str:
    """The case of an absent figure in one line."""
    words = [item["part"], *([item["model"]] if "model" in item else [])]
    words += [f"{item['d_out']} x {item['d_in']}"] if "d_out" in item else []
    words += [f"{item[key]:g} {key}" for key in ("bits", "tokens") if key in item]
    return ", ".join(words)


def number(value: float | None, form: str) -> str:
    """The number as text; "-" for one that was not measured."""
    return "-" if value is None else format(value, form)


def check_plot() -> None:
    """Refuse a plot where matplotlib is missing, before anything is measured.

    Raises:
        ValueError: it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib; pip install 'nanoquant[plots]', or leave it out")


def plot_roofline(results: dict[str, Any], file: str) -> None:
    """Draw operations a second over operations per byte of weights, under the roofs of this run.

    Args:
        results: of a run that measured shapes.
        file: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    device, rows = results["device"], results["shapes"]
    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", yscale="log")
    intensity = [row["operations"] / row["weight_bytes"] for row in rows]
    for name in dict.fromkeys(row["implementation"] for row in rows):
        points = [
            (x, row)
            for x, row in zip(intensity, rows, strict=True)
            if row["implementation"] == name
        ]
        axes.plot(
            [x for x, _ in points], [row["tflop_per_s"] for _, row in points], ".", label=name
        )
    copy, flat = device["copy_gb_per_s"], device["matmul_tflop_per_s"]
    if rows and copy is not None and flat is not None:
        ends = min(intensity), 2 * max(intensity)
        knee = min(max(flat / copy * 1e3, ends[0]), ends[1])
        roof = [(x, min(x * copy / 1e3, flat)) for x in (ends[0], knee, ends[1])]
        axes.plot(
            *zip(*roof, strict=True), "k-", label="copy bandwidth and bf16 matmul of this run"
        )
    axes.set_xlabel("operations per byte of weights")
    axes.set_ylabel("TFLOP/s")
    state = "" if results["finished"] else ", unfinished"
    axes.set_title(f"{device['name']}, {device['threads']} threads, {results['date'][:10]}{state}")
    axes.legend()
    axes.grid(True, alpha=0.3)
    figure.savefig(file, format="png")
