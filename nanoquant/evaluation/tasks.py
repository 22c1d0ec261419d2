"""The zero-shot tasks: where the harness defines each, and how its data looks in a local folder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Task:
    """One multiple-choice task of lm-evaluation-harness."""

    definition: str
    """Its YAML, below the harness's folder of tasks."""
    folders: tuple[str, ...]
    """Where its data may lie in a local folder, best first."""
    columns: tuple[str, ...]
    """Columns that its definition reads."""
    splits: tuple[str, ...] = ("validation",)
    """Splits that may be scored, the harness's own first."""


_ARC = ("question", "choices", "answerKey")

TASKS = {
    "boolq": Task(
        definition="super_glue/boolq/default.yaml",
        folders=("boolq", "super_glue/boolq"),
        columns=("passage", "question", "label"),
    ),
    "piqa": Task(
        definition="piqa/piqa.yaml",
        folders=("piqa",),
        columns=("goal", "sol1", "sol2", "label"),
    ),
    "hellaswag": Task(
        definition="hellaswag/hellaswag.yaml",
        folders=("hellaswag",),
        columns=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    "winogrande": Task(
        definition="winogrande/default.yaml",
        folders=("winogrande/winogrande_xl", "winogrande"),
        columns=("sentence", "option1", "option2", "answer"),
    ),
    "arc_easy": Task(
        definition="arc/arc_easy.yaml",
        folders=("arc_easy", "ai2_arc/ARC-Easy"),
        columns=_ARC,
        splits=("test", "validation"),
    ),
    "arc_challenge": Task(
        definition="arc/arc_challenge.yaml",
        folders=("arc_challenge", "ai2_arc/ARC-Challenge"),
        columns=_ARC,
        splits=("test", "validation"),
    ),
}
