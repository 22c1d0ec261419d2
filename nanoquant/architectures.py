"""Find the decoder blocks of a causal language model and the linears inside them.

Nothing here depends on the names of a model family: the blocks are the largest list of modules,
their linears are the ``nn.Linear`` and ``Conv1D`` inside, and the order in which these run (and
which of them read the very same tensor) is observed on one short forward pass.
"""

import copy
import dataclasses
import logging
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from nanoquant.decoder import (
    BlockCall,
    Decoder,
    capture_block_inputs,
    evaluation_mode,
    forgetting,
    input_device,
    observe_calls,
    run_block,
)

__all__ = [
    "BlockCall",
    "Decoder",
    "as_linear",
    "capture_block_inputs",
    "check_supported",
    "decoder_from_structure",
    "evaluation_mode",
    "find_decoder",
    "find_skeleton_decoder",
    "input_device",
    "is_quantizable",
    "linear_shape",
    "run_block",
]

logger = logging.getLogger(__name__)

TRACE_TOKENS = 8


def is_quantizable(module: nn.Module) -> bool:
    """Tell whether a module is a plain linear: 2-D floating point weight, not yet quantized."""
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    weight = module.weight
    return weight.ndim == 2 and weight.is_floating_point() and type(weight.data) is Tensor


def as_linear(module: nn.Module) -> nn.Linear:
    """Turn a transformers ``Conv1D`` (weight stored transposed) into an ``nn.Linear``.

    Args:
        module: ``Conv1D`` with weight (d_in, d_out), or an ``nn.Linear``.

    Returns:
        A linear that computes the same, with its own weight (d_out, d_in) and the same bias
        parameter; an ``nn.Linear`` is returned unchanged.

    Raises:
        ValueError: The module is neither.
    """
    if isinstance(module, nn.Linear):
        return module
    if not isinstance(module, Conv1D):
        raise ValueError(f"got {type(module).__name__}; allowed: nn.Linear, transformers Conv1D")
    d_in, d_out = module.weight.shape
    linear = nn.Linear(d_in, d_out, bias=module.bias is not None, device="meta")
    weight = module.weight.detach().t().contiguous()
    linear.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    linear.bias = module.bias
    return linear.train(module.training)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of an ``nn.Linear`` or ``Conv1D``."""
    first, second = module.weight.shape
    return (second, first) if isinstance(module, Conv1D) else (first, second)


def decoder_from_structure(model: nn.Module) -> Decoder:
    """Blocks and linears without a forward pass: in order of registration, ungrouped, also on the meta device.

    Raises:
        ValueError: as :func:`find_decoder`.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; give a decoder-only model")
    path, blocks = _largest_module_list(model)
    names = [[n for n, m in block.named_modules() if is_quantizable(m)] for block in blocks]
    found = Decoder(blocks, path, tuple(map(tuple, names)), groups=((),) * len(blocks))
    check_supported(model, found)
    return found


def find_decoder(model: nn.Module) -> Decoder:
    """Find the decoder blocks and their linears from the structure of the model.

    The blocks are the ``nn.ModuleList`` with most parameters whose children hold linears. One
    forward pass over a few tokens tells in which order the linears run and which share an input.

    Args:
        model: A causal language model of transformers, called as ``model(input_ids=...)``.

    Raises:
        ValueError: There is no such list, or the blocks hold parts that cannot be quantized.
    """
    return _in_order(model, decoder_from_structure(model), model)


def find_skeleton_decoder(model: PreTrainedModel) -> Decoder:
    """The same of a model on the meta device: the forward pass is that of fake tensors, which only have shapes.

    Raises:
        ValueError: as :func:`find_decoder`.
    """
    found = decoder_from_structure(model)
    fake = FakeTensorMode()
    with fake, no_init_weights():  # some look at values, which fake tensors have none of
        running = type(model)(copy.deepcopy(model.config))
    return _in_order(model, found, running, fake)


def _in_order(
    model: nn.Module,
    found: Decoder,
    running: nn.Module,
    mode: AbstractContextManager[object] | None = None,
) -> Decoder:
    """The decoder with its linears in the order in which ``running``, of the same structure, calls them."""
    _report_kept(model, found.path)
    blocks = running.get_submodule(found.path)
    with mode or nullcontext():
        reads = _trace_reads(running, dataclasses.replace(found, blocks=blocks))
    decoder = Decoder(
        found.blocks,
        found.path,
        linears=tuple(tuple(names) for names in reads),
        groups=tuple(_group_by_input(names) for names in reads),
    )
    idle = sorted(found.linear_modules().keys() - decoder.linear_modules().keys())
    if idle:
        raise ValueError(
            f"{_with_shares(model, idle)}: never ran in a forward pass over {TRACE_TOKENS} "
            "tokens, so no statistics can be taken; this architecture is not supported"
        )
    return decoder


def check_supported(model: nn.Module, decoder: Decoder) -> None:
    """Refuse a model that would keep matrices in its blocks dense.

    Raises:
        ValueError: Names every part inside the blocks with a weight of two or more dimensions that
            is no plain linear, and its share of the model's parameters; or weights used twice.
    """
    plain = {id(module.weight) for module in decoder.linear_modules().values()}
    prefix = f"{decoder.path}."
    inside, outside = {}, set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.startswith(prefix):
            inside[name] = parameter
        else:
            outside.add(id(parameter))
    dense = [n for n, p in inside.items() if p.ndim >= 2 and id(p) not in plain]
    if dense:
        raise ValueError(
            f"{_with_shares(model, dense)}: weights inside the decoder blocks that are neither "
            "nn.Linear nor Conv1D (fused experts, routers, convolutions or an already quantized "
            "layer); they would stay dense, so the model is refused"
        )
    linears = [n for n, p in inside.items() if id(p) in plain]
    shared = len(linears) > len(plain) or plain & outside
    if shared:
        raise ValueError(
            f"some linears of {decoder.path} share one weight with another module; "
            "untie them before quantization"
        )


def _largest_module_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and module of the list of blocks with most parameters."""
    sizes = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and any(_holds_linear(child) for child in module):
            sizes[path] = sum(p.numel() for p in module.parameters())
    if not sizes:
        raise ValueError(
            f"found no decoder blocks in {type(model).__name__}: there is no nn.ModuleList whose "
            "children hold linears; give a causal language model of transformers"
        )
    path = max(sizes, key=sizes.__getitem__)
    blocks = model.get_submodule(path)
    kinds = {type(block).__name__ for block in blocks}
    if len(kinds) > 1 and len(kinds) == len(blocks):
        raise ValueError(
            f"the children of {path}, the largest list of modules, are all of different classes "
            f"({', '.join(sorted(kinds))}); decoder blocks share a class per layer type"
        )
    return path, blocks


def _report_kept(model: nn.Module, path: str) -> None:
    """Name the linears outside the blocks that stay dense; the head, which always does, is not among them."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    kept = [
        name
        for name, module in model.named_modules()
        if is_quantizable(module) and not name.startswith(f"{path}.") and module is not head
    ]
    if kept:
        logger.warning(
            "%s: linears outside the decoder blocks, kept dense", _with_shares(model, kept)
        )


def _holds_linear(block: nn.Module) -> bool:
    """Tell whether a module has a linear strictly inside."""
    return any(is_quantizable(m) for m in block.modules() if m is not block)


def _with_shares(model: nn.Module, names: list[str], shown: int = 8) -> str:
    """List modules or parameters with their share of all parameters of the model."""
    sizes = {name: p.numel() for name, p in model.named_parameters(remove_duplicate=False)}
    total = sum(p.numel() for p in model.parameters())

    def share(name: str) -> float:
        inside = (n for key, n in sizes.items() if key == name or key.startswith(f"{name}."))
        return sum(inside) / total

    shares = dict(sorted(((n, share(n)) for n in names), key=lambda item: -item[1]))
    listed = ", ".join(f"{name} ({part:.1%})" for name, part in list(shares.items())[:shown])
    if len(names) > shown:
        listed += f", and {len(names) - shown} more"
    return f"{listed} [together {sum(shares.values()):.1%} of all parameters]"


@torch.no_grad()
def _trace_reads(model: nn.Module, decoder: Decoder) -> list[dict[str, Tensor]]:
    """Run a few tokens; per block, linear -> the tensor it read, in order of first execution."""
    reads: list[dict[str, Tensor]] = [{} for _ in decoder.blocks]

    def note(key: tuple[int, str], args: tuple, kwargs: dict) -> None:
        index, name = key
        reads[index].setdefault(name, args[0] if args else kwargs["input"])

    modules = {
        (index, name): block.get_submodule(name)
        for index, (block, names) in enumerate(zip(decoder.blocks, decoder.linears, strict=True))
        for name in names
    }
    tokens = torch.arange(TRACE_TOKENS, device=input_device(model))[None]
    tokens = tokens % model.get_input_embeddings().num_embeddings
    with evaluation_mode(model), observe_calls(modules, note), forgetting(model, decoder.blocks):
        model(input_ids=tokens, use_cache=False)
    return reads


def _group_by_input(reads: dict[str, Tensor]) -> tuple[tuple[str, ...], ...]:
    """Group the linears of a block by the identity of the tensor they read."""
    groups: dict[int, list[str]] = {}
    for name, tensor in reads.items():
        groups.setdefault(id(tensor), []).append(name)
    return tuple(tuple(names) for names in groups.values())
