"""What two processes compute with packed weights in tests: ``torchrun --nproc-per-node 2 two_packed.py FOLDER``."""

import copy
import sys
from pathlib import Path

import torch
from packed_models import random_factors, random_look_ups
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from nanoquant import pack_model, processes
from nanoquant.packed_tensor import PackedBinaryTensor
from nanoquant.product_budget import ProductShape
from nanoquant.product_tensor import PackedProductTensor

KINDS = {
    "signs": 24,
    "one codebook": ProductShape(4, (6,), 1),
    "codebooks of rows": ProductShape(8, (4, 6), 4),
}
PLAN = {"0": ColwiseParallel, "2": RowwiseParallel}


def packed_linear(d_in, d_out, size, bias, seed):
    """A linear whose weight is packed."""
    torch.manual_seed(seed)
    linear = nn.Linear(d_in, d_out, bias)
    looked_up = isinstance(size, ProductShape)
    make, kind = (
        (random_look_ups, PackedProductTensor)
        if looked_up
        else (random_factors, PackedBinaryTensor)
    )
    weight = kind.from_factors(make(d_out, d_in, size, seed=seed), torch.float32)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def build(size, width=128):
    """Two packed linears, with a bias and without."""
    second = packed_linear(width, 48, size, False, 1)
    return nn.Sequential(packed_linear(64, width, size, True, 0), nn.ReLU(), second)


def given():
    return torch.randn(2, 5, 64, generator=torch.manual_seed(2))


def computed(model):
    """Output, and gradient at the input."""
    x = given().requires_grad_()
    y = model(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    return {"output": y.detach(), "gradient": gradient}


def refusal(function):
    """What is said where it is refused."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def divided(size, mesh, source):
    """By rows and columns over the processes, from the first one or from each one's own."""
    model = build(size)
    if source == 0 and processes.rank():  # what this process has must not matter
        for linear in (model[0], model[2]):
            linear.weight.copy_(packed_linear(*linear.weight.shape[::-1], size, False, 7).weight)
    plan = {name: style() for name, style in PLAN.items()}
    parallelize_module(model, mesh, plan, src_data_rank=source)
    weights = [model[i].weight.to_local() for i in (0, 2)]
    found = {"held": [(type(w).__name__, tuple(w.shape)) for w in weights]}
    return computed(model) | found | {"dense": [w.dequantize() for w in weights]}


def sharded(size, mesh, packed=False, dtype=None, width=128):
    """By FSDP2; twice, because the second gathering uses the memory of the first."""
    model = build(size, width)
    if packed:
        pack_model(model)
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    names = dict(model.named_parameters())
    held = {name: tuple(p.to_local().shape) for name, p in names.items()}
    kinds = {name: type(p.to_local()).__name__ for name, p in names.items()}
    state = copy.deepcopy(model.state_dict())
    first, second = computed(model), computed(model)
    model.load_state_dict(state)
    third = computed(model)
    return {"held": held, "kinds": kinds, "runs": [first, second, third]}


def cases():
    """All of it."""
    processes.join("cpu", 60.0)
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for kind, size in KINDS.items():
        found[kind] = {
            "own": divided(size, mesh, None),
            "sent": divided(size, mesh, 0),
            "fsdp": sharded(size, mesh),
            "packed": sharded(size, mesh, packed=True),
            "bfloat16": sharded(size, mesh, dtype=torch.bfloat16),
        }
    weight = build(24)[0].weight
    odd = packed_linear(40, 24, 16, False, 0).weight
    found["refused"] = {
        "columns": refusal(lambda: distribute_tensor(odd, mesh, [Shard(1)])),
        "uneven": refusal(lambda: sharded(24, mesh, width=127)),
        "whole": refusal(lambda: distribute_tensor(weight, mesh, [Shard(0)]).full_tensor()),
    }
    found["uneven packed"] = sharded(24, mesh, packed=True, width=127)
    return found


if __name__ == "__main__":
    torch.save(cases(), Path(sys.argv[1]) / f"{processes.rank()}.pt")
