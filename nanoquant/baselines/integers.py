"""Integers of 8 to 1 bits by torchao: round to nearest, HQQ, and AWQ."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanoquant.activations import run_windows
from nanoquant.baselines.config import BaselineConfig
from nanoquant.baselines.target import Target
from nanoquant.decoder import capture_block_inputs


def keep_bfloat16(target: Target, config: BaselineConfig, windows: Tensor | None) -> None:
    """The dense model with every floating point parameter in bfloat16; buffers keep their dtype."""
    for parameter in target.model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)


def int8(target: Target, config: BaselineConfig, windows: Tensor | None) -> None:
    """Torchao's ``Int8WeightOnlyConfig``: symmetric, a scale a row."""
    from torchao.quantization import Int8WeightOnlyConfig

    _quantize(target, Int8WeightOnlyConfig(set_inductor_config=False))


def int4(target: Target, config: BaselineConfig, windows: Tensor | None) -> None:
    """Torchao's int4 weight-only in the packing of the device: asymmetric groups, round to nearest."""
    _quantize(target, _int4_config(config.group_size, target.model.device))


class RoundToNearest:
    """torchao's ``IntxWeightOnlyConfig`` at some bits: asymmetric groups, or symmetric ones with HQQ's scales.

    Args:
        bits: 1 to 4.
        hqq: whether the scales come from HQQ.
    """

    def __init__(self, bits: int, hqq: bool) -> None:
        self.bits, self.hqq = bits, hqq

    def __call__(self, target: Target, config: BaselineConfig, windows: Tensor | None) -> None:
        """Quantize every linear, without text."""
        _quantize(target, _packed_config(self.bits, config.group_size, self.hqq))


class AWQ:
    """torchao's AWQ (arXiv 2306.00978), a block at a time on dense inputs.

    torchao offers it for 4 bits only; at 3 and 2 bits its search runs over its own integers in packed form.

    Args:
        bits: 4, 3 or 2.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def __call__(self, target: Target, config: BaselineConfig, windows: Tensor | None) -> None:
        """Observe each block's inputs and quantize it; (N, T) windows of text."""
        from torchao.prototype.awq import AWQConfig

        size = config.group_size
        decoder, device = target.decoder, target.model.device
        base = (
            _int4_config(size, device)
            if self.bits == 4
            else _packed_config(self.bits, size, hqq=False)
        )
        hidden, calls = capture_block_inputs(target.model, decoder, windows)
        for b, (block, call) in enumerate(zip(decoder.blocks, calls, strict=True)):
            inside = set(decoder.linears[b])
            _quantize_inside(block, AWQConfig(base, step="prepare"), inside)
            # one window a call: torchao joins what it saw along the tokens
            hidden = run_windows(block, hidden, call, batch=1)
            _quantize_inside(block, AWQConfig(base, step="convert"), inside)
            target.progress.advance(len(inside), note=f"block {b}")


def _int4_config(group_size: int, device: torch.device) -> object:
    """Torchao's int4 weight-only for a device: ``Int4WeightOnlyConfig`` wants a GPU, the prototype a CPU."""
    if device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=group_size, set_inductor_config=False)
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(
        group_size=group_size,
        int4_packing_format="tile_packed_to_4d",  # the one that needs no other package
        set_inductor_config=False,
    )


def _packed_config(bits: int, group_size: int, hqq: bool) -> object:
    """Integers in groups that are stored in ``bits`` bits."""
    from torchao.quantization import IntxWeightOnlyConfig, MappingType
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    from nanoquant.baselines.packed_integers import PackedIntegerConfig

    algorithms = IntxChooseQParamsAlgorithm
    base = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(group_size),
        mapping_type=MappingType.SYMMETRIC if hqq else MappingType.ASYMMETRIC,
        intx_choose_qparams_algorithm=algorithms.HQQ_SCALE_ONLY if hqq else algorithms.AFFINE,
    )
    return PackedIntegerConfig(base, bits, keep_zeros=not hqq)


def _quantize(target: Target, config: object) -> None:
    """Apply a torchao config to the linears of the decoder and to nothing else."""
    _quantize_inside(target.model, config, set(target.shapes))


def _quantize_inside(module: nn.Module, config: object, names: set[str]) -> None:
    """Apply a torchao config to the named submodules."""
    from torchao.quantization import quantize_

    quantize_(module, config, filter_fn=lambda _, name: name in names)
