// Attention of bfloat16: a block of queries at a time, whose scores stay in the cache, against the keys from the first to the
// last that any of them sees. Scores stand transposed, a line of queries for each key: what is taken of a query over its
// keys is then taken of sixteen queries at once, and the sums over queries read the lines as they are. Queries and keys are
// filled up with zeros to multiples of 32, which is what `multiply` takes.
#ifdef __AVX512BF16__
#include <cmath>

#include "layout.h"

namespace {

constexpr long QUERIES = 64;  // of a block
constexpr long KEYS = 128;    // whose gradients are taken at a time: their scores stay in the nearest caches
constexpr float LOG2_E = 1.44269504f;

struct Shape {
    long batch, seq, heads, kv_heads, d, spans;  // spans: the batch of the spans, 1 if all rows share theirs
    long width() const { return apart(seq); }
    template <typename T>
    Rows<T> query(T* all, long row, long head) const { return {all + (row * seq * heads + head) * d, heads * d}; }
    template <typename T>
    Rows<T> key(T* all, long row, long head) const { return {all + (row * seq * kv_heads + head) * d, kv_heads * d}; }
    const int32_t* spans_of(const int32_t* all, long row) const { return all + (spans == 1 ? 0 : row * seq * 2); }
};

// A number for each query of a block.
template <typename T>
struct Each {
    alignas(64) T of[QUERIES] = {};
};
inline __m512 sixteen(const Each<float>& all, long query) { return _mm512_load_ps(all.of + query); }

// Some queries of one head, and the keys from the first to the last that any of them sees, in multiples of 32.
struct Block {
    long first, rows, columns, key, keys;  // columns: the queries, filled up
    Each<int32_t> from, to;                // what a query sees; what was filled up sees nothing

    Block(const int32_t* spans, long first, long seq)
        : first(first), rows(std::min(QUERIES, seq - first)), columns(up(rows)) {
        long low = seq, high = 0;
        for (long r = 0; r < rows; r++) {
            from.of[r] = spans[2 * (first + r)];
            to.of[r] = spans[2 * (first + r) + 1];
            low = std::min<long>(low, from.of[r]);
            high = std::max<long>(high, to.of[r]);
        }
        key = low / STEP * STEP;
        keys = up(high - key);
    }
    // Of sixteen queries, a bit for each that sees the key.
    __mmask16 sees(long query, long key) const {
        const __m512i one = _mm512_set1_epi32(int(key));
        return _mm512_cmple_epi32_mask(_mm512_load_si512(from.of + query), one) &
               _mm512_cmpgt_epi32_mask(_mm512_load_si512(to.of + query), one);
    }
};

// The transpose of [rows, d], paired along d: [d / 2, columns, 2].
void pair_across(Rows<const bf16> from, long rows, long d, bf16* to, long columns) {
    auto* words = reinterpret_cast<int32_t*>(to);
    for (long first = 0; first < columns; first += 16)
        for (long pair = 0; pair < d / 2; pair += 16) {
            int32_t* square = words + pair * columns + first;
            if (first + 16 <= rows) {
                turn(from.row(first) + pair * 2, from.stride / 2, square, columns);
                continue;
            }
            int32_t held[16][16] = {};
            for (long row = first; row < rows; row++) std::memcpy(held[row - first], from.row(row) + pair * 2, 64);
            turn(held, 16, square, columns);
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

inline void store(bf16* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x)); }
inline __m512i narrowed(const __m512 (&x)[2]) { return (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]); }

// What is computed against the keys of one head.
struct Head {
    const Shape& s;
    const float scale, scale_2;  // of a score, and of one that is the exponent of a power of two
    Scratch scores, turned_out;
    Halves keys, turned, held, across, paired;  // turned: what is summed over keys, the left side of that sum
    Tiles tiles;

    Head(const Shape& s, long at_once)
        : s(s), scale(1.0f / std::sqrt(float(s.d))), scale_2(scale * LOG2_E), scores(at_once * QUERIES),
          turned_out(s.d * QUERIES), keys(up(s.seq) * s.d), turned(s.width() * s.d), held(up(s.seq) * s.d),
          across(QUERIES * s.d), paired(at_once * QUERIES) {}

    void begin(Rows<const bf16> k, Rows<const bf16> summed) {
        copy(k, s.seq, s.d, keys.halves());
        transpose(summed, s.seq, s.d, held.halves(), turned.halves(), s.width());
    }

    // to[n, columns] = n of the left side's rows @ the queries
    void against(const Block& b, Halves& left, long key, long n, Halves& queries, Scratch& to) {
        multiply({left.halves() + key * s.d, s.d}, {queries.halves(), b.columns}, {to.floats(), b.columns}, n, b.columns, s.d);
    }

    // 2^(score scale_2 - shift) of sixteen queries that see the key, 0 of the others
    __m512 weight(const Block& b, const float* score, long query, long key, __m512 shift) const {
        const __m512 y = _mm512_fmsub_ps(_mm512_loadu_ps(score), _mm512_set1_ps(scale_2), shift);
        return _mm512_maskz_mov_ps(b.sees(query, key), power_of_two(y));
    }

    void sum_over_keys(const Block& b, long key, long n, bool more) {
        multiply({turned.halves() + key, s.width()}, {paired.halves(), b.columns}, {turned_out.floats(), b.columns}, s.d,
                 b.columns, n, more);
    }

    // What was summed over keys, of each query times a number.
    void write_queries(const Block& b, const Each<float>& by, Rows<bf16> to) {
        for (long query = 0; query < b.rows; query += 16)
            for (long i = 0; i < s.d; i += 16) {
                float lines[16][16], square[16][16];
                for (long j = 0; j < 16; j++)
                    _mm512_storeu_ps(lines[j], _mm512_mul_ps(_mm512_loadu_ps(turned_out.floats() + (i + j) * b.columns + query),
                                                             sixteen(by, query)));
                turn(lines, 16, square, 16);
                for (long q = query; q < std::min(query + 16, b.rows); q++)
                    store(to.row(b.first + q) + i, _mm512_loadu_ps(square[q - query]));
            }
    }
};

struct Forward : Head {
    explicit Forward(const Shape& s) : Head(s, up(s.seq)) {}

    void block(const Block& b, Rows<const bf16> q, Rows<bf16> out, float* logs) {
        pair_across(q.from(b.first), b.rows, s.d, across.halves(), b.columns);
        against(b, keys, b.key, b.keys, across, scores);
        Each<float> shift, sum, by;
        for (long i = 0; i < b.columns; i += STEP) weigh(b, i, shift, sum);
        sum_over_keys(b, b.key, b.keys, false);
        for (long r = 0; r < b.rows; r++) {
            logs[b.first + r] = shift.of[r] / LOG2_E + std::log(sum.of[r]);
            by.of[r] = 1.0f / sum.of[r];
        }
        write_queries(b, by, out);
    }

    // The weights of 32 queries, but for their sum.
    void weigh(const Block& b, long query, Each<float>& shifts, Each<float>& sums) {
        const float* line = scores.floats() + query;
        __m512 shift[2], sum[2];
        for (long half = 0; half < 2; half++) {
            __m512 most = _mm512_set1_ps(-INFINITY);
            for (long k = 0; k < b.keys; k++)
                most = _mm512_mask_max_ps(most, b.sees(query + half * 16, b.key + k), most,
                                          _mm512_loadu_ps(line + k * b.columns + half * 16));
            shift[half] = _mm512_mul_ps(most, _mm512_set1_ps(scale_2));
            sum[half] = _mm512_setzero_ps();
        }
        for (long k = 0; k < b.keys; k += 2) {
            __m512i pair[2];
            for (long one = 0; one < 2; one++) {
                __m512 weights[2];
                for (long half = 0; half < 2; half++) {
                    weights[half] = weight(b, line + (k + one) * b.columns + half * 16, query + half * 16, b.key + k + one,
                                           shift[half]);
                    sum[half] = _mm512_add_ps(sum[half], weights[half]);
                }
                pair[one] = narrowed(weights);
            }
            interleave(pair[0], pair[1], paired.halves() + k * b.columns + 2 * query);
        }
        for (long half = 0; half < 2; half++) {
            _mm512_store_ps(shifts.of + query + half * 16, shift[half]);
            _mm512_store_ps(sums.of + query + half * 16, sum[half]);
        }
    }
};

// With P the weights and D a query's sum of grad * out: of_v = P' grad, of_scores = P (grad v' - D), of_q = of_scores k,
// of_k = of_scores' q (FlashAttention, arXiv:2205.14135, algorithm 4).
struct Backward : Head {
    Scratch of_weights, sum_k, sum_v;
    Halves values, grad_across, q_along, grad_along, weights, of_scores;

    explicit Backward(const Shape& s)
        : Head(s, KEYS), of_weights(KEYS * QUERIES), sum_k(up(s.seq) * s.d), sum_v(up(s.seq) * s.d), values(up(s.seq) * s.d),
          grad_across(QUERIES * s.d), q_along(QUERIES * s.d), grad_along(QUERIES * s.d), weights(KEYS * QUERIES),
          of_scores(KEYS * QUERIES) {}

    void load(Rows<const bf16> k, Rows<const bf16> v) {
        begin(k, k);
        copy(v, s.seq, s.d, values.halves());
        for (Scratch* sum : {&sum_k, &sum_v}) std::fill_n(sum->floats(), up(s.seq) * s.d, 0.0f);
    }

    void block(const Block& b, Rows<const bf16> q, Rows<const bf16> grad, Rows<const bf16> out, const float* logs,
               Rows<bf16> of_q) {
        lay(b, q, across, q_along);
        lay(b, grad, grad_across, grad_along);
        Each<float> shift, shared, scales;
        for (long r = 0; r < b.rows; r++) {
            const bf16 *of_one = grad.row(b.first + r), *one = out.row(b.first + r);
            float both = 0;
            for (long i = 0; i < s.d; i++) both += widen(of_one[i]) * widen(one[i]);
            shared.of[r] = both;
            shift.of[r] = logs[b.first + r] * LOG2_E;
            scales.of[r] = scale;
        }
        for (long key = b.key; key < b.key + b.keys; key += KEYS) {
            const long n = std::min(KEYS, b.key + b.keys - key);
            against(b, keys, key, n, across, scores);
            against(b, values, key, n, grad_across, of_weights);
            for (long i = 0; i < b.columns; i += STEP) weigh(b, i, key, n, shift, shared);
            sum_over_queries(b, key, n, weights, grad_along, sum_v);
            sum_over_queries(b, key, n, of_scores, q_along, sum_k);
            sum_over_keys(b, key, n, key > b.key);
        }
        write_queries(b, scales, of_q);
    }

    void lay(const Block& b, Rows<const bf16> rows, Halves& to_across, Halves& to_along) {
        pair_across(rows.from(b.first), b.rows, s.d, to_across.halves(), b.columns);
        pair_along(rows.from(b.first), b.rows, s.d, to_along.halves(), s.d);
    }

    // The weights of 32 queries on n keys, and the gradients of their scores but for the scale, these also in pairs.
    void weigh(const Block& b, long query, long key, long n, const Each<float>& shift, const Each<float>& shared) {
        for (long k = 0; k < n; k += 2) {
            __m512i pair[2];
            for (long one = 0; one < 2; one++) {
                const long at = (k + one) * b.columns + query;
                __m512 some[2], of_some[2];
                for (long half = 0; half < 2; half++) {
                    const long i = query + half * 16;
                    some[half] = weight(b, scores.floats() + at + half * 16, i, key + k + one, sixteen(shift, i));
                    const __m512 of_weight = _mm512_loadu_ps(of_weights.floats() + at + half * 16);
                    of_some[half] = _mm512_mul_ps(some[half], _mm512_sub_ps(of_weight, sixteen(shared, i)));
                }
                pair[one] = narrowed(of_some);
                _mm512_storeu_si512(weights.halves() + at, narrowed(some));
                _mm512_storeu_si512(of_scores.halves() + at, pair[one]);
            }
            interleave(pair[0], pair[1], paired.halves() + k * b.columns + 2 * query);
        }
    }

    // sums[keys, d] += some' @ along
    void sum_over_queries(const Block& b, long key, long n, Halves& some, Halves& along, Scratch& sums) {
        multiply({some.halves(), b.columns}, {along.halves(), s.d}, {sums.floats() + key * s.d, s.d}, n, s.d, b.columns, true);
    }

    void write_keys(Scratch& sums, float by, Rows<bf16> to) {
        for (long key = 0; key < s.seq; key++)
            for (long i = 0; i < s.d; i += 16)
                store(to.row(key) + i, _mm512_mul_ps(_mm512_loadu_ps(sums.floats() + key * s.d + i), _mm512_set1_ps(by)));
    }
};

}  // namespace

extern "C" {

// q and out [batch, seq, heads, d], k and v [batch, seq, kv_heads, d]; all_spans [spans, seq, 2] the first key and the
// one after the last that a query sees; logs [batch, heads, seq], for the backward pass, the logarithm of a query's sum.
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
            forward.begin(s.key(k, row, kv), s.key(v, row, kv));
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
            backward.load(s.key(k, row, kv), s.key(v, row, kv));
            for (long head = kv * group; head < (kv + 1) * group; head++)
                for (long first = 0; first < seq; first += QUERIES)
                    backward.block(Block(s.spans_of(all_spans, row), first, seq), s.query(q, row, head),
                                   s.query(grad, row, head), s.query(out, row, head),
                                   logs + (row * heads + head) * seq, s.query(of_q, row, head));
            backward.write_keys(backward.sum_k, backward.scale, s.key(of_k, row, kv));
            backward.write_keys(backward.sum_v, 1.0f, s.key(of_v, row, kv));
        }
    }
}

}  // extern "C"
#endif
