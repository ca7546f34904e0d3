/* fp32 rounded to bf16. */
#ifndef MM_BF16_H
#define MM_BF16_H

#include <stdint.h>
#include <string.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

/* bf16 nearest to x, ties to even; a NaN stays one. */
static inline uint16_t nearest_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* `count` numbers as bf16. */
static inline void round_to_bf16(uint16_t *to, const float *x, int64_t count) {
    int64_t i = 0;
#ifdef __AVX512BF16__
    for (; i + 32 <= count; i += 32) {
        __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16), _mm512_loadu_ps(x + i));
        memcpy(to + i, &both, sizeof both);
    }
#endif
    for (; i < count; i++) to[i] = nearest_bf16(x[i]);
}

#endif
