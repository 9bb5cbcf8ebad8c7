/* Rotary embedding, and attention over cached keys and values. */
#ifndef EDGE_SPEC_ATTENTION_H
#define EDGE_SPEC_ATTENTION_H

#include "vectors.h"

/* Keys of a stretch, fewer where heads are large: at most MOST_DIM numbers of each kind are turned into 32 bits at once. */
enum { KEYS_AT_A_TIME = 64, MOST_HEADS = 3, MOST_DIM = KEYS_AT_A_TIME * 256 };
/* From one query's scores to the next one's: whole vectors of them, and a vector behind. */
enum { SCORES_APART = KEYS_AT_A_TIME + LANES };

/* Queries, keys and values of a pass lie behind each other in rows of `qkv`. The cache is [n_kv_head, capacity,
   head_dim] each for keys, turned, and values, in 32 bits or, where `is_half` is set, in 16; heads have at most MOST_DIM
   numbers. `query_norm` and `key_norm`: gains of each head's queries and keys, NULL: not normed; `cosines` and `sines`:
   [positions, rope_dim / 2], NULL: not turned. `out`: [rows, n_head * head_dim]; `states`: the largest score and the sum
   of each row's heads, [rows, n_head, 2]. */
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

/* The largest number of 16 bits stands for what is larger: infinite scores would be no numbers once weighed. */
INLINE floats within_f16(floats x) { return larger(all(-65504), smaller(all(65504), x)); }

static void cache(void *to, ptrdiff_t place, const float *x, int n, int is_half) {
    if (!is_half) {
        memcpy((float *)to + place, x, sizeof(float) * (size_t)n);
        return;
    }
    uint16_t *out = (uint16_t *)to + place, rest[LANES];
    int i = 0;
    for (; i + LANES <= n; i += LANES) store_f16(out + i, within_f16(load(x + i)));
    if (i == n) return;
    store_f16(rest, within_f16(load_some(x + i, n - i)));
    memcpy(out + i, rest, sizeof(uint16_t) * (size_t)(n - i));
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

/* Q queries, which lie behind each other, times K keys: `scores` [query][key], of which four are written. */
INLINE void score(const int Q, const int K, const float *queries, const float *keys, int n, float *scores) {
    floats sums[MOST_HEADS][4];
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
        for (int k = 0; k < K; k++) sums[q][k] = all(0);
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        floats query[MOST_HEADS];
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) query[q] = load(queries + (ptrdiff_t)q * n + i);
#pragma GCC unroll 4
        for (int k = 0; k < K; k++) {
            floats key = load(keys + (ptrdiff_t)k * n + i);
#pragma GCC unroll 4
            for (int q = 0; q < Q; q++) sums[q][k] = multiply_add(query[q], key, sums[q][k]);
        }
    }
    if (i < n)
#pragma GCC unroll 4
        for (int k = 0; k < K; k++) {
            floats key = load_some(keys + (ptrdiff_t)k * n + i, n - i);
#pragma GCC unroll 4
            for (int q = 0; q < Q; q++) sums[q][k] = multiply_add(load_some(queries + (ptrdiff_t)q * n + i, n - i), key, sums[q][k]);
        }
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++)
        totals(scores + q * SCORES_APART, sums[q][0], sums[q][K > 1 ? 1 : 0], sums[q][K > 2 ? 2 : 0], sums[q][K > 3 ? 3 : 0]);
}

/* Scaled scores become weights, `state` the largest score so far and the sum of the weights, and `out` fits them. */
static void weigh(const attention *at, float *scores, int n, float *out, float state[2]) {
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
        for (int i = 0; i < at->head_dim; i++) out[i] *= shrink;
    }
    for (int key = n; key < n + LANES; key++) scores[key] = most - 1e4f; /* next to nothing, in the last vector's lanes */
    floats sum = all(0);
    for (int key = 0; key < n; key += LANES) {
        floats weight = exponential(add(load(scores + key), all(-most)));
        store(scores + key, weight);
        sum = add(sum, weight);
    }
    state[1] += total(sum);
}

/* Vectors [i, i + V) of Q rows of `out` += the values weighed by `weights` [query][key], n of them. */
INLINE void add_weighed(const int Q, const int V, float *out, const float *values, const float *weights, int n, int dim) {
    floats sums[MOST_HEADS][4];
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sums[q][v] = load(out + (ptrdiff_t)q * dim + v * LANES);
    for (int key = 0; key < n; key++) {
        floats weight[MOST_HEADS];
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) weight[q] = all(weights[q * SCORES_APART + key]);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            floats value = load(values + (ptrdiff_t)key * dim + v * LANES);
#pragma GCC unroll 4
            for (int q = 0; q < Q; q++) sums[q][v] = multiply_add(weight[q], value, sums[q][v]);
        }
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) store(out + (ptrdiff_t)q * dim + v * LANES, sums[q][v]);
}

/* What is left of one row of `out`, less than a vector. */
static void add_rest(float *out, const float *values, const float *weights, int n, int dim, int rest) {
    float found[LANES];
    floats sum = load_some(out, rest);
    for (int key = 0; key < n; key++)
        sum = multiply_add(all(weights[key]), load_some(values + (ptrdiff_t)key * dim, rest), sum);
    store(found, sum);
    memcpy(out, found, sizeof(float) * (size_t)rest);
}

/* The queries of Q heads and n keys, at most KEYS_AT_A_TIME; what was attended to before is in `out` and `states`
   (arXiv 2205.14135). */
INLINE void attend(const attention *at, const int Q, const float *queries, const float *keys, const float *values, int n,
                   float *out, float *states) {
    int dim = at->head_dim, key = 0, i = 0;
    float scores[MOST_HEADS * SCORES_APART];
    for (; key + 4 <= n; key += 4) score(Q, 4, queries, keys + (ptrdiff_t)key * dim, dim, scores + key);
    for (; key < n; key++) score(Q, 1, queries, keys + (ptrdiff_t)key * dim, dim, scores + key);
    for (int q = 0; q < Q; q++) weigh(at, scores + q * SCORES_APART, n, out + (ptrdiff_t)q * dim, states + 2 * q);
    for (; i + 4 * LANES <= dim; i += 4 * LANES) add_weighed(Q, 4, out + i, values + i, scores, n, dim);
    for (; i + LANES <= dim; i += LANES) add_weighed(Q, 1, out + i, values + i, scores, n, dim);
    for (int q = 0; i < dim && q < Q; q++)
        add_rest(out + (ptrdiff_t)q * dim + i, values + i, scores + q * SCORES_APART, n, dim, dim - i);
}

typedef void (*attend_function)(const attention *, const float *queries, const float *keys, const float *values, int n,
                                float *out, float *states);
#define HEADS(Q)                                                                                                       \
    static void attend_##Q(const attention *at, const float *queries, const float *keys, const float *values, int n,   \
                           float *out, float *states) {                                                                \
        attend(at, Q, queries, keys, values, n, out, states);                                                          \
    }
HEADS(1) HEADS(2) HEADS(3)
static const attend_function attends[MOST_HEADS] = {attend_1, attend_2, attend_3};

/* n numbers that are cached from place `from` on: where they are, or in 32 bits in `room`. */
static const float *cached(const attention *at, const void *of, ptrdiff_t from, ptrdiff_t n, float *room) {
    if (!at->is_half) return (const float *)of + from;
    const uint16_t *at_first = (const uint16_t *)of + from;
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES) store(room + i, load_f16(at_first + i));
    if (i == n) return room;
    uint16_t some[LANES] = {0};
    float rest[LANES];
    memcpy(some, at_first + i, sizeof(uint16_t) * (size_t)(n - i));
    store(rest, load_f16(some));
    memcpy(room + i, rest, sizeof(float) * (size_t)(n - i));
    return room;
}

/* Query heads [first, first + n), at most MOST_HEADS, which share a head of keys, of all rows of a pass: each stretch of
   keys is read once for all of them. */
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
    float room[2][MOST_DIM];
    int stretch = dim * KEYS_AT_A_TIME > MOST_DIM ? MOST_DIM / dim : KEYS_AT_A_TIME;
    for (int begin = earliest / stretch * stretch; begin < last; begin += stretch) {
        int read = begin + stretch < last ? stretch : last - begin;
        ptrdiff_t from = ((ptrdiff_t)kv_head * at->capacity + begin) * dim;
        const float *keys = cached(at, at->keys, from, (ptrdiff_t)read * dim, room[0]);
        const float *values = cached(at, at->values, from, (ptrdiff_t)read * dim, room[1]);
        for (int row = 0; row < rows; row++) {
            int seen = past + row + 1, since = at->window && seen > at->window ? seen - at->window : 0;
            int start = since > begin ? since : begin, end = begin + stretch < seen ? begin + stretch : seen;
            ptrdiff_t skipped = (ptrdiff_t)(start - begin) * dim;
            ptrdiff_t place = (ptrdiff_t)row * at->n_head + first;
            if (start < end)
                attends[n - 1](at, at->qkv + (ptrdiff_t)row * width + first * dim, keys + skipped, values + skipped, end - start,
                               at->out + place * dim, at->states + place * 2);
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
