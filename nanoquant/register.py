"""Make transformers, torchao, torch.export and peft know this package, without importing any.

They keep tables of quantization methods and operators in modules that take seconds to import, mostly for
libraries of their own. So our entries are added at the moment when those modules have been loaded
anyway: by ``import nanoquant`` where they already are, otherwise by whoever imports them later.
"""

import importlib
import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

FOLLOWERS = {
    "transformers.modeling_utils": "nanoquant.hf_quantizer",
    "nanoquant.config": "nanoquant.transform",
    "torch._export.serde.serialize": "nanoquant_kernels",  # what torch.export.load finds operators with
    "peft": "nanoquant.lora",
}
"""Module to the one that is imported right after it, which registers itself by being imported."""
PRIVATE = ("nanoquant.lora",)
"""Followers that widen private parts of a library, which another version of it may not have."""

logger = logging.getLogger(__name__)


def register() -> None:
    """Import the followers of what is loaded, and those of the rest as soon as it is."""
    waiting = []
    for leader, follower in FOLLOWERS.items():
        if leader in sys.modules:
            _import(follower)
        else:
            waiting.append(leader)
    sys.meta_path.insert(0, _Follow(waiting))


def _import(follower: str) -> None:
    """Import a follower; one that does not fit its leader is left out with a warning, and the leader stays usable."""
    try:
        importlib.import_module(follower)
    except (ImportError, AttributeError) as error:
        if follower not in PRIVATE:
            raise
        logger.warning(
            "%s is left out, the library it extends is too old or too new: %s", follower, error
        )


class _Follow(MetaPathFinder):
    """Finds the awaited modules with the other finders, and adds a step after their execution."""

    def __init__(self, waiting: list[str]) -> None:
        self.waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the usual spec of an awaited module, with our step added; None for others."""
        if fullname not in self.waiting:
            return None
        self.waiting.remove(fullname)  # the next line asks all finders, this one too
        spec = importlib.util.find_spec(fullname)
        self.waiting.append(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_and_follow(module: ModuleType) -> None:
            execute(module)
            _import(FOLLOWERS[fullname])

        spec.loader.exec_module = exec_and_follow
        return spec
