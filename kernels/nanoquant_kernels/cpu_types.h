// Elements of tensors by number of their type: 0 float32, 1 bfloat16, 2 float16.

#pragma once

#include <cstdint>
#include <cstring>

inline float from_half(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
    if (exponent == 31) {
        bits = sign | 0x7F800000 | mantissa << 13;
    } else if (exponent) {
        bits = sign | (exponent + 112) << 23 | mantissa << 13;
    } else {  // subnormal: mantissa * 2^-24
        float value = mantissa * 5.9604644775390625e-8f;
        return sign ? -value : value;
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint16_t to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return uint16_t(sign | 0x7E00);
    if (magnitude >= 0x477FF000) return uint16_t(sign | 0x7C00);  // rounds to infinity
    if (magnitude < 0x38800000) {                                 // subnormal: let the float adder round
        float scaled;
        std::memcpy(&scaled, &magnitude, 4);
        scaled += 0.5f;
        std::memcpy(&magnitude, &scaled, 4);
        return uint16_t(sign | (magnitude - 0x3F000000));
    }
    return uint16_t(sign | ((magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13));
}

inline uint16_t to_bfloat(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float load(const void* data, int type, int64_t i) {
    if (type == 0) return static_cast<const float*>(data)[i];
    uint16_t half = static_cast<const uint16_t*>(data)[i];
    if (type == 2) return from_half(half);
    uint32_t bits = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Elements `from` to `from + count`; a loop for each type, so that a compiler can put it into vectors.
inline void load_many(const void* data, int type, int64_t from, int64_t count, float* out) {
    if (type == 0) std::memcpy(out, static_cast<const float*>(data) + from, sizeof(float) * count);
    else if (type == 1) for (int64_t i = 0; i < count; i++) out[i] = load(data, 1, from + i);
    else for (int64_t i = 0; i < count; i++) out[i] = load(data, 2, from + i);
}

inline void store(void* data, int type, int64_t i, float value) {
    if (type == 0) static_cast<float*>(data)[i] = value;
    else static_cast<uint16_t*>(data)[i] = type == 1 ? to_bfloat(value) : to_half(value);
}
