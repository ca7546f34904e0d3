/* Products of x with several weight matrices: Y_i = X W_i^T, dX = sum of dY_i W_i, dW_i = dY_i^T X. Sums are fp32.

In the middle is a block of the result (product_blocks.h). Both operands are copied first into the order in which it reads
them: a panel of B is DEPTH x COLUMNS numbers, and the panels of a round stay in the second-level cache; a tile of A is
BLOCK_ROWS deep rows.

The matrices of a list count as one, with its outputs side by side: four heads' gates fill no panel of their own, X is
copied once for all, and no sum of dX over the matrices is left to others.

bf16 and int8 weights, which have no gradients, meet X in 16 bits where the processor can (narrow_products.h), and so do fp32
operands that are to be ROUNDED, in all three products: a word of a panel or a tile then holds two numbers, and everything
else stays as it is.

Every sum has an order of its own that depends on the shapes alone: neither timing nor the number of threads shows. */

#include <omp.h>
#include <stdint.h>

#include "product_blocks.h"
#include "weight_formats.h"

#define PANEL_FLOATS (DEPTH * COLUMNS)
#define PANELS 8
#define BACK_DEPTH 256 /* instead of DEPTH in a round of dW, with twice as many panels */
#define GROUP 16       /* tiles of A that a thread packs at once there: dY is read in runs */
#define EVEN_TILES 32 /* for each thread: with fewer, one more or less leaves another waiting (5 % of 512 rows) */

/* W [out, in] of `format`, scale [out] for int8; y [rows, out] the product or its gradient, y_row floats from row to row;
   grad [out, in] is dW. */
struct matrix {
    const char *weight;
    const float *scale;
    float *y, *grad;
    whole out, y_row;
};

/* A list of matrices, and X [rows, in]; `narrow` is X in 16 bits, words_of(in) words a row, and `steps` what each row is
   counted in, where the weights meet it so. Threads share `panels`, and each has a `tile` of its own. */
struct call {
    const struct matrix *list;
    const float *x;
    float *narrow, *steps;
    float *dx;
    whole count, total, rows, in, x_row;
    int format;
    block *block, *block_by_depth;
    float *panels;
};

/* The matrix that holds output `n` of all, and the number that it has there. */
static const struct matrix *holder(const struct call *c, whole *n) {
    const struct matrix *m = c->list;
    while (*n >= m->out) *n -= m++->out;
    return m;
}

/* Columns [n, n + count) of all Y, from a block that fills no panel of one matrix. */
static void scatter(const struct call *c, const float *from, whole row, whole rows, whole n, whole count) {
    for (whole i = 0; i < count; i++) {
        whole at = n + i;
        const struct matrix *m = holder(c, &at);
        for (whole r = 0; r < rows; r++) m->y[(row + r) * m->y_row + at] = from[r * COLUMNS + i];
    }
}

static void fetch_back(const struct call *c, float *to, whole row, whole rows, whole n, whole count) {
    for (whole i = 0; i < count; i++) {
        whole at = n + i;
        const struct matrix *m = holder(c, &at);
        for (whole r = 0; r < rows; r++) to[r * COLUMNS + i] = m->y[(row + r) * m->y_row + at];
    }
}

/* One block of Y: rows of X in `tile`, outputs [n, n + COLUMNS) in `panel`. */
static void forward_block(const struct call *c, whole row, whole rows, whole n, int add, whole depth, const float *tile,
                          const float *panel) {
    whole at = n, count = least(COLUMNS, c->total - n);
    const struct matrix *m = holder(c, &at);
    if (at + COLUMNS <= m->out) {
        c->block(m->y + row * m->y_row + at, m->y_row, rows, add, depth, tile, panel);
        return;
    }
    float mixed[BLOCK_ROWS * COLUMNS];
    if (add) fetch_back(c, mixed, row, rows, n, count);
    c->block(mixed, COLUMNS, rows, add, depth, tile, panel);
    scatter(c, mixed, row, rows, n, count);
}

/* The tiles of rows, BLOCK_ROWS each, that are this thread's. */
static void my_tiles(whole rows, whole *first, whole *end) {
    whole tiles = parts_of(rows, BLOCK_ROWS), thread = omp_get_thread_num(), threads = omp_get_num_threads();
    *first = tiles * thread / threads, *end = tiles * (thread + 1) / threads;
}

/* Numbers [0, depth) of a row of weights, as a tile would hold them: fp32, or 16 bits with a zero that fills the last word. */
static void unpack_weights(float *to, const char *w, float scale, whole depth, int format) {
    uint16_t *halves = (uint16_t *)to;
    if (!NARROW(format)) {
        widen(to, w, depth, format);
        for (whole j = 0; format == INT8 && j < depth; j++) to[j] *= scale;
        return;
    }
    halves[2 * words_of(depth) - 1] = 0;
    if (format == BF16) memcpy(halves, w, depth * sizeof *halves);
    if (format == ROUNDED) round_to_bf16(halves, (const float *)w, depth);
    for (whole j = 0; format == INT8 && j < depth; j++) halves[j] = (uint16_t)(int16_t)((const int8_t *)w)[j];
}

/* Outputs [n, n + COLUMNS) of all, numbers [k, k + depth), as a panel. */
static void pack_weights(const struct call *c, float *panel, whole n, whole k, whole depth) {
    const float *rows[COLUMNS];
    float unpacked[COLUMNS * TILE_ROW], *scales = panel + BEHIND * COLUMNS;
    whole count = least(COLUMNS, c->total - n);
    int as_they_are = c->format == FP32 || (c->format == BF16 && NARROW(BF16) && c->in % 2 == 0); /* in whole words */
    for (whole i = 0; i < count; i++) {
        whole at = n + i;
        const struct matrix *m = holder(c, &at);
        const char *w = m->weight + (at * c->in + k) * bytes_of(c->format);
        float scale = m->scale ? m->scale[at] : 1;
        rows[i] = as_they_are ? (const float *)w : unpacked + i * TILE_ROW;
        if (!as_they_are) unpack_weights(unpacked + i * TILE_ROW, w, scale, depth, c->format);
        if (c->format == INT8 && NARROW(INT8)) scales[i] = scale;
    }
    pack_turned(panel, rows, count, NARROW(c->format) ? words_of(depth) : depth);
}

/* Rows of X, numbers [k, k + depth), as a tile. */
static void pack_rows_of_x(const struct call *c, float *tile, whole row, whole rows, whole k, whole depth) {
    int narrow = NARROW(c->format);
    const float *x = narrow ? c->narrow + row * words_of(c->in) + k / 2 : c->x + row * c->x_row + k;
    whole x_row = narrow ? words_of(c->in) : c->x_row, words = narrow ? words_of(depth) : depth;
    for (whole r = 0; r < rows; r++) {
        memcpy(tile + r * TILE_ROW, x + r * x_row, words * sizeof *tile);
        if (c->format == INT8 && narrow) tile[r * TILE_ROW + BEHIND] = c->steps[row + r];
    }
}

/* Tiles of rows [first, end) meet `held` panels, outputs from n on. */
static void forward_round(const struct call *c, whole first, whole end, whole n, whole held, whole k, whole depth,
                          const float *panels, float *tile) {
    for (whole t = first; t < end; t++) {
        whole row = t * BLOCK_ROWS, rows = least(BLOCK_ROWS, c->rows - row);
        pack_rows_of_x(c, tile, row, rows, k, depth);
        for (whole p = 0; p < held; p++)
            forward_block(c, row, rows, n + p * COLUMNS, k > 0, depth, tile, panels + p * PANEL_FLOATS);
    }
}

/* Y where there are many rows: threads share the panels, and each takes rows of its own. */
static void forward(const struct call *c, float *tile) {
    whole first, end;
    whole deep = depth_of(DEPTH, c->format);
    my_tiles(c->rows, &first, &end);
    for (whole k = 0; k < c->in; k += deep)
        for (whole n = 0; n < c->total; n += PANELS * COLUMNS) {
            whole depth = least(deep, c->in - k), held = least(PANELS, parts_of(c->total - n, COLUMNS));
#pragma omp for schedule(static, 1)
            for (whole p = 0; p < held; p++) pack_weights(c, c->panels + p * PANEL_FLOATS, n + p * COLUMNS, k, depth);
            forward_round(c, first, end, n, held, k, depth, c->panels, tile);
#pragma omp barrier
        }
}

/* Y where there are few: each thread takes panels of its own, and all rows. */
static void forward_columns(const struct call *c, float *panels, float *tile) {
    whole all = parts_of(c->total, COLUMNS), thread = omp_get_thread_num(), threads = omp_get_num_threads();
    whole first = all * thread / threads, end = all * (thread + 1) / threads, tiles = parts_of(c->rows, BLOCK_ROWS);
    whole deep = depth_of(DEPTH, c->format);
    for (whole k = 0; k < c->in; k += deep)
        for (whole p = first; p < end; p += PANELS) {
            whole depth = least(deep, c->in - k), held = least(PANELS, end - p);
            for (whole i = 0; i < held; i++) pack_weights(c, panels + i * PANEL_FLOATS, (p + i) * COLUMNS, k, depth);
            forward_round(c, 0, tiles, p * COLUMNS, held, k, depth, panels, tile);
        }
}

/* Rows of dY, outputs [n, n + depth) of all, side by side. */
static void tile_of_gradients(const struct call *c, float *tile, whole row, whole rows, whole n, whole depth) {
    for (whole k = 0; k < depth;) {
        whole at = n + k;
        const struct matrix *m = holder(c, &at);
        whole count = least(depth - k, m->out - at);
        for (whole r = 0; r < rows; r++) {
            const float *y = m->y + (row + r) * m->y_row + at;
            float *to = tile + r * TILE_ROW;
            if (NARROW(c->format))
                round_to_bf16((uint16_t *)to + k, y, count);
            else
                memcpy(to + k, y, count * sizeof *to);
        }
        k += count;
    }
    for (whole r = 0; NARROW(c->format) && depth % 2 && r < rows; r++) ((uint16_t *)(tile + r * TILE_ROW))[depth] = 0;
}

/* Numbers [from, from + COLUMNS) of the weights of outputs [n, n + depth) of all, as a panel. */
static void pack_outputs(const struct call *c, float *panel, whole n, whole from, whole depth) {
    const float *before = NULL;
    for (whole k = 0; k < depth; k++) {
        whole at = n + k;
        const struct matrix *m = holder(c, &at);
        const float *w = (const float *)m->weight + at * c->in + from;
        if (!NARROW(c->format))
            lay_numbers(panel + k * COLUMNS, w, c->in - from, COLUMNS);
        else if (k % 2 || k + 1 == depth)
            lay_words(panel + k / 2 * COLUMNS, k % 2 ? before : w, k % 2 ? w : NULL, c->in - from, COLUMNS);
        before = w;
    }
}

/* c [rows, columns] += tile * panel where `columns` may end inside the panel. */
static void partial(block *block, float *to, whole row, whole rows, whole columns, int add, whole depth, const float *tile,
                    const float *panel) {
    if (columns >= COLUMNS) {
        block(to, row, rows, add, depth, tile, panel);
        return;
    }
    float whole_block[BLOCK_ROWS * COLUMNS];
    for (whole r = 0; add && r < rows; r++) memcpy(whole_block + r * COLUMNS, to + r * row, columns * sizeof *to);
    block(whole_block, COLUMNS, rows, add, depth, tile, panel);
    for (whole r = 0; r < rows; r++) memcpy(to + r * row, whole_block + r * COLUMNS, columns * sizeof *to);
}

static void backward_input(const struct call *c, float *tile) {
    whole first, end, in = c->in, deep = depth_of(DEPTH, c->format);
    my_tiles(c->rows, &first, &end);
    for (whole n = 0; n < c->total; n += deep)
        for (whole from = 0; from < in; from += PANELS * COLUMNS) {
            whole depth = least(deep, c->total - n), held = least(PANELS, parts_of(in - from, COLUMNS));
#pragma omp for schedule(static, 1)
            for (whole p = 0; p < held; p++) pack_outputs(c, c->panels + p * PANEL_FLOATS, n, from + p * COLUMNS, depth);
            for (whole t = first; t < end; t++) {
                whole row = t * BLOCK_ROWS, rows = least(BLOCK_ROWS, c->rows - row);
                tile_of_gradients(c, tile, row, rows, n, depth);
                for (whole p = 0; p < held; p++) {
                    whole column = from + p * COLUMNS;
                    partial(c->block, c->dx + row * in + column, in, rows, in - column, n > 0, depth, tile,
                            c->panels + p * PANEL_FLOATS);
                }
            }
#pragma omp barrier
        }
}

/* Tiles of dY^T, outputs [n, n + BLOCK_ROWS) and on, depth first: rows [k, k + depth) of dY. */
static void tiles_of_gradients(const struct matrix *m, float *tiles, whole count, whole n, whole k, whole depth, int narrow) {
    for (whole j = 0; j < depth; j += 1 + narrow) {
        const float *y = m->y + (k + j) * m->y_row + n, *next = j + 1 < depth ? y + m->y_row : NULL;
        for (whole q = 0; q < count; q++) {
            float *to = tiles + (q * BACK_DEPTH + j / (1 + narrow)) * TILE_STEP;
            whole at = q * BLOCK_ROWS, left = m->out - n - at;
            if (narrow)
                lay_words(to, y + at, next ? next + at : NULL, left, TILE_STEP);
            else
                lay_numbers(to, y + at, left, TILE_STEP);
        }
    }
}

/* Numbers [from, from + COLUMNS) of rows [k, k + depth) of X, as a panel. */
static void pack_inputs(const struct call *c, float *panel, whole k, whole from, whole depth) {
    whole count = c->in - from, narrow = NARROW(c->format);
    for (whole j = 0; j < depth; j += 1 + narrow, panel += COLUMNS) {
        const float *x = c->x + (k + j) * c->x_row + from;
        if (narrow)
            lay_words(panel, x, j + 1 < depth ? x + c->x_row : NULL, count, COLUMNS);
        else
            lay_numbers(panel, x, count, COLUMNS);
    }
}

static void backward_weights(const struct call *c, int add, float *tiles) {
    whole in = c->in, each = BACK_DEPTH * COLUMNS, deep = depth_of(BACK_DEPTH, c->format);
    for (whole k = 0; k < c->rows; k += deep)
        for (whole from = 0; from < in; from += 2 * PANELS * COLUMNS) {
            whole depth = least(deep, c->rows - k), held = least(2 * PANELS, parts_of(in - from, COLUMNS));
#pragma omp for schedule(static, 1)
            for (whole p = 0; p < held; p++) pack_inputs(c, c->panels + p * each, k, from + p * COLUMNS, depth);
            for (whole i = 0; i < c->count; i++) {
                const struct matrix *m = &c->list[i];
                whole first, end;
                my_tiles(m->out, &first, &end);
                for (whole t = first; t < end; t += GROUP) {
                    whole count = least(GROUP, end - t);
                    tiles_of_gradients(m, tiles, count, t * BLOCK_ROWS, k, depth, NARROW(c->format));
                    for (whole q = 0; q < count; q++) {
                        whole row = (t + q) * BLOCK_ROWS;
                        for (whole p = 0; p < held; p++) {
                            whole column = from + p * COLUMNS;
                            partial(c->block_by_depth, m->grad + row * in + column, in, least(BLOCK_ROWS, m->out - row),
                                    in - column, add || k > 0, depth, tiles + q * BACK_DEPTH * TILE_STEP,
                                    c->panels + p * each);
                        }
                    }
                }
            }
#pragma omp barrier
        }
}

enum { TILE_FLOATS = GROUP * BACK_DEPTH * TILE_STEP > BLOCK_ROWS * TILE_ROW ? GROUP * BACK_DEPTH * TILE_STEP
                                                                           : BLOCK_ROWS * TILE_ROW };

enum work { FORWARD, INPUT, WEIGHTS, MORE_WEIGHTS };

/* Floats that X takes in the form that weights of `format` meet, with its steps; 0 where they meet it as it is. */
static whole narrow_floats(whole rows, whole in, int format) { return NARROW(format) ? rows * (words_of(in) + 1) : 0; }

/* Floats of scratch for any work on so many rows. */
whole mm_linear_scratch(whole rows, whole in, int format, int threads) {
    return threads * (whole)(PANELS * PANEL_FLOATS + TILE_FLOATS) + narrow_floats(rows, in, format);
}

/* All of X in 16 bits. */
static void narrow_x(const struct call *c) {
    whole words = words_of(c->in);
#pragma omp for schedule(static)
    for (whole r = 0; r < c->rows; r++) {
        uint16_t *to = (uint16_t *)(c->narrow + r * words);
        to[2 * words - 1] = 0;
        const float *x = c->x + r * c->x_row;
        c->steps[r] = narrow_step(x, c->in, c->format);
        narrow(to, x, c->in, c->steps[r], c->format);
    }
}

/* Whether this processor multiplies in bf16: without it nothing is to be ROUNDED. */
int mm_linear_rounds(void) { return NARROW(ROUNDED); }

/* `work` on matrices of `format`, which is fp32, rounded or not, in all but FORWARD. MORE_WEIGHTS adds to what `grad` holds. */
void mm_linear(int work, const struct matrix *list, whole count, int format, const float *x, float *dx, whole rows, whole in,
               whole x_row, float *scratch, int threads) {
    whole total = 0;
    for (whole i = 0; i < count; i++) total += list[i].out;
    float *tiles = scratch + threads * (whole)(PANELS * PANEL_FLOATS), *steps = tiles + threads * (whole)TILE_FLOATS;
    struct call c = {.list = list, .x = x, .dx = dx, .count = count, .total = total, .rows = rows, .in = in,
                     .x_row = x_row, .format = format, .block = block_of(format), .block_by_depth = block_by_depth_of(format),
                     .panels = scratch, .steps = steps, .narrow = steps + rows};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        whole thread = omp_get_thread_num(), team = omp_get_num_threads();
        float *tile = tiles + thread * TILE_FLOATS;
        if (work == FORWARD && NARROW(format)) narrow_x(&c);
        if (work == FORWARD && parts_of(rows, BLOCK_ROWS) < EVEN_TILES * team)
            forward_columns(&c, scratch + thread * (whole)(PANELS * PANEL_FLOATS), tile);
        else if (work == FORWARD)
            forward(&c, tile);
        if (work == INPUT) backward_input(&c, tile);
        if (work >= WEIGHTS) backward_weights(&c, work == MORE_WEIGHTS, tile);
    }
}
