"""The dense model that a baseline changes: its decoder, the linears of it, and what is stored afterwards."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from torch import Tensor, nn
from transformers import PreTrainedModel

from nanoquant.architectures import Decoder, as_linear, decoder_from_structure, find_decoder
from nanoquant.baselines.config import GROUP_SIZES
from nanoquant.progress import Progress
from nanoquant.sizes import Sizes, measure_sizes, tensor_bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A dense model and the linears that nanoquant would quantize, each an ``nn.Linear``."""

    model: PreTrainedModel
    """Changed in place."""
    decoder: Decoder
    """Its blocks."""
    shapes: dict[str, tuple[int, int]]
    """(d_out, d_in) of every linear, by full name."""
    parameters: int
    """Parameters of the dense model."""
    progress: Progress
    """Told about linears that are done, by baselines that take long."""

    @classmethod
    def of(cls, model: PreTrainedModel, progress: Progress | None = None) -> Target:
        """Find the linears of a dense model; those stored transposed become plain ones.

        Raises:
            ValueError: the model is not supported, see :func:`find_decoder`.
        """
        model.requires_grad_(False).eval()
        decoder = find_decoder(model)
        shapes = {}
        for name, module in decoder.linear_modules().items():
            linear = as_linear(module)
            model.set_submodule(name, linear)
            shapes[name] = tuple(linear.weight.shape)
        parameters = measure_sizes(model).parameters
        return cls(model, decoder, shapes, parameters, progress or Progress())

    def linears(self) -> dict[str, nn.Linear]:
        """Every linear as it is now, by full name."""
        return {name: self.model.get_submodule(name) for name in self.shapes}

    def replace(self, make: Callable[[str, Tensor, Tensor | None], nn.Module]) -> None:
        """Put ``make(name, weight, bias)`` in the place of every linear; weights are float32."""
        for name, linear in self.linears().items():
            layer = make(name, linear.weight.detach().float(), linear.bias)
            self.model.set_submodule(name, layer.eval())
            self.progress.advance(1, note=name)

    def sizes(self) -> Sizes:
        """True sizes: every tensor that is stored for the linears counts, biases apart, whatever its form."""
        stored = sum(stored_bytes(linear) for linear in self.linears().values())
        weights = sum(d_out * d_in for d_out, d_in in self.shapes.values())
        whole = measure_sizes(self.model)
        return dataclasses.replace(
            whole,
            body_bits_per_weight=8 * stored / weights,
            model_bits_per_parameter=8 * whole.bytes_on_disk / self.parameters,
            body_weights=weights,
            parameters=self.parameters,
        )


def stored_bytes(module: nn.Module) -> int:
    """Bytes of all tensors of a linear except its bias."""
    bias = getattr(module, "bias", None)
    tensors = [*module.parameters(), *module.buffers()]
    return tensor_bytes(tensor for tensor in tensors if tensor is not bias)


def linear_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of the linears that a baseline changes, by full name, without a forward pass."""
    modules = decoder_from_structure(model).linear_modules()
    return {name: tuple(as_linear(module).weight.shape) for name, module in modules.items()}


def check_groups(shapes: dict[str, tuple[int, int]], size: int) -> None:
    """Refuse a group size that does not divide all rows, instead of leaving some linears dense.

    Raises:
        ValueError: names one linear, and what would fit.
    """
    bad = [name for name, (_, d_in) in shapes.items() if d_in % size]
    if bad:
        common = math.gcd(*(d_in for _, d_in in shapes.values()))
        fits = [str(n) for n in GROUP_SIZES if common % n == 0]
        raise ValueError(
            f"group_size={size} does not divide the {shapes[bad[0]][1]} inputs of {bad[0]} and "
            f"{len(bad) - 1} more linears; sizes that fit all linears: {', '.join(fits) or 'none'}"
        )
