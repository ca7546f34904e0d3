/* SwiGLU in one pass over memory each way; the backward pass computes the sigmoid again. N rows of d numbers. */
#include <math.h>
#include <stddef.h>
#include "exponential.h"

static inline __attribute__((always_inline)) float sigmoid(float x)
{
    float e = exp_negative(-fabsf(x));
    return (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

/* What the forward pass is called with, as Python packs it: ctypes is slow with many arguments. */
typedef struct {
    const float *gate, *up; /* rows `gate_row` and `up_row` floats apart */
    float *out;             /* [N, d] */
    ptrdiff_t N, d, gate_row, up_row, threads;
} Forward;

void swiglu_forward(const Forward *f)
{
    const float *gate = f->gate, *up = f->up;
    float *out = f->out;
    ptrdiff_t N = f->N, d = f->d, gate_row = f->gate_row, up_row = f->up_row;
    #pragma omp parallel for num_threads(f->threads) if (f->threads > 1) schedule(static)
    for (ptrdiff_t n = 0; n < N; n++) {
        const float *restrict g = gate + n * gate_row;
        const float *restrict u = up + n * up_row;
        float *restrict o = out + n * d;
        #pragma omp simd
        for (ptrdiff_t i = 0; i < d; i++)
            o[i] = g[i] * sigmoid(g[i]) * u[i];
    }
}

void swiglu_backward(const float *grad, const float *gate, const float *up, float *grad_gate, float *grad_up,
                     ptrdiff_t N, ptrdiff_t d, ptrdiff_t grad_row, ptrdiff_t gate_row, ptrdiff_t up_row, int threads)
{
    #pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (ptrdiff_t n = 0; n < N; n++) {
        const float *restrict in = grad + n * grad_row;
        const float *restrict g = gate + n * gate_row;
        const float *restrict u = up + n * up_row;
        float *restrict to_gate = grad_gate + n * d;
        float *restrict to_up = grad_up + n * d;
        #pragma omp simd
        for (ptrdiff_t i = 0; i < d; i++) {
            float s = sigmoid(g[i]), silu = g[i] * s;
            to_gate[i] = in[i] * u[i] * (s + silu * (1.0f - s));
            to_up[i] = in[i] * silu;
        }
    }
}
