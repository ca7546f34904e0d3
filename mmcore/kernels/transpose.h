/* A square of vectors turned. `vec`, LANES and the orders LOW_HALVES and HIGH_HALVES are those of the header that includes this. */
#ifndef MM_TRANSPOSE_H
#define MM_TRANSPOSE_H

/* x transposed in place: log2(LANES) rounds of interleaving the first half of the rows with the second. */
INLINE void transpose(vec *x) {
    for (int round = 1; round < LANES; round *= 2) {
        vec y[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = __builtin_shufflevector(x[i], x[i + LANES / 2], LOW_HALVES);
            y[2 * i + 1] = __builtin_shufflevector(x[i], x[i + LANES / 2], HIGH_HALVES);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) x[i] = y[i];
    }
}

#endif
