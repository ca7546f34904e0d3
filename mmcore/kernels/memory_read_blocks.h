/* Blocks of queries and the shares of threads, as both passes of memory_read take them; memory_read/cpu.c says how. */
#ifndef MEMORY_READ_BLOCKS_H
#define MEMORY_READ_BLOCKS_H

#include <limits.h>
#include <omp.h>

#include "memory_read_call.h"
#include "memory_read_matrix.h"
#include "memory_read_tiles.h"
#include "memory_read_words.h"

#define MAX_PANELS 8
#define MAX_QUERIES (MAX_PANELS * PANEL)
#define LOWEST (-3.0e38f) /* the score of a pair that may not be read */
#define LOG2_E 1.4426950408889634f

static long up_to(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }
static long smaller(long a, long b) { return a < b ? a : b; }
static long larger(long a, long b) { return a > b ? a : b; }

/* Sizes that depend on D: the buffers of a block should stay in a second-level cache of 512 KiB. */
static long padded(long size) { return up_to(size, LANES); }
static long row_of(long size) { return padded(size) + 16; } /* not a power of two: rows would fall into the same sets */
static long tile_of(long size) { return size <= 96 || MATRIX_TILES ? 96 : 48; } /* where there is one, they have 2 MiB */
static long word_row_of(long size) { return row_of(size) / 2; }
static long panels_of(long size) { return larger(1, smaller(MAX_PANELS, 512 / padded(size))); }

/* Whether products other than scores' meet in bf16; and whether they do in the matrix unit. */
static int rounds(const struct call *c) { return bf16_pays() && (c->rounded || c->narrow); }
static int reads_by_matrix(const struct call *c) { return rounds(c) && tiles_allowed(); }

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

/* The scores of panel p and the rows [from, to) of a tile, `depth` numbers each, masked. Keys and panel are split for the matrix
unit. */
static void score(float *scores, const struct block *x, long p, const float *keys, long row, const float *panel,
                  long depth, long origin, long from, long to, int matrix) {
    if (matrix)
        split_rows_times_panel(scores, keys, panel, depth, from & -SIDE, to);
    else
        rows_times_panel(scores, keys, row, panel, depth, from & ~3L, to);
    long inner_from = larger(from, smaller(to, x->inner_begin[p] - origin));
    long inner_to = smaller(to, larger(inner_from, x->inner_end[p] - origin));
    mask(scores, x, p, origin, from, inner_from);
    mask(scores, x, p, origin, inner_to, to);
}

/* What a thread works on: some queries of one head, and the pairs [base, base + rows) that they read, copied. */
struct share {
    long b, h, first, count, base, rows;
    int whole;                              /* all queries, all pairs, and the queries are the keys */
    float *keys, *values, *grad_k, *grad_v; /* [rows][row_of(D)] */
    /* Rounded, `values` are words: of two rows, [rows / 2][row_of(D)]; in the backward pass of neighbours,
       [rows][word_row_of(D)], and there are keys in words of two rows as well. For the matrix unit keys are split, `values`
       columns, and in the backward pass rows of deep(D) / 2 words, with keys as columns. */
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

/* Scratch of one thread, in floats, with rows that fill up tiles and strips; `copies` is 2 for the forward pass (keys, values), 4
for the backward pass. Words take the space of values: in the forward pass half of it, in the backward pass keys' and values' a
half each; split keys take that of keys. */
static long scratch_of(const struct call *c, long copies) {
    long size = c->size, queries = panels_of(size) * PANEL;
    long rows = c->window && c->shares > 1 ? smaller(c->pairs, share_length(c) + c->window) : c->pairs;
    return up_to(copies * (rows + 12 + SIDE) * row_of(size) + 6 * queries * deep(size) + 2 * tile_of(size) * (queries + PANEL),
                 16);
}

static float *take(float **scratch, long floats) {
    float *start = *scratch;
    *scratch += up_to(floats, 16);
    return start;
}

/* Copies its pairs as the matrix unit takes them. */
static void open_matrix_share(struct share *s, const struct call *c, int back, float **scratch) {
    long size = c->size, depth = deep(size), width = padded(size);
    const char *k = pairs_of(c, c->k, c->k_stride, s->b, s->base, s->h);
    const char *v = pairs_of(c, c->v, c->v_stride, s->b, s->base, s->h);
    float *columns;
    s->keys = take(scratch, (s->rows + SIDE) * depth);
    columns = take(scratch, columns_floats(s->rows, width));
    pack_split_rows(s->keys, k, c->k_stride[1], s->rows, size, c->narrow);
    if (!back) {
        s->values = columns;
        pack_columns(s->values, v, c->v_stride[1], width, s->rows, size, c->narrow);
        return;
    }
    s->key_words = columns;
    pack_columns(s->key_words, k, c->k_stride[1], width, s->rows, size, c->narrow);
    s->values = take(scratch, (s->rows + SIDE) * depth / 2);
    pack_neighbours(s->values, depth / 2, depth, (const float *)v, c->v_stride[1], s->rows, size);
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
    int alike = c->q == c->k && memcmp(c->q_stride, c->k_stride, sizeof c->q_stride) == 0;
    s->whole = alike && c->shares == 1 && c->queries == c->pairs;
    if (s->whole) s->base = 0, last = c->pairs;
    s->rows = larger(0, last - s->base);
    if (reads_by_matrix(c)) {
        open_matrix_share(s, c, back, scratch);
        return;
    }
    const char *k = pairs_of(c, c->k, c->k_stride, s->b, s->base, s->h);
    const char *v = pairs_of(c, c->v, c->v_stride, s->b, s->base, s->h);
    s->keys = take(scratch, (s->rows + 3) * row);
    pack_pairs(s->keys, row, padded(size), k, c->k_stride[1], s->rows, size, c->narrow);
    if (!rounds(c)) {
        s->values = take(scratch, (s->rows + 3) * row);
        pack_pairs(s->values, row, padded(size), v, c->v_stride[1], s->rows, size, c->narrow);
    } else if (!back) {
        s->values = take(scratch, (s->rows + 1) / 2 * row);
        pack_row_pairs(s->values, row, padded(size), v, c->v_stride[1], s->rows, size, c->narrow);
    } else {
        s->values = take(scratch, (s->rows + 3) * word_row_of(size));
        s->key_words = take(scratch, (s->rows + 1) / 2 * row);
        pack_neighbours(s->values, word_row_of(size), padded(size), (const float *)v, c->v_stride[1], s->rows, size);
        pack_row_pairs(s->key_words, row, padded(size), (const char *)s->keys, row, s->rows, padded(size), 0);
    }
}

/* Where a block's tiles begin: words of two rows, and columns of 32, are counted from the share's first. */
static long first_tile(const struct call *c, const struct share *s, const struct block *x) {
    return x->begin[0] - (x->begin[0] - s->base) % (reads_by_matrix(c) ? SIDE : 2);
}

/* The block's queries, and the floats from one to the next. */
static const float *queries_of(const struct call *c, const struct share *s, const struct block *x, long *row) {
    int copied = s->whole && !reads_by_matrix(c);
    *row = copied ? row_of(c->size) : c->q_stride[1];
    if (copied) return s->keys + x->first * *row;
    return c->q + x->b * c->q_stride[0] + x->first * *row + x->h * c->q_stride[2];
}

static void zero_rows(float *panel, long from, long to) {
    if (to > from) memset(panel + from * PANEL, 0, (to - from) * PANEL * sizeof(float));
}

#endif
