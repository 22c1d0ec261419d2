// y = s1 * (U (V^T (s2 * x))) + bias from packed signs, with the inputs of both stages rounded to 8-bit integers.
//
// A byte of signs & 1 << j times q is q << j where the sign is -1, and the sum over signs is the sum of all q minus
// twice that: exact in integers, before the scales.

#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu_int8.h"
#include "cpu_types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__) || __GNUC__ >= 8  // older compilers lack VNNI, and must still make the other loops
#define HAS_VNNI
#endif
#endif

namespace {

// ---- paths: out[i] = sum over k of sign[i, k] scale q[k] for `count` <= ROWS rows -----------------------------------

struct Path {
    void (*round)(const float* x, int64_t chunks, Rounded& out);
    void (*multiply)(const uint8_t* signs, int64_t bytes, int count, const Rounded& x, float* out);
};

void round_plain(const float* x, int64_t chunks, Rounded& out) { round_inline(x, chunks, out); }

void multiply_plain(const uint8_t* signs, int64_t bytes, int count, const Rounded& x, float* out) {
    const int64_t most = 256;  // chunks whose sum of int8 fits into int16
    for (int i = 0; i < count; i++) {
        const uint8_t* row = signs + i * bytes;
        float sum = 0;
        for (int64_t begin = 0; begin < bytes; begin += most * BYTES) {
            const int64_t last = begin + most * BYTES < bytes ? begin + most * BYTES : bytes;
            int16_t sums[8][BYTES] = {{0}};
            for (int64_t k = begin; k < last; k += BYTES) {
                const uint8_t* chunk = row + k;
                for (int j = 0; j < 8; j++)
                    for (int b = 0; b < BYTES; b++)
                        sums[j][b] += int16_t(-((chunk[b] >> j) & 1) & x.planes[8 * k + BYTES * place(j) + b]);
            }
            for (int j = 0; j < 8; j++) {
                for (int m = 0; m < 8; m++) {
                    int lane = 0;
                    for (int b = 4 * m; b < 4 * m + 4; b++) lane += sums[j][b];
                    sum += float(1 << j) * x.factors[place(j)][m] * float(lane);
                }
            }
        }
        out[i] = x.total + sum;
    }
}

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2")))
#define VNNI __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vnni")))

// Without FMA, which would round the product and the sum at once.
AVX2 void round_avx2(const float* x, int64_t chunks, Rounded& out) { round_inline(x, chunks, out); }

// Bits 4 to 7 are shifted down first: products of at most 8 * 127, of which 32 fit into 16 bits.
AVX2 void multiply_avx2(const uint8_t* signs, int64_t bytes, int count, const Rounded& x, float* out) {
    const int64_t most = 16;  // chunks until 16 bits are full
    const __m256i ones = _mm256_set1_epi16(1);
    for (int i = 0; i < count; i++) {
        const uint8_t* row = signs + i * bytes;
        __m256 low = _mm256_setzero_ps(), high = _mm256_setzero_ps();
        for (int64_t begin = 0; begin < bytes; begin += most * BYTES) {
            const int64_t last = begin + most * BYTES < bytes ? begin + most * BYTES : bytes;
            __m256i acc[8];  // by place
            for (int p = 0; p < 8; p++) acc[p] = _mm256_setzero_si256();
            for (int64_t k = begin; k < last; k += BYTES) {
                const uint8_t* chunk = row + k;
                const __m256i low4 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(chunk));
                const __m256i high4 = _mm256_srli_epi16(low4, 4);
                const __m256i* q = reinterpret_cast<const __m256i*>(x.planes + 8 * k);
                for (int p = 0; p < 8; p++) {
                    const __m256i bits = _mm256_and_si256(p & 1 ? high4 : low4, _mm256_set1_epi8(1 << (p >> 1)));
                    acc[p] = _mm256_add_epi16(acc[p], _mm256_maddubs_epi16(bits, _mm256_load_si256(q + p)));
                }
            }
            for (int p = 0; p < 8; p++) {
                const __m256 sums = _mm256_cvtepi32_ps(_mm256_madd_epi16(acc[p], ones));
                const __m256 counted = _mm256_mul_ps(sums, _mm256_load_ps(x.factors[p]));
                if (p & 1) high = _mm256_add_ps(high, counted);
                else low = _mm256_add_ps(low, counted);
            }
        }
        float lanes[8], sum = 0;
        _mm256_storeu_ps(lanes, _mm256_add_ps(low, _mm256_mul_ps(high, _mm256_set1_ps(16))));
        for (int l = 0; l < 8; l++) sum += lanes[l];
        out[i] = x.total + sum;
    }
}

#if defined(HAS_VNNI)
// Sums of 4 rows, each in 16 lanes.
VNNI inline __attribute__((always_inline)) void lanes_of_4(const uint8_t* const* rows, int64_t bytes,
                                                           const Rounded& x, __m512* lanes) {
    __m512i acc[4][4], mask[4];
    for (int a = 0; a < 4; a++) {
        mask[a] = _mm512_inserti64x4(_mm512_set1_epi8(1 << a), _mm256_set1_epi8(char(16 << a)), 1);
        for (int r = 0; r < 4; r++) acc[r][a] = _mm512_setzero_si512();
    }
    for (int64_t k = 0; k < bytes; k += BYTES) {
        __m512i twice[4];
        for (int r = 0; r < 4; r++) {
            const __m256i chunk = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[r] + k));
            twice[r] = _mm512_broadcast_i64x4(chunk);
        }
        for (int a = 0; a < 4; a++) {
            const __m512i q = _mm512_load_si512(x.planes + 8 * k + 64 * a);
            for (int r = 0; r < 4; r++)
                acc[r][a] = _mm512_dpbusd_epi32(acc[r][a], _mm512_and_si512(twice[r], mask[a]), q);
        }
    }
    for (int r = 0; r < 4; r++) {
        lanes[r] = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][0]), _mm512_load_ps(x.factors[0]));
        for (int a = 1; a < 4; a++)
            lanes[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][a]), _mm512_load_ps(x.factors[2 * a]), lanes[r]);
    }
}

VNNI void multiply_vnni(const uint8_t* signs, int64_t bytes, int count, const Rounded& x, float* out) {
    for (int i = 0; i < count; i += 4) {
        const uint8_t* rows[4];
        for (int r = 0; r < 4; r++) rows[r] = signs + (i + r < count ? i + r : count - 1) * bytes;
        __m512 lanes[4], pairs[2];
        lanes_of_4(rows, bytes, x, lanes);
        for (int p = 0; p < 2; p++) {
            const __m512 a = lanes[2 * p], b = lanes[2 * p + 1];
            pairs[p] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        }
        const __m512d a = _mm512_castps_pd(pairs[0]), b = _mm512_castps_pd(pairs[1]);
        const __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                                         _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));  // 4 rows in each quarter
        __m128 sums = _mm_add_ps(_mm_add_ps(_mm512_extractf32x4_ps(all, 0), _mm512_extractf32x4_ps(all, 1)),
                                 _mm_add_ps(_mm512_extractf32x4_ps(all, 2), _mm512_extractf32x4_ps(all, 3)));
        float four[4];
        _mm_storeu_ps(four, _mm_add_ps(sums, _mm_set1_ps(x.total)));
        std::memcpy(out + i, four, sizeof(float) * (count - i < 4 ? count - i : 4));
    }
}
#endif
#endif

Path chosen(int number) {
#if defined(__x86_64__)
#if defined(HAS_VNNI)
    if (number == 2) return {round_avx2, multiply_vnni};
#endif
    if (number == 1) return {round_avx2, multiply_avx2};
#endif
    return {round_plain, multiply_plain};  // NEON is part of every 64-bit ARM, so compilers use it here
}

}  // namespace

extern "C" {

// Bits of the paths that this machine can run: 1 plain, 2 AVX2, 4 AVX-512 with VNNI.
int nq_int8_paths() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const int narrow = __builtin_cpu_supports("avx2") ? 3 : 1;
#if defined(HAS_VNNI)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni")) return narrow | 4;
#endif
    return narrow;
#else
    return 1;
#endif
}

// Arguments as of nq_linear, path but for NEON.
void nq_linear_int8(const void* x, int x_type, int64_t tokens, int64_t d_in, const uint8_t* v, const void* s2,
                    int s2_type, int64_t rank, const uint8_t* u, const void* s1, int s1_type, int64_t d_out,
                    const void* bias, int bias_type, void* y, int path_number, int threads) {
    const Path path = chosen(path_number);
    const Signs v_rows(v, rank, d_in), u_rows(u, d_out, rank);
    const int64_t padded = chunks_of(rank) * CHUNK;
    Tokens inputs(tokens, d_in), latents(tokens, rank);
    std::vector<float> z(tokens * padded), scales(d_in);
    load_many(s2, s2_type, 0, d_in, scales.data());
#pragma omp parallel num_threads(threads)
    {
        float out[ROWS];
#pragma omp for
        for (int64_t t = 0; t < tokens; t++) {
            std::vector<float> scaled(chunks_of(d_in) * CHUNK);
            load_many(x, x_type, t * d_in, d_in, scaled.data());
            for (int64_t k = 0; k < d_in; k++) scaled[k] *= scales[k];
            path.round(scaled.data(), chunks_of(d_in), inputs[t]);
        }
#pragma omp for
        for (int64_t r = 0; r < rank; r += ROWS) {
            const int count = int(rank - r < ROWS ? rank - r : ROWS);
            for (int64_t t = 0; t < tokens; t++) {
                path.multiply(v_rows[r], v_rows.bytes, count, inputs[t], out);
                std::memcpy(z.data() + t * padded + r, out, sizeof(float) * count);
            }
        }
#pragma omp for
        for (int64_t t = 0; t < tokens; t++) path.round(z.data() + t * padded, chunks_of(rank), latents[t]);
#pragma omp for
        for (int64_t r = 0; r < d_out; r += ROWS) {
            const int count = int(d_out - r < ROWS ? d_out - r : ROWS);
            for (int64_t t = 0; t < tokens; t++) {
                path.multiply(u_rows[r], u_rows.bytes, count, latents[t], out);
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
