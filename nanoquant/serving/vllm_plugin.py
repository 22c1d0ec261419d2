"""What vLLM finds by its entry point ``vllm.general_plugins``: the quantization method "nanoquant".

Written from the sources of vLLM 0.33.0. Run: loading, refusals and outputs of its linear layers' interface, in
``tests/test_serve_vllm.py``. Not run: an engine of vLLM, its compiled graphs, a GPU. See ``recipes/serving.md``.
"""

from __future__ import annotations

import logging
from importlib.metadata import version

logger = logging.getLogger(__name__)

READ = "0.33."
"""What versions of vLLM begin with whose sources were read."""


def register() -> None:
    """Add the method to vLLM; of another version than was read it warns and leaves vLLM as it is.

    vLLM calls this in each of its processes, whatever they serve, so an error here would stop other models too.
    """
    found = version("vllm")
    if not found.startswith(READ):
        logger.warning(
            "nanoquant knows vLLM %s*, but this is %s, so quantization method nanoquant is not registered: "
            "pip install 'nanoquant[vllm]', or serve by nanoquant serve",
            READ,
            found,
        )
        return
    from vllm.model_executor.layers.quantization import register_quantization_config

    from nanoquant.serving.vllm_linear import NanoQuantVllmConfig

    register_quantization_config("nanoquant")(NanoQuantVllmConfig)
