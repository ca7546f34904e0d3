/* The backward pass of memory_read in fp32; cpu.c says how both passes go. */

#include "memory_read_blocks.h"

/* The gradients' side of a call; the same order as _Backward in cpu.py. */
struct backward {
    const float *grad, *out; /* [B, Tq, H, D] */
    float *grad_q;           /* [B, Tq, H, D]; NULL where the queries are the keys: then it is added to grad_k */
    float *grad_k, *grad_v;  /* [shares, B, Tk, H, D] */
    double *grad_bandwidth;  /* [shares, B, H, 3]: base, slope, exponent */
};

/* What the backward pass keeps of a block. `q_rows` (times beta) and `grad_rows` are cut into strips of two vectors of
columns, each strip [queries][width of the strip]: the products that make dK and dV walk down a strip. Rounded,
`grad_panels` has words of neighbours, `q_rows` and `grad_rows` words of two queries, and `slope_words` [tile / 2][PANEL]
dS of a panel in words of two pairs; for the matrix unit `q_split` are split panels, and `grad_panels` have deep(D) / 2 rows. */
struct buffers {
    float *q_split, *q_panels, *grad_panels, *q_rows, *grad_rows, *sums, *weights, *slopes, *slope_words;
    float largest[MAX_QUERIES], scale[MAX_QUERIES], mean[MAX_QUERIES];
};

/* weights: scores to P; slopes: dP to dS = P (dP - mean), for rows [from, to) of panel p. */
static void differentiate(float *weights, float *slopes, const struct buffers *w, long p, long from, long to) {
    for (int i = 0; i < VECTORS; i++) {
        long at = p * PANEL + i * LANES;
        vec largest = load(w->largest + at), scale = load(w->scale + at), mean = load(w->mean + at);
        for (long j = from; j < to; j++) {
            vec weight = exp2_of(load(weights + j * PANEL + i * LANES) - largest) * scale;
            store(weights + j * PANEL + i * LANES, weight);
            store(slopes + j * PANEL + i * LANES, weight * (load(slopes + j * PANEL + i * LANES) - mean));
        }
    }
}

/* rows[r][columns] += sum over the queries i of panels [first, end) of a[p][r][i] * strip[i][columns], six rows, of
which `count` exist. */
INLINE void add_outer(float *rows, long row, const float *a, long a_panel, const float *strip, const int columns,
                      long first, long end, long count, const int rounded) {
    vec acc[12] = {};
    if (rounded) {
        nvec words[12] = {};
        for (long p = first; p < end; p++)
            multiply_words(words, 6, columns, PANEL / 2, a + p * a_panel, PANEL, 1, strip + p * PANEL / 2 * columns * LANES,
                           columns * LANES);
#pragma GCC unroll 12
        for (int i = 0; i < 6 * columns; i++) acc[i] = (vec)words[i];
    } else {
        for (long p = first; p < end; p++)
            multiply(acc, 6, columns, PANEL, a + p * a_panel, PANEL, 1, strip + p * PANEL * columns * LANES,
                     columns * LANES);
    }
#pragma GCC unroll 6
    for (int r = 0; r < 6; r++) {
        if (r >= count) break;
#pragma GCC unroll 2
        for (int i = 0; i < columns; i++) {
            float *to = rows + r * row + i * LANES;
            store(to, acc[r * columns + i] + load(to));
        }
    }
}

/* A panel none of whose queries reads anything writes nothing, and may lie between two that write the same rows: it counts as
zeros there. */
static void fill_gaps(struct buffers *w, const struct block *x, const long *to, long tile) {
    long first = 0, end = x->panels;
    while (first < end && !to[first]) first++;
    while (end > first && !to[end - 1]) end--;
    for (long p = first; p < end; p++)
        if (!to[p]) zero_rows(w->weights + p * tile * PANEL, 0, tile), zero_rows(w->slopes + p * tile * PANEL, 0, tile);
}

/* The panels [first, end) that wrote row j of a tile. */
static void readers(const struct block *x, const long *from, const long *to, long j, long *first, long *end) {
    *first = 0, *end = x->panels;
    while (*first < *end && !(from[*first] <= j && j < to[*first])) ++*first;
    while (*end > *first && !(from[*end - 1] <= j && j < to[*end - 1])) --*end;
}

/* rows[j] += the tile's weights times the block's strips, for the rows that the panels read: panel p wrote rows
[from[p], to[p]), multiples of 6 (from == to: none). */
INLINE void add_any_tile(float *rows, long row, const float *a, long tile, const float *strips, const struct block *x,
                         const long *from, const long *to, long count, long width, const int rounded) {
    for (long d = 0; d < width; d += 2 * LANES) {
        const float *strip = strips + d * x->panels * PANEL / (1 + rounded);
        for (long j = 0; j < count; j += 6) {
            long first, end;
            readers(x, from, to, j, &first, &end);
            if (first == end) continue;
            if (d + LANES < width)
                add_outer(rows + j * row + d, row, a + j * PANEL, tile * PANEL, strip, 2, first, end, count - j, rounded);
            else
                add_outer(rows + j * row + d, row, a + j * PANEL, tile * PANEL, strip, 1, first, end, count - j, rounded);
        }
    }
}

NOINLINE static void add_tile(float *rows, long row, const float *a, long tile, const float *strips,
                              const struct block *x, const long *from, const long *to, long count, long width) {
    add_any_tile(rows, row, a, tile, strips, x, from, to, count, width, 0);
}

NOINLINE static void add_word_tile(float *rows, long row, const float *a, long tile, const float *strips,
                                   const struct block *x, const long *from, const long *to, long count, long width) {
    add_any_tile(rows, row, a, tile, strips, x, from, to, count, width, 1);
}

NOINLINE static void add_matrix_tile(float *rows, long row, const float *a, long tile, const float *strips,
                                     const struct block *x, const long *from, const long *to, long count, long width) {
    for (long d = 0; d < width; d += SIDE) {
        const float *strip = strips + d * x->panels * PANEL / 2;
        for (long j = 0; j < count; j += SIDE) {
            long first, end;
            readers(x, from, to, j, &first, &end);
            if (first < end)
                add_outer_tiles(rows + j * row + d, row, a + j * PANEL, tile * PANEL, strip, smaller(SIDE, width - d), first,
                                end);
        }
    }
}

/* backward_tile in the matrix unit. */
static void matrix_tile(const struct call *c, const struct share *s, const struct block *x, struct buffers *w, long origin,
                        long rows) {
    long size = c->size, width = padded(size), depth = deep(size), row = row_of(size), tile = tile_of(size);
    long at = origin - s->base;
    long wrote_from[MAX_PANELS], wrote_to[MAX_PANELS];
    for (long p = 0; p < x->panels; p++) {
        long from = larger(0, x->begin[p] - origin), to = smaller(rows, x->end[p] - origin), first = from & -SIDE;
        long last = up_to(to, SIDE);
        wrote_from[p] = wrote_to[p] = 0;
        if (from >= to) continue;
        wrote_from[p] = first, wrote_to[p] = last;
        float *weights = w->weights + p * tile * PANEL, *slopes = w->slopes + p * tile * PANEL;
        score(weights, x, p, s->keys + at * depth, depth, w->q_split + p * PANEL * depth, depth, origin, from, to, 1);
        rounded_rows_times_panel(slopes, s->values + at * depth / 2, w->grad_panels + p * PANEL * depth / 2, depth, first, to);
        differentiate(weights, slopes, w, p, from, to);
        zero_rows(weights, first, from), zero_rows(weights, to, last);
        zero_rows(slopes, first, from), zero_rows(slopes, to, last);
        pair_rows(w->slope_words, slopes, first, last);
        add_columns_of_tiles(w->sums + p * PANEL * width, NULL, s->key_words + columns_floats(at, width), w->slope_words, width,
                             first, last);
        pair_neighbours(weights, first, last);
        pair_neighbours(slopes, first, last);
    }
    fill_gaps(w, x, wrote_to, tile);
    add_matrix_tile(s->grad_v + at * row, row, w->weights, tile, w->grad_rows, x, wrote_from, wrote_to, rows, width);
    add_matrix_tile(s->grad_k + at * row, row, w->slopes, tile, w->q_rows, x, wrote_from, wrote_to, rows, width);
}

static void backward_tile(const struct call *c, const struct share *s, const struct block *x, struct buffers *w,
                          long origin, long rows) {
    long width = padded(c->size), row = row_of(c->size), tile = tile_of(c->size), at = (origin - s->base) * row;
    int rounded = rounds(c);
    long wrote_from[MAX_PANELS], wrote_to[MAX_PANELS];
    for (long p = 0; p < x->panels; p++) {
        long from = larger(0, x->begin[p] - origin), to = smaller(rows, x->end[p] - origin), panel = p * PANEL * width;
        wrote_from[p] = wrote_to[p] = 0;
        if (from >= to) continue;
        float *weights = w->weights + p * tile * PANEL, *slopes = w->slopes + p * tile * PANEL;
        score(weights, x, p, s->keys + at, row, w->q_panels + panel, width, origin, from, to, 0);
        if (rounded)
            word_rows_times_panel(slopes, s->values + (origin - s->base) * word_row_of(c->size), word_row_of(c->size),
                                  w->grad_panels + panel / 2, width / 2, from & ~3L, to);
        else
            rows_times_panel(slopes, s->values + at, row, w->grad_panels + panel, width, from & ~3L, to);
        differentiate(weights, slopes, w, p, from, to);
        wrote_from[p] = from / 6 * 6, wrote_to[p] = up_to(to, 6);
        zero_rows(weights, wrote_from[p], from), zero_rows(weights, to, wrote_to[p]);
        zero_rows(slopes, wrote_from[p], from), zero_rows(slopes, to, wrote_to[p]);
        if (!rounded) {
            add_columns_times_panel(w->sums + panel, NULL, s->keys + at, row, slopes, width, from, to);
            continue;
        }
        pair_rows(w->slope_words, slopes, from & ~1L, up_to(to, 2));
        add_word_columns_times_panel(w->sums + panel, NULL, s->key_words + at / 2, row, w->slope_words, width, from / 2,
                                     up_to(to, 2) / 2);
        pair_neighbours(weights, wrote_from[p], wrote_to[p]);
        pair_neighbours(slopes, wrote_from[p], wrote_to[p]);
    }
    fill_gaps(w, x, wrote_to, tile);
    if (rounded) {
        add_word_tile(s->grad_v + at, row, w->weights, tile, w->grad_rows, x, wrote_from, wrote_to, rows, width);
        add_word_tile(s->grad_k + at, row, w->slopes, tile, w->q_rows, x, wrote_from, wrote_to, rows, width);
        return;
    }
    add_tile(s->grad_v + at, row, w->weights, tile, w->grad_rows, x, wrote_from, wrote_to, rows, width);
    add_tile(s->grad_k + at, row, w->slopes, tile, w->q_rows, x, wrote_from, wrote_to, rows, width);
}

/* Packs queries and upstream gradient both ways, and reads back what the forward pass left. */
static void open_buffers(struct buffers *w, const struct call *c, const struct backward *g, const struct share *s,
                         const struct block *x, float *scratch) {
    long size = c->size, width = padded(size), tile = tile_of(size), queries = x->panels * PANEL;
    long out_row = c->heads * size, at = (x->b * c->queries + x->first) * out_row + x->h * size;
    long q_row, statistics = (x->b * c->heads + x->h) * c->queries + x->first;
    const float *q = queries_of(c, s, x, &q_row), *grad = g->grad + at, *out = g->out + at;
    float scale[MAX_QUERIES], one[PANEL];
    long words = rounds(c) ? queries * width / 2 : queries * width;
    int matrix = reads_by_matrix(c);
    w->q_panels = take(&scratch, queries * width);
    w->q_split = matrix ? take(&scratch, queries * deep(size)) : NULL;
    w->grad_panels = take(&scratch, matrix ? queries * deep(size) / 2 : words);
    w->q_rows = take(&scratch, words), w->grad_rows = take(&scratch, words);
    w->sums = take(&scratch, queries * width);
    w->weights = take(&scratch, tile * queries), w->slopes = take(&scratch, tile * queries);
    w->slope_words = rounds(c) ? take(&scratch, tile / 2 * PANEL) : NULL; /* less than what words spare */
    memset(w->sums, 0, queries * width * sizeof(float));
    for (long i = 0; i < PANEL; i++) one[i] = 1;
    for (long i = 0; i < queries; i++) {
        int reads = i < x->count && x->number[i];
        scale[i] = x->beta[i] * LOG2_E;
        w->largest[i] = reads ? c->largest[statistics + i] : 0;
        w->scale[i] = reads ? 1 / c->total[statistics + i] : 0;
    }
    dot_rows(w->mean, grad, out, out_row, x->count, queries, size);
    if (rounds(c)) {
        pack_strip_pairs(w->q_rows, q, q_row, x->beta, x->count, queries, size);
        pack_strip_pairs(w->grad_rows, grad, out_row, NULL, x->count, queries, size);
    } else {
        pack_strips(w->q_rows, q, q_row, x->beta, x->count, queries, size);
        pack_strips(w->grad_rows, grad, out_row, NULL, x->count, queries, size);
    }
    for (long p = 0; p < x->panels; p++) {
        long first = p * PANEL, count = x->count - first;
        pack_panel(w->q_panels + first * width, q + first * q_row, q_row, scale + first, count, size);
        if (matrix) {
            long depth = deep(size);
            split_panel(w->q_split + first * depth, w->q_panels + first * width, width, depth);
            pack_panel_neighbours(w->grad_panels + first * depth / 2, grad + first * out_row, out_row, count, size);
            memset(w->grad_panels + first * depth / 2 + width / 2 * PANEL, 0, (depth - width) / 2 * PANEL * sizeof(float));
        } else if (rounds(c))
            pack_panel_neighbours(w->grad_panels + first * width / 2, grad + first * out_row, out_row, count, size);
        else
            pack_panel(w->grad_panels + first * width, grad + first * out_row, out_row, one, count, size);
    }
}

/* Writes dQ = beta * sums (or adds it to dK), and sums the gradients of base, slope and exponent:
d beta_i = q_i . sums_i. */
static void close_block(const struct call *c, const struct backward *g, const struct share *s, const struct block *x,
                        const struct buffers *w, double *grad_bandwidth) {
    long size = c->size, width = padded(size), row = row_of(size), out_row = c->heads * size;
    for (long p = 0; p < x->panels; p++) {
        long first = p * PANEL, count = smaller(PANEL, x->count - first), query = x->first + first;
        const float *queries = w->q_panels + first * width, *sums = w->sums + first * width;
        vec dots[VECTORS] = {};
        for (long d = 0; d < size; d++)
            for (int i = 0; i < VECTORS; i++)
                dots[i] += load(queries + d * PANEL + i * LANES) * load(sums + d * PANEL + i * LANES);
        for (long i = 0; i < count; i++) {
            float n = x->number[first + i], beta = x->beta[first + i];
            if (n == 0 || beta == 0) continue;
            double grad_beta = dots[i / LANES][i % LANES] / (beta * LOG2_E), power = powf(n, c->exponent[x->h]);
            grad_bandwidth[0] += grad_beta;
            grad_bandwidth[1] += grad_beta * power;
            grad_bandwidth[2] += grad_beta * power * c->slope[x->h] * logf(n);
        }
        if (g->grad_q)
            unpack_panel(g->grad_q + (x->b * c->queries + query) * out_row + x->h * size, out_row, sums,
                         x->beta + first, count, size, 0);
        else
            unpack_panel(s->grad_k + (query - s->base) * row, row, sums, x->beta + first, count, size, 1);
    }
}

/* The share's dK or dV to its place in [shares, B, Tk, H, D]; zeros for the pairs that it does not read. */
static void close_share(float *grad, const float *rows, const struct call *c, const struct share *s, long number) {
    long size = c->size, out_row = c->heads * size;
    grad += ((number * c->batch + s->b) * c->pairs * c->heads + s->h) * size;
    for (long j = 0; j < c->pairs; j++) {
        const float *from = j >= s->base && j < s->base + s->rows ? rows + (j - s->base) * row_of(size) : NULL;
        for (long d = 0; d < size && j + 8 < c->pairs; d += 16) __builtin_prefetch(grad + (j + 8) * out_row + d, 1);
        for (long d = 0; d < size; d += LANES)
            store_part(grad + j * out_row + d, from ? load(from + d) : (vec){}, size - d);
    }
}

void memory_read_backward(const struct call *c, const struct backward *g, float *scratch) {
    long length = block_length(c), each = scratch_of(c, 4), row = row_of(c->size), tile = tile_of(c->size);
#pragma omp parallel for schedule(dynamic) num_threads(c->threads)
    for (long unit = 0; unit < c->batch * c->heads * c->shares; unit++) {
        float *own = scratch + omp_get_thread_num() * each;
        struct share s;
        struct block x;
        struct buffers w;
        open_share(&s, c, unit, 1, &own);
        if (reads_by_matrix(c)) open_tiles();
        s.grad_k = take(&own, (s.rows + SIDE) * row), s.grad_v = take(&own, (s.rows + SIDE) * row);
        memset(s.grad_k, 0, s.rows * row * sizeof(float));
        memset(s.grad_v, 0, s.rows * row * sizeof(float));
        double sums[3] = {0};
        for (long i = 0; i < s.count; i += length) {
            open_block(&x, c, s.b, s.h, s.first + i, smaller(length, s.count - i));
            open_buffers(&w, c, g, &s, &x, own);
            long stop = x.end[x.panels - 1];
            for (long origin = first_tile(c, &s, &x); origin < stop; origin += tile)
                (reads_by_matrix(c) ? matrix_tile : backward_tile)(c, &s, &x, &w, origin, smaller(tile, stop - origin));
            close_block(c, g, &s, &x, &w, sums);
        }
        long number = unit % c->shares;
        memcpy(g->grad_bandwidth + ((number * c->batch + s.b) * c->heads + s.h) * 3, sums, sizeof sums);
        close_share(g->grad_k, s.grad_k, c, &s, number);
        close_share(g->grad_v, s.grad_v, c, &s, number);
        if (reads_by_matrix(c)) close_tiles();
    }
}

/* Floats of scratch for each thread. */
long memory_read_backward_scratch(const struct call *c) { return scratch_of(c, 4); }
