"""The command ``estimate``: what a quantization will take, from a configuration and headers alone."""

from __future__ import annotations

from pathlib import Path

import torch

import nanoquant.job  # noqa: F401 - what quantize imports is what its process takes
from nanoquant.advice.catalogue import find
from nanoquant.checkpoint_files import INDEX_FILE, SINGLE_FILE
from nanoquant.config import NanoQuantConfig
from nanoquant.console import check_json_path, say, show_logs
from nanoquant.estimate.estimate import make_estimate
from nanoquant.estimate.request import EstimateConfig
from nanoquant.estimate.show import report, to_dict
from nanoquant.estimate.subject import Subject, skeleton_in, subject_of, subject_of_folder
from nanoquant.json_files import write_json
from nanoquant.memory import process_bytes
from nanoquant.sizes import tensor_bytes
from nanoquant.sources import check_dense, device_of


def estimate_command(request: EstimateConfig, config: NanoQuantConfig) -> None:
    """Print ranks, sizes, memory, disk and time of a run; no weight is read.

    Raises:
        ValueError: the model is unknown or can't be quantized, or the bits can't be met.
    """
    check_json_path(request.json)
    show_logs(verbose=False)
    base = process_bytes()
    device = device_of(config.run.accelerator)
    found = make_estimate(find_subject(request.source, config), config, request, base, device)
    say(report(found))
    write_json(request.json, to_dict(found))


def find_subject(source: str, config: NanoQuantConfig) -> Subject:
    """The model of a folder with weights by their headers, any other by its configuration alone.

    Raises:
        ValueError: as of :func:`nanoquant.advice.catalogue.find`, or a weight file is damaged.
    """
    folder = Path(source)
    if any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        check_dense(folder)
        return subject_of_folder(folder, config)
    named = find(source)
    dtype = named.config.dtype or torch.bfloat16
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    model = skeleton_in(named.config, dtype)
    return subject_of(source, model, config, tensor_bytes(model.parameters()), mapped=True)
