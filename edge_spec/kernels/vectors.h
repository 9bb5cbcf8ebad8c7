/* Vectors of floats and of 32 bytes, and the products of weights with activations, for the processor that this is
   compiled for. Everything else is written with these.

   A product of weights w with activations a (-127 to 127) is gathered over one block of at most 256 weights: in a
   `sum4` of weights from 0 to 15, in a `sum8` of weights from 0 to 255, of which ZERO8 is left to be subtracted. */
#ifndef EDGE_SPEC_VECTORS_H
#define EDGE_SPEC_VECTORS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(EDGE_SPEC_PORTABLE)
#include <immintrin.h>

#define LANES 8
typedef __m256 floats;
typedef __m256i bytes;

INLINE floats load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void store(float *p, floats x) { _mm256_storeu_ps(p, x); }
INLINE floats load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE void store_f16(uint16_t *p, floats x) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE floats all(float x) { return _mm256_set1_ps(x); }
INLINE floats add(floats a, floats b) { return _mm256_add_ps(a, b); }
INLINE floats multiply(floats a, floats b) { return _mm256_mul_ps(a, b); }
INLINE floats multiply_add(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE floats divide(floats a, floats b) { return _mm256_div_ps(a, b); }
INLINE floats larger(floats a, floats b) { return _mm256_max_ps(a, b); }
INLINE floats smaller(floats a, floats b) { return _mm256_min_ps(a, b); }
INLINE floats nearest(floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* 2 to the power of whole numbers from -126 to 127. */
INLINE floats power_of_two(floats x) {
    __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
/* The sums of the lanes of four vectors. */
INLINE void totals(float sums[4], floats a, floats b, floats c, floats d) {
    floats x = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}

INLINE bytes load_bytes(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE bytes low_halves(bytes x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
INLINE bytes high_halves(bytes x) { return low_halves(_mm256_srli_epi16(x, 4)); }
/* The low halves of 16 bytes, and behind them the high ones. */
INLINE bytes halves(const uint8_t *p) {
    __m128i x = _mm_loadu_si128((const __m128i *)p);
    return low_halves(_mm256_inserti128_si256(_mm256_castsi128_si256(x), _mm_srli_epi16(x, 4), 1));
}

/* 16 bytes, and of 8 bytes the low halves and behind them the high ones; zeros behind them. */
INLINE bytes load_few(const void *p) { return _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)p)); }
INLINE bytes few_halves(const uint8_t *p) {
    __m128i x = _mm_loadl_epi64((const __m128i *)p);
    return low_halves(_mm256_zextsi128_si256(_mm_unpacklo_epi64(x, _mm_srli_epi16(x, 4))));
}

typedef __m256i sum4, sum8;
INLINE sum4 zero4(void) { return _mm256_setzero_si256(); }
INLINE sum8 zero8(void) { return _mm256_setzero_si256(); }

#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
#define KERNEL "vnni"
#define ZERO8 128
#define WIDE 1
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
INLINE __m256i dot(__m256i sum, bytes w, bytes a) { return _mm256_dpbusd_epi32(sum, w, a); }
#else
INLINE __m256i dot(__m256i sum, bytes w, bytes a) { return _mm256_dpbusd_avx_epi32(sum, w, a); }
#endif
typedef bytes weights8;
INLINE sum4 add4(sum4 sum, bytes w, bytes a) { return dot(sum, w, a); }
INLINE floats end4(sum4 sum) { return _mm256_cvtepi32_ps(sum); }
INLINE weights8 prepare8(bytes w) { return w; }
INLINE sum8 add8(sum8 sum, weights8 w, bytes a) { return dot(sum, w, a); }
#else
#define KERNEL "avx2"
#define ZERO8 0
/* 16 products of at most 15 * 127 fit in 16 bits, so a whole block does. */
INLINE sum4 add4(sum4 sum, bytes w, bytes a) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, a)); }
INLINE floats end4(sum4 sum) { return _mm256_cvtepi32_ps(_mm256_madd_epi16(sum, _mm256_set1_epi16(1))); }
/* The sizes of w - 128 times activations with its signs: two products of at most 128 * 127 fit in 16 bits. */
typedef struct { bytes size, sign; } weights8;
INLINE weights8 prepare8(bytes w) {
    bytes centred = _mm256_xor_si256(w, _mm256_set1_epi8((char)128));
    return (weights8){_mm256_abs_epi8(centred), centred};
}
INLINE sum8 add8(sum8 sum, weights8 w, bytes a) {
    __m256i pairs = _mm256_maddubs_epi16(w.size, _mm256_sign_epi8(a, w.sign));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif
INLINE floats end8(sum8 sum) { return _mm256_cvtepi32_ps(sum); }

#elif defined(__ARM_FEATURE_DOTPROD) && !defined(EDGE_SPEC_PORTABLE)
#include <arm_neon.h>

#define LANES 4
#define KERNEL "dotprod"
#define ZERO8 0
#define WIDE 1
typedef float32x4_t floats;
typedef int8x16x2_t bytes;

INLINE floats load(const float *p) { return vld1q_f32(p); }
INLINE void store(float *p, floats x) { vst1q_f32(p, x); }
INLINE floats load_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
INLINE void store_f16(uint16_t *p, floats x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
INLINE floats all(float x) { return vdupq_n_f32(x); }
INLINE floats add(floats a, floats b) { return vaddq_f32(a, b); }
INLINE floats multiply(floats a, floats b) { return vmulq_f32(a, b); }
INLINE floats multiply_add(floats a, floats b, floats c) { return vfmaq_f32(c, a, b); }
INLINE floats divide(floats a, floats b) { return vdivq_f32(a, b); }
INLINE floats larger(floats a, floats b) { return vmaxq_f32(a, b); }
INLINE floats smaller(floats a, floats b) { return vminq_f32(a, b); }
INLINE floats nearest(floats x) { return vrndnq_f32(x); }
INLINE floats power_of_two(floats x) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(x), vdupq_n_s32(127)), 23));
}
INLINE void totals(float sums[4], floats a, floats b, floats c, floats d) {
    vst1q_f32(sums, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}

INLINE bytes load_bytes(const void *p) { return vld1q_s8_x2((const int8_t *)p); }
INLINE bytes low_halves(bytes x) {
    return (bytes){{vandq_s8(x.val[0], vdupq_n_s8(15)), vandq_s8(x.val[1], vdupq_n_s8(15))}};
}
INLINE int8x16_t shifted(int8x16_t x) { return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(x), 4)); }
INLINE bytes high_halves(bytes x) { return (bytes){{shifted(x.val[0]), shifted(x.val[1])}}; }
INLINE bytes halves(const uint8_t *p) {
    int8x16_t x = vld1q_s8((const int8_t *)p);
    return (bytes){{vandq_s8(x, vdupq_n_s8(15)), shifted(x)}};
}

INLINE bytes load_few(const void *p) { return (bytes){{vld1q_s8((const int8_t *)p), vdupq_n_s8(0)}}; }
INLINE bytes few_halves(const uint8_t *p) {
    uint8x8_t x = vld1_u8(p);
    uint8x16_t both = vcombine_u8(vand_u8(x, vdup_n_u8(15)), vshr_n_u8(x, 4));
    return (bytes){{vreinterpretq_s8_u8(both), vdupq_n_s8(0)}};
}

typedef int32x4_t sum4, sum8;
typedef bytes weights8;
INLINE sum4 zero4(void) { return vdupq_n_s32(0); }
INLINE sum8 zero8(void) { return vdupq_n_s32(0); }
INLINE sum4 add4(sum4 sum, bytes w, bytes a) { return vdotq_s32(vdotq_s32(sum, w.val[0], a.val[0]), w.val[1], a.val[1]); }
INLINE floats end4(sum4 sum) { return vcvtq_f32_s32(sum); }
INLINE weights8 prepare8(bytes w) {
    return (bytes){{veorq_s8(w.val[0], vdupq_n_s8(-128)), veorq_s8(w.val[1], vdupq_n_s8(-128))}};
}
INLINE sum8 add8(sum8 sum, weights8 w, bytes a) { return add4(sum, w, a); }
INLINE floats end8(sum8 sum) { return vcvtq_f32_s32(sum); }

#else /* What every compiler has: right everywhere, and quick nowhere. */

#define LANES 4
#define KERNEL "portable"
#define ZERO8 128
typedef float floats __attribute__((vector_size(16)));
typedef struct { uint8_t of[32]; } bytes;

INLINE floats load(const float *p) { floats x; memcpy(&x, p, sizeof x); return x; }
INLINE void store(float *p, floats x) { memcpy(p, &x, sizeof x); }
/* Numbers in 16 bits as IEEE 754 has them: 10 bits behind the point, exponents from -14 to 15, smaller ones in steps. */
INLINE float from_f16(uint16_t half) {
    int exponent = half >> 10 & 31, fraction = half & 1023;
    float size = exponent == 31 ? fraction ? NAN : INFINITY
                 : exponent     ? ldexpf((float)(1024 + fraction), exponent - 25)
                                : ldexpf((float)fraction, -24);
    return half & 0x8000 ? -size : size;
}
INLINE uint16_t to_f16(float x) {
    uint16_t sign = signbit(x) ? 0x8000 : 0;
    x = fabsf(x);
    if (x == 0) return sign;
    if (x != x) return 0x7e00;
    if (x >= 65520) return sign | 0x7c00; /* halfway between the largest one and the next that there would be */
    int exponent;
    frexpf(x, &exponent);
    if (exponent < -13) exponent = -13;
    int steps = (int)nearbyintf(ldexpf(x, 11 - exponent)); /* 1024 to 2048, fewer of the smallest */
    return sign | (uint16_t)(((exponent + 13) << 10) + steps);
}
INLINE floats load_f16(const uint16_t *p) { floats x; for (int i = 0; i < 4; i++) x[i] = from_f16(p[i]); return x; }
INLINE void store_f16(uint16_t *p, floats x) { for (int i = 0; i < 4; i++) p[i] = to_f16(x[i]); }
INLINE floats all(float x) { return (floats){x, x, x, x}; }
INLINE floats add(floats a, floats b) { return a + b; }
INLINE floats multiply(floats a, floats b) { return a * b; }
INLINE floats multiply_add(floats a, floats b, floats c) { return a * b + c; }
INLINE floats divide(floats a, floats b) { return a / b; }
INLINE floats larger(floats a, floats b) { for (int i = 0; i < 4; i++) a[i] = a[i] > b[i] ? a[i] : b[i]; return a; }
INLINE floats smaller(floats a, floats b) { for (int i = 0; i < 4; i++) a[i] = a[i] < b[i] ? a[i] : b[i]; return a; }
INLINE floats nearest(floats x) { for (int i = 0; i < 4; i++) x[i] = nearbyintf(x[i]); return x; }
INLINE floats power_of_two(floats x) { for (int i = 0; i < 4; i++) x[i] = ldexpf(1, (int)x[i]); return x; }
INLINE float total_of(floats x) { return (x[0] + x[1]) + (x[2] + x[3]); }
INLINE void totals(float sums[4], floats a, floats b, floats c, floats d) {
    sums[0] = total_of(a), sums[1] = total_of(b), sums[2] = total_of(c), sums[3] = total_of(d);
}

INLINE bytes load_bytes(const void *p) { bytes x; memcpy(&x, p, sizeof x); return x; }
INLINE bytes low_halves(bytes x) { for (int i = 0; i < 32; i++) x.of[i] &= 15; return x; }
INLINE bytes high_halves(bytes x) { for (int i = 0; i < 32; i++) x.of[i] >>= 4; return x; }
INLINE bytes halves(const uint8_t *p) {
    bytes x;
    for (int i = 0; i < 16; i++) x.of[i] = p[i] & 15, x.of[16 + i] = p[i] >> 4;
    return x;
}

INLINE bytes load_few(const void *p) { bytes x = {{0}}; memcpy(&x, p, 16); return x; }
INLINE bytes few_halves(const uint8_t *p) {
    bytes x = {{0}};
    for (int i = 0; i < 8; i++) x.of[i] = p[i] & 15, x.of[8 + i] = p[i] >> 4;
    return x;
}

typedef struct { int32_t of[4]; } sum4;
typedef sum4 sum8;
typedef bytes weights8;
INLINE sum4 zero4(void) { return (sum4){{0}}; }
INLINE sum8 zero8(void) { return zero4(); }
INLINE sum4 add4(sum4 sum, bytes w, bytes a) {
    for (int i = 0; i < 32; i++) sum.of[i % 4] += w.of[i] * (int8_t)a.of[i];
    return sum;
}
INLINE floats end4(sum4 sum) { return (floats){sum.of[0], sum.of[1], sum.of[2], sum.of[3]}; }
INLINE weights8 prepare8(bytes w) { return w; }
INLINE sum8 add8(sum8 sum, weights8 w, bytes a) { return add4(sum, w, a); }
INLINE floats end8(sum8 sum) { return end4(sum); }
#endif

INLINE float total(floats x) {
    float sums[4];
    totals(sums, x, x, x, x);
    return sums[0];
}

INLINE float largest(floats x) {
    float of[LANES], found;
    store(of, x);
    found = of[0];
    for (int i = 1; i < LANES; i++) found = of[i] > found ? of[i] : found;
    return found;
}

/* The first n < LANES floats, and zeros behind them: what lies there is not touched. */
INLINE floats load_some(const float *p, int n) {
    float of[LANES] = {0};
    for (int i = 0; i < n; i++) of[i] = p[i];
    return load(of);
}

/* e^x within 2 units in the last place, by the polynomial of Cephes' expf (Moshier); below -87 as of -87. What is not a
   number has to come second in `larger` and `smaller`, or it is lost there. */
INLINE floats exponential(floats x) {
    x = larger(all(-87.0f), smaller(all(88.0f), x));
    floats n = nearest(multiply(x, all(1.44269504088896341f)));
    x = multiply_add(n, all(-0.693359375f), x);
    x = multiply_add(n, all(2.12194440e-4f), x);
    floats p = all(1.9875691500e-4f);
    p = multiply_add(p, x, all(1.3981999507e-3f));
    p = multiply_add(p, x, all(8.3334519073e-3f));
    p = multiply_add(p, x, all(4.1665795894e-2f));
    p = multiply_add(p, x, all(1.6666665459e-1f));
    p = multiply_add(p, x, all(5.0000001201e-1f));
    p = add(multiply_add(p, multiply(x, x), x), all(1.0f));
    return multiply(p, power_of_two(n));
}

/* tanh x = 1 - 2 / (e^2x + 1). */
INLINE floats hyperbolic_tangent(floats x) {
    floats one = all(1.0f);
    return add(one, divide(all(-2.0f), add(exponential(add(x, x)), one)));
}
#endif
