"""Packed linears that read the same tensor, such as q, k and v, share their kernel launches while decoding on a GPU.

The checkpoint does not change: ``prepare_for_decoding`` is called on a loaded model, finds the groups by one forward
pass over a few tokens, and aligns the packed rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nanoquant.decoder import evaluation_mode, input_device, observe_calls
from nanoquant.packed_linear import PackedBinaryLinear
from nanoquant_kernels import binary_low_rank_linears
from nanoquant_kernels.cards import MOST_TOKENS

TRACE_TOKENS = 4


class SharedLaunch:
    """Runs all its members when the first of them is asked, and hands the others what is theirs.

    What is left to hand out is replaced as a whole and checked against x, so a thread that comes between two members
    costs another launch at worst.
    """

    def __init__(self, members: list[PackedBinaryLinear]) -> None:
        self.members = members
        self.held: tuple[Tensor, int, dict[int, Tensor]] | None = None
        """x, its version, and the outputs that members have not asked for yet."""
        self.warm: list[int] = []

    def serves(self, member: PackedBinaryLinear, x: Tensor) -> bool:
        """Whether to share the launch for this x: few tokens, no gradients, and no mere copy of a member."""
        few = 0 < x.numel() <= MOST_TOKENS * x.shape[-1]
        return few and not torch.is_grad_enabled() and any(m is member for m in self.members)

    def __call__(self, member: PackedBinaryLinear, x: Tensor) -> Tensor:
        """What ``member`` gives for ``x`` (..., d_in)."""
        place = next(i for i, other in enumerate(self.members) if other is member)
        held, y = self.held, None  # read once: another thread may replace it
        if held is not None and held[0] is x and held[1] == version_of(x):
            y = held[2].pop(place, None)
        if y is None:
            held = x, version_of(x), dict(enumerate(self.run(x)))
            y = held[2].pop(place)
        self.held = held if held[2] else None
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


def share_launches(model: nn.Module, layers: dict[str, PackedBinaryLinear]) -> None:
    """Give each group of ``layers`` that read the same tensor in a forward pass a :class:`SharedLaunch`."""
    for layer in layers.values():
        layer.shared, layer.traced = None, True
    for names in readers(model, layers):
        members = [layers[name] for name in names]
        if len(members) > 1:
            launch = SharedLaunch(members)
            for member in members:
                member.shared = launch


@torch.no_grad()
def readers(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[list[str]]:
    """Names of ``layers`` in the order of a forward pass, those that read the same tensor together.

    The model may be on the meta device.
    """
    reads: list[tuple[Tensor, list[str]]] = []

    def note(name: str, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if not reads or reads[-1][0] is not x:  # members of a group run one after the other
            reads.append((x, []))
        reads[-1][1].append(name)

    tokens = torch.arange(TRACE_TOKENS, device=input_device(model))[None]
    with evaluation_mode(model), observe_calls(layers, note):
        model(
            input_ids=tokens, use_cache=True
        )  # without a cache masks read values of the meta device
    return [list(dict.fromkeys(names)) for _, names in reads]
