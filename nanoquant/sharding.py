"""A student whose trained tensors are divided over the processes: FSDP2 of torch, a decoder block at a time.

Each process holds its rows of every latent, scale and norm, and with them its part of gradients, moments and copies. A
block is gathered where it runs, forward and backward, and let go after it. All processes run every block alike, so one
that has no window takes part by :func:`idle`. What does not train is whole in each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanoquant.compiling import passed_blocks, uncompiled
from nanoquant.offload import settle
from nanoquant.processes import world_size
from nanoquant.shards import is_shard, whole
from nanoquant.student import make_trainable, norm_parameters, quantized_layers
from nanoquant.twin import twin


def sharded(student: nn.Module) -> nn.Module:
    """A twin of a student whose latents, scales and norms are shards, ready to train.

    The student's own are let go block by block; :func:`put_back` gives them back.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    copy, plain = twin(student).requires_grad_(False), dict(student.named_parameters())
    mesh = init_device_mesh(next(student.parameters()).device.type, (world_size(),))
    names = {module: name for name, module in copy.named_modules()}
    norms = set(norm_parameters(copy))
    for module in (*outermost(passed_blocks(copy)), copy):
        settle(module)
        layers = quantized_layers(module).values()
        whole_layers = [layer for layer in layers if not is_shard(layer.vectors()[0])]
        make_trainable(whole_layers, norms.intersection(module.parameters()), signs=True)
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        frozen = {p for p in module.parameters() if not p.requires_grad}
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=frozen)
        for name in trained:
            own = plain.get(f"{names[module]}.{name}".lstrip("."))
            if own is not None:  # a frozen layer has no latents
                own.data = own.data.new_empty(0)
    return copy


def outermost(blocks: list[nn.Module]) -> list[nn.Module]:
    """Those that lie in no other one."""
    inner = {module for block in blocks for module in block.modules() if module is not block}
    return [block for block in blocks if block not in inner]


@torch.no_grad()
def put_back(copy: nn.Module, student: nn.Module) -> None:
    """Whole tensors of a sharded copy in the place of those of its student, whose layers are frozen one by one."""
    shards = {name: p for name, p in copy.named_parameters() if is_shard(p)}
    for name, layer in quantized_layers(student).items():
        layer.thaw()
        for part, parameter in layer.named_parameters():
            parameter.data = whole(shards.pop(f"{name}.{part}").detach())
        layer.freeze()
    plain = dict(student.named_parameters())
    for name, shard in shards.items():
        plain[name].data = whole(shard.detach())


def idle(student: nn.Module) -> Tensor:
    """0, whose gradient is 0: a process without a window takes part in a pass of the others, on a single token."""
    token = torch.zeros(1, 1, dtype=torch.long, device=next(student.parameters()).device)
    with uncompiled():
        return 0 * student(input_ids=token, use_cache=False).logits.float().sum()
