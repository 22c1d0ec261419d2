"""The command ``advise``: what to use for a memory and a task."""

from __future__ import annotations

from typing import Any

from nanoquant.advice.catalogue import find
from nanoquant.advice.config import AdviceConfig
from nanoquant.advice.recommend import advise
from nanoquant.advice.show import report, to_dict
from nanoquant.console import check_json_path, say, show_logs
from nanoquant.json_files import write_json


def advise_command(model: str, json: str | None = None, **settings: Any) -> None:  # noqa: ANN401
    """Print what fits, what is known of its quality, and what to use; no weight is read.

    Args:
        model: a published name such as llama-2-7b, a Hub name, or a folder with a config.json.
        json: file for everything that is printed.
        settings: fields of AdviceConfig.

    Raises:
        ValueError: the model is unknown, or the memory, context, task or device does not make sense.
    """
    config = AdviceConfig(**settings)
    check_json_path(json)
    show_logs(verbose=False)
    memory, named = config.bytes(), find(model)
    positions = getattr(named.config.get_text_config(), "max_position_embeddings", None)
    advice = advise(named, config.task, config.use(positions, model), memory)
    say(report(advice))
    write_json(json, to_dict(advice))
