"""JobConfig: what ``nanoquant quantize`` reads, writes and measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanoquant.data import DataConfig
from nanoquant.generate import SAMPLE_TOKENS, check_sample
from nanoquant.self_text import check_place
from nanoquant.tracking.folder import run_folder
from nanoquant.tracking.loggers import check_logger
from nanoquant.units import parse_bytes


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What is read, written and measured."""

    source: str
    """Folder or Hub name of the dense model."""
    output: str
    """New or empty folder for the checkpoint."""
    text: list[str] | str
    """Calibration text: a text, .jsonl, .pt or .safetensors file, a data set as name:config:split, or self, which the
    model writes; several times for a mixture, with weights as train.txt=3."""
    self_text_file: str | None = None
    """File or folder that keeps the text that the model writes, for other runs as well; null: in OUT.run."""
    eval_text: str | None = None
    """Held-out text for perplexity, of the same kinds; null: not measured."""
    eval_windows: int = DataConfig.windows
    """Windows of the held-out text."""
    eval_length: int = DataConfig.length
    """Tokens of such a window."""
    eval_guard: float | None = 1.0
    """Perplexity up to which the checkpoint passes its verification, in multiples of the vocabulary's size, which is
    guessing evenly; null, or a dense model beyond it: any finite one."""
    verify: bool = True
    """Verify the checkpoint in a fresh process, without held-out text too: tensors, coverage, a short generation."""
    sample: str | None = None
    """Prompt that both models continue; null: no sample."""
    sample_tokens: int = SAMPLE_TOKENS
    """Most new tokens of a sample."""
    json: str | None = None
    """File for every printed figure."""
    logger: str = "csv"
    """Where metrics go besides OUT.run/metrics.jsonl: csv, or also tensorboard or wandb (offline without a key)."""
    max_memory: str | None = None
    """Most main memory, such as 16GB: the run plans to stay below it, or says beforehand what would; null: any."""
    max_gpu_memory: str | None = None
    """The same of the GPU."""
    verbose: bool = False
    """Show what each block and each held-out measurement gave."""

    def __post_init__(self) -> None:
        if isinstance(self.text, list) and len(self.text) == 1:
            object.__setattr__(self, "text", self.text[0])  # one text is on record as itself
        if self.self_text_file is not None:
            check_place(self.self_text_file)
        check_logger(self.logger)
        if self.eval_guard is not None and not self.eval_guard > 0:
            raise ValueError(f"eval_guard must be above 0 or null, got {self.eval_guard}")
        for name in ("max_memory", "max_gpu_memory"):
            if (text := getattr(self, name)) is not None:
                parse_bytes(text, name)
        if self.sample is not None:
            check_sample(self.sample, self.sample_tokens)
        places = {
            Path(self.output).absolute(): "output folder",
            run_folder(self.output): "record of the run",
        }
        if self.json is not None and (what := places.get(Path(self.json).absolute())):
            raise ValueError(f"--json {self.json} is the {what}; give a file")

    @property
    def evaluation(self) -> DataConfig | None:
        """Text and windows of the perplexity; None without a text."""
        if self.eval_text is None:
            return None
        return DataConfig(text=self.eval_text, windows=self.eval_windows, length=self.eval_length)

    @property
    def measures(self) -> bool:
        """Whether a model has to run for the figures."""
        return self.evaluation is not None or self.sample is not None
