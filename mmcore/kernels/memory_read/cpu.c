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

Where products are to be rounded, operands of all but the scores are (memory_read_words.h), at twice the speed, or in the
matrix unit where there is one (memory_read_matrix.h). Scores are not: a bandwidth, of hundreds after many pairs, would
multiply the rounding of keys. Pairs in fp16, which only decoders keep, are read so: 197 -> 159 ms of a prompt of 2,048 tokens
(S2), and its loss moves by less than 0.00005 nats. */

#include "memory_read_blocks.h"

/* Scores to weights 2^(score - largest) in place. Updates largest and total, and gives the factor by which what was
summed up to now shrinks. */
static void soften(float *scores, float *largest, float *total, float *factor, long from, long to) {
    vec top[VECTORS], shift[VECTORS], sum[VECTORS];
    for (int i = 0; i < VECTORS; i++) top[i] = load(largest + i * LANES);
    for (long j = from; j < to; j++)
        for (int i = 0; i < VECTORS; i++) top[i] = maximum(load(scores + j * PANEL + i * LANES), top[i]);
    for (int i = 0; i < VECTORS; i++) {
        vec shrink = exp2_of(load(largest + i * LANES) - top[i]);
        store(largest + i * LANES, top[i]);
        store(factor + i * LANES, shrink);
        sum[i] = load(total + i * LANES) * shrink;
        /* a query that has read nothing yet: its masked scores must become 0, not 2^0 */
        shift[i] = choose(top[i] == LOWEST, (vec){}, top[i]);
    }
    for (long j = from; j < to; j++) {
        for (int i = 0; i < VECTORS; i++) {
            vec weight = exp2_of(load(scores + j * PANEL + i * LANES) - shift[i]);
            store(scores + j * PANEL + i * LANES, weight);
            sum[i] += weight;
        }
    }
    for (int i = 0; i < VECTORS; i++) store(total + i * LANES, sum[i]);
}

static void forward_block(const struct call *c, const struct share *s, const struct block *x, float *scratch) {
    long size = c->size, width = padded(size), row = row_of(size), tile = tile_of(size), queries = x->panels * PANEL;
    int matrix = reads_by_matrix(c);
    long each = PANEL * (matrix ? deep(size) : width); /* floats of a panel of queries */
    float *panels = take(&scratch, x->panels * each), *sums = take(&scratch, queries * width);
    float *scores = take(&scratch, tile * PANEL), factor[PANEL], scale[MAX_QUERIES];
    float largest[MAX_QUERIES], total[MAX_QUERIES];
    long q_row;
    const float *q = queries_of(c, s, x, &q_row);

    for (long i = 0; i < queries; i++) scale[i] = x->beta[i] * LOG2_E, largest[i] = LOWEST, total[i] = 0;
    for (long p = 0; p < x->panels; p++) {
        float *panel = matrix ? sums : panels + p * each;
        pack_panel(panel, q + p * PANEL * q_row, q_row, scale + p * PANEL, x->count - p * PANEL, size);
        if (matrix) split_panel(panels + p * each, panel, width, deep(size));
    }
    memset(sums, 0, queries * width * sizeof(float));

    long stop = x->end[x->panels - 1];
    for (long origin = first_tile(c, s, x); origin < stop; origin += tile) {
        const float *keys = s->keys + (origin - s->base) * (matrix ? deep(size) : row);
        const float *values = s->values + (rounds(c) ? (origin - s->base) / 2 : origin - s->base) * row;
        for (long p = 0; p < x->panels; p++) {
            long from = larger(0, x->begin[p] - origin), to = smaller(tile, x->end[p] - origin);
            if (from >= to) continue;
            score(scores, x, p, keys, row, panels + p * each, each / PANEL, origin, from, to, matrix);
            soften(scores, largest + p * PANEL, total + p * PANEL, factor, from, to);
            if (matrix) {
                long first = from & -SIDE, last = up_to(to, SIDE);
                zero_rows(scores, first, from), zero_rows(scores, to, last);
                pair_rows(scores, scores, first, last);
                add_columns_of_tiles(sums + p * PANEL * width, factor, s->values + columns_floats(origin - s->base, width),
                                     scores, width, first, last);
            } else if (rounds(c)) {
                zero_rows(scores, from & ~1L, from), zero_rows(scores, to, up_to(to, 2));
                pair_rows(scores, scores, from & ~1L, up_to(to, 2));
                add_word_columns_times_panel(sums + p * PANEL * width, factor, values, row, scores, width, from / 2,
                                             up_to(to, 2) / 2);
            } else {
                add_columns_times_panel(sums + p * PANEL * width, factor, values, row, scores, width, from, to);
            }
        }
    }

    long out_row = c->out_row;
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

/* `scratch`: threads * memory_read_forward_scratch floats. */
void memory_read_forward(const struct call *c, float *scratch) {
    long length = block_length(c), each = scratch_of(c, 2);
#pragma omp parallel for schedule(dynamic) num_threads(c->threads)
    for (long unit = 0; unit < c->batch * c->heads * c->shares; unit++) {
        float *own = scratch + omp_get_thread_num() * each;
        if (reads_by_matrix(c)) open_tiles();
        struct share s;
        struct block x;
        open_share(&s, c, unit, 0, &own);
        for (long i = 0; i < s.count; i += length) {
            open_block(&x, c, s.b, s.h, s.first + i, smaller(length, s.count - i));
            forward_block(c, &s, &x, own);
        }
        if (reads_by_matrix(c)) close_tiles();
    }
}

/* Floats of scratch for each thread. */
long memory_read_forward_scratch(const struct call *c) { return scratch_of(c, 2); }
