"""Random factors, and models whose block linears are random packed layers."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nanoquant.binary import BinaryFactors
from nanoquant.checkpoint import pack_model
from nanoquant.linear import BinaryLowRankLinear


def random_factors(d_out, d_in, rank, seed=0):
    g = torch.Generator().manual_seed(seed)
    U, V = torch.randn(d_out, rank, generator=g), torch.randn(d_in, rank, generator=g)
    s1, s2 = torch.rand(d_out, generator=g) + 0.5, torch.rand(d_in, generator=g) + 0.5
    return BinaryFactors(U, V, 0.1 * s1, 0.1 * s2)


def replace_linears(model, rank=32, head=False):
    """Random latent layers in place of all linears; the head only if asked."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | Conv1D) or (name == "lm_head" and not head):
            continue
        shape = module.weight.shape
        d_out, d_in = shape if isinstance(module, nn.Linear) else shape[::-1]
        factors = random_factors(d_out, d_in, rank, seed=len(name))
        model.set_submodule(name, BinaryLowRankLinear.from_factors(factors, module.bias))
    return model


def pack_randomly(model, rank=32, head=False, **options):
    return pack_model(replace_linears(model, rank, head), **options)
