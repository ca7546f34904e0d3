/* Rows of x against weight matrices: y = x W^T for 1 to 16 rows of x: every weight is read from memory once, and the
   sums of a tile live in registers.

   With one row of x the memory is the limit; with more, the multiply-adds soon are: a tile of MOST_XS rows of x by three
   rows of W then loads each number for several of them, and the weights that come next are fetched ahead, since so much
   arithmetic hides them from the processor's own prefetcher (16 -> 27 GB/s on a Zen 3).

   bf16 weights are widened in registers. Read as 32-bit words, two neighbours cost one shift and one mask instead of
   two conversions; x is put in the order even-then-odd once per call to match. */
#ifndef MM_THIN_ROWS_H
#define MM_THIN_ROWS_H

#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "weight_formats.h"

#ifdef __AVX__
#include <immintrin.h>
#endif
#ifdef __AVX512F__
#define LANES 16
#define MOST_XS 8 /* rows of x in a tile: 8 x 3 sums of 32 registers, 4 x 3 of 16 */
#else
#define LANES 8
#define MOST_XS 4
#endif
#define STEP (2 * LANES) /* weights taken at once from a row */
#define LEAST_BYTES (32 * 1024) /* of weights for each thread: fewer are read before another thread has woken */
#define INLINE static inline __attribute__((always_inline))
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef int8_t bvec __attribute__((vector_size(LANES)));
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));

INLINE vec load(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }

/* LANES bytes as floats. gcc 12 makes plain conversions number by number. */
INLINE vec widened(const char *p) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)));
#else
    bvec v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(__builtin_convertvector(v, ivec), vec);
#endif
}

INLINE float sum_lanes(vec v) {
#if LANES == 16
    vec8 eights[2];
    memcpy(eights, &v, sizeof v);
    vec8 eight = eights[0] + eights[1];
#else
    vec8 eight = v;
#endif
    vec4 halves[2];
    memcpy(halves, &eight, sizeof eight);
    vec4 s = halves[0] + halves[1];
    return (s[0] + s[2]) + (s[1] + s[3]);
}

/* The sum over the last i .. in-1, fewer than STEP. Not inlined: 20 copies made this file take 7 s to compile. */
static __attribute__((noinline)) float last_products(const float *x, const char *w, int64_t i, int64_t in,
                                                     int format) {
    float sum = 0;
    for (; i < in; i++) {
        float weight;
        if (format == INT8) {
            weight = ((const int8_t *)w)[i];
        } else {
            uint32_t bits = format == BF16 ? (uint32_t)((const uint16_t *)w)[i] << 16 : ((const uint32_t *)w)[i];
            memcpy(&weight, &bits, sizeof weight);
        }
        sum += x[i] * weight;
    }
    return sum;
}

/* y[r * y_stride + o] for `rows` rows of x by `ws` rows of w, `apart` rows from one to the next. xs >= rows, ws, format and
   fetch are constants at every call; beyond `rows` the last row is multiplied again, and not stored. */
INLINE void tile(const int xs, const int ws, const float *x, int64_t rows, const char *w, const float *scale, float *y,
                 int64_t in, int64_t y_stride, int64_t apart, const int format, const int fetch) {
    const int size = bytes_of(format), pairs = xs * ws < 8 ? 2 : 1; /* two sums hide the latency of a few */
    const int64_t row_bytes = in * size, step = apart * row_bytes, ahead = 3 * row_bytes;
    const float *row[8];
    vec sums[8][3][2];
    int64_t i = 0;
#pragma GCC unroll 8
    for (int r = 0; r < xs; r++) {
        row[r] = x + (r < rows ? r : rows - 1) * in;
#pragma GCC unroll 3
        for (int o = 0; o < ws; o++) sums[r][o][0] = sums[r][o][1] = (vec){0};
    }
    for (; i + STEP <= in; i += STEP) {
        vec first[3], second[3];
#pragma GCC unroll 3
        for (int o = 0; o < ws; o++) {
            const char *p = w + o * step + i * size;
            if (format == BF16) {
                uvec both;
                memcpy(&both, p, sizeof both);
                first[o] = (vec)(both << 16);
                second[o] = (vec)(both & 0xffff0000u);
            } else if (format == INT8) {
                first[o] = widened(p);
                second[o] = widened(p + LANES);
            } else {
                first[o] = load((const float *)p);
                second[o] = load((const float *)p + LANES);
            }
            if (fetch)
                for (int line = 0; line < STEP * size; line += 64) __builtin_prefetch(p + ahead + line, 0, 2);
        }
#pragma GCC unroll 8
        for (int r = 0; r < xs; r++) {
            vec a = load(row[r] + i), b = load(row[r] + i + LANES);
#pragma GCC unroll 3
            for (int o = 0; o < ws; o++) {
                sums[r][o][0] += a * first[o];
                sums[r][o][pairs - 1] += b * second[o];
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < xs; r++) {
        if (r >= rows) break;
#pragma GCC unroll 3
        for (int o = 0; o < ws; o++) {
            float sum = sum_lanes(pairs == 2 ? sums[r][o][0] + sums[r][o][1] : sums[r][o][0]);
            if (i < in) sum += last_products(x + r * in, w + o * step, i, in, format);
            y[r * y_stride + o * apart] = format == INT8 ? sum * scale[o * apart] : sum;
        }
    }
}

/* All rows of x by `ws` rows of w. The first tile fetches the weights that follow, while it reads these; with one row of x
   the processor's own prefetcher does it better. */
INLINE void block(const int ws, const float *x, int64_t rows, int64_t in, const char *w, const float *scale, float *y,
                  int64_t y_stride, int64_t apart, const int format) {
    if (rows == 1) {
        tile(1, ws, x, 1, w, scale, y, in, y_stride, apart, format, 0);
    } else if (rows == 2) {
        tile(2, ws, x, 2, w, scale, y, in, y_stride, apart, format, 1);
    } else if (rows <= 4) {
        tile(4, ws, x, rows, w, scale, y, in, y_stride, apart, format, 1);
    } else {
        tile(MOST_XS, ws, x, rows, w, scale, y, in, y_stride, apart, format, 1);
        for (int64_t r = MOST_XS; r < rows; r += MOST_XS)
            tile(MOST_XS, ws, x + r * in, rows - r, w, scale, y + r * y_stride, in, y_stride, apart, format, 0);
    }
}

/* Rows [o, last) of one weight matrix, read in three streams: with one the two cores of a Zen 4 got 46 GB/s of fp32, 55 of
   bf16 and 37 of int8, with three far apart 63, 62 and 46; three neighbouring rows, which share pages, gave 24, 18 and 12. */
INLINE void some_rows(const float *x, int64_t rows, int64_t in, const char *w, const float *scale, float *y, int64_t out,
                      int64_t o, int64_t last, const int format) {
    const int64_t row_bytes = in * bytes_of(format), apart = (last - o) / 3;
    if (format != INT8) scale = y; /* not looked at; never NULL + o */
    for (int64_t end = o + apart; o < end; o++)
        block(3, x, rows, in, w + o * row_bytes, scale + o, y + o, out, apart, format);
    for (o += 2 * apart; o < last; o++) block(1, x, rows, in, w + o * row_bytes, scale + o, y + o, out, 1, format);
}

INLINE void even_then_odd(const float *x, float *sorted, int64_t rows, int64_t in) {
    for (int64_t r = 0; r < rows; r++, x += in, sorted += in) {
        int64_t i = 0;
        for (; i + STEP <= in; i += STEP)
            for (int k = 0; k < LANES; k++) {
                sorted[i + k] = x[i + 2 * k];
                sorted[i + LANES + k] = x[i + 2 * k + 1];
            }
        for (; i < in; i++) sorted[i] = x[i];
    }
}

/* One weight matrix [out, in], the scales [out] of int8 weights, and where its products go: y[r * out + o]. */
struct product {
    const char *weight;
    const float *scale;
    int64_t out;
    float *y;
};

/* This thread's share of all products of the list with the same x [rows, in], even_then_odd for bf16. The rows of all
   matrices are one list, of which each thread takes a run: 34 GB/s for matrices of 3 MB, where slices of 64 KiB taken
   as threads come free gave 29, and of 256 KiB 32. Called by every thread of a parallel region; ends in a barrier. */
INLINE void multiply(const struct product *list, int64_t count, const float *x, int64_t rows, int64_t in, int format) {
    int64_t total = 0, before = 0, thread = omp_get_thread_num(), threads = omp_get_num_threads();
    for (int64_t m = 0; m < count; m++) total += list[m].out;
    int64_t low = total * thread / threads, high = total * (thread + 1) / threads;
    for (int64_t m = 0; m < count && before < high; before += list[m].out, m++) {
        const struct product *p = &list[m];
        int64_t first = low > before ? low - before : 0, last = high - before < p->out ? high - before : p->out;
        if (first >= last) continue;
        if (format == BF16)
            some_rows(x, rows, in, p->weight, p->scale, p->y, p->out, first, last, BF16);
        else if (format == INT8)
            some_rows(x, rows, in, p->weight, p->scale, p->y, p->out, first, last, INT8);
        else
            some_rows(x, rows, in, p->weight, p->scale, p->y, p->out, first, last, FP32);
    }
#pragma omp barrier
}

#endif
