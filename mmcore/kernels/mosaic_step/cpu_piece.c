/* Several tokens of each row through all layers of a Memory Mosaic in one call: a prompt, or a piece of one.

   Products and reads are those of linear, thin_linear and memory_read, called by address. What is here is what lies between
   them: a prompt of 64 tokens (S2, bf16, products 11.9 ms) took 19 ms in some 800 Python calls a layer, and takes 14.3. */

#include <omp.h>

#include "linear_matrix.h"
#include "memory_read_call.h"
#include "mosaic_layers.h"
#include "weight_formats.h"

#define NUMBERS_OF_A_THREAD 8192 /* that a pass takes some 2 us for, twice what a thread that still spins takes to come */

/* The other kernels' functions, and what they can take. */
struct functions {
    void (*linear)(const struct matrix *, int64_t, int, const char *, int64_t, int64_t, int64_t, int, int, float *, int);
    int64_t (*linear_scratch)(int64_t, int64_t, int, int);
    void (*thin)(const float *, int64_t, int64_t, const char *, const float *, int64_t, float *, float *, int, int);
    int64_t (*thin_scratch)(int64_t, int64_t);
    void (*read)(const struct call *, float *);
    int64_t (*read_scratch)(const struct call *);
    void (*read_few)(const struct call *, float *);
    int64_t (*read_few_scratch)(const struct call *);
    int64_t thin_rows, few_queries, flops_of_a_thread;
};

/* One call: T tokens of B rows, the first at `position`; padding [B] counts the tokens that fill each row on the left, NULL
   for none. The last layer and the classifier finish the last `wanted` of T. */
struct piece {
    const struct shape *shape;
    const struct functions *do_;
    int64_t rows, steps, position, wanted;
    const int64_t *padding;
    int64_t threads, shares;
    /* x [B T, d] is the residual stream, input [B T, max(2d, F)] what a product reads; then the projections of both
       memories, their keys [B, T, d] as queries, W_o's and W_2's products, and SwiGLU's two. What both memories read lies side by
       side in the input. */
    float *x, *input, *projected[2][4], *queries[2], *delta, *gate, *up;
    int *starts; /* [B, T] */
    float *spare;
};

static struct matrix times(struct weights w, int64_t out, float *y) {
    return (struct matrix){.weight = w.weight, .scale = w.scale, .y = (char *)y, .out = out, .y_row = out};
}

/* Threads for a pass over so many numbers. */
static int threads_for(const struct piece *p, int64_t numbers) {
    return (int)larger(1, smaller(p->threads, numbers / NUMBERS_OF_A_THREAD));
}

/* y = x W^T for each matrix of the list, x [rows, in]. */
static void multiply(const struct piece *p, const struct matrix *list, int64_t count, const float *x, int64_t rows, int64_t in) {
    int64_t total = 0, format = p->shape->format;
    for (int64_t i = 0; i < count; i++) total += list[i].out;
    int threads = (int)larger(1, smaller(p->threads, rows * total * in / p->do_->flops_of_a_thread));
    if (rows > p->do_->thin_rows) {
        p->do_->linear(list, count, format, (const char *)x, rows, in, in, 0, 0, p->spare, threads);
        return;
    }
    for (const struct matrix *m = list; m < list + count; m++)
        p->do_->thin(x, rows, in, m->weight, m->scale, m->out, (float *)m->y, p->spare, format, p->threads);
}

/* input = norm(x + delta) for `rows` rows. */
static void add_and_norm(const struct piece *p, int64_t rows, const float *delta, const float *weight) {
    int64_t d = p->shape->width;
#pragma omp parallel for schedule(static) num_threads(threads_for(p, rows * d))
    for (int64_t r = 0; r < rows; r++)
        add_and_norm_row(p->input + r * d, p->x + r * d, delta ? delta + r * d : NULL, weight, d, p->shape->eps);
}

/* Heads [from, end) of one row: their pairs of these tokens are stored, but for the last, and their keys become queries. Token by
   token: a head's numbers of one lie a page from its next ones. */
static void remember_all(const struct piece *p, const struct memory *m, float *const projected[4], float *queries,
                         int64_t row, int64_t from, int64_t end) {
    int64_t heads = p->shape->heads, width = p->shape->width, size = width / heads;
    for (int64_t t = 0; t < p->steps; t++)
        for (int64_t h = from; h < end; h++) {
            int64_t n = row * p->steps + t, place = n * width + h * size, slot = m->used + t - m->fresh;
            int first = m->fresh && t == 0, begins = first || (p->padding && p->padding[row] == p->position + t);
            struct projected token = {projected[0] + place, projected[1] + place, projected[2][n * heads + h],
                                      projected[3][n * heads + h]};
            remember(m, p->shape, row, h, first ? -1 : slot, begins, token);
            memcpy(queries + place, m->pending_key + row * width + h * size, size * sizeof *queries);
        }
}

/* What the last `wanted` queries of each row read of a memory whose pairs of these tokens are stored. */
static struct call read_of(const struct piece *p, const struct memory *m, int64_t wanted, const float *queries, float *out) {
    int64_t d = p->shape->width, H = p->shape->heads, D = d / H, B = p->rows, T = p->steps;
    struct call c = {
        .batch = B, .queries = wanted, .pairs = m->used + (m->lent ? 0 : T - m->fresh), .heads = H, .size = D,
        .window = m->window, .delay = m->delay, .offset = p->position - m->first + T - wanted,
        .q = queries + (T - wanted) * d, .k = (const float *)m->keys, .v = (const float *)m->values,
        .q_stride = {T * d, d, D}, .k_stride = {m->apart, d, D}, .v_stride = {m->apart, d, D},
        .base = m->base, .slope = m->slope, .exponent = m->exponent, .starts = p->padding ? p->starts : NULL,
        .out = out, .threads = p->threads, .shares = p->shares, .narrow = m->narrow,
        .out_row = 2 * d,
    };
    if (wanted <= p->do_->few_queries) c.shares = B % p->threads ? p->threads : 1;
    return c;
}

static void read_memory(const struct piece *p, const struct memory *m, int64_t wanted, const float *queries, float *out) {
    struct call c = read_of(p, m, wanted, queries, out);
    if (c.offset + wanted <= m->delay) { /* no pair is old enough */
        for (int64_t i = 0; i < p->rows * wanted; i++) memset(out + i * c.out_row, 0, p->shape->width * sizeof *out);
        return;
    }
    for (int64_t i = 0; c.starts && i < p->rows * wanted; i++) p->starts[i] = larger(0, p->padding[i / wanted] - m->first);
    (wanted <= p->do_->few_queries ? p->do_->read_few : p->do_->read)(&c, p->spare);
}

static void one_layer(const struct piece *p, struct layer *l, const float *before, int64_t wanted) {
    int64_t d = p->shape->width, H = p->shape->heads, F = p->shape->inner, T = p->steps, rows = p->rows * T;
    struct matrix memories[8], inner[2] = {times(l->gate, F, p->gate), times(l->up, F, p->up)};
    struct matrix out = times(l->out, d, p->delta), down = times(l->down, d, p->delta);
    for (int k = 0; k < 2; k++) {
        const struct memory *m = &l->memories[k];
        memories[k * 4] = times(m->key, d, p->projected[k][0]);
        memories[k * 4 + 1] = times(m->value, d, p->projected[k][1]);
        memories[k * 4 + 2] = times(m->gate, H, p->projected[k][2]);
        memories[k * 4 + 3] = times(m->decay, H, p->projected[k][3]);
    }
    add_and_norm(p, rows, before, l->memory_norm);
    multiply(p, memories, 8, p->input, rows, d);
    int64_t all = 2 * p->rows * H; /* heads of both memories, of which each thread takes neighbours */
#pragma omp parallel num_threads(threads_for(p, 2 * rows * d))
    {
        int64_t thread = omp_get_thread_num(), team = omp_get_num_threads(), end = all * (thread + 1) / team;
        for (int64_t i = all * thread / team, next; i < end; i = next) {
            int64_t k = i / (p->rows * H), h = i % H;
            next = smaller(end, i + H - h);
            remember_all(p, &l->memories[k], p->projected[k], p->queries[k], i / H % p->rows, h, h + next - i);
        }
    }
    for (int k = 0; k < 2; k++) read_memory(p, &l->memories[k], wanted, p->queries[k], p->input + k * d);
    rows = p->rows * wanted;
    for (int64_t b = 0; wanted < T && b < p->rows; b++) /* upwards, each row to before where it was */
        memmove(p->x + b * wanted * d, p->x + (b * T + T - wanted) * d, wanted * d * sizeof *p->x);
    multiply(p, &out, 1, p->input, rows, 2 * d);
    add_and_norm(p, rows, p->delta, l->persistent_norm);
    multiply(p, inner, 2, p->input, rows, d);
#pragma omp parallel for schedule(static) num_threads(threads_for(p, rows * F))
    for (int64_t r = 0; r < rows; r++) gated(p->input + r * F, p->gate + r * F, p->up + r * F, F);
    multiply(p, &down, 1, p->input, rows, F);
}

/* Floats that the other kernels need besides. */
static int64_t spare_floats(const struct piece *p, const struct layer *layers) {
    int64_t d = p->shape->width, F = p->shape->inner, rows = p->rows * p->steps, most = 0;
    int64_t widest = larger(2 * d, F), few = smaller(p->steps, p->do_->few_queries);
    most = larger(most, p->do_->linear_scratch(rows, widest, p->shape->format, p->threads));
    most = larger(most, p->do_->thin_scratch(smaller(rows, p->do_->thin_rows), widest));
    for (int k = 0; k < 2; k++) {
        const struct memory *m = &layers[0].memories[k];
        struct call all = read_of(p, m, p->steps, NULL, NULL), last = read_of(p, m, few, NULL, NULL);
        most = larger(most, p->threads * p->do_->read_scratch(&all));
        most = larger(most, p->do_->read_few_scratch(&last));
    }
    return most;
}

/* Lays the work space out; returns the floats it takes. */
static int64_t lay_out(struct piece *p, const struct layer *layers, float *scratch) {
    int64_t d = p->shape->width, H = p->shape->heads, F = p->shape->inner, rows = p->rows * p->steps;
    float *rest = scratch, *either;
    p->x = cut(&rest, rows * d);
    p->input = cut(&rest, rows * larger(2 * d, F));
    p->delta = cut(&rest, rows * d);
    either = rest; /* of the memories or of SwiGLU */
    p->gate = cut(&rest, rows * F);
    p->up = cut(&rest, rows * F);
    p->spare = rest, rest = either;
    for (int k = 0; k < 2; k++) {
        for (int part = 0; part < 4; part++) p->projected[k][part] = cut(&rest, rows * (part < 2 ? d : H));
        p->queries[k] = cut(&rest, rows * d);
    }
    p->starts = (int *)cut(&rest, rows);
    p->spare = p->spare > rest ? p->spare : rest;
    return p->spare + spare_floats(p, layers) - scratch;
}

/* Floats of scratch that mm_mosaic_piece needs for such a call. */
int64_t mm_mosaic_piece_scratch(const struct shape *shape, const struct functions *functions, const struct layer *layers,
                                int64_t rows, int64_t steps, int64_t threads, int64_t shares) {
    struct piece p = {.shape = shape, .do_ = functions, .rows = rows, .steps = steps, .threads = threads, .shares = shares};
    return lay_out(&p, layers, (float *)sizeof(float)); /* only counted */
}

/* x [B, T, d], the tokens' embeddings -> logits [B, wanted, V]. The memories' states go on by T tokens, `used` excepted. */
void mm_mosaic_piece(const struct shape *shape, const struct functions *functions, struct layer *layers,
                     const float *final_norm, struct weights classifier, const float *x, float *logits, float *scratch,
                     int64_t rows, int64_t steps, int64_t position, int64_t wanted, const int64_t *padding, int64_t threads,
                     int64_t shares) {
    struct piece piece = {.shape = shape, .do_ = functions, .rows = rows, .steps = steps, .position = position,
                          .wanted = wanted, .padding = padding, .threads = threads, .shares = shares}, *p = &piece;
    int64_t d = shape->width, last = rows * wanted;
    lay_out(p, layers, scratch);
    memcpy(p->x, x, rows * steps * d * sizeof *x);
    for (int64_t l = 0; l < shape->layers; l++)
        one_layer(p, &layers[l], l ? p->delta : NULL, l + 1 < shape->layers ? steps : wanted);
    add_and_norm(p, last, p->delta, final_norm);
    struct matrix product = times(classifier, shape->vocabulary, logits);
    multiply(p, &product, 1, p->input, last, d);
}
