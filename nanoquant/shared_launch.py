"""Packed linears that read the same tensor, such as q, k and v, share their kernel launches while decoding on a GPU.

The checkpoint does not change: ``prepare_for_decoding`` is called on a loaded model, finds the groups by one forward
pass over a few tokens, and aligns the packed rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanoquant.decoder import evaluation_mode, input_device, observe_calls
from nanoquant.packed_linear import PackedBinaryLinear
from nanoquant_kernels import binary_low_rank_linears

MOST_TOKENS = 16
"""More tokens fill a GPU with each linear alone."""
TRACE_TOKENS = 4


class SharedLaunch:
    """Runs all its members when the first of them is asked, and hands the others what is theirs.

    As a model's cache, it serves one thread at a time.
    """

    def __init__(self, members: list[PackedBinaryLinear]) -> None:
        self.members = members
        self.x: Tensor | None = None
        self.version = 0
        self.ready: dict[int, Tensor] = {}
        self.warm: list[int] = []

    def serves(self, member: PackedBinaryLinear, x: Tensor) -> bool:
        """Whether to share the launch for this x: few tokens, no gradients, and no mere copy of a member."""
        few = 0 < x.numel() <= MOST_TOKENS * x.shape[-1]
        return few and not torch.is_grad_enabled() and any(m is member for m in self.members)

    def __call__(self, member: PackedBinaryLinear, x: Tensor) -> Tensor:
        """What ``member`` gives for ``x`` (..., d_in)."""
        place = next(i for i, other in enumerate(self.members) if other is member)
        if x is not self.x or version_of(x) != self.version or place not in self.ready:
            self.x, self.version, self.ready = x, version_of(x), dict(enumerate(self.run(x)))
        y = self.ready.pop(place)
        if not self.ready:
            self.x = None
        return y

    def run(self, x: Tensor) -> list[Tensor]:
        """All members' outputs."""
        parts = [m.operands() for m in self.members]
        return binary_low_rank_linears(x, *zip(*parts, strict=True))

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile, try and tabulate now what a captured graph could not; again only where tensors have moved."""
        first = self.members[0]
        tensors = [t for m in self.members for t in (m.u_signs, m.v_signs, m.s1, m.s2)]
        places = [t.data_ptr() for t in tensors]
        if places != self.warm:
            for tokens in (1, 8, MOST_TOKENS):
                self.run(
                    torch.zeros(tokens, first.in_features, dtype=dtype, device=first.s1.device)
                )
            self.warm = places


def version_of(x: Tensor) -> int:
    """A number that changes when x is written to in place, as far as PyTorch counts that."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


@torch.no_grad()
def prepare_for_decoding(model: nn.Module) -> None:
    """Align packed rows, and let packed linears on a GPU that read the same tensor share launches.

    What is done already is not done again, so that captured graphs stay right.

    Args:
        model: a causal language model; packed layers elsewhere than on CUDA stay as they are.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PackedBinaryLinear)}
    layers = {n: m for n, m in layers.items() if m.u_signs.is_cuda}
    if not layers:
        return
    for layer in layers.values():
        layer.align_rows_()
    if not all(layer.traced for layer in layers.values()):
        share_launches(model, layers)
    for launch in {id(m.shared): m.shared for m in layers.values() if m.shared}.values():
        launch.warm_up(model.dtype)


@torch.no_grad()
def share_launches(model: nn.Module, layers: dict[str, PackedBinaryLinear]) -> None:
    """Give each group of ``layers`` that read the same tensor in a forward pass a :class:`SharedLaunch`."""
    reads: list[tuple[Tensor, list[str]]] = []

    def note(name: str, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["x"]
        if not reads or reads[-1][0] is not x:  # members of a group run one after the other
            reads.append((x, []))
        reads[-1][1].append(name)

    for layer in layers.values():
        layer.shared, layer.traced = None, True
    tokens = torch.arange(TRACE_TOKENS, device=input_device(model))[None]
    with evaluation_mode(model), observe_calls(layers, note):
        model(input_ids=tokens, use_cache=False)
    for _, names in reads:
        members = [layers[name] for name in dict.fromkeys(names)]
        if len(members) > 1:
            launch = SharedLaunch(members)
            for member in members:
                member.shared = launch
