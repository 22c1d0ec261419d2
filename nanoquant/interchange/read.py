"""A state of the published code, or of its llama.cpp port, as layers of signs and the rest of the model.

Of every quantized linear a state has ``U_packed`` int32 (d_out, ceil(r / 32)), ``V_packed`` int32 (r, ceil(d_in /
32)), ``scale_post`` and ``scale_pre`` of d_out and d_in numbers, and maybe ``U_shape``, ``V_shape``, ``scale_mid`` of r
numbers and ``bias``. The files are a ``.pt`` of the former or safetensors; pickled code is never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from nanoquant.interchange.words import from_words
from nanoquant.tensor_pickles import load_pickle

PARTS = ("U_packed", "V_packed", "U_shape", "V_shape", "scale_pre", "scale_mid", "scale_post")
NEEDED = ("U_packed", "V_packed", "scale_pre", "scale_post")
OUTLIERS = ("salient", "outlier")
PICKLES = (".pt", ".pth", ".bin")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Signs:
    """One linear."""

    u_signs: Tensor
    """uint8 (d_out, ceil(r / 8))."""
    v_signs: Tensor
    """uint8 (r, ceil(d_in / 8))."""
    s1: Tensor
    """(d_out,)."""
    s2: Tensor
    """(d_in,)."""
    bias: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return len(self.s1), len(self.s2)


def read_state(path: Path) -> dict[str, Any]:
    """Everything that a file, or the safetensors of a folder, holds by name.

    Raises:
        ValueError: there is no such file, it is damaged, of another kind, or holds more than tensors and numbers.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"{path} is no file, and no folder with safetensors in it")
    state: dict[str, Any] = {}
    for file in files:
        if file.suffix not in (".safetensors", *PICKLES):
            raise ValueError(f"{file} must end in .safetensors or {', '.join(PICKLES)}")
        found = load_pickle(file) if file.suffix in PICKLES else _load_safetensors(file)
        if not isinstance(found, Mapping):
            raise ValueError(f"{file} holds a {type(found).__name__}, not tensors by name")
        strange = [key for key in found if not isinstance(key, str)]
        if strange:
            raise ValueError(f"{file} has a tensor of the name {strange[0]!r}, which is no text")
        state |= found
    return state


def _load_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except OSError:
        raise
    except Exception as error:  # the library has no error of its own for every damage
        raise ValueError(f"{file} is damaged or no file of tensors: {error}") from None


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Signs], dict[str, Tensor]]:
    """Quantized linears by name, and all other tensors.

    Raises:
        ValueError: there is no quantized linear, a part of one is missing or of another kind or shape, or one has what
            has no place here: outliers, or scales between U and V that differ.
    """
    names = [key.removesuffix(".U_packed") for key in state if key.endswith(".U_packed")]
    if not names:
        raise ValueError(
            "there is no quantized linear in it: names that end in .U_packed are expected, as the published code "
            "saves them"
        )
    layers, used = {}, set()
    for name in names:
        own = {part: state[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in state}
        more = [
            key for key in state if key.startswith(f"{name}.") and any(o in key for o in OUTLIERS)
        ]
        if more:
            raise ValueError(f"{more[0]}: columns that are kept apart have no place here")
        layers[name] = _signs(name, own, state.get(f"{name}.bias"))
        used |= {f"{name}.{part}" for part in (*own, "bias")}
    rest = {key: value for key, value in state.items() if key not in used}
    strange = [key for key, value in rest.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(f"{strange[0]} is no tensor, but a {type(rest[strange[0]]).__name__}")
    return layers, rest


def _signs(name: str, own: Mapping[str, Any], bias: Any) -> Signs:  # noqa: ANN401
    """One linear from its parts."""
    missing = [part for part in NEEDED if part not in own]
    if missing:
        raise ValueError(f"{name} has no {', '.join(missing)}")
    s1, s2 = (_vector(f"{name}.{part}", own[part]) for part in ("scale_post", "scale_pre"))
    rank = _rank(name, own["V_packed"])
    for part, shape in (("U_shape", (len(s1), rank)), ("V_shape", (rank, len(s2)))):
        given = own.get(part, shape)
        given = given.tolist() if isinstance(given, Tensor) else given
        if not isinstance(given, (list, tuple)) or tuple(given) != shape:
            raise ValueError(f"{name}.{part} is {given}, but its words and scales are of {shape}")
    u_signs = from_words(own["U_packed"], rank, f"{name}.U_packed")
    v_signs = from_words(own["V_packed"], len(s2), f"{name}.V_packed")
    if len(u_signs) != len(s1):
        raise ValueError(f"{name}.U_packed has {len(u_signs)} rows for {len(s1)} scales")
    if bias is not None and len(bias := _vector(f"{name}.bias", bias)) != len(s1):
        raise ValueError(f"{name}.bias has {len(bias)} numbers for {len(s1)} outputs")
    s1 = _with_middle(name, s1, own.get("scale_mid"), rank)
    dtype = torch.promote_types(s1.dtype, s2.dtype)  # one that has all values of both
    return Signs(u_signs, v_signs, s1.to(dtype), s2.to(dtype), bias)


def _rank(name: str, words: Any) -> int:  # noqa: ANN401
    """Rows of the words of V."""
    if not isinstance(words, Tensor) or words.dim() != 2 or not len(words):
        found = tuple(words.shape) if isinstance(words, Tensor) else type(words).__name__
        raise ValueError(f"{name}.V_packed must be words (rank, words of a row), got {found}")
    return len(words)


def _vector(name: str, values: Any) -> Tensor:  # noqa: ANN401
    """Scales or a bias as (n,), in a dtype that checkpoints have."""
    if not isinstance(values, Tensor) or values.dtype not in FLOATS or not values.numel():
        found = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{name} must hold numbers in float32, float16 or bfloat16, got {found}")
    if not values.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity")
    return values.flatten()


def _with_middle(name: str, s1: Tensor, middle: Any, rank: int) -> Tensor:  # noqa: ANN401
    """``s1`` times the scale between U and V, which has to be the same for all ranks; exact as far as float32 goes."""
    if middle is None:
        return s1
    middle = _vector(f"{name}.scale_mid", middle)
    if len(middle) != rank or not (middle == middle[0]).all():
        raise ValueError(
            f"{name}.scale_mid has scales of each rank that differ, which have no place in y = s1 U V^T s2 x"
        )
    product = s1.float() * middle[0].float()
    rounded = product.to(s1.dtype)
    return rounded if torch.equal(rounded.float(), product) else product
