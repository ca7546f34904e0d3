/* dX = sum of dY_i W_i and dW_i = dY_i^T X for several weight matrices in fp32, rounded or not (linear_call.h). */

#include "linear_call.h"

#define BACK_DEPTH 256 /* words of a round of dW */
#define GROUP 16       /* tiles of A that a thread packs at once there at most: dY is read in runs */

/* Rows of dY, outputs [n, n + depth) of all, side by side. */
static void tile_of_gradients(const struct call *c, float *tile, whole row, whole rows, whole n, whole depth) {
    for (whole k = 0; k < depth;) {
        whole at = n + k;
        const struct matrix *m = holder(c, &at);
        whole count = least(depth - k, m->out - at);
        for (whole r = 0; r < rows; r++) {
            const char *y = number(m->y, (row + r) * m->y_row + at, c->y_halves);
            if (NARROW(c->format))
                round_into(tile, r, k, y, count, c->format, c->y_halves);
            else
                memcpy(tile + r * TILE_ROW + k, y, count * sizeof *tile);
        }
        k += count;
    }
    for (whole r = 0; NARROW(c->format) && r < rows; r++) fill_tile(tile, r, depth, c->format);
}

/* What it is packed from, as far as that is of one matrix. */
static struct ahead rows_of_gradients(const struct call *c, whole row, whole end, whole n, whole depth) {
    whole at = n;
    const struct matrix *m = holder(c, &at);
    whole bytes = item(c->y_halves);
    return (struct ahead){.at = m->y + (row * m->y_row + at) * bytes, .width = bytes * least(depth, m->out - at),
                          .row = bytes * m->y_row, .rows = least(c->height, end - row)};
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
            lay_words(panel + k / 2 * COLUMNS, (const char *)(k % 2 ? before : w), k % 2 ? (const char *)w : NULL,
                      c->in - from, COLUMNS, 0);
        before = w;
    }
    for (whole k = words_in(depth, c->format); k < laid_words(depth, c->format); k++)
        lay_numbers(panel + k * COLUMNS, NULL, 0, COLUMNS);
}

/* c [rows, columns] += tile * panel where `columns` may end inside the panel. */
static void partial(block *block, float *to, whole row, whole rows, whole columns, int add, whole depth, const float *tile,
                    const float *panel, struct ahead *next) {
    if (columns >= COLUMNS) {
        block(to, row, rows, add, depth, tile, panel, next);
        return;
    }
    float whole_block[MOST_ROWS * COLUMNS];
    for (whole r = 0; add && r < rows; r++) memcpy(whole_block + r * COLUMNS, to + r * row, columns * sizeof *to);
    block(whole_block, COLUMNS, rows, add, depth, tile, panel, next);
    for (whole r = 0; r < rows; r++) memcpy(to + r * row, whole_block + r * COLUMNS, columns * sizeof *to);
}

/* Rows of dX in bf16, whose sums are whole. */
static void rounded_partial(const struct call *c, whole row, whole rows, whole column, whole depth, const float *tile,
                            const float *panel, struct ahead *next) {
    float sums[MOST_ROWS * COLUMNS];
    c->block(sums, COLUMNS, rows, 0, depth, tile, panel, next);
    for (whole r = 0; r < rows; r++)
        round_to_bf16((uint16_t *)c->dx + (row + r) * c->in + column, sums + r * COLUMNS, least(COLUMNS, c->in - column));
}

/* dX: sums over up to DEPTH words of outputs, or half as many where X has so many columns that twice the panels save a
   second copy of dY. */
static void backward_input(const struct call *c, float *tile) {
    whole words = c->in > PANELS * COLUMNS && !c->x_halves ? DEPTH / 2 : DEPTH;
    whole most = PANELS * DEPTH / words, each = words * COLUMNS;
    whole first, end, in = c->in, deep = depth_of(words, c->format);
    my_rows(c, &first, &end);
    for (whole n = 0; n < c->total; n += deep)
        for (whole from = 0; from < in; from += most * COLUMNS) {
            whole depth = least(deep, c->total - n), held = least(most, parts_of(in - from, COLUMNS));
#pragma omp for schedule(static, 1)
            for (whole p = 0; p < held; p++) pack_outputs(c, c->panels + p * each, n, from + p * COLUMNS, depth);
            for (whole row = first; row < end; row += c->height) {
                whole rows = least(c->height, end - row);
                struct ahead next = rows_of_gradients(c, row + c->height, end, n, depth);
                tile_of_gradients(c, tile, row, rows, n, depth);
                for (whole p = 0; p < held; p++) {
                    whole column = from + p * COLUMNS;
                    const float *panel = c->panels + p * each;
                    if (c->x_halves)
                        rounded_partial(c, row, rows, column, depth, tile, panel, &next);
                    else
                        partial(c->block, (float *)c->dx + row * in + column, in, rows, in - column, n > 0, depth, tile,
                                panel, &next);
                }
            }
#pragma omp barrier
        }
}

/* Those of the matrix unit: 32 rows of dY are turned, 16 outputs at a time. */
INLINE void turned_tiles(const struct matrix *m, float *tiles, whole count, whole n, whole k, whole depth,
                         const int halves) {
    for (whole j = 0; j < depth; j += 2 * TILE_SIDE)
        for (whole q = 0; q < 2 * count; q++) {
            whole at = n + q * TILE_SIDE;
            vec words[TILE_SIDE];
#pragma GCC unroll 16
            for (whole r = 0; r < TILE_SIDE; r++) {
                whole low = j + 2 * r;
                const char *y = number(m->y, (k + low) * m->y_row + at, halves), *below = number(y, m->y_row, halves);
                words[r] = (vec)rounded_pairs(low < depth ? some_numbers(y, 0, m->out - at, halves) : (vec){},
                                              low + 1 < depth ? some_numbers(below, 0, m->out - at, halves) : (vec){});
            }
            transpose(words);
            float *to = tiles + (q / 2 * BACK_DEPTH + j / 2) * MATRIX_ROWS + q % 2 * TILE_SIDE * TILE_SIDE;
            for (int i = 0; i < TILE_SIDE; i++) store(to + i * TILE_SIDE, words[i]);
        }
}

/* Floats of a tile of dY^T. */
static whole turned_floats(int format) { return BACK_DEPTH * (by_matrix(format) ? MATRIX_ROWS : TILE_STEP); }

/* Tiles of dY^T, outputs from n on, depth first: rows [k, k + depth) of dY. */
INLINE void tiles_of(const struct matrix *m, float *tiles, whole count, whole n, whole k, whole depth, int format,
                     const int halves) {
    if (by_matrix(format)) {
        turned_tiles(m, tiles, count, n, k, depth, halves);
        return;
    }
    int narrow = NARROW(format);
    for (whole j = 0; j < depth; j += 1 + narrow) {
        const char *y = number(m->y, (k + j) * m->y_row + n, halves);
        const char *next = j + 1 < depth ? number(y, m->y_row, halves) : NULL;
        for (whole q = 0; q < count; q++) {
            float *to = tiles + (q * BACK_DEPTH + j / (1 + narrow)) * TILE_STEP;
            whole at = q * BLOCK_ROWS, left = m->out - n - at;
            if (narrow)
                lay_words(to, number(y, at, halves), next ? number(next, at, halves) : NULL, left, TILE_STEP, halves);
            else
                lay_numbers(to, (const float *)y + at, left, TILE_STEP);
        }
    }
}

static void tiles_of_gradients(const struct matrix *m, float *tiles, whole count, whole n, whole k, whole depth, int format,
                               int halves) {
    if (halves)
        tiles_of(m, tiles, count, n, k, depth, format, 1);
    else
        tiles_of(m, tiles, count, n, k, depth, format, 0);
}

/* Rows [k + j, k + j + 1 or, rounded, 2) of X, of [k, k + depth), into all panels. */
INLINE void lay_inputs(const struct call *c, whole k, whole j, whole depth, const int halves) {
    whole narrow = NARROW(c->format), left = j < depth ? c->in : 0; /* none: zeros up to whole tiles */
    const char *x = number(c->x, (k + j) * c->x_row, halves), *next = j + 1 < depth ? number(x, c->x_row, halves) : NULL;
    float *panel = c->panels + j / (1 + narrow) * COLUMNS;
    for (whole at = 0; at < c->in; at += COLUMNS, panel += BACK_DEPTH * COLUMNS) {
        if (narrow)
            lay_words(panel, number(x, at, halves), next ? number(next, at, halves) : NULL, left - at, COLUMNS, halves);
        else
            lay_numbers(panel, (const float *)x + at, left - at, COLUMNS);
    }
}

static void pack_inputs(const struct call *c, whole k, whole j, whole depth) {
    if (c->x_halves)
        lay_inputs(c, k, j, depth, 1);
    else
        lay_inputs(c, k, j, depth, 0);
}

/* A step of dW: rows of X and dY from k on, and of matrix i this thread's tiles [first, end) from t on. Its tiles are packed
   once and meet the panels in rounds that stay in the second-level cache. */
struct group {
    whole k, i, t, first, end;
};

/* Rows at k; tiles of a group. */
static whole depth_at(const struct call *c, whole k) { return least(depth_of(BACK_DEPTH, c->format), c->rows - k); }
static whole tiles_in(const struct group *g) {
    whole all = g->end - g->first, even = parts_of(all, parts_of(all, GROUP));
    return least(even, g->end - g->t);
}

/* The first group of matrix i or of the next that has tiles for this thread; whether there is one. */
static int open_matrix(const struct call *c, struct group *g) {
    for (; g->i < c->count; g->i++) {
        my_share(parts_of(c->list[g->i].out, c->height), &g->first, &g->end);
        g->t = g->first;
        if (g->t < g->end) return 1;
    }
    return 0;
}

/* The next group at k; whether there is one. */
static int next_group(const struct call *c, struct group *g) {
    if ((g->t += tiles_in(g)) < g->end) return 1;
    g->i++;
    return open_matrix(c, g);
}

/* What a group's tiles are packed from, and this thread's share of the panels. */
static struct ahead gradients_of(const struct call *c, const struct group *g) {
    const struct matrix *m = &c->list[g->i];
    whole n = g->t * c->height;
    whole bytes = item(c->y_halves);
    return (struct ahead){.at = m->y + (g->k * m->y_row + n) * bytes, .row = bytes * m->y_row, .rows = depth_at(c, g->k),
                          .width = bytes * least(tiles_in(g) * c->height, m->out - n)};
}

static struct ahead inputs_at(const struct call *c, whole k) {
    whole first, end;
    my_share(depth_at(c, k), &first, &end);
    whole bytes = item(c->x_halves);
    return (struct ahead){.at = c->x + (k + first) * c->x_row * bytes, .row = bytes * c->x_row, .rows = end - first,
                          .width = bytes * c->in};
}

static void backward_group(const struct call *c, const struct group *g, int add, float *tiles, struct ahead *next) {
    const struct matrix *m = &c->list[g->i];
    whole in = c->in, depth = depth_at(c, g->k), count = tiles_in(g), round = ROUND_FLOATS / BACK_DEPTH;
    tiles_of_gradients(m, tiles, count, g->t * c->height, g->k, depth, c->format, c->y_halves);
    for (whole from = 0; from < in; from += round)
        for (whole q = 0; q < count; q++) {
            whole row = (g->t + q) * c->height, rows = least(c->height, m->out - row);
            for (whole column = from; column < least(in, from + round); column += COLUMNS)
                partial(c->block_by_depth, m->grad + row * in + column, in, rows, in - column, add || g->k > 0, depth,
                        tiles + q * turned_floats(c->format), c->panels + column * BACK_DEPTH, next);
        }
}

static void backward_weights(const struct call *c, int add, float *tiles) {
    struct group g = {0};
    for (whole k = 0, after; k < c->rows; k = after) {
        whole depth = depth_at(c, k), laid = laid_words(depth, c->format) * (1 + NARROW(c->format));
        after = k + depth;
#pragma omp for schedule(static)
        for (whole j = 0; j < laid; j += 1 + NARROW(c->format)) pack_inputs(c, k, j, depth);
        g = (struct group){.k = k};
        for (int any = open_matrix(c, &g); any;) {
            struct group now = g, first = {.k = after};
            struct ahead next = {0}, later = {0};
            any = next_group(c, &g);
            if (any) {
                next = gradients_of(c, &g);
            } else if (after < c->rows) {
                next = inputs_at(c, after);
                if (open_matrix(c, &first)) later = gradients_of(c, &first);
                next.then = &later;
            }
            backward_group(c, &now, add, tiles, &next);
        }
#pragma omp barrier
    }
}

enum work { INPUT, WEIGHTS, MORE_WEIGHTS };

/* Floats of what a thread packs, of the panels, and of scratch for any of these. */
static whole group_floats(int format) {
    whole group = GROUP * turned_floats(format), one = rows_of_block(format) * TILE_ROW;
    return group > one ? group : one;
}
static whole panels_floats(whole in) {
    whole all = parts_of(in, COLUMNS) * COLUMNS * BACK_DEPTH;
    return all > ROUND_FLOATS ? all : ROUND_FLOATS;
}
whole mm_linear_backward_scratch(whole in, int format, int threads) { return panels_floats(in) + threads * group_floats(format); }

/* MORE_WEIGHTS adds to what `grad` holds. */
void mm_linear_backward(int work, const struct matrix *list, whole count, int format, const char *x, char *dx, whole rows,
                        whole in, whole x_row, int x_halves, int y_halves, float *scratch, int threads) {
    struct call c = {.list = list, .x = x, .dx = dx, .count = count, .total = outputs_of(list, count), .rows = rows, .in = in,
                     .x_row = x_row, .height = rows_of_block(format), .format = format, .x_halves = x_halves,
                     .y_halves = y_halves, .block = block_of(format), .block_by_depth = block_by_depth_of(format),
                     .panels = scratch};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *tiles = scratch + panels_floats(in) + omp_get_thread_num() * group_floats(format);
        if (by_matrix(format)) open_tiles();
        if (work == INPUT)
            backward_input(&c, tiles);
        else
            backward_weights(&c, work == MORE_WEIGHTS, tiles);
        if (by_matrix(format)) close_tiles();
    }
}
