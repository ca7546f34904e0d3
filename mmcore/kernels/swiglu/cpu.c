/* SwiGLU in one pass over memory each way; the backward pass computes the sigmoid again. N rows of d numbers. */
#include <math.h>
#include <stddef.h>
#include "bf16.h"
#include "exponential.h"
#include "weight_formats.h"

static inline __attribute__((always_inline)) float sigmoid(float x)
{
    float e = exp_negative(-fabsf(x));
    return (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

#define RUN 512 /* numbers of bf16 rows that are widened at a time */

static inline __attribute__((always_inline)) void forward_run(float *restrict o, const float *restrict g,
                                                              const float *restrict u, ptrdiff_t d)
{
    #pragma omp simd
    for (ptrdiff_t i = 0; i < d; i++)
        o[i] = g[i] * sigmoid(g[i]) * u[i];
}

static inline __attribute__((always_inline)) void backward_run(float *restrict to_gate, float *restrict to_up,
                                                               const float *restrict in, const float *restrict g,
                                                               const float *restrict u, ptrdiff_t d)
{
    #pragma omp simd
    for (ptrdiff_t i = 0; i < d; i++) {
        float s = sigmoid(g[i]), silu = g[i] * s;
        to_gate[i] = in[i] * u[i] * (s + silu * (1.0f - s));
        to_up[i] = in[i] * silu;
    }
}

/* What the forward pass is called with, as Python packs it: ctypes is slow with many arguments. */
typedef struct {
    const char *gate, *up; /* rows `gate_row` and `up_row` numbers apart */
    char *out;             /* [N, d] */
    ptrdiff_t N, d, gate_row, up_row, threads, halves; /* all of them fp32, or bf16 */
} Forward;

void swiglu_forward(const Forward *f)
{
    const Forward c = *f;
    #pragma omp parallel for num_threads(c.threads) if (c.threads > 1) schedule(static)
    for (ptrdiff_t n = 0; n < c.N; n++) {
        if (!c.halves) {
            forward_run((float *)c.out + n * c.d, (const float *)c.gate + n * c.gate_row,
                        (const float *)c.up + n * c.up_row, c.d);
            continue;
        }
        for (ptrdiff_t i = 0; i < c.d; i += RUN) {
            float g[RUN], u[RUN], o[RUN];
            ptrdiff_t count = c.d - i < RUN ? c.d - i : RUN;
            widen(g, c.gate + 2 * (n * c.gate_row + i), count, BF16);
            widen(u, c.up + 2 * (n * c.up_row + i), count, BF16);
            forward_run(o, g, u, count);
            round_to_bf16((uint16_t *)c.out + n * c.d + i, o, count);
        }
    }
}

/* All of them fp32, or bf16 (`halves`). */
void swiglu_backward(const char *grad, const char *gate, const char *up, char *grad_gate, char *grad_up, ptrdiff_t N,
                     ptrdiff_t d, ptrdiff_t grad_row, ptrdiff_t gate_row, ptrdiff_t up_row, int halves, int threads)
{
    #pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (ptrdiff_t n = 0; n < N; n++) {
        if (!halves) {
            backward_run((float *)grad_gate + n * d, (float *)grad_up + n * d, (const float *)grad + n * grad_row,
                         (const float *)gate + n * gate_row, (const float *)up + n * up_row, d);
            continue;
        }
        for (ptrdiff_t i = 0; i < d; i += RUN) {
            float in[RUN], g[RUN], u[RUN], to_gate[RUN], to_up[RUN];
            ptrdiff_t count = d - i < RUN ? d - i : RUN;
            widen(in, grad + 2 * (n * grad_row + i), count, BF16);
            widen(g, gate + 2 * (n * gate_row + i), count, BF16);
            widen(u, up + 2 * (n * up_row + i), count, BF16);
            backward_run(to_gate, to_up, in, g, u, count);
            round_to_bf16((uint16_t *)grad_gate + n * d + i, to_gate, count);
            round_to_bf16((uint16_t *)grad_up + n * d + i, to_up, count);
        }
    }
}
