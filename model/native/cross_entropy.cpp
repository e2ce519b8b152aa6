// Softmax cross-entropy of rows of logits, which become their own gradient while they are in the cache.
#include <cmath>
#include <vector>

#include "common.h"

extern "C" {

// logits [rows, vocab]; losses in nats, 0 where the target is `ignore`. With `with_grad` logits become softmax - 1[target].
void cross_entropy(bf16* logits, const int64_t* targets, float* losses, long rows, long vocab, long ignore,
                   long with_grad, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> powers(vocab);
        float* power = powers.data();
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++) {
            bf16* x = logits + row * vocab;
            if (targets[row] == ignore) {
                losses[row] = 0;
                if (with_grad) std::memset(x, 0, vocab * sizeof(bf16));
                continue;
            }
            float most = -INFINITY;
#pragma omp simd reduction(max : most)
            for (long i = 0; i < vocab; i++) most = widen(x[i]) > most ? widen(x[i]) : most;
            float sum = 0;
            for (long i = 0; i < vocab; i++) {
                power[i] = exponential(widen(x[i]) - most);
                sum += power[i];
            }
            losses[row] = std::log(sum) + most - widen(x[targets[row]]);
            if (!with_grad) continue;
            const float by = 1.0f / sum;
            power[targets[row]] -= sum;
            for (long i = 0; i < vocab; i++) x[i] = narrow(power[i] * by);
        }
    }
}

}  // extern "C"
