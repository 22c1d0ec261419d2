"""What tells one model from another, without reading all of it, and one code from another."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import nn

import nanoquant_kernels
from nanoquant.mapped import forget

SAMPLED_WEIGHTS = 256
"""Values of each parameter that are looked at, spread over all of it."""


def model_digest(model: nn.Module) -> str:
    """Digest of names, shapes, types and a sample of the values of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        values = parameter.detach().flatten()[:: max(1, parameter.numel() // SAMPLED_WEIGHTS)]
        digest.update(values.float().cpu().numpy().tobytes())
        forget([parameter])
    return digest.hexdigest()


def code_digest() -> str:
    """Digest of the source files of library and kernels, which an editable install changes without a new version.

    Packages inside, which measure and report, don't count.
    """
    digest = hashlib.sha256()
    for place in (__file__, nanoquant_kernels.__file__):
        for file in sorted(Path(place).parent.glob("*.py")):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
