"""ProductQuantLinear: a linear layer whose weight is looked up in codebooks, which train; its indices do not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanoquant.codebooks import ProductFactors
from nanoquant.importance import Importance
from nanoquant.product import reassigned
from nanoquant.product_budget import ProductShape, product_bits
from nanoquant_kernels import pack_indices, product_linear, unpack_indices
from nanoquant_kernels.indices import index_bytes


class ProductQuantLinear(nn.Module):
    """Linear layer whose row i is scale_i times groups of codebook entries, see :mod:`nanoquant.codebooks`.

    ``codebook`` (R, K, g), ``codebook2`` of a residual stage or None, ``scale`` (d_out,) and ``bias`` are float32
    parameters; gradients reach codebooks through the look-up. ``indices`` and ``indices2`` are buffers, uint8 and
    packed to their true width, which only :meth:`reassign` changes. Nothing dense lives between forward and backward.
    Matrix products run in the input's dtype or in autocast's.

    Args:
        in_features: d_in.
        out_features: d_out.
        shape: group, widths and slabs.
        bias: whether a bias (d_out,) is added.
        device: where the tensors live.
    """

    frozen = True
    """No latents stand behind the indices: a frozen layer and a trained one store the same."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        shape: ProductShape,
        bias: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if min(in_features, out_features) < 1:
            raise ValueError(
                f"in_features and out_features must be at least 1, got {in_features}, {out_features}"
            )
        shape.check(out_features, in_features)
        self.in_features, self.out_features, self.shape = in_features, out_features, shape
        for end, width in zip(("", "2"), (*shape.widths, None)[:2], strict=True):
            book = packed = None
            if width is not None:
                book = torch.empty(shape.slabs, 2**width, shape.group, device=device)
                size = index_bytes(shape.groups(in_features), width)
                packed = torch.empty(out_features, size, dtype=torch.uint8, device=device)
            self.register_parameter(f"codebook{end}", None if book is None else nn.Parameter(book))
            self.register_buffer(f"indices{end}", packed)
        self.scale = nn.Parameter(torch.empty(out_features, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random look-ups, and scales that keep the variance of the input."""
        for book, packed in self._stages():
            nn.init.normal_(book)
            packed.random_(0, 256)
        nn.init.constant_(self.scale, (len(self.shape.widths) * self.in_features) ** -0.5)

    @classmethod
    def from_factors(
        cls, factors: ProductFactors, bias: Tensor | None = None
    ) -> ProductQuantLinear:
        """Build a layer from factors of one matrix; tensors are copied as float32."""
        device, d_out = factors.scale.device, len(factors.scale)
        layer = cls(factors.d_in, d_out, factors.shape, bias is not None, device)
        with torch.no_grad():
            for (book, _), C in zip(layer._stages(), factors.codebooks, strict=True):
                book.copy_(C)
            layer._set_indices(factors)
            layer.scale.copy_(factors.scale)
            if bias is not None:
                layer.bias.copy_(bias)
        return layer

    @property
    def bits(self) -> int:
        """Bits that the packed layer stores for indices, codebooks and scales, without the bias."""
        return product_bits(self.out_features, self.in_features, self.shape)

    def vectors(self) -> list[nn.Parameter]:
        """Scales and bias."""
        return [self.scale] if self.bias is None else [self.scale, self.bias]

    def latents(self) -> list[nn.Parameter]:
        """None, see :attr:`frozen`."""
        return []

    def codebooks(self) -> list[nn.Parameter]:
        """The codebook of each stage."""
        return [book for book, _ in self._stages()]

    def freeze(self) -> ProductQuantLinear:
        """Nothing is left to fix, see :attr:`frozen`."""
        return self

    def thaw(self) -> ProductQuantLinear:
        """Nothing was fixed."""
        return self

    def factors(self) -> ProductFactors:
        """Float32 copies of codebooks and scales, and indices, detached."""
        groups = self.shape.groups(self.in_features)
        books, indices = [], []
        for (book, packed), width in zip(self._stages(), self.shape.widths, strict=True):
            books.append(book.detach().float().clone())
            indices.append(unpack_indices(packed, groups, width).short())
        scale = self.scale.detach().float().clone()
        return ProductFactors(tuple(books), tuple(indices), scale, self.in_features)

    def reassign(self, weight: Tensor, importance: Importance, beam: int) -> float:
        """Choose anew, for codebooks and scales that have trained, the entries nearest to ``weight`` (d_out, d_in).

        Args:
            weight: what the layer stands for.
            importance: of its channels.
            beam: as of :class:`KMeansConfig`.

        Returns:
            The share of indices that changed.
        """
        before = self.factors()
        after = reassigned(before, weight, importance, beam)
        self._set_indices(after)
        pairs = zip(before.indices, after.indices, strict=True)
        changed = torch.stack([(old != new).float().mean() for old, new in pairs])
        return float(changed.mean())

    def _set_indices(self, factors: ProductFactors) -> None:
        """Take over indices; new buffers, because old ones may lie in a file."""
        for end, k, width in zip(("", "2"), factors.indices, self.shape.widths, strict=False):
            setattr(self, f"indices{end}", pack_indices(k, width))

    def _stages(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Codebook and packed indices of each stage."""
        both = [(self.codebook, self.indices), (self.codebook2, self.indices2)]
        return both[: len(self.shape.widths)]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x`` (..., d_in), giving (..., d_out) in the compute dtype."""
        return product_linear(
            *(x, self.indices, self.codebook, self.indices2, self.codebook2, self.scale, self.bias)
        )

    def extra_repr(self) -> str:
        """Shape, look-ups and bits per weight."""
        bits = self.bits / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, codebooks={self.shape}, "
            f"bias={self.bias is not None}, bits={bits:.3f}"
        )
