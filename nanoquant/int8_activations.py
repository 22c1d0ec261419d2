"""8-bit activations on CPUs, for the packed linears whose error on the user's own text stays under a limit.

Only what a layer computes changes, never what it stores: saved checkpoints stay the same.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nanoquant.data import bos_of, load_tokens, make_windows
from nanoquant.decoder import evaluation_mode, input_device, observe_calls
from nanoquant.divergence import ForwardKL
from nanoquant.evaluation.perplexity import check_length
from nanoquant.packed_linear import PackedBinaryLinear
from nanoquant_kernels import binary_low_rank_linear, binary_low_rank_linear_int8
from nanoquant_kernels.cpu_build import available_int8_paths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Int8Config:
    """When a layer may round its inputs to 8 bits."""

    most_error: float = 0.01
    """Largest relative error of a layer's outputs, as root mean square over tokens."""
    tokens: int = 512
    """Tokens of a text file that the error is measured on; a shorter text is taken whole."""
    length: int = 256
    """Most tokens of a window."""

    def __post_init__(self) -> None:
        if not self.most_error >= 0:
            raise ValueError(f"most_error is {self.most_error}; allowed: 0 or above")
        for name in ("tokens", "length"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 2 or more")


@dataclass(frozen=True)
class Int8Report:
    """What :func:`use_int8_activations` measured and did."""

    most_error: float
    """The limit."""
    on: dict[str, float]
    """Relative error of each layer that now rounds its inputs."""
    exact: dict[str, float]
    """Relative error of each layer that would exceed the limit, or that the text did not reach (NaN)."""
    divergence: float
    """Mean KL divergence per token, in nats, of the model's predictions from those before."""
    tokens: int
    """Tokens that all this was measured on."""

    def line(self) -> str:
        """The report in words."""
        total = len(self.on) + len(self.exact)
        worst = f", of at most {max(self.on.values()):.2g}" if self.on else ""
        return (
            f"8-bit activations in {len(self.on)} of {total} packed linears (error{worst}; limit "
            f"{self.most_error:g}); KL divergence {self.divergence:.2g} nats a token over {self.tokens:,} tokens"
        )


@torch.no_grad()
def use_int8_activations(
    model: nn.Module, input_ids: Tensor, most_error: float = Int8Config.most_error
) -> Int8Report:
    """Measure each packed linear with 8-bit activations on a text, and switch those on that stay under a limit.

    Decoding is faster on a CPU then. A further call measures all layers anew and may switch some off;
    :func:`use_exact_activations` switches all off.

    Args:
        model: causal language model with packed linears, on a CPU.
        input_ids: token ids (T,) or (N, T) of text like that which the model will work on.
        most_error: largest relative error of a layer's outputs, as root mean square over tokens.

    Raises:
        ValueError: there is no packed linear, one is not on a CPU, or there are no tokens.
    """
    Int8Config(most_error=most_error)
    layers = _packed_layers(model)
    windows = _windows(model, input_ids)
    if not available_int8_paths():
        logger.warning("8-bit activations save no time here: the compiled CPU loop is missing")
    use_exact_activations(model)
    errors = _layer_errors(model, layers, windows)
    on = {name: error for name, error in errors.items() if error <= most_error}  # never NaN
    try:
        divergence = _divergence(model, layers, on, windows)
    except BaseException:
        use_exact_activations(model)
        raise
    exact = {name: error for name, error in errors.items() if name not in on}
    report = Int8Report(most_error, on, exact, divergence, windows.numel())
    logger.info("%s", report.line())
    return report


def read_windows(
    text: str | Path, tokenizer: PreTrainedTokenizerBase, config: Int8Config
) -> Tensor:
    """Windows (N, T) of the start of a text, in as many tokens as the config says or as there are.

    Args:
        text: as ``DataConfig.text``.
        tokenizer: of the model.
        config: how many tokens, and the length of a window.

    Raises:
        ValueError: the text can't be read, or is a single token.
    """
    tokens, bos = load_tokens(text, tokenizer)[: config.tokens], bos_of(tokenizer)
    length = min(config.length, len(tokens) + (bos is not None))
    return make_windows(tokens, length, bos_token_id=bos)


def use_exact_activations(model: nn.Module) -> None:
    """Switch 8-bit activations off in every packed linear."""
    for module in model.modules():
        if isinstance(module, PackedBinaryLinear):
            module.int8_activations = False


def _packed_layers(model: nn.Module) -> dict[str, PackedBinaryLinear]:
    """The packed linears by name."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PackedBinaryLinear)}
    if not layers:
        raise ValueError(
            "the model has no packed linear of signs; load a saved one, or call nanoquant.pack_model"
        )
    for name, layer in layers.items():
        if layer.u_signs.device.type != "cpu":
            raise ValueError(
                f"{name} is on {layer.u_signs.device}; 8-bit activations are for CPUs, so move the model there"
            )
    return layers


def _windows(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Token ids as (N, T) that the model can read."""
    if input_ids.is_floating_point() or input_ids.dim() not in (1, 2) or not input_ids.numel():
        raise ValueError(
            f"input_ids are {input_ids.dtype} of shape {tuple(input_ids.shape)}; allowed: integers (T,) or (N, T)"
        )
    low, high = int(input_ids.min()), int(input_ids.max())
    rows = model.get_input_embeddings().num_embeddings
    if low < 0 or high >= rows:
        raise ValueError(f"input_ids hold ids {low} to {high}; the model has 0 to {rows - 1}")
    windows = torch.atleast_2d(input_ids)
    check_length(model, windows.shape[1])
    return windows


def _layer_errors(
    model: nn.Module, layers: dict[str, PackedBinaryLinear], windows: Tensor
) -> dict[str, float]:
    """Relative error of each layer on the inputs that it has in the exact model; NaN where it has none."""
    squares = dict.fromkeys(layers, 0.0)
    tokens = dict.fromkeys(layers, 0)

    def note(name: str, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["x"]
        x = x.reshape(-1, x.shape[-1]).float()
        weight = layers[name].operands()
        y = binary_low_rank_linear(x, *weight)
        wrong = (binary_low_rank_linear_int8(x, *weight) - y).norm(dim=-1)  # (tokens,)
        relative = torch.where(wrong == 0, 0, wrong / y.norm(dim=-1))
        squares[name] += relative.double().square().sum().item()
        tokens[name] += len(x)

    with evaluation_mode(model), observe_calls(layers, note):
        for window in windows.split(1):
            model(input_ids=window.to(input_device(model)), use_cache=False)
    return {n: math.sqrt(squares[n] / tokens[n]) if tokens[n] else math.nan for n in layers}


def _switch(layers: dict[str, PackedBinaryLinear], on: dict[str, float]) -> None:
    for name, layer in layers.items():
        layer.int8_activations = name in on


def _divergence(
    model: nn.Module, layers: dict[str, PackedBinaryLinear], on: dict[str, float], windows: Tensor
) -> float:
    """Mean KL(exact || 8 bits in the layers ``on``) per token; leaves these on."""
    if not on:
        return 0.0
    total = 0.0
    with evaluation_mode(model):
        for window in windows.split(1):
            logits = []
            for names in ({}, on):
                _switch(layers, names)
                out = model(input_ids=window.to(input_device(model)), use_cache=False)
                logits.append(out.logits.flatten(0, 1))
            total += float(ForwardKL.apply(logits[1], logits[0]))
    return total / len(windows)
