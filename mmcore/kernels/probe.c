/* What the kernels ask of a compiler and its assembler: OpenMP, vectors, this processor's instructions. native.py builds it, in
   about a second, to know whether they can be built. */
#include <omp.h>

#include "product_blocks.h"

/* So that the blocks are assembled: those of all formats, with what this processor has for them. */
block *mm_probe_block(int format, int turned) { return turned ? block_by_depth_of(format) : block_of(format); }

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
