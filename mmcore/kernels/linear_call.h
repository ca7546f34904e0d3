/* What linear's products, forward (linear/cpu.c) and backward (linear/cpu_backward.c), are called with, and how they are cut.

In the middle is a block of the result (product_blocks.h). Both operands are copied first into the order in which it reads
them: a panel of B is COLUMNS numbers wide and up to DEPTH words deep, and the panels of a round stay in the second-level
cache; a tile of A is `height` deep rows. What the next tile is copied from is asked for while a block multiplies: copies
had taken an eighth of the time, waiting for memory.

The matrices of a list count as one, with its outputs side by side: four heads' gates fill no panel of their own, X is
copied once for all, and no sum of dX over the matrices is left to others.

bf16 and int8 weights, which have no gradients, meet X in 16 bits where the processor can (narrow_products.h), and so do fp32
operands that are to be ROUNDED, in all three products: a word of a panel or a tile then holds two numbers, and everything
else stays as it is.

Every sum has an order of its own that depends on the shapes alone: neither timing nor the number of threads shows. */
#ifndef LINEAR_CALL_H
#define LINEAR_CALL_H

#include <omp.h>
#include <stdint.h>

#include "linear_matrix.h"
#include "product_blocks.h"
#include "weight_formats.h"

#define PANELS 8 /* of DEPTH words in a round, or more that are less deep */
#define ROUND_FLOATS (PANELS * DEPTH * COLUMNS)

/* A list of matrices, and X [rows, in]; for int8 weights that meet it in 16 bits, `narrow` is X so, words_of(in) words a row,
   and `steps` what each row is counted in. Threads may share `panels`. A tile has `height` rows, and a thread keeps
   `kept` of X. Where operands are ROUNDED,
   X and dX may be bf16 in memory (`x_halves`), and so may all Y and dY (`y_halves`). */
struct call {
    const struct matrix *list;
    const char *x;
    char *dx;
    float *narrow, *steps, *panels;
    whole count, total, rows, in, x_row, height, kept;
    int format, x_halves, y_halves;
    block *block, *block_by_depth;
};

static whole outputs_of(const struct matrix *list, whole count) {
    whole total = 0;
    for (whole i = 0; i < count; i++) total += list[i].out;
    return total;
}

/* The matrix that holds output `n` of all, and the number that it has there. */
static const struct matrix *holder(const struct call *c, whole *n) {
    const struct matrix *m = c->list;
    while (*n >= m->out) *n -= m++->out;
    return m;
}

/* This thread's [first, end) of `count` things; and its rows of X, in whole tiles. */
static void my_share(whole count, whole *first, whole *end) {
    whole thread = omp_get_thread_num(), threads = omp_get_num_threads();
    *first = count * thread / threads, *end = count * (thread + 1) / threads;
}

static void my_rows(const struct call *c, whole *first, whole *end) {
    my_share(parts_of(c->rows, c->height), first, end);
    *first *= c->height, *end = least(c->rows, *end * c->height);
}

#endif
