"""Factorize one matrix into signs and scales, and see what a bit buys.

    python tutorials/one_matrix.py

W (d_out, d_in) becomes diag(s1) U V^T diag(s2) with U and V of entries +1 and -1 and r columns each. More columns are
more bits and less error. Importances say which inputs and outputs matter: the same bits then go where they count.
"""

import torch

from nanoquant import ADMMInitializer, Importance
from nanoquant.admm import ADMMConfig
from nanoquant.binary import relative_error
from nanoquant.budget import layer_bits

D_OUT, D_IN = 384, 256


def main():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(D_OUT, D_IN, generator=generator)
    even = Importance(input=torch.ones(D_IN), output=torch.ones(D_OUT))
    peaked = torch.linspace(-3, 3, D_IN).exp()
    uneven = Importance(input=peaked / peaked.mean(), output=torch.ones(D_OUT))
    initializer = ADMMInitializer(ADMMConfig(iterations=100))

    print("rank  bits per weight  relative squared error")
    for rank in (32, 64, 96, 128):
        factors = initializer(W, even, rank)
        bits = layer_bits(D_OUT, D_IN, rank) / W.numel()
        print(f"{rank:4}  {bits:15.3f}  {relative_error(W, factors.dense()).item():22.4f}")

    print()
    print("at rank 96, where inputs differ in importance:")
    for name, importance in (("unweighted", even), ("weighted", uneven)):
        dense = initializer(W, importance, 96).dense()
        error = relative_error(W, dense, uneven.input).item()
        print(f"  {name:10} fit, error weighted by importance: {error:.4f}")


if __name__ == "__main__":
    main()
