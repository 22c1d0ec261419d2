"""The command that makes a checkpoint again, from what its run recorded."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from nanoquant.config import NanoQuantConfig, preset_config
from nanoquant.json_files import flag_text, flat

HIDDEN = ("output", "json", "logger", "verbose", "max_memory", "max_gpu_memory", "self_text_file")
"""Fields of a job that say where a run wrote, and decide nothing of the checkpoint."""
PLACES = ("run.accelerator", "run.save_every", "run.timeout", "run.activation_memory")
"""The same of a configuration."""


def quantize_line(job: dict[str, Any], config: NanoQuantConfig, default: dict[str, Any]) -> str:
    """``nanoquant quantize SOURCE OUT ...`` with every flag that is not as a preset has it.

    Args:
        job: fields of a ``JobConfig``.
        config: of the run.
        default: defaults of the fields of a job.

    Returns:
        One line for a shell. Absolute paths are cut to their last part: those of another machine say nothing.
    """
    texts = job["text"] if isinstance(job["text"], list) else [job["text"]]
    words = ["nanoquant", "quantize", shown(job["source"]), "OUT"]
    words += [word for text in texts for word in ("--text", shown(text))]
    words += ["--preset", config.preset, "--bits", f"{config.budget.bits}"]
    words += [] if config.method == NanoQuantConfig.method else ["--method", config.method]
    usual = flat(preset_config(config.preset, config.method).to_dict())
    for name, value in flat(config.to_dict()).items():
        if name in ("preset", "budget.bits", *PLACES) or value == usual[name]:
            continue
        words += [f"--{name}", flag_text(value)]
    for name, value in job.items():
        if name in ("source", "text", *HIDDEN) or value == default.get(name):
            continue
        words += [
            f"--{name.replace('_', '-')}",
            shown(value) if name == "eval_text" else flag_text(value),
        ]
    return shlex.join(words)


def shown(place: str) -> str:
    """A path without the folders of the machine where it was; everything else as it is."""
    path = Path(place)
    return path.name if path.is_absolute() else place
