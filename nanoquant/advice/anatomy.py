"""What of a model takes memory: its linears, its embedding and head, the rest, and what a token adds to the cache.

Everything comes from the skeleton that transformers makes of a configuration, on the meta device.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from transformers import DynamicCache, PreTrainedConfig

from nanoquant.benchmark.shapes import linear_shapes, skeleton
from nanoquant.model_embeddings import find_embeddings
from nanoquant.sizes import measure_sizes

UNCOUNTED = ("kv_lora_rank", "num_kv_shared_layers")
"""Fields of configurations whose caches are not keys and values of every layer."""


@dataclass(frozen=True)
class CacheLayer:
    """Keys and values of one layer."""

    entries: int
    """Numbers that a token adds, keys and values together."""
    window: int | None
    """Most tokens that are kept; None keeps all."""


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Shapes of a dense bf16 model; each is its own, so that what was worked out for it can be kept."""

    parameters: int
    """Parameters; a tied head counts once."""
    dense_bytes: int
    """Bytes of the stored tensors in bf16."""
    linears: dict[str, tuple[int, int]]
    """Linears of the blocks by name, (d_out, d_in)."""
    tables: tuple[tuple[int, int], ...]
    """Embedding and, where it is not tied to it, head: (rows, columns)."""
    hidden: int
    """Width of the hidden states."""
    vocabulary: int
    """Tokens that the head scores."""
    positions: int | None
    """Longest text that the model was made for, in tokens; None where the configuration does not say."""
    cache: tuple[CacheLayer, ...]
    """Cache of each layer."""

    @cached_property
    def body_weights(self) -> int:
        """Weights of the linears."""
        return sum(d_out * d_in for d_out, d_in in self.linears.values())

    @cached_property
    def table_weights(self) -> int:
        """Weights of embedding and head."""
        return sum(rows * columns for rows, columns in self.tables)

    @cached_property
    def shapes(self) -> Counter[tuple[int, int]]:
        """How many linears have each shape (d_out, d_in)."""
        return Counter(self.linears.values())

    @property
    def widest(self) -> int:
        """The longest side of a linear."""
        return max(max(shape) for shape in self.shapes)


def anatomy(config: PreTrainedConfig) -> Anatomy:
    """Shapes of the model of a configuration.

    Raises:
        ValueError: it is no causal language model, its blocks hold what can't be quantized, or its
            cache is not one of keys and values.
    """
    model, config = skeleton(config), config.get_text_config()
    sizes = measure_sizes(model)
    weights = {id(m.weight): tuple(m.weight.shape) for m in find_embeddings(model).values()}
    return Anatomy(
        parameters=sizes.parameters,
        dense_bytes=sizes.bytes_on_disk,
        linears=linear_shapes(model),
        tables=tuple(weights.values()),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        positions=getattr(config, "max_position_embeddings", None),
        cache=cache_layers(config),
    )


def cache_layers(config: PreTrainedConfig) -> tuple[CacheLayer, ...]:
    """What each layer caches; transformers itself says which layers slide.

    Raises:
        ValueError: a layer caches something else than keys and values of its own.
    """
    layers = DynamicCache(config=config).layers or [None] * config.num_hidden_layers
    kinds = set(getattr(config, "layer_types", None) or ())
    strange = sorted(kind for kind in kinds if not kind.endswith("attention") or "linear" in kind)
    strange += [name for name in UNCOUNTED if getattr(config, name, None)]
    if strange:
        raise ValueError(
            f"the cache of a {config.model_type} model is not counted: it has {', '.join(strange)}; "
            "measure it with nanoquant generate on the machine itself"
        )
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    entries = 2 * (getattr(config, "num_key_value_heads", None) or heads) * width
    return tuple(
        CacheLayer(entries, layer.sliding_window if getattr(layer, "is_sliding", False) else None)
        for layer in layers
    )
