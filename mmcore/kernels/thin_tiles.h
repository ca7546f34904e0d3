/* Three to sixteen rows of x against weights in the matrix unit (matrix_tiles.h). Tiles of W are read where they lie, 64 bytes
   of each of 16 rows, and x is what was brought into order, so that a weight is read once and never copied: y^T = W x^T.
   With the instructions for vectors the multiply-adds of 8 rows took longer than memory (S2, 8 rows after 64 tokens: 0.45 of
   the floor in bf16, 0.42 in int8). */
#ifndef MM_THIN_TILES_H
#define MM_THIN_TILES_H

#include <string.h>

#include "matrix_tiles.h"
#include "narrow_products.h"
#include "transpose.h"
#include "weight_formats.h"

#define LEAST_TILE_ROWS 3 /* with fewer vectors are fast enough */
#define MOST_SUMMED 65536 /* products of bytes, each below 128 x 255, before 32 bits overflow */

static inline int by_tiles(int64_t rows, int64_t in, int format) {
    return rows >= LEAST_TILE_ROWS && format != FP32 && (format != INT8 || in <= MOST_SUMMED) && tiles_allowed();
}

/* Words of x for 64 bytes of a row of W: a tile, word k of x's row r in column r; for int8 one of high bytes and one of low. */
static inline int64_t words_of_step(int format) { return (format == INT8 ? 2 : 1) * TILE_SIDE * TILE_SIDE; }
static inline int64_t tile_steps(int64_t in, int format) { return (in * bytes_of(format) + 63) / 64; }

/* This thread's share of x [rows, in] as an operand, in steps of W's 64 bytes: threads that took rows instead would write to
   one another's lines (8 rows in int8: 3,300 us a token for 2,400). `step` is every row's, and each thread finds all of them. */
static inline void steps_of_operand(float *to, float *step, const float *x, int64_t rows, int64_t in, int format,
                                    int64_t thread, int64_t threads) {
    const int64_t numbers = 64 / bytes_of(format), count = tile_steps(in, format), end = count * (thread + 1) / threads;
    float steps[16];
    for (int64_t r = 0; r < rows; r++) steps[r] = narrow_step(x + r * in, in, format);
    if (thread == 0) memcpy(step, steps, rows * sizeof *step);
    for (int64_t k = count * thread / threads; k < end; k++) {
        const int64_t at = k * numbers, left = in - at < numbers ? in - at : numbers;
        vec words[2][LANES] = {0};
        for (int64_t r = 0; r < rows; r++) {
            uint16_t halves[64] = {0};
            narrow(halves, x + r * in + at, left, steps[r], format);
            if (format == INT8)
                split_bytes((uint8_t *)&words[0][r], (uint8_t *)&words[1][r], halves);
            else
                memcpy(&words[0][r], halves, sizeof(vec));
        }
        for (int part = 0; part < words_of_step(format) / (TILE_SIDE * TILE_SIDE); part++) {
            transpose(words[part]);
            memcpy(to + k * words_of_step(format) + part * TILE_SIDE * TILE_SIDE, words[part], sizeof words[part]);
        }
    }
}

/* y[r * y_stride + o] for `count` rows of W, at most 16, from w on. What lies behind them is asked for meanwhile. */
static inline void thin_tile(const char *w, const float *scale, int64_t count, int64_t in, const float *x, const float *step,
                             int64_t rows, float *y, int64_t y_stride, const int format) {
    const int64_t row = in * bytes_of(format);
    char part[TILE_SIDE * 64];
    float sums[TILE_SIDE * TILE_SIDE];
    int32_t high[TILE_SIDE * TILE_SIDE], low[TILE_SIDE * TILE_SIDE];
    ZERO_TILE(0);
    ZERO_TILE(1);
    for (int64_t at = 0; at < row; at += 64, x += words_of_step(format)) {
        const int64_t left = row - at < 64 ? row - at : 64;
        const char *from = w + at;
        int64_t apart = row;
        if (count < TILE_SIDE || left < 64) {
            memset(part, 0, sizeof part);
            for (int64_t o = 0; o < count; o++) memcpy(part + o * 64, from + o * row, left);
            from = part, apart = 64;
        }
        for (int i = 0; i < TILE_SIDE; i++) __builtin_prefetch(w + TILE_SIDE * (row + at) + 64 * i, 0, 2);
        LOAD_TILE(2, from, apart);
        LOAD_TILE(3, x, 4 * TILE_SIDE);
        if (format == INT8) {
            LOAD_TILE(4, x + TILE_SIDE * TILE_SIDE, 4 * TILE_SIDE);
            MULTIPLY_BYTES(0, 2, 3);
            MULTIPLY_BY_LOW_BYTES(1, 2, 4);
        } else {
            MULTIPLY_TILES(0, 2, 3);
        }
    }
    if (format == INT8) {
        STORE_TILE(0, high, 4 * TILE_SIDE);
        STORE_TILE(1, low, 4 * TILE_SIDE);
        for (int i = 0; i < TILE_SIDE * TILE_SIDE; i++) sums[i] = 256.0f * (float)high[i] + (float)low[i];
    } else {
        STORE_TILE(0, sums, 4 * TILE_SIDE);
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t o = 0; o < count; o++) {
            float sum = sums[o * TILE_SIDE + r];
            y[r * y_stride + o] = format == INT8 ? sum * scale[o] * step[r] : sum;
        }
}

/* Rows [o, last) of one weight matrix. */
static inline void rows_by_tiles(const float *x, const float *step, int64_t rows, int64_t in, const char *w, const float *scale,
                                 float *y, int64_t out, int64_t o, int64_t last, const int format) {
    for (; o < last; o += TILE_SIDE)
        thin_tile(w + o * in * bytes_of(format), format == INT8 ? scale + o : NULL, last - o < TILE_SIDE ? last - o : TILE_SIDE,
                  in, x, step, rows, y + o, out, format);
}

#endif
