"""Factorize one matrix into signs and scales: its spectrum, what ADMM reaches, and where the error lies.

    python tutorials/one_matrix.py
    python tutorials/one_matrix.py --plot errors.png     the last picture as an image; needs matplotlib

W (d_out, d_in) becomes diag(s1) U V^T diag(s2) with U and V of entries +1 and -1 and r columns each. More columns are
more bits and less error. Importances say which inputs and outputs matter: the same bits then go where they count.
"""

import argparse
import importlib.util
import sys

import torch

from nanoquant import ADMMInitializer, Importance
from nanoquant.admm import ADMMConfig
from nanoquant.binary import relative_error
from nanoquant.budget import layer_bits

D_OUT, D_IN = 384, 256
SHADES = " .:-=+*#%@"


def weight_like_a_trained_one(generator):
    """A matrix with a decaying spectrum and some loud channels, which trained weights have and plain noise has not."""
    noise = torch.randn(D_OUT, D_IN, generator=generator)
    U, S, V = torch.linalg.svd(noise, full_matrices=False)
    decay = torch.linspace(0, 2.5, len(S)).neg().exp()
    loud = 1 + 3 * (torch.rand(D_IN, generator=generator) > 0.95)
    return U @ torch.diag(S * decay) @ V * loud


def shade(errors, rows=12, columns=48):
    """A matrix of errors as text: each character is the mean of a rectangle, darker is more."""
    means = torch.nn.functional.adaptive_avg_pool2d(errors[None], (rows, columns))[0]
    levels = (means / means.max() * (len(SHADES) - 1)).round().int()
    return "\n".join("  " + "".join(SHADES[level] for level in row) for row in levels.tolist())


def save_image(pictures, file):
    """The same pictures as one image."""
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("--plot needs the package matplotlib: pip install 'nanoquant[plots]'")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, len(pictures), sharey=True)
    for place, (name, errors) in zip(axes, pictures.items(), strict=True):
        place.imshow(errors.sqrt(), vmax=pictures["unweighted"].sqrt().max())
        place.set(title=f"{name}: |W - factors|", xlabel="input channel")
    figure.savefig(file)
    print(f"wrote {file}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--plot", metavar="FILE")
    plot = parser.parse_args().plot
    generator = torch.Generator().manual_seed(0)
    W = weight_like_a_trained_one(generator)
    even = Importance(input=torch.ones(D_IN), output=torch.ones(D_OUT))

    # 1. The spectrum. No matrix of rank r is nearer to W than its first r singular triples, so what they leave of the
    # squared norm bounds every factorization of that rank from below.
    left = 1 - torch.linalg.svdvals(W).square().cumsum(0) / W.square().sum()

    # 2. ADMM finds signs and scales. One bit per weight buys about the rank d_out d_in / (d_out + d_in), and the
    # columns show what rank and sign each cost: the bound is what real numbers would leave at the same rank.
    initializer = ADMMInitializer(ADMMConfig(iterations=100))
    print("rank  bits per weight  bound of the rank  error of signs and scales")
    for rank in (32, 64, 96, 128):
        factors = initializer(W, even, rank)
        bits = layer_bits(D_OUT, D_IN, rank) / W.numel()
        error = relative_error(W, factors.dense()).item()
        print(f"{rank:4}  {bits:15.3f}  {left[rank - 1].item():17.4f}  {error:25.4f}")

    # 3. More iterations let signs settle. The penalty rises over a run from 0 to 1, so a short run is not the beginning
    # of a long one: each is a whole schedule.
    print("\niterations  error at rank 96")
    for iterations in (5, 20, 80, 320):
        factors = ADMMInitializer(ADMMConfig(iterations=iterations))(W, even, 96)
        print(f"{iterations:10}  {relative_error(W, factors.dense()).item():16.4f}")

    # 4. Importance. Here inputs on the right carry much larger activations than those on the left. What counts at the
    # output of the layer is the error weighted by that.
    peaked = torch.linspace(-3, 3, D_IN).exp()
    uneven = Importance(input=peaked / peaked.mean(), output=torch.ones(D_OUT))
    print("\nat rank 96, where inputs on the right matter more:")
    pictures = {}
    for name, importance in (("unweighted", even), ("weighted", uneven)):
        dense = initializer(W, importance, 96).dense()
        error = relative_error(W, dense, uneven.input).item()
        print(f"  {name:10} fit, error weighted by importance: {error:.4f}")
        pictures[name] = (W - dense).square()

    # 5. The picture of it: the weighted fit is wrong on the left, where it does not matter.
    for name, errors in pictures.items():
        print(
            f"\nsquared error of the {name} fit, outputs down, inputs to the right:\n{shade(errors)}"
        )
    if plot is not None:
        save_image(pictures, plot)


if __name__ == "__main__":
    main()
