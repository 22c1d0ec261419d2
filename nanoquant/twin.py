"""A second model with the weights of the first: one copy in memory, until one of the two changes."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def twin(model: Module) -> Module:
    """Copy a model, but not what its parameters hold.

    Who changes a parameter of one of the two gives it new data (``p.data = ...``): writing into it would change
    the other as well. Buffers are copied.

    Args:
        model: any; tied parameters are tied in the copy too.

    Returns:
        The copy, each of whose parameters is its own and shares its values.
    """
    shared = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, shared)
