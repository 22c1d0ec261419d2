"""Damages of files of torch.save that stay whole files of torch.save: other values, and less stored than is told."""

import io
import zipfile

import torch


def saved(value):
    """Bytes of what torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def other_value(content, rng):
    """A part of a state, or its only tensor, that is of another kind, dtype or shape."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    whole = isinstance(state, dict)
    name = rng.choice(list(state)) if whole else None
    changed = _other(state[name] if whole else state, rng)
    if not whole:
        return saved(changed)
    if rng.random() < 0.1:
        state[rng.choice((3, None, ("a",), ""))] = state.pop(name)
    else:
        state[name] = changed
    return saved(state)


def _other(tensor, rng):
    """Something in the place of a tensor."""
    dtypes = (
        torch.float8_e4m3fn,
        torch.complex64,
        torch.int64,
        torch.int32,
        torch.bool,
        torch.float64,
    )
    return rng.choice(
        (
            lambda: rng.choice((3, "x", None, [1.0], {"a": 1}, (2, 3), True)),
            lambda: tensor.to(rng.choice(dtypes)),
            lambda: tensor[:0],
            lambda: tensor.flatten()[:1].squeeze(),
            lambda: tensor.unsqueeze(0),
            lambda: tensor.mT if tensor.dim() > 1 else tensor.flip(0),
            lambda: torch.full_like(tensor, -1),
            lambda: tensor.to("meta"),
            lambda: tensor.to_sparse(),
            lambda: torch.full(tensor.shape, float(rng.choice(("nan", "inf")))),
        )
    )()


def swollen(content, rng):
    """Tensors that are many times what is stored of them."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    times = rng.choice((10**3, 10**7, 10**12))
    if not isinstance(state, dict):
        return saved(state.flatten()[:1].expand(times))
    name = rng.choice(list(state))
    first = state[name].flatten()[:1]
    state[name] = (
        first.expand(times) if rng.random() < 0.5 else first.expand(times, *state[name].shape)
    )
    return saved(state)


def deflated(content, rng):
    """The same records compressed, one of them long and all zeros."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        names = old.namelist()
        long = rng.choice(names)
        for name in names:
            new.writestr(name, old.read(name) + bytes(2**26 if name == long else 0))
    return file.getvalue()
