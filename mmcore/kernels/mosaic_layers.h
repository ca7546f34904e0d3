/* The layers of a Memory Mosaic as the compiled steps see them (mosaic_step/cpu.c, one token; cpu_piece.c, several), and what
   a token leaves in a memory. */
#ifndef MM_MOSAIC_LAYERS_H
#define MM_MOSAIC_LAYERS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "exponential.h"
#include "half.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))

struct weights {
    const char *weight;
    const float *scale; /* of the rows of int8 weights */
};

struct memory {
    struct weights key, value, gate, decay;               /* [d, d], [d, d], [H, d], [H, d] */
    const float *mix, *scale, *base, *slope, *exponent;   /* [H] */
    float *vector, *log_scale;                            /* recurrence: [B, H, D], [B, H] */
    float *pending_key, *pending_raw;                     /* [B, H, D]: the pairs that the next token completes */
    char *keys, *values;                                  /* [B, capacity, H, D], fp16 if `narrow`, else fp32 */
    int64_t narrow, apart;                                /* `apart` numbers from row to row */
    int64_t used;                                         /* pairs stored of each row before this call */
    int64_t first;                                        /* time of the pairs in slot 0 */
    int64_t window, delay;                                /* window 0: none */
    int64_t fresh;                                        /* no pair waits: nothing was read yet */
    int64_t lent;                                         /* the pairs are not ours to add to */
};

struct layer {
    const float *memory_norm, *persistent_norm;
    struct weights out, gate, up, down;                   /* [d, 2d], [F, d], [F, d], [d, F] */
    struct memory memories[2];
};

struct shape {
    int64_t layers, width, heads, inner, vocabulary;
    float eps;
    int32_t format;
};

/* What W_phi, W_psi, W_g and W_lambda make of one token, for one head: [D], [D], and two numbers. */
struct projected {
    const float *key, *value;
    float gate, decay;
};

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* The next part of a work space. Parts begin with a cache line: a vector that lies across two takes twice as long. */
static float *cut(float **rest, int64_t count) {
    float *part = *rest;
    *rest += (count + 15) / 16 * 16;
    return part;
}

/* The sum of squares. Side by side: one sum after the other waits four cycles for each number. */
ALWAYS_INLINE float squares_of(const float *x, int64_t count) {
    float sums[16] = {0}, all = 0;
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (int l = 0; l < 16; l++) sums[l] += x[i + l] * x[i + l];
    for (int l = 0; l < 16; l++) all += sums[l];
    for (; i < count; i++) all += x[i] * x[i];
    return all;
}

/* x += delta, y = norm(x) weight; delta NULL: there is nothing to add. */
static void add_and_norm_row(float *y, float *x, const float *delta, const float *weight, int64_t width, float eps) {
    for (int64_t i = 0; delta && i < width; i++) x[i] += delta[i];
    float factor = 1 / sqrtf(squares_of(x, width) / width + eps);
    for (int64_t i = 0; i < width; i++) y[i] = x[i] * factor * weight[i];
}

/* y = SiLU(gate) up. */
static void gated(float *y, const float *gate, const float *up, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        float z = gate[i], e = exp_negative(z < 0 ? z : -z); /* both sides of the sigmoid without overflow */
        y[i] = z * (z < 0 ? e : 1) / (1 + e) * up[i];
    }
}

/* y = scale x / ||x||, zero for zero. */
ALWAYS_INLINE void to_length(float *y, const float *x, float scale, int64_t size) {
    float squares = squares_of(x, size), factor = squares > 0 ? scale / sqrtf(squares) : 0;
    for (int64_t i = 0; i < size; i++) y[i] = x[i] * factor;
}

/* A head's numbers of a pair, number `at` of all. */
ALWAYS_INLINE void put_pair(char *to, int64_t at, const float *x, int64_t size, int64_t narrow) {
    if (narrow)
        floats_to_halves((uint16_t *)to + at, x, size);
    else
        memcpy((float *)to + at, x, size * sizeof *x);
}

/* Equations (8) and (9) for one head of one row: store the pair that waits, in `slot` (-1: none waits), advance the
   recurrence, or begin it, and let the new pair wait. */
ALWAYS_INLINE void remember_sized(const struct memory *m, const struct shape *s, int64_t row, int64_t h, int64_t slot,
                                  int begins, struct projected token, const int64_t size) {
    int64_t width = s->heads * size, place = row * width + h * size;
    float *u = m->vector + place, *waiting = m->pending_raw + place, *key = m->pending_key + place, mixed[size];
    if (slot >= 0 && !m->lent) {
        int64_t at = row * m->apart + slot * width + h * size;
        float mix = m->mix[h];
        for (int64_t i = 0; i < size; i++) mixed[i] = mix * waiting[i] + (1 - mix) * token.value[i];
        to_length(mixed, mixed, m->scale[h], size);
        put_pair(m->values, at, mixed, size, m->narrow);
        put_pair(m->keys, at, key, size, m->narrow);
    }
    memcpy(waiting, token.value, size * sizeof *waiting);

    float *log_scale = m->log_scale + row * s->heads + h, kept = begins ? -INFINITY : *log_scale - fabsf(token.decay);
    float largest = token.gate > kept ? token.gate : kept;
    float a = exp_negative(token.gate - largest), b = begins ? 0 : exp_negative(kept - largest);
    *log_scale = largest;
    for (int64_t i = 0; i < size; i++) u[i] = a * token.key[i] + b * u[i];
    to_length(key, u, 1, size);
}

/* The usual heads' sizes as constants: a prompt of 512 tokens spent 10 ms here, and 4 so. */
static void remember(const struct memory *m, const struct shape *s, int64_t row, int64_t h, int64_t slot, int begins,
                     struct projected token) {
    int64_t size = s->width / s->heads;
    if (size == 64)
        remember_sized(m, s, row, h, slot, begins, token, 64);
    else if (size == 128)
        remember_sized(m, s, row, h, slot, begins, token, 128);
    else
        remember_sized(m, s, row, h, slot, begins, token, size);
}

#endif
