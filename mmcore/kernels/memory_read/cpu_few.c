/* memory_read in fp32 for a few queries (decoding): one pass over the keys and values, fp32 or fp16, at the pace of memory.

Pairs are read in place, in strips of STRIP. The work is cut into shares of pairs, and by heads where each head's pairs
lie side by side ([B, H, T, D] behind a transpose); in [B, T, H, D] a share takes all heads strip by strip, so that
memory is read in the order in which it lies. Each share leaves a maximum, a sum and a weighted sum of values for each
query, and they are joined in the order of the shares: the result does not depend on timing. */

#include <float.h>
#include <omp.h>

#include "memory_read_call.h"
#include "memory_read_tiles.h"

#define STRIP 32
#define LOG2_E 1.4426950408889634f

/* What a share knows of one query of one head: its bandwidth, the largest score (both in units of ln 2), the sum of the
weights, and, behind them, the weighted sum of values. Rows of `record(size)` floats. */
enum { SCALE, LARGEST, TOTAL, SUMS = 16 };

static long record(long size) { return SUMS + (size + 15) / 16 * 16; }
static long smaller(long a, long b) { return a < b ? a : b; }
static long larger(long a, long b) { return a > b ? a : b; }

/* scores[j] = scale * q . row j, j < count, rounded up to a multiple of LANES by repeating the last row. LANES rows at
a time: a transposition sums all of them across their lanes. */
INLINE void score_rows(float *scores, const float *q, const char *rows, long row, float scale, long count, long size,
                       const int narrow) {
    for (long j = 0; j < count; j += LANES) {
        const char *k[LANES];
        vec s[LANES] = {}, total = {};
        for (int r = 0; r < LANES; r++) k[r] = rows + smaller(j + r, count - 1) * row;
        long d = 0;
        for (; d + LANES <= size; d += LANES) {
            vec x = load(q + d);
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) s[r] += x * load_pair(k[r], d, LANES, narrow);
        }
        if (d < size) {
            vec x = load_part(q + d, size - d);
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) s[r] += x * load_pair(k[r], d, size - d, narrow);
        }
        transpose(s);
#pragma GCC unroll 16
        for (int r = 0; r < LANES; r++) total += s[r];
        store(scores + j, total * scale);
    }
}

/* sums = sums * shrink + sum over j of weights[j] * row j, for `columns` vectors from column d on, where sums begin. */
INLINE void add_columns(float *sums, float shrink, const float *weights, const char *rows, long row, long count, long d,
                        const int columns, const int narrow) {
    vec s[8];
#pragma GCC unroll 8
    for (int i = 0; i < columns; i++) s[i] = load(sums + i * LANES) * shrink;
    for (long j = 0; j < count; j++) {
#pragma GCC unroll 8
        for (int i = 0; i < columns; i++) s[i] += weights[j] * load_pair(rows + j * row, d + i * LANES, LANES, narrow);
    }
#pragma GCC unroll 8
    for (int i = 0; i < columns; i++) store(sums + i * LANES, s[i]);
}

INLINE void add_rows(float *sums, float shrink, const float *weights, const char *rows, long row, long count, long size,
                     const int narrow) {
    long d = 0;
    for (; d + 8 * LANES <= size; d += 8 * LANES) add_columns(sums + d, shrink, weights, rows, row, count, d, 8, narrow);
    for (; d + 4 * LANES <= size; d += 4 * LANES) add_columns(sums + d, shrink, weights, rows, row, count, d, 4, narrow);
    for (; d + LANES <= size; d += LANES) add_columns(sums + d, shrink, weights, rows, row, count, d, 1, narrow);
    if (d < size) {
        vec s = load(sums + d) * shrink;
        for (long j = 0; j < count; j++) s += weights[j] * load_pair(rows + j * row, d, size - d, narrow);
        store(sums + d, s);
    }
}

/* One query of one head meets the pairs [first, end), at most STRIP. */
INLINE void read_strip(const struct call *c, float *state, const float *q, long b, long h, long first, long end,
                       const int narrow) {
    float scores[STRIP];
    long count = end - first, bytes = narrow ? 2 : 4;
    const char *k = pairs_of(c, c->k, c->k_stride, b, first, h), *v = pairs_of(c, c->v, c->v_stride, b, first, h);
    score_rows(scores, q, k, c->k_stride[1] * bytes, state[SCALE], count, c->size, narrow);
    vec tops = splat(state[LARGEST]), sum = {};
    for (long j = 0; j < count; j += LANES) tops = maximum(load(scores + j), tops);
    float top = tops[0];
    for (int i = 1; i < LANES; i++) top = tops[i] > top ? tops[i] : top;
    for (long j = count; j % LANES; j++) scores[j] = -INFINITY; /* weight 0 */
    for (long j = 0; j < count; j += LANES) {
        vec weights = exp2_of(load(scores + j) - top);
        store(scores + j, weights);
        sum += weights;
    }
    float shrink = state[LARGEST] == -FLT_MAX ? 0 : exp2_of(splat(state[LARGEST] - top))[0];
    state[LARGEST] = top;
    state[TOTAL] = state[TOTAL] * shrink + sum_of(sum);
    add_rows(state + SUMS, shrink, scores, v, c->v_stride[1] * bytes, count, c->size, narrow);
}

/* The pairs [first, end) for the heads [head, heads_end) of row b. `states` is the share's [B, H, Tq] records. */
static void read_share(const struct call *c, float *states, long b, long head, long heads_end, long first, long end) {
    long each = record(c->size);
    for (long h = head; h < heads_end; h++)
        for (long i = 0; i < c->queries; i++) {
            float *state = states + ((b * c->heads + h) * c->queries + i) * each;
            long lo, hi, n = reach(c, b, i, &lo, &hi);
            memset(state, 0, each * sizeof(float));
            state[SCALE] = n ? bandwidth(c, h, n) * LOG2_E : 0;
            state[LARGEST] = -FLT_MAX;
        }
    for (long strip = first; strip < end; strip += STRIP) {
        for (long h = head; h < heads_end; h++) {
            for (long i = 0; i < c->queries; i++) {
                long lo, hi, n = reach(c, b, i, &lo, &hi);
                long from = larger(strip, lo), to = smaller(smaller(strip + STRIP, end), hi + 1);
                if (n == 0 || from >= to) continue;
                const float *q = c->q + b * c->q_stride[0] + i * c->q_stride[1] + h * c->q_stride[2];
                float *state = states + ((b * c->heads + h) * c->queries + i) * each;
                if (c->narrow)
                    read_strip(c, state, q, b, h, from, to, 1);
                else
                    read_strip(c, state, q, b, h, from, to, 0);
            }
        }
    }
}

/* Joins the shares of one query of one head. */
static void join(const struct call *c, const float *states, long unit) {
    long each = record(c->size), all = c->batch * c->heads * c->queries, size = c->size;
    long i = unit % c->queries, h = unit / c->queries % c->heads, b = unit / c->queries / c->heads;
    float *out = c->out + (b * c->queries + i) * c->out_row + h * size, top = -FLT_MAX, total = 0;
    memset(out, 0, size * sizeof(float));
    for (long s = 0; s < c->shares; s++) {
        const float *state = states + (s * all + unit) * each;
        top = state[LARGEST] > top ? state[LARGEST] : top;
    }
    for (long s = 0; s < c->shares; s++) {
        const float *state = states + (s * all + unit) * each;
        if (state[TOTAL] == 0) continue; /* nothing of it is read; NaN is not 0 */
        float factor = exp2_of(splat(state[LARGEST] - top))[0];
        total += factor * state[TOTAL];
        for (long d = 0; d < size; d++) out[d] += factor * state[SUMS + d];
    }
    if (total == 0) return;
    for (long d = 0; d < size; d++) out[d] /= total;
}

/* Floats of `states`, [shares, B, H, Tq] records. */
long memory_read_few_scratch(const struct call *c) {
    return c->shares * c->batch * c->heads * c->queries * record(c->size);
}

void memory_read_few(const struct call *c, float *states) {
    long all = c->batch * c->heads * c->queries, each = record(c->size);
    int by_heads = c->k_stride[2] > c->k_stride[1];
    long groups = by_heads ? c->heads : 1, heads = c->heads / groups;
#pragma omp parallel num_threads(c->threads) if (c->threads > 1)
    {
#pragma omp for schedule(static)
        for (long unit = 0; unit < c->batch * groups * c->shares; unit++) {
            long share = unit % c->shares, group = unit / c->shares % groups, b = unit / c->shares / groups;
            long first = c->pairs, end = 0;
            for (long i = 0; i < c->queries; i++) {
                long lo, hi;
                if (reach(c, b, i, &lo, &hi)) first = smaller(first, lo), end = larger(end, hi + 1);
            }
            long length = (larger(0, end - first) + c->shares - 1) / c->shares;
            first += share * length;
            read_share(c, states + share * all * each, b, group * heads, (group + 1) * heads, first,
                       smaller(end, first + length));
        }
#pragma omp for schedule(static)
        for (long unit = 0; unit < all; unit++) join(c, states, unit);
    }
}
