/* One pass of a decoder: a list of steps that a team of threads goes through together.

   Python describes the steps once for a model (edge_spec/kernels/library.py has the same structures) and calls
   `edge_spec_run` for every pass, from each thread of the team. */
#include <stdatomic.h>
#include <stddef.h>

#include "attention.h"
#include "products.h"

#if defined(_WIN32)
#include <windows.h>
#else
#include <sched.h>
#endif

enum kind { NORM, MULTIPLY, GATE, CACHE, ATTEND, REACH, CAP, TOP };
enum rows { EVERY, PICKED, WANTED }; /* all of a pass; those that are wanted, read from where they were; those, moved up */
enum activation { NONE, SILU, GELU };

typedef struct {
    int32_t n_rows, past, n_wanted, n_threads;
    const int64_t *wanted;
} pass;

/* sum = x + branch (NULL: nothing is added, nor written); out = sum normed, and as levels where they are not NULL. */
typedef struct {
    const float *x, *branch, *gain;
    float *sum, *out;
    const activations *levels[2];
    int32_t width, x_stride, rows;
    float epsilon;
} norm_step;

/* Matrices whose products of the same rows are made together. */
typedef struct {
    const matrix *matrices;
    int32_t n_matrices, rows;
} multiply_step;

/* The activation of `gate` times `up` (NULL: `gate` as it is), as levels. */
typedef struct {
    const float *gate, *up;
    const activations *levels[2];
    int32_t stride, activation, rows;
} gate_step;

/* Scores of tokens beside a trimmed head: out = x times `columns` [width, n], capped, plus bias. */
typedef struct {
    const float *x, *columns, *bias;
    float *out;
    int32_t width, n, stride;
    float cap;
} reach_step;

/* x becomes cap * tanh(x / cap). */
typedef struct {
    float *x;
    int32_t n, stride;
    float cap;
} cap_step;

/* The k largest of each row, falling, where they are, and the logarithm of the sum of exp over all. */
typedef struct {
    const float *x;
    float *largest, *log_sum;
    int64_t *places;
    int32_t n, stride, k;
} top_step;

typedef struct {
    int64_t kind;
    const void *of;
} step;

typedef struct {
    atomic_int arrived, round, next[2], abandoned;
    int32_t n_threads;
} team;

static int rows_of(int rows, const pass *p) { return rows == EVERY ? p->n_rows : p->n_wanted; }

static void run_norm(const norm_step *s, const pass *p, int row) {
    const float *x = s->x + (s->rows == PICKED ? p->wanted[row] : row) * s->x_stride;
    if (s->branch) {
        const float *branch = s->branch + (ptrdiff_t)row * s->width;
        float *sum = s->sum + (ptrdiff_t)row * s->width;
        for (int i = 0; i < s->width; i++) sum[i] = x[i] + branch[i];
        x = sum;
    }
    float *out = s->out + (ptrdiff_t)row * s->width;
    norm(x, s->gain, out, s->width, s->epsilon);
    for (int i = 0; i < 2; i++)
        if (s->levels[i]) quantise_row(s->levels[i], row, out);
}

enum { GATED_AT_A_TIME = 1024, SHARES_OF_A_THREAD = 6 };

static floats activated(int activation, floats x) {
    if (activation == SILU) return divide(x, add(all(1), exponential(multiply(x, all(-1)))));
    if (activation == NONE) return x;
    floats inner = multiply_add(multiply(multiply(x, x), x), all(0.044715f), x);
    floats tanh = hyperbolic_tangent(multiply(inner, all(0.7978845608f)));
    return multiply(multiply(x, all(0.5f)), add(tanh, all(1)));
}

static void run_gate(const gate_step *s, const pass *p, int unit) {
    const activations *to = s->levels[0];
    int a_row = (to->width + GATED_AT_A_TIME - 1) / GATED_AT_A_TIME, row = unit / a_row;
    int begin = unit % a_row * GATED_AT_A_TIME, end = begin + GATED_AT_A_TIME;
    if (end > to->width) end = to->width;
    ptrdiff_t from = (s->rows == PICKED ? p->wanted[row] : row) * s->stride;
    float x[GATED_AT_A_TIME];
    for (int i = begin; i < end; i += LANES) {
        floats gated = activated(s->activation, load(s->gate + from + i));
        store(x + i - begin, s->up ? multiply(gated, load(s->up + from + i)) : gated);
    }
    for (int k = 0; k < 2; k++)
        for (int i = begin; s->levels[k] && i < end; i += s->levels[k]->block)
            quantise(s->levels[k], row, i / s->levels[k]->block, x + i - begin);
}

/* A stretch of the rows of weights stays in the processor's cache while all activations go by. */
static ptrdiff_t stretch(const matrix *m) {
    ptrdiff_t rows = 24576 / (m->width * m->bits / 8) / 4 * 4;
    return rows < 4 ? 4 : rows;
}

/* Rows of weights that a thread takes on at once: so many that reading them is one long stream, and so few that the
   threads are done at about the same time. */
static ptrdiff_t share(const matrix *m, const pass *p) {
    ptrdiff_t size = stretch(m), wanted = m->n_rows / (SHARES_OF_A_THREAD * p->n_threads);
    return wanted < size ? size : wanted / size * size;
}

static int shares(const matrix *m, const pass *p) {
    ptrdiff_t size = share(m, p);
    return (int)((m->n_rows + size - 1) / size);
}

static void run_multiply(const multiply_step *s, const pass *p, int unit) {
    const matrix *m = s->matrices;
    for (; unit >= shares(m, p); m++) unit -= shares(m, p);
    ptrdiff_t end = (unit + 1) * share(m, p);
    if (end > m->n_rows) end = m->n_rows;
    for (ptrdiff_t begin = unit * share(m, p); begin < end; begin += stretch(m))
        multiply_rows(m, begin, begin + stretch(m) < end ? begin + stretch(m) : end, rows_of(s->rows, p));
}

enum { REACHED_AT_A_TIME = 64 };

/* Query heads that share a head of keys, as many as leave work for every thread. */
static int heads_at_a_time(const attention *at, const pass *p) {
    int group = at->n_head / at->n_kv_head, size = at->n_head / p->n_threads;
    if (size > MOST_HEADS) size = MOST_HEADS;
    if (size > group) size = group;
    return size < 1 ? 1 : size;
}

static void run_attend(const attention *at, const pass *p, int unit) {
    int group = at->n_head / at->n_kv_head, size = heads_at_a_time(at, p), units = (group + size - 1) / size;
    int first = unit / units * group + unit % units * size, end = (unit / units + 1) * group;
    attend_heads(at, first, first + size < end ? size : end - first, p->n_rows, p->past);
}

static float capped(float x, float cap) { return cap ? cap * tanhf(x / cap) : x; }

static void run_reach(const reach_step *s, const pass *p, int unit) {
    int begin = unit * REACHED_AT_A_TIME;
    for (int row = 0; row < p->n_wanted; row++) {
        float *out = s->out + (ptrdiff_t)row * s->stride + begin, sums[REACHED_AT_A_TIME] = {0};
        const float *x = s->x + (ptrdiff_t)row * s->width;
        for (int i = 0; i < s->width; i++)
            for (int j = 0; j < REACHED_AT_A_TIME; j += LANES)
                store(sums + j, multiply_add(all(x[i]), load(s->columns + (ptrdiff_t)i * s->n + begin + j), load(sums + j)));
        for (int j = 0; j < REACHED_AT_A_TIME; j++) out[j] = capped(sums[j], s->cap) + s->bias[begin + j];
    }
}

static void run_top(const top_step *s, int row) {
    const float *x = s->x + (ptrdiff_t)row * s->stride;
    float *largest = s->largest + (ptrdiff_t)row * s->k;
    int64_t *places = s->places + (ptrdiff_t)row * s->k;
    int kept = 0;
    for (int i = 0; i < s->n; i++) {
        if (kept == s->k && !(x[i] > largest[kept - 1])) continue;
        int at = kept < s->k ? kept++ : kept - 1;
        for (; at && x[i] > largest[at - 1]; at--) largest[at] = largest[at - 1], places[at] = places[at - 1];
        largest[at] = x[i], places[at] = i;
    }
    floats sum = all(0), most = all(-largest[0]);
    int i = 0;
    for (; i + LANES <= s->n; i += LANES) sum = add(sum, exponential(add(load(x + i), most)));
    float rest = 0;
    for (; i < s->n; i++) rest += expf(x[i] - largest[0]);
    s->log_sum[row] = largest[0] + logf(total(sum) + rest);
}

static int units_of(const step *s, const pass *p) {
    switch (s->kind) {
    case NORM: return rows_of(((const norm_step *)s->of)->rows, p);
    case MULTIPLY: {
        const multiply_step *of = s->of;
        int units = 0;
        for (int i = 0; i < of->n_matrices; i++) units += shares(of->matrices + i, p);
        return units;
    }
    case GATE: {
        const gate_step *of = s->of;
        return rows_of(of->rows, p) * ((of->levels[0]->width + GATED_AT_A_TIME - 1) / GATED_AT_A_TIME);
    }
    case CACHE: return p->n_rows;
    case ATTEND: {
        const attention *of = s->of;
        int group = of->n_head / of->n_kv_head, size = heads_at_a_time(of, p);
        return of->n_kv_head * ((group + size - 1) / size);
    }
    case REACH: return ((const reach_step *)s->of)->n / REACHED_AT_A_TIME;
    default: return p->n_wanted;
    }
}

static void run_unit(const step *s, const pass *p, int unit) {
    switch (s->kind) {
    case NORM: run_norm(s->of, p, unit); break;
    case MULTIPLY: run_multiply(s->of, p, unit); break;
    case GATE: run_gate(s->of, p, unit); break;
    case CACHE: cache_row(s->of, unit, p->past + unit); break;
    case ATTEND: run_attend(s->of, p, unit); break;
    case REACH: run_reach(s->of, p, unit); break;
    case CAP: {
        const cap_step *of = s->of;
        for (int i = 0; i < of->n; i++) of->x[(ptrdiff_t)unit * of->stride + i] = capped(of->x[(ptrdiff_t)unit * of->stride + i], of->cap);
        break;
    }
    case TOP: run_top(s->of, unit); break;
    }
}

static void pause_briefly(int spins) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
    if (spins % 4096 < 4095) return;
    /* Somebody else has the core of the one that is waited for. */
#if defined(_WIN32)
    SwitchToThread();
#else
    sched_yield();
#endif
}

/* Wait for the others, unless one of them will not come; the last one makes the counter of the step behind them ready
   for the one after the next. */
static void meet(team *t, int parity) {
    int round = atomic_load_explicit(&t->round, memory_order_acquire);
    if (atomic_fetch_add(&t->arrived, 1) + 1 == t->n_threads) {
        atomic_store(&t->arrived, 0);
        atomic_store(&t->next[parity], 0);
        atomic_store_explicit(&t->round, round + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&t->round, memory_order_acquire) == round; spins++) {
        if (atomic_load_explicit(&t->abandoned, memory_order_relaxed)) return;
        pause_briefly(spins);
    }
}

/* To be called by each of `t->n_threads` threads. A pass that was abandoned has done no one knows what. */
void edge_spec_run(team *t, const step *steps, int n_steps, const pass *p) {
    for (int i = 0; i < n_steps && !atomic_load_explicit(&t->abandoned, memory_order_relaxed); i++) {
        int units = units_of(steps + i, p), unit;
        while ((unit = atomic_fetch_add_explicit(&t->next[i % 2], 1, memory_order_relaxed)) < units)
            run_unit(steps + i, p, unit);
        meet(t, i % 2);
    }
}

/* What is left to be subtracted from 8-bit weights. */
int edge_spec_zero8(void) { return ZERO8; }

const char *edge_spec_kernel(void) { return KERNEL; }
