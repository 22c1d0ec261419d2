"""What processes that divide a model compute in tests: ``torchrun --nproc-per-node 2 two_shards.py FOLDER CASE...``."""

import dataclasses
import shutil
import sys
from pathlib import Path

import torch
from test_model_reconstruction import SIGNS, reconstruct
from test_unfinished import QUICK, Kill, Killed
from tiny_models import FAMILIES, random_windows, tiny_llama

from nanoquant import model_reconstruction, processes, tensor_file
from nanoquant.architectures import find_decoder
from nanoquant.config import nanoquant_config
from nanoquant.course import Course
from nanoquant.offload import offload
from nanoquant.quantize import quantize
from nanoquant.recorder import RecordBuffer
from nanoquant.shards import is_shard
from nanoquant.training import Reconstruction

SHARD = dataclasses.replace(SIGNS, shard=True, batch=5, epochs=2)  # the last of 24 windows is alone
TOKENS = random_windows(24, 16).flatten()
SPOILT = 3
"""Step that is not finite."""


def results(student, report):
    """What runs are compared by."""
    found = {"losses": report.losses, "held out": report.held_out, "undone": report.undone}
    return found | {"tensors": dict(student.state_dict())}


def trained(build=tiny_llama, precision="32-true", **changes):
    """A tiny student after its training."""
    config = dataclasses.replace(SHARD, **changes)
    return results(*reconstruct(config, build, precision=precision)[2:])


def part(tensor):
    """What this process holds of a tensor."""
    return tensor.to_local() if is_shard(tensor) else tensor


def held():
    """Bytes of each kind that this process held, and how many of its tensors were whole; the records of it."""
    seen, whole = {}, 0
    keep, clip = Course.keep, Reconstruction.configure_gradient_clipping

    def count(kind, tensors):
        nonlocal whole
        tensors = [tensor for tensor in tensors if tensor.ndim]
        whole += sum(not is_shard(tensor) for tensor in tensors)
        seen[kind] = max(seen.get(kind, 0), sum(part(tensor).nbytes for tensor in tensors))

    def at_keep(course, module):
        count("parameters", course.keeper.parameters)
        count("best state", course.keeper.state)
        count("last good state", module.good)
        moments = module.optimizers(use_pl_optimizer=False).state.values()
        count("moments", [tensor for state in moments for tensor in state.values()])
        return keep(course, module)

    def at_clip(module, *arguments, **named):
        count("gradients", [parameter.grad for parameter in module.trained()])
        return clip(module, *arguments, **named)

    Course.keep, Reconstruction.configure_gradient_clipping = at_keep, at_clip
    records = RecordBuffer(processes.first())
    try:
        report = reconstruct(dataclasses.replace(SHARD, batch=2), recorder=records)[3]
    finally:
        Course.keep, Reconstruction.configure_gradient_clipping = keep, clip
    return {"bytes": seen, "whole": whole, "records": records.records, "losses": report.losses}


def undone(spoil):
    """A training of which one process spoils one step."""
    divergence, calls = model_reconstruction.logits_divergence, []

    def spoilt(*arguments):
        value = divergence(*arguments)
        calls.append(0)
        last = processes.rank() == processes.world_size() - 1
        return spoil(value) if last and len(calls) == SPOILT + 1 else value

    model_reconstruction.logits_divergence = spoilt
    try:
        return trained()
    finally:
        model_reconstruction.logits_divergence = divergence


def spoil_loss(value):
    return value * float("nan")


def spoil_gradient(value):
    value.register_hook(lambda gradient: gradient * float("inf"))
    return value


def compiled():
    """A training in compiled blocks, and how many graphs that gave."""
    torch._dynamo.utils.counters.clear()
    found = trained(compile_from=1)
    return found | {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


def quantized(work, kill=None, shard=True, visiting=False):
    """A quantized model, whose dense blocks may visit the device; killed at a step, it is None."""
    settings = {"shard": shard, "kept_logits": 8, "recompute": True}
    config = dataclasses.replace(QUICK, model=dataclasses.replace(QUICK.model, **settings))
    model, progress = tiny_llama(), Killed(kill)
    if visiting:
        offload(model, find_decoder(model).blocks, torch.device("cpu"))
    try:
        report = quantize(model, TOKENS, config, progress=progress, work=work)
    except Kill:
        return None
    return results(model, report.model) | {"counts": progress.counts}


def looked_up(shard=True):
    """A model quantized by codebooks, which train together with scales and norms."""
    config = nanoquant_config(
        2.0,
        method="product",
        calibration={"windows": 4, "length": 16},
        model={"windows": 7, "epochs": 4, "batch": 2, "held_out": 2, "shard": shard},
        run={"save_every": None},
    )
    model = tiny_llama()
    return results(model, quantize(model, TOKENS, config).model)


def killed(folder):
    """A run that is killed, left so in a second folder, and gone on with."""
    assert quantized(folder / "work", kill=20) is None
    if processes.first():
        shutil.copytree(folder / "work", folder / "left")
    processes.on_first(lambda: None)
    return quantized(folder / "work")


def full(folder):
    """What this process says when the disk of the first one is full after the first of many tensors."""

    def fills(path, like, parts, metadata):
        next(parts)
        raise OSError(28, "No space left on device")

    tensor_file.save_parts, save = fills, tensor_file.save_parts
    try:
        quantized(folder / "full")
    except OSError as error:
        return str(error)
    finally:
        tensor_file.save_parts = save


CASES = {
    "trained": lambda folder: trained(),
    "held": lambda folder: held(),
    "bfloat16": lambda folder: trained(lambda: tiny_llama(dtype=torch.bfloat16), "bf16-mixed"),
    "copies": lambda folder: trained(
        lambda: tiny_llama(dtype=torch.bfloat16), "bf16-mixed", shard=False
    ),
    "loss": lambda folder: undone(spoil_loss),
    "gradient": lambda folder: undone(spoil_gradient),
    "quantized": lambda folder: quantized(folder / "whole"),
    "looked up": lambda folder: looked_up(),
    "killed": killed,
    "full": full,
    "compiled": lambda folder: compiled(),
} | {family: lambda folder, f=family: trained(FAMILIES[f], epochs=1) for family in FAMILIES}


def cases(folder, names):
    """Some of them, by name."""
    processes.join("cpu", 60.0)
    return {name: CASES[name](folder) for name in names}


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    torch.save(cases(Path(folder), names), Path(folder) / f"{processes.rank()}.pt")
