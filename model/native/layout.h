// Matrices of bfloat16 laid out for products: copied to where they are close together, paired, turned.
#pragma once
#include <algorithm>
#include <memory>

#include "product.h"

inline long up(long n) { return (n + STEP - 1) / STEP * STEP; }
inline long apart(long n) { return up(n) | STEP; }  // no power of two: such rows would share few lines of the cache

// The rows of a matrix, such as one head of a tensor [batch, seq, heads, d].
template <typename T>
struct Rows {
    T* at;
    long stride;
    T* row(long i) const { return at + i * stride; }
    Rows from(long i) const { return {row(i), stride}; }
};

// Begins at a cache line, as rows do then too: a row over two lines is read at half the speed.
struct Line {
    alignas(64) float floats[16];
};
struct Scratch {  // of anything, until it is written
    std::unique_ptr<Line[]> memory;
    explicit Scratch(long floats) : memory(new Line[floats / 16]) {}
    float* floats() { return memory[0].floats; }
    bf16* halves() { return reinterpret_cast<bf16*>(floats()); }
};
struct Halves : Scratch {
    explicit Halves(long n) : Scratch(n / 2) {}
};

// Sixteen rows of sixteen words become columns.
inline void turn(const void* from, long from_stride, void* to, long to_stride) {
    const auto* words = static_cast<const int32_t*>(from);
    auto* out = static_cast<int32_t*>(to);
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(words + i * from_stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {  // a[4 q + i]: of rows 4 q to 4 q + 3 the columns i, i + 4, i + 8 and i + 12
        b[i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
        b[4 + i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
        b[8 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
        b[12 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(out + i * to_stride, _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88));
        _mm512_storeu_si512(out + (4 + i) * to_stride, _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0x88));
        _mm512_storeu_si512(out + (8 + i) * to_stride, _mm512_shuffle_i32x4(b[i], b[8 + i], 0xdd));
        _mm512_storeu_si512(out + (12 + i) * to_stride, _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0xdd));
    }
}

// Two rows of 32 become pairs.
inline void interleave(__m512i a, __m512i b, bf16* to) {
    const __m512i low = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), high = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    const __m512i even = _mm512_unpacklo_epi16(a, b), odd = _mm512_unpackhi_epi16(a, b);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi64(even, low, odd));
    _mm512_storeu_si512(to + STEP, _mm512_permutex2var_epi64(even, high, odd));
}

// [rows, d], filled up with zeros to a multiple of 32 rows.
inline void copy(Rows<const bf16> from, long rows, long d, bf16* to) {
    for (long row = 0; row < rows; row++) std::copy(from.row(row), from.row(row) + d, to + row * d);
    std::fill(to + rows * d, to + up(rows) * d, bf16(0));
}

// [rows, d] paired along the rows: [up(rows) / 2, width, 2], of which d columns are written.
inline void pair_along(Rows<const bf16> from, long rows, long d, bf16* to, long width) {
    static const bf16 zeros[STEP] = {};
    for (long row = 0; row < up(rows); row += 2) {
        bf16* pairs = to + row * width;
        for (long i = 0; i < d; i += STEP) {
            const bf16 *one = row < rows ? from.row(row) + i : zeros, *two = row + 1 < rows ? from.row(row + 1) + i : zeros;
            interleave(_mm512_loadu_si512(one), _mm512_loadu_si512(two), pairs + 2 * i);
        }
    }
}

// [rows, d] to [d, width], of which up(rows) columns are written, by way of `held`, which holds [up(rows), d].
inline void transpose(Rows<const bf16> from, long rows, long d, bf16* held, bf16* to, long width) {
    pair_along(from, rows, d, held, d);
    const auto* words = reinterpret_cast<const int32_t*>(held);
    auto* out = reinterpret_cast<int32_t*>(to);
    for (long pair = 0; pair < up(rows) / 2; pair += 16)
        for (long i = 0; i < d; i += 16) turn(words + pair * d + i, d, out + (i * width + 2 * pair) / 2, width / 2);
}
