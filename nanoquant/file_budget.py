"""A budget that belongs to the file: what embedding, head, norms and biases leave goes to the linears' ranks.

With the embedding's bits fixed, that is arithmetic. With ``embedding.bits`` null, each storage of the embedding is an
option of the same allocator: its own measured divergence, plus what the measured losses of all linears come to at the
ranks that it leaves them, of which reconstruction takes back all but ``sensitivity.remains``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedModel

from nanoquant.architectures import Decoder
from nanoquant.budget import Shapes, count_weights
from nanoquant.config import NanoQuantConfig
from nanoquant.dense_prefix import DensePrefix
from nanoquant.divergence import ForwardKL
from nanoquant.embedding import EMBEDDING_BITS, EmbeddingConfig, rounded_matrix, table_bytes
from nanoquant.methods import method_of
from nanoquant.model_embeddings import check_embeddings, find_embeddings
from nanoquant.sizes import tensor_bytes
from nanoquant.units import amount, parse_bytes

logger = logging.getLogger(__name__)

ENTRY = 96
"""Most bytes of a tensor in a header of safetensors, besides its name."""


def file_options(
    model: PreTrainedModel, decoder: Decoder, chosen: range, shapes: Shapes, config: NanoQuantConfig
) -> list[NanoQuantConfig]:
    """The configs that a budget leaves to choose from, with ``budget.bits`` and ``embedding.bits`` filled in.

    Args:
        model: dense; on the meta device as well.
        decoder: its blocks.
        chosen: blocks to quantize.
        shapes: (d_out, d_in) of their linears by full name.
        config: without ``budget.file`` it is the only option.

    Raises:
        ValueError: no option can meet the budget; by how much. Or there are several, and nothing to choose by.
    """
    fixed, remains = config.embedding.bits is not None, config.sensitivity.remains
    if fixed and remains != type(config.sensitivity).remains:
        raise ValueError(
            f"sensitivity.remains={remains} and embedding.bits={config.embedding.bits} exclude each other: it weighs "
            "the linears against storages of the embedding; take embedding.bits=null, or leave it out"
        )
    if config.budget.file is None:
        method_of(config).check(shapes, config)
        return [config]
    found, refusals = [], []
    for bits in (config.embedding.bits,) if fixed else EMBEDDING_BITS:
        embedding = dataclasses.replace(config.embedding, bits=bits)
        try:
            found.append(_filled(model, decoder, chosen, shapes, config, embedding))
        except ValueError as error:
            refusals.append(f"with embedding.bits={bits}, {error}")
    if not found:
        raise ValueError(f"budget.file={config.budget.file}: " + "; ".join(refusals))
    for refusal in refusals:
        logger.warning("budget.file=%s can't be met %s", config.budget.file, refusal)
    if len(found) > 1 and config.budget.allocation != "measured":
        bits = " or ".join(str(option.embedding.bits) for option in found)
        raise ValueError(
            f"budget.file={config.budget.file} can be met with embedding.bits {bits}, and null lets their measured "
            "losses choose: set budget.allocation=measured, or one of these"
        )
    return found


def _filled(
    model: PreTrainedModel,
    decoder: Decoder,
    chosen: range,
    shapes: Shapes,
    config: NanoQuantConfig,
    embedding: EmbeddingConfig,
) -> NanoQuantConfig:
    """The config with the body's bits under one storage of the embedding."""
    check_embeddings(model, embedding)
    file = parse_bytes(config.budget.file, "budget.file")
    parts = method_of(config).parts
    rest = other_bytes(model, decoder, chosen, embedding) + header_bytes(model, shapes, parts)
    if file <= rest:
        raise ValueError(
            f"what is no linear of a block takes {amount(rest)} alone, {amount(rest - file)} more than that; ask for a "
            "larger file"
        )
    bits = 8 * (file - rest) / count_weights(shapes)
    budget = dataclasses.replace(config.budget, bits=bits, file=None)
    filled = dataclasses.replace(config, budget=budget, embedding=embedding)
    try:
        method_of(filled).check(shapes, filled)
    except ValueError as error:
        raise ValueError(f"the linears get {amount(file - rest)}: {error}") from None
    return filled


def other_bytes(
    model: PreTrainedModel, decoder: Decoder, chosen: range, embedding: EmbeddingConfig
) -> int:
    """Bytes of all that a checkpoint stores besides signs and scales of the chosen blocks' linears."""
    modules, stored = decoder.linear_modules(), model.state_dict()
    names = [decoder.full_name(b, name) for b in chosen for name in decoder.linears[b]]
    linears = [modules[name].weight for name in names]
    buffers = [tensor for name, tensor in model.named_buffers() if name in stored]
    total = tensor_bytes([*model.parameters(), *buffers]) - tensor_bytes(linears)
    if embedding.bits != 16:
        for weight in embedding_weights(model):
            total += table_bytes(*weight.shape, embedding, weight.dtype) - tensor_bytes([weight])
    return total


def header_bytes(model: PreTrainedModel, names: Iterable[str], parts: Sequence[str]) -> int:
    """At least the bytes of the headers of a checkpoint's files, whose linears ``names`` are packed into ``parts``."""
    packed = set(names)
    kept = [key for key in model.state_dict() if key.removesuffix(".weight") not in packed]
    keys = [*kept, *(f"{name}.{part}" for name in packed for part in parts)]
    return sum(len(key) + ENTRY for key in keys)


def embedding_weights(model: PreTrainedModel) -> list[Tensor]:
    """Weights of the embedding and the head, once where they are tied."""
    return list({id(m.weight): m.weight for m in find_embeddings(model).values()}.values())


def embedding_divergence(
    model: PreTrainedModel, dense: DensePrefix, embedding: EmbeddingConfig
) -> float:
    """Nats per token by which the dense model changes when its embedding and head are stored so.

    Raises:
        ValueError: the model gives non-finite logits then.
    """
    if embedding.bits == 16:
        return 0.0
    with _rounded(model, embedding):
        logits = dense.logits_from(0)
    divergence = float(ForwardKL.apply(logits.flatten(0, 1), dense.logits.flatten(0, 1)))
    if not divergence < float("inf"):
        raise ValueError(
            f"the divergence with the embedding at {embedding.bits} bits is {divergence}; set embedding.bits to 16"
        )
    return max(0.0, divergence)


@contextmanager
def _rounded(model: PreTrainedModel, embedding: EmbeddingConfig) -> Iterator[None]:
    """While active, embedding and head have the values of their quantized form."""
    weights = embedding_weights(model)
    before = [weight.data for weight in weights]
    try:
        for weight in weights:
            weight.data = rounded_matrix(weight, embedding)
        yield
    finally:
        for weight, data in zip(weights, before, strict=True):
            weight.data = data
