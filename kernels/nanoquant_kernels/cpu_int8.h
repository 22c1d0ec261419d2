// What the loops over 8-bit activations read: rounded tokens, and rows of signs with room behind them.
//
// A chunk is 32 bytes of signs. Columns 256 c + 32 m + 8 i + j (m, j < 8, i < 4) of equal m and j are a group with a
// scale of its own, max |x| / 127; they are summed in one lane of one accumulator, so 64 scales cost no more than one.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

const int ROWS = 32;                  // rows of a block
const int CHUNK = 256, BYTES = 32;    // columns and bytes of a chunk
const int GROUPS = 64;                // group 8 m + j
const float LEAST = 7.52316385e-37f;  // 2^-120; 127 / max would overflow below it, so such a group counts as zero

// Planes j and j + 4 lie side by side: a vector of 64 bytes takes both.
inline int place(int j) { return 2 * (j & 3) + (j >> 2); }

inline int64_t chunks_of(int64_t columns) { return (columns + CHUNK - 1) / CHUNK; }

// What the rows need of one token.
struct alignas(64) Rounded {
    float factors[8][8];          // [place(j)][m]: what a sum of q << j at set bits counts, -2 scale / 2^j
    float total;                  // sum of scale q over all columns
    alignas(64) int8_t planes[];  // [c][place(j)][4 m + i]: q

    static int64_t size(int64_t columns) { return sizeof(Rounded) + chunks_of(columns) * CHUNK; }
};

// Rounded values of all tokens, aligned as vectors of 64 bytes like to be.
class Tokens {
   public:
    Tokens(int64_t tokens, int64_t columns) : size_(Rounded::size(columns)), bytes_(tokens * size_ + 64) {
        first_ = bytes_.data() + (64 - reinterpret_cast<uintptr_t>(bytes_.data()) % 64) % 64;
    }
    Rounded& operator[](int64_t t) { return *reinterpret_cast<Rounded*>(first_ + t * size_); }

   private:
    int64_t size_;
    std::vector<char> bytes_;
    char* first_;
};

// Rows of signs. Whole chunks are read, past the end of a row into the next (q is 0 there), so the last blocks are a
// copy with room behind it.
class Signs {
   public:
    Signs(const uint8_t* data, int64_t rows, int64_t columns)
        : bytes((columns + 7) / 8), data_(data), first_(rows / ROWS * ROWS) {
        while (first_ > 0 && (rows - first_) * bytes < BYTES) first_ -= ROWS;
        copy_.assign(data + first_ * bytes, data + rows * bytes);
        copy_.resize(copy_.size() + BYTES);
    }
    const uint8_t* operator[](int64_t row) const {
        return row < first_ ? data_ + row * bytes : copy_.data() + (row - first_) * bytes;
    }
    const int64_t bytes;  // of a row

   private:
    const uint8_t* data_;
    int64_t first_;
    std::vector<uint8_t> copy_;
};

// Round x, zeros past its last column, to chunks of q. A group that holds inf or NaN gets the scale NaN.
inline __attribute__((always_inline)) void round_inline(const float* x, int64_t chunks, Rounded& out) {
    uint32_t largest[GROUPS] = {0};  // magnitudes order as their bits do, NaN above all
    const float nan = __builtin_nanf("");
    for (int64_t c = 0; c < chunks; c++) {
        for (int m = 0; m < 8; m++) {
            for (int i = 0; i < 4; i++) {
                for (int j = 0; j < 8; j++) {
                    uint32_t bits;
                    std::memcpy(&bits, x + c * CHUNK + 32 * m + 8 * i + j, 4);
                    bits &= 0x7FFFFFFF;
                    uint32_t& most = largest[8 * m + j];
                    most = bits > most ? bits : most;
                }
            }
        }
    }
    float scale[GROUPS], inverse[GROUPS];
    for (int g = 0; g < GROUPS; g++) {
        float most;
        std::memcpy(&most, largest + g, 4);
        const bool finite = largest[g] < 0x7F800000, usable = finite && most >= LEAST;
        scale[g] = usable ? most / 127.0f : finite ? 0.0f : nan;
        inverse[g] = usable ? 127.0f / most : 0.0f;
    }
    float sums[GROUPS] = {0};
    for (int64_t c = 0; c < chunks; c++) {
        int8_t rounded[CHUNK];
        for (int m = 0; m < 8; m++) {
            for (int i = 0; i < 4; i++) {
                for (int j = 0; j < 8; j++) {
                    const int k = 32 * m + 8 * i + j, g = 8 * m + j;
                    const float product = inverse[g] == 0.0f ? 0.0f : x[c * CHUNK + k] * inverse[g];
                    const float q = (product + 12582912.0f) - 12582912.0f;  // adding 1.5 * 2^23 rounds half to even
                    rounded[k] = int8_t(int(q));
                    sums[g] += q;
                }
            }
        }
        int8_t* planes = out.planes + c * CHUNK;
        for (int k = 0; k < BYTES; k++)
            for (int j = 0; j < 8; j++) planes[BYTES * place(j) + k] = rounded[8 * k + j];
    }
    out.total = 0;
    for (int g = 0; g < GROUPS; g++) out.total += scale[g] * sums[g];
    for (int j = 0; j < 8; j++)
        for (int m = 0; m < 8; m++) out.factors[place(j)][m] = -2.0f / float(1 << j) * scale[8 * m + j];
}

}  // namespace
