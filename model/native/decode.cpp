// A few tokens more of each row through the whole network in one call, whose weights are read once for all of them.
//
// Residual stream, activations and sums are float32, whatever the weights are. What a token gets does not depend on the
// others that are read with it, to the bit: each sum is taken in one order.
#pragma GCC optimize("no-associative-math")  // sums have their order here, which the compiler must not change
#include <omp.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <cmath>
#include <vector>

#include "common.h"

namespace {

constexpr int LANES = 16;  // and as many sums are taken side by side
constexpr long WORTH_THREADS = 1 << 18;  // weights, below which waiting for each other takes longer than it saves

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Order __attribute__((vector_size(64)));

// The first n of them, and zeros.
template <typename W>
inline Lanes first_lanes(const W* x, long n) {
    float wide[LANES] = {};
    for (long i = 0; i < n; i++) wide[i] = read(x, i);
    Lanes v;
    std::memcpy(&v, wide, sizeof v);
    return v;
}

#ifdef __AVX512F__
inline Lanes lanes(const float* x) { return (Lanes)_mm512_loadu_ps(x); }
inline Lanes lanes(const bf16* x) {
    return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16);
}
inline Lanes lanes(const int8_t* x) {
    return (Lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)x)));
}
#else
template <typename W>
inline Lanes lanes(const W* x) {
    return first_lanes(x, LANES);
}
#endif

// Neighbouring lanes added: first those of a, then those of b.
inline Lanes pairs(Lanes a, Lanes b) {
    constexpr Order even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}, odd = even + 1;
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

// Lane i becomes the sum over the lanes of the i-th.
inline Lanes sums(Lanes (&x)[LANES]) {
#pragma GCC unroll 16
    for (int n = LANES / 2; n > 0; n /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < n; i++) x[i] = pairs(x[2 * i], x[2 * i + 1]);
    return x[0];
}

inline float sum(Lanes x) {
    Lanes all[LANES] = {x};
    return sums(all)[0];
}

// Calls part(i, load) for each vector of n numbers: load(at) gives those of `at`, with zeros after the last.
template <typename Part>
inline void for_lanes(long n, Part part) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) part(i, [](const auto* at) { return lanes(at); });
    if (i < n) part(i, [&](const auto* at) { return first_lanes(at, n - i); });
}

enum Kind : long { FLOAT, BFLOAT, INT8 };

// Rows of weights, one for each output; int8 ones are in units of their scale.
struct Matrix {
    const void* weight;
    const bf16* scales;
    Kind kind;
};

struct Span {
    long begin, end;
};

// done(token, output, x[token] @ w[output]) for a few of each. With `AHEAD` the weights of the outputs that come so much
// later are fetched meanwhile into the second cache: they come from memory, and else would be waited for.
template <int TOKENS, int OUTPUTS, int AHEAD, typename W, typename Done>
inline void block(const float* x, const W* w, long inputs, long token, long output, Done done) {
    static_assert(TOKENS * OUTPUTS <= LANES);
    Lanes total[LANES] = {};
    for_lanes(inputs, [&](long i, auto load) {
        Lanes left[TOKENS];
#pragma GCC unroll 16
        for (int t = 0; t < TOKENS; t++) left[t] = load(x + (token + t) * inputs + i);
#pragma GCC unroll 16
        for (int o = 0; o < OUTPUTS; o++) {
            const Lanes right = load(w + (output + o) * inputs + i);
            if (AHEAD) __builtin_prefetch(w + (output + o + AHEAD) * inputs + i, 0, 2);
#pragma GCC unroll 16
            for (int t = 0; t < TOKENS; t++) total[t * OUTPUTS + o] += left[t] * right;
        }
    });
    const Lanes all = sums(total);
    for (int t = 0; t < TOKENS; t++)
        for (int o = 0; o < OUTPUTS; o++) done(token + t, output + o, all[t * OUTPUTS + o]);
}

// The same for all tokens and some outputs.
template <typename W, typename Done>
inline void product(const float* x, long tokens, const W* w, long inputs, Span outputs, Done done) {
    long output = outputs.begin;
    for (; output + LANES <= outputs.end; output += LANES) {
        const long fours = tokens / 4 * 4;
        for (int part = 0; part < LANES && fours; part += 4) {
            block<4, 4, LANES>(x, w, inputs, 0, output + part, done);
            for (long token = 4; token < fours; token += 4) block<4, 4, 0>(x, w, inputs, token, output + part, done);
        }
        for (long token = fours; token < tokens; token++)
            token ? block<1, LANES, 0>(x, w, inputs, token, output, done)
                  : block<1, LANES, LANES>(x, w, inputs, token, output, done);
    }
    for (; output < outputs.end; output++)
        for (long token = 0; token < tokens; token++) block<1, 1, 0>(x, w, inputs, token, output, done);
}

template <typename Done>
void product(const float* x, long tokens, Matrix m, long inputs, Span outputs, Done done) {
    if (m.kind == FLOAT)
        product(x, tokens, static_cast<const float*>(m.weight), inputs, outputs, done);
    else if (m.kind == BFLOAT)
        product(x, tokens, static_cast<const bf16*>(m.weight), inputs, outputs, done);
    else
        product(x, tokens, static_cast<const int8_t*>(m.weight), inputs, outputs,
                [&](long token, long output, float value) { done(token, output, value * widen(m.scales[output])); });
}

// What one of some threads has of n things, in whole blocks.
Span share(long n, long thread, long threads) {
    const long blocks = (n + LANES - 1) / LANES, begin = blocks * thread / threads, end = blocks * (thread + 1) / threads;
    return {begin * LANES, end * LANES < n ? end * LANES : n};
}

// 1 / root mean square of each token's channels
void norms(const float* x, long tokens, long width, float eps, float* out) {
    for (long token = 0; token < tokens; token++) {
        Lanes squares = {};
        for_lanes(width, [&](long i, auto load) {
            const Lanes part = load(x + token * width + i);
            squares += part * part;
        });
        out[token] = 1.0f / std::sqrt(sum(squares) / float(width) + eps);
    }
}

// Channels 2 i and 2 i + 1 are the parts of a complex number, and so are those of `turn`.
void turned(const float* x, const float* turn, float* out, long d) {
    for (long i = 0; i < d; i += 2) {
        out[i] = x[i] * turn[i] - x[i + 1] * turn[i + 1];
        out[i + 1] = x[i] * turn[i + 1] + x[i + 1] * turn[i];
    }
}

struct Shape {
    long rows, more, last, layers, width, heads, kv_heads, d, d_ff, vocab, room, length;
    long tokens() const { return rows * more; }
    long group() const { return heads / kv_heads; }
    long mixed() const { return heads * d; }
    long qkv() const { return (heads + 2 * kv_heads) * d; }
};

// Where tokens stand, and what they must not see: a table [more, length + more] for each row, for all, or none.
struct Place {
    const float* turn;
    long turn_stride;
    const uint8_t* forbidden;
    long forbidden_stride;
};

// Turns scores into weights that add up to one.
void softmax(float* scores, const uint8_t* unseen, long n) {
    if (unseen)
        for (long i = 0; i < n; i++) scores[i] = unseen[i] ? -INFINITY : scores[i];
    float most = -INFINITY;
    for (long i = 0; i < n; i++) most = scores[i] > most ? scores[i] : most;
    for (long i = 0; i < n; i++) scores[i] = scores[i] == -INFINITY ? 0.0f : exponential(scores[i] - most);
    Lanes total = {};
    for_lanes(n, [&](long i, auto load) { total += load(scores + i); });
    const float scale = 1.0f / sum(total);
    for (long i = 0; i < n; i++) scores[i] *= scale;
}

// out[d] = weights[n] @ values[n, d]
template <typename T>
void mix(const float* weights, const T* values, long n, long d, float* out) {
    long channel = 0;
    for (; channel + LANES <= d; channel += LANES) {
        Lanes part[4] = {};  // since each sum waits for the one before it; a key's is the same however many follow it
        long i = 0;
        for (; i + 4 <= n; i += 4)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) part[j] += weights[i + j] * lanes(values + (i + j) * d + channel);
#pragma GCC unroll 4
        for (int j = 0; j < 3; j++)
            if (i + j < n) part[j] += weights[i + j] * lanes(values + (i + j) * d + channel);
        const Lanes all = (part[0] + part[1]) + (part[2] + part[3]);
        std::memcpy(out + channel, &all, sizeof all);
    }
    for (; channel < d; channel++) {
        out[channel] = 0;
        for (long i = 0; i < n; i++) out[channel] += weights[i] * read(values, i * d + channel);
    }
}

// The query heads of one key head of one row: first keep the new keys and values, then mix the values that each sees.
// `held` has room for them and for what they see.
template <typename T>
void attend(const Shape& s, const Place& at, const float* qkv, T* keys, T* values, float* out, long item, float* held) {
    const long row = item / s.kv_heads, kv = item % s.kv_heads, group = s.group(), all = s.length + s.more;
    float *queries = held, *scores = held + s.more * group * s.d;
    T *k = keys + item * s.room * s.d, *v = values + item * s.room * s.d;
    for (long n = 0; n < s.more; n++) {
        const float *own = qkv + (row * s.more + n) * s.qkv(), *turn = at.turn + n * at.turn_stride;
        turned(own + (s.heads + kv) * s.d, turn, queries, s.d);
        for (long i = 0; i < s.d; i++) write(k, (s.length + n) * s.d + i, queries[i]);
        for (long i = 0; i < s.d; i++) write(v, (s.length + n) * s.d + i, own[(s.heads + s.kv_heads + kv) * s.d + i]);
    }
    for (long n = 0; n < s.more; n++)
        for (long head = 0; head < group; head++)
            turned(qkv + (row * s.more + n) * s.qkv() + (kv * group + head) * s.d, at.turn + n * at.turn_stride,
                   queries + (n * group + head) * s.d, s.d);
    product(queries, s.more * group, static_cast<const T*>(k), s.d, {0, all},
            [&](long query, long token, float value) { scores[query * all + token] = value; });
    for (long n = 0; n < s.more; n++)
        for (long head = 0; head < group; head++) {
            float* own = scores + (n * group + head) * all;
            softmax(own, at.forbidden ? at.forbidden + row * at.forbidden_stride + n * all : nullptr, all);
            mix(own, v, all, s.d, out + (row * s.more + n) * s.mixed() + (kv * group + head) * s.d);
        }
}

template <typename T>
void network(const Shape& s, const Place& at, const Matrix* weights, float* x, T* kept, float* logits, float eps, int threads) {
    const long tokens = s.tokens(), ends = s.rows * s.last, cache = s.rows * s.kv_heads * s.room * s.d;
    const Matrix head = weights[4 * s.layers];
    std::vector<float> qkv(tokens * s.qkv()), mixed(tokens * s.mixed()), gated(tokens * s.d_ff), end(ends * s.width);
    if (s.vocab * s.width < WORTH_THREADS) threads = 1;
#pragma omp parallel num_threads(threads)
    {
        const long me = omp_get_thread_num(), all = omp_get_num_threads();
        std::vector<float> norm(tokens), held(s.more * s.group() * (s.d + s.length + s.more));
        const auto add = [&](long token, long output, float value) { x[token * s.width + output] += value; };
        for (long layer = 0; layer < s.layers; layer++) {
            const Matrix *own = weights + 4 * layer, in = own[0], out = own[1], gate_up = own[2], down = own[3];
            T *keys = kept + 2 * layer * cache, *values = keys + cache;
            norms(x, tokens, s.width, eps, norm.data());
            product(x, tokens, in, s.width, share(s.qkv(), me, all), [&](long token, long output, float value) {
                qkv[token * s.qkv() + output] = value * norm[token];
            });
#pragma omp barrier
#pragma omp for schedule(static)
            for (long item = 0; item < s.rows * s.kv_heads; item++)
                attend(s, at, qkv.data(), keys, values, mixed.data(), item, held.data());
            product(mixed.data(), tokens, out, s.mixed(), share(s.width, me, all), add);
#pragma omp barrier
            norms(x, tokens, s.width, eps, norm.data());
            const Span gates = share(s.d_ff, me, all), ups{gates.begin + s.d_ff, gates.end + s.d_ff};
            product(x, tokens, gate_up, s.width, gates, [&](long token, long output, float value) {
                const float gate = value * norm[token];
                gated[token * s.d_ff + output] = gate / (1.0f + exponential(-gate));
            });
            product(x, tokens, gate_up, s.width, ups, [&](long token, long output, float value) {
                gated[token * s.d_ff + output - s.d_ff] *= value * norm[token];
            });
#pragma omp barrier
            product(gated.data(), tokens, down, s.d_ff, share(s.width, me, all), add);
#pragma omp barrier
        }
        norms(x, tokens, s.width, eps, norm.data());
#pragma omp for schedule(static)
        for (long i = 0; i < ends; i++) {
            const long token = i / s.last * s.more + s.more - s.last + i % s.last;
            for (long j = 0; j < s.width; j++) end[i * s.width + j] = x[token * s.width + j] * norm[token];
        }
        product(end.data(), ends, head, s.width, share(s.vocab, me, all),
                [&](long i, long output, float value) { logits[i * s.vocab + output] = value; });
    }
}

}  // namespace

extern "C" {

// weights [4 layers + 1, 3]: address, address of the scales, kind; of each layer qkv, out, gate and up, down; then the
// head. x [rows, more, width] embedded tokens, overwritten; turn [more or 1, d / 2] complex; forbidden, if any, [rows or 1,
// more, length + more]; kept [layers, 2, rows, kv_heads, room, d], float32 or `narrowed`; logits [rows, last, vocab].
void read_few(const void* weights, float* x, const float* turn, long turn_stride, const uint8_t* forbidden,
              long forbidden_stride, void* kept, long narrowed, float* logits, float eps, long rows, long more, long last,
              long layers, long width, long heads, long kv_heads, long d, long d_ff, long vocab, long room, long length,
              int threads) {
    const Shape shape{rows, more, last, layers, width, heads, kv_heads, d, d_ff, vocab, room, length};
    const Place place{turn, turn_stride, forbidden, forbidden_stride};
    const auto* table = static_cast<const Matrix*>(weights);
    if (narrowed)
        network(shape, place, table, x, static_cast<bf16*>(kept), logits, eps, threads);
    else
        network(shape, place, table, x, static_cast<float*>(kept), logits, eps, threads);
}

}  // extern "C"
