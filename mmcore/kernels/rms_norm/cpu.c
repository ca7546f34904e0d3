/* RMSNorm in one pass over memory each way: a row is read a second time from cache. N rows of d numbers. */
#include <math.h>
#include <stddef.h>

/* What the forward pass is called with, as Python packs it: ctypes is slow with many arguments. */
typedef struct {
    const float *x; /* rows `x_row` floats apart */
    const float *weight;
    float *y;    /* [N, d] */
    float *rstd; /* [N], or NULL where no gradient is wanted */
    ptrdiff_t N, d, x_row, threads;
    double eps;
} Forward;

void rms_norm_forward(const Forward *f)
{
    ptrdiff_t N = f->N, d = f->d, x_row = f->x_row;
    const float *x = f->x, *weight = f->weight;
    float eps = (float)f->eps;
    float *y = f->y, *rstd = f->rstd;
    #pragma omp parallel for num_threads(f->threads) if (f->threads > 1) schedule(static)
    for (ptrdiff_t n = 0; n < N; n++) {
        const float *restrict in = x + n * x_row;
        float *restrict out = y + n * d;
        float sum = 0.0f;
        #pragma omp simd reduction(+ : sum)
        for (ptrdiff_t i = 0; i < d; i++)
            sum += in[i] * in[i];
        float factor = 1.0f / sqrtf(sum / d + eps);
        #pragma omp simd
        for (ptrdiff_t i = 0; i < d; i++)
            out[i] = in[i] * factor * weight[i];
        if (rstd)
            rstd[n] = factor;
    }
}

/* partial [threads, d], zeroed: each thread's share of the weight's gradient, added up in the order of its rows */
void rms_norm_backward(const float *grad, const float *x, const float *weight, const float *rstd, float *grad_x,
                       float *partial, ptrdiff_t N, ptrdiff_t d, ptrdiff_t grad_row, ptrdiff_t x_row, int threads)
{
    #pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int run = 0; run < threads; run++) {
        float *restrict sums = partial + run * d;
        for (ptrdiff_t n = N * run / threads; n < N * (run + 1) / threads; n++) {
            const float *restrict g = grad + n * grad_row;
            const float *restrict in = x + n * x_row;
            float *restrict out = grad_x + n * d;
            float along = 0.0f, factor = rstd[n];
            #pragma omp simd reduction(+ : along)
            for (ptrdiff_t i = 0; i < d; i++)
                along += g[i] * weight[i] * in[i];
            /* x factor, not x: for x of 1e12 the cube of rstd is below what fp32 can hold. */
            float back = along * factor / d * factor;
            #pragma omp simd
            for (ptrdiff_t i = 0; i < d; i++) {
                float quotient = in[i] * factor;
                out[i] = g[i] * weight[i] * factor - quotient * back;
                sums[i] += g[i] * quotient;
            }
        }
    }
}
