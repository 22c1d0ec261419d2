"""Codebook indices survive packing to their true width, bit by bit where the docstring says."""

import pytest
import torch

from nanoquant_kernels.indices import WIDTHS, index_bytes, pack_indices, unpack_indices

WIDTH = pytest.mark.parametrize("width", WIDTHS)


def random_indices(shape, width, dtype=torch.int32):
    g = torch.Generator().manual_seed(width)
    return torch.randint(0, 2**width, shape, generator=g, dtype=dtype)


@WIDTH
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 16, 31, 72, 193])
def test_indices_survive_packing_in_exactly_their_bits(width, count):
    indices = random_indices((5, count), width)
    packed = pack_indices(indices, width)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert packed.shape == (5, -(-count * width // 8)) == (5, index_bytes(count, width))
    assert torch.equal(unpack_indices(packed, count, width), indices)


@WIDTH
def test_every_value_at_every_place_survives(width):
    values = torch.arange(2**width)
    indices = torch.stack([values.roll(k) for k in range(4)], dim=1).repeat(1, 3)  # (2^width, 12)
    assert torch.equal(unpack_indices(pack_indices(indices, width), 12, width).long(), indices)


@WIDTH
def test_bits_lie_as_documented_and_the_rest_is_zero(width):
    count = 9
    indices = random_indices((count,), width)
    packed = pack_indices(indices, width).tolist()
    found = [packed[b // 8] >> b % 8 & 1 for b in range(8 * len(packed))]
    wanted = [int(k) >> j & 1 for k in indices for j in range(width)]
    assert found == wanted + [0] * (len(found) - len(wanted))


def test_the_example_of_the_docstring_holds():
    assert pack_indices(torch.tensor([1, 2, 3, 4]), 6).tolist() == [
        0b10000001,
        0b00110000,
        0b00010000,
    ]


@WIDTH
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
def test_integer_dtypes_strides_and_leading_dimensions_pack_alike(width, dtype):
    indices = random_indices((2, 3, 10), width)
    packed = pack_indices(indices, width)
    assert packed.shape[:2] == (2, 3)
    assert torch.equal(pack_indices(indices.to(dtype), width), packed)
    assert torch.equal(pack_indices(indices.mT.contiguous().mT, width), packed)
    assert torch.equal(unpack_indices(packed, 10, width), indices)
    assert pack_indices(indices[:, :0], width).shape == (2, 0, packed.shape[-1])


@pytest.mark.parametrize("width", [0, 1, 3, 5, 7, 16])
def test_other_widths_are_refused_by_name(width):
    with pytest.raises(ValueError, match=f"4, 6, 8, 10, 12 bits, got {width}"):
        pack_indices(torch.zeros(4, dtype=torch.int64), width)
    with pytest.raises(ValueError, match=f"got {width}"):
        unpack_indices(torch.zeros(4, dtype=torch.uint8), 4, width)


@WIDTH
@pytest.mark.parametrize("wrong", [-1, 0], ids=["negative", "too large"])
def test_an_index_out_of_range_is_refused(width, wrong):
    value = wrong or 2**width
    with pytest.raises(ValueError, match=rf"0\.\.{2**width - 1}, got {min(value, 0)}"):
        pack_indices(torch.tensor([0, value]), width)


def test_what_are_no_indices_is_refused():
    for values in (torch.ones(4), torch.ones(4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="integers"):
            pack_indices(values, 8)
    with pytest.raises(ValueError, match="rows of 3 bytes"):
        unpack_indices(torch.zeros(2, 4, dtype=torch.uint8), 4, 6)
    with pytest.raises(ValueError, match="uint8"):
        unpack_indices(torch.zeros(2, 3, dtype=torch.int32), 4, 6)
