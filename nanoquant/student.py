"""What trains of a student: its binary layers, and the norms beside and above them."""

from __future__ import annotations

from torch import nn

from nanoquant.linear import BinaryLowRankLinear


def binary_layers(model: nn.Module) -> dict[str, BinaryLowRankLinear]:
    """Binary layers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, BinaryLowRankLinear)}


def norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Vectors of normalisation modules beside binary layers or above them.

    Those are the norms of the blocks that hold binary layers, and the model's last one; blocks that stay
    dense keep theirs. A normalisation module is one whose class name says so.
    """
    above = {
        name.rsplit(".", k)[0]
        for name in binary_layers(model)
        for k in range(1, name.count(".") + 1)
    }
    return [
        parameter
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and name.rpartition(".")[0] in above | {""}
        for parameter in module.parameters(recurse=False)
        if parameter.ndim == 1
    ]
