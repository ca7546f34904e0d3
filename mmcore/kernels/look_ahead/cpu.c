/* Look-ahead values in one pass over memory each way. B batch, T time, H heads, D head size.

   The B T rows of H D numbers are divided into one run per thread. The backward pass computes vbar again: it reads the
   raw values anyway, for the gradient of mix. */
#include <math.h>
#include <stddef.h>

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const float *data;
    ptrdiff_t row, step; /* strides of B and T in floats; H and D lie side by side */
} Sequence;

typedef struct {
    ptrdiff_t B, T, H, D;
} Shape;

INLINE void forward_head(float *restrict out, const float *restrict now, const float *restrict next, float mix,
                         float scale, ptrdiff_t D)
{
    float sum = 0.0f, rest = 1.0f - mix;
    #pragma omp simd reduction(+ : sum)
    for (ptrdiff_t i = 0; i < D; i++) {
        float mixed = mix * now[i] + rest * next[i];
        sum += mixed * mixed;
    }
    float factor = sum == 0.0f ? 0.0f : scale / sqrtf(sum);
    #pragma omp simd
    for (ptrdiff_t i = 0; i < D; i++)
        out[i] = (mix * now[i] + rest * next[i]) * factor;
}

/* The gradient of vbar in `mixed` and those of mix and scale, added up. */
INLINE void backward_head(float *restrict mixed, const float *restrict grad, const float *restrict now,
                          const float *restrict next, float mix, float scale, double *grad_mix, double *grad_scale,
                          ptrdiff_t D)
{
    float sum = 0.0f, along = 0.0f, rest = 1.0f - mix, to_mix = 0.0f;
    #pragma omp simd reduction(+ : sum, along)
    for (ptrdiff_t i = 0; i < D; i++) {
        mixed[i] = mix * now[i] + rest * next[i];
        sum += mixed[i] * mixed[i];
        along += mixed[i] * grad[i];
    }
    float inverse = sum == 0.0f ? 0.0f : 1.0f / sqrtf(sum);
    along *= inverse;
    float factor = scale * inverse, back = factor * along * inverse;
    #pragma omp simd reduction(+ : to_mix)
    for (ptrdiff_t i = 0; i < D; i++) {
        mixed[i] = factor * grad[i] - back * mixed[i];
        to_mix += mixed[i] * (now[i] - next[i]);
    }
    *grad_mix += to_mix;
    *grad_scale += along;
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
        for (ptrdiff_t h = 0; h < H; h++)
            forward_head(values + (row * H + h) * D, now + h * D, next + h * D, p->mix[h], p->scale[h], D);
    }
}

/* scratch: two rows, the gradients of vbar at t and at t - 1; sums: grad_mix [H], grad_scale [H] of this run */
INLINE void backward_rows(const Problem *p, float *grad_raw, float *grad_following, float *scratch, double *sums,
                          ptrdiff_t first, ptrdiff_t last, ptrdiff_t D)
{
    ptrdiff_t T = p->s.T, H = p->s.H;
    float *here = scratch, *before = scratch + H * D;
    /* A run that starts inside a batch row needs the gradient of the vbar before it; that one's sums are not ours. */
    for (ptrdiff_t row = first < last && first % T ? first - 1 : first; row < last; row++) {
        ptrdiff_t b = row / T, t = row % T;
        const float *now = p->raw.data + b * p->raw.row + t * p->raw.step, *next = next_row(p, b, t);
        const float *grad = p->grad.data + b * p->grad.row + t * p->grad.step;
        for (ptrdiff_t h = 0; h < H; h++) {
            double unused[2] = {0.0, 0.0};
            float *mine = here + h * D, *earlier = before + h * D, mix = p->mix[h], rest = 1.0f - mix;
            backward_head(mine, grad + h * D, now + h * D, next + h * D, mix, p->scale[h],
                          row < first ? unused : sums + h, row < first ? unused + 1 : sums + H + h, D);
            if (row < first)
                continue;
            float *out = grad_raw + (row * H + h) * D;
            if (t) {
                #pragma omp simd
                for (ptrdiff_t i = 0; i < D; i++)
                    out[i] = mix * mine[i] + rest * earlier[i];
            } else {
                #pragma omp simd
                for (ptrdiff_t i = 0; i < D; i++)
                    out[i] = mix * mine[i];
            }
            if (t + 1 == T) {
                float *after = grad_following + (b * H + h) * D;
                for (ptrdiff_t i = 0; i < D; i++)
                    after[i] = rest * mine[i];
            }
        }
        float *swapped = here;
        here = before;
        before = swapped;
    }
}

#define WITH_HEAD_SIZE(D, rows, ...) \
    switch (D) { \
    case 32: rows(__VA_ARGS__, 32); break; \
    case 64: rows(__VA_ARGS__, 64); break; \
    case 128: rows(__VA_ARGS__, 128); break; \
    default: rows(__VA_ARGS__, D); \
    }

/* following [B, H, D]; mix, scale [H]; values [B, T, H, D] */
void look_ahead_forward(const float *raw, const float *following, const float *mix, const float *scale, float *values,
                        ptrdiff_t B, ptrdiff_t T, ptrdiff_t H, ptrdiff_t D, ptrdiff_t raw_row, ptrdiff_t raw_step,
                        int threads)
{
    Problem p = {{raw, raw_row, raw_step}, {NULL, 0, 0}, following, mix, scale, {B, T, H, D}};
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int run = 0; run < threads; run++) {
        ptrdiff_t first = B * T * run / threads, last = B * T * (run + 1) / threads;
        WITH_HEAD_SIZE(D, forward_rows, &p, values, first, last)
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
