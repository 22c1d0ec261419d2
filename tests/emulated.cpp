// Calls the CPU loops with what standard input gives, so that an emulator of another machine can run them.
//
// A call is a character (p and q paths, l linear, i that with 8-bit activations, t table) and its arguments, each an int64; that of an array is its bytes,
// -1 for a null pointer, and they follow. Back comes the result as bytes: what the last array holds, or an int.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

extern "C" {
int nq_paths();
int nq_int8_paths();
void nq_linear(const void*, int, int64_t, int64_t, const uint8_t*, const void*, int, int64_t, const uint8_t*,
               const void*, int, int64_t, const void*, int, void*, int, int);
void nq_linear_int8(const void*, int, int64_t, int64_t, const uint8_t*, const void*, int, int64_t, const uint8_t*,
                    const void*, int, int64_t, const void*, int, void*, int, int);
void nq_table(const void*, int, int64_t, int64_t, const uint8_t*, int, const void*, int, int64_t, const int8_t*,
              int64_t, const void*, int, void*, int, int);
}

static void exactly(void* data, size_t bytes) {
    if (bytes && std::fread(data, bytes, 1, stdin) != 1) std::exit(1);
}

struct Number {
    int64_t value;
    Number() { exactly(&value, sizeof value); }
    operator int64_t() const { return value; }
};

struct Array {
    Number length;
    std::vector<uint8_t> bytes;
    Array() : bytes(length < 0 ? 0 : length) { exactly(bytes.data(), bytes.size()); }
    uint8_t* data() { return length < 0 ? nullptr : bytes.data(); }
};

int main() {
    for (int call; (call = std::getchar()) != EOF; std::fflush(stdout)) {
        if (call == 'p' || call == 'q') {
            const int paths = call == 'p' ? nq_paths() : nq_int8_paths();
            std::fwrite(&paths, sizeof paths, 1, stdout);
            continue;
        }
        Array x;
        Number x_type, tokens, d;
        Array codes;
        if (call == 'l' || call == 'i') {
            Array s2;
            Number s2_type, rank;
            Array u, s1;
            Number s1_type, d_out;
            Array bias;
            Number bias_type;
            Array y;
            Number path, threads;
            const auto linear = call == 'l' ? nq_linear : nq_linear_int8;
            linear(x.data(), x_type, tokens, d, codes.data(), s2.data(), s2_type, rank, u.data(), s1.data(), s1_type,
                   d_out, bias.data(), bias_type, y.data(), path, threads);
            std::fwrite(y.data(), 1, y.bytes.size(), stdout);
        } else {
            Number bits;
            Array scales;
            Number scale_type, groups;
            Array zeros;
            Number n;
            Array bias;
            Number bias_type;
            Array y;
            Number path, threads;
            nq_table(x.data(), x_type, tokens, d, codes.data(), bits, scales.data(), scale_type, groups,
                     reinterpret_cast<const int8_t*>(zeros.data()), n, bias.data(), bias_type, y.data(), path, threads);
            std::fwrite(y.data(), 1, y.bytes.size(), stdout);
        }
    }
}
