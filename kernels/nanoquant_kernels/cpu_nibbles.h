// Rows of 4-bit numbers, each looked up in a table of its own with 16 floats, which a permute holds in one register.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

const int ROWS = 32;  // rows of a block

#if defined(__x86_64__)
// Words (16 rows, 16) of 32 columns each to (16 words, 16 rows).
__attribute__((target("avx512f"))) inline void transpose(const __m512i* in, uint32_t* out) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        __m512i even = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), odd = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xDD);
        __m512i last_even = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
        __m512i last_odd = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xDD);
        _mm512_storeu_si512(out + 16 * i, _mm512_shuffle_i32x4(even, last_even, 0x88));
        _mm512_storeu_si512(out + 16 * (i + 4), _mm512_shuffle_i32x4(odd, last_odd, 0x88));
        _mm512_storeu_si512(out + 16 * (i + 8), _mm512_shuffle_i32x4(even, last_even, 0xDD));
        _mm512_storeu_si512(out + 16 * (i + 12), _mm512_shuffle_i32x4(odd, last_odd, 0xDD));
    }
}

// out[i] = sum over w of tables[16 w + nibble w of row i] for `count` <= ROWS rows of `columns` bits, lowest nibble first.
// Tables reach to a multiple of 8 nibbles.
__attribute__((target("avx512f,avx512bw"))) inline void sums_of_nibbles(const uint8_t* signs, int64_t columns,
                                                                       int count, const float* tables, float* out) {
    const int64_t bytes = (columns + 7) / 8;
    __m512 acc[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t start = 0; start < bytes; start += 64) {
        const int64_t left = bytes - start;
        const __mmask64 inside = left >= 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
        uint32_t words[2][256];  // of rows 0 to 15 and 16 to 31
        for (int half = 0; half < 2; half++) {
            __m512i rows[16];
            for (int i = 0; i < 16; i++) {
                const int row = 16 * half + i < count ? 16 * half + i : count - 1;
                rows[i] = _mm512_maskz_loadu_epi8(inside, signs + row * bytes + start);
            }
            transpose(rows, words[half]);
        }
        const int many = left >= 64 ? 16 : int((left + 3) / 4);
        for (int w = 0; w < many; w++) {
            __m512i low = _mm512_loadu_si512(words[0] + 16 * w), high = _mm512_loadu_si512(words[1] + 16 * w);
            const float* table = tables + (start / 4 + w) * 8 * 16;
            for (int q = 0; q < 8; q++) {  // a permute reads the low 4 bits of its index only
                const __m512 t = _mm512_loadu_ps(table + 16 * q);
                const int side = 2 * (q & 1);
                acc[side] = _mm512_add_ps(acc[side], _mm512_permutexvar_ps(low, t));
                acc[side + 1] = _mm512_add_ps(acc[side + 1], _mm512_permutexvar_ps(high, t));
                low = _mm512_srli_epi32(low, 4);
                high = _mm512_srli_epi32(high, 4);
            }
        }
    }
    float sums[ROWS];
    _mm512_storeu_ps(sums, _mm512_add_ps(acc[0], acc[2]));
    _mm512_storeu_ps(sums + 16, _mm512_add_ps(acc[1], acc[3]));
    std::memcpy(out, sums, sizeof(float) * count);
}
#endif

}  // namespace
