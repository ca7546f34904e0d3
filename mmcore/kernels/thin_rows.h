/* Rows of x against weight matrices: y = x W^T for 1 to 16 rows of x: every weight is read from memory once, and the
   sums of a tile live in registers.

   With few rows of x the memory is the limit, and one row of W at a time reads it best: 37 GB/s on a machine where a
   plain sum reads 35, against 30 for two rows side by side. From 5 rows of x on the multiply-adds are the limit. Then
   three rows of W share each load of x where x outgrows the first-level cache, and the weights that come next are
   fetched ahead, since so much arithmetic hides them from the processor's own prefetcher (16 -> 27 GB/s).

   bf16 weights are widened in registers. Read as 32-bit words, two neighbours cost one shift and one mask instead of
   two conversions; x is put in the order even-then-odd once per call to match. */
#ifndef MM_THIN_ROWS_H
#define MM_THIN_ROWS_H


#include <omp.h>
#include <stdint.h>
#include <string.h>

#define LANES 8
#define STEP (2 * LANES) /* weights taken at once from a row */
#define LEAST_BYTES (32 * 1024) /* of weights for each thread: fewer are read before another thread has woken */
#define FIRST_LEVEL (32 * 1024)
#define INLINE static inline __attribute__((always_inline))
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef int8_t bvec __attribute__((vector_size(LANES)));
typedef float half_of_vec __attribute__((vector_size(2 * LANES)));

enum format { FP32, BF16, INT8 };

INLINE int bytes_of(int format) { return format == FP32 ? 4 : format == BF16 ? 2 : 1; }

INLINE vec load(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }

/* In two conversions: gcc 12 does the one from bytes to floats number by number. */
INLINE vec widened(const char *p) {
    bvec v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(__builtin_convertvector(v, ivec), vec);
}

INLINE float sum_lanes(vec v) {
    half_of_vec halves[2];
    memcpy(halves, &v, sizeof v);
    half_of_vec s = halves[0] + halves[1];
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

/* y[r * y_stride + o] for `xs` rows of x by `ws` rows of w; these, format and fetch are constants at every call. */
INLINE void tile(const int xs, const int ws, const float *x, const char *w, const float *scale, float *y, int64_t in,
                 int64_t y_stride, const int format, const int fetch) {
    const int size = bytes_of(format);
    const int64_t row_bytes = in * size, ahead = ws * row_bytes;
    vec sums[4][3][2];
    int64_t i = 0;
#pragma GCC unroll 4
    for (int r = 0; r < xs; r++)
#pragma GCC unroll 4
        for (int o = 0; o < ws; o++) sums[r][o][0] = sums[r][o][1] = (vec){0};
    for (; i + STEP <= in; i += STEP) {
        vec first[3], second[3];
#pragma GCC unroll 4
        for (int o = 0; o < ws; o++) {
            const char *p = w + o * row_bytes + i * size;
            if (format == BF16) {
                uvec pairs;
                memcpy(&pairs, p, sizeof pairs);
                first[o] = (vec)(pairs << 16);
                second[o] = (vec)(pairs & 0xffff0000u);
            } else if (format == INT8) {
                first[o] = widened(p);
                second[o] = widened(p + LANES);
            } else {
                first[o] = load((const float *)p);
                second[o] = load((const float *)p + LANES);
            }
            if (fetch) __builtin_prefetch(p + ahead, 0, 2);
        }
#pragma GCC unroll 4
        for (int r = 0; r < xs; r++) {
            vec a = load(x + r * in + i), b = load(x + r * in + i + LANES);
#pragma GCC unroll 4
            for (int o = 0; o < ws; o++) {
                /* Two sums hide the latency of a few; many hide each other's, and registers are 16. */
                sums[r][o][0] += a * first[o];
                sums[r][o][xs * ws < 8] += b * second[o];
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < xs; r++)
#pragma GCC unroll 4
        for (int o = 0; o < ws; o++) {
            float sum = sum_lanes(sums[r][o][0] + sums[r][o][1]);
            if (i < in) sum += last_products(x + r * in, w + o * row_bytes, i, in, format);
            y[r * y_stride + o] = format == INT8 ? sum * scale[o] : sum;
        }
}

/* All rows of x by `ws` rows of w. The first tile fetches the weights that follow, while it reads these. */
INLINE void block(const int ws, const float *x, int64_t rows, int64_t in, const char *w, const float *scale, float *y,
                  int64_t y_stride, const int format) {
    int64_t r = 0;
    if (rows >= 4) {
        tile(4, ws, x, w, scale, y, in, y_stride, format, 1);
        for (r = 4; r + 4 <= rows; r += 4)
            tile(4, ws, x + r * in, w, scale, y + r * y_stride, in, y_stride, format, 0);
    }
    x += r * in;
    y += r * y_stride;
    if (rows - r == 3) tile(3, ws, x, w, scale, y, in, y_stride, format, 1);
    if (rows - r == 2) tile(2, ws, x, w, scale, y, in, y_stride, format, 1);
    if (rows - r == 1) tile(1, ws, x, w, scale, y, in, y_stride, format, format != FP32);
}

/* Rows [o, last) of one weight matrix. */
INLINE void some_rows(const float *x, int64_t rows, int64_t in, const char *w, const float *scale, float *y, int64_t out,
                      int64_t o, int64_t last, const int format) {
    const int64_t row_bytes = in * bytes_of(format);
    if (format != INT8) scale = y; /* not looked at; never NULL + o */
    if (rows > 4 && rows * in * 4 > FIRST_LEVEL)
        for (; o + 3 <= last; o += 3) block(3, x, rows, in, w + o * row_bytes, scale + o, y + o, out, format);
    if (format == INT8 && rows < 4) /* so few bytes that the sums' latency shows: two rows hide it */
        for (; o + 2 <= last; o += 2) block(2, x, rows, in, w + o * row_bytes, scale + o, y + o, out, format);
    for (; o < last; o++) block(1, x, rows, in, w + o * row_bytes, scale + o, y + o, out, format);
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
