/* The arguments of the memory_read kernels, and what a query may read. */
#ifndef MEMORY_READ_CALL_H
#define MEMORY_READ_CALL_H

#include <math.h>

/* The same order as in _call of memory_read/cpu.py; every member has 8 bytes. Strides count numbers, in the order batch,
time, head; the head size always has stride 1. */
struct call {
    long batch, queries, pairs, heads, size;
    long window, delay, offset; /* window 0: no window */
    const float *q, *k, *v;
    long q_stride[3], k_stride[3], v_stride[3];
    const float *base, *slope, *exponent; /* [H] */
    const int *starts;                    /* [B, Tq], or NULL */
    float *out;                           /* [B, Tq, H, D], `out_row` floats from query to query */
    float *largest, *total; /* [B, H, Tq]: the largest score, in units of ln 2, and the sum of 2^(score - largest) */
    long threads;
    long shares; /* parts into which the queries of each head are cut */
    long narrow; /* keys and values are fp16; not in the backward pass */
    long rounded; /* products meet in bf16 but those of scores, where the processor can */
    long out_row;
};

/* Query i of row b reads the pairs lo .. hi; returns how many they are. */
static inline long reach(const struct call *c, long b, long i, long *lo, long *hi) {
    long position = c->offset + i;
    *lo = c->starts ? c->starts[b * c->queries + i] : 0;
    *hi = position - c->delay;
    if (c->window && position - c->window + 1 > *lo) *lo = position - c->window + 1;
    if (*lo < 0) *lo = 0;
    if (*hi > c->pairs - 1) *hi = c->pairs - 1;
    return *hi < *lo ? 0 : *hi - *lo + 1;
}

/* Pair `first` of a head of a row. */
static inline const char *pairs_of(const struct call *c, const float *pairs, const long *stride, long b, long first,
                                   long h) {
    return (const char *)pairs + (b * stride[0] + first * stride[1] + h * stride[2]) * (c->narrow ? 2 : 4);
}

/* beta of equation (6) for n > 0 pairs. */
static inline float bandwidth(const struct call *c, long h, long n) {
    return c->slope[h] * powf((float)n, c->exponent[h]) + c->base[h];
}

#endif
