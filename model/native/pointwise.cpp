// What stands between the matrix products of a block, each in one pass over memory: norm, rotation, gate.
#include <cmath>
#include <vector>

#include "common.h"

namespace {

constexpr long GROUPS = 32;  // of rows whose sums are added in order: the same sum for any number of threads

template <typename T>
void normalise(const float* x, const float* weight, T* out, float* scale, long rows, long d, float eps, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        const float* from = x + row * d;
        float sum = 0;
        for (long i = 0; i < d; i++) sum += from[i] * from[i];
        const float by = 1.0f / std::sqrt(sum / d + eps);
        scale[row] = by;
        for (long i = 0; i < d; i++) write(out + row * d, i, from[i] * by * weight[i]);
    }
}

// With n = x scale and y = weight n, of_x = (weight g - n mean(weight g n)) scale.
template <typename T>
void normalise_backward(const T* grad, const float* x, const float* scale, const float* weight, float* of_x,
                        float* of_weight, long rows, long d, int threads) {
    std::vector<float> sums(GROUPS * d, 0.0f);
#pragma omp parallel for num_threads(threads)
    for (long group = 0; group < GROUPS; group++) {
        float* sum = sums.data() + group * d;
        for (long row = rows * group / GROUPS; row < rows * (group + 1) / GROUPS; row++) {
            const T* g = grad + row * d;
            const float* from = x + row * d;
            float* to = of_x + row * d;
            const float by = scale[row];
            float dot = 0;
            for (long i = 0; i < d; i++) {
                const float both = read(g, i) * from[i] * by;
                sum[i] += both;
                dot += both * weight[i];
            }
            const float mean = dot / d;
            for (long i = 0; i < d; i++) to[i] = (read(g, i) * weight[i] - from[i] * by * mean) * by;
        }
    }
    for (long group = 0; group < GROUPS; group++)
        for (long i = 0; i < d; i++) of_weight[i] += sums[group * d + i];
}

// The mixers of model/counter.py.
inline uint64_t mixed(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

inline uint32_t mixed(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    return x ^ (x >> 16);
}

// Which elements are dropped: those whose bits, of the row that begins at `lane`, are below the threshold.
struct Dropout {
    const int64_t* places;  // of each row, where its bits begin; null keeps all
    int32_t threshold;
    float scale;

    uint32_t lane(long row, long position) const {
        return uint32_t(mixed(uint64_t(places[row]) + uint64_t(position) * 0x9E3779B97F4A7C15u) >> 32);
    }
};

inline float dropped(float x, uint32_t lane, uint32_t i, int32_t threshold, float scale) {
    return int32_t(mixed(lane + i * 0x9E3779B9u)) >= threshold ? x * scale : 0.0f;
}

template <typename From, typename To>
void zero_some(const From* x, To* out, Dropout dropout, long rows, long seq, long width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long at = 0; at < rows * seq; at++) {
        const uint32_t lane = dropout.lane(at / seq, at % seq);
        const int32_t threshold = dropout.threshold;  // what is read through a pointer keeps a loop from being vectorised
        const float scale = dropout.scale;
#pragma omp simd
        for (long i = 0; i < width; i++)
            write(out + at * width, i, dropped(read(x + at * width, i), lane, uint32_t(i), threshold, scale));
    }
}

template <typename T>
void add_some(const float* x, const T* branch, float* out, Dropout dropout, long rows, long seq, long width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long at = 0; at < rows * seq; at++) {
        const float* from = x + at * width;
        const T* more = branch + at * width;
        float* to = out + at * width;
        if (dropout.places) {
            const uint32_t lane = dropout.lane(at / seq, at % seq);
            const int32_t threshold = dropout.threshold;
            const float scale = dropout.scale;
#pragma omp simd
            for (long i = 0; i < width; i++)
                to[i] = from[i] + dropped(read(more, i), lane, uint32_t(i), threshold, scale);
        } else {
#pragma omp simd
            for (long i = 0; i < width; i++) to[i] = from[i] + read(more, i);
        }
    }
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

}  // namespace

extern "C" {

// x and weight float32; out, as `narrowed` says, bfloat16 or float32; scale, for the backward pass, 1 / rms of a row.
void rms_norm(const float* x, const float* weight, void* out, long narrowed, float* scale, long rows, long d,
              float eps, int threads) {
    if (narrowed)
        normalise(x, weight, static_cast<bf16*>(out), scale, rows, d, eps, threads);
    else
        normalise(x, weight, static_cast<float*>(out), scale, rows, d, eps, threads);
}

// of_weight is added to.
void rms_norm_backward(const void* grad, long narrowed, const float* x, const float* scale, const float* weight,
                       float* of_x, float* of_weight, long rows, long d, int threads) {
    if (narrowed)
        normalise_backward(static_cast<const bf16*>(grad), x, scale, weight, of_x, of_weight, rows, d, threads);
    else
        normalise_backward(static_cast<const float*>(grad), x, scale, weight, of_x, of_weight, rows, d, threads);
}

// x and out [batch, seq, heads, d]; cos and sin [batch or 1, seq, d], the sine of the first half negative.
void rotate(const bf16* x, const float* cos, const float* sin, bf16* out, long batch, long seq, long heads, long d,
            long angles, int threads) {
    const long half = d / 2;
#pragma omp parallel for num_threads(threads)
    for (long place = 0; place < batch * seq; place++) {
        const long angle = (angles == 1 ? place % seq : place) * d;
        const float *c = cos + angle, *s = sin + angle;
        for (long head = 0; head < heads; head++) {
            const bf16* from = x + (place * heads + head) * d;
            bf16* to = out + (place * heads + head) * d;
#pragma omp simd
            for (long i = 0; i < half; i++) {
                const float first = widen(from[i]), second = widen(from[i + half]);
                to[i] = narrow(first * c[i] + second * s[i]);
                to[i + half] = narrow(second * c[i + half] + first * s[i + half]);
            }
        }
    }
}

// x and out [rows, seq, width], in bfloat16 where they are `narrow`; each of `places` is where the bits of a row begin.
void drop(const void* x, long narrow_x, void* out, long narrow_out, const int64_t* places, long rows, long seq, long width,
          long threshold, float scale, int threads) {
    const Dropout dropout{places, int32_t(threshold), scale};
    const auto with = [&](auto* from, auto* to) { zero_some(from, to, dropout, rows, seq, width, threads); };
    if (narrow_x && narrow_out)
        with(static_cast<const bf16*>(x), static_cast<bf16*>(out));
    else if (narrow_out)
        with(static_cast<const float*>(x), static_cast<bf16*>(out));
    else if (narrow_x)
        with(static_cast<const bf16*>(x), static_cast<float*>(out));
    else
        with(static_cast<const float*>(x), static_cast<float*>(out));
}

// out = x + branch, of which some are dropped unless there are no `places`
void add_dropped(const float* x, const void* branch, long narrowed, float* out, const int64_t* places, long rows,
                 long seq, long width, long threshold, float scale, int threads) {
    const Dropout dropout{places, int32_t(threshold), scale};
    if (narrowed)
        add_some(x, static_cast<const bf16*>(branch), out, dropout, rows, seq, width, threads);
    else
        add_some(x, static_cast<const float*>(branch), out, dropout, rows, seq, width, threads);
}

// out = silu(gate) * up
void swiglu(const bf16* gate, const bf16* up, bf16* out, long n, int threads) {
#pragma omp parallel for simd num_threads(threads)
    for (long i = 0; i < n; i++) {
        const float g = widen(gate[i]);
        out[i] = narrow(g * sigmoid(g) * widen(up[i]));
    }
}

void swiglu_backward(const bf16* grad, const bf16* gate, const bf16* up, bf16* of_gate, bf16* of_up, long n,
                     int threads) {
#pragma omp parallel for simd num_threads(threads)
    for (long i = 0; i < n; i++) {
        const float d = widen(grad[i]), g = widen(gate[i]), s = sigmoid(g);
        of_up[i] = narrow(d * g * s);
        of_gate[i] = narrow(d * widen(up[i]) * s * (1.0f + g * (1.0f - s)));
    }
}

}  // extern "C"
