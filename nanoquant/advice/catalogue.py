"""Which model is meant: a published one by name, a folder, or a Hub name whose configuration alone is fetched.

Nothing here reads a weight. A folder whose configuration has the shapes of a published model counts as a version of
that model, so that its smaller siblings and published figures can be named.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from nanoquant.benchmark import shapes
from nanoquant.benchmark.shapes import LLAMA_2, model_config
from nanoquant.model_folder import resolve_folder
from nanoquant.sources import check_dense

TIED = {"tie_word_embeddings": True}


def _sizes(
    hidden: int, intermediate: int, layers: int, heads: int, pairs: int | None = None
) -> dict[str, int]:
    """Widths and counts of a configuration; ``pairs`` are heads of keys and values."""
    found = {"hidden_size": hidden, "intermediate_size": intermediate}
    found |= {"num_hidden_layers": layers, "num_attention_heads": heads}
    return found | ({} if pairs is None else {"num_key_value_heads": pairs})


LLAMA_3 = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192}
LLAMA_3_1 = LLAMA_3 | {"max_position_embeddings": 131072}
QWEN_3 = {"model_type": "qwen3", "vocab_size": 151936, "max_position_embeddings": 40960} | {
    "head_dim": 128,
    "num_key_value_heads": 8,
}
GEMMA_3 = {"model_type": "gemma3_text", "vocab_size": 262208, "max_position_embeddings": 131072} | {
    "head_dim": 256,
    "sliding_window": 1024,
}
SMOLLM_2 = {"model_type": "llama", "vocab_size": 49152, "max_position_embeddings": 8192} | TIED
CONFIGS: dict[str, dict[str, Any]] = shapes.CONFIGS | {
    "llama-2-13b": LLAMA_2 | _sizes(5120, 13824, 40, 40, 40),
    "llama-3-8b": LLAMA_3 | _sizes(4096, 14336, 32, 32, 8),
    "llama-3-70b": LLAMA_3 | _sizes(8192, 28672, 80, 64, 8),
    "llama-3.1-8b": LLAMA_3_1 | _sizes(4096, 14336, 32, 32, 8),
    "llama-3.1-70b": LLAMA_3_1 | _sizes(8192, 28672, 80, 64, 8),
    "llama-3.1-405b": LLAMA_3_1 | _sizes(16384, 53248, 126, 128, 8),
    "llama-3.2-1b": LLAMA_3_1 | _sizes(2048, 8192, 16, 32, 8) | TIED,
    "llama-3.2-3b": LLAMA_3_1 | _sizes(3072, 8192, 28, 24, 8) | TIED,
    "qwen3-0.6b": QWEN_3 | _sizes(1024, 3072, 28, 16) | TIED,
    "qwen3-1.7b": QWEN_3 | _sizes(2048, 6144, 28, 16) | TIED,
    "qwen3-4b": QWEN_3 | _sizes(2560, 9728, 36, 32) | TIED,
    "qwen3-14b": QWEN_3 | _sizes(5120, 17408, 40, 40),
    "qwen3-32b": QWEN_3 | _sizes(5120, 25600, 64, 64),
    "gemma-3-1b": GEMMA_3
    | {"vocab_size": 262144, "sliding_window": 512, "max_position_embeddings": 32768}
    | _sizes(1152, 6912, 26, 4, 1),
    "gemma-3-4b": GEMMA_3 | _sizes(2560, 10240, 34, 8, 4),
    "gemma-3-12b": GEMMA_3 | _sizes(3840, 15360, 48, 16, 8),
    "gemma-3-27b": GEMMA_3 | _sizes(5376, 21504, 62, 32, 16) | {"head_dim": 128},
    "smollm2-360m": SMOLLM_2 | _sizes(960, 2560, 32, 15, 5),
    "smollm2-1.7b": SMOLLM_2 | _sizes(2048, 8192, 24, 32, 32),
}
"""What sets the shapes of the models that have published figures, and of their siblings."""

LINES = (
    ("llama-2-7b", "llama-2-13b", "llama-2-70b"),
    ("llama-3.2-1b", "llama-3.2-3b", "llama-3-8b", "llama-3-70b"),
    ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b"),
    ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b"),
    ("gemma-3-1b", "gemma-3-4b", "gemma-3-12b", "gemma-3-27b"),
    ("demo", "smollm2-360m", "smollm2-1.7b"),
)
"""Models of one family and tokenizer, smallest first."""

HUB = {
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B",
    "llama-3.1-405b": "meta-llama/Llama-3.1-405B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B-Base",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B-Base",
    "qwen3-4b": "Qwen/Qwen3-4B-Base",
    "qwen3-8b": "Qwen/Qwen3-8B-Base",
    "qwen3-14b": "Qwen/Qwen3-14B-Base",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "gemma-3-1b": "google/gemma-3-1b-pt",
    "gemma-3-4b": "google/gemma-3-4b-pt",
    "gemma-3-12b": "google/gemma-3-12b-pt",
    "gemma-3-27b": "google/gemma-3-27b-pt",
    "demo": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
}
"""Where the published models are; base models, as the published figures are of those."""

ENDINGS = re.compile(r"-(hf|base|pt|it|chat|instruct|thinking|\d{4})$")
POST_TRAINED = re.compile(r"(^|[-_.])(it|chat|instruct|thinking|reasoning|r1)($|[-_.])")
THINKING = re.compile(r"thinking|reasoning|(^|[-_.])r1($|[-_.])")
IDENTITY = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim tie_word_embeddings"
).split()


@dataclass(frozen=True)
class Named:
    """A model that was asked for."""

    name: str
    """As the user wrote it."""
    config: PreTrainedConfig
    """Its configuration, without a quantization."""
    published: str | None
    """The published model whose shapes it has; None for any other."""
    source: str
    """Folder or Hub name from which commands take it."""
    post_trained: bool
    """Whether it is made for instructions or chat, as far as its name and files tell."""
    thinks: bool
    """Whether it writes out long reasoning, as far as its name and files tell."""


def find(name: str) -> Named:
    """The model that a name means.

    Args:
        name: a name of :data:`CONFIGS`, "owner/name" on the Hub, or a folder with a config.json.

    Raises:
        ValueError: there is no such model (the nearest names are given), it is quantized, or its
            configuration is not one that transformers knows.
    """
    path = Path(name)
    if path.is_dir() or path.is_file():
        return _from_folder(name, path)
    known = known_as(name)
    if known is not None:
        config = model_config(known, published=CONFIGS)
        source = name if "/" in name else HUB[known]
        tail = source.rpartition("/")[2].lower()
        return Named(name, config, known, source, _post_trained(tail), _thinks(tail))
    if name.count("/") == 1:
        return _from_folder(name, resolve_folder(name, weights=False))
    raise _unknown(name)


def known_as(name: str) -> str | None:
    """The published model that a Hub name or a spelling means: "Qwen/Qwen3-8B" is qwen3-8b; None for others."""
    tail = name.rpartition("/")[2].lower().removeprefix("meta-")
    while tail not in CONFIGS and (shorter := ENDINGS.sub("", tail)) != tail:
        tail = shorter
    tail = {"smollm2-135m": "demo"}.get(tail, tail)
    return tail if tail in CONFIGS else None


def smaller_siblings(published: str | None) -> tuple[str, ...]:
    """Published models of the same family below this one, largest first."""
    for line in LINES:
        if published in line:
            return line[: line.index(published)][::-1]
    return ()


def larger_siblings(published: str | None) -> tuple[str, ...]:
    """Published models of the same family above this one, smallest first."""
    for line in LINES:
        if published in line:
            return line[line.index(published) + 1 :]
    return ()


def _unknown(name: str) -> ValueError:
    """What :func:`model_config` says of a name that is neither published nor a folder."""
    try:
        model_config(name, published=CONFIGS)
    except ValueError as error:
        return ValueError(f"{error}, or owner/name on the Hugging Face Hub")
    raise AssertionError(f"{name} is published")  # find() would have known it


def _from_folder(name: str, path: Path) -> Named:
    """A model from its folder or config.json."""
    folder = path if path.is_dir() else path.parent
    config = model_config(str(path), published=CONFIGS)
    check_dense(folder)
    published = _with_shapes_of(config)
    tail = name.rstrip("/").rpartition("/")[2].lower()
    template = _template(folder)
    post_trained = _post_trained(tail) or bool(template)
    return Named(name, config, published, name, post_trained, _thinks(tail) or "think" in template)


def _with_shapes_of(config: PreTrainedConfig) -> str | None:
    """The published model with the same shapes, of several the one made for texts as long; None for others."""

    def same(known: PreTrainedConfig, *keys: str) -> bool:
        return all(getattr(config, key, None) == getattr(known, key, None) for key in keys)

    models = {name: model_config(name, published=CONFIGS) for name in CONFIGS}
    found = [name for name, known in models.items() if same(known, *IDENTITY)]
    exact = [name for name in found if same(models[name], "max_position_embeddings")]
    return next(iter(exact + found), None)


def _post_trained(tail: str) -> bool:
    """Whether the last part of a name says so; Qwen3 without "base" is post-trained too."""
    return bool(POST_TRAINED.search(tail)) or (
        tail.startswith("qwen3-") and not tail.endswith("-base")
    )


def _thinks(tail: str) -> bool:
    """Whether the last part of a name says that the model reasons at length; Qwen3 does, its base models don't."""
    return bool(THINKING.search(tail)) or (
        tail.startswith("qwen3-") and not tail.endswith(("-base", "-instruct-2507"))
    )


def _template(folder: Path) -> str:
    """The chat template of a folder; empty without one."""
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        if (folder / file).is_file():
            text = (folder / file).read_text(encoding="utf-8", errors="replace")
            if file.endswith(".jinja") or '"chat_template"' in text:
                return text
    return ""
