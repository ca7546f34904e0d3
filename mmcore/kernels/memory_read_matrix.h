/* The products of memory_read in the matrix unit (matrix_tiles.h), and how their operands lie.

Rounded operands lie as words do (memory_read_words.h), but for those that are summed over pairs: `columns` are blocks of 32 pairs,
in each of which a row holds one column's 32 numbers, 16 words. Scores are not rounded (cpu.c says why): x is split into bf16
and what is left of it in bf16, which 16 bits of fp32's 24 are in, and three of the four products of parts are summed.

Blocks of sums are 32 x 32, so that rows of scores are made in multiples of 32 from a tile's first pair. */
#ifndef MEMORY_READ_MATRIX_H
#define MEMORY_READ_MATRIX_H

#include "memory_read_words.h"

#define SIDE (2 * TILE_SIDE)

static long deep(long size) { return (size + SIDE - 1) / SIDE * SIDE; } /* numbers of a row, whole tiles' */

/* What is left of x beside its bf16. */
INLINE vec rest_of(vec x) {
    uvec bits = (uvec)x;
    return x - (vec)((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
}

/* Rows of `deep` floats: deep numbers in bf16, and as many of what is left of them; zeros beyond `size`. */
static void pack_split_rows(float *out, const char *rows, long row, long count, long size, const int narrow) {
    const long depth = deep(size), bytes = narrow ? 2 : 4;
    for (long j = 0; j < count; j++, out += depth) {
        expect_pair(rows, row, j, count, size, bytes);
        for (long d = 0; d < depth; d += 2 * LANES) {
            vec first = load_pair(rows + j * row * bytes, d, size - d, narrow);
            vec second = load_pair(rows + j * row * bytes, d + LANES, size - d - LANES, narrow);
            store(out + d / 2, (vec)rounded_neighbours(first, second));
            store(out + (depth + d) / 2, (vec)rounded_neighbours(rest_of(first), rest_of(second)));
        }
    }
}

/* Columns of `count` rows, of `width` numbers each; zeros beyond the rows and beyond `size`. */
static void pack_columns(float *out, const char *rows, long row, long width, long count, long size, const int narrow) {
    const long bytes = narrow ? 2 : 4;
    for (long j = 0; j < count; j += SIDE) {
        call_rows(rows, row, j + SIDE, j + 2 * SIDE, count, size, bytes, 0);
        for (long d = 0; d < width; d += LANES, out += LANES * TILE_SIDE) {
            vec words[LANES];
            for (int r = 0; r < LANES; r++) {
                long low = j + 2 * r, left = low < count ? size - d : 0, next = low + 1 < count ? size - d : 0;
                const char *at = rows + low * row * bytes;
                words[r] = (vec)rounded_pairs(load_pair(at, d, left, narrow), load_pair(at + row * bytes, d, next, narrow));
            }
            transpose(words);
            for (int r = 0; r < LANES; r++) store(out + r * TILE_SIDE, words[r]);
        }
    }
}
static long columns_floats(long rows, long width) { return (rows + SIDE - 1) / SIDE * width * TILE_SIDE; }

/* A panel [width][PANEL] as words of neighbours, deep / 2 rows of them, and as many of what is left. */
static void split_panel(float *out, const float *panel, long width, long depth) {
    for (long d = 0; d < depth; d += 2)
        for (int i = 0; i < PANEL; i += LANES) {
            vec low = d < width ? load(panel + d * PANEL + i) : (vec){};
            vec high = d + 1 < width ? load(panel + (d + 1) * PANEL + i) : (vec){};
            store(out + d / 2 * PANEL + i, (vec)rounded_pairs(low, high));
            store(out + (depth + d) / 2 * PANEL + i, (vec)rounded_pairs(rest_of(low), rest_of(high)));
        }
}

/* out[j][PANEL] = split row j times a split panel, for j in [from, to) in steps of 32. */
NOINLINE static void split_rows_times_panel(float *out, const float *rows, const float *panel, long depth, long from, long to) {
    const long half = depth / 2;
    for (long j = from; j < to; j += SIDE)
        for (int i = 0; i < PANEL; i += SIDE) {
            const float *a = rows + j * depth, *b = panel + i;
            open_sums(NULL, 0, 0, 1, 1);
            for (long k = 0; k < half; k += TILE_SIDE)
                add_split_tiles(a + k, a + half + k, depth, b + k * PANEL, b + (half + k) * PANEL, PANEL);
            close_sums(out + j * PANEL + i, PANEL, 1, 1);
        }
}

/* The same of rounded rows and a panel of words of neighbours. */
NOINLINE static void rounded_rows_times_panel(float *out, const float *rows, const float *panel, long depth, long from,
                                              long to) {
    for (long j = from; j < to; j += SIDE)
        for (int i = 0; i < PANEL; i += SIDE) {
            open_sums(NULL, 0, 0, 1, 1);
            for (long k = 0; k < depth / 2; k += TILE_SIDE)
                add_tiles(rows + j * depth / 2 + k, depth / 2, panel + k * PANEL + i, PANEL, 1, 1);
            close_sums(out + j * PANEL + i, PANEL, 1, 1);
        }
}

/* out[d][PANEL] = out * scale (NULL is 1) + sum over pairs j in [from, to), multiples of 32, of column d of j times row j of a
panel whose words hold two rows. */
NOINLINE static void add_columns_of_tiles(float *out, const float *scale, const float *columns, const float *words, long width,
                                          long from, long to) {
    int same = 1;
    for (int i = 0; scale && i < PANEL; i++) same &= scale[i] == 1;
    for (long d = 0; !same && d < width; d++)
        for (int i = 0; i < PANEL; i += LANES) store(out + d * PANEL + i, load(out + d * PANEL + i) * load(scale + i));
    for (long d = 0; d < width; d += SIDE)
        for (int i = 0; i < PANEL; i += SIDE) {
            const int low = d + TILE_SIDE < width;
            open_sums(out + d * PANEL + i, PANEL, 1, low, 1);
            for (long j = from; j < to; j += SIDE)
                add_tiles(columns + (j / SIDE * width + d) * TILE_SIDE, TILE_SIDE, words + j / 2 * PANEL + i, PANEL, low, 1);
            close_sums(out + d * PANEL + i, PANEL, low, 1);
        }
}

/* rows[j][32 columns or 16] += sum over the queries i of panels [first, end) of a[p][j][i] * strip[i][columns] for 32 rows j; a's
rows hold words of neighbours, the strip's of two queries. */
INLINE void add_outer_tiles(float *rows, long row, const float *a, long a_panel, const float *strip, long columns, long first,
                            long end) {
    const int right = columns > TILE_SIDE;
    open_sums(rows, row, 1, 1, right);
    for (long p = first; p < end; p++)
        for (int i = 0; i < PANEL / 2; i += TILE_SIDE)
            add_tiles(a + p * a_panel + i, PANEL, strip + (p * PANEL / 2 + i) * columns, columns, 1, right);
    close_sums(rows, row, 1, right);
}

#endif
