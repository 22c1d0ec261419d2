"""A state of the published code, or of its llama.cpp port, as layers of signs and the rest of the model.

Of every quantized linear a state has ``U_packed`` int32 (d_out, ceil(r / 32)), ``V_packed`` int32 (r, ceil(d_in /
32)), ``scale_post`` and ``scale_pre`` of d_out and d_in numbers, and maybe ``U_shape``, ``V_shape``, ``scale_mid`` of r
numbers and ``bias``. The files are a ``.pt`` of the former or safetensors; pickled code is never run.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from nanoquant.interchange.words import from_words

PARTS = ("U_packed", "V_packed", "U_shape", "V_shape", "scale_pre", "scale_mid", "scale_post")
NEEDED = ("U_packed", "V_packed", "scale_pre", "scale_post")
OUTLIERS = ("salient", "outlier")
PICKLES = (".pt", ".pth", ".bin")


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
        try:
            found = load_file(file) if file.suffix == ".safetensors" else _load_pickle(file)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{file} holds pickled code besides tensors, which is never run here: save its state dict alone "
                f"({error})"
            ) from None
        except OSError:
            raise
        except Exception as error:  # what is damaged in a pickle shows in almost every kind
            raise ValueError(f"{file} is damaged or no file of tensors: {error}") from None
        if not isinstance(found, Mapping):
            raise ValueError(f"{file} holds a {type(found).__name__}, not tensors by name")
        state |= found
    return state


def _load_pickle(file: Path) -> Any:  # noqa: ANN401
    return torch.load(file, map_location="cpu", weights_only=True)


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Signs], dict[str, Tensor]]:
    """Quantized linears by name, and all other tensors.

    Raises:
        ValueError: there is no quantized linear, a part of one is missing or of another shape, or one has what has no
            place here: outliers, or scales between U and V that differ.
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


def _signs(name: str, own: Mapping[str, Any], bias: Tensor | None) -> Signs:
    """One linear from its parts."""
    missing = [part for part in NEEDED if not isinstance(own.get(part), Tensor)]
    if missing:
        raise ValueError(f"{name} has no {', '.join(missing)}")
    s1, s2 = own["scale_post"].flatten(), own["scale_pre"].flatten()
    rank = len(own["V_packed"])
    for part, shape in (("U_shape", (len(s1), rank)), ("V_shape", (rank, len(s2)))):
        given = own.get(part)
        given = given.tolist() if isinstance(given, Tensor) else given
        if given is not None and tuple(given) != shape:
            raise ValueError(
                f"{name}.{part} is {tuple(given)}, but its words and scales are of {shape}"
            )
    if len(own["U_packed"]) != len(s1):
        raise ValueError(f"{name}.U_packed has {len(own['U_packed'])} rows for {len(s1)} scales")
    u_signs = from_words(own["U_packed"], rank, f"{name}.U_packed")
    v_signs = from_words(own["V_packed"], len(s2), f"{name}.V_packed")
    return Signs(u_signs, v_signs, s1 * _one_scale(name, own.get("scale_mid"), rank), s2, bias)


def _one_scale(name: str, middle: Tensor | None, rank: int) -> Tensor | float:
    """The scale between U and V, which has to be the same for all ranks."""
    if middle is None:
        return 1.0
    middle = middle.flatten()
    if len(middle) != rank or not (middle == middle[0]).all():
        raise ValueError(
            f"{name}.scale_mid has scales of each rank that differ, which have no place in y = s1 U V^T s2 x"
        )
    return middle[0]
