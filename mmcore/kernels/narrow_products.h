/* Products of numbers of 16 bits, two neighbours of x by two of W in an instruction and lane.

   bf16 weights, and fp32 numbers that are rounded to it, meet in bf16 where the processor has AVX512-BF16, and their sums are
   fp32. int8 weights meet x as whole numbers of 16 bits, a step of each row's own being its largest number over 32,767, and
   their sums are exact. Zen 4 does as many of either instruction as fused multiply-adds, 3.65 G a second and core, so twice the products of fp32,
   and nothing need be widened to fp32. Of a row's largest number the step is 3e-5: its error is below 1.1e-3 of a
   product's size for any x of 16,384 numbers, where rounding to bf16 has 1.1e-3 of each, and int8 itself some 1e-2.

   A processor without the instruction widens weights to fp32 and rounds nothing. LANES is whose header this follows. */
#ifndef MM_NARROW_PRODUCTS_H
#define MM_NARROW_PRODUCTS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "bf16.h"
#include "weight_formats.h"

#ifdef __AVX2__
#include <immintrin.h>
#define NARROW_INT8 1
#else
#define NARROW_INT8 0
#endif
#ifdef __AVX512BF16__
#define NARROW_BF16 1
#else
#define NARROW_BF16 0
#endif

/* Whether weights of this format are multiplied in 16 bits here. */
#define NARROW(format) ((format) == FP32 ? 0 : (format) == INT8 ? NARROW_INT8 : NARROW_BF16)

#define EXACT_PAIRS 256 /* that a lane can add, each at most 2 x 128 x 32,767, before 32 bits overflow */
#define LARGEST_STEP 32767

typedef int32_t nvec __attribute__((vector_size(4 * LANES))); /* pairs of 16-bit numbers, or sums' bits */
typedef float nfloats __attribute__((vector_size(4 * LANES)));
typedef int loose_int __attribute__((may_alias)); /* as floats, words that look like signalling NaNs would change */

/* sum + the lanes' two products of a and b. The sum is whole for int8, and the bits of floats for bf16. */
static inline __attribute__((always_inline)) nvec add_products(nvec sum, nvec a, nvec b, const int format) {
#ifdef __AVX512BF16__
    if (format != INT8) { /* the intrinsic's own type costs a copy of every sum in gcc 12 */
        __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
        return sum;
    }
#endif
#if defined(__AVX512VNNI__)
    return (nvec)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return sum + (nvec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
    return (nvec)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
    return sum + (nvec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    (void)a, (void)b, (void)format;
    return sum;
#endif
}

/* Sums as floats. */
static inline __attribute__((always_inline)) nfloats sums_as_floats(nvec sum, const int format) {
    nfloats x;
    memcpy(&x, &sum, sizeof x);
    return format == INT8 ? __builtin_convertvector(sum, nfloats) : x;
}

/* The next 2 LANES weights at p. */
static inline __attribute__((always_inline)) nvec narrow_weights(const char *p, const int format) {
    nvec v = {0};
#ifdef __AVX2__
    if (format == INT8) {
#if defined(__AVX512BW__)
        return (nvec)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)p));
#else
        return (nvec)_mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)p));
#endif
    }
#endif
    memcpy(&v, p, sizeof v);
    return v;
}

/* Words of two numbers rounded to bf16: low's in the low halves, high's in the high ones. */
static inline __attribute__((always_inline)) nvec rounded_pairs(nfloats low, nfloats high) {
#ifdef __AVX512BF16__
    const __m512i apart = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (nvec)_mm512_permutexvar_epi16(apart, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
    nvec words;
    for (int i = 0; i < LANES; i++) words[i] = (int32_t)(nearest_bf16(low[i]) | (uint32_t)nearest_bf16(high[i]) << 16);
    return words;
#endif
}

/* 2 LANES numbers rounded to bf16, neighbours in a word. */
static inline __attribute__((always_inline)) nvec rounded_neighbours(nfloats first, nfloats second) {
#ifdef __AVX512BF16__
    return (nvec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
    float x[2 * LANES];
    uint16_t halves[2 * LANES];
    nvec words;
    memcpy(x, &first, sizeof first), memcpy(x + LANES, &second, sizeof second);
    round_to_bf16(halves, x, 2 * LANES);
    memcpy(&words, halves, sizeof words);
    return words;
#endif
}

/* What a row's numbers are counted in: 1 for bf16. For int8 NaN or infinite where one of them is, and with it every product
   of the row; and 0 where all are so small that nothing is worth a product. */
static inline float narrow_step(const float *x, int64_t count, int format) {
    int32_t most = 0; /* the bits of absolute values are ordered as these are, NaN above all */
    float largest, step;
    if (format != INT8) return 1;
    for (int64_t i = 0; i < count; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    memcpy(&largest, &most, sizeof largest);
    step = largest / LARGEST_STEP;
    return step < 0x1p-126f ? 0 : step;
}

/* 64 whole numbers of 16 bits as their two bytes: 256 high + low. */
static inline void split_bytes(uint8_t *high, uint8_t *low, const uint16_t *x) {
    for (int i = 0; i < 64; i++) high[i] = x[i] >> 8, low[i] = (uint8_t)x[i];
}

/* Some numbers of a row in 16 bits. */
static inline void narrow(uint16_t *to, const float *x, int64_t count, float step, int format) {
    if (format != INT8) {
        round_to_bf16(to, x, count);
        return;
    }
    const float factor = step > 0 && step < INFINITY ? 1 / step : 0;
    for (int64_t i = 0; i < count; i++) {
        float scaled = x[i] * factor + 0x1.8p23f; /* rounds to a whole number and leaves it in the low bits */
        int32_t bits;
        memcpy(&bits, &scaled, sizeof bits);
        to[i] = (uint16_t)bits;
    }
}

#endif
