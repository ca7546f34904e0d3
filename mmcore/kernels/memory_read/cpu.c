/* memory_read in fp32 for many queries: forward and backward without a Tq x Tk matrix.

A block of up to 8 panels of queries (memory_read_tiles.h) meets the pairs that any of its queries may read in tiles
of up to TILE pairs. Each panel takes from a tile only the rows between its own first and last pair, so that a window,
a delay or a document costs what is read and not what is masked; masks touch only the rows at the edges of that range.

Forward: running maximum and sum (online softmax). It leaves out, and for each query the largest score and the sum,
apart from each other: at a bandwidth of exp(10) their sum, the logsumexp, would lose what softmax needs.
Backward: the same tiles once more. P = exp(S - largest) / total, dS = P (dP - dO.O); dQ is gathered per block, dK and
dV are added to the gradients tile by tile. One thread owns a head of a row (or, with fewer of these than threads, a
share of its blocks and a copy of its dK and dV), in a fixed order: the result does not depend on timing. */

#include <limits.h>
#include <omp.h>

#include "memory_read_call.h"
#include "memory_read_tiles.h"

#define MAX_PANELS 8
#define MAX_QUERIES (MAX_PANELS * PANEL)
#define MAX_TILE 96
#define LOWEST (-3.0e38f) /* the score of a pair that may not be read */
#define LOG2_E 1.4426950408889634f

/* The gradients' side of a call; the same order as _Backward in cpu.py. Pair gradients have the strides of a
contiguous [B, Tk, H, D], and `copies` of them lie behind one another. */
struct backward {
    const float *grad, *out; /* [B, Tq, H, D] */
    float *grad_q;           /* [B, Tq, H, D]; where it is grad_k, it is added to what is there */
    float *grad_k, *grad_v;  /* [copies, B, Tk, H, D], zeros before */
    double *grad_bandwidth;  /* [copies, B, H, 3]: base, slope, exponent; zeros before */
    long copies;
};

static long up_to(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }
static long smaller(long a, long b) { return a < b ? a : b; }
static long larger(long a, long b) { return a > b ? a : b; }

/* Sizes that depend on D: the buffers of a block should stay in a second-level cache of 512 KiB. */
static long padded(long size) { return up_to(size, LANES); }
static long row_of(long size) { return padded(size) + 16; } /* not a power of two: rows would fall into the same sets */
static long tile_of(long size) { return size <= 96 ? 96 : 48; }
static long panels_of(long size) { return larger(1, smaller(MAX_PANELS, 512 / padded(size))); }

/* One block of queries of one head, and the pairs that each of its panels reads. */
struct block {
    long b, h, first, count, panels;
    int lo[MAX_QUERIES], hi[MAX_QUERIES]; /* of each query */
    int begin[MAX_PANELS], end[MAX_PANELS]; /* of each panel: all pairs between these, end not included */
    int inner_begin[MAX_PANELS], inner_end[MAX_PANELS]; /* the pairs that every query of the panel reads */
    float beta[MAX_QUERIES], number[MAX_QUERIES];
};

static void open_block(struct block *x, const struct call *c, long b, long h, long first, long count) {
    x->b = b, x->h = h, x->first = first, x->count = count, x->panels = (count + PANEL - 1) / PANEL;
    for (long i = 0; i < x->panels * PANEL; i++) {
        long lo, hi, n = reach(c, b, first + smaller(i, count - 1), &lo, &hi);
        x->lo[i] = n ? lo : INT_MAX, x->hi[i] = n ? hi : -1;
        x->number[i] = n;
        x->beta[i] = n ? bandwidth(c, h, n) : 0;
    }
    for (long p = 0; p < x->panels; p++) {
        int lo = INT_MAX, hi = -1, last_lo = 0, first_hi = INT_MAX;
        for (long i = p * PANEL; i < (p + 1) * PANEL; i++) {
            lo = smaller(lo, x->lo[i]), hi = larger(hi, x->hi[i]);
            last_lo = larger(last_lo, x->lo[i]), first_hi = smaller(first_hi, x->hi[i]);
        }
        x->begin[p] = lo, x->end[p] = hi + 1;
        x->inner_begin[p] = last_lo, x->inner_end[p] = first_hi + 1;
    }
    /* Make begin and end grow from panel to panel, as they do in any text: the panels that read a pair then lie side
    by side, which the backward pass relies on. */
    for (long p = 1; p < x->panels; p++) x->end[p] = larger(x->end[p], x->end[p - 1]);
    for (long p = x->panels - 2; p >= 0; p--) x->begin[p] = smaller(x->begin[p], x->begin[p + 1]);
}

/* Writes LOWEST over the scores in rows [from, to) of the tile at `origin` that their query may not read. */
static void mask(float *scores, const struct block *x, long p, long origin, long from, long to) {
    for (int i = 0; i < PANEL; i += LANES) {
        ivec lo = load_ints(x->lo + p * PANEL + i) - (int)origin, hi = load_ints(x->hi + p * PANEL + i) - (int)origin;
        for (long j = from; j < to; j++) {
            ivec pair = (ivec){} + (int)j;
            float *s = scores + j * PANEL + i;
            store(s, choose((lo > pair) | (hi < pair), splat(LOWEST), load(s)));
        }
    }
}

/* The scores of panel p and the rows [from, to) of a tile, masked; `to` is rounded up to a multiple of 4. */
static void score(float *scores, const struct block *x, long p, const float *keys, long row, const float *panel,
                  long size, long origin, long from, long to) {
    long even_from = from & ~3L, even_to = up_to(to, 4);
    rows_times_panel(scores, keys, row, panel, size, even_from, even_to);
    long inner_from = larger(from, smaller(to, x->inner_begin[p] - origin));
    long inner_to = smaller(to, larger(inner_from, x->inner_end[p] - origin));
    mask(scores, x, p, origin, from, inner_from);
    mask(scores, x, p, origin, inner_to, to);
}

/* Scores to weights 2^(score - largest) in place. Updates largest and total, and gives the factor by which what was
summed up to now shrinks. */
static void soften(float *scores, float *largest, float *total, float *factor, long from, long to) {
    vec top[3], shift[3], sum[3];
    for (int i = 0; i < 3; i++) top[i] = load(largest + i * LANES);
    for (long j = from; j < to; j++)
        for (int i = 0; i < 3; i++) top[i] = maximum(load(scores + j * PANEL + i * LANES), top[i]);
    for (int i = 0; i < 3; i++) {
        vec shrink = exp2_of(load(largest + i * LANES) - top[i]);
        store(largest + i * LANES, top[i]);
        store(factor + i * LANES, shrink);
        sum[i] = load(total + i * LANES) * shrink;
        /* a query that has read nothing yet: its masked scores must become 0, not 2^0 */
        shift[i] = choose(top[i] == LOWEST, (vec){}, top[i]);
    }
    for (long j = from; j < to; j++) {
        for (int i = 0; i < 3; i++) {
            vec weight = exp2_of(load(scores + j * PANEL + i * LANES) - shift[i]);
            store(scores + j * PANEL + i * LANES, weight);
            sum[i] += weight;
        }
    }
    for (int i = 0; i < 3; i++) store(total + i * LANES, sum[i]);
}

/* Scratch of one thread, in floats. */
long memory_read_scratch(long size) {
    long panels = panels_of(size), queries = panels * PANEL, tile = tile_of(size);
    return up_to(2 * tile * row_of(size) + 5 * queries * padded(size) + 2 * tile * queries, 16);
}

static float *take(float **scratch, long floats) {
    float *start = *scratch;
    *scratch += up_to(floats, 16);
    return start;
}

static void forward_block(const struct call *c, const struct block *x, float *scratch) {
    long size = c->size, width = padded(size), row = row_of(size), tile = tile_of(size), queries = x->panels * PANEL;
    float *panels = take(&scratch, queries * width), *sums = take(&scratch, queries * width);
    float *keys = take(&scratch, tile * row), *values = take(&scratch, tile * row);
    float *scores = take(&scratch, tile * PANEL), factor[PANEL], scale[MAX_QUERIES];
    float largest[MAX_QUERIES], total[MAX_QUERIES];
    const float *q = c->q + x->b * c->q_stride[0] + x->first * c->q_stride[1] + x->h * c->q_stride[2];
    const float *k = c->k + x->b * c->k_stride[0] + x->h * c->k_stride[2];
    const float *v = c->v + x->b * c->v_stride[0] + x->h * c->v_stride[2];

    for (long i = 0; i < queries; i++) scale[i] = x->beta[i] * LOG2_E, largest[i] = LOWEST, total[i] = 0;
    for (long p = 0; p < x->panels; p++)
        pack_panel(panels + p * PANEL * width, q + p * PANEL * c->q_stride[1], c->q_stride[1], scale + p * PANEL,
                   x->count - p * PANEL, size);
    memset(sums, 0, queries * width * sizeof(float));

    long stop = x->end[x->panels - 1];
    for (long origin = x->begin[0]; origin < stop; origin += tile) {
        long rows = smaller(tile, stop - origin);
        pack_rows(keys, row, width, k + origin * c->k_stride[1], c->k_stride[1], NULL, rows, rows, size);
        pack_rows(values, row, width, v + origin * c->v_stride[1], c->v_stride[1], NULL, rows, rows, size);
        for (long p = 0; p < x->panels; p++) {
            long from = larger(0, x->begin[p] - origin), to = smaller(rows, x->end[p] - origin);
            if (from >= to) continue;
            score(scores, x, p, keys, row, panels + p * PANEL * width, width, origin, from, to);
            soften(scores, largest + p * PANEL, total + p * PANEL, factor, from, to);
            add_columns_times_panel(sums + p * PANEL * width, factor, values, row, scores, width, from, to);
        }
    }

    long out_row = c->heads * size;
    float *out = c->out + (x->b * c->queries + x->first) * out_row + x->h * size;
    for (long i = 0; i < queries; i++) scale[i] = x->number[i] ? 1 / total[i] : 0;
    for (long p = 0; p < x->panels; p++)
        unpack_panel(out + p * PANEL * out_row, out_row, sums + p * PANEL * width, scale + p * PANEL,
                     smaller(PANEL, x->count - p * PANEL), size, 0);
    if (c->largest) {
        long at = (x->b * c->heads + x->h) * c->queries + x->first;
        memcpy(c->largest + at, largest, x->count * sizeof(float));
        memcpy(c->total + at, total, x->count * sizeof(float));
    }
}

/* The queries of a block: a multiple of PANEL, and blocks of a text about equally long. */
static long block_length(const struct call *c) {
    long panels = (c->queries + PANEL - 1) / PANEL, most = panels_of(c->size);
    long blocks = (panels + most - 1) / most;
    return (panels + blocks - 1) / blocks * PANEL;
}

void memory_read_forward(const struct call *c) {
    if (c->queries == 0) return;
    long length = block_length(c), blocks = (c->queries + length - 1) / length, each = memory_read_scratch(c->size);
#pragma omp parallel num_threads(c->threads)
    {
        float *scratch = c->scratch + omp_get_thread_num() * each;
        struct block x;
        /* the last blocks read most: they go first, so that no thread is left alone with one */
#pragma omp for schedule(dynamic) collapse(2)
        for (long unit = 0; unit < c->batch * c->heads; unit++) {
            for (long n = blocks - 1; n >= 0; n--) {
                open_block(&x, c, unit / c->heads, unit % c->heads, n * length, smaller(length, c->queries - n * length));
                forward_block(c, &x, scratch);
            }
        }
    }
}

/* What the backward pass keeps of a block. `q_rows` (times beta) and `grad_rows` are cut into strips of two vectors of
columns, each strip [queries][width of the strip]: the products that make dK and dV walk down a strip. */
struct buffers {
    float *q_panels, *grad_panels, *q_rows, *grad_rows, *sums, *keys, *values, *weights, *slopes;
    float largest[MAX_QUERIES], scale[MAX_QUERIES], mean[MAX_QUERIES];
};

/* weights: scores to P; slopes: dP to dS = P (dP - mean), for rows [from, to) of panel p. */
static void differentiate(float *weights, float *slopes, const struct buffers *w, long p, long from, long to) {
    for (int i = 0; i < 3; i++) {
        long at = p * PANEL + i * LANES;
        vec largest = load(w->largest + at), scale = load(w->scale + at), mean = load(w->mean + at);
        for (long j = from; j < to; j++) {
            vec weight = exp2_of(load(weights + j * PANEL + i * LANES) - largest) * scale;
            store(weights + j * PANEL + i * LANES, weight);
            store(slopes + j * PANEL + i * LANES, weight * (load(slopes + j * PANEL + i * LANES) - mean));
        }
    }
}

/* rows[j][d ..] += sum over the queries i of panels [first, end) of a[p][j][i] * strip[i][columns], six rows at `j`. */
INLINE void add_outer(float *rows, long row, const float *a, long a_panel, const float *strip, const int columns,
                      long first, long end, long count, long size) {
    vec acc[12] = {};
    for (long p = first; p < end; p++)
        multiply(acc, 6, columns, PANEL, a + p * a_panel, PANEL, 1, strip + p * PANEL * columns * LANES, columns * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < 6; r++) {
        if (r >= count) break;
#pragma GCC unroll 2
        for (int i = 0; i < columns; i++) {
            float *to = rows + r * row + i * LANES;
            store_part(to, acc[r * columns + i] + load_part(to, size - i * LANES), size - i * LANES);
        }
    }
}

/* rows[j][0 .. size) += the tile's weights times the block's strips, for the rows that the panels read: panel p wrote
rows [from[p], to[p]), multiples of 6 (from == to: none). */
static void add_tile(float *rows, long row, const float *a, long tile, const float *strips, const struct block *x,
                     const long *from, const long *to, long count, long size) {
    long width = padded(size), queries = x->panels * PANEL;
    for (long d = 0; d < width; d += 2 * LANES) {
        for (long j = 0; j < count; j += 6) {
            long first = 0, end = x->panels;
            while (first < end && !(from[first] <= j && j < to[first])) first++;
            while (end > first && !(from[end - 1] <= j && j < to[end - 1])) end--;
            if (first == end) continue;
            const float *strip = strips + d * queries;
            if (d + LANES < width)
                add_outer(rows + j * row + d, row, a + j * PANEL, tile * PANEL, strip, 2, first, end, count - j, size - d);
            else
                add_outer(rows + j * row + d, row, a + j * PANEL, tile * PANEL, strip, 1, first, end, count - j, size - d);
        }
    }
}

static void zero_rows(float *panel, long from, long to) {
    if (to > from) memset(panel + from * PANEL, 0, (to - from) * PANEL * sizeof(float));
}

static void backward_tile(const struct call *c, const struct block *x, struct buffers *w, float *grad_k, float *grad_v,
                          long origin, long rows) {
    long width = padded(c->size), row = row_of(c->size), tile = tile_of(c->size);
    long wrote_from[MAX_PANELS], wrote_to[MAX_PANELS];
    const float *k = c->k + x->b * c->k_stride[0] + origin * c->k_stride[1] + x->h * c->k_stride[2];
    const float *v = c->v + x->b * c->v_stride[0] + origin * c->v_stride[1] + x->h * c->v_stride[2];
    pack_rows(w->keys, row, width, k, c->k_stride[1], NULL, rows, rows, c->size);
    pack_rows(w->values, row, width, v, c->v_stride[1], NULL, rows, rows, c->size);
    for (long p = 0; p < x->panels; p++) {
        long from = larger(0, x->begin[p] - origin), to = smaller(rows, x->end[p] - origin), panel = p * PANEL * width;
        wrote_from[p] = wrote_to[p] = 0;
        if (from >= to) continue;
        float *weights = w->weights + p * tile * PANEL, *slopes = w->slopes + p * tile * PANEL;
        score(weights, x, p, w->keys, row, w->q_panels + panel, width, origin, from, to);
        rows_times_panel(slopes, w->values, row, w->grad_panels + panel, width, from & ~3L, up_to(to, 4));
        differentiate(weights, slopes, w, p, from, to);
        add_columns_times_panel(w->sums + panel, NULL, w->keys, row, slopes, width, from, to);
        wrote_from[p] = from / 6 * 6, wrote_to[p] = up_to(to, 6);
        zero_rows(weights, wrote_from[p], from), zero_rows(weights, to, wrote_to[p]);
        zero_rows(slopes, wrote_from[p], from), zero_rows(slopes, to, wrote_to[p]);
    }
    long out_row = c->heads * c->size, at = ((x->b * c->pairs + origin) * c->heads + x->h) * c->size;
    add_tile(grad_v + at, out_row, w->weights, tile, w->grad_rows, x, wrote_from, wrote_to, rows, c->size);
    add_tile(grad_k + at, out_row, w->slopes, tile, w->q_rows, x, wrote_from, wrote_to, rows, c->size);
}

static float dot(const float *a, const float *b, long size) {
    vec sum = {};
    for (long d = 0; d < size; d += LANES) sum += load_part(a + d, size - d) * load_part(b + d, size - d);
    return sum_of(sum);
}

/* Packs queries and upstream gradient both ways, and reads back what the forward pass left. */
static void open_buffers(struct buffers *w, const struct call *c, const struct backward *g, const struct block *x,
                         float *scratch) {
    long size = c->size, width = padded(size), row = row_of(size), tile = tile_of(size), queries = x->panels * PANEL;
    long out_row = c->heads * size, at = (x->b * c->queries + x->first) * out_row + x->h * size;
    const float *q = c->q + x->b * c->q_stride[0] + x->first * c->q_stride[1] + x->h * c->q_stride[2];
    const float *grad = g->grad + at, *out = g->out + at;
    float scale[MAX_QUERIES], one[PANEL];
    w->q_panels = take(&scratch, queries * width), w->grad_panels = take(&scratch, queries * width);
    w->q_rows = take(&scratch, queries * width), w->grad_rows = take(&scratch, queries * width);
    w->sums = take(&scratch, queries * width);
    w->keys = take(&scratch, tile * row), w->values = take(&scratch, tile * row);
    w->weights = take(&scratch, tile * queries), w->slopes = take(&scratch, tile * queries);
    for (long i = 0; i < PANEL; i++) one[i] = 1;
    for (long i = 0; i < queries; i++) scale[i] = x->beta[i] * LOG2_E;
    for (long p = 0; p < x->panels; p++) {
        long first = p * PANEL, count = x->count - first;
        pack_panel(w->q_panels + first * width, q + first * c->q_stride[1], c->q_stride[1], scale + first, count, size);
        pack_panel(w->grad_panels + first * width, grad + first * out_row, out_row, one, count, size);
    }
    for (long d = 0; d < width; d += 2 * LANES) {
        long strip = smaller(2 * LANES, width - d);
        pack_rows(w->q_rows + d * queries, strip, strip, q + d, c->q_stride[1], x->beta, x->count, queries, size - d);
        pack_rows(w->grad_rows + d * queries, strip, strip, grad + d, out_row, NULL, x->count, queries, size - d);
    }
    memset(w->sums, 0, queries * width * sizeof(float));
    long statistics = (x->b * c->heads + x->h) * c->queries + x->first;
    for (long i = 0; i < queries; i++) {
        int reads = i < x->count && x->number[i];
        w->largest[i] = reads ? c->largest[statistics + i] : 0;
        w->scale[i] = reads ? 1 / c->total[statistics + i] : 0;
        w->mean[i] = reads ? dot(grad + i * out_row, out + i * out_row, size) : 0;
    }
}

/* Writes (or adds) dQ = beta * sums, and sums the gradients of base, slope and exponent: d beta_i = q_i . sums_i. */
static void close_block(const struct call *c, const struct backward *g, const struct block *x, const struct buffers *w,
                        double *grad_bandwidth) {
    long size = c->size, width = padded(size), out_row = c->heads * size;
    long at = (x->b * c->queries + x->first) * out_row + x->h * size;
    for (long p = 0; p < x->panels; p++) {
        long first = p * PANEL;
        const float *queries = w->q_panels + first * width, *sums = w->sums + first * width;
        vec dots[3] = {};
        for (long d = 0; d < size; d++)
            for (int i = 0; i < 3; i++)
                dots[i] += load(queries + d * PANEL + i * LANES) * load(sums + d * PANEL + i * LANES);
        for (long i = 0; i < PANEL && first + i < x->count; i++) {
            float n = x->number[first + i], beta = x->beta[first + i];
            if (n == 0 || beta == 0) continue;
            double grad_beta = dots[i / LANES][i % LANES] / (beta * LOG2_E), power = powf(n, c->exponent[x->h]);
            grad_bandwidth[0] += grad_beta;
            grad_bandwidth[1] += grad_beta * power;
            grad_bandwidth[2] += grad_beta * power * c->slope[x->h] * logf(n);
        }
        unpack_panel(g->grad_q + at + first * out_row, out_row, sums, x->beta + first,
                     smaller(PANEL, x->count - first), size, g->grad_q == g->grad_k);
    }
}

static void backward_head(const struct call *c, const struct backward *g, long copy, long b, long h, float *scratch) {
    long length = block_length(c), blocks = (c->queries + length - 1) / length, tile = tile_of(c->size);
    long floats = c->batch * c->pairs * c->heads * c->size;
    double *grad_bandwidth = g->grad_bandwidth + ((copy * c->batch + b) * c->heads + h) * 3;
    struct block x;
    struct buffers w;
    for (long n = copy; n < blocks; n += g->copies) {
        open_block(&x, c, b, h, n * length, smaller(length, c->queries - n * length));
        open_buffers(&w, c, g, &x, scratch);
        long stop = x.end[x.panels - 1];
        for (long origin = x.begin[0]; origin < stop; origin += tile)
            backward_tile(c, &x, &w, g->grad_k + copy * floats, g->grad_v + copy * floats, origin,
                          smaller(tile, stop - origin));
        close_block(c, g, &x, &w, grad_bandwidth);
    }
}

void memory_read_backward(const struct call *c, const struct backward *g) {
    if (c->queries == 0) return;
    long each = memory_read_scratch(c->size);
#pragma omp parallel for schedule(dynamic) num_threads(c->threads)
    for (long unit = 0; unit < c->batch * c->heads * g->copies; unit++) {
        long head = unit / g->copies;
        backward_head(c, g, unit % g->copies, head / c->heads, head % c->heads, c->scratch + omp_get_thread_num() * each);
    }
}
