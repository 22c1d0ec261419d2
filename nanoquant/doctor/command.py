"""The command ``doctor``: checks in order, one line each; what depends on a failed one is not checked, and said so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanoquant.config import DEFAULT_PRESET, NanoQuantConfig, nanoquant_config
from nanoquant.console import say, show_logs
from nanoquant.doctor import checks

OK, WARNING, ERROR, NOT_CHECKED = "ok", "warning", "error", "not checked"


class Findings:
    """What the checks gave, printed as it comes."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}

    def check(
        self,
        name: str,
        function: Callable[..., Any],
        *given: object,
        grave: bool = True,
    ) -> Any:  # noqa: ANN401
        """What a check gives besides its text; None where it failed or an argument of it is absent.

        Args:
            name: of the check.
            function: gives a text, alone or after other things; raises ValueError or OSError.
            given: its arguments; None: what it needs is not known.
            grave: whether its failure would stop a quantization.
        """
        if any(value is None for value in given):
            return self._tell(name, NOT_CHECKED, "it needs what could not be found above")
        try:
            found = function(*given)
        except (ValueError, OSError) as error:
            return self._tell(name, ERROR if grave else WARNING, " ".join(str(error).split()))
        *rest, text = found if isinstance(found, tuple) else (found,)
        self._tell(name, OK, text)
        return rest[0] if len(rest) == 1 else tuple(rest) or None

    def _tell(self, name: str, state: str, text: str) -> None:
        self.states[name] = state
        say(f"{name:<10} {state:<12} {text}")


def doctor_command(
    model: str,
    output: str = ".",
    bits: float = 1.0,
    preset: str = DEFAULT_PRESET,
    method: str = NanoQuantConfig.method,
) -> None:
    """Look for what would stop a quantization, and for what would make it slow; no weight is changed.

    Args:
        model: folder or Hub name of the dense model.
        output: where the checkpoint is to go.
        bits: bits per weight over all quantized linears.
        preset: as for quantize.
        method: as for quantize.

    Raises:
        ValueError: something would stop it; named, after all has been printed.
    """
    config = nanoquant_config(bits, preset, method=method)
    show_logs(verbose=False)
    found = Findings()
    folder = found.check("files", checks.check_files, model)
    skeleton, shapes = found.check("parts", checks.check_parts, folder) or (None, None)
    stored = found.check("tensors", checks.check_tensors, folder, skeleton)
    sizes = found.check("ranks", checks.check_sizes, shapes, config)
    found.check("disk", checks.check_disk, output, skeleton, sizes, config)
    found.check("save", checks.check_save, stored, shapes, sizes, config)
    found.check("extension", checks.check_extension, grave=False)
    found.check("compiler", checks.check_compiler, grave=False)
    found.check("gpu", checks.check_gpu, grave=False)
    wrong = [name for name, state in found.states.items() if state == ERROR]
    if wrong:
        raise ValueError(f"{model} can't be quantized here yet: see {', '.join(wrong)} above")
