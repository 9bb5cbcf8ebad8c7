/* Rotary embedding, and attention over cached keys and values. */
#ifndef EDGE_SPEC_ATTENTION_H
#define EDGE_SPEC_ATTENTION_H

#include "vectors.h"

enum { KEYS_AT_A_TIME = 64 };

/* Queries, keys and values of a pass lie behind each other in rows of `qkv`. The cache is [n_kv_head, capacity,
   head_dim] each for keys, turned, and values. `norms`: gains of each head's queries and keys, NULL: not normed;
   `cosines` and `sines`: [positions, rope_dim / 2], NULL: not turned. `out`: [rows, n_head * head_dim]; `states`: the
   largest score and the sum of each row's heads, [rows, n_head, 2]. */
typedef struct {
    float *qkv;
    const float *query_norm, *key_norm, *cosines, *sines;
    float *keys, *values, *out, *states;
    int32_t n_head, n_kv_head, head_dim, rope_dim, interleaved, capacity, window;
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
        memcpy(at->keys + to, x + (at->n_head + head) * dim, sizeof(float) * (size_t)dim);
        memcpy(at->values + to, x + (heads + head) * dim, sizeof(float) * (size_t)dim);
    }
}

INLINE floats lanes_of_product(const float *x, const float *y, int n) {
    floats sum = all(0), more = all(0);
    int i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        sum = multiply_add(load(x + i), load(y + i), sum);
        more = multiply_add(load(x + i + LANES), load(y + i + LANES), more);
    }
    for (; i + LANES <= n; i += LANES) sum = multiply_add(load(x + i), load(y + i), sum);
    if (i < n) more = multiply_add(load_some(x + i, n - i), load_some(y + i, n - i), more);
    return add(sum, more);
}

/* The same of x and four rows of y: what is loaded of x serves all of them. */
INLINE void lanes_of_products(floats lanes[4], const float *x, const float *y, int n) {
    floats sums[4], more[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) sums[k] = more[k] = all(0);
    int i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        floats first = load(x + i), second = load(x + i + LANES);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            sums[k] = multiply_add(first, load(y + (ptrdiff_t)k * n + i), sums[k]);
            more[k] = multiply_add(second, load(y + (ptrdiff_t)k * n + i + LANES), more[k]);
        }
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        const float *of = y + (ptrdiff_t)k * n;
        int j = i;
        for (; j + LANES <= n; j += LANES) sums[k] = multiply_add(load(x + j), load(of + j), sums[k]);
        if (j < n) more[k] = multiply_add(load_some(x + j, n - j), load_some(of + j, n - j), more[k]);
        lanes[k] = add(sums[k], more[k]);
    }
}

/* out += the values weighed by `weights`, n of them. */
INLINE void add_weighed(float *out, const float *values, const float *weights, int n, int dim) {
    int i = 0;
    for (; i + 4 * LANES <= dim; i += 4 * LANES) {
        floats a = load(out + i), b = load(out + i + LANES), c = load(out + i + 2 * LANES), d = load(out + i + 3 * LANES);
        for (int key = 0; key < n; key++) {
            const float *value = values + (ptrdiff_t)key * dim + i;
            floats weight = all(weights[key]);
            a = multiply_add(weight, load(value), a), b = multiply_add(weight, load(value + LANES), b);
            c = multiply_add(weight, load(value + 2 * LANES), c), d = multiply_add(weight, load(value + 3 * LANES), d);
        }
        store(out + i, a), store(out + i + LANES, b), store(out + i + 2 * LANES, c), store(out + i + 3 * LANES, d);
    }
    for (; i < dim; i++)
        for (int key = 0; key < n; key++) out[i] += weights[key] * values[(ptrdiff_t)key * dim + i];
}

/* One head's query and the keys from `begin` to `end`, at most KEYS_AT_A_TIME; what was attended to before is in `out`
   and `state` (arXiv 2205.14135). */
static void attend(const attention *at, const float *query, int kv_head, int begin, int end, float *out, float state[2]) {
    int dim = at->head_dim, n = end - begin;
    const float *keys = at->keys + ((ptrdiff_t)kv_head * at->capacity + begin) * dim;
    float scores[KEYS_AT_A_TIME + LANES];
    for (int key = 0; key < n; key += 4) {
        floats lanes[4];
        if (key + 4 <= n)
            lanes_of_products(lanes, query, keys + (ptrdiff_t)key * dim, dim);
        else
            for (int i = 0; i < 4; i++)
                lanes[i] = key + i < n ? lanes_of_product(query, keys + (ptrdiff_t)(key + i) * dim, dim) : all(0);
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
    add_weighed(out, at->values + ((ptrdiff_t)kv_head * at->capacity + begin) * dim, scores, n, dim);
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
                attend(at, at->qkv + (ptrdiff_t)row * width + head * dim, kv_head, start, end, at->out + place * dim,
                       at->states + place * 2);
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
