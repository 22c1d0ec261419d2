// y = x table^T + bias for a table (n, d) of 8-bit or 4-bit codes, in exact float32, for a few tokens. The layout is
// that of table.py: what a row says becomes floats in registers, once for up to 4 tokens.

#include <cstdint>
#include <vector>

#include "cpu_types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

const int BLOCK = 32;  // rows of a block
const int MOST = 4;    // tokens that share what is read

struct Table {
    const uint8_t* codes;
    int bits;
    const void* scales;
    int scale_type;
    int64_t groups;
    const int8_t* zeros;
    int64_t columns;

    const int8_t* bytes(int64_t row) const { return reinterpret_cast<const int8_t*>(codes) + row * columns; }
    const uint8_t* halves(int64_t row) const { return codes + row * columns / 2; }
    float scale(int64_t g) const { return load(scales, scale_type, g); }
    float zero(int64_t g) const { return float(8 + zeros[g]); }
};

// out[t] += the columns of 8-bit row `row` from k on, for tokens t of x (tokens, columns); then times the scale.
inline void finish8(const Table& table, int64_t row, int64_t k, const float* x, int tokens, float* out) {
    const int8_t* codes = table.bytes(row);
    for (int t = 0; t < tokens; t++) {
        for (int64_t i = k; i < table.columns; i++) out[t] += x[t * table.columns + i] * float(codes[i]);
        out[t] *= table.scale(row);
    }
}

// ---- plain: 16 lanes that a compiler may put into vectors ---------------------------------------------------------

float sum_lanes(const float* lanes) {
    float sum = 0;
    for (int j = 0; j < 16; j++) sum += lanes[j];
    return sum;
}

void row_plain(const Table& table, int64_t row, const float* x, int tokens, float* out) {
    const int64_t group = table.columns / table.groups, whole = table.columns / 16 * 16;
    for (int t = 0; t < tokens; t++, x += table.columns) {
        float lanes[16] = {0};
        if (table.bits == 8) {
            const int8_t* codes = table.bytes(row);
            for (int64_t k = 0; k < whole; k += 16)
                for (int j = 0; j < 16; j++) lanes[j] += x[k + j] * float(codes[k + j]);
            out[t] = sum_lanes(lanes);
            finish8(table, row, whole, x, 1, out + t);
            continue;
        }
        const uint8_t* codes = table.halves(row);
        for (int64_t k = 0; k < table.columns; k += 32, codes += 16) {
            const int64_t g = row * table.groups + k / group;
            const float scale = table.scale(g), zero = table.zero(g);
            for (int j = 0; j < 16; j++) {
                const float low = float(codes[j] & 15) - zero, high = float(codes[j] >> 4) - zero;
                lanes[j] += scale * (x[k + j] * low + x[k + 16 + j] * high);
            }
        }
        out[t] = sum_lanes(lanes);
    }
}

#if defined(__x86_64__)
// ---- AVX2 ----------------------------------------------------------------------------------------------------------

__attribute__((target("avx2,fma"))) inline float sum_of_8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

template <int TOKENS>
__attribute__((target("avx2,fma"))) void row_avx2(const Table& table, int64_t row, const float* x, float* out) {
    const int64_t d = table.columns, group = d / table.groups;
    const int step = table.bits == 8 ? 16 : 32;
    __m256 acc[TOKENS][2];
    for (int t = 0; t < TOKENS; t++) acc[t][0] = acc[t][1] = _mm256_setzero_ps();
    for (int64_t k = 0; k + step <= d; k += step) {
        __m256 w[4];
        if (table.bits == 8) {
            const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.bytes(row) + k));
            w[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
            w[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(codes, 8)));
        } else {
            const int64_t g = row * table.groups + k / group;
            const __m256 scale = _mm256_set1_ps(table.scale(g)), zero = _mm256_set1_ps(table.zero(g));
            const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.halves(row) + k / 2));
            for (int h = 0; h < 2; h++) {
                const __m256i both = _mm256_cvtepu8_epi32(h ? _mm_srli_si128(codes, 8) : codes);
                const __m256 low = _mm256_cvtepi32_ps(_mm256_and_si256(both, _mm256_set1_epi32(15)));
                const __m256 high = _mm256_cvtepi32_ps(_mm256_srli_epi32(both, 4));
                w[h] = _mm256_mul_ps(scale, _mm256_sub_ps(low, zero));
                w[h + 2] = _mm256_mul_ps(scale, _mm256_sub_ps(high, zero));
            }
        }
        for (int t = 0; t < TOKENS; t++)
            for (int j = 0; j < step / 8; j++)
                acc[t][j & 1] = _mm256_fmadd_ps(w[j], _mm256_loadu_ps(x + t * d + k + 8 * j), acc[t][j & 1]);
    }
    for (int t = 0; t < TOKENS; t++) out[t] = sum_of_8(_mm256_add_ps(acc[t][0], acc[t][1]));
    if (table.bits == 8) finish8(table, row, d / step * step, x, TOKENS, out);
}

// ---- AVX-512: a permute looks 4-bit codes up in the 16 values of their group ---------------------------------------

template <int TOKENS>
__attribute__((target("avx512f,avx512bw"))) void row_avx512(const Table& table, int64_t row, const float* x,
                                                            float* out) {
    const int64_t d = table.columns, group = d / table.groups, whole = d / 32 * 32;
    const __m512 codes16 = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 acc[TOKENS][2];
    for (int t = 0; t < TOKENS; t++) acc[t][0] = acc[t][1] = _mm512_setzero_ps();
    __m512 values = codes16;
    for (int64_t k = 0, left = 0; k < whole; k += 32, left -= 32) {
        __m512 w[2];
        if (table.bits == 8) {
            const __m128i* codes = reinterpret_cast<const __m128i*>(table.bytes(row) + k);
            for (int j = 0; j < 2; j++) w[j] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(codes + j)));
        } else {
            if (left == 0) {
                const int64_t g = row * table.groups + k / group;
                const __m512 from_zero = _mm512_sub_ps(codes16, _mm512_set1_ps(table.zero(g)));
                values = _mm512_mul_ps(from_zero, _mm512_set1_ps(table.scale(g)));
                left = group;
            }
            const __m128i* codes = reinterpret_cast<const __m128i*>(table.halves(row) + k / 2);
            const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes));
            w[0] = _mm512_permutexvar_ps(both, values);  // it reads the low 4 bits of its index only
            w[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), values);
        }
        for (int t = 0; t < TOKENS; t++)
            for (int j = 0; j < 2; j++)
                acc[t][j] = _mm512_fmadd_ps(w[j], _mm512_loadu_ps(x + t * d + k + 16 * j), acc[t][j]);
    }
    for (int t = 0; t < TOKENS; t++) out[t] = _mm512_reduce_add_ps(_mm512_add_ps(acc[t][0], acc[t][1]));
    if (table.bits == 8) finish8(table, row, whole, x, TOKENS, out);
}

#define CHOOSE(function)                                  \
    if (tokens == 4) return function<4>(table, row, x, out); \
    if (tokens == 3) return function<3>(table, row, x, out); \
    if (tokens == 2) return function<2>(table, row, x, out); \
    return function<1>(table, row, x, out);
#endif

// out[t]: row `row` times token t of x (tokens <= MOST, columns).
void row_of(int path, const Table& table, int64_t row, const float* x, int tokens, float* out) {
#if defined(__x86_64__)
    if (path == 2) {
        CHOOSE(row_avx512)
    }
    if (path == 1) {
        CHOOSE(row_avx2)
    }
#endif
    row_plain(table, row, x, tokens, out);  // NEON is part of every 64-bit ARM, so compilers use it here
}

}  // namespace

// x (tokens, d) and y (tokens, n) of x_type; codes of 8 or 4 bits; scales and zeros (n, groups); bias may be null.
// path as for nq_linear. A block of rows is read from memory once for all tokens.
extern "C" void nq_table(const void* x, int x_type, int64_t tokens, int64_t d, const uint8_t* codes, int bits,
                         const void* scales, int scale_type, int64_t groups, const int8_t* zeros, int64_t n,
                         const void* bias, int bias_type, void* y, int path, int threads) {
    const Table table = {codes, bits, scales, scale_type, groups, zeros, d};
    std::vector<float> inputs(tokens * d);
    for (int64_t i = 0; i < tokens * d; i++) inputs[i] = load(x, x_type, i);
#pragma omp parallel for num_threads(threads)
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        const int64_t end = begin + BLOCK < n ? begin + BLOCK : n;
        for (int64_t t = 0; t < tokens; t += MOST) {
            const int many = int(tokens - t < MOST ? tokens - t : MOST);
            for (int64_t row = begin; row < end; row++) {
                float out[MOST];
                row_of(path, table, row, inputs.data() + t * d, many, out);
                for (int i = 0; i < many; i++) {
                    const float added = bias ? load(bias, bias_type, row) : 0.0f;
                    store(y, x_type, (t + i) * n + row, out[i] + added);
                }
            }
        }
    }
}
