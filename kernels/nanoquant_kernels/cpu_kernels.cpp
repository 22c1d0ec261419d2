// y = s1 * (U (V^T (s2 * x))) + bias from packed signs, in exact float32, for a few tokens.
//
// Rows are as stored: bit j of byte k is column 8 k + j, a set bit means -1. Plain C interface, no torch headers:
// compiled in seconds by any C++11 compiler, and one binary chooses its instructions at run time. A path says how it
// prepares x once for all rows, and how it multiplies a block of rows with what it prepared:
//
//   plain, AVX2, NEON   x with flipped signs is x, so a row is the sum of x with sign bits flipped by the row's bits
//   AVX-512             a table of the 16 signed sums of every 4 columns: one permute looks 16 rows up at once

#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu_nibbles.h"
#include "cpu_types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

const int PADDED = 32;  // columns are padded with zeros to a multiple of this

int64_t padded(int64_t columns) { return (columns + PADDED - 1) / PADDED * PADDED; }

// ---- paths: floats prepared for `columns` of x, and out[i] = sum over k of sign[i, k] x[k] for `count` <= ROWS rows --

struct Path {
    int64_t (*size)(int64_t columns);
    void (*prepare)(const float* x, int64_t columns, float* prepared);
    void (*multiply)(const uint8_t* signs, int64_t columns, int count, const float* prepared, float* out);
};

void copy_padded(const float* x, int64_t columns, float* prepared) {
    std::memcpy(prepared, x, sizeof(float) * columns);
    std::memset(prepared + columns, 0, sizeof(float) * (padded(columns) - columns));
}

float sum_of_8(const float* x) { return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7])); }

void multiply_plain(const uint8_t* signs, int64_t columns, int count, const float* x, float* out) {
    const int64_t bytes = (columns + 7) / 8;
    for (int i = 0; i < count; i++) {
        const uint8_t* row = signs + i * bytes;
        float lanes[8] = {0};
        for (int64_t k = 0; k < bytes; k++) {
            for (int j = 0; j < 8; j++) {
                uint32_t bits;
                std::memcpy(&bits, x + 8 * k + j, 4);
                bits ^= uint32_t(row[k] >> j) << 31;
                float value;
                std::memcpy(&value, &bits, 4);
                lanes[j] += value;
            }
        }
        out[i] = sum_of_8(lanes);
    }
}

#if defined(__x86_64__)
template <int COUNT>
__attribute__((target("avx2"))) void rows_avx2(const uint8_t* signs, int64_t bytes, const float* x, float* out) {
    const __m256i up = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24), top = _mm256_set1_epi32(INT32_MIN);
    __m256 acc[COUNT];
    for (int i = 0; i < COUNT; i++) acc[i] = _mm256_setzero_ps();
    for (int64_t k = 0; k < bytes; k++) {
        const __m256 v = _mm256_loadu_ps(x + 8 * k);
        for (int i = 0; i < COUNT; i++) {
            __m256i flip = _mm256_and_si256(_mm256_sllv_epi32(_mm256_set1_epi32(signs[i * bytes + k]), up), top);
            acc[i] = _mm256_add_ps(acc[i], _mm256_xor_ps(v, _mm256_castsi256_ps(flip)));
        }
    }
    for (int i = 0; i < COUNT; i++) {
        float lanes[8];
        _mm256_storeu_ps(lanes, acc[i]);
        out[i] = sum_of_8(lanes);
    }
}

void multiply_avx2(const uint8_t* signs, int64_t columns, int count, const float* x, float* out) {
    const int64_t bytes = (columns + 7) / 8;
    int i = 0;
    for (; i + 4 <= count; i += 4) rows_avx2<4>(signs + i * bytes, bytes, x, out + i);
    for (; i < count; i++) rows_avx2<1>(signs + i * bytes, bytes, x, out + i);
}

int64_t tables_size(int64_t columns) { return padded(columns) / 4 * 16; }

// Entry e of table g: the sum of x[4 g + b], negative where bit b of e is set.
__attribute__((target("avx512f"))) void make_tables(const float* x, int64_t columns, float* tables) {
    const __mmask16 set[4] = {0xAAAA, 0xCCCC, 0xF0F0, 0xFF00};
    for (int64_t g = 0; g < padded(columns) / 4; g++) {
        __m512 sum[4];
        for (int b = 0; b < 4; b++) {
            __m512 v = _mm512_set1_ps(4 * g + b < columns ? x[4 * g + b] : 0.0f);
            sum[b] = _mm512_mask_sub_ps(v, set[b], _mm512_setzero_ps(), v);
        }
        _mm512_storeu_ps(tables + 16 * g, _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
    }
}
#elif defined(__aarch64__)
void multiply_neon(const uint8_t* signs, int64_t columns, int count, const float* x, float* out) {
    const int64_t bytes = (columns + 7) / 8;
    const int32_t shifts[8] = {31, 30, 29, 28, 27, 26, 25, 24};
    const int32x4_t low = vld1q_s32(shifts), high = vld1q_s32(shifts + 4);
    const uint32x4_t top = vdupq_n_u32(0x80000000u);
    for (int i = 0; i < count; i++) {
        const uint8_t* row = signs + i * bytes;
        float32x4_t a = vdupq_n_f32(0), b = vdupq_n_f32(0);
        for (int64_t k = 0; k < bytes; k++) {
            const uint32x4_t byte = vdupq_n_u32(row[k]);
            const uint32x4_t v = vreinterpretq_u32_f32(vld1q_f32(x + 8 * k));
            const uint32x4_t w = vreinterpretq_u32_f32(vld1q_f32(x + 8 * k + 4));
            a = vaddq_f32(a, vreinterpretq_f32_u32(veorq_u32(v, vandq_u32(vshlq_u32(byte, low), top))));
            b = vaddq_f32(b, vreinterpretq_f32_u32(veorq_u32(w, vandq_u32(vshlq_u32(byte, high), top))));
        }
        out[i] = vaddvq_f32(vaddq_f32(a, b));
    }
}
#endif

const Path PLAIN = {padded, copy_padded, multiply_plain};
#if defined(__x86_64__)
const Path AVX2 = {padded, copy_padded, multiply_avx2}, AVX512 = {tables_size, make_tables, sums_of_nibbles};
#elif defined(__aarch64__)
const Path NEON = {padded, copy_padded, multiply_neon};
#endif

const Path& chosen(int number) {
#if defined(__x86_64__)
    if (number == 2) return AVX512;
    if (number == 1) return AVX2;
#elif defined(__aarch64__)
    if (number == 3) return NEON;
#endif
    return PLAIN;
}

}  // namespace

extern "C" {

// Bits of the paths that this machine can run: 1 plain, 2 AVX2, 4 AVX-512, 8 NEON.
int nq_paths() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool half = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    return 1 | (half ? 2 : 0) | (wide ? 4 : 0);
#elif defined(__aarch64__)
    return 1 | 8;
#else
    return 1;
#endif
}

// x (tokens, d_in) and y (tokens, d_out) of x_type; v (rank, ceil(d_in / 8)); u (d_out, ceil(rank / 8)); bias may be
// null. path: 0 plain, 1 AVX2, 2 AVX-512, 3 NEON. Each block of signs is read once for all tokens.
void nq_linear(const void* x, int x_type, int64_t tokens, int64_t d_in, const uint8_t* v, const void* s2, int s2_type,
               int64_t rank, const uint8_t* u, const void* s1, int s1_type, int64_t d_out, const void* bias,
               int bias_type, void* y, int path_number, int threads) {
    const Path& path = chosen(path_number);
    const int64_t size_in = path.size(d_in), size_rank = path.size(rank);
    const int64_t bytes_in = (d_in + 7) / 8, bytes_rank = (rank + 7) / 8;
    std::vector<float> inputs(tokens * size_in), latents(tokens * size_rank), z(tokens * rank);
#pragma omp parallel num_threads(threads)
    {
        float out[ROWS];
#pragma omp for
        for (int64_t t = 0; t < tokens; t++) {
            std::vector<float> scaled(d_in);
            for (int64_t k = 0; k < d_in; k++) scaled[k] = load(x, x_type, t * d_in + k) * load(s2, s2_type, k);
            path.prepare(scaled.data(), d_in, inputs.data() + t * size_in);
        }
#pragma omp for
        for (int64_t r = 0; r < rank; r += ROWS) {
            const int count = int(rank - r < ROWS ? rank - r : ROWS);
            for (int64_t t = 0; t < tokens; t++) {
                path.multiply(v + r * bytes_in, d_in, count, inputs.data() + t * size_in, out);
                std::memcpy(z.data() + t * rank + r, out, sizeof(float) * count);
            }
        }
#pragma omp for
        for (int64_t t = 0; t < tokens; t++)
            path.prepare(z.data() + t * rank, rank, latents.data() + t * size_rank);
#pragma omp for
        for (int64_t r = 0; r < d_out; r += ROWS) {
            const int count = int(d_out - r < ROWS ? d_out - r : ROWS);
            for (int64_t t = 0; t < tokens; t++) {
                path.multiply(u + r * bytes_rank, rank, count, latents.data() + t * size_rank, out);
                for (int i = 0; i < count; i++) {
                    float value = out[i] * load(s1, s1_type, r + i);
                    if (bias) value += load(bias, bias_type, r + i);
                    store(y, x_type, t * d_out + r + i, value);
                }
            }
        }
    }
}
}
