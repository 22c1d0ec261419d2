"""The command ``resume``: a run that was killed goes on, with the settings that it began with."""

from __future__ import annotations

import os
from pathlib import Path

from nanoquant.config import NanoQuantConfig
from nanoquant.finish import left_unmeasured
from nanoquant.job import run_job
from nanoquant.job_config import JobConfig
from nanoquant.tracking.folder import RUN_FILE, read_run, run_folder


def resume_command(output: str) -> None:
    """Run the ``quantize`` of a record again, which goes on with what it has left, be it only to measure.

    Paths mean what they meant then: the command works in the directory in which the run was started.

    Args:
        output: the folder that the checkpoint was to be written to; its record lies beside it.

    Raises:
        ValueError: there is no record, it is of a run that has ended well or of another version, or its directory is
            gone; or what ``quantize`` raises.
    """
    folder = run_folder(output)
    record = read_run(folder)
    if not record:
        raise ValueError(
            f"{folder / RUN_FILE} is absent or damaged, so there is no run of {output} to go on with; start one with "
            "nanoquant quantize"
        )
    if record.get("status") == "finished":
        raise ValueError(f"the run of {output} is finished; nothing is left to do")
    try:
        job, config = JobConfig(**record["job"]), NanoQuantConfig.from_dict(record["config"])
        directory = Path(record["directory"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / RUN_FILE} is not of this version ({error}); give the quantize command again"
        ) from None
    if not directory.is_dir():
        raise ValueError(f"the run was started in {directory}, which is gone; make it again")
    if run_folder(directory / job.output).resolve() != folder.resolve():
        raise ValueError(
            f"{folder / RUN_FILE} is of the run of {directory / job.output}, so the folder was moved or copied; resume "
            "that one, or give the quantize command again"
        )
    os.chdir(directory)
    if (Path(job.output) / "config.json").is_file() and not left_unmeasured(job, config):
        raise ValueError(
            f"{output} has a checkpoint, but not that of its record, which has written none; move one of them away"
        )
    run_job(job, config)
