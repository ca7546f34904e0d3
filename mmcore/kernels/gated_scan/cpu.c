/* The gated scan in one pass over memory each way. B batch, T time, H heads, D head size.

   u_t = w_t k~_t + d_t u_{t-1} is held in cache; w = exp(log_gate_t - M_t) and d = exp(log_decay_t + M_{t-1} - M_t) are
   at most 1, and one of them is 1. What is kept for the backward pass beside the keys is the other one, with a sign that
   tells which, and ||u||: 2 numbers a head and step. Work is divided over (batch row, group of heads); a group is walked
   step by step, because rows of neighbouring heads lie side by side in memory. */
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include "exponential.h"
#include "lanes.h"

#define INLINE LANES_INLINE
#define GROUP 64 /* most heads in one group: the size of the small buffers on the stack */

typedef struct {
    const float *data;
    ptrdiff_t row, step; /* strides of B and T in floats; H and D lie side by side */
} Sequence;

typedef struct {
    ptrdiff_t B, T, H, D;
} Shape;

/* u <- w x + d u, key <- u / ||u||; returns ||u||. d = 0 starts anew, whatever u held (a NaN of another document). */
INLINE float advance(float *u, float *key, const float *x, float w, float d, ptrdiff_t D)
{
    Lanes sums = {0};
    for (ptrdiff_t i = 0; i < D; i += LANES) {
        Lanes v = w * take(x + i, D - i);
        if (d != 0.0f)
            v += d * take(u + i, D - i);
        put(u + i, D - i, v);
        sums += v * v;
    }
    float norm = sqrtf(sum_of(sums)), inverse = norm == 0.0f ? 0.0f : 1.0f / norm;
    for (ptrdiff_t i = 0; i < D; i += LANES)
        put(key + i, D - i, take(u + i, D - i) * inverse);
    return norm;
}

/* The two weights of a step for `count` heads, and M carried on in `top`. */
INLINE void weigh(float *restrict w, float *restrict d, float *restrict top, const float *restrict gate,
                  const float *restrict decay, bool reset, ptrdiff_t count)
{
    #pragma omp simd
    for (ptrdiff_t h = 0; h < count; h++) {
        float carried = reset ? -INFINITY : decay[h] + top[h];
        bool fresh = gate[h] >= carried;
        float lesser = exp_negative(-fabsf(gate[h] - carried));
        w[h] = fresh ? 1.0f : lesser;
        d[h] = fresh ? lesser : 1.0f;
        top[h] = fresh ? gate[h] : carried;
    }
}

INLINE void forward_group(Sequence raw, Sequence gates, Sequence decays, const unsigned char *resets, float *keys,
                          float *kept, float *vector, float *log_scale, Shape s, ptrdiff_t b, ptrdiff_t first,
                          ptrdiff_t count, ptrdiff_t D)
{
    float w[GROUP], d[GROUP], top[GROUP], norm[GROUP];
    vector += (b * s.H + first) * D;
    log_scale += b * s.H + first;
    for (ptrdiff_t h = 0; h < count; h++)
        top[h] = log_scale[h];
    for (ptrdiff_t t = 0; t < s.T; t++) {
        const float *x = raw.data + b * raw.row + t * raw.step + first * D;
        float *key = keys + ((b * s.T + t) * s.H + first) * D;
        weigh(w, d, top, gates.data + b * gates.row + t * gates.step + first,
              decays.data + b * decays.row + t * decays.step + first, resets && resets[b * s.T + t], count);
        for (ptrdiff_t h = 0; h < count; h++)
            norm[h] = advance(vector + h * D, key + h * D, x + h * D, w[h], d[h], D);
        if (kept) {
            float *k = kept + (b * s.T + t) * 2 * s.H + first;
            for (ptrdiff_t h = 0; h < count; h++) {
                k[h] = w[h] == 1.0f ? d[h] : -w[h];
                k[s.H + h] = norm[h];
            }
        }
    }
    for (ptrdiff_t h = 0; h < count; h++)
        log_scale[h] = top[h];
}

/* One step back: du <- (g - k <k, g>) / ||u|| + d_{t+1} du, grad_raw <- w du; returns <du, before>. */
INLINE float retreat(float *du, float *grad_raw, const float *grad_key, const float *key, const float *before, float w,
                     float d_next, float norm, ptrdiff_t D)
{
    float inverse = norm == 0.0f ? 0.0f : 1.0f / norm;
    Lanes alongs = {0}, onwards = {0};
    for (ptrdiff_t i = 0; i < D; i += LANES)
        alongs += take(key + i, D - i) * take(grad_key + i, D - i);
    float along = sum_of(alongs) * inverse;
    for (ptrdiff_t i = 0; i < D; i += LANES) {
        Lanes v = take(grad_key + i, D - i) * inverse - take(key + i, D - i) * along;
        if (d_next != 0.0f)
            v += d_next * take(du + i, D - i);
        put(du + i, D - i, v);
        put(grad_raw + i, D - i, w * v);
        onwards += v * take(before + i, D - i);
    }
    return sum_of(onwards);
}

INLINE void backward_group(Sequence grad_keys, const float *keys, const float *kept, const float *vector,
                           float *grad_raw, float *grad_gates, float *grad_decays, float *scratch, Shape s,
                           ptrdiff_t b, ptrdiff_t first, ptrdiff_t count, ptrdiff_t D)
{
    float d_next[GROUP], grad_next[GROUP];
    float *du = scratch + (b * s.H + first) * D;
    /* Without a state d_0 is 0 and it does not matter what stands in for the vector. */
    vector = vector ? vector + (b * s.H + first) * D : du;
    for (ptrdiff_t h = 0; h < count; h++)
        d_next[h] = grad_next[h] = 0.0f;
    for (ptrdiff_t t = s.T - 1; t >= 0; t--) {
        ptrdiff_t head = (b * s.T + t) * s.H + first;
        const float *k = kept + (b * s.T + t) * 2 * s.H + first;
        const float *grad_key = grad_keys.data + b * grad_keys.row + t * grad_keys.step + first * D;
        /* Heads backwards too: memory is then walked in one direction, which the prefetcher follows (5.7 instead of
           11 ms of processor time at B=4 T=4096 H=8 D=64; asking for the rows ahead by hand did not help). */
        for (ptrdiff_t h = count - 1; h >= 0; h--) {
            /* u_{t-1} = ||u_{t-1}|| k_{t-1}; before the first step it is the state the scan started from. */
            const float *before = t ? keys + (head - s.H + h) * D : vector + h * D;
            float w = signbit(k[h]) ? -k[h] : 1.0f, d = signbit(k[h]) ? 1.0f : k[h], length = t ? k[h - s.H] : 1.0f;
            float onward = retreat(du + h * D, grad_raw + (head + h) * D, grad_key + h * D, keys + (head + h) * D,
                                   before, w, d_next[h], k[s.H + h], D);
            float grad_decay = d == 0.0f ? 0.0f : d * length * onward;
            grad_decays[head + h] = grad_decay;
            /* Keys do not feel the length of u_t, so what reaches it through k_t cancels: <du_t, u_t> is the
               gradient of the next log-decay, and the raw keys are not needed. */
            grad_gates[head + h] = grad_next[h] - grad_decay;
            grad_next[h] = grad_decay;
            d_next[h] = d;
        }
    }
}

/* Groups of heads so that (batch rows x groups) divides evenly over the threads, where there are heads enough. */
static ptrdiff_t group_size(Shape s, ptrdiff_t threads)
{
    ptrdiff_t groups = 1;
    while (groups < s.H && (s.B * groups) % threads)
        groups++;
    ptrdiff_t size = (s.H + groups - 1) / groups;
    return size < 1 ? 1 : size < GROUP ? size : GROUP; /* of no heads, too */
}

/* Calls `group` with D a constant where that is worth its code: the loops over D then have no remainder to test. */
#define WITH_HEAD_SIZE(D, group, ...) \
    switch (D) { \
    case 32: group(__VA_ARGS__, 32); break; \
    case 64: group(__VA_ARGS__, 64); break; \
    case 128: group(__VA_ARGS__, 128); break; \
    default: group(__VA_ARGS__, D); \
    }

/* What the forward pass is called with, as Python packs it: 21 separate arguments take ctypes 2.7 us, this 0.6. */
typedef struct {
    const float *raw, *gates, *decays;
    const unsigned char *resets;            /* [B, T], or NULL for none */
    const float *old_vector, *old_log_scale; /* [B, H, D] and [B, H], the state to start from; or both NULL */
    float *keys;                            /* [B, T, H, D] */
    float *kept;                            /* [B, T, 2, H], or NULL where no gradient is wanted */
    float *vector, *log_scale;              /* [B, H, D] and [B, H], the last state */
    ptrdiff_t B, T, H, D, raw_row, raw_step, gate_row, gate_step, decay_row, decay_step, threads;
} Forward;

void gated_scan_forward(const Forward *f)
{
    Shape s = {f->B, f->T, f->H, f->D};
    Sequence raw = {f->raw, f->raw_row, f->raw_step}, gates = {f->gates, f->gate_row, f->gate_step};
    Sequence decays = {f->decays, f->decay_row, f->decay_step};
    ptrdiff_t size = group_size(s, f->threads), groups = (s.H + size - 1) / size;
    for (ptrdiff_t i = 0; i < s.B * s.H * s.D; i++)
        f->vector[i] = f->old_vector ? f->old_vector[i] : 0.0f;
    for (ptrdiff_t i = 0; i < s.B * s.H; i++)
        f->log_scale[i] = f->old_log_scale ? f->old_log_scale[i] : -INFINITY;
    #pragma omp parallel for num_threads(f->threads) if (f->threads > 1)
    for (ptrdiff_t task = 0; task < s.B * groups; task++) {
        ptrdiff_t b = task / groups, first = task % groups * size, count = s.H - first < size ? s.H - first : size;
        WITH_HEAD_SIZE(s.D, forward_group, raw, gates, decays, f->resets, f->keys, f->kept, f->vector, f->log_scale,
                       s, b, first, count)
    }
}

/* vector [B, H, D]: u before the first step, or NULL; scratch [B, H, D] */
void gated_scan_backward(const float *grad_keys, const float *keys, const float *kept, const float *vector,
                         float *grad_raw, float *grad_gates, float *grad_decays, float *scratch, ptrdiff_t B,
                         ptrdiff_t T, ptrdiff_t H, ptrdiff_t D, ptrdiff_t grad_row, ptrdiff_t grad_step, int threads)
{
    Shape s = {B, T, H, D};
    Sequence g = {grad_keys, grad_row, grad_step};
    ptrdiff_t size = group_size(s, threads), groups = (H + size - 1) / size;
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (ptrdiff_t task = 0; task < B * groups; task++) {
        ptrdiff_t b = task / groups, first = task % groups * size, count = H - first < size ? H - first : size;
        WITH_HEAD_SIZE(D, backward_group, g, keys, kept, vector, grad_raw, grad_gates, grad_decays, scratch, s, b,
                       first, count)
    }
}
