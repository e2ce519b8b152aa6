// What the kernels share: bfloat16 by its bits, and an exponential that compilers vectorise.
#pragma once
#include <cstdint>
#include <cstring>

using bf16 = uint16_t;

inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

// To the nearest, ties to even, as PyTorch does; a NaN stays one.
inline bf16 narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return x == x ? bf16(rounded) : bf16(0x7fc0);
}

// e^x to a few units in the last place, for x that is not NaN down to where it is the smallest normal number.
inline float exponential(float x) {
    float y = x * 1.44269504f;
    y = y < -126.0f ? -126.0f : y > 127.0f ? 127.0f : y;
    const float whole = __builtin_rintf(y), f = y - whole;
    float p = 1.54035304e-4f;  // 2^f for f in [-1/2, 1/2]: the Taylor series, whose next term is below 2^-22
    p = p * f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    const int32_t power = (int32_t(whole) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return p * scale;
}

inline float read(const float* x, long i) { return x[i]; }
inline float read(const bf16* x, long i) { return widen(x[i]); }
inline float read(const int8_t* x, long i) { return x[i]; }
inline void write(float* out, long i, float x) { out[i] = x; }
inline void write(bf16* out, long i, float x) { out[i] = narrow(x); }
