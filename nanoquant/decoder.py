"""The decoder blocks of a model, and how to run them one at a time.

Shapes: N windows, T tokens a window, d hidden size.
"""

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nanoquant.mapped import forget, paged

Key = TypeVar("Key", int, str, tuple[int, str])


@dataclasses.dataclass(frozen=True, eq=False)
class Decoder:
    """Where the decoder blocks of a model are and what is inside them."""

    blocks: nn.ModuleList
    """The decoder blocks, in order."""
    path: str
    """Name of the list of blocks inside the model, for example ``model.layers``."""
    linears: tuple[tuple[str, ...], ...]
    """For every block, the names of its linears relative to the block, in order of execution."""
    groups: tuple[tuple[tuple[str, ...], ...], ...]
    """For every block, its linears grouped by the input tensor they share, in that order."""

    def full_name(self, block_index: int, name: str) -> str:
        """Name inside the model of a linear of one block."""
        return f"{self.path}.{block_index}.{name}"

    def linear_modules(self) -> dict[str, nn.Module]:
        """Every linear of every block under its full name, in order of execution."""
        return {
            self.full_name(index, name): block.get_submodule(name)
            for index, (block, names) in enumerate(zip(self.blocks, self.linears, strict=True))
            for name in names
        }


@dataclasses.dataclass(frozen=True, eq=False)
class BlockCall:
    """What a block receives besides the hidden states, for a batch of one window.

    Masks, positions and rotary tables have a batch dimension of 1, so that they broadcast over any
    batch of windows of the same length.
    """

    args: tuple[Any, ...]
    """Positional arguments after the hidden states."""
    kwargs: dict[str, Any]
    """Keyword arguments, without the hidden states."""
    hidden_key: str | None
    """Keyword that carries the hidden states; None when they are the first positional argument."""


class _StopForwardError(Exception):
    """Ends a forward pass as soon as what was wanted from it is known."""


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch every module to evaluation, and each that is still there back to its own former mode on exit."""
    modes = [(weakref.ref(module), module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for reference, mode in modes:
            if (module := reference()) is not None:
                module.training = mode


@contextlib.contextmanager
def observe_calls(
    modules: dict[Key, nn.Module], note: Callable[[Key, tuple, dict], None]
) -> Iterator[None]:
    """While active, ``note(key, args, kwargs)`` is called before each forward of a module."""

    def hook(key: Key, module: nn.Module, args: tuple, kwargs: dict) -> None:
        note(key, args, kwargs)

    handles = [
        module.register_forward_pre_hook(functools.partial(hook, key), with_kwargs=True)
        for key, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def replaced_forwards(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """While active, modules have other forwards."""
    pairs = list(forwards)
    before = [(module, vars(module).get("forward")) for module, _ in pairs]
    for module, forward in pairs:
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in before:
            del module.forward
            if forward is not None:
                module.forward = forward


def around_blocks(model: nn.Module) -> list[nn.Module]:
    """Embedding and head of a model, as far as it has them."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [module for module in (model.get_input_embeddings(), head) if module is not None]


def forgetting(
    model: nn.Module, blocks: Iterable[nn.Module]
) -> contextlib.AbstractContextManager[None]:
    """While active, blocks, embedding and head forget their mapped weights when they have run."""
    return paged((*blocks, *around_blocks(model)))


@torch.no_grad()
def capture_block_inputs(
    model: nn.Module,
    decoder: Decoder,
    windows: Tensor,
    batch_size: int = 1,
    empty: Callable[[tuple[int, ...], Tensor], Tensor] = lambda shape, like: like.new_empty(shape),
) -> tuple[Tensor, list[BlockCall]]:
    """Run the model up to its first block and note what every block is called with.

    Args:
        model: The dense model.
        decoder: Its blocks.
        windows: Token ids (N, T).
        batch_size: Windows a forward pass.
        empty: Makes room of a shape for inputs like a tensor.

    Returns:
        Inputs of the first block (N, T, d) in the dtype and on the device of the model, and the
        call of every block.

    Raises:
        ValueError: The calls depend on the text, so no single call fits all windows.
    """
    windows = windows.to(input_device(model))
    last = windows[-1:] if len(windows) > 1 else windows.flip(-1)
    calls = _block_calls(model, decoder, windows[:1])
    for index, (one, two) in enumerate(zip(calls, _block_calls(model, decoder, last), strict=True)):
        if not _same(one.args, two.args) or not _same(one.kwargs, two.kwargs):
            raise ValueError(
                f"block {decoder.path}.{index} receives tensors that depend on the text besides "
                "its hidden states; reconstruction of one block at a time is not possible"
            )
    whole, done = None, 0

    def stop(_: int, args: tuple, kwargs: dict) -> None:
        nonlocal whole, done
        hidden = split_call(args, kwargs)[0]
        if whole is None:
            whole = empty((len(windows), *hidden.shape[1:]), hidden)
        part = whole[done : done + len(hidden)]
        part.copy_(hidden)
        forget([part])
        done += len(hidden)
        raise _StopForwardError

    with evaluation_mode(model), observe_calls({0: decoder.blocks[0]}, stop):
        for batch in windows.split(batch_size):
            with contextlib.suppress(_StopForwardError):
                model(input_ids=batch, use_cache=False)
    return whole, calls


def call_block(block: Callable[..., Any], hidden: Tensor, call: BlockCall) -> Any:  # noqa: ANN401
    """What a block, or its forward, returns for hidden states (B, T, d): such, or a tuple that begins with them."""
    if call.hidden_key is None:
        return block(hidden, *call.args, **call.kwargs)
    return block(*call.args, **{call.hidden_key: hidden}, **call.kwargs)


def run_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """Run one decoder block: hidden states (B, T, d) to hidden states (B, T, d)."""
    return split_output(call_block(block, hidden, call))[0]


def split_output(output: Tensor | tuple) -> tuple[Tensor, tuple | None]:
    """Hidden states that a block returned, and what it returned beside; None: no tuple."""
    return (output[0], output[1:]) if isinstance(output, tuple) else (output, None)


def input_device(model: nn.Module) -> torch.device:
    """Device on which the model expects its token ids: that of the input embedding."""
    return model.get_input_embeddings().weight.device


def most_positions(model: nn.Module) -> int | None:
    """Longest text that the model was made for, in tokens; None where its config does not say."""
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


def _block_calls(model: nn.Module, decoder: Decoder, window: Tensor) -> list[BlockCall]:
    """Run one window (1, T) through the whole model and note the call of every block."""
    calls: dict[int, BlockCall] = {}

    def note(index: int, args: tuple, kwargs: dict) -> None:
        calls[index] = split_call(args, kwargs)[1]

    with evaluation_mode(model), observe_calls(dict(enumerate(decoder.blocks)), note):
        model(input_ids=window, use_cache=False)
    return [calls[index] for index in range(len(decoder.blocks))]


def split_call(args: tuple, kwargs: dict) -> tuple[Tensor, BlockCall]:
    """Separate the hidden states from the other arguments of a block."""
    if args:
        return args[0], BlockCall(args[1:], dict(kwargs), None)
    rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
    return kwargs["hidden_states"], BlockCall((), rest, "hidden_states")


def _same(one: Any, two: Any) -> bool:  # noqa: ANN401
    """Compare nested arguments of two calls; tensors by value."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(two) and all(map(_same, one, two))
    return one is two or one == two
