"""Weights & Biases through Lightning's logger: offline without a key, and never in the way of a run.

Panels are grouped by the part of a name before the slash, so by phase and by block, each over an axis of its own
(``layout.py``). A server that does not answer makes the run an offline one, which ``wandb sync`` sends later.
"""

from __future__ import annotations

import logging
import netrc
import os
import queue
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nanoquant.tracking.folder import RunFolder
from nanoquant.tracking.layout import LAYER_COLUMNS, Layout, Point
from nanoquant.tracking.sinks import one_line

logger = logging.getLogger(__name__)

PROJECT = "nanoquant"
ANSWER_SECONDS = 5.0
"""How long a server may take to answer before the run is kept offline."""
INIT_SECONDS = 20.0
"""How long it may take to open a run."""
FINISH_SECONDS = 60.0
"""How long the end of a run waits for what is not sent yet; it stays on disk."""
BEST_IS_LEAST = ("loss", "held_out", "error")
"""Metrics whose summary is their minimum; of others it is the last value."""


def has_key(server: str) -> bool:
    """Whether there is a key for the server: in WANDB_API_KEY, or where ``wandb login`` leaves it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    file = os.environ.get("NETRC") or Path.home() / ".netrc"
    try:
        return netrc.netrc(file).authenticators(urlsplit(server).netloc) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def answers(server: str, seconds: float = ANSWER_SECONDS) -> bool:
    """Whether anything that speaks HTTP answers there in time; a slow name look-up counts as silence."""
    heard: queue.Queue[bool] = queue.Queue()

    def ask() -> None:
        try:
            urllib.request.urlopen(server, timeout=seconds).close()
        except urllib.error.HTTPError:
            pass  # an answer as well
        except (OSError, ValueError):
            heard.put(False)
        heard.put(True)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return heard.get(timeout=seconds)
    except queue.Empty:
        return False


def open_run(folder: RunFolder) -> Any:  # noqa: ANN401
    """Open a run of wandb, online only if there is a key and a server that answers.

    WANDB_MODE, WANDB_PROJECT and WANDB_RUN_ID are respected. Where a run of the same output was not finished, this
    one goes on under its id.
    """
    import wandb

    about = folder.content
    server = wandb.setup().settings.base_url
    earlier = folder.earlier if folder.earlier.get("status") != "finished" else {}
    mode = os.environ.get("WANDB_MODE") or ("online" if has_key(server) else "offline")
    if mode == "online" and not answers(server):
        logger.warning("%s does not answer; %s", server, _later(folder))
        mode = "offline"
    arguments = {
        "project": os.environ.get("WANDB_PROJECT") or PROJECT,
        "name": Path(about["output"]).name,
        "id": os.environ.get("WANDB_RUN_ID") or earlier.get("wandb", {}).get("id"),
        "resume": "allow",
        "dir": str(folder.path),
        "config": {key: about[key] for key in ("source", "job", "versions")} | about["config"],
        "settings": wandb.Settings(
            silent=True, console="off", init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS
        ),
    }
    try:
        run = wandb.init(mode=mode, **arguments)
    except Exception as error:  # of many kinds, and none is worth the run
        if mode != "online":
            raise
        reason = str(error).splitlines()[0][:200]
        logger.warning("%s did not open a run (%s); %s", server, reason, _later(folder))
        mode, run = "offline", wandb.init(mode="offline", **arguments)
    folder.update(wandb={"id": run.id, "project": arguments["project"], "mode": mode})
    return run


def _later(folder: RunFolder) -> str:
    return f"this run is logged offline in {folder.path / 'wandb'}, and `wandb sync` sends it later"


class WandbSink:
    """Series, histograms, tables, summary and artifacts of one run.

    Args:
        folder: of the run; wandb's own files go there too.
    """

    name = "Weights & Biases"

    def __init__(self, folder: RunFolder) -> None:
        from lightning.pytorch.loggers import WandbLogger

        self.run = open_run(folder)
        self.logger = WandbLogger(experiment=self.run)
        self.layout, self.defined = Layout(), set()

    def record(self, record: dict[str, Any]) -> None:
        """Log a record: figures of a whole model to the summary, latents as a histogram, the rest as series."""
        if "latent_counts" in record:
            self._log_latents(record)
        elif "model" in record:
            self._summarize(record["model"], record)
        for point in self.layout.points(record):
            self._log(point)

    def flush(self) -> None:
        """Nothing to do: wandb writes as it goes."""

    def finish(self, run: dict[str, Any]) -> None:
        """Tables, summary and artifacts, and the end of the run."""
        for point in self.layout.after_model():
            self._log(point)
        figures = run.get("figures") or {}
        for key in ("seconds", "memory_bytes"):
            self._summarize(key, run.get(key) or {})
        self._summarize("run", {"excess_nats_per_token": figures.get("excess_nats_per_token")})
        self.run.summary["run/status"] = run["status"]
        try:
            self._log_tables(run, figures)
            if run["status"] == "finished":
                self._log_artifacts(run, figures)
        except (
            Exception
        ) as error:  # these ask the server, which may be silent by now; the rest is kept
            logger.warning("%s lacks tables or artifacts: %s", self.name, one_line(error))
        self.run.finish(exit_code=0 if run["status"] == "finished" else 1)

    def _log(self, point: Point) -> None:
        self._define(point.axis, hidden=True)
        for name in point.values:
            best = "min" if name.rpartition("/")[2] in BEST_IS_LEAST else "last"
            self._define(name, step_metric=point.axis, summary=best)
        self.logger.log_metrics({**point.values, point.axis: point.at})

    def _define(self, name: str, **how: Any) -> None:  # noqa: ANN401
        if name not in self.defined:
            self.defined.add(name)
            self.run.define_metric(name, **how)

    def _log_latents(self, record: dict[str, Any]) -> None:
        import wandb

        name, axis = f"latents/{record['layer']}", f"{record['phase']}/step"
        self._define(axis, hidden=True)
        self._define(name, step_metric=axis)
        counts, edges = record["latent_counts"], record["latent_edges"]
        histogram = wandb.Histogram(np_histogram=(counts, edges))
        self.logger.log_metrics({name: histogram, axis: record["step"]})

    def _summarize(self, group: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float) and name != "t":
                self.run.summary[f"{group}/{name}"] = value

    def _log_tables(self, run: dict[str, Any], figures: dict[str, Any]) -> None:
        self.logger.log_table("tables/layers", list(LAYER_COLUMNS), self.layout.rows())
        prompt = run.get("job", {}).get("sample")
        if figures and prompt is not None:
            row = [prompt, figures["dense"]["sample"], figures["quantized"]["sample"]]
            self.logger.log_table("tables/samples", ["prompt", "dense", "quantized"], [row])

    def _log_artifacts(self, run: dict[str, Any], figures: dict[str, Any]) -> None:
        """The dense model as what the run read, the checkpoint as what it made; references, no weights."""
        import wandb

        def artifact(place: str, **about: Any) -> wandb.Artifact:  # noqa: ANN401
            name = re.sub(r"[^\w.-]+", "-", Path(place).name) or "model"
            made = wandb.Artifact(name, type="model", metadata={"place": place, **about})
            if Path(place).is_dir():
                made.add_reference(Path(place).absolute().as_uri(), checksum=False)
            return made

        if not self.run.offline:  # wandb does not take inputs offline; the metadata below names it
            self.run.use_artifact(artifact(run["source"]))
        about = {"source": run["source"], "run": self.run.id, "config": run["config"]}
        about |= {"sizes": figures.get("quantized", {}).get("sizes", {})}
        self.run.log_artifact(artifact(run["output"], **about))
