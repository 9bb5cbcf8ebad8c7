/* Products of activations with a matrix of 4- or 8-bit weights.

   A row's result is made by the same operations in the same order whatever else is in the pass: only how many rows of
   weights and of activations are kept in registers at a time depends on it. */
#ifndef EDGE_SPEC_PRODUCTS_H
#define EDGE_SPEC_PRODUCTS_H

#include "activations.h"

/* [n_rows, width] in blocks with a scale each, as MatMulNBits of ONNX Runtime has them: 4 bits with the even weight in
   the lower half of a byte, or 8 bits. `lows`: each block's scale times what stands for 0, negative, [n_rows, lanes],
   where `lanes` is `blocks` rounded up to whole vectors (NULL: nothing is left to take away). Writes its product, plus
   `bias` if it has one, to rows of `out` that are `stride` floats apart. */
typedef struct {
    const uint8_t *packed;
    const float *scales;
    const float *lows;
    const float *bias;
    float *out;
    const activations *in;
    int32_t n_rows, width, block, blocks, bits, stride;
} matrix;

enum { MOST_ACTIVATIONS = 4 };

/* Rows [row, row + W) of the weights times rows [first, first + A) of the activations, `vector` weights at a time. The
   next tile is fetched in the meantime: the processor sees W short stretches that are read at once, and guesses no
   further. */
INLINE void tile(const matrix *m, const int W, const int A, const int bits, const int vector, ptrdiff_t row, ptrdiff_t first) {
    const activations *in = m->in;
    const int blocks = m->blocks, width = m->width, block = m->block, row_bytes = width * bits / 8;
    const int8_t *levels = in->levels + first * width;
    const float *scales = in->scales + first * blocks, *weight_scales = m->scales + row * blocks;
    const uint8_t *packed = m->packed + row * row_bytes;
    floats sums[4][MOST_ACTIVATIONS];
#pragma GCC unroll 8
    for (int w = 0; w < W; w++)
#pragma GCC unroll 8
        for (int a = 0; a < A; a++) sums[w][a] = all(0);
    for (int b = 0; m->lows && b < in->lanes; b += LANES)
#pragma GCC unroll 8
        for (int w = 0; w < W; w++) {
            floats low = load(m->lows + (row + w) * in->lanes + b);
#pragma GCC unroll 8
            for (int a = 0; a < A; a++)
                sums[w][a] = multiply_add(low, load(in->shares + (first + a) * in->lanes + b), sums[w][a]);
        }
    for (int b = 0; b < blocks; b++) {
        sum4 parts[4][MOST_ACTIVATIONS];
#pragma GCC unroll 8
        for (int w = 0; w < W; w++)
#pragma GCC unroll 8
            for (int a = 0; a < A; a++) parts[w][a] = zero4();
        const int end = (b + 1) * block;
        for (int i = b * block; i < end;) {
            if (vector == 64) {
                bytes low[4], high[4];
#pragma GCC unroll 8
                for (int w = 0; w < W; w++) {
                    const uint8_t *at = packed + (ptrdiff_t)w * row_bytes + i / 2;
                    __builtin_prefetch(at + W * row_bytes);
                    bytes x = load_bytes(at);
                    low[w] = low_halves(x), high[w] = high_halves(x);
                }
#pragma GCC unroll 8
                for (int a = 0; a < A; a++) {
                    bytes even = load_bytes(levels + (ptrdiff_t)a * width + i), odd = load_bytes(levels + (ptrdiff_t)a * width + i + 32);
#pragma GCC unroll 8
                    for (int w = 0; w < W; w++) parts[w][a] = add4(add4(parts[w][a], low[w], even), high[w], odd);
                }
            } else {
#pragma GCC unroll 8
                for (int w = 0; w < W; w++) {
                    const uint8_t *at = packed + (ptrdiff_t)w * row_bytes + i * bits / 8;
                    __builtin_prefetch(at + W * row_bytes);
                    if (bits == 4) {
                        bytes x = vector < 32 ? few_halves(at) : halves(at);
#pragma GCC unroll 8
                        for (int a = 0; a < A; a++) {
                            const int8_t *of = levels + (ptrdiff_t)a * width + i;
                            parts[w][a] = add4(parts[w][a], x, vector < 32 ? load_few(of) : load_bytes(of));
                        }
                    } else {
                        weights8 x = prepare8(vector < 32 ? load_few(at) : load_bytes(at));
#pragma GCC unroll 8
                        for (int a = 0; a < A; a++) {
                            const int8_t *of = levels + (ptrdiff_t)a * width + i;
                            parts[w][a] = add8(parts[w][a], x, vector < 32 ? load_few(of) : load_bytes(of));
                        }
                    }
                }
            }
            i += vector;
        }
#pragma GCC unroll 8
        for (int w = 0; w < W; w++) {
            floats weight_scale = all(weight_scales[(ptrdiff_t)w * blocks + b]);
#pragma GCC unroll 8
            for (int a = 0; a < A; a++) {
                floats part = multiply(bits == 4 ? end4(parts[w][a]) : end8(parts[w][a]), weight_scale);
                sums[w][a] = multiply_add(part, all(scales[(ptrdiff_t)a * blocks + b]), sums[w][a]);
            }
        }
    }
    for (int a = 0; a < A; a++) {
        float found[4];
        totals(found, sums[0][a], sums[W > 1 ? 1 : 0][a], sums[W > 2 ? 2 : 0][a], sums[W > 3 ? 3 : 0][a]);
        for (int w = 0; w < W; w++)
            m->out[(first + a) * m->stride + row + w] = found[w] + (m->bias ? m->bias[row + w] : 0);
    }
}

typedef void (*tile_function)(const matrix *, ptrdiff_t row, ptrdiff_t first);

#define TILE(W, A, BITS, VECTOR)                                                                                       \
    static void tile_##W##_##A##_##BITS##_##VECTOR(const matrix *m, ptrdiff_t row, ptrdiff_t first) {                            \
        tile(m, W, A, BITS, VECTOR, row, first);                                                                       \
    }
#define SINGLES(BITS, VECTOR)                                                                                          \
    TILE(1, 1, BITS, VECTOR) TILE(1, 2, BITS, VECTOR) TILE(1, 3, BITS, VECTOR) TILE(1, 4, BITS, VECTOR)
#define SEVERAL(BITS, VECTOR)                                                                                          \
    TILE(4, 1, BITS, VECTOR) TILE(4, 2, BITS, VECTOR) TILE(2, 3, BITS, VECTOR) TILE(2, 4, BITS, VECTOR)
#define KIND(BITS, VECTOR) SINGLES(BITS, VECTOR) SEVERAL(BITS, VECTOR)
KIND(4, 64) KIND(4, 32) KIND(4, 16) KIND(8, 32) KIND(8, 16)

#define ENTRIES(BITS, VECTOR)                                                                                          \
    { { tile_1_1_##BITS##_##VECTOR, tile_1_2_##BITS##_##VECTOR, tile_1_3_##BITS##_##VECTOR,                            \
        tile_1_4_##BITS##_##VECTOR },                                                                                  \
      { tile_4_1_##BITS##_##VECTOR, tile_4_2_##BITS##_##VECTOR, tile_2_3_##BITS##_##VECTOR,                            \
        tile_2_4_##BITS##_##VECTOR } }
/* By kind, by whether it is of a single row of weights, and by rows of activations. */
static const tile_function tiles[5][2][MOST_ACTIVATIONS] = {ENTRIES(4, 64), ENTRIES(4, 32), ENTRIES(4, 16),
                                                            ENTRIES(8, 32), ENTRIES(8, 16)};
/* Of the other ones: as many rows of weights as leave room in the registers. */
static const int several[MOST_ACTIVATIONS] = {4, 4, 2, 2};

static int kind_of(const matrix *m) {
    if (m->bits == 8) return m->block < 32 ? 4 : 3;
    return m->in->paired == 64 ? 0 : m->in->paired == 32 ? 1 : 2;
}

/* Rows [begin, end) of a matrix times all n rows of its activations. */
static void multiply_rows(const matrix *m, ptrdiff_t begin, ptrdiff_t end, int n) {
    const tile_function (*of)[MOST_ACTIVATIONS] = tiles[kind_of(m)];
    for (int first = 0; first < n; first += MOST_ACTIVATIONS) {
        int count = n - first < MOST_ACTIVATIONS ? n - first : MOST_ACTIVATIONS;
        int most = several[count - 1];
        ptrdiff_t row = begin;
        for (; row + most <= end; row += most) of[1][count - 1](m, row, first);
        for (; row < end; row++) of[0][count - 1](m, row, first);
    }
}
#endif
