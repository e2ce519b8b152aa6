// A token more of each row: rotation, the cache of keys and values, and attention in one call; and the gate.
#include <cmath>
#include <vector>

#include "common.h"

namespace {

constexpr long WORTH_THREADS = 1 << 15;  // values read, below which starting threads takes longer than it saves

// Channels 2 i and 2 i + 1 are the parts of a complex number, and so are those of `turn`.
template <typename T>
void turned(const T* x, const float* turn, float* out, long d) {
    for (long i = 0; i < d; i += 2) {
        const float a = read(x, i), b = read(x, i + 1);
        out[i] = a * turn[i] - b * turn[i + 1];
        out[i + 1] = a * turn[i + 1] + b * turn[i];
    }
}

template <typename T>
void attend(const T* qkv, const float* turn, const uint8_t* forbidden, long forbidden_stride, T* keys, T* values, T* out,
            long rows, long heads, long kv_heads, long d, long room, long length, int threads) {
    const long group = heads / kv_heads;
    if (rows * kv_heads * length * d < WORTH_THREADS) threads = 1;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> held(length + 1 + 2 * d);
        float *weights = held.data(), *query = weights + length + 1, *mix = query + d;
#pragma omp for schedule(static)
        for (long item = 0; item < rows * kv_heads; item++) {
            const long row = item / kv_heads, kv = item % kv_heads;
            const T* own = qkv + row * (heads + 2 * kv_heads) * d;
            T *k = keys + item * room * d, *v = values + item * room * d;
            turned(own + (heads + kv) * d, turn, query, d);
            for (long i = 0; i < d; i++) write(k, length * d + i, query[i]);
            for (long i = 0; i < d; i++) v[length * d + i] = own[(heads + kv_heads + kv) * d + i];
            for (long head = kv * group; head < (kv + 1) * group; head++) {
                turned(own + head * d, turn, query, d);
                const uint8_t* unseen = forbidden ? forbidden + row * forbidden_stride : nullptr;
                float most = -INFINITY;
                for (long at = 0; at <= length; at++) {
                    float dot = 0;
                    for (long i = 0; i < d; i++) dot += query[i] * read(k, at * d + i);
                    weights[at] = unseen && unseen[at] ? -INFINITY : dot;
                    most = weights[at] > most ? weights[at] : most;
                }
                float sum = 0;
                for (long at = 0; at <= length; at++) {
                    weights[at] = unseen && unseen[at] ? 0.0f : exponential(weights[at] - most);
                    sum += weights[at];
                }
                for (long i = 0; i < d; i++) mix[i] = 0;
                for (long at = 0; at <= length; at++)
                    for (long i = 0; i < d; i++) mix[i] += weights[at] * read(v, at * d + i);
                for (long i = 0; i < d; i++) write(out, (row * heads + head) * d + i, mix[i] / sum);
            }
        }
    }
}

template <typename T>
void gate(const T* both, T* out, long rows, long width, int threads) {
    if (rows * width < WORTH_THREADS) threads = 1;
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        const T *g = both + row * 2 * width, *up = g + width;
        for (long i = 0; i < width; i++) {
            const float x = read(g, i);
            write(out, row * width + i, x / (1.0f + exponential(-x)) * read(up, i));
        }
    }
}

}  // namespace

extern "C" {

// qkv [rows, heads + 2 kv_heads, d], queries first and scaled; turn [d / 2] complex; forbidden, if any, [rows or 1,
// length + 1]; keys and values [rows, kv_heads, room, d], of which `length` are there; out [rows, heads, d].
void attend_one(const void* qkv, long narrowed, const float* turn, const uint8_t* forbidden, long forbidden_stride,
                void* keys, void* values, void* out, long rows, long heads, long kv_heads, long d, long room, long length,
                int threads) {
    if (narrowed)
        attend(static_cast<const bf16*>(qkv), turn, forbidden, forbidden_stride, static_cast<bf16*>(keys),
               static_cast<bf16*>(values), static_cast<bf16*>(out), rows, heads, kv_heads, d, room, length, threads);
    else
        attend(static_cast<const float*>(qkv), turn, forbidden, forbidden_stride, static_cast<float*>(keys),
               static_cast<float*>(values), static_cast<float*>(out), rows, heads, kv_heads, d, room, length, threads);
}

// both [rows, 2 width]: gate, then up; out = silu(gate) * up
void gate_up(const void* both, long narrowed, void* out, long rows, long width, int threads) {
    if (narrowed)
        gate(static_cast<const bf16*>(both), static_cast<bf16*>(out), rows, width, threads);
    else
        gate(static_cast<const float*>(both), static_cast<float*>(out), rows, width, threads);
}

}  // extern "C"
