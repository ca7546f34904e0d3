/* Rows of x against weight matrices: y = x W^T for 1 to 16 rows of x: every weight is read from memory once, and the
   sums of a tile live in registers.

   With one row of x the memory is the limit; with more, the multiply-adds soon are: a tile of MOST_XS rows of x by three
   rows of W then loads each number for several of them, and the weights that come next are fetched ahead, since so much
   arithmetic hides them from the processor's own prefetcher (16 -> 27 GB/s on a Zen 3).

   x is first brought into the order in which a tile walks through it, STEP numbers of each of its rows at a time: then
   one address serves all rows (with one for each, a third of the loop's instructions fetched addresses that registers had
   no room for). bf16 and int8 weights meet x in 16 bits (narrow_products.h), or are widened in registers where the
   processor has no instruction for that: bf16 read as 32-bit words, of which two neighbours cost one shift and one
   mask instead of two conversions, and x lies even-then-odd to match. */
#ifndef MM_THIN_ROWS_H
#define MM_THIN_ROWS_H

#include <omp.h>
#include <stdint.h>
#include <string.h>

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
#if defined(__AVX__) && !defined(__AVX512F__)
#define FEW_REGISTERS 1 /* that hold a vec: 16 */
#define HOLD(x) IN_REGISTER(x)
#else
#define FEW_REGISTERS 0
#define HOLD(x) ((void)0) /* clang refuses IN_REGISTER of what fills two, also where it is never reached */
#endif
#include "in_register.h"
#include "narrow_products.h"
#include "weight_formats.h"

#define STEP (2 * LANES) /* weights taken at once from a row */
#define LEAST_BYTES (32 * 1024) /* of weights for each thread: fewer are read before another thread has woken */
#define INLINE static inline __attribute__((always_inline))
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef int8_t bvec __attribute__((vector_size(LANES)));
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));
#include "thin_tiles.h"

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

/* In lane lane_of_sum(i, count) the sum over v[i]'s lanes, i < count. Interleaving two vectors' halves and adding them sums both
   at once. */
INLINE vec sums_of(vec *v, const int count) {
    int round = 0;
#pragma GCC unroll 4
    for (int n = count / 2; n > 0; n /= 2, round++)
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) v[i] = halves(v[i], v[i + n], 0, round) + halves(v[i], v[i + n], 1, round);
#pragma GCC unroll 4
    for (; round < ROUNDS; round++) v[0] = halves(v[0], v[0], 0, round) + halves(v[0], v[0], 1, round);
    return v[0];
}

INLINE int lane_of_sum(int i, const int count) {
    if (LANES != 8) return i * (LANES / count);
    return count == 8 ? (i & 1) << 2 | i >> 1 : i * (4 / count); /* ROTATED back; or repeated in each lane */
}

/* Rows of x as products take them: tiles of tile_rows(rows) rows, in each of which STEP numbers of every row follow each
   other, zeros after the last number; floats, or numbers of 16 bits with the step of each row. */
struct operand {
    char *numbers;
    float *step;
};

INLINE int64_t tile_rows(int64_t rows) { return rows < 1 ? 1 : rows <= 2 ? rows : rows <= 4 ? 4 : MOST_XS; }
INLINE int64_t steps_of(int64_t in) { return (in + STEP - 1) / STEP; }
INLINE int operand_bytes(int format) { return NARROW(format) ? 2 : 4; }

/* Bytes of one tile, and floats that an operand with its steps needs at most: tiles are full. */
INLINE int64_t tile_bytes(int64_t rows, int64_t in, int format) {
    return tile_rows(rows) * steps_of(in) * STEP * operand_bytes(format);
}
INLINE int64_t full_rows(int64_t rows) { return (rows + tile_rows(rows) - 1) / tile_rows(rows) * tile_rows(rows); }
INLINE int64_t operand_floats(int64_t rows, int64_t in) {
    int64_t tiles = tile_steps(in, INT8) * words_of_step(INT8), floats = full_rows(rows) * steps_of(in) * STEP;
    return rows >= LEAST_TILE_ROWS && tiles > floats ? tiles : floats; /* bf16's tiles are as many words */
}

/* STEP numbers of a row, of which `count` are given. */
INLINE void step_of_operand(char *to, const float *x, int64_t count, float step, int format) {
    if (NARROW(format)) {
        memset(to + count * 2, 0, (STEP - count) * 2);
        narrow((uint16_t *)to, x, count, step, format);
        return;
    }
    float *floats = (float *)to;
    memset(floats + count, 0, (STEP - count) * sizeof *floats);
    memcpy(floats, x, count * sizeof *floats);
    if (format == BF16) {
        float neighbours[STEP];
        memcpy(neighbours, floats, sizeof neighbours);
        for (int k = 0; k < LANES; k++) floats[k] = neighbours[2 * k], floats[LANES + k] = neighbours[2 * k + 1];
    }
}

/* Where row r of `rows` begins in an operand, and how far its steps are apart there. */
INLINE int64_t step_apart(int64_t rows, int format) { return tile_rows(rows) * STEP * operand_bytes(format); }
INLINE char *row_of_operand(struct operand x, int64_t r, int64_t rows, int64_t in, int format) {
    const int64_t xs = tile_rows(rows);
    return x.numbers + r / xs * tile_bytes(rows, in, format) + r % xs * STEP * operand_bytes(format);
}

/* Row r of `rows`, x [in], becomes part of the operand. */
INLINE void add_to_operand(struct operand to, int64_t r, int64_t rows, const float *x, int64_t in, int format) {
    const int64_t apart = step_apart(rows, format), whole = in / STEP;
    char *p = row_of_operand(to, r, rows, in, format);
    const float step = to.step[r] = narrow_step(x, in, format);
    for (int64_t i = 0; i < whole; i++) step_of_operand(p + i * apart, x + i * STEP, STEP, step, format);
    if (in % STEP) step_of_operand(p + whole * apart, x + whole * STEP, in % STEP, step, format);
}

/* Zeros for a row that only fills the last tile: what lay there could be subnormal numbers, with which an Intel takes for six
   rows twice the time of eight. */
INLINE void fill_operand(struct operand to, int64_t r, int64_t rows, int64_t in, int format) {
    char *p = row_of_operand(to, r, rows, in, format);
    for (int64_t i = 0; i < steps_of(in); i++) memset(p + i * step_apart(rows, format), 0, STEP * operand_bytes(format));
}

/* A thread's share of x [rows, in] as an operand. */
INLINE void make_operand(struct operand to, const float *x, int64_t rows, int64_t in, int format, int64_t thread,
                         int64_t threads) {
    if (by_tiles(rows, in, format)) {
        steps_of_operand((float *)to.numbers, to.step, x, rows, in, format, thread, threads);
        return;
    }
    for (int64_t r = rows * thread / threads; r < rows * (thread + 1) / threads; r++)
        add_to_operand(to, r, rows, x + r * in, in, format);
    for (int64_t r = rows; thread == threads - 1 && r < full_rows(rows); r++) fill_operand(to, r, rows, in, format);
}

/* Numbers [half * LANES, + LANES) of a step of weights as floats, of bf16 those with even places or those with odd ones. */
INLINE vec wide_weights(const char *w, const int half, const int format) {
    if (format == BF16) {
        uvec both;
        memcpy(&both, w, sizeof both);
        return (vec)(half ? both & 0xffff0000u : both << 16);
    }
    return format == INT8 ? widened(w + half * LANES) : load((const float *)w + half * LANES);
}

/* sum += a * b. Where bf16 is widened there is no register to spare, and gcc 12 moves and spills sums (8 rows: 130 -> 152
   GFLOP/s without that); of fp32 it does well. */
#if defined(__FMA__) && FEW_REGISTERS
#define ADD_PRODUCT(sum, a, b, format) \
    do { \
        if (format == BF16) \
            __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b)); \
        else \
            (sum) += (a) * (b); \
    } while (0)
#else
#define ADD_PRODUCT(sum, a, b, format) ((sum) += (a) * (b))
#endif

/* sums[o][r] += STEP numbers of row r of x, all rows one after the other at `x`, times the weights at w + o * apart. Two
   sums of each hide the latency where there are few. Of 16 registers 12 sums, the weights of half a step and a number of x
   are all: then a half at a time, every number loaded once. */
INLINE void wide_step(vec sums[3][2][8], const int xs, const int ws, const char *x, const char *w, int64_t apart,
                      const int format) {
    const int other = xs * ws < 8, taken = FEW_REGISTERS ? 1 : 2;
#pragma GCC unroll 2
    for (int from = 0; from < 2; from += taken) {
        vec weights[2][3];
        if (FEW_REGISTERS) __asm__("" : "+r"(w)); /* or bf16's words would be kept from one half to the next */
#pragma GCC unroll 6
        for (int i = 0; i < taken * ws; i++) {
            weights[i / ws][i % ws] = wide_weights(w + i % ws * apart, from + i / ws, format);
            HOLD(weights[i / ws][i % ws]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < taken * xs; i++) {
            const int half = i % taken, r = i / taken;
            vec a = load((const float *)x + r * STEP + (from + half) * LANES);
            HOLD(a);
#pragma GCC unroll 3
            for (int o = 0; o < ws; o++) ADD_PRODUCT(sums[o][(from + half) * other][r], a, weights[half][o], format);
        }
    }
}

/* The same with numbers of 16 bits. */
INLINE void narrow_products(nvec sums[3][8], const int xs, const int ws, const char *x, const char *w, int64_t apart,
                            const int format) {
    nvec weights[3];
#pragma GCC unroll 3
    for (int o = 0; o < ws; o++) weights[o] = narrow_weights(w + o * apart, format);
#pragma GCC unroll 8
    for (int r = 0; r < xs; r++) {
        nvec a;
        memcpy(&a, x + r * STEP * 2, sizeof a);
#pragma GCC unroll 3
        for (int o = 0; o < ws; o++) sums[o][r] = add_products(sums[o][r], a, weights[o], format);
    }
}

/* Steps that have their weights in one line of memory; and calls for the weights of so many that are read after these. */
INLINE int steps_of_line(int format) { return FEW_REGISTERS && STEP * bytes_of(format) < 64 ? 64 / (STEP * bytes_of(format)) : 1; }

INLINE void fetch_weights(const int ws, const char *w, int64_t apart, const int format) {
#pragma GCC unroll 3
    for (int o = 0; o < ws; o++)
        for (int at = 0; at < STEP * bytes_of(format); at += 64) __builtin_prefetch(w + o * apart + at, 0, 2);
}

/* The last weights of `ws` rows, fewer than STEP, with zeros after them: row o at to + o * MOST_BYTES. */
enum { MOST_BYTES = STEP * 4 };
static __attribute__((noinline)) void last_weights(char *to, int ws, const char *w, int64_t apart, int64_t bytes) {
    memset(to, 0, 3 * MOST_BYTES);
    for (int o = 0; o < ws; o++) memcpy(to + o * MOST_BYTES, w + o * apart, bytes);
}

/* Every lane's share of the products of a tile, totals[o][r]; `ahead` bytes after a weight is what to fetch. */
INLINE void wide_tile(vec totals[3][8], const int xs, const int ws, const char *x, const char *w, int64_t in, int64_t apart,
                      int64_t ahead, const int format, const int fetch) {
    const int bytes = STEP * bytes_of(format);
    vec sums[3][2][8];
#pragma GCC unroll 3
    for (int o = 0; o < ws; o++)
#pragma GCC unroll 8
        for (int r = 0; r < xs; r++) sums[o][0][r] = sums[o][1][r] = (vec){0};
    const char *const end = w + in / STEP * bytes;
    while (w < end) {
        if (fetch) fetch_weights(ws, w + ahead, apart, format);
        for (int i = 0; i < steps_of_line(format) && w < end; i++, w += bytes, x += xs * STEP * 4)
            wide_step(sums, xs, ws, x, w, apart, format);
    }
    if (in % STEP) {
        char last[3 * MOST_BYTES];
        last_weights(last, ws, w, apart, in % STEP * bytes_of(format));
        wide_step(sums, xs, ws, x, last, MOST_BYTES, format);
    }
#pragma GCC unroll 3
    for (int o = 0; o < ws; o++)
#pragma GCC unroll 8
        for (int r = 0; r < xs; r++) totals[o][r] = sums[o][0][r] + sums[o][1][r];
}

INLINE void narrow_tile(vec totals[3][8], const int xs, const int ws, const char *x, const char *w, int64_t in, int64_t apart,
                        int64_t ahead, const int format, const int fetch) {
    const int bytes = STEP * bytes_of(format);
    const int64_t exact = (EXACT_PAIRS - 1) * (int64_t)bytes; /* and the last step */
    const char *const end = w + in / STEP * bytes;
    for (int first = 1; first || w < end; first = 0) {
        const char *stop = format == INT8 && end - w > exact ? w + exact : end;
        nvec sums[3][8];
#pragma GCC unroll 3
        for (int o = 0; o < ws; o++)
#pragma GCC unroll 8
            for (int r = 0; r < xs; r++) sums[o][r] = (nvec){0};
        while (w < stop) {
            if (fetch) fetch_weights(ws, w + ahead, apart, format);
            for (int i = 0; i < steps_of_line(format) && w < stop; i++, w += bytes, x += xs * STEP * 2)
                narrow_products(sums, xs, ws, x, w, apart, format);
        }
        if (w == end && in % STEP) {
            char last[3 * MOST_BYTES];
            last_weights(last, ws, w, apart, in % STEP * bytes_of(format));
            narrow_products(sums, xs, ws, x, last, MOST_BYTES, format);
        }
#pragma GCC unroll 3
        for (int o = 0; o < ws; o++)
#pragma GCC unroll 8
            for (int r = 0; r < xs; r++) {
                vec sum = (vec)sums_as_floats(sums[o][r], format);
                totals[o][r] = first ? sum : totals[o][r] + sum;
            }
    }
}

/* y[r * y_stride + o * apart] for a tile of x, of which `rows` rows are to be stored at most, by `ws` rows of w, `apart` rows
   from one to the next. xs, ws, format and fetch are constants at every call. */
INLINE void tile(const int xs, const int ws, const char *x, const float *step, int64_t rows, const char *w,
                 const float *scale, float *y, int64_t in, int64_t y_stride, int64_t apart, const int format,
                 const int fetch) {
    const int64_t row_bytes = in * bytes_of(format);
    vec totals[3][8];
    if (NARROW(format))
        narrow_tile(totals, xs, ws, x, w, in, apart * row_bytes, 3 * row_bytes, format, fetch);
    else
        wide_tile(totals, xs, ws, x, w, in, apart * row_bytes, 3 * row_bytes, format, fetch);
#pragma GCC unroll 3
    for (int o = 0; o < ws; o++) {
        vec sums = sums_of(totals[o], xs);
        if (format == INT8) sums *= scale[o * apart];
#pragma GCC unroll 8
        for (int r = 0; r < xs; r++)
            if (r < rows) {
                float sum = sums[lane_of_sum(r, xs)];
                y[r * y_stride + o * apart] = format == INT8 && NARROW(INT8) ? sum * step[r] : sum;
            }
    }
}

/* All rows of x by `ws` rows of w. The first tile fetches the weights that follow, while it reads these; with one row of x
   the processor's own prefetcher does it better. */
INLINE void block(const int ws, struct operand x, int64_t rows, int64_t in, const char *w, const float *scale, float *y,
                  int64_t y_stride, int64_t apart, const int format) {
    if (rows == 1) {
        tile(1, ws, x.numbers, x.step, 1, w, scale, y, in, y_stride, apart, format, 0);
    } else if (rows == 2) {
        tile(2, ws, x.numbers, x.step, 2, w, scale, y, in, y_stride, apart, format, 1);
    } else if (rows <= 4) {
        tile(4, ws, x.numbers, x.step, rows, w, scale, y, in, y_stride, apart, format, 1);
    } else {
        const int64_t bytes = tile_bytes(rows, in, format);
        tile(MOST_XS, ws, x.numbers, x.step, rows, w, scale, y, in, y_stride, apart, format, 1);
        for (int64_t r = MOST_XS; r < rows; r += MOST_XS)
            tile(MOST_XS, ws, x.numbers + r / MOST_XS * bytes, x.step + r, rows - r, w, scale, y + r * y_stride, in,
                 y_stride, apart, format, 0);
    }
}

/* Rows [o, last) of one weight matrix, read in three streams: with one the two cores of a Zen 4 got 46 GB/s of fp32, 55 of
   bf16 and 37 of int8, with three far apart 63, 62 and 46; three neighbouring rows, which share pages, gave 24, 18 and 12. */
INLINE void some_rows(struct operand x, int64_t rows, int64_t in, const char *w, const float *scale, float *y, int64_t out,
                      int64_t o, int64_t last, const int format) {
    const int64_t row_bytes = in * bytes_of(format), apart = (last - o) / 3;
    if (format != FP32 && by_tiles(rows, in, format)) {
        rows_by_tiles((const float *)x.numbers, x.step, rows, in, w, scale, y, out, o, last, format);
        return;
    }
    if (format != INT8) scale = y; /* not looked at; never NULL + o */
    for (int64_t end = o + apart; o < end; o++)
        block(3, x, rows, in, w + o * row_bytes, scale + o, y + o, out, apart, format);
    for (o += 2 * apart; o < last; o++) block(1, x, rows, in, w + o * row_bytes, scale + o, y + o, out, 1, format);
}

/* One weight matrix [out, in], the scales [out] of int8 weights, and where its products go: y[r * out + o]. */
struct product {
    const char *weight;
    const float *scale;
    int64_t out;
    float *y;
};

/* This thread's share of all products of the list with the same x [rows, in]. The rows of all matrices are one list, of
   which each thread takes a run: 34 GB/s for matrices of 3 MB, where slices of 64 KiB taken as threads come free gave 29,
   and of 256 KiB 32. Called by every thread of a parallel region; ends in a barrier. */
INLINE void multiply(const struct product *list, int64_t count, struct operand x, int64_t rows, int64_t in, int format) {
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
