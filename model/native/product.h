// Products of small bfloat16 matrices in the cache, by AMX tiles where the processor has them, else by AVX512-BF16.
//
// to[rows, columns] (=, or if `more` +=) left[rows, sum] @ right[sum, columns], all three sizes multiples of 32. The right
// side is "paired": [sum / 2, columns, 2], elements (i, j) and (i + 1, j) beside each other, as both instructions read it.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common.h"

constexpr long STEP = 32;  // what every size is a multiple of

struct Left {
    const bf16* at;
    long stride;
    Left from(long row) const { return {at + row * stride, stride}; }
};

struct Right {
    const bf16* at;
    long columns;  // of the whole, of which a product may read some
    Right from(long column) const { return {at + column * 2, columns}; }
};

struct To {
    float* at;
    long stride;
};

#ifdef __AMX_BF16__
// Linux hands out tiles on request, once a process.
inline const bool TILES = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;

// Eight tiles of 16 rows of 64 bytes each: palette 1, then from byte 16 on their widths, from byte 48 on their heights.
alignas(64) inline const struct {
    uint8_t palette = 1, begin = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
} LAYOUT;

struct Tiles {  // a thread that multiplies holds one
    Tiles() {
        if (TILES) _tile_loadconfig(&LAYOUT);
    }
    ~Tiles() {
        if (TILES) _tile_release();
    }
};

// The compiler does not know that a tile is loaded from memory, so that it must be told to have written it.
inline void settle_memory() { asm volatile("" ::: "memory"); }

inline void square_of_tiles(Left left, Right right, To to, long sum, bool more) {
    float* lower = to.at + 16 * to.stride;
    const int stride = int(to.stride * 4);
    settle_memory();
    if (more) {
        _tile_loadd(0, to.at, stride);
        _tile_loadd(1, to.at + 16, stride);
        _tile_loadd(2, lower, stride);
        _tile_loadd(3, lower + 16, stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long i = 0; i < sum; i += STEP) {
        _tile_loadd(4, left.at + i, left.stride * 2);
        _tile_loadd(5, left.at + 16 * left.stride + i, left.stride * 2);
        _tile_loadd(6, right.at + i * right.columns, right.columns * 4);
        _tile_loadd(7, right.at + i * right.columns + 32, right.columns * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, to.at, stride);
    _tile_stored(1, to.at + 16, stride);
    _tile_stored(2, lower, stride);
    _tile_stored(3, lower + 16, stride);
    settle_memory();
}
#else
constexpr bool TILES = false;
struct Tiles {
    Tiles() {}
};
inline void square_of_tiles(Left, Right, To, long, bool) {}
#endif

// Where sums of eight rows and 32 columns go: to float32, or if `more` are added to what is there.
struct Whole {
    To to;
    bool more;
    void expect(int row) const {
        if (more) fetch(to.at + row * to.stride), fetch(to.at + row * to.stride + 16);
    }
    void put(int row, __m512 first, __m512 second) const {
        float* at = to.at + row * to.stride;
        _mm512_storeu_ps(at, more ? _mm512_add_ps(_mm512_loadu_ps(at), first) : first);
        _mm512_storeu_ps(at + 16, more ? _mm512_add_ps(_mm512_loadu_ps(at + 16), second) : second);
    }
    static void fetch(const void* at) { __builtin_prefetch(at, 1); }
};

// Eight rows of 32 columns, which with two registers of the right side fill a little more than half of the registers. Rows
// of the left side are reached from three of them, since a pointer for each is more than there are. What is written to is
// fetched while the sum is taken.
template <typename Out>
inline void eight_rows(Left left, Right right, Out out, long sum) {
    __m512 total[8][2];
#pragma GCC unroll 8
    for (int row = 0; row < 8; row++) {
        total[row][0] = total[row][1] = _mm512_setzero_ps();
        out.expect(row);
    }
    const bf16* from[3] = {left.at, left.at + 3 * left.stride, left.at + 6 * left.stride};
    const bf16* pairs = right.at;
    for (long i = 0; i < sum; i += 2) {
        const auto first = (__m512bh)_mm512_loadu_si512(pairs), second = (__m512bh)_mm512_loadu_si512(pairs + 32);
#pragma GCC unroll 8
        for (int row = 0; row < 8; row++) {
            int word;
            std::memcpy(&word, from[row / 3] + row % 3 * left.stride, 4);
            const auto both = (__m512bh)_mm512_set1_epi32(word);
            total[row][0] = _mm512_dpbf16_ps(total[row][0], both, first);
            total[row][1] = _mm512_dpbf16_ps(total[row][1], both, second);
        }
        for (auto& at : from) at += 2;
        pairs += 2 * right.columns;
    }
#pragma GCC unroll 8
    for (int row = 0; row < 8; row++) out.put(row, total[row][0], total[row][1]);
}

// Never inlined: where it is woven into what calls it, registers run short.
[[gnu::noinline]] static void multiply(Left left, Right right, To to, long rows, long columns, long sum, bool more = false) {
    for (long column = 0; column < columns; column += STEP)
        for (long row = 0; row < rows; row += TILES ? STEP : 8) {
            const To some{to.at + row * to.stride + column, to.stride};
            if (TILES)
                square_of_tiles(left.from(row), right.from(column), some, sum, more);
            else
                eight_rows(left.from(row), right.from(column), Whole{some, more}, sum);
        }
}
