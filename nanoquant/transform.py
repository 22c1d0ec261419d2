"""What torchao's ``quantize_`` does with a :class:`NanoQuantConfig`: one linear at a time.

``step=""`` needs no data: every input and output channel counts alike. That is the only place where
importances are not observed, and it costs much quality. ``step="prepare"`` observes linears,
``step="convert"`` factorizes them with what was observed::

    quantize_(model, nanoquant_config(bits=1.0, step="prepare"))
    for batch in batches:
        model(**batch).loss.backward()
    quantize_(model, nanoquant_config(bits=1.0, step="convert"))

A handler sees neither the whole model nor text, so the rank of each linear, or its codebooks, is the largest that its
own budget allows, whatever presets say of measured ranks, and block and model reconstruction do not happen:
that is ``nanoquant.quantize``. ``importance.curvature="inputs"`` works in the steps prepare and convert; without
data it changes nothing.
By default ``quantize_`` selects every ``nn.Linear``, the language model head too; a head tied to the embedding then
gets a weight of its own. A ``filter_fn(module, name)`` that wants ``isinstance(module, nn.Linear)`` and ``"layers" in
name`` leaves it alone. Embedding and head at 8 or 4 bits come after that, from ``nanoquant.quantize_embeddings``, which
sees both and keeps them tied.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from torchao.quantization.transform_module import register_quantize_module_handler

from nanoquant.architectures import as_linear
from nanoquant.codebooks import ProductFactors
from nanoquant.config import NanoQuantConfig
from nanoquant.importance import Importance, ImportanceCollector, ImportanceConfig
from nanoquant.methods import Size, method_of
from nanoquant.packed_layers import is_packed
from nanoquant.packed_tensor import PackedBinaryTensor
from nanoquant.product_tensor import PackedProductTensor

logger = logging.getLogger(__name__)


class ObservedLinear(nn.Linear):
    """A linear that keeps second moments of its inputs and of the gradients at its outputs.

    Gradients come from every backward pass. Their moments are float32, but the gradients themselves
    have the dtype of the model: in bfloat16 prefer the sum of the token losses to their mean.

    Args:
        linear: the dense linear, whose parameters are shared.
        config: clipping and shrinkage.
    """

    def __init__(self, linear: nn.Linear, config: ImportanceConfig) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, "meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self.label = describe(linear)
        self.collector = ImportanceCollector({self.label: self}, config)
        self.collector.__enter__()  # the hooks stay as long as this module does

    def tokens(self) -> dict[str, int]:
        """How many tokens were observed, at the input and at the output."""
        collector = self.collector
        return {
            "inputs": collector.inputs[self.label].tokens,
            "output gradients": collector.gradients[self.label].tokens,
        }

    def importance(self) -> Importance:
        """What was observed.

        Raises:
            ValueError: inputs or gradients are missing or all zero.
        """
        missing = [what for what, tokens in self.tokens().items() if not tokens]
        if missing:
            raise ValueError(
                f"{self.label} has no statistics of its {' and '.join(missing)}: between the steps "
                "prepare and convert run the model on text and call loss.backward(); "
                "print(model) shows how many tokens each linear has seen"
            )
        return self.collector.importances()[self.label]

    def dense(self) -> nn.Linear:
        """The plain linear again, with the same parameters."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Shape and tokens seen."""
        seen = ", ".join(f"{what}={tokens} tokens" for what, tokens in self.tokens().items())
        return f"{super().extra_repr()}, {seen}"


@register_quantize_module_handler(NanoQuantConfig)
def transform(
    module: nn.Module, config: NanoQuantConfig, *, parameter_name: str = "weight"
) -> nn.Module:
    """Do the step of ``config`` on one linear that ``quantize_`` selected.

    Args:
        module: an ``nn.Linear``, or a transformers ``Conv1D``, which a ``filter_fn`` may select.
        config: step, budget, solver and seed; the other parts do not apply to single linears.
        parameter_name: of the module, as ``FqnToConfig`` may name it, or match it by a pattern.

    Returns:
        The module to put in its place; a linear that is packed already is returned as it is.

    Raises:
        ValueError: the module can't be quantized, the budget does not suffice, or, for convert,
            nothing was observed.
    """
    if parameter_name != "weight":
        raise ValueError(
            f"FqnToConfig asks for {parameter_name!r} of a {type(module).__name__}, but the weights of linears alone "
            "can be quantized; give the name of the linear or of its weight, or a pattern that matches no more, such "
            r"as 're:.*\.q_proj'"
        )
    if is_packed(getattr(module, "weight", None)):
        return module
    if config.blocks:
        raise ValueError(
            f"got blocks={config.blocks}, but quantize_ sees one linear at a time; "
            "choose linears with its filter_fn(module, name) instead"
        )
    if config.budget.file is not None:
        raise ValueError(
            f"got budget.file={config.budget.file}, but quantize_ sees one module at a time; give bits"
        )
    if config.embedding.bits != 16:
        raise ValueError(
            f"got embedding.bits={config.embedding.bits}, but quantize_ sees one module at a time; "
            "call nanoquant.quantize_embeddings(model, EmbeddingConfig(bits=...)) after it instead"
        )
    if config.budget.allocation == "prior":
        raise ValueError(
            "got budget.allocation=prior, but quantize_ sees one linear at a time, and neither its name nor its depth; "
            "take uniform, or nanoquant.quantize on the whole model"
        )
    if config.step == "prepare":
        return prepare(module, config.importance)
    if isinstance(module, ObservedLinear) and not config.step:
        raise ValueError(f"{module.label} is prepared; finish it with step='convert'")
    if isinstance(module, ObservedLinear):
        return factorize(module.dense(), module.importance(), config)
    linear = as_linear(module)
    if config.step == "convert":
        raise ValueError(
            f"{describe(linear)} has no statistics: call quantize_ with step='prepare' first, with "
            "the same filter_fn; a model that is nothing but one linear can't be prepared, put it "
            "into nn.Sequential"
        )
    device = linear.weight.device
    uniform = Importance(
        input=torch.ones(linear.in_features, device=device),
        output=torch.ones(linear.out_features, device=device),
    )
    return factorize(linear, uniform, config)


def prepare(module: nn.Module, config: ImportanceConfig) -> ObservedLinear:
    """Observe a linear; one that is observed already goes on with what it has."""
    if isinstance(module, ObservedLinear):
        return module
    linear = as_linear(module)
    if type(linear) is not nn.Linear:
        raise ValueError(
            f"{describe(linear)} is a {type(linear).__name__}; only plain nn.Linear modules can be "
            "observed, so leave it out with filter_fn"
        )
    return ObservedLinear(linear, config)


def factorize(linear: nn.Linear, importance: Importance, config: NanoQuantConfig) -> nn.Linear:
    """Put packed factors in the place of the weight (d_out, d_in) of ``linear``."""
    weight = linear.weight.detach()
    size = layer_size(weight, config)
    generator = torch.Generator().manual_seed(config.run.seed)
    factors = method_of(config).initializer(config)(weight, importance, size, generator)
    looked_up = isinstance(factors, ProductFactors)
    kind = PackedProductTensor if looked_up else PackedBinaryTensor
    packed = kind.from_factors(factors, dtype=weight.dtype)
    linear.weight = nn.Parameter(packed, requires_grad=False)
    logger.info("%s: %s %s", describe(linear), "codebooks" if looked_up else "rank", size)
    return linear


def layer_size(weight: Tensor, config: NanoQuantConfig) -> Size:
    """Largest rank, or best codebooks, of one linear at no more than the asked bits per weight.

    Raises:
        ValueError: the smallest size costs more, or the largest less, than is asked.
    """
    shape = tuple(weight.shape)
    try:
        return method_of(config).plan({"weight": shape}, config)["weight"]
    except ValueError as error:
        raise ValueError(
            f"linear of shape {shape}: {error}, or keep this linear dense with "
            "quantize_(..., filter_fn=lambda module, name: ...)"
        ) from error


def describe(linear: nn.Linear) -> str:
    """What identifies a linear in messages: ``quantize_`` does not tell handlers a name."""
    return f"linear of shape ({linear.out_features}, {linear.in_features})"
