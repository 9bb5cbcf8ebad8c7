/* Rotary embedding, and attention over cached keys and values. */
#ifndef EDGE_SPEC_ATTENTION_H
#define EDGE_SPEC_ATTENTION_H

#include "vectors.h"

enum { KEYS_AT_A_TIME = 64 };

/* Queries, keys and values of a pass lie behind each other in rows of `qkv`. The cache is [n_kv_head, capacity,
   head_dim] each for keys, turned, and values, in floats or, where `is_half` is set, halves. `norms`: gains of each head's queries and keys, NULL: not normed;
   `cosines` and `sines`: [positions, rope_dim / 2], NULL: not turned. `out`: [rows, n_head * head_dim]; `states`: the
   largest score and the sum of each row's heads, [rows, n_head, 2]. */
typedef struct {
    float *qkv;
    const float *query_norm, *key_norm, *cosines, *sines;
    void *keys, *values;
    float *out, *states;
    int32_t n_head, n_kv_head, head_dim, rope_dim, interleaved, capacity, window, is_half;
    float epsilon, scale, softcap;
} attention;

INLINE float sum_of_squares(const float *x, int n) {
    floats sum = all(0);
    int i = 0;
    for (; i + LANES <= n; i += LANES) sum = multiply_add(load(x + i), load(x + i), sum);
    if (i < n) sum = multiply_add(load_some(x + i, n - i), load_some(x + i, n - i), sum);
    return total(sum);
}

static void norm(const float *x, const float *gain, float *out, int n, float epsilon) {
    float inverse = 1 / sqrtf(sum_of_squares(x, n) / (float)n + epsilon);
    for (int i = 0; i < n; i++) out[i] = x[i] * inverse * gain[i];
}

static void turn(const attention *at, float *head, int position) {
    int pairs = at->rope_dim / 2;
    const float *cosines = at->cosines + (ptrdiff_t)position * pairs, *sines = at->sines + (ptrdiff_t)position * pairs;
    for (int i = 0; i < pairs; i++) {
        float *x = head + (at->interleaved ? 2 * i : i), *y = head + (at->interleaved ? 2 * i + 1 : pairs + i);
        float first = *x * cosines[i] - *y * sines[i], second = *y * cosines[i] + *x * sines[i];
        *x = first, *y = second;
    }
}

enum { FLOAT, HALF }; /* what is cached */

/* LANES of what is cached from element i on. */
INLINE floats load_cached(const void *p, ptrdiff_t i, const int kind) {
    return kind == HALF ? load_halves((const uint16_t *)p + i) : load((const float *)p + i);
}

INLINE floats load_some_cached(const void *p, ptrdiff_t i, int n, const int kind) {
    if (kind == FLOAT) return load_some((const float *)p + i, n);
    uint16_t of[LANES] = {0};
    for (int j = 0; j < n; j++) of[j] = ((const uint16_t *)p)[i + j];
    return load_halves(of);
}

static void cache(void *to, ptrdiff_t place, const float *x, int n, int is_half) {
    if (!is_half) {
        memcpy((float *)to + place, x, sizeof(float) * (size_t)n);
        return;
    }
    uint16_t *halves = (uint16_t *)to + place, rest[LANES];
    int i = 0;
    for (; i + LANES <= n; i += LANES) store_halves(halves + i, load(x + i));
    if (i == n) return;
    store_halves(rest, load_some(x + i, n - i));
    memcpy(halves + i, rest, sizeof(uint16_t) * (size_t)(n - i));
}

/* Norm and turn one row's queries and keys, and cache its keys and values at `position`. */
static void cache_row(const attention *at, int row, int position) {
    int dim = at->head_dim, heads = at->n_head + at->n_kv_head;
    float *x = at->qkv + (ptrdiff_t)row * (heads + at->n_kv_head) * dim;
    for (int head = 0; head < heads; head++) {
        const float *gain = head < at->n_head ? at->query_norm : at->key_norm;
        if (gain) norm(x + head * dim, gain, x + head * dim, dim, at->epsilon);
        if (at->cosines) turn(at, x + head * dim, position);
    }
    for (int head = 0; head < at->n_kv_head; head++) {
        ptrdiff_t to = ((ptrdiff_t)head * at->capacity + position) * dim;
        cache(at->keys, to, x + (at->n_head + head) * dim, dim, at->is_half);
        cache(at->values, to, x + (heads + head) * dim, dim, at->is_half);
    }
}

/* A query times the cached row at `row`, still in lanes. */
INLINE floats lanes_of_product(const float *query, const void *keys, ptrdiff_t row, int n, const int kind) {
    floats sum = all(0), more = all(0);
    int i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        sum = multiply_add(load(query + i), load_cached(keys, row + i, kind), sum);
        more = multiply_add(load(query + i + LANES), load_cached(keys, row + i + LANES, kind), more);
    }
    for (; i + LANES <= n; i += LANES) sum = multiply_add(load(query + i), load_cached(keys, row + i, kind), sum);
    if (i < n) more = multiply_add(load_some(query + i, n - i), load_some_cached(keys, row + i, n - i, kind), more);
    return add(sum, more);
}

/* The same of four rows, by the same operations: what is loaded of the query serves all of them. */
INLINE void lanes_of_products(floats lanes[4], const float *query, const void *keys, ptrdiff_t row, int n, const int kind) {
    floats sums[4], more[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) sums[k] = more[k] = all(0);
    int i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        floats first = load(query + i), second = load(query + i + LANES);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            ptrdiff_t at = row + (ptrdiff_t)k * n + i;
            sums[k] = multiply_add(first, load_cached(keys, at, kind), sums[k]);
            more[k] = multiply_add(second, load_cached(keys, at + LANES, kind), more[k]);
        }
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        ptrdiff_t of = row + (ptrdiff_t)k * n;
        int j = i;
        for (; j + LANES <= n; j += LANES) sums[k] = multiply_add(load(query + j), load_cached(keys, of + j, kind), sums[k]);
        if (j < n) more[k] = multiply_add(load_some(query + j, n - j), load_some_cached(keys, of + j, n - j, kind), more[k]);
        lanes[k] = add(sums[k], more[k]);
    }
}

/* out += n cached rows from `row` on, weighed by `weights`. */
INLINE void add_weighed(float *out, const void *values, ptrdiff_t row, const float *weights, int n, int dim, const int kind) {
    int i = 0;
    for (; i + 4 * LANES <= dim; i += 4 * LANES) {
        floats a = load(out + i), b = load(out + i + LANES), c = load(out + i + 2 * LANES), d = load(out + i + 3 * LANES);
        for (int key = 0; key < n; key++) {
            ptrdiff_t at = row + (ptrdiff_t)key * dim + i;
            floats weight = all(weights[key]);
            a = multiply_add(weight, load_cached(values, at, kind), a);
            b = multiply_add(weight, load_cached(values, at + LANES, kind), b);
            c = multiply_add(weight, load_cached(values, at + 2 * LANES, kind), c);
            d = multiply_add(weight, load_cached(values, at + 3 * LANES, kind), d);
        }
        store(out + i, a), store(out + i + LANES, b), store(out + i + 2 * LANES, c), store(out + i + 3 * LANES, d);
    }
    for (; i + LANES <= dim; i += LANES) {
        floats a = load(out + i);
        for (int key = 0; key < n; key++)
            a = multiply_add(all(weights[key]), load_cached(values, row + (ptrdiff_t)key * dim + i, kind), a);
        store(out + i, a);
    }
    if (i == dim) return;
    float rest[LANES];
    floats a = load_some(out + i, dim - i);
    for (int key = 0; key < n; key++)
        a = multiply_add(all(weights[key]), load_some_cached(values, row + (ptrdiff_t)key * dim + i, dim - i, kind), a);
    store(rest, a);
    memcpy(out + i, rest, sizeof(float) * (size_t)(dim - i));
}

/* One head's query and the keys from `begin` to `end`, at most KEYS_AT_A_TIME; what was attended to before is in `out`
   and `state` (arXiv 2205.14135). */
INLINE void attend(const attention *at, const float *query, int kv_head, int begin, int end, float *out, float state[2],
                   const int kind) {
    int dim = at->head_dim, n = end - begin;
    ptrdiff_t rows = ((ptrdiff_t)kv_head * at->capacity + begin) * dim;
    float scores[KEYS_AT_A_TIME + LANES];
    for (int key = 0; key < n; key += 4) {
        floats lanes[4];
        if (key + 4 <= n)
            lanes_of_products(lanes, query, at->keys, rows + (ptrdiff_t)key * dim, dim, kind);
        else
            for (int i = 0; i < 4; i++)
                lanes[i] = key + i < n ? lanes_of_product(query, at->keys, rows + (ptrdiff_t)(key + i) * dim, dim, kind) : all(0);
        totals(scores + key, lanes[0], lanes[1], lanes[2], lanes[3]);
    }
    float most = state[0];
    for (int key = 0; key < n; key += LANES) {
        floats score = multiply(load(scores + key), all(at->scale));
        if (at->softcap)
            score = multiply(hyperbolic_tangent(divide(score, all(at->softcap))), all(at->softcap));
        store(scores + key, score);
    }
    for (int key = 0; key < n; key++) most = scores[key] > most ? scores[key] : most;
    if (most > state[0]) {
        float of[LANES], shrink;
        store(of, exponential(all(state[0] - most)));
        shrink = state[1] > 0 ? of[0] : 0;
        state[0] = most, state[1] *= shrink;
        for (int i = 0; i < dim; i++) out[i] *= shrink;
    }
    for (int key = n; key < n + LANES; key++) scores[key] = most - 1e4f; /* next to nothing, in the last vector's lanes */
    floats sum = all(0);
    for (int key = 0; key < n; key += LANES) {
        floats weight = exponential(add(load(scores + key), all(-most)));
        store(scores + key, weight);
        sum = add(sum, weight);
    }
    state[1] += total(sum);
    add_weighed(out, at->values, rows, scores, n, dim, kind);
}

static void attend_floats(const attention *at, const float *query, int kv_head, int begin, int end, float *out, float state[2]) {
    attend(at, query, kv_head, begin, end, out, state, FLOAT);
}

static void attend_halves(const attention *at, const float *query, int kv_head, int begin, int end, float *out, float state[2]) {
    attend(at, query, kv_head, begin, end, out, state, HALF);
}

/* Query heads [first, first + n), which share a head of keys, of all rows of a pass: each stretch of keys is read once
   for all of them. */
static void attend_heads(const attention *at, int first, int n, int rows, int past) {
    int dim = at->head_dim, width = (at->n_head + 2 * at->n_kv_head) * dim;
    int kv_head = first / (at->n_head / at->n_kv_head), last = past + rows;
    for (int row = 0; row < rows; row++)
        for (int head = first; head < first + n; head++) {
            float *state = at->states + ((ptrdiff_t)row * at->n_head + head) * 2;
            state[0] = -INFINITY, state[1] = 0;
            memset(at->out + ((ptrdiff_t)row * at->n_head + head) * dim, 0, sizeof(float) * (size_t)dim);
        }
    int earliest = at->window && past + 1 > at->window ? past + 1 - at->window : 0;
    for (int begin = earliest / KEYS_AT_A_TIME * KEYS_AT_A_TIME; begin < last; begin += KEYS_AT_A_TIME)
        for (int row = 0; row < rows; row++) {
            int seen = past + row + 1, from = at->window && seen > at->window ? seen - at->window : 0;
            int start = from > begin ? from : begin, end = begin + KEYS_AT_A_TIME < seen ? begin + KEYS_AT_A_TIME : seen;
            if (start >= end) continue;
            for (int head = first; head < first + n; head++) {
                ptrdiff_t place = (ptrdiff_t)row * at->n_head + head;
                (at->is_half ? attend_halves : attend_floats)(at, at->qkv + (ptrdiff_t)row * width + head * dim, kv_head, start,
                                                              end, at->out + place * dim, at->states + place * 2);
            }
        }
    for (int row = 0; row < rows; row++)
        for (int head = first; head < first + n; head++) {
            ptrdiff_t place = (ptrdiff_t)row * at->n_head + head;
            float inverse = 1 / at->states[place * 2 + 1], *out = at->out + place * dim;
            for (int i = 0; i < dim; i++) out[i] *= inverse;
        }
}
#endif
