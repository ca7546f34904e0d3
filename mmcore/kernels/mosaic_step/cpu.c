/* One token of each of a few rows through all layers of a Memory Mosaic in one call.

   The time of a token is the time of reading the weights once, for one row as for eight. Some 30 calls a layer from
   Python cost more than a third of it at 36 million parameters, so one parallel region does the whole token. What is
   small (norms, SiLU) is shared out too: a barrier costs less than a microsecond. Pairs are read strictly in order of
   memory, all heads of a pair together, each thread a run of every row's pairs, with a softmax of its own that is joined
   at the end. Keys of a block and values of the block before are read in turns, a pair of each, so that both streams go on
   without a stop, and each is called for a block ahead. Of what a plain sum read, two cores read 0.91 so (0.76 where the sum
   read 64 GB/s), and 0.88 (0.67) with all keys of a block before its values. Loads saved by two pairs at once, or by a head at
   a time, cost more than they bring: one core read 12 and 13 GB/s so, and 24 in order. Pairs may be kept in fp16. */

#include <omp.h>

#include "mosaic_layers.h"
#include "thin_rows.h"

#define BLOCK 32 /* pairs scored before their values are added: whole vectors of scores */
#define CHUNK 256 /* numbers of SwiGLU at a time */

/* One call: B rows at `position`; padding [B] counts the tokens that fill each row on the left, NULL for none. */
struct call {
    const struct shape *shape;
    int64_t rows, position;
    const int64_t *padding;
    /* x [B, d] is the residual stream, input [B, max(2d, F)] what a product reads, and operand the same as its weights meet
       it; then the projections of both memories, W_o's and W_2's products, SwiGLU's two, and each thread's share of the
       reads. */
    struct operand operand;
    float *x, *input, *projected[2][4], *delta, *gate, *up;
    float *most, *total, *sums;                           /* [2, threads, B, H] twice, [2, threads, B, d] */
};

/* `input` as the weights meet it. */
static __attribute__((noinline)) void input_as_operand(struct call *c, int64_t in) {
    make_operand(c->operand, c->input, c->rows, in, c->shape->format, omp_get_thread_num(), omp_get_num_threads());
#pragma omp barrier
}

/* input = norm(x + delta) for every row, and its operand; delta NULL: there is nothing to add. */
static void add_and_norm(struct call *c, const float *delta, const float *weight) {
    int64_t d = c->shape->width;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < c->rows; r++)
        add_and_norm_row(c->input + r * d, c->x + r * d, delta ? delta + r * d : NULL, weight, d, c->shape->eps);
    input_as_operand(c, d);
}

/* Not inlined: five copies took 10 s to compile. */
static __attribute__((noinline)) void multiply_input(struct call *c, const struct product *list, int64_t count,
                                                     int64_t in) {
    multiply(list, count, c->operand, c->rows, in, c->shape->format);
}

static struct product product(struct weights m, int64_t out, float *y) { return (struct product){m.weight, m.scale, out, y}; }

/* Head h of one row: its pair of the token before is stored, and this token's waits. */
static void remember_token(const struct call *c, const struct memory *m, float *const projected[4], int64_t row, int64_t h) {
    int64_t heads = c->shape->heads, size = c->shape->width / heads, place = row * c->shape->width + h * size;
    /* The recurrence of a padded row begins at its first token. */
    remember(m, c->shape, row, h, m->used, c->padding && c->padding[row] == c->position,
             (struct projected){projected[0] + place, projected[1] + place, projected[2][row * heads + h],
                                projected[3][row * heads + h]});
}

/* LANES numbers of pairs from number i on; and one of them. */
INLINE vec load_pairs(const char *p, int64_t i, const int narrow) {
    return narrow ? HALVES_TO_VECTOR(vec, (const uint16_t *)p + i) : load((const float *)p + i);
}

INLINE float one_of_pairs(const char *p, int64_t i, const int narrow) {
    return narrow ? half_to_float(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

/* Calls for numbers [at, at + size) of pairs. */
INLINE void fetch(const char *p, int64_t at, int64_t size, const int narrow) {
    const int bytes = narrow ? 2 : 4;
    for (int64_t i = 0; i < size * bytes; i += 64) __builtin_prefetch(p + at * bytes + i, 0, 2);
}

/* scores[h * BLOCK] = query . key of `heads` heads (a constant) of one pair. */
INLINE void some_scores(float *scores, const float *query, const char *keys, int64_t at, int64_t size, const int heads,
                        const int narrow) {
    vec sums[8];
    int64_t i = 0;
#pragma GCC unroll 8
    for (int h = 0; h < heads; h++) {
        sums[h] = (vec){0};
        for (i = 0; i + LANES <= size; i += LANES)
            sums[h] += load(query + h * size + i) * load_pairs(keys, at + h * size + i, narrow);
    }
    vec all = sums_of(sums, heads);
#pragma GCC unroll 8
    for (int h = 0; h < heads; h++) {
        float sum = all[lane_of_sum(h, heads)];
        for (int64_t k = i; k < size; k++) sum += query[h * size + k] * one_of_pairs(keys, at + h * size + k, narrow);
        scores[h * BLOCK] = sum;
    }
}

/* sums += weights[h * BLOCK] * value of `heads` heads (a constant) of one pair. In memory between pairs: gcc 12 would keep what
   fits into registers and store it all the same, and a core read 19 GB/s so for 24. */
INLINE void add_values(float *sums, const float *weights, const char *values, int64_t at, int64_t size, const int heads,
                       const int narrow) {
    __asm__ volatile("" ::: "memory");
#pragma GCC unroll 8
    for (int h = 0; h < heads; h++) {
        int64_t i = h * size;
#pragma GCC unroll 8
        for (; i + LANES <= (h + 1) * size; i += LANES) {
            vec sum = load(sums + i) + weights[h * BLOCK] * load_pairs(values, at + i, narrow);
            memcpy(sums + i, &sum, sizeof sum);
        }
        for (; i < (h + 1) * size; i++) sums[i] += weights[h * BLOCK] * one_of_pairs(values, at + i, narrow);
    }
}

/* A head's scores of a block become weights, exp(score - largest); what was summed before, acc [size], follows a new
   largest one. */
INLINE void weigh(float *scores, int64_t count, float bandwidth, float *most, float *total, float *acc, int64_t size) {
    vec largest = (vec){0} + *most, sum = {0};
    for (int64_t j = 0; j < count; j++) scores[j] *= bandwidth;
    for (int64_t j = count; j < BLOCK; j++) scores[j] = -INFINITY;
    for (int64_t j = 0; j < BLOCK; j += LANES) {
        vec x = load(scores + j);
        ivec more = x > largest;
        largest = (vec)(((ivec)x & more) | ((ivec)largest & ~more));
    }
    float top = largest[0], factor;
    for (int l = 1; l < LANES; l++) top = largest[l] > top ? largest[l] : top;
    factor = *most == top ? 1 : exp_negative(*most - top);
    if (factor != 1)
        for (int64_t i = 0; i < size; i++) acc[i] *= factor;
    for (int64_t j = 0; j < BLOCK; j++) scores[j] = exp_negative(scores[j] - top);
    for (int64_t j = 0; j < BLOCK; j += LANES) sum += load(scores + j);
    *total = *total * factor + sum_lanes(sum);
    *most = top;
}

/* All heads of one pair: their scores, scores[h * BLOCK]; and what its values add to sums. */
INLINE void score_pair(float *scores, const float *query, const char *keys, int64_t at, int64_t heads, int64_t size,
                       const int narrow) {
    int64_t h = 0;
    for (; h + 8 <= heads; h += 8) some_scores(scores + h * BLOCK, query + h * size, keys, at + h * size, size, 8, narrow);
    for (; h < heads; h++) some_scores(scores + h * BLOCK, query + h * size, keys, at + h * size, size, 1, narrow);
}

INLINE void add_pair(float *sums, const float *weights, const char *values, int64_t at, int64_t heads, int64_t size,
                     const int narrow) {
    int64_t h = 0;
    for (; h + 8 <= heads; h += 8) add_values(sums + h * size, weights + h * BLOCK, values, at + h * size, size, 8, narrow);
    for (; h < heads; h++) add_values(sums + h * size, weights + h * BLOCK, values, at + h * size, size, 1, narrow);
}

/* One thread's run of a row's pairs in one memory: `count` of them, keys and values [., H, D] from the first on; what they
   are read with; and equation (4) over them, all heads: largest score, sum of weights, weighted sum of values. */
struct run {
    const float *query, *bandwidth;
    const char *keys, *values;
    int64_t count;
    float *most, *total, *sums;
};

/* Reads runs one after the other without a stop: while a block is scored, the values of the block before are added, be it
   of the run before, and keys of the block behind are called for, be it of the next run. */
INLINE void read_each(const struct run *runs, int64_t count, int64_t heads, int64_t size, const int narrow) {
    const int64_t width = heads * size;
    float room[2][heads * BLOCK];
    const struct run *run = runs, *end = runs + count, *waiting = NULL; /* whose block before is still to be added */
    int64_t start = 0, before = 0, left = 0;                            /* its first pair and its pairs */
    for (int turn = 0; run < end || waiting; turn ^= 1) {
        float *scores = room[turn], *weights = room[turn ^ 1];
        const int64_t pairs = run < end ? smaller(BLOCK, run->count - start) : 0;
        const struct run *next = run;
        int64_t behind = start + pairs;
        if (run < end && behind == run->count) next++, behind = 0;
        const int64_t ahead = next < end ? smaller(BLOCK, next->count - behind) : 0;
        for (int64_t j = 0; j < BLOCK; j++) {
            if (j < ahead) fetch(next->keys, (behind + j) * width, width, narrow);
            if (j < pairs) {
                fetch(run->values, (start + j) * width, width, narrow);
                score_pair(scores + j, run->query, run->keys, (start + j) * width, heads, size, narrow);
            }
            if (j < left) add_pair(waiting->sums, weights + j, waiting->values, (before + j) * width, heads, size, narrow);
        }
        for (int64_t h = 0; pairs && h < heads; h++)
            weigh(scores + h * BLOCK, pairs, run->bandwidth[h], &run->most[h], &run->total[h], run->sums + h * size, size);
        waiting = pairs ? run : NULL, before = start, left = pairs;
        run = next, start = behind;
    }
}

/* The usual heads' sizes as constants, which unrolls their loops: 73 GB/s for 56 where pairs lie in the caches. */
static void read_runs(const struct run *runs, int64_t count, int64_t heads, int64_t size, int64_t narrow) {
    if (size == 64 && narrow)
        read_each(runs, count, heads, 64, 1);
    else if (size == 128 && narrow)
        read_each(runs, count, heads, 128, 1);
    else if (narrow)
        read_each(runs, count, heads, size, 1);
    else if (size == 64)
        read_each(runs, count, heads, 64, 0);
    else
        read_each(runs, count, heads, size, 0);
}

/* The slots that a row's query reads: [*low, *high). */
static void reach(const struct call *c, const struct memory *m, int64_t row, int64_t *low, int64_t *high) {
    *high = c->position - m->delay + 1 - m->first;
    *low = m->window ? c->position - m->window + 1 - m->first : 0;
    if (c->padding) *low = larger(*low, c->padding[row] - m->first);
    *low = larger(*low, 0);
    *high = larger(*high, *low);
}

/* Equations (6) and (4): this thread's share of what all rows read of some memories. Those of memory k lie in parts
   (k * threads + thread) * B and on. */
static void read_shares(struct call *c, const struct memory *memories, int first, int count, int thread, int threads) {
    const int64_t heads = c->shape->heads, width = c->shape->width, B = c->rows;
    struct run runs[count * B];
    float bandwidths[count * B][heads];
    int64_t used = 0;
    for (int k = first; k < first + count; k++) {
        const struct memory *m = &memories[k];
        for (int64_t row = 0; row < B; row++) {
            int64_t low, high, place = (k * threads + thread) * B + row;
            reach(c, m, row, &low, &high);
            const int64_t share = (high - low + threads - 1) / threads, from = low + thread * share;
            const int64_t at = (row * m->apart + from * width) * (m->narrow ? 2 : 4);
            float *bandwidth = bandwidths[used];
            struct run run = {m->pending_key + row * width, bandwidth, m->keys + at, m->values + at,
                              smaller(share, high - from), c->most + place * heads, c->total + place * heads,
                              c->sums + place * width};
            for (int64_t h = 0; h < heads; h++) run.most[h] = -INFINITY, run.total[h] = 0;
            memset(run.sums, 0, width * sizeof *run.sums);
            if (run.count <= 0) continue;
            for (int64_t h = 0; h < heads; h++)
                bandwidth[h] = m->slope[h] * powf((float)(high - low), m->exponent[h]) + m->base[h];
            runs[used++] = run;
        }
    }
    read_runs(runs, used, heads, width / heads, memories[first].narrow);
}

/* Joins what the threads read of one row of one memory; nothing read is zero. `place` is the first thread's. */
static void join(const struct call *c, float *out, int64_t place, int threads) {
    int64_t heads = c->shape->heads, width = c->shape->width, size = width / heads;
    memset(out, 0, width * sizeof *out);
    for (int64_t h = 0; h < heads; h++) {
        float largest = -INFINITY, all = 0;
        for (int t = 0; t < threads; t++) {
            float most = c->most[(place + t * c->rows) * heads + h];
            largest = most > largest ? most : largest;
        }
        for (int t = 0; t < threads; t++) {
            int64_t at = place + t * c->rows;
            float total = c->total[at * heads + h], factor = exp_negative(c->most[at * heads + h] - largest);
            if (!(total > 0)) continue;
            all += factor * total;
            for (int64_t i = 0; i < size; i++) out[h * size + i] += factor * c->sums[at * width + h * size + i];
        }
        for (int64_t i = 0; all > 0 && i < size; i++) out[h * size + i] /= all;
    }
}

/* What both memories of a layer give W_o: input [B, 2d]. */
static void read_memories(struct call *c, struct layer *l, int threads) {
    int64_t d = c->shape->width, H = c->shape->heads, B = c->rows;
    int thread = omp_get_thread_num();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < 2 * B * H; i++) {
        int64_t k = i / (B * H);
        remember_token(c, &l->memories[k], c->projected[k], i / H % B, i % H);
    }
    if (l->memories[0].narrow == l->memories[1].narrow) {
        read_shares(c, l->memories, 0, 2, thread, threads);
    } else {
        for (int k = 0; k < 2; k++) read_shares(c, l->memories, k, 1, thread, threads);
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < 2 * B; i++) join(c, c->input + (i % B * 2 + i / B) * d, i / B * threads * B + i % B, threads);
    input_as_operand(c, 2 * d);
}

/* input [B, F] = SiLU(gate) up. */
static void activate(struct call *c) {
    int64_t F = c->shape->inner, chunks = (F + CHUNK - 1) / CHUNK;
#pragma omp for schedule(static)
    for (int64_t part = 0; part < c->rows * chunks; part++) {
        int64_t from = part % chunks * CHUNK, count = smaller(CHUNK, F - from), at = part / chunks * F + from;
        gated(c->input + at, c->gate + at, c->up + at, count);
    }
    input_as_operand(c, F);
}

static void one_layer(struct call *c, struct layer *l, const float *before, int threads) {
    int64_t d = c->shape->width, H = c->shape->heads, F = c->shape->inner;
    struct product memories[8], inner[2] = {product(l->gate, F, c->gate), product(l->up, F, c->up)};
    struct product out = product(l->out, d, c->delta), down = product(l->down, d, c->delta);
    for (int k = 0; k < 2; k++) {
        struct memory *m = &l->memories[k];
        memories[k * 4] = product(m->key, d, c->projected[k][0]);
        memories[k * 4 + 1] = product(m->value, d, c->projected[k][1]);
        memories[k * 4 + 2] = product(m->gate, H, c->projected[k][2]);
        memories[k * 4 + 3] = product(m->decay, H, c->projected[k][3]);
    }
    add_and_norm(c, before, l->memory_norm);
    multiply_input(c, memories, 8, d);
    read_memories(c, l, threads);
    multiply_input(c, &out, 1, 2 * d);
    add_and_norm(c, c->delta, l->persistent_norm);
    multiply_input(c, inner, 2, d);
    activate(c);
    multiply_input(c, &down, 1, F);
}

/* Lays the work space out; returns the floats it takes. */
static int64_t lay_out(struct call *c, float *scratch, int threads) {
    int64_t d = c->shape->width, H = c->shape->heads, F = c->shape->inner, B = c->rows;
    float *rest = scratch;
    c->x = cut(&rest, B * d);
    c->input = cut(&rest, B * larger(2 * d, F));
    c->operand.numbers = (char *)cut(&rest, operand_floats(B, larger(2 * d, F)));
    c->operand.step = cut(&rest, full_rows(B));
    for (int k = 0; k < 2; k++)
        for (int part = 0; part < 4; part++) c->projected[k][part] = cut(&rest, B * (part < 2 ? d : H));
    c->delta = cut(&rest, B * d);
    c->gate = cut(&rest, B * F);
    c->up = cut(&rest, B * F);
    c->most = cut(&rest, 2 * threads * B * H);
    c->total = cut(&rest, 2 * threads * B * H);
    c->sums = cut(&rest, 2 * threads * B * d);
    return rest - scratch;
}

/* Floats of scratch that mm_mosaic_step needs. */
int64_t mm_mosaic_step_scratch(const struct shape *s, int64_t rows, int threads) {
    struct call c = {.shape = s, .rows = rows};
    return lay_out(&c, (float *)sizeof(float), threads); /* only counted */
}

/* Whether each of `rows` ids is one of `words`. */
int mm_are_words(const int64_t *ids, int64_t rows, int64_t words) {
    for (int64_t r = 0; r < rows; r++)
        if (ids[r] < 0 || ids[r] >= words) return 0;
    return 1;
}

/* Tokens -> logits [B, V]. A row's embedding is row ids[r] of `table` [., d], kept in `format`; of ids NULL row r. The
   memories' states go on by one token, `used` excepted. */
void mm_mosaic_step(const struct shape *s, struct layer *layers, const float *final_norm, struct weights classifier,
                    const char *table, int format, const int64_t *ids, float *logits, float *scratch, int64_t rows,
                    int64_t position, const int64_t *padding, int threads) {
    struct call call = {.shape = s, .rows = rows, .position = position, .padding = padding}, *c = &call;
    lay_out(c, scratch, threads);
    for (int64_t r = 0; r < rows; r++)
        widen(c->x + r * s->width, table + (ids ? ids[r] : r) * s->width * bytes_of(format), s->width, format);
#pragma omp parallel num_threads(threads)
    {
        /* The team may be smaller than asked for; the shares must cover every pair all the same. */
        int team = omp_get_num_threads();
        struct product last = product(classifier, s->vocabulary, logits);
        if (by_tiles(rows, s->width, s->format)) open_tiles();
        for (int64_t l = 0; l < s->layers; l++) one_layer(c, &layers[l], l ? c->delta : NULL, team);
        add_and_norm(c, c->delta, final_norm);
        multiply_input(c, &last, 1, s->width);
        if (by_tiles(rows, s->width, s->format)) close_tiles();
    }
}
