"""Figures of a job: what was measured before and after, as one table and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from nanoquant.console import table
from nanoquant.sizes import Sizes
from nanoquant.verification import Verification


@dataclass
class Figures:
    """What a model measures; ``sample`` is the continuation of the prompt."""

    file_bytes: int
    sizes: dict[str, Any]
    perplexity: float | None = None
    sample: str | None = None


@dataclass
class JobResult:
    """Everything that is printed, and the report of the quantization."""

    job: dict[str, Any]
    dense: Figures
    quantized: Figures
    report: dict[str, Any]
    seconds: dict[str, float]
    versions: dict[str, str] = field(default_factory=dict)
    verification: list[dict[str, Any]] | None = None
    """Checks of the checkpoint; None where none were asked for."""

    @property
    def excess(self) -> float | None:
        """Difference of the logarithms of the perplexities, in nats a token."""
        if self.dense.perplexity is None or self.quantized.perplexity is None:
            return None
        return math.log(self.quantized.perplexity) - math.log(self.dense.perplexity)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, for JSON."""
        return {**asdict(self), "excess_nats_per_token": self.excess}


def result_table(result: JobResult) -> str:
    """The one table of a job, and the samples under it."""
    dense, quantized = result.dense, result.quantized
    before, after = Sizes(**dense.sizes), Sizes(**quantized.sizes)
    rows = [
        ["perplexity", _number(dense.perplexity, ".2f"), _number(quantized.perplexity, ".2f")],
        ["  excess, nats per token", "", _number(result.excess, ".3f")],
        [
            "bits per weight, body",
            f"{before.model_bits_per_parameter:.2f}",
            _number(after.body_bits_per_weight, ".4f"),
        ],
        [
            "bits per weight, whole model",
            f"{before.model_bits_per_parameter:.2f}",
            f"{after.model_bits_per_parameter:.4f}",
        ],
        ["bytes on disk", f"{dense.file_bytes:,}", f"{quantized.file_bytes:,}"],
        ["bytes resident", f"{before.bytes_resident:,}", f"{after.bytes_resident:,}"],
        *([f"seconds, {name}", "", f"{value:.1f}"] for name, value in result.seconds.items()),
        ["seconds, all", "", f"{sum(result.seconds.values()):.1f}"],
    ]
    text = table(rows, header=[result.job["output"], "dense", "quantized"])
    if result.verification is not None:
        text += f"\n\n{Verification(result.verification).line()}"
    if result.job["sample"] is None:
        return text
    samples = (
        f"{who}: {'-' if figures.sample is None else ' '.join(figures.sample.split())}"
        for who, figures in (("dense", dense), ("quantized", quantized))
    )
    return "\n".join([text, "", f"prompt: {result.job['sample']}", *samples])


def _number(value: float | None, form: str) -> str:
    """The number as text; "-" for one that was not measured."""
    return "-" if value is None else format(value, form)
