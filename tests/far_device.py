"""A device that is no CPU, made of tensors on the CPU: whoever mixes the two fails, as with a GPU.

Importing this registers the device "far" with torch and Lightning for the whole process, so only scripts of their own
do. Operators run on the CPU, and their results are the CPU's.
"""

import lightning.pytorch.loops.fit_loop as fit_loop
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from nanoquant import architectures, training

aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)
"""Operators that may have tensors on both sides."""


class Far(torch.Tensor):
    """A tensor on the far device, around one on the CPU."""

    @staticmethod
    def __new__(cls, raw):
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset()}
        device = torch.device("far", 0)
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, dtype=raw.dtype, device=device, **layout
        )

    def __init__(self, raw):
        self.raw = raw

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, other):
        torch.Tensor.data.__set__(self, other)
        self.raw = other.raw

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = self.detach().clone()
        return memo[id(self)]

    def tolist(self):
        return self.raw.tolist()

    def data_ptr(self):
        return self.raw.data_ptr()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a far tensor to numpy")


def run(func, args, kwargs):
    """Run an operator on what lies in far tensors."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    far = [x for x in flat if isinstance(x, Far)]
    near = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, Far) and x.ndim]
    if far and near and func not in MOVES:
        raise RuntimeError(f"{func}: some tensors are on far, others on the CPU")
    asked = next((x for x in flat if isinstance(x, torch.device)), None)
    to_far = bool(far) if asked is None else asked.type == "far"
    args, kwargs = pytree.tree_unflatten([_near(x) for x in flat], spec)
    known = {id(x.raw): x for x in far}  # what is written in place stays the same tensor

    def wrap(x):
        if not isinstance(x, torch.Tensor):
            return x
        return known.get(id(x)) if id(x) in known else Far(x) if to_far else x

    return pytree.tree_map(wrap, func(*args, **kwargs))


def _near(x):
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.raw if isinstance(x, Far) else x


class FarAccelerator(CPUAccelerator):
    """What Lightning knows of the device."""

    def setup_device(self, device):
        pass


def _placement(device, sharded=False):
    strategy = SingleDeviceStrategy(device=device, accelerator=FarAccelerator())
    return {"devices": 1, "strategy": strategy} if device.type == "far" else usual(device)


def _tensor(data, *, device=None, **more):
    """``torch.tensor``, which can't make one on a device of this kind."""
    made = tensor(data, **more)
    return made if device is None else made.to(device)


_setup_privateuseone_for_python_backend("far")
_library = torch.library.Library("_", "IMPL")
_library.fallback(lambda func, *args, **kwargs: run(func, args, kwargs), "PrivateUse1")
torch.far.get_amp_supported_dtype = lambda: [torch.bfloat16]
tensor, torch.tensor = torch.tensor, _tensor
fit_loop.has_len_all_ranks = lambda *args, **kwargs: True
usual, training.placement = training.placement, _placement
plain, architectures.is_quantizable = (
    architectures.is_quantizable,
    lambda module: (
        plain(module)
        or (
            isinstance(module, torch.nn.Linear | architectures.Conv1D)
            and isinstance(module.weight, Far)
            and module.weight.ndim == 2
        )
    ),
)
