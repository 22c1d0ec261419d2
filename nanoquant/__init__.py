"""NanoQuant: large language models at one bit per weight and below (arXiv 2602.06694).

Names are imported when they are first used, so that ``import nanoquant`` costs next to nothing. It
is enough, though, for ``AutoModelForCausalLM.from_pretrained`` to load a quantized folder.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

from nanoquant.register import register

__version__ = "0.1.0"

_MODULES = {
    "quantize": "quantize",
    "nanoquant_config": "config",
    "NanoQuantConfig": "config",
    "load": "checkpoint",
    "save_pretrained": "checkpoint",
    "pack_model": "checkpoint",
    "read_sizes": "checkpoint",
    "generate": "generate",
    "GenerationSettings": "generation_settings",
    "perplexity": "evaluation.perplexity",
    "BinaryLowRankLinear": "linear",
    "BinaryFactors": "binary",
    "Importance": "importance",
    "ADMMInitializer": "admm",
    "ProductQuantLinear": "product_linear",
    "KMeansInitializer": "product",
    "BlockReconstructor": "block_reconstruction",
    "ModelReconstructor": "model_reconstruction",
    "PackedBinaryLinear": "packed_linear",
    "PackedBinaryTensor": "packed_tensor",
    "EmbeddingConfig": "embedding",
    "quantize_embeddings": "model_embeddings",
}

__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps ``nanoquant.quantize`` the function when Python binds the submodule of that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and _MODULES.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
register()
