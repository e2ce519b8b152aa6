// The gradient of a weight: the product of two tall matrices of bfloat16, summed over their rows in float32.
#ifdef __AVX512BF16__
#include "layout.h"

namespace {

constexpr long ROWS = 256, COLUMNS = 256;  // of the gradient, laid out at a time: what stays in the cache of a core
constexpr long FEW = 2048;                 // rows: more are summed in two halves, so that two threads share no work

struct Sum {
    Rows<const bf16> grad, x;
    long inputs, row_width = apart(ROWS), input_width = apart(inputs);
    Scratch pairs, held, turned;
    Tiles tiles;

    Sum(Rows<const bf16> grad, Rows<const bf16> x, long inputs)
        : grad(grad), x(x), inputs(inputs), pairs(ROWS * input_width / 2), held(ROWS * COLUMNS / 2),
          turned(COLUMNS * row_width / 2) {}

    // to[first_output..last_output, inputs] (=, or if `more` +=) the sum over the rows from `first` to `last`
    void over(long first, long last, long first_output, long last_output, float* to, bool more) {
        for (long row = first; row < last; row += ROWS) {
            const long rows = std::min(ROWS, last - row);
            pair_along(x.from(row), rows, inputs, pairs.halves(), input_width);
            for (long output = first_output; output < last_output; output += COLUMNS) {
                const long columns = std::min(COLUMNS, last_output - output);
                transpose({grad.row(row) + output, grad.stride}, rows, columns, held.halves(), turned.halves(), row_width);
                multiply({turned.halves(), row_width}, {pairs.halves(), input_width}, {to + output * inputs, inputs}, columns,
                         inputs, up(rows), more || row > first);
            }
        }
    }
};

}  // namespace

extern "C" {

// total [outputs, inputs] (=, or if `more` +=) grad' x, of grad [rows, width], of which the first `outputs` columns count,
// and x [rows, inputs]. Outputs and inputs are multiples of 32.
void weight_gradient(const bf16* grad, const bf16* x, float* total, long rows, long width, long outputs, long inputs,
                     long more, int threads) {
    const long halves = rows < FEW ? 1 : 2, half = (rows + halves - 1) / halves;
    const long bands = std::max(1L, threads / halves), band = up((outputs + bands - 1) / bands);
    Scratch second((halves - 1) * outputs * inputs);
#pragma omp parallel num_threads(threads)
    {
        Sum sum({grad, width}, {x, inputs}, inputs);
#pragma omp for schedule(static)
        for (long item = 0; item < halves * bands; item++) {
            const long row = item % halves * half, output = item / halves * band;
            sum.over(row, std::min(row + half, rows), output, std::min(output + band, outputs),
                     row ? second.floats() : total, more && !row);
        }
        if (halves == 2)
#pragma omp for simd schedule(static)
            for (long i = 0; i < outputs * inputs; i++) total[i] += second.floats()[i];
    }
}

}  // extern "C"
#endif
