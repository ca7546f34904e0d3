/* What the memory_read kernels are made of: vectors, exp2, matrix products of tiles, and packing.

A panel is VECTORS = 3 vectors of queries side by side (4 where there is a matrix unit, whose tiles take 32 numbers), and
scores are stored with the queries as columns. So the softmax of a query runs down a column, without sums across lanes, and the
masks compare whole vectors.

Products are register blocks of 4 rows x VECTORS or 6 rows x 2 vectors: 12 accumulators hide the latency of FMA
(4 cycles, 2 a cycle) and fit the 16 registers of AVX2. On a Zen 3 core all of them ran at 96-98 GFLOP/s, where
the library's fp32 GEMM reached 80-88. */
#ifndef MEMORY_READ_TILES_H
#define MEMORY_READ_TILES_H

#include <string.h>

#include "half.h"
#include "in_register.h"
#include "matrix_tiles.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define VECTOR_MAX(a, b) ((vec)_mm512_max_ps((__m512)(a), (__m512)(b)))
#elif defined(__AVX__)
#include <immintrin.h>
#define LANES 8
#define VECTOR_MAX(a, b) ((vec)_mm256_max_ps((__m256)(a), (__m256)(b)))
#else
#define LANES 4
#endif

#define VECTORS (MATRIX_TILES ? 4 : 3)
#define PANEL (VECTORS * LANES)
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline)) /* inside a larger function the compiler spills the accumulators */

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int ivec __attribute__((vector_size(LANES * 4)));
typedef unsigned uvec __attribute__((vector_size(LANES * 4)));
typedef float loose_vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int loose_ivec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

INLINE vec load(const float *p) { return *(const loose_vec *)p; }
INLINE void store(float *p, vec x) { *(loose_vec *)p = x; }
INLINE ivec load_ints(const int *p) { return *(const loose_ivec *)p; }
INLINE vec splat(float x) { return (vec){} + x; }
INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask)); }

/* The larger of x and best; best where x is NaN. */
INLINE vec maximum(vec x, vec best) {
#ifdef VECTOR_MAX
    return VECTOR_MAX(x, best);
#else
    return choose(x > best, x, best);
#endif
}

INLINE float sum_of(vec x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

/* The first n lanes from memory, zeros in the others; and their way back. */
INLINE vec load_part(const float *p, long n) {
    if (n >= LANES) return load(p);
    vec x = {};
    memcpy(&x, p, (n > 0 ? n : 0) * sizeof(float));
    return x;
}

INLINE void store_part(float *p, vec x, long n) {
    if (n >= LANES)
        store(p, x);
    else if (n > 0)
        memcpy(p, &x, n * sizeof(float));
}

/* The next LANES numbers at number i of a pair, or as many as `left`, zeros beyond. */
INLINE vec load_pair(const char *pair, long i, long left, const int narrow) {
    const uint16_t *halves = (const uint16_t *)pair + i;
    if (!narrow) return load_part((const float *)pair + i, left);
    if (left >= LANES) return HALVES_TO_VECTOR(vec, halves);
    vec x = {};
    for (long n = 0; n < left; n++) x[n] = half_to_float(halves[n]);
    return x;
}

/* 2^x for x <= 0, relative error 1.7e-7; 0 below 2^-126; NaN for NaN. The polynomial is the minimax one of degree 5 on
[-1/2, 1/2] with value 1 at 0; adding 1.5 * 2^23 rounds x to an integer and leaves it in the low bits. */
INLINE vec exp2_of(vec x) {
    const vec magic = splat(0x1.8p23f);
    vec shifted = x + magic;
    vec f = x - (shifted - magic);
    vec p = splat(0.0013264727302712484f);
    p = p * f + splat(0.009671512728792235f);
    p = p * f + splat(0.055507337438119336f);
    p = p * f + splat(0.24022242084015083f);
    p = p * f + splat(0.6931469775983555f);
    p = p * f + splat(1.0f);
    ivec bits = (ivec)((uvec)p + ((uvec)shifted << 23)); /* unsigned: below -126 it runs over */
    return (vec)(bits & ~(x < splat(-126.0f)));
}

/* acc[r][c] += sum over k < depth of a[r * a_row + k * a_step] * b[k * b_step + c * LANES ...]. */
INLINE void multiply(vec *acc, const int rows, const int columns, long depth, const float *a, long a_row, long a_step,
                     const float *b, long b_step) {
    for (long k = 0; k < depth; k++, a += a_step, b += b_step) {
        vec column[VECTORS];
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) {
            column[c] = load(b + c * LANES);
            IN_REGISTER(column[c]);
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
            for (int c = 0; c < columns; c++) acc[r * columns + c] += a[r * a_row] * column[c];
        }
    }
}

/* out[j][PANEL] = rows j of a times the panel b [depth][PANEL], for j in [from, to) in steps of 4 (from % 4 == 0). */
NOINLINE static void rows_times_panel(float *out, const float *a, long a_row, const float *b, long depth, long from,
                                      long to) {
    for (long j = from; j < to; j += 4) {
        vec acc[4 * VECTORS] = {};
        multiply(acc, 4, VECTORS, depth, a + j * a_row, a_row, 1, b, PANEL);
#pragma GCC unroll 16
        for (int i = 0; i < 4 * VECTORS; i++) store(out + j * PANEL + i * LANES, acc[i]);
    }
}

/* out[d][PANEL] = out * scale (a vector for each column; NULL is 1) + sum over rows j in [from, to) of
a[j][d] * b[j][PANEL], for d < size, a multiple of 4. */
NOINLINE static void add_columns_times_panel(float *out, const float *scale, const float *a, long a_row, const float *b,
                                    long size, long from, long to) {
    for (long d = 0; d < size; d += 4) {
        vec acc[4 * VECTORS];
#pragma GCC unroll 16
        for (int i = 0; i < 4 * VECTORS; i++) {
            acc[i] = load(out + d * PANEL + i * LANES);
            if (scale) acc[i] *= load(scale + i % VECTORS * LANES);
        }
        multiply(acc, 4, VECTORS, to - from, a + from * a_row + d, 1, a_row, b + from * PANEL, PANEL);
#pragma GCC unroll 16
        for (int i = 0; i < 4 * VECTORS; i++) store(out + d * PANEL + i * LANES, acc[i]);
    }
}

#include "transpose.h"

/* Calls for rows [from, end) of the `count` that there are, of numbers of so many bytes, to be read or to `write` them. A head's
rows lie heads * size numbers apart, often on pages of their own, where the hardware does not see them coming. */
INLINE void call_rows(const char *rows, long row, long from, long end, long count, long size, const long bytes, const int write) {
    for (long r = from; r < end && r < count; r++)
        for (long d = 0; d < size * bytes; d += 64) {
            if (write)
                __builtin_prefetch(rows + r * row * bytes + d, 1);
            else
                __builtin_prefetch(rows + r * row * bytes + d);
        }
}

/* out[d][PANEL] = column d of `count` rows, each times its scale; zeros beyond count and beyond size. */
static void pack_panel(float *out, const float *rows, long row, const float *scale, long count, long size) {
    for (long i = 0; i < PANEL; i += LANES) {
        call_rows((const char *)rows, row, i + LANES, i + 2 * LANES, count, size, 4, 0);
        for (long d = 0; d < size; d += LANES) {
            vec x[LANES];
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++)
                x[r] = i + r < count ? load_part(rows + (i + r) * row + d, size - d) * scale[i + r] : (vec){};
            transpose(x);
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) store(out + (d + r) * PANEL + i, x[r]);
        }
    }
}

/* The way back: rows[i][d] = panel[d][i] * scale[i] for i < count, d < size; added to what is there if `add`. */
static void unpack_panel(float *rows, long row, const float *panel, const float *scale, long count, long size,
                         int add) {
    for (long i = 0; i < count; i += LANES) {
        call_rows((const char *)rows, row, i + LANES, i + 2 * LANES, count, size, 4, 1);
        for (long d = 0; d < size; d += LANES) {
            vec x[LANES];
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) x[r] = load(panel + (d + r) * PANEL + i);
            transpose(x);
            for (int r = 0; r < LANES && i + r < count; r++) {
                float *to = rows + (i + r) * row + d;
                x[r] *= scale[i + r];
                store_part(to, add ? x[r] + load_part(to, size - d) : x[r], size - d);
            }
        }
    }
}

/* Calls for the row 8 further on. */
INLINE void expect_pair(const char *rows, long row, long j, long count, long size, const long bytes) {
    call_rows(rows, row, j + 8, j + 9, count, size, bytes, 0);
}

INLINE void expect(const float *rows, long row, long j, long count, long size) {
    expect_pair((const char *)rows, row, j, count, size, 4);
}

/* out[j][0 .. width) = row j of `count` strided rows; zeros from `size` columns up to width, a multiple of LANES. */
static void pack_rows(float *out, long out_row, long width, const float *rows, long row, long count, long size) {
    for (long j = 0; j < count; j++) {
        expect(rows, row, j, count, size);
        for (long d = 0; d < width; d += LANES) store(out + j * out_row + d, load_part(rows + j * row + d, size - d));
    }
}

/* The same from pairs of either width, in numbers of fp32. */
static void pack_pairs(float *out, long out_row, long width, const char *pairs, long row, long count, long size,
                       const int narrow) {
    if (!narrow) {
        pack_rows(out, out_row, width, (const float *)pairs, row, count, size);
        return;
    }
    for (long j = 0; j < count; j++) {
        expect_pair(pairs, row, j, count, size, 2);
        for (long d = 0; d < width; d += LANES) store(out + j * out_row + d, load_pair(pairs + j * row * 2, d, size - d, 1));
    }
}

/* Where column d of row i lies in strips: two vectors of columns (the last strip may be one) times `total` rows. */
INLINE long in_strips(long i, long d, long total, long size) {
    long begin = d / (2 * LANES) * (2 * LANES), columns = begin + LANES < size ? 2 * LANES : LANES;
    return begin * total + i * columns + d - begin;
}

/* `count` rows, times scale[i] unless scale is NULL, as strips of `total` rows; zeros beyond. */
static void pack_strips(float *out, const float *rows, long row, const float *scale, long count, long total,
                        long size) {
    for (long i = 0; i < total; i++) {
        expect(rows, row, i, count, size);
        for (long d = 0; d < size; d += LANES) {
            vec x = i < count ? load_part(rows + i * row + d, size - d) : (vec){};
            store(out + in_strips(i, d, total, size), scale ? x * scale[i] : x);
        }
    }
}

/* out[i] = row i of a times row i of b; 0 from `count` to `total`. */
static void dot_rows(float *out, const float *a, const float *b, long row, long count, long total, long size) {
    for (long i = 0; i < total; i++) {
        vec sum = {};
        expect(a, row, i, count, size), expect(b, row, i, count, size);
        for (long d = 0; d < size && i < count; d += LANES)
            sum += load_part(a + i * row + d, size - d) * load_part(b + i * row + d, size - d);
        out[i] = sum_of(sum);
    }
}

#endif
