/* Activations as 8-bit levels, a scale for each block of them. */
#ifndef EDGE_SPEC_ACTIVATIONS_H
#define EDGE_SPEC_ACTIVATIONS_H

#include "vectors.h"

/* Rows of levels, each `width` long. In every `paired` of them (64, 32 or 16; 0: none) the even ones come first, then
   the odd ones, as unpacking 4-bit weights yields them. A row has `blocks` scales, and `lanes` shares: a block's scale
   times the sum of its levels, and zeros up to whole vectors. */
typedef struct {
    int8_t *levels;
    float *scales, *shares;
    int32_t width, block, paired, blocks, lanes;
} activations;

INLINE int rounded(float x) {
    x += 12582912.0f; /* 1.5 * 2^23: what is left of x are the lowest bits */
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (int8_t)bits;
}

/* Quantise one block of row `row`. */
static void quantise(const activations *to, int row, int block, const float *x) {
    int8_t plain[256];
    floats most = all(0), odd = all(0);
    for (int i = 0; i < to->block; i += LANES) {
        floats part = load(x + i);
        most = larger(most, larger(part, multiply(part, all(-1))));
        odd = multiply_add(part, all(0), odd); /* 0, or not a number if one of them is none: a maximum would lose it */
    }
    float scale = largest(most) / 127 + total(odd), inverse = scale > 0 ? 1 / scale : 0;
    for (int i = 0; i < to->block; i++) plain[i] = (int8_t)rounded(x[i] * inverse);
    int sum = 0;
    for (int i = 0; i < to->block; i++) sum += plain[i];
    int8_t *levels = to->levels + (ptrdiff_t)row * to->width + block * to->block;
    if (!to->paired) {
        memcpy(levels, plain, (size_t)to->block);
    } else if (to->paired == 64) {
        for (int i = 0; i < to->block; i += 64)
            for (int j = 0; j < 32; j++) levels[i + j] = plain[i + 2 * j], levels[i + 32 + j] = plain[i + 2 * j + 1];
    } else {
        int half = to->paired / 2;
        for (int i = 0; i < to->block; i += to->paired)
            for (int j = 0; j < half; j++) levels[i + j] = plain[i + 2 * j], levels[i + half + j] = plain[i + 2 * j + 1];
    }
    to->scales[(ptrdiff_t)row * to->blocks + block] = scale;
    to->shares[(ptrdiff_t)row * to->lanes + block] = scale * (float)sum;
}

static void quantise_row(const activations *to, int row, const float *x) {
    for (int block = 0; block < to->blocks; block++) quantise(to, row, block, x + block * to->block);
}
#endif
