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

    A tensor that is changed in place between two members' calls would not be noticed; no decoder block does that.
    """

    def __init__(self, members: list[PackedBinaryLinear]) -> None:
        self.members = members
        self.x: Tensor | None = None
        self.ready: dict[int, Tensor] = {}

    def serves(self, x: Tensor) -> bool:
        """Whether to share the launch for this x: few tokens and no gradients."""
        return 0 < x.numel() <= MOST_TOKENS * x.shape[-1] and not torch.is_grad_enabled()

    def __call__(self, member: PackedBinaryLinear, x: Tensor) -> Tensor:
        """What ``member`` gives for ``x`` (..., d_in)."""
        place = next(i for i, other in enumerate(self.members) if other is member)
        if x is not self.x or place not in self.ready:
            parts = [(m.u_signs, m.v_signs, m.s1, m.s2, m.bias, m.rank) for m in self.members]
            outputs = binary_low_rank_linears(x, *zip(*parts, strict=True))
            self.x, self.ready = x, dict(enumerate(outputs))
        y = self.ready.pop(place)
        if not self.ready:
            self.x = None
        return y


@torch.no_grad()
def prepare_for_decoding(model: nn.Module) -> None:
    """Align packed rows and let packed linears on a GPU that read the same tensor share launches, once.

    Args:
        model: a causal language model; packed layers elsewhere than on CUDA stay as they are.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PackedBinaryLinear)}
    layers = {n: m for n, m in layers.items() if m.u_signs.is_cuda and m.shared is None}
    if not layers:
        return
    for layer in layers.values():
        layer.align_rows_()
    share_launches(model, layers)


@torch.no_grad()
def share_launches(model: nn.Module, layers: dict[str, PackedBinaryLinear]) -> None:
    """Give each group of ``layers`` that read the same tensor in a forward pass a :class:`SharedLaunch`."""
    reads: list[tuple[Tensor, list[str]]] = []

    def note(name: str, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["x"]
        if not reads or reads[-1][0] is not x:  # members of a group run one after the other
            reads.append((x, []))
        reads[-1][1].append(name)

    tokens = torch.arange(TRACE_TOKENS, device=input_device(model))[None]
    with evaluation_mode(model), observe_calls(layers, note):
        model(input_ids=tokens, use_cache=False)
    for _, names in reads:
        members = [layers[name] for name in dict.fromkeys(names)]
        if len(members) > 1:
            launch = SharedLaunch(members)
            for member in members:
                member.shared = launch
