// Products of matrices with their own transposes, which are symmetric: half of their elements are computed.
#ifdef __AVX512BF16__
#include "layout.h"

namespace {

constexpr long DEPTH = 256;  // summed at a time: what lets 32 columns of the right side stay in the first cache
constexpr long WORDS = 16;   // rows and columns that `turn` takes

struct Blend {
    float by, plus_by;
    const bf16* plus;  // or null
    // to[i] = by from[i] + plus_by plus[at + i]
    void write(const float* from, bf16* to, long at, long n) const {
        if (plus)
            for (long i = 0; i < n; i++) to[at + i] = narrow(by * from[i] + plus_by * widen(plus[at + i]));
        else
            for (long i = 0; i < n; i++) to[at + i] = narrow(by * from[i]);
    }
};

// Of x [n, sum] the pairs [sum / 2, width, 2] of its transpose.
void pair_transposed(const bf16* x, long n, long sum, float* pairs, long width) {
    for (long row = 0; row < n; row += WORDS)
        for (long i = 0; i < sum; i += 2 * WORDS) turn(x + row * sum + i, sum / 2, pairs + i / 2 * width + row, width);
}

}  // namespace

extern "C" {

// to [count, n, n] = by x x' + plus_by plus, of x [count, n, sum] and plus [count, n, n], symmetric or null. n and sum are
// multiples of 32.
void symmetric_product(const bf16* x, const bf16* plus, bf16* to, float by, float plus_by, long count, long n, long sum,
                       int threads) {
    const Blend blend{by, plus_by, plus};
    const long width = apart(n), words = sum / 2 * width;
    Scratch pairs(count * words);
#pragma omp parallel num_threads(threads)
    {
        Scratch band(STEP * n);
        alignas(64) float tile[WORDS * WORDS];
        Tiles tiles;
#pragma omp for schedule(static)
        for (long matrix = 0; matrix < count; matrix++)
            pair_transposed(x + matrix * n * sum, n, sum, pairs.floats() + matrix * words, width);
#pragma omp for collapse(2) schedule(static)
        for (long matrix = 0; matrix < count; matrix++)
            for (long row = 0; row < n; row += STEP) {  // a band of rows up to the diagonal, then of columns down to it
                const Right right{pairs.halves() + matrix * words * 2, width};
                const long corner = (matrix * n + row) * n;
                for (long i = 0; i < sum; i += DEPTH)
                    multiply({x + (matrix * n + row) * sum + i, sum}, {right.at + i * width, width}, {band.floats(), n}, STEP,
                             row + STEP, std::min(DEPTH, sum - i), i > 0);
                for (long i = 0; i < STEP; i++) blend.write(band.floats() + i * n, to, corner + i * n, row + STEP);
                for (long column = 0; column < row; column += WORDS)
                    for (long i = 0; i < STEP; i += WORDS) {
                        turn(band.floats() + i * n + column, n, tile, WORDS);
                        for (long j = 0; j < WORDS; j++)
                            blend.write(tile + j * WORDS, to, (matrix * n + column + j) * n + row + i, WORDS);
                    }
            }
    }
}

}  // extern "C"
#endif
