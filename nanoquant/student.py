"""What trains of a student: its quantized layers, and the norms beside and above them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from nanoquant.methods import Layer


def quantized_layers(model: nn.Module) -> dict[str, Layer]:
    """Layers of either method by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Layer)}


def norm_parameters(model: nn.Module, layers: Iterable[str] | None = None) -> list[nn.Parameter]:
    """Vectors of normalisation modules beside quantized layers or above them.

    Those are the norms of the blocks that hold quantized layers, and the model's last one; blocks that stay
    dense keep theirs. A normalisation module is one whose class name says so.

    Args:
        model: holds them.
        layers: names of its quantized layers; None: those that train.
    """
    above = {
        name.rsplit(".", k)[0]
        for name in (quantized_layers(model) if layers is None else layers)
        for k in range(1, name.count(".") + 1)
    }
    return [
        parameter
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and name.rpartition(".")[0] in above | {""}
        for parameter in module.parameters(recurse=False)
        if parameter.ndim == 1
    ]


def make_trainable(layers: Iterable[Layer], norms: Iterable[nn.Parameter], signs: bool) -> None:
    """Have scales and biases take gradients; with ``signs`` latents, of mean magnitude 1, codebooks and norms as well.

    Norms become float32.
    """
    for layer in layers:
        for latent in layer.thaw().latents() if signs else ():
            latent.data = latent.data / latent.data.abs().mean()  # it may lie in a file
        for parameter in layer.vectors():
            parameter.requires_grad_(True)
        for parameter in (*layer.latents(), *layer.codebooks()):
            parameter.requires_grad_(signs)
    for norm in norms if signs else ():
        norm.data = norm.data.to(torch.float32, copy=True)
        norm.requires_grad_(True)


def prepared(student: nn.Module, train: str) -> nn.Module:
    """A student itself, of which that trains which ``train`` says, see ``ModelConfig``."""
    student.requires_grad_(False)
    layers = quantized_layers(student).values()
    make_trainable(layers, norm_parameters(student), train == "signs")
    return student
