"""Settings of the report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What is read and where the page goes."""

    folder: str
    """Folder of a run, OUT.run, or the checkpoint OUT beside it."""
    output: str | None = None
    """Folder for report.html and the PNGs; null: the folder "report" within that of the run."""
    records: list[str] | None = None
    """More evaluation records for the perplexity plot: files of nanoquant evaluate --json, or folders of them."""
    spectra: int = 9
    """Layers whose singular values are computed from the dense source; 0 skips it."""

    def __post_init__(self) -> None:
        if self.spectra < 0:
            raise ValueError(f"spectra must be at least 0, got {self.spectra}")
