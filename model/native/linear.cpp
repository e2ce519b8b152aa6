// A tall matrix of bfloat16 times a weight or its transpose, summed in float32 and rounded once. Where there are AMX tiles
// it is left to oneDNN, with which it was never compared there.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#include "layout.h"

namespace {

constexpr long ROWS = 512;   // taken at a time, at most: what stays in the second cache of a core
constexpr long DEPTH = 384;  // summed at a time, at most: what lets 32 columns of the weight stay in its first

// Of a weight the pairs that `multiply` reads, 32 columns after the other: [columns / 32, depth / 2, 32, 2].
// Column by column the weight is [columns, depth], row by row [depth, columns].
struct Panels {
    const bf16* weight;
    long depth, columns;
    bool by_column;

    void lay(long column, bf16* to) const {
        if (!by_column) {
            pair_along({weight + column, columns}, depth, STEP, to, STEP);
            return;
        }
        for (long half = 0; half < STEP; half += 16)
            for (long i = 0; i < depth; i += STEP)
                turn(weight + (column + half) * depth + i, depth / 2, to + i * STEP + 2 * half, STEP);
    }
};

}  // namespace

extern "C" {

// out [rows, columns] = x [rows, depth] @ weight' (weight [columns, depth]), or if not `by_column` @ weight ([depth,
// columns]). Depth and columns are multiples of 32.
void linear(const bf16* x, const bf16* weight, bf16* out, long rows, long depth, long columns, long by_column,
            int threads) {
    const Panels panels{weight, depth, columns, by_column != 0};
    const long parts = (depth + DEPTH - 1) / DEPTH, part = up((depth + parts - 1) / parts);
    const long blocks = threads * ((rows + threads * ROWS - 1) / (threads * ROWS)), block = up((rows + blocks - 1) / blocks);
    Halves laid(depth * columns);
#pragma omp parallel num_threads(threads)
    {
        Halves left(block * part);
        Scratch sums(parts > 1 ? block * columns : 0);
#pragma omp for schedule(static)
        for (long column = 0; column < columns; column += STEP) panels.lay(column, laid.halves() + column * depth);
#pragma omp for schedule(dynamic)
        for (long first = 0; first < rows; first += block) {
            const long n = std::min(block, rows - first), taken = up(n);
            for (long i = 0; i < depth; i += part) {
                const long sum = std::min(part, depth - i);
                const Rows<const bf16> taken_from{x + first * depth + i, depth};
                Left some{taken_from.at, depth};
                if (parts > 1 || taken > n) {  // rows of a deep matrix are apart by what may be a power of two
                    copy(taken_from, n, sum, left.halves());
                    some = {left.halves(), sum};
                }
                for (long column = 0; column < columns; column += STEP) {
                    const Right right{laid.halves() + column * depth + i * STEP, STEP};
                    const To before{i > 0 ? sums.floats() + column : nullptr, columns};
                    if (i + sum == depth)
                        multiply_rounded(some, right, {out + first * columns + column, columns, before}, n, sum);
                    else
                        multiply(some, right, {sums.floats() + column, columns}, taken, STEP, sum, i > 0);
                }
            }
        }
    }
}

}  // extern "C"
#endif
