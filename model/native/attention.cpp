// Attention of bfloat16: a block of queries at a time, whose scores stay in the cache, against the keys that any of them
// sees and no others. Rows, keys and channels are filled up with zeros to multiples of 32, which is what `multiply` takes.
#ifdef __AVX512BF16__
#include <cmath>

#include "layout.h"

namespace {

constexpr long QUERIES = 64;  // of a block
constexpr float LOG2_E = 1.44269504f;

struct Shape {
    long batch, seq, heads, kv_heads, d, spans;  // spans: the batch of the spans, 1 if all rows share theirs
    long width() const { return apart(seq); }
    float scale() const { return 1.0f / std::sqrt(float(d)); }
    template <typename T>
    Rows<T> query(T* all, long row, long head) const { return {all + (row * seq * heads + head) * d, heads * d}; }
    template <typename T>
    Rows<T> key(T* all, long row, long head) const { return {all + (row * seq * kv_heads + head) * d, kv_heads * d}; }
    const int32_t* spans_of(const int32_t* all, long row) const { return all + (spans == 1 ? 0 : row * seq * 2); }
};

// Some rows of one head, and the keys between the earliest and the latest that any of them sees.
struct Block {
    long first, rows, key, keys;
    const int32_t* spans;

    Block(const int32_t* all, long first, long seq) : first(first), rows(std::min(QUERIES, seq - first)) {
        spans = all + first * 2;
        long low = seq, high = 0;
        for (long r = 0; r < rows; r++) {
            low = std::min<long>(low, spans[2 * r]);
            high = std::max<long>(high, spans[2 * r + 1]);
        }
        key = low / STEP * STEP;
        keys = up(high - key);
    }
    long from(long row) const { return spans[2 * row] - key; }
    long to(long row) const { return spans[2 * row + 1] - key; }
};

// Rows for the left side of a product: as they are, or where their number is no multiple of 32 filled up, in `held`.
Left filled(Rows<const bf16> from, long rows, long d, bf16* held) {
    if (rows % STEP == 0) return {from.at, from.stride};
    for (long row = 0; row < rows; row++) std::copy(from.row(row), from.row(row) + d, held + row * d);
    std::fill(held + rows * d, held + up(rows) * d, bf16(0));
    return {held, d};
}

// The transpose of [rows, d], paired along d: [d / 2, width, 2].
void pair_across(Rows<const bf16> from, long rows, long d, bf16* to, long width) {
    auto* words = reinterpret_cast<int32_t*>(to);
    for (long first = 0; first < width; first += 16)
        for (long pair = 0; pair < d / 2; pair += 16) {
            int32_t* square = words + pair * width + first;
            if (first + 16 <= rows) {
                turn(from.row(first) + pair * 2, from.stride / 2, square, width);
                continue;
            }
            int32_t held[16][16] = {};
            for (long row = first; row < rows; row++) std::memcpy(held[row - first], from.row(row) + pair * 2, 64);
            turn(held, 16, square, width);
        }
}

// 2^y to 18 bits, of which bfloat16 keeps 8: the Taylor series of 2^f for f in [-1/2, 1/2].
inline __m512 power_of_two(__m512 y) {
    const __m512 whole = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(y, whole);
    __m512 p = _mm512_set1_ps(1.33335581e-3f);
    for (const float c : {9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, whole);
}

// Of sixteen keys from `key` on, a bit for each that is in [from, to).
inline __mmask16 seen(long key, long from, long to) {
    if (from <= key && key + 16 <= to) return 0xffff;  // most are
    const auto below = [key](long end) { return (1u << std::clamp(end - key, 0L, 16L)) - 1; };
    return __mmask16(below(to) & ~below(from));
}

// e^(score scale - shift) of the keys a row sees, 0 of the others.
struct Weights {
    const float* scores;
    const Block& b;
    long from, to;
    __m512 scale, shift;

    Weights(const float* scores, const Block& b, long row, float scale, float shift)
        : scores(scores), b(b), from(b.from(row)), to(b.to(row)), scale(_mm512_set1_ps(scale * LOG2_E)),
          shift(_mm512_set1_ps(shift * LOG2_E)) {}

    __m512 of(long key) const {
        const __mmask16 mask = seen(key, from, to);
        if (!mask) return _mm512_setzero_ps();
        const __m512 y = _mm512_fmsub_ps(_mm512_loadu_ps(scores + key), scale, shift);
        return _mm512_maskz_mov_ps(mask, power_of_two(y));
    }
};

inline void store(bf16* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x)); }

float largest(const float* scores, const Block& b, long row) {
    const long from = b.from(row), to = b.to(row);
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (long k = from / 16 * 16; k < to; k += 16)
        most = _mm512_mask_max_ps(most, seen(k, from, to), most, _mm512_loadu_ps(scores + k));
    return _mm512_reduce_max_ps(most);
}

struct Forward {
    const Shape& s;
    Buffer scores, mixed;
    Halves across, along, queries, weights;
    Tiles tiles;

    explicit Forward(const Shape& s)
        : s(s), scores(QUERIES * s.width()), mixed(QUERIES * s.d), across(s.width() * s.d), along(s.width() * s.d),
          queries(QUERIES * s.d), weights(QUERIES * s.width()) {}

    void keys(Rows<const bf16> k, Rows<const bf16> v) {
        pair_across(k, s.seq, s.d, across.halves(), s.width());
        pair_along(v, s.seq, s.d, along.halves(), s.d);
    }

    void block(const Block& b, Rows<const bf16> q, Rows<bf16> out, float* logs) {
        const long rows = up(b.rows), d = s.d;
        multiply(filled(q.from(b.first), b.rows, d, queries.halves()), Right{across.halves(), s.width()}.from(b.key),
                 {scores.floats(), s.width()}, rows, b.keys, d);
        float sums[QUERIES];
        for (long r = 0; r < b.rows; r++) {
            const float* line = scores.floats() + r * s.width();
            const float shift = largest(line, b, r) * s.scale();
            const Weights weight(line, b, r, s.scale(), shift);
            __m512 sum = _mm512_setzero_ps();
            for (long k = 0; k < b.keys; k += 16) {
                const __m512 some = weight.of(k);
                sum = _mm512_add_ps(sum, some);
                store(weights.halves() + r * s.width() + k, some);
            }
            sums[r] = _mm512_reduce_add_ps(sum);
            logs[b.first + r] = shift + std::log(sums[r]);
        }
        multiply({weights.halves(), s.width()}, {along.halves() + b.key * d, d}, {mixed.floats(), d}, rows, d, b.keys);
        for (long r = 0; r < b.rows; r++)
            for (long i = 0; i < d; i += 16)
                store(out.row(b.first + r) + i,
                      _mm512_div_ps(_mm512_loadu_ps(mixed.floats() + r * d + i), _mm512_set1_ps(sums[r])));
    }
};

// With P the weights and D a row's sum of grad * out: of_v = P' grad, of_scores = P (grad v' - D), of_q = of_scores k,
// of_k = of_scores' q (FlashAttention, arXiv:2205.14135, algorithm 4). The sums over queries are kept transposed.
struct Backward {
    const Shape& s;
    Buffer scores, of_weights, mixed, sum_k, sum_v;
    Halves k_across, v_across, k_along, rows_of, turned, weights, of_scores, paired;
    Tiles tiles;

    explicit Backward(const Shape& s)
        : s(s), scores(QUERIES * s.width()), of_weights(QUERIES * s.width()), mixed(QUERIES * s.d),
          sum_k(s.width() * s.d), sum_v(s.width() * s.d), k_across(s.width() * s.d), v_across(s.width() * s.d),
          k_along(s.width() * s.d), rows_of(QUERIES * s.d), turned(QUERIES * s.d), weights(QUERIES * s.width()),
          of_scores(QUERIES * s.width()), paired(QUERIES * s.width()) {}

    void keys(Rows<const bf16> k, Rows<const bf16> v) {
        pair_across(k, s.seq, s.d, k_across.halves(), s.width());
        pair_across(v, s.seq, s.d, v_across.halves(), s.width());
        pair_along(k, s.seq, s.d, k_along.halves(), s.d);
        sum_k.clear();
        sum_v.clear();
    }

    void block(const Block& b, Rows<const bf16> q, Rows<const bf16> grad, Rows<const bf16> out, const float* logs,
               Rows<bf16> of_q) {
        const long rows = up(b.rows), d = s.d;
        against(b, q.from(b.first), k_across, scores);
        against(b, grad.from(b.first), v_across, of_weights);
        for (long r = 0; r < b.rows; r++) row(b, r, grad.row(b.first + r), out.row(b.first + r), logs[b.first + r]);
        multiply({of_scores.halves(), s.width()}, {k_along.halves() + b.key * d, d}, {mixed.floats(), d}, rows, d, b.keys);
        for (long r = 0; r < b.rows; r++)
            for (long i = 0; i < d; i += 16)
                store(of_q.row(b.first + r) + i, _mm512_loadu_ps(mixed.floats() + r * d + i));
        add(b, grad.from(b.first), weights, sum_v);
        add(b, q.from(b.first), of_scores, sum_k);
    }

    void against(const Block& b, Rows<const bf16> some, Halves& all, Buffer& to) {
        multiply(filled(some, b.rows, s.d, rows_of.halves()), Right{all.halves(), s.width()}.from(b.key),
                 {to.floats(), s.width()}, up(b.rows), b.keys, s.d);
    }

    void row(const Block& b, long r, const bf16* grad, const bf16* out, float log) {
        float both = 0;
        for (long i = 0; i < s.d; i++) both += widen(grad[i]) * widen(out[i]);
        const long at = r * s.width();
        const Weights weight(scores.floats() + at, b, r, s.scale(), log);
        const __m512 shared = _mm512_set1_ps(both), scale = _mm512_set1_ps(s.scale());
        for (long k = 0; k < b.keys; k += 16) {
            const __m512 some = weight.of(k), of_some = _mm512_loadu_ps(of_weights.floats() + at + k);
            store(weights.halves() + at + k, some);
            store(of_scores.halves() + at + k,
                  _mm512_mul_ps(_mm512_mul_ps(some, scale), _mm512_sub_ps(of_some, shared)));
        }
    }

    // sums' [d, width] += some' @ by
    void add(const Block& b, Rows<const bf16> some, Halves& by, Buffer& sums) {
        transpose(some, b.rows, s.d, rows_of.halves(), turned.halves(), up(b.rows));
        pair_along({by.halves(), s.width()}, b.rows, b.keys, paired.halves(), s.width());
        multiply({turned.halves(), up(b.rows)}, {paired.halves(), s.width()}, {sums.floats() + b.key, s.width()}, s.d, b.keys,
                 up(b.rows), true);
    }

    void write(Buffer& sums, Rows<bf16> to) {
        for (long place = 0; place < s.seq; place += 16)
            for (long i = 0; i < s.d; i += 16) {
                float held[16][16];
                turn(sums.floats() + i * s.width() + place, s.width(), held, 16);
                for (long p = place; p < std::min(place + 16, s.seq); p++)
                    store(to.row(p) + i, _mm512_loadu_ps(held[p - place]));
            }
    }
};

}  // namespace

extern "C" {

// q and out [batch, seq, heads, d], k and v [batch, seq, kv_heads, d]; all_spans [spans, seq, 2] the first key and the
// one after the last that a query sees; logs [batch, heads, seq], for the backward pass, the logarithm of a row's sum.
void attention(const bf16* q, const bf16* k, const bf16* v, const int32_t* all_spans, bf16* out, float* logs, long batch,
               long seq, long heads, long kv_heads, long d, long spans, int threads) {
    const Shape s{batch, seq, heads, kv_heads, d, spans};
    const long group = heads / kv_heads;
#pragma omp parallel num_threads(threads)
    {
        Forward forward(s);
#pragma omp for schedule(dynamic)
        for (long item = 0; item < batch * kv_heads; item++) {
            const long row = item / kv_heads, kv = item % kv_heads;
            forward.keys(s.key(k, row, kv), s.key(v, row, kv));
            for (long head = kv * group; head < (kv + 1) * group; head++)
                for (long first = 0; first < seq; first += QUERIES)
                    forward.block(Block(s.spans_of(all_spans, row), first, seq), s.query(q, row, head),
                                  s.query(out, row, head), logs + (row * heads + head) * seq);
        }
    }
}

void attention_backward(const bf16* grad, const bf16* q, const bf16* k, const bf16* v, const int32_t* all_spans,
                        const bf16* out, const float* logs, bf16* of_q, bf16* of_k, bf16* of_v, long batch, long seq,
                        long heads, long kv_heads, long d, long spans, int threads) {
    const Shape s{batch, seq, heads, kv_heads, d, spans};
    const long group = heads / kv_heads;
#pragma omp parallel num_threads(threads)
    {
        Backward backward(s);
#pragma omp for schedule(dynamic)
        for (long item = 0; item < batch * kv_heads; item++) {
            const long row = item / kv_heads, kv = item % kv_heads;
            backward.keys(s.key(k, row, kv), s.key(v, row, kv));
            for (long head = kv * group; head < (kv + 1) * group; head++)
                for (long first = 0; first < seq; first += QUERIES)
                    backward.block(Block(s.spans_of(all_spans, row), first, seq), s.query(q, row, head),
                                   s.query(grad, row, head), s.query(out, row, head),
                                   logs + (row * heads + head) * seq, s.query(of_q, row, head));
            backward.write(backward.sum_k, s.key(of_k, row, kv));
            backward.write(backward.sum_v, s.key(of_v, row, kv));
        }
    }
}

}  // extern "C"
#endif
