// A tall matrix of bfloat16 times a weight or its transpose, summed in float32 and rounded once. Where there are AMX tiles
// it is left to oneDNN, with which it was never compared there.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#include "layout.h"

namespace {

constexpr long ROWS = 512;   // taken at a time, at most: what stays in the second cache of a core
constexpr long DEPTH = 384;  // summed at a time, at most: what lets 32 columns of the weight stay in its first

// Where sums of eight rows and 32 columns go: to bfloat16, with what was summed before, if there is any.
struct Rounded {
    bf16* at;
    long stride;
    To before;
    Rounded from(long row) const {
        return {at + row * stride, stride, {before.at ? before.at + row * before.stride : nullptr, before.stride}};
    }
    void expect(int row) const { __builtin_prefetch(at + row * stride, 1); }
    void put(int row, __m512 first, __m512 second) const {
        if (before.at) {
            const float* more = before.at + row * before.stride;
            first = _mm512_add_ps(_mm512_loadu_ps(more), first);
            second = _mm512_add_ps(_mm512_loadu_ps(more + 16), second);
        }
        _mm512_storeu_si512(at + row * stride, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
};

// As `multiply`, of 32 columns and any number of rows; the left side is read up to a multiple of 8.
[[gnu::noinline]] void multiply_rounded(Left left, Right right, Rounded to, long rows, long sum) {
    bf16 spare[8 * STEP];
    long row = 0;
    for (; row + 8 <= rows; row += 8) eight_rows(left.from(row), right, to.from(row), sum);
    if (row == rows) return;
    eight_rows(left.from(row), right, Rounded{spare, STEP, to.from(row).before}, sum);
    for (long i = row; i < rows; i++) std::memcpy(to.from(i).at, spare + (i - row) * STEP, STEP * sizeof(bf16));
}

// Of 32 columns of a weight the pairs [depth / 2, 32, 2] that `multiply` reads.
void lay(const bf16* weight, long depth, long columns, bool by_column, long column, bf16* to) {
    if (!by_column) {
        pair_along({weight + column, columns}, depth, STEP, to, STEP);
        return;
    }
    for (long half = 0; half < STEP; half += 16)
        for (long i = 0; i < depth; i += STEP)
            turn(weight + (column + half) * depth + i, depth / 2, to + i * STEP + 2 * half, STEP);
}

// Some rows at a time, whose sums are over `part` of the depth at a time.
struct Block {
    long depth, columns, part;
    Halves left;
    Scratch sums;

    Block(long rows, long depth, long columns, long part)
        : depth(depth), columns(columns), part(part), left(rows * part), sums(part < depth ? rows * columns : 0) {}

    void multiply_all(Rows<const bf16> x, const bf16* laid, bf16* out, long rows) {
        for (long i = 0; i < depth; i += part) {
            const long sum = std::min(part, depth - i);
            const Left some = rows_from(x, i, rows, sum);
            for (long column = 0; column < columns; column += STEP) {
                const Right right{laid + column * depth + i * STEP, STEP};
                const To total{sums.floats() + column, columns}, none{nullptr, 0};
                if (i + sum == depth)
                    multiply_rounded(some, right, {out + column, columns, i > 0 ? total : none}, rows, sum);
                else
                    multiply(some, right, total, up(rows), STEP, sum, i > 0);
            }
        }
    }

    // Copied where they are too few, or apart by the whole depth: were that a power of two, they would share few lines of the
    // cache.
    Left rows_from(Rows<const bf16> x, long i, long rows, long sum) {
        if (sum == depth && rows == up(rows)) return {x.at, depth};
        copy({x.at + i, x.stride}, rows, sum, left.halves());
        return {left.halves(), sum};
    }
};

}  // namespace

extern "C" {

// out [rows, columns] = x [rows, depth] @ weight' (weight [columns, depth]), or if not `by_column` @ weight ([depth,
// columns]). Depth and columns are multiples of 32.
void linear(const bf16* x, const bf16* weight, bf16* out, long rows, long depth, long columns, long by_column,
            int threads) {
    const long parts = (depth + DEPTH - 1) / DEPTH, part = up((depth + parts - 1) / parts);
    const long blocks = threads * ((rows + threads * ROWS - 1) / (threads * ROWS)), block = up((rows + blocks - 1) / blocks);
    Halves laid(depth * columns);  // [columns / 32, depth / 2, 32, 2]
#pragma omp parallel num_threads(threads)
    {
        Block some(block, depth, columns, part);
#pragma omp for schedule(static)
        for (long column = 0; column < columns; column += STEP)
            lay(weight, depth, columns, by_column, column, laid.halves() + column * depth);
#pragma omp for schedule(dynamic)
        for (long first = 0; first < rows; first += block)
            some.multiply_all({x + first * depth, depth}, laid.halves(), out + first * columns, std::min(block, rows - first));
    }
}

}  // extern "C"
#endif
