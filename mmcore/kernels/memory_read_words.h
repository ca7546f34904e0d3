/* The products and the packing of memory_read_tiles.h with operands rounded to bf16: words of two numbers, which lie
where there numbers lie, and half as many (narrow_products.h). Sums are fp32. Which two numbers share a word is what the product
sums over: neighbours of a row, or the same column of two rows. */
#ifndef MEMORY_READ_WORDS_H
#define MEMORY_READ_WORDS_H

#include "memory_read_tiles.h"
#include "narrow_products.h"

/* acc[r][c] += sum over k < words of both numbers of a[r * a_row + k * a_step] times b[k * b_step + c * LANES ...]. */
INLINE void multiply_words(nvec *acc, const int rows, const int columns, long words, const float *a, long a_row,
                           long a_step, const float *b, long b_step) {
    const loose_int *two = (const loose_int *)a;
    for (long k = 0; k < words; k++, two += a_step, b += b_step) {
        nvec column[VECTORS];
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) {
            column[c] = (nvec)load(b + c * LANES);
            IN_REGISTER(column[c]);
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            nvec both = (nvec){0} + two[r * a_row];
#pragma GCC unroll 4
            for (int c = 0; c < columns; c++)
                acc[r * columns + c] = add_products(acc[r * columns + c], both, column[c], BF16);
        }
    }
}

NOINLINE static void word_rows_times_panel(float *out, const float *a, long a_row, const float *b, long words, long from,
                                           long to) {
    for (long j = from; j < to; j += 4) {
        nvec acc[4 * VECTORS] = {};
        multiply_words(acc, 4, VECTORS, words, a + j * a_row, a_row, 1, b, PANEL);
#pragma GCC unroll 16
        for (int i = 0; i < 4 * VECTORS; i++) store(out + j * PANEL + i * LANES, (vec)acc[i]);
    }
}

/* Rows [from, to) of a and b are words of two rows each. */
NOINLINE static void add_word_columns_times_panel(float *out, const float *scale, const float *a, long a_row,
                                                  const float *b, long size, long from, long to) {
    for (long d = 0; d < size; d += 4) {
        nvec acc[4 * VECTORS];
#pragma GCC unroll 16
        for (int i = 0; i < 4 * VECTORS; i++) {
            vec sum = load(out + d * PANEL + i * LANES);
            acc[i] = (nvec)(scale ? sum * load(scale + i % VECTORS * LANES) : sum);
        }
        multiply_words(acc, 4, VECTORS, to - from, a + from * a_row + d, 1, a_row, b + from * PANEL, PANEL);
#pragma GCC unroll 16
        for (int i = 0; i < 4 * VECTORS; i++) store(out + d * PANEL + i * LANES, (vec)acc[i]);
    }
}

/* Words of two rows: row j of out from rows 2j and 2j + 1 of `count` pairs of either width, of which the last may miss; zeros
beyond `size`. */
static void pack_row_pairs(float *out, long out_row, long width, const char *rows, long row, long count, long size,
                           const int narrow) {
    const long bytes = narrow ? 2 : 4;
    for (long j = 0; j < count; j += 2, out += out_row) {
        const char *low = rows + j * row * bytes, *high = low + row * bytes;
        expect_pair(rows, row, j, count, size, bytes), expect_pair(rows, row, j + 1, count, size, bytes);
        for (long d = 0; d < width; d += LANES)
            store(out + d, (vec)rounded_pairs(load_pair(low, d, size - d, narrow),
                                              j + 1 < count ? load_pair(high, d, size - d, narrow) : (vec){}));
    }
}

/* Words of neighbours, width / 2 in a row and LANES / 2 zeros after them, where width is an odd number of vectors. */
static void pack_neighbours(float *out, long out_row, long width, const float *rows, long row, long count, long size) {
    for (long j = 0; j < count; j++) {
        expect(rows, row, j, count, size);
        for (long d = 0; d < width; d += 2 * LANES)
            store(out + j * out_row + d / 2, (vec)rounded_neighbours(load_part(rows + j * row + d, size - d),
                                                                     load_part(rows + j * row + d + LANES, size - d - LANES)));
    }
}

/* out[d / 2][PANEL] = columns d and d + 1 of `count` rows; zeros beyond count and beyond size. */
static void pack_panel_neighbours(float *out, const float *rows, long row, long count, long size) {
    for (long i = 0; i < PANEL; i += LANES) {
        for (long d = 0; d < size; d += LANES) {
            vec x[LANES];
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) x[r] = i + r < count ? load_part(rows + (i + r) * row + d, size - d) : (vec){};
            transpose(x);
#pragma GCC unroll 8
            for (int r = 0; r < LANES; r += 2) store(out + (d + r) / 2 * PANEL + i, (vec)rounded_pairs(x[r], x[r + 1]));
        }
    }
}

/* Pairs of `count` rows, times scale[i] unless scale is NULL, as strips of total / 2 rows; zeros beyond. */
static void pack_strip_pairs(float *out, const float *rows, long row, const float *scale, long count, long total,
                             long size) {
    for (long i = 0; i < total; i += 2) {
        expect(rows, row, i, count, size), expect(rows, row, i + 1, count, size);
        for (long d = 0; d < size; d += LANES) {
            vec x[2];
            for (int k = 0; k < 2; k++) {
                x[k] = i + k < count ? load_part(rows + (i + k) * row + d, size - d) : (vec){};
                if (scale) x[k] *= scale[i + k];
            }
            store(out + in_strips(i / 2, d, total / 2, size), (vec)rounded_pairs(x[0], x[1]));
        }
    }
}

/* Rows [from, to) of a panel, both even, as words of two rows, from row from / 2 of `out` on, which may be the panel. */
static void pair_rows(float *out, const float *panel, long from, long to) {
    for (long j = from; j < to; j += 2)
        for (int i = 0; i < PANEL; i += LANES)
            store(out + j / 2 * PANEL + i, (vec)rounded_pairs(load(panel + j * PANEL + i), load(panel + (j + 1) * PANEL + i)));
}

/* Rows [from, to) of a panel become words of neighbours, PANEL / 2 in each. */
static void pair_neighbours(float *panel, long from, long to) {
    for (long j = from; j < to; j++) {
        float *row = panel + j * PANEL;
        vec x[VECTORS + 1] = {};
        for (int i = 0; i < VECTORS; i++) x[i] = load(row + i * LANES);
        for (int i = 0; i < VECTORS; i += 2) store(row + i / 2 * LANES, (vec)rounded_neighbours(x[i], x[i + 1]));
    }
}

#endif
