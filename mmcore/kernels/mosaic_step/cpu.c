/* One token through all layers of a Memory Mosaic in one call.

   At batch 1 the time of a token is the time of reading the weights once. Some 30 calls a layer from Python cost more
   than a third of it at 36 million parameters, so one parallel region does the whole token; what is small (norms,
   SiLU) every thread computes for itself, which is cheaper than a barrier. Pairs are read in order of memory, all
   heads of a pair together, each thread a run of pairs, with a softmax of its own that is joined at the end. */

#include <math.h>
#include <omp.h>

#include "exponential.h"
#include "thin_rows.h"

#define BLOCK 32 /* pairs scored before their values are added */

struct memory {
    const char *key, *value, *gate, *decay;               /* [d, d], [d, d], [H, d], [H, d] */
    const float *mix, *scale, *base, *slope, *exponent;   /* [H] */
    float *vector, *log_scale;                            /* recurrence: [H, D], [H] */
    float *pending_key, *pending_raw;                     /* [H, D]: the pair that this token completes */
    float *keys, *values;                                 /* [capacity, H, D] */
    int64_t used;                                         /* pairs stored before this token */
    int64_t first;                                        /* time of the pair in slot 0 */
    int64_t window, delay;                                /* window 0: none */
};

struct layer {
    const float *memory_norm, *persistent_norm;
    const char *out, *gate, *up, *down;                   /* [d, 2d], [F, d], [F, d], [d, F] */
    struct memory memories[2];
};

struct shape {
    int64_t layers, width, heads, inner, vocabulary;
    float eps;
    int32_t bf16;
};

/* Where threads meet: projections of both memories, W_o's and W_2's products, and each thread's share of the reads. */
struct shared {
    float *projected[2][4], *delta, *gate, *up;
    float *most, *total, *sums;                           /* [2, threads, H], [2, threads, H], [2, threads, d] */
};

static void norm(float *y, const float *x, const float *weight, int64_t width, float eps) {
    float squares = 0;
    for (int64_t i = 0; i < width; i++) squares += x[i] * x[i];
    float factor = 1 / sqrtf(squares / width + eps);
    for (int64_t i = 0; i < width; i++) y[i] = x[i] * factor * weight[i];
}

/* x as `multiply` wants it. */
static const float *ordered(const float *x, float *sorted, int64_t width, int bf16) {
    if (!bf16) return x;
    even_then_odd(x, sorted, 1, width);
    return sorted;
}

/* Not inlined: five copies took 10 s to compile. */
static __attribute__((noinline)) void multiply_one(const struct product *list, int64_t count, const float *x, int64_t in,
                                                   int bf16) {
    multiply(list, count, x, 1, in, bf16);
}

/* y = scale x / ||x||, zero for zero. */
static void to_length(float *y, const float *x, float scale, int64_t size) {
    float squares = 0;
    for (int64_t i = 0; i < size; i++) squares += x[i] * x[i];
    float factor = squares > 0 ? scale / sqrtf(squares) : 0;
    for (int64_t i = 0; i < size; i++) y[i] = x[i] * factor;
}

/* Equations (8) and (9) for one head: store the waiting pair, advance the recurrence, let the new pair wait. */
static void remember(struct memory *m, float *const projected[4], int64_t h, int64_t width, int64_t size) {
    const float *raw_key = projected[0] + h * size, *raw_value = projected[1] + h * size;
    float *u = m->vector + h * size, *waiting = m->pending_raw + h * size, mixed[size];
    float *key = m->pending_key + h * size;
    int64_t slot = m->used * width + h * size;
    for (int64_t i = 0; i < size; i++) mixed[i] = m->mix[h] * waiting[i] + (1 - m->mix[h]) * raw_value[i];
    to_length(m->values + slot, mixed, m->scale[h], size);
    memcpy(m->keys + slot, key, size * sizeof *key);
    memcpy(waiting, raw_value, size * sizeof *waiting);

    float gate = projected[2][h], kept = m->log_scale[h] - fabsf(projected[3][h]);
    float largest = gate > kept ? gate : kept;
    float a = exp_negative(gate - largest), b = exp_negative(kept - largest);
    m->log_scale[h] = largest;
    for (int64_t i = 0; i < size; i++) u[i] = a * raw_key[i] + b * u[i];
    to_length(key, u, 1, size);
}

INLINE float dot(const float *a, const float *b, int64_t size) {
    vec sum = {0};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) sum += load(a + i) * load(b + i);
    float total = sum_lanes(sum);
    for (; i < size; i++) total += a[i] * b[i];
    return total;
}

/* Equation (4) over one thread's run of pairs, all heads: largest score, sum of weights, weighted sum of values. */
static void read_run(const struct memory *m, int64_t from, int64_t to, const float *bandwidth, int64_t heads,
                     int64_t size, float *most, float *total, float *sums) {
    int64_t width = heads * size;
    for (int64_t h = 0; h < heads; h++) most[h] = -INFINITY, total[h] = 0;
    memset(sums, 0, width * sizeof *sums);
    for (int64_t start = from; start < to; start += BLOCK) {
        int64_t count = to - start < BLOCK ? to - start : BLOCK;
        float scores[heads][BLOCK];
        for (int64_t j = 0; j < count; j++)
            for (int64_t h = 0; h < heads; h++)
                scores[h][j] = bandwidth[h] * dot(m->pending_key + h * size, m->keys + (start + j) * width + h * size, size);
        for (int64_t h = 0; h < heads; h++) {
            float largest = most[h], factor, sum = 0, *acc = sums + h * size;
            for (int64_t j = 0; j < count; j++) largest = scores[h][j] > largest ? scores[h][j] : largest;
            factor = most[h] == largest ? 1 : exp_negative(most[h] - largest);
            if (factor != 1)
                for (int64_t i = 0; i < size; i++) acc[i] *= factor;
            for (int64_t j = 0; j < count; j++) scores[h][j] = exp_negative(scores[h][j] - largest);
            for (int64_t j = 0; j < count; j++) sum += scores[h][j];
            total[h] = total[h] * factor + sum;
            most[h] = largest;
        }
        for (int64_t j = 0; j < count; j++)
            for (int64_t h = 0; h < heads; h++) {
                const float *value = m->values + (start + j) * width + h * size;
                float weight = scores[h][j], *acc = sums + h * size;
                for (int64_t i = 0; i < size; i++) acc[i] += weight * value[i];
            }
    }
}

/* The slots that a query at `position` reads: [*low, *high). */
static void reach(const struct memory *m, int64_t position, int64_t *low, int64_t *high) {
    *high = position - m->delay + 1 - m->first;
    *low = m->window ? position - m->window + 1 - m->first : 0;
    if (*low < 0) *low = 0;
    if (*high < *low) *high = *low;
}

/* Equations (6) and (4): this thread's share of one memory's reading. */
static void read_share(const struct memory *m, int64_t position, const struct shape *s, int thread, int threads,
                       float *most, float *total, float *sums) {
    int64_t low, high, size = s->width / s->heads;
    float bandwidth[s->heads];
    reach(m, position, &low, &high);
    for (int64_t h = 0; h < s->heads; h++)
        bandwidth[h] = m->slope[h] * powf((float)(high - low), m->exponent[h]) + m->base[h];
    int64_t share = (high - low + threads - 1) / threads, from = low + thread * share;
    int64_t to = from + share < high ? from + share : high;
    read_run(m, from, to, bandwidth, s->heads, size, most, total, sums);
}

/* Joins what the threads read of one memory; nothing read is zero. */
static void join(float *out, const float *most, const float *total, const float *sums, int threads, int64_t heads,
                 int64_t size) {
    memset(out, 0, heads * size * sizeof *out);
    for (int64_t h = 0; h < heads; h++) {
        float largest = -INFINITY, all = 0;
        for (int t = 0; t < threads; t++) largest = most[t * heads + h] > largest ? most[t * heads + h] : largest;
        for (int t = 0; t < threads; t++) {
            if (!(total[t * heads + h] > 0)) continue;
            float factor = exp_negative(most[t * heads + h] - largest);
            all += factor * total[t * heads + h];
            for (int64_t i = 0; i < size; i++) out[h * size + i] += factor * sums[(t * heads + h) * size + i];
        }
        for (int64_t i = 0; all > 0 && i < size; i++) out[h * size + i] /= all;
    }
}

/* One layer; x is the thread's own copy of the residual stream, a and b its work space, [max(2d, F)] each. */
static void one_layer(struct layer *l, const struct shape *s, struct shared *w, int64_t position, int threads, float *x,
                      float *a, float *b) {
    int64_t d = s->width, H = s->heads, size = d / H;
    int thread = omp_get_thread_num();
    struct product memories[8], out = {l->out, d, w->delta}, down = {l->down, d, w->delta + d};
    for (int k = 0; k < 2; k++) {
        struct memory *m = &l->memories[k];
        memories[k * 4] = (struct product){m->key, d, w->projected[k][0]};
        memories[k * 4 + 1] = (struct product){m->value, d, w->projected[k][1]};
        memories[k * 4 + 2] = (struct product){m->gate, H, w->projected[k][2]};
        memories[k * 4 + 3] = (struct product){m->decay, H, w->projected[k][3]};
    }
    norm(a, x, l->memory_norm, d, s->eps);
    multiply_one(memories, 8, ordered(a, b, d, s->bf16), d, s->bf16);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < 2 * H; i++) remember(&l->memories[i / H], w->projected[i / H], i % H, d, size);
    for (int k = 0; k < 2; k++) {
        int64_t place = (int64_t)k * threads + thread;
        read_share(&l->memories[k], position, s, thread, threads, w->most + place * H, w->total + place * H,
                   w->sums + place * d);
    }
#pragma omp barrier
    for (int k = 0; k < 2; k++) {
        int64_t place = (int64_t)k * threads;
        join(a + k * d, w->most + place * H, w->total + place * H, w->sums + place * d, threads, H, size);
    }
    multiply_one(&out, 1, ordered(a, b, 2 * d, s->bf16), 2 * d, s->bf16);
    for (int64_t i = 0; i < d; i++) x[i] += w->delta[i];

    struct product inner[2] = {{l->gate, s->inner, w->gate}, {l->up, s->inner, w->up}};
    norm(a, x, l->persistent_norm, d, s->eps);
    multiply_one(inner, 2, ordered(a, b, d, s->bf16), d, s->bf16);
    for (int64_t i = 0; i < s->inner; i++) {
        float z = w->gate[i], e = exp_negative(z < 0 ? z : -z); /* both sides of the sigmoid without overflow */
        a[i] = z * (z < 0 ? e : 1) / (1 + e) * w->up[i];
    }
    multiply_one(&down, 1, ordered(a, b, s->inner, s->bf16), s->inner, s->bf16);
    for (int64_t i = 0; i < d; i++) x[i] += w->delta[d + i];
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Floats of scratch that mm_mosaic_step needs. */
int64_t mm_mosaic_step_scratch(const struct shape *s, int threads) {
    int64_t own = s->width + 2 * larger(2 * s->width, s->inner);
    int64_t met = 2 * (2 * s->width + 2 * s->heads) + 2 * s->width + 2 * s->inner;
    return met + threads * (own + 2 * (2 * s->heads + s->width));
}

/* x [d], the token's embedding -> logits [V]. The memories' states go on by one token, `used` excepted. */
void mm_mosaic_step(const struct shape *s, struct layer *layers, const float *final_norm, const char *classifier,
                    const float *x, float *logits, float *scratch, int64_t position, int threads) {
    int64_t d = s->width, H = s->heads, work = larger(2 * d, s->inner);
    struct shared w;
    for (int k = 0; k < 2; k++)
        for (int part = 0; part < 4; part++) w.projected[k][part] = scratch, scratch += part < 2 ? d : H;
    w.delta = scratch, scratch += 2 * d;
    w.gate = scratch, scratch += s->inner;
    w.up = scratch, scratch += s->inner;
    w.most = scratch, scratch += 2 * threads * H;
    w.total = scratch, scratch += 2 * threads * H;
    w.sums = scratch, scratch += 2 * threads * d;
#pragma omp parallel num_threads(threads)
    {
        /* The team may be smaller than asked for; the shares must cover every pair all the same. */
        int team = omp_get_num_threads();
        float *own = scratch + omp_get_thread_num() * (d + 2 * work), *a = own + d, *b = a + work;
        struct product last = {classifier, s->vocabulary, logits};
        memcpy(own, x, d * sizeof *x);
        for (int64_t l = 0; l < s->layers; l++) one_layer(&layers[l], s, &w, position, team, own, a, b);
        norm(a, own, final_norm, d, s->eps);
        multiply_one(&last, 1, ordered(a, b, d, s->bf16), d, s->bf16);
    }
}
