// y = scale * (looked-up weight) x + bias for a few tokens, in exact float32. The layout is that of product.py and
// indices.py. For every group of inputs a table holds its product with each codebook entry, so that a weight's group
// costs one look-up and one addition. A byte of two 4-bit indices is looked up at once, in a table of their sums; with
// AVX-512, 4-bit indices of 16 rows are permutes. Gathers are left out: they are slower than loads on many machines.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu_nibbles.h"
#include "cpu_types.h"

namespace {

const int64_t PANEL = 1 << 16;  // floats of the tables that are alive at once: they stay in the second cache

struct Stage {
    const uint8_t* indices;
    int64_t bytes;  // of a row
    int width;
    std::vector<float> book;  // (slabs, group, entries)

    bool by_nibbles(int path) const { return path == 2 && width == 4; }
    bool by_bytes() const { return width == 4 || width == 8; }
    int64_t entries() const { return int64_t(1) << width; }
    int64_t codes(int64_t groups) const { return by_bytes() ? bytes : groups; }  // look-ups a row
    int64_t size() const { return by_bytes() ? 256 : entries(); }                // floats of a table
};

// out[c] = product of x (group) with entry c.
inline __attribute__((always_inline)) void products(const float* book, const float* x, int64_t group, int64_t entries,
                                                    float* out) {
    for (int64_t c = 0; c < entries; c++) out[c] = x[0] * book[c];
    for (int64_t t = 1; t < group; t++) {
        const float value = x[t];
        const float* row = book + t * entries;
        for (int64_t c = 0; c < entries; c++) out[c] += value * row[c];
    }
}

// Tables of codes `from` to `to`; x is filled up with zeros.
inline __attribute__((always_inline)) void tables_of(const Stage& stage, const float* book, const float* x,
                                                     int64_t group, int64_t from, int64_t to, float* out) {
    for (int64_t code = from; code < to; code++, out += stage.size()) {
        if (stage.width != 4) {
            products(book, x + code * group, group, stage.entries(), out);
            continue;
        }
        float low[16], high[16];
        products(book, x + 2 * code * group, group, 16, low);
        products(book, x + (2 * code + 1) * group, group, 16, high);
        for (int b = 0; b < 16; b++)
            for (int a = 0; a < 16; a++) out[16 * b + a] = low[a] + high[b];
    }
}

void tables_plain(const Stage& stage, const float* book, const float* x, int64_t group, int64_t from, int64_t to,
                  float* out) {
    tables_of(stage, book, x, group, from, to, out);
}

// Sum over `count` tables of `size` floats, each at its code.
template <class Code>
float sum_of(const Code* codes, int64_t count, int64_t size, const float* tables) {
    float sums[4] = {0, 0, 0, 0};
    int64_t k = 0;
    for (; k + 4 <= count; k += 4)
        for (int j = 0; j < 4; j++) sums[j] += tables[(k + j) * size + codes[k + j]];
    for (; k < count; k++) sums[0] += tables[k * size + codes[k]];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void tables_avx2(const Stage& stage, const float* book, const float* x,
                                                     int64_t group, int64_t from, int64_t to, float* out) {
    tables_of(stage, book, x, group, from, to, out);
}
#endif

void make_tables(int path, const Stage& stage, const float* book, const float* x, int64_t group, int64_t from,
                 int64_t to, float* out) {
#if defined(__x86_64__)
    if (path == 1 || path == 2) return tables_avx2(stage, book, x, group, from, to, out);
#endif
    tables_plain(stage, book, x, group, from, to, out);  // NEON is part of every 64-bit ARM, so compilers use it here
}

// Indices `from` to `to` of a row, `from` a multiple of 4: four of them are width / 2 bytes.
void unpack(const uint8_t* row, int64_t bytes, int width, int64_t from, int64_t to, uint16_t* out) {
    const int step = width / 2, mask = (1 << width) - 1;
    for (int64_t k = from, at = from / 4 * step; k < to; k += 4, at += step) {
        uint64_t word = 0;
        for (int b = 0; b < step && at + b < bytes; b++) word |= uint64_t(row[at + b]) << (8 * b);
        for (int j = 0; j < 4 && k + j < to; j++) out[k - from + j] = uint16_t(word >> (width * j) & mask);
    }
}

Stage make_stage(const uint8_t* indices, int width, const void* book, int type, int64_t slabs, int64_t groups,
                 int64_t group) {
    Stage stage = {indices, (groups * width + 7) / 8, width, {}};
    const int64_t entries = stage.entries();
    stage.book.resize(slabs * entries * group);
    for (int64_t r = 0; r < slabs; r++)
        for (int64_t c = 0; c < entries; c++)
            for (int64_t t = 0; t < group; t++)
                stage.book[(r * group + t) * entries + c] = load(book, type, (r * entries + c) * group + t);
    return stage;
}

}  // namespace

// x (tokens, d_in) and y (tokens, d_out) of x_type; indices (d_out, bytes) and books (slabs, 2^width, group) of one
// stage, or of two where width2 is not 0; bias may be null. path as for nq_linear.
extern "C" void nq_product(const void* x, int x_type, int64_t tokens, int64_t d_in, const uint8_t* indices, int width,
                           const uint8_t* indices2, int width2, const void* book, const void* book2, int book_type,
                           int64_t slabs, int64_t group, const void* scale, int scale_type, int64_t d_out,
                           const void* bias, int bias_type, void* y, int path, int threads) {
    const int64_t groups = (d_in + group - 1) / group, rows = d_out / slabs, padded = (groups + 7) / 8 * 8;
    std::vector<Stage> stages;
    stages.push_back(make_stage(indices, width, book, book_type, slabs, groups, group));
    if (width2) stages.push_back(make_stage(indices2, width2, book2, book_type, slabs, groups, group));
    std::vector<float> input(padded * group), sums(d_out), tables(16 * padded);
    for (const Stage& stage : stages) {
        const int64_t least = 4 * stage.size();
        tables.resize(std::max<int64_t>({int64_t(tables.size()), PANEL, least}));
    }
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint16_t> codes;
        for (int64_t token = 0; token < tokens; token++) {
#pragma omp single
            {
                std::memset(sums.data(), 0, sizeof(float) * d_out);
                load_many(x, x_type, token * d_in, d_in, input.data());
            }
            for (int64_t slab = 0; slab < slabs; slab++)
                for (const Stage& stage : stages) {
#if defined(__x86_64__)
                    if (stage.by_nibbles(path)) {
                        const float* own = stage.book.data() + slab * group * 16;
#pragma omp for
                        for (int64_t j = 0; j < padded; j++)
                            products(own, input.data() + j * group, group, 16, tables.data() + 16 * j);
#pragma omp for
                        for (int64_t row = slab * rows; row < (slab + 1) * rows; row += ROWS) {
                            float out[ROWS];
                            const int count = int(std::min<int64_t>(ROWS, (slab + 1) * rows - row));
                            sums_of_nibbles(stage.indices + row * stage.bytes, 4 * groups, count, tables.data(), out);
                            for (int i = 0; i < count; i++) sums[row + i] += out[i];
                        }
                        continue;
                    }
#endif
                    const int64_t size = stage.size(), many = stage.codes(groups);
                    const int64_t panel = std::max<int64_t>(4, PANEL / size / 4 * 4);
                    const float* own = stage.book.data() + slab * group * stage.entries();
                    codes.resize(panel);
                    for (int64_t from = 0; from < many; from += panel) {
                        const int64_t to = std::min(many, from + panel), count = to - from;
#pragma omp for
                        for (int64_t c = from; c < to; c++)
                            make_tables(path, stage, own, input.data(), group, c, c + 1,
                                        tables.data() + (c - from) * size);
#pragma omp for schedule(static, ROWS)
                        for (int64_t row = slab * rows; row < (slab + 1) * rows; row++) {
                            const uint8_t* packed = stage.indices + row * stage.bytes;
                            if (stage.by_bytes()) {
                                sums[row] += sum_of(packed + from, count, size, tables.data());
                            } else {
                                unpack(packed, stage.bytes, stage.width, from, to, codes.data());
                                sums[row] += sum_of(codes.data(), count, size, tables.data());
                            }
                        }
                    }
                }
#pragma omp single
            for (int64_t row = 0; row < d_out; row++) {
                const float added = bias ? load(bias, bias_type, row) : 0.0f;
                store(y, x_type, token * d_out + row, sums[row] * load(scale, scale_type, row) + added);
            }
        }
    }
}
