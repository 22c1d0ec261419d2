import pytest
import torch

from nanoquant_kernels.layout import align_rows, pack_signs, packed_width, unpack_signs
from nanoquant_kernels.planes import as_words


def signs(rows, columns, seed=0):
    random = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    return torch.where(random < 0.5, -1.0, 1.0)


def test_packing_is_little_endian_and_a_set_bit_means_minus_one():
    row = torch.tensor([1.0, -1, 1, 1, -1, -1, 1, 1, -1])
    assert pack_signs(row).tolist() == [0b00110010, 0b00000001]


def test_words_hold_column_32w_plus_j_in_bit_j():
    matrix = signs(5, 64)
    words = pack_signs(matrix).view(torch.int32)
    bit = (words[:, 1] >> 7) & 1
    assert torch.equal(bit == 1, matrix[:, 32 + 7] < 0)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 31, 32, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_unpacking_undoes_packing_for_any_width(columns, dtype):
    matrix = signs(3, columns)
    packed = pack_signs(matrix)
    assert packed.dtype == torch.uint8 and packed.shape == (3, packed_width(columns))
    restored = unpack_signs(packed, columns, dtype)
    assert restored.dtype == dtype and torch.equal(restored.float(), matrix)


def test_tail_bits_are_zero():
    assert pack_signs(-torch.ones(2, 11))[:, 1].tolist() == [0b111, 0b111]


def test_both_zeros_count_as_plus_one():
    assert pack_signs(torch.tensor([0.0, -0.0, -1e-30])).item() == 0b100


def test_integers_and_booleans_pack_like_floats():
    matrix = signs(4, 20)
    assert torch.equal(pack_signs(matrix.to(torch.int8)), pack_signs(matrix))
    assert torch.equal(pack_signs(matrix < 0), pack_signs(matrix))


def test_leading_dimensions_are_kept_and_may_be_empty():
    assert pack_signs(torch.ones(2, 3, 9)).shape == (2, 3, 2)
    assert pack_signs(torch.ones(0, 9)).shape == (0, 2)
    assert unpack_signs(torch.zeros(0, 2, dtype=torch.uint8), 9, torch.float32).shape == (0, 9)


@pytest.mark.parametrize("columns", [8, 100, 128, 2016])
def test_aligned_rows_are_the_same_rows_16_bytes_apart(columns):
    packed = pack_signs(torch.randn(5, columns, generator=torch.manual_seed(0)))
    aligned = align_rows(packed)
    assert torch.equal(aligned, packed) and aligned.stride(0) % 16 == 0
    assert aligned.stride(0) < packed.shape[1] + 16
    words = as_words(aligned)
    assert words.data_ptr() == aligned.data_ptr() and words.shape == (5, aligned.stride(0) // 2)


def test_words_of_a_part_of_a_larger_matrix_are_copied_and_right():
    packed = pack_signs(torch.randn(8, 1024, generator=torch.manual_seed(0)))
    for part in (packed[:, :30], packed[2:5, 3:20], packed[:1, 1:4]):
        whole = as_words(part).view(torch.uint8)
        assert torch.equal(whole[:, : part.shape[1]], part)
