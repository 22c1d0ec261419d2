"""A whole model from a configuration alone, with random weights, packed or dense, and how it decodes.

No dense weight of a packed linear is ever made.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, StaticCache

from nanoquant.benchmark.shapes import skeleton
from nanoquant.benchmark.timing import TRIALS, captured
from nanoquant.embedding import EmbeddingConfig
from nanoquant.memory import resident_bytes
from nanoquant.model_embeddings import find_embeddings, quantized_tables, swap_embeddings
from nanoquant.packed_linear import PackedBinaryLinear
from nanoquant.sizes import measure_sizes

WARM_STEPS = 3
BLOCK = 2**20
"""Random numbers that large weights repeat."""
DEVIATION = 0.02


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One model of the comparison; ``ranks`` is None for the dense one."""

    name: str
    config: PreTrainedConfig
    ranks: dict[str, int] | None
    embedding_bits: int
    """Of embedding and head: 16, 8 or 4."""
    device: str
    threads: int
    seed: int
    context: int
    """Tokens in the key-value cache before the first step."""
    repeats: int
    most_seconds: float


def check_context(name: str, config: PreTrainedConfig, context: int, repeats: int) -> None:
    """Refuse a context after which a model has too few positions left for all steps.

    Raises:
        ValueError: it has.
    """
    most, steps = getattr(config, "max_position_embeddings", None), repeats + TRIALS + WARM_STEPS
    if most is not None and context + steps > most:
        raise ValueError(
            f"context {context} and {steps} steps need {context + steps} positions, but {name} has {most}; "
            f"give a context of at most {most - steps}"
        )


def build(
    config: PreTrainedConfig,
    ranks: dict[str, int] | None,
    embedding_bits: int = EmbeddingConfig.bits,
) -> PreTrainedModel:
    """The model on the meta device, with packed layers for the linears that have a rank.

    Raises:
        ValueError: embedding and head can't have these bits.
    """
    model = skeleton(config)
    if embedding_bits != EmbeddingConfig.bits:
        entry = {8: {"bits": 8}, 4: {"bits": 4, "group_size": EmbeddingConfig.group_size}}
        swap_embeddings(model, dict.fromkeys(find_embeddings(model), entry[embedding_bits]))
    for name, rank in (ranks or {}).items():
        dense = model.get_submodule(name)
        shape = dense.weight.shape
        d_out, d_in = shape if isinstance(dense, nn.Linear) else shape[::-1]
        packed = PackedBinaryLinear(
            d_in, d_out, rank, dense.bias is not None, "meta", bias_dtype=torch.bfloat16
        )
        packed._is_hf_initialized = True  # transformers would look for a weight to initialize
        model.set_submodule(name, packed.eval())
    return model


def fill(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """Give a model of the meta device memory and random weights; norms and position tables are those of the family."""
    model.to_empty(device=device)
    model.tie_weights()
    noise = DEVIATION * torch.randn(BLOCK, device=device)
    signs = torch.randint(0, 256, (BLOCK,), dtype=torch.uint8, device=device)
    packed = [m for m in model.modules() if isinstance(m, PackedBinaryLinear)]
    inside = {id(p) for module in packed for p in module.parameters()}
    for parameter in model.parameters():
        if parameter.ndim < 2 and id(parameter) not in inside:
            continue  # norms and biases, which transformers sets
        source = noise if parameter.is_floating_point() else signs.view(parameter.dtype)
        for piece in parameter.data.view(-1).split(BLOCK):
            piece.copy_(source[: piece.numel()])
        parameter._is_hf_initialized = True
    for module in packed:
        for rows, columns in ((module.u_signs, module.rank), (module.v_signs, module.in_features)):
            if columns % 8:  # bits past the last column are 0 in the stored layout
                rows.data[:, -1] &= (1 << columns % 8) - 1
    for table in {id(t.codes): t for t in quantized_tables(model).values()}.values():
        table.scales.data /= 2 ** (table.bits - 2)  # codes are about so large
        if table.zeros is not None:
            table.zeros.data.zero_()
    model.initialize_weights()
    return model


class Decoding:
    """Greedy decoding of one sequence with a static cache, a step at a time; on CUDA a step is a graph.

    Args:
        model: causal language model.
        context: tokens that are in the cache already.
        steps: most steps that are going to be taken.
    """

    def __init__(self, model: PreTrainedModel, context: int, steps: int) -> None:
        self.model, device = model, model.device
        self.cache = StaticCache(config=model.config, max_cache_len=context + steps + WARM_STEPS)
        prompt = torch.arange(context, device=device)[None] % model.config.vocab_size
        self.token = self._next(prompt)  # (1, 1); steps read and write it in place
        for _ in range(WARM_STEPS - 1):
            self._step()
        self.advance = captured([self._step]).replay if device.type == "cuda" else self._step

    @torch.no_grad()
    def _next(self, tokens: Tensor) -> Tensor:
        """The most probable token (1, 1) after tokens (1, n) that follow those in the cache."""
        out = self.model(
            input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        return out.logits[:, -1:].argmax(-1)

    def _step(self) -> None:
        self.token.copy_(self._next(self.token))

    def seconds(self) -> float:
        """Take one step and give its duration."""
        cuda = self.token.is_cuda
        if cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        self.advance()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begun


def memory_figures(model: PreTrainedModel, before: int | None) -> dict[str, int | None]:
    """Bytes of the weights, and the most that the process took, above what its libraries take on a CPU."""
    peak = resident_bytes()["VmHWM"]
    own = None if peak is None or before is None else peak - before
    if model.device.type == "cuda":
        own = torch.cuda.max_memory_allocated()
    return {"weight_bytes": measure_sizes(model).bytes_resident, "peak_bytes": own}
