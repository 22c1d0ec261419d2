"""Quality that was published, or measured in this project, as plain data: nothing is interpolated, nothing guessed.

A figure is comparable with another one of the same protocol only; within a protocol the tokenizer of a family is the
same, so perplexities of its models compare. What is not here is unknown.
"""

from __future__ import annotations

from dataclasses import dataclass

PAPER = "arXiv 2602.06694v3"
README = "README of this project"


@dataclass(frozen=True)
class Source:
    """Where figures come from."""

    citation: str
    """Publication and table."""
    protocol: str
    """What was measured and on what; figures with the same text compare."""
    note: str = ""
    """What a reader has to know before trusting them."""

    @property
    def measured(self) -> bool:
        """Whether this project measured them."""
        return self.citation == README

    @property
    def post_trained(self) -> bool:
        """Whether they are of models made for instructions or chat."""
        return self.protocol in (WT2_POST, DEMO)


@dataclass(frozen=True)
class Figures:
    """Values of one way to store models."""

    option: str
    """Key of the option."""
    metric: str
    """What is measured: "perplexity", less is better, or "zero-shot", a mean accuracy in percent."""
    method: str
    """How exactly the weights were made, where the key does not say it."""
    source: Source
    values: dict[str, str]
    """Model to value, with the digits that were printed."""


WT2 = "WikiText-2 test, windows of 2048, base models"
WT2_4096 = "WikiText-2 test, windows of 4096 (Llama 2) or 8192 (Llama 3), base models"
WT2_POST = "WikiText-2 test, windows of 2048, post-trained models"
SIX_TASKS = (
    "mean accuracy of ARC-e, ARC-c, BoolQ, HellaSwag, WinoGrande, PIQA without examples, base models; "
    "chance is 37.5"
)
DEMO = "64 windows of 512 tokens of recipes/data/wiki_test.txt, SmolLM2-135M-Instruct"
OWN_CODE = (
    "the paper's own code, 128 windows of 2048 tokens of WikiText-2 train, embedding and head in bf16; "
    "not repeated here"
)
DIGITIZED = "read off a figure, 1 to 2 percent uncertain"

TABLE_2 = Source(f"{PAPER}, Table 2", WT2, OWN_CODE)
TABLE_2_DENSE = Source(f"{PAPER}, Table 2", WT2, "other papers print 6.14 for Llama-3-8B")
TABLE_3 = Source(f"{PAPER}, Table 3", SIX_TASKS, OWN_CODE)
TABLE_3_OTHERS = Source(f"{PAPER}, Table 3", SIX_TASKS)
TABLE_4 = Source(f"{PAPER}, Table 4", WT2)
FIGURE_1 = Source(f"{PAPER}, Fig. 1", WT2, DIGITIZED)
FIGURE_6 = Source(f"{PAPER}, Fig. 6", SIX_TASKS, f"{DIGITIZED}; {OWN_CODE}")
FIGURE_6_TEXT = Source(f"{PAPER}, Fig. 6", WT2, f"{DIGITIZED}; {OWN_CODE}")
AWQ = Source("arXiv 2306.00978, Table 4", WT2, "round to nearest, no calibration")
QWEN_STUDY = Source(
    "arXiv 2505.02214, Table 4", WT2_POST, "from a transcript of the table; groups of 128"
)
AQLM = Source("README of github.com/Vahe1994/AQLM", WT2_4096, "ready-made checkpoints")
AQLM_DENSE = Source("arXiv 2401.06118, as other papers repeat it", WT2_4096)
OURS = Source(README, DEMO, "the dense model there is a dequantized 4-bit file")


def _row(names: str, values: str) -> dict[str, str]:
    """Model to value, from two lines of words."""
    return dict(zip(names.split(), values.split(), strict=True))


LLAMAS = "llama-2-7b llama-2-13b llama-2-70b"
ALL = (
    f"{LLAMAS} llama-3.2-1b llama-3.2-3b llama-3-8b llama-3-70b gemma-3-1b gemma-3-4b gemma-3-12b "
    "gemma-3-27b qwen3-0.6b qwen3-1.7b qwen3-4b qwen3-8b qwen3-14b"
)
DIGITS = "llama-2-7b llama-3-8b gemma-3-4b qwen3-8b"
QWENS = "qwen3-0.6b qwen3-1.7b qwen3-4b qwen3-8b qwen3-14b"
STUDIED = "qwen3-4b qwen3-8b qwen3-14b"

TABLES = (
    Figures("bf16", "perplexity", "", TABLE_2_DENSE, _row(ALL,
        "5.47 4.88 3.32 9.74 7.81 6.24 2.86 10.60 7.39 5.86 4.88 12.66 9.39 7.89 7.00 6.37")),
    Figures("1.0", "perplexity", "", TABLE_2, _row(ALL,
        "10.34 8.71 6.52 25.59 17.90 14.97 11.32 35.30 19.64 24.70 27.21 27.56 19.21 14.29 12.47 10.92")),
    Figures("2.0", "perplexity", "", FIGURE_6_TEXT, _row(QWENS, "16.5 11.7 9.6 8.5 7.6")),
    Figures("0.8", "perplexity", "", TABLE_2, _row(ALL,
        "12.20 10.14 7.61 33.08 22.09 18.16 13.75 50.15 25.38 32.84 28.83 33.79 25.31 19.33 14.83 12.88")),
    Figures("0.55", "perplexity", "", TABLE_2, _row(ALL,
        "16.66 13.46 9.82 49.01 32.33 25.69 19.69 78.22 40.69 45.29 32.98 52.94 33.74 32.86 20.04 17.06")),
    Figures("int4-g128", "perplexity", "round to nearest", AWQ, _row(LLAMAS, "5.73 4.98 3.46")),
    Figures("int4-g64", "perplexity", "GPTQ", FIGURE_1, _row(DIGITS, "5.6 6.5 7.7 7.2")),
    Figures("2-bit", "perplexity", "", TABLE_4, _row("llama-2-7b", "21.00")),
    Figures("2-bit", "perplexity", "", FIGURE_1, _row("gemma-3-4b qwen3-8b", "84 31")),
    Figures("aqlm", "perplexity", "", AQLM, _row(f"{LLAMAS} llama-3-8b llama-3-70b",
        "5.68 5.05 3.78 6.99 4.57")),
    Figures("bf16", "perplexity", "", AQLM_DENSE, _row(f"{LLAMAS} llama-3-8b", "5.12 4.57 3.12 5.54")),
    Figures("int8", "perplexity", "AWQ", QWEN_STUDY, _row(STUDIED, "13.6 9.72 8.63")),
    Figures("int4-g128", "perplexity", "AWQ", QWEN_STUDY, _row(STUDIED, "18.1 11.3 9.48")),
    Figures("bf16", "zero-shot", "", TABLE_3_OTHERS, _row("llama-3-8b qwen3-8b", "71.44 71.22")),
    Figures("1.0", "zero-shot", "", TABLE_3, _row("llama-3-8b qwen3-8b", "45.95 48.94")),
    Figures("2-bit", "zero-shot", "", TABLE_3_OTHERS, _row("llama-3-8b qwen3-8b", "36.99 37.92")),
    Figures("1.0", "zero-shot", "", FIGURE_6, _row("qwen3-0.6b qwen3-1.7b qwen3-4b qwen3-14b", "39.2 44.3 45.6 50.6")),
    Figures("2.0", "zero-shot", "", FIGURE_6, _row(QWENS, "48.6 52.5 60.7 65.0 67.9")),
    Figures("0.55", "zero-shot", "", FIGURE_6, _row(QWENS, "36.8 39.2 39.5 42.6 43.4")),
    Figures("bf16", "perplexity", "", OURS, _row("demo", "22.7")),
    Figures("1.0", "perplexity", "preset best", OURS, _row("demo", "59.4")),
    Figures("1.0", "perplexity", "preset fast", OURS, _row("demo", "82.6")),
    Figures("0.8", "perplexity", "preset best, 2 epochs, curvature inputs, scale_lr 1e-2", OURS, _row("demo", "74.7")),
    Figures("0.55", "perplexity", "preset best, 2 epochs, curvature inputs, scale_lr 1e-2", OURS, _row("demo", "93.7")),
    Figures("0.55", "perplexity", "preset fast", OURS, _row("demo", "139.9")),
)  # fmt: skip
"""Every figure; where several are known of one model and option, the first is shown first."""


@dataclass(frozen=True)
class Figure:
    """One value with all that it needs to be read rightly."""

    model: str
    option: str
    metric: str
    text: str
    method: str
    source: Source

    def __str__(self) -> str:
        """The value and how the weights were made."""
        return self.text + (f" by {self.method}" if self.method else "")

    @property
    def value(self) -> float:
        """The value as a number."""
        return float(self.text)

    @property
    def kind(self) -> str:
        """Who says so: "measured" by this project, or "published" by others."""
        return "measured" if self.source.measured else "published"


def figures_of(
    model: str | None, option: str, metric: str | None = None, protocol: str | None = None
) -> list[Figure]:
    """What is known of a published model under an option (with embedding and head in bf16).

    Args:
        model: name of the model; None is one that nothing is known of.
        option: key of the option.
        metric: only this metric.
        protocol: only figures of this protocol.
    """
    return [
        Figure(model, option, table.metric, table.values[model], table.method, table.source)
        for table in TABLES
        if table.option == option
        and model in table.values
        and metric in (None, table.metric)
        and protocol in (None, table.source.protocol)
    ]
