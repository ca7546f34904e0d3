/* Two vectors interleaved, and by rounds of that a square of vectors turned. `vec`, `ivec`, LANES and INLINE are those of the
   header that includes this. */
#ifndef MM_TRANSPOSE_H
#define MM_TRANSPOSE_H

#include "shuffled.h"

#define ROUNDS (LANES == 16 ? 4 : LANES == 8 ? 3 : 2)
#if LANES == 16
#define LOW_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define ROTATED(i) (i)
#elif LANES == 8
#define LOW_HALVES 0, 8, 1, 9, 4, 12, 5, 13
#define HIGH_HALVES 2, 10, 3, 11, 6, 14, 7, 15
#define ROTATED(i) (((i) << 1 & 6) | (i) >> 2)
#else
#define LOW_HALVES 0, 4, 1, 5
#define HIGH_HALVES 2, 6, 3, 7
#define ROTATED(i) (i)
#endif

/* The lower or the `upper` halves of a and b, interleaved. AVX has an instruction for that within each of its two lanes and one
   that joins lanes, so with 8 numbers two rounds stay within lanes and the last joins them: half the instructions, and what a
   number's place would be has its bits ROTATED. */
INLINE vec halves(vec a, vec b, const int upper, const int round) {
#if LANES == 8
    if (round == ROUNDS - 1)
        return upper ? SHUFFLED(ivec, a, b, 4, 5, 6, 7, 12, 13, 14, 15) : SHUFFLED(ivec, a, b, 0, 1, 2, 3, 8, 9, 10, 11);
#endif
    (void)round;
    return upper ? SHUFFLED(ivec, a, b, HIGH_HALVES) : SHUFFLED(ivec, a, b, LOW_HALVES);
}

/* x transposed in place: in each round the first half of the rows is interleaved with the second. */
INLINE void transpose(vec *x) {
    vec y[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) y[ROTATED(i)] = x[i];
#pragma GCC unroll 4
    for (int round = 0; round < ROUNDS; round++) {
        vec z[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            z[2 * i] = halves(y[i], y[i + LANES / 2], 0, round);
            z[2 * i + 1] = halves(y[i], y[i + LANES / 2], 1, round);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) y[i] = z[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) x[i] = y[ROTATED(i)];
}

#endif
