"""Random factors, and models whose block linears are random packed layers."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nanoquant.binary import BinaryFactors
from nanoquant.checkpoint import pack_model
from nanoquant.codebooks import ProductFactors
from nanoquant.methods import layer_of
from nanoquant.product_budget import ProductShape


def random_factors(d_out, d_in, rank, seed=0):
    g = torch.Generator().manual_seed(seed)
    U, V = torch.randn(d_out, rank, generator=g), torch.randn(d_in, rank, generator=g)
    s1, s2 = torch.rand(d_out, generator=g) + 0.5, torch.rand(d_in, generator=g) + 0.5
    return BinaryFactors(U, V, 0.1 * s1, 0.1 * s2)


def random_look_ups(d_out, d_in, shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    books = tuple(torch.randn(shape.slabs, K, shape.group, generator=g) for K in shape.entries)
    size = (d_out, shape.groups(d_in))
    indices = tuple(torch.randint(K, size, generator=g).short() for K in shape.entries)
    return ProductFactors(books, indices, 0.1 * torch.rand(d_out, generator=g) + 0.05, d_in)


def replace_linears(model, size=32, head=False):
    """Random layers of a rank, or of a shape of codebooks, in place of all linears; the head only if asked."""
    make = random_look_ups if isinstance(size, ProductShape) else random_factors
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | Conv1D) or (name == "lm_head" and not head):
            continue
        shape = module.weight.shape
        d_out, d_in = shape if isinstance(module, nn.Linear) else shape[::-1]
        factors = make(d_out, d_in, size, seed=len(name))
        model.set_submodule(name, layer_of(factors, module.bias))
    return model


def pack_randomly(model, size=32, head=False, **options):
    return pack_model(replace_linears(model, size, head), **options)
