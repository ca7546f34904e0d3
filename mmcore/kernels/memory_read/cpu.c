/* memory_read in fp32 for many queries: forward and backward without a Tq x Tk matrix.

A block of up to 8 panels of queries (memory_read_tiles.h) meets the pairs that any of its queries may read in tiles
of up to TILE pairs. Each panel takes from a tile only the rows between its own first and last pair, so that a window,
a delay or a document costs what is read and not what is masked; masks touch only the rows at the edges of that range.

A thread takes one head of a row (or a share of its queries, where heads are fewer than threads) and first copies the
keys and values that it needs side by side: read in place, with heads * D floats from row to row and two rows to a page,
they cost a TLB miss for each page and tile, and the kernel ran at 66 instead of 84 GFLOP/s a core.

Forward: running maximum and sum (online softmax). It leaves out, and for each query the largest score and the sum,
apart from each other: at a bandwidth of exp(10) their sum, the logsumexp, would lose what softmax needs.
Backward: the same tiles once more. P = exp(S - largest) / total, dS = P (dP - dO.O); dQ is gathered per block, dK and
dV gather in the thread's own rows. Every sum has a fixed order: the result does not depend on timing.

Where products are to be rounded, operands of all but the scores are (memory_read_words.h), at twice the speed: a bandwidth
multiplies the rounding of keys, so that scores of bf16 keys were off by 0.1 and more. */

#include <limits.h>
#include <omp.h>

#include "memory_read_call.h"
#include "memory_read_tiles.h"
#include "memory_read_words.h"

#define MAX_PANELS 8
#define MAX_QUERIES (MAX_PANELS * PANEL)
#define MAX_TILE 96
#define LOWEST (-3.0e38f) /* the score of a pair that may not be read */
#define LOG2_E 1.4426950408889634f

/* The gradients' side of a call; the same order as _Backward in cpu.py. */
struct backward {
    const float *grad, *out; /* [B, Tq, H, D] */
    float *grad_q;           /* [B, Tq, H, D]; NULL where the queries are the keys: then it is added to grad_k */
    float *grad_k, *grad_v;  /* [shares, B, Tk, H, D] */
    double *grad_bandwidth;  /* [shares, B, H, 3]: base, slope, exponent */
};

static long up_to(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }
static long smaller(long a, long b) { return a < b ? a : b; }
static long larger(long a, long b) { return a > b ? a : b; }

/* Sizes that depend on D: the buffers of a block should stay in a second-level cache of 512 KiB. */
static long padded(long size) { return up_to(size, LANES); }
static long row_of(long size) { return padded(size) + 16; } /* not a power of two: rows would fall into the same sets */
static long tile_of(long size) { return size <= 96 ? 96 : 48; }
static long word_row_of(long size) { return row_of(size) / 2; }
static long panels_of(long size) { return larger(1, smaller(MAX_PANELS, 512 / padded(size))); }

static int rounds(const struct call *c) { return NARROW_BF16 && c->rounded && !c->narrow; }

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

/* The scores of panel p and the rows [from, to) of a tile, masked. */
static void score(float *scores, const struct block *x, long p, const float *keys, long row, const float *panel,
                  long size, long origin, long from, long to) {
    rows_times_panel(scores, keys, row, panel, size, from & ~3L, to);
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

/* What a thread works on: some queries of one head, and the pairs [base, base + rows) that they read, copied. */
struct share {
    long b, h, first, count, base, rows;
    int whole;                              /* all queries, all pairs, and the queries are the keys */
    float *keys, *values, *grad_k, *grad_v; /* [rows][row_of(D)] */
    /* Rounded, `values` are words: of two rows, [rows / 2][row_of(D)]; in the backward pass of neighbours,
       [rows][word_row_of(D)], and there are keys in words of two rows as well. */
    float *key_words;
};

/* The queries of a block: a multiple of PANEL, and blocks of about equal length. */
static long block_length(const struct call *c) {
    long panels = up_to(larger(1, c->queries), PANEL) / PANEL, most = panels_of(c->size);
    long blocks = (panels + most - 1) / most;
    return (panels + blocks - 1) / blocks * PANEL;
}

static long share_length(const struct call *c) {
    long length = block_length(c), blocks = (c->queries + length - 1) / length;
    return (blocks + c->shares - 1) / c->shares * length;
}

/* Scratch of one thread, in floats; `copies` is 2 for the forward pass (keys, values), 4 for the backward pass. Words take
the space of values: in the forward pass half of it, in the backward pass keys' and values' a half each. */
long memory_read_scratch(const struct call *c, long copies) {
    long size = c->size, queries = panels_of(size) * PANEL;
    long rows = c->window && c->shares > 1 ? smaller(c->pairs, share_length(c) + c->window) : c->pairs;
    return up_to(copies * (rows + 12) * row_of(size) + 5 * queries * padded(size) + 2 * tile_of(size) * queries, 16);
}

static float *take(float **scratch, long floats) {
    float *start = *scratch;
    *scratch += up_to(floats, 16);
    return start;
}

/* Share number `unit` of all: finds its pairs and copies them. The last queries read most and so go first: no thread is
left alone with a long one. */
static void open_share(struct share *s, const struct call *c, long unit, int back, float **scratch) {
    long head = unit / c->shares, length = share_length(c), size = c->size, row = row_of(size), last = 0;
    s->b = head / c->heads, s->h = head % c->heads;
    s->first = (c->shares - 1 - unit % c->shares) * length;
    s->count = larger(0, smaller(length, c->queries - s->first));
    s->base = c->pairs;
    for (long i = s->first; i < s->first + s->count; i++) {
        long lo, hi;
        if (reach(c, s->b, i, &lo, &hi)) s->base = smaller(s->base, lo), last = larger(last, hi + 1);
    }
    s->whole = c->q == c->k && c->shares == 1 && c->queries == c->pairs;
    if (s->whole) s->base = 0, last = c->pairs;
    s->rows = larger(0, last - s->base);
    s->keys = take(scratch, (s->rows + 3) * row);
    const char *k = pairs_of(c, c->k, c->k_stride, s->b, s->base, s->h);
    const char *v = pairs_of(c, c->v, c->v_stride, s->b, s->base, s->h);
    pack_pairs(s->keys, row, padded(size), k, c->k_stride[1], s->rows, size, c->narrow);
    if (!rounds(c)) {
        s->values = take(scratch, (s->rows + 3) * row);
        pack_pairs(s->values, row, padded(size), v, c->v_stride[1], s->rows, size, c->narrow);
    } else if (!back) {
        s->values = take(scratch, (s->rows + 1) / 2 * row);
        pack_row_pairs(s->values, row, padded(size), (const float *)v, c->v_stride[1], s->rows, size);
    } else {
        s->values = take(scratch, (s->rows + 3) * word_row_of(size));
        s->key_words = take(scratch, (s->rows + 1) / 2 * row);
        pack_neighbours(s->values, word_row_of(size), padded(size), (const float *)v, c->v_stride[1], s->rows, size);
        pack_row_pairs(s->key_words, row, padded(size), s->keys, row, s->rows, padded(size));
    }
}

/* Where a block's tiles begin: words of two rows are counted from the share's first. */
static long first_tile(const struct share *s, const struct block *x) { return x->begin[0] - (x->begin[0] - s->base) % 2; }

/* The block's queries, and the floats from one to the next. */
static const float *queries_of(const struct call *c, const struct share *s, const struct block *x, long *row) {
    *row = s->whole ? row_of(c->size) : c->q_stride[1];
    if (s->whole) return s->keys + x->first * *row;
    return c->q + x->b * c->q_stride[0] + x->first * *row + x->h * c->q_stride[2];
}

static void zero_rows(float *panel, long from, long to) {
    if (to > from) memset(panel + from * PANEL, 0, (to - from) * PANEL * sizeof(float));
}

static void forward_block(const struct call *c, const struct share *s, const struct block *x, float *scratch) {
    long size = c->size, width = padded(size), row = row_of(size), tile = tile_of(size), queries = x->panels * PANEL;
    float *panels = take(&scratch, queries * width), *sums = take(&scratch, queries * width);
    float *scores = take(&scratch, tile * PANEL), factor[PANEL], scale[MAX_QUERIES];
    float largest[MAX_QUERIES], total[MAX_QUERIES];
    long q_row;
    const float *q = queries_of(c, s, x, &q_row);

    for (long i = 0; i < queries; i++) scale[i] = x->beta[i] * LOG2_E, largest[i] = LOWEST, total[i] = 0;
    for (long p = 0; p < x->panels; p++)
        pack_panel(panels + p * PANEL * width, q + p * PANEL * q_row, q_row, scale + p * PANEL,
                   x->count - p * PANEL, size);
    memset(sums, 0, queries * width * sizeof(float));

    long stop = x->end[x->panels - 1];
    for (long origin = first_tile(s, x); origin < stop; origin += tile) {
        const float *keys = s->keys + (origin - s->base) * row;
        const float *values = s->values + (rounds(c) ? (origin - s->base) / 2 : origin - s->base) * row;
        for (long p = 0; p < x->panels; p++) {
            long from = larger(0, x->begin[p] - origin), to = smaller(tile, x->end[p] - origin);
            if (from >= to) continue;
            score(scores, x, p, keys, row, panels + p * PANEL * width, width, origin, from, to);
            soften(scores, largest + p * PANEL, total + p * PANEL, factor, from, to);
            if (rounds(c)) {
                zero_rows(scores, from & ~1L, from), zero_rows(scores, to, up_to(to, 2));
                pair_rows(scores, scores, from & ~1L, up_to(to, 2));
                add_word_columns_times_panel(sums + p * PANEL * width, factor, values, row, scores, width, from / 2,
                                             up_to(to, 2) / 2);
            } else {
                add_columns_times_panel(sums + p * PANEL * width, factor, values, row, scores, width, from, to);
            }
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

/* `scratch` here and below: threads * memory_read_scratch floats. */
void memory_read_forward(const struct call *c, float *scratch) {
    long length = block_length(c), each = memory_read_scratch(c, 2);
#pragma omp parallel for schedule(dynamic) num_threads(c->threads)
    for (long unit = 0; unit < c->batch * c->heads * c->shares; unit++) {
        float *own = scratch + omp_get_thread_num() * each;
        struct share s;
        struct block x;
        open_share(&s, c, unit, 0, &own);
        for (long i = 0; i < s.count; i += length) {
            open_block(&x, c, s.b, s.h, s.first + i, smaller(length, s.count - i));
            forward_block(c, &s, &x, own);
        }
    }
}

/* What the backward pass keeps of a block. `q_rows` (times beta) and `grad_rows` are cut into strips of two vectors of
columns, each strip [queries][width of the strip]: the products that make dK and dV walk down a strip. Rounded,
`grad_panels` has words of neighbours, `q_rows` and `grad_rows` words of two queries, and `slope_words` [tile / 2][PANEL]
dS of a panel in words of two pairs. */
struct buffers {
    float *q_panels, *grad_panels, *q_rows, *grad_rows, *sums, *weights, *slopes, *slope_words;
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

/* rows[j] += the tile's weights times the block's strips, for the rows that the panels read: panel p wrote rows
[from[p], to[p]), multiples of 6 (from == to: none). */
INLINE void add_any_tile(float *rows, long row, const float *a, long tile, const float *strips, const struct block *x,
                         const long *from, const long *to, long count, long width, const int rounded) {
    for (long d = 0; d < width; d += 2 * LANES) {
        const float *strip = strips + d * x->panels * PANEL / (1 + rounded);
        for (long j = 0; j < count; j += 6) {
            long first = 0, end = x->panels;
            while (first < end && !(from[first] <= j && j < to[first])) first++;
            while (end > first && !(from[end - 1] <= j && j < to[end - 1])) end--;
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
        score(weights, x, p, s->keys + at, row, w->q_panels + panel, width, origin, from, to);
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
    w->q_panels = take(&scratch, queries * width), w->grad_panels = take(&scratch, words);
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
        if (rounds(c))
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
        vec dots[3] = {};
        for (long d = 0; d < size; d++)
            for (int i = 0; i < 3; i++)
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
    long length = block_length(c), each = memory_read_scratch(c, 4), row = row_of(c->size), tile = tile_of(c->size);
#pragma omp parallel for schedule(dynamic) num_threads(c->threads)
    for (long unit = 0; unit < c->batch * c->heads * c->shares; unit++) {
        float *own = scratch + omp_get_thread_num() * each;
        struct share s;
        struct block x;
        struct buffers w;
        open_share(&s, c, unit, 1, &own);
        s.grad_k = take(&own, s.rows * row), s.grad_v = take(&own, s.rows * row);
        memset(s.grad_k, 0, s.rows * row * sizeof(float));
        memset(s.grad_v, 0, s.rows * row * sizeof(float));
        double sums[3] = {0};
        for (long i = 0; i < s.count; i += length) {
            open_block(&x, c, s.b, s.h, s.first + i, smaller(length, s.count - i));
            open_buffers(&w, c, g, &s, &x, own);
            long stop = x.end[x.panels - 1];
            for (long origin = first_tile(&s, &x); origin < stop; origin += tile)
                backward_tile(c, &s, &x, &w, origin, smaller(tile, stop - origin));
            close_block(c, g, &s, &x, &w, sums);
        }
        long number = unit % c->shares;
        memcpy(g->grad_bandwidth + ((number * c->batch + s.b) * c->heads + s.h) * 3, sums, sizeof sums);
        close_share(g->grad_k, s.grad_k, c, &s, number);
        close_share(g->grad_v, s.grad_v, c, &s, number);
    }
}
