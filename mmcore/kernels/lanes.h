/* Eight floats at a time in GCC's vector arithmetic, which any processor can be compiled for. Loops over a head's
   numbers are written with it because gcc 12 left half of the same loops in scalar form when they were plain loops
   with `omp simd` reductions, depending on where they were inlined (5 times slower). */
#ifndef MM_LANES_H
#define MM_LANES_H

#include <stddef.h>

#include "shuffled.h"

#define LANES 8
#define LANES_INLINE static inline __attribute__((always_inline))

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef float LanesInMemory __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* The next eight numbers at p; zeros for those that are not among the `left` ones. */
LANES_INLINE Lanes take(const float *p, ptrdiff_t left)
{
    if (left >= LANES)
        return *(const LanesInMemory *)p;
    Lanes v = {0};
    for (ptrdiff_t i = 0; i < left; i++)
        v[i] = p[i];
    return v;
}

/* The inverse of `take`. */
LANES_INLINE void put(float *p, ptrdiff_t left, Lanes v)
{
    if (left >= LANES)
        *(LanesInMemory *)p = v;
    else
        for (ptrdiff_t i = 0; i < left; i++)
            p[i] = v[i];
}

typedef int LanesOrder __attribute__((vector_size(4 * LANES)));

LANES_INLINE float sum_of(Lanes v)
{
    v += SHUFFLED(LanesOrder, v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += SHUFFLED(LanesOrder, v, v, 2, 3, 0, 1, 6, 7, 4, 5);
    v += SHUFFLED(LanesOrder, v, v, 1, 0, 3, 2, 5, 4, 7, 6);
    return v[0];
}

#endif
