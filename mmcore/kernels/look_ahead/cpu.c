/* Look-ahead values in one pass over memory each way. B batch, T time, H heads, D head size.

   The B T rows of H D numbers are divided into one run per thread. The backward pass computes vbar again: it reads the
   raw values anyway, for the gradient of mix. */
#include <math.h>
#include <stddef.h>
#include "lanes.h"

#define INLINE LANES_INLINE

typedef struct {
    const float *data;
    ptrdiff_t row, step; /* strides of B and T in floats; H and D lie side by side */
} Sequence;

typedef struct {
    ptrdiff_t B, T, H, D;
} Shape;

/* Heads whose sums are taken before any of them is used: a sum, its root and its quotient take some 80 cycles, in
   which the sums of the other heads get done. */
#define TOGETHER 8

/* values <- scale vbar / ||vbar|| for `count` neighbouring heads, at most TOGETHER */
INLINE void forward_heads(float *values, const float *now, const float *next, const float *mix, const float *scale,
                          ptrdiff_t count, ptrdiff_t D)
{
    float factor[TOGETHER];
    for (ptrdiff_t h = 0; h < count; h++) {
        float rest = 1.0f - mix[h];
        Lanes sums = {0};
        for (ptrdiff_t i = 0, k = h * D; i < D; i += LANES) {
            Lanes mixed = mix[h] * take(now + k + i, D - i) + rest * take(next + k + i, D - i);
            put(values + k + i, D - i, mixed);
            sums += mixed * mixed;
        }
        float sum = sum_of(sums);
        factor[h] = sum == 0.0f ? 0.0f : scale[h] / sqrtf(sum);
    }
    for (ptrdiff_t h = 0; h < count; h++)
        for (ptrdiff_t i = 0, k = h * D; i < D; i += LANES)
            put(values + k + i, D - i, factor[h] * take(values + k + i, D - i));
}

/* out <- mix g_t + (1 - mix) g_{t-1} with g the gradient of vbar; `earlier` holds g_{t-1} and then g_t. The shares of
   mix and scale in the gradient come back in to_mix and to_scale. */
INLINE void backward_heads(float *out, float *earlier, const float *grad, const float *now, const float *next,
                           const float *mix, const float *scale, float *to_mix, float *to_scale, ptrdiff_t count,
                           ptrdiff_t D)
{
    float factor[TOGETHER], back[TOGETHER];
    for (ptrdiff_t h = 0; h < count; h++) {
        float rest = 1.0f - mix[h];
        Lanes sums = {0}, alongs = {0};
        for (ptrdiff_t i = 0, k = h * D; i < D; i += LANES) {
            Lanes mixed = mix[h] * take(now + k + i, D - i) + rest * take(next + k + i, D - i);
            sums += mixed * mixed;
            alongs += mixed * take(grad + k + i, D - i);
        }
        float sum = sum_of(sums), inverse = sum == 0.0f ? 0.0f : 1.0f / sqrtf(sum);
        to_scale[h] = sum_of(alongs) * inverse;
        factor[h] = scale[h] * inverse;
        back[h] = factor[h] * to_scale[h] * inverse;
    }
    for (ptrdiff_t h = 0; h < count; h++) {
        float rest = 1.0f - mix[h];
        Lanes shares = {0};
        for (ptrdiff_t i = 0, k = h * D; i < D; i += LANES) {
            Lanes here = take(now + k + i, D - i), after = take(next + k + i, D - i);
            Lanes g = factor[h] * take(grad + k + i, D - i) - back[h] * (mix[h] * here + rest * after);
            shares += g * (here - after);
            put(out + k + i, D - i, mix[h] * g + rest * take(earlier + k + i, D - i));
            put(earlier + k + i, D - i, g);
        }
        to_mix[h] = sum_of(shares);
    }
}

typedef struct {
    Sequence raw, grad;
    const float *following, *mix, *scale;
    Shape s;
} Problem;

/* v~ of the row after (b, t), starting at its first head */
INLINE const float *next_row(const Problem *p, ptrdiff_t b, ptrdiff_t t)
{
    if (t + 1 < p->s.T)
        return p->raw.data + b * p->raw.row + (t + 1) * p->raw.step;
    return p->following + b * p->s.H * p->s.D;
}

INLINE void forward_rows(const Problem *p, float *values, ptrdiff_t first, ptrdiff_t last, ptrdiff_t D)
{
    ptrdiff_t T = p->s.T, H = p->s.H;
    for (ptrdiff_t row = first; row < last; row++) {
        ptrdiff_t b = row / T, t = row % T;
        const float *now = p->raw.data + b * p->raw.row + t * p->raw.step, *next = next_row(p, b, t);
        for (ptrdiff_t h = 0; h < H; h += TOGETHER)
            forward_heads(values + (row * H + h) * D, now + h * D, next + h * D, p->mix + h, p->scale + h,
                          H - h < TOGETHER ? H - h : TOGETHER, D);
    }
}

/* scratch: a row for the gradients of vbar, and one to throw away; sums: grad_mix [H], grad_scale [H] of this run */
INLINE void backward_rows(const Problem *p, float *grad_raw, float *grad_following, float *scratch, double *sums,
                          ptrdiff_t first, ptrdiff_t last, ptrdiff_t D)
{
    ptrdiff_t T = p->s.T, H = p->s.H;
    float *earlier = scratch, *unwanted = scratch + H * D;
    /* A run that starts inside a batch row begins one row early, for the gradient of that vbar alone. */
    ptrdiff_t start = first < last && first % T ? first - 1 : first;
    for (ptrdiff_t i = 0; i < H * D; i++)
        earlier[i] = 0.0f;
    for (ptrdiff_t row = start; row < last; row++) {
        ptrdiff_t b = row / T, t = row % T;
        const float *now = p->raw.data + b * p->raw.row + t * p->raw.step, *next = next_row(p, b, t);
        const float *grad = p->grad.data + b * p->grad.row + t * p->grad.step;
        float *out = row < first ? unwanted : grad_raw + row * H * D;
        for (ptrdiff_t h = 0; h < H; h += TOGETHER) {
            float to_mix[TOGETHER], to_scale[TOGETHER];
            ptrdiff_t count = H - h < TOGETHER ? H - h : TOGETHER;
            backward_heads(out + h * D, earlier + h * D, grad + h * D, now + h * D, next + h * D, p->mix + h,
                           p->scale + h, to_mix, to_scale, count, D);
            for (ptrdiff_t k = 0; k < count && row >= first; k++) {
                sums[h + k] += to_mix[k];
                sums[H + h + k] += to_scale[k];
            }
        }
        if (t + 1 < T)
            continue;
        for (ptrdiff_t h = 0; h < H; h++)
            for (ptrdiff_t i = 0; i < D; i++)
                grad_following[(b * H + h) * D + i] = (1.0f - p->mix[h]) * earlier[h * D + i];
        for (ptrdiff_t i = 0; i < H * D; i++)
            earlier[i] = 0.0f; /* nothing precedes the first position of the next batch row */
    }
}

#define WITH_HEAD_SIZE(D, rows, ...) \
    switch (D) { \
    case 32: rows(__VA_ARGS__, 32); break; \
    case 64: rows(__VA_ARGS__, 64); break; \
    case 128: rows(__VA_ARGS__, 128); break; \
    default: rows(__VA_ARGS__, D); \
    }

/* What the forward pass is called with, as Python packs it: ctypes is slow with many arguments. */
typedef struct {
    const float *raw;
    const float *following;   /* [B, H, D] */
    const float *mix, *scale; /* [H] */
    float *values;            /* [B, T, H, D] */
    ptrdiff_t B, T, H, D, raw_row, raw_step, threads;
} Forward;

void look_ahead_forward(const Forward *f)
{
    Problem p = {{f->raw, f->raw_row, f->raw_step}, {NULL, 0, 0}, f->following, f->mix, f->scale,
                 {f->B, f->T, f->H, f->D}};
    ptrdiff_t rows = f->B * f->T;
    #pragma omp parallel for num_threads(f->threads) if (f->threads > 1)
    for (ptrdiff_t run = 0; run < f->threads; run++) {
        ptrdiff_t first = rows * run / f->threads, last = rows * (run + 1) / f->threads;
        WITH_HEAD_SIZE(f->D, forward_rows, &p, f->values, first, last)
    }
}

/* sums [threads, 2, H], zeroed; scratch [threads, 2, H, D] */
void look_ahead_backward(const float *raw, const float *following, const float *mix, const float *scale,
                         const float *grad, float *grad_raw, float *grad_following, float *scratch, double *sums,
                         ptrdiff_t B, ptrdiff_t T, ptrdiff_t H, ptrdiff_t D, ptrdiff_t raw_row, ptrdiff_t raw_step,
                         ptrdiff_t grad_row, ptrdiff_t grad_step, int threads)
{
    Problem p = {{raw, raw_row, raw_step}, {grad, grad_row, grad_step}, following, mix, scale, {B, T, H, D}};
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int run = 0; run < threads; run++) {
        ptrdiff_t first = B * T * run / threads, last = B * T * (run + 1) / threads;
        WITH_HEAD_SIZE(D, backward_rows, &p, grad_raw, grad_following, scratch + run * 2 * H * D, sums + run * 2 * H,
                       first, last)
    }
}
