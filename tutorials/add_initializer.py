"""Plug an initializer of your own into the pipeline, and see what it is worth against ADMM.

    python tutorials/add_initializer.py

An initializer is any function (W (B, d_out, d_in), importance, size, generator) -> factors of a batch of weights. No
registry, no base class: `quantize(..., initializer=yours)` takes it. Here are two by singular vectors.
"""

import copy

import torch
from small_model import TEST, TRAIN, small_model, windows

import nanoquant
from nanoquant.admm import refit_scales
from nanoquant.binary import BinaryFactors, sign
from nanoquant.importance import check_inputs


def from_latents(U, V, W, i, o):
    """Factors with the signs of U (B, d_out, r) and V (B, d_in, r), and scales by weighted least squares."""
    ones = U.new_ones
    factors = BinaryFactors(U, V, ones(U.shape[:-1]), ones(V.shape[:-1]))
    gain = W.norm(dim=(-2, -1)) / (sign(U) @ sign(V).mT).norm(dim=(-2, -1))
    factors = BinaryFactors(U, V, factors.s1 * gain.unsqueeze(-1), factors.s2)
    for _ in range(4):
        factors = refit_scales(factors, W, i, o)
    return factors


class SingularSigns:
    """Signs of U S^1/2 Q and V S^1/2 Q, where W = U S V^T is weighted by importance; Q rotates, or not.

    U S V^T = (U S^1/2 Q) (V S^1/2 Q)^T for each Q with orthonormal rows. Signs forget magnitudes, so without a rotation
    the last singular vectors count as much as the first ones; with it, all columns carry about the same.
    """

    def __init__(self, rotate):
        self.rotate = rotate

    @torch.no_grad()
    def __call__(self, weight, importance, rank, generator):
        # check_inputs refuses what is not finite or does not fit, as every initializer should.
        W, i, o = check_inputs(weight, importance)
        U, S, Vt = torch.linalg.svd(o.sqrt().unsqueeze(-1) * W * i.sqrt().unsqueeze(-2), False)
        k = min(rank, S.shape[-1])
        root = S[..., :k].sqrt().unsqueeze(-2)
        Q = torch.eye(k, rank)
        if self.rotate:
            Q = torch.linalg.qr(torch.randn(rank, rank, generator=generator))[0][:k]
        return from_latents(U[..., :k] * root @ Q, Vt.mT[..., :k] * root @ Q, W, i, o)


def main():
    dense, tokenizer = small_model()
    text, held_out = windows(tokenizer, TRAIN, 32).flatten(), windows(tokenizer, TEST, 64)
    print(f"dense: perplexity {nanoquant.perplexity(dense, held_out, 16).value:.2f}\n")

    # Each with the same text, ranks, and no training behind it, so that the starts are compared and nothing else.
    # Measured ranks would run the initializer twice; uniform ones do without.
    config = nanoquant.nanoquant_config(
        bits=1.0,
        budget={"rank_multiple": 8, "allocation": "uniform"},
        importance={"curvature": "diagonal"},
        calibration={"windows": 32, "length": 64},
        model={"train": "none"},
    )
    initializers = {
        "singular signs": SingularSigns(rotate=False),
        "the same, rotated": SingularSigns(rotate=True),
        "ADMM": nanoquant.ADMMInitializer(config.admm),
    }
    print("initializer         mean weight error  perplexity")
    for name, initializer in initializers.items():
        model = copy.deepcopy(dense)
        report = nanoquant.quantize(model, text, config, initializer=initializer)
        errors = [e for block in report.blocks.values() for e in block.weight_error.values()]
        value = nanoquant.perplexity(model, held_out, 16).value
        print(f"{name:18}  {sum(errors) / len(errors):17.4f}  {value:10.2f}")

    # An initializer that is worth having keeps its lead after training, at two seeds or more, on a real model:
    # `recipes/ablate.py` compares settings in that way.


if __name__ == "__main__":
    main()
