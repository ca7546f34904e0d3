/* What the kernels ask of a compiler, in a second or less: OpenMP, vectors, this processor's instructions. native.py builds it to
   know whether it can build them. */
#include <omp.h>

#include "product_blocks.h"

/* Threads of a parallel region, after numbers were interleaved there. */
int mm_probe(int threads) {
    int found = 0;
#pragma omp parallel num_threads(threads)
    {
        vec x[LANES];
        for (int i = 0; i < LANES; i++) x[i] = (vec){0} + (float)i;
        transpose(x);
#pragma omp atomic
        found += x[LANES - 1][1] == 1.0f;
    }
    return found;
}
