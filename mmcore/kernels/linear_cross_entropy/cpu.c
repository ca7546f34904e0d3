/* Rows of logits -> losses, and logits -> softmax - onehot in place.

   A row of 8,192 floats is 32 KiB and stays in the second-level cache between its three passes: maximum,
   exponentials with their sum, scaling. GCC and clang vector extensions; eight lanes whatever the processor. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 8
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

static inline vec load(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float *p, vec v) { memcpy(p, &v, sizeof v); }
static inline vec choose(ivec mask, vec a, vec b) { return (vec)(((ivec)a & mask) | ((ivec)b & ~mask)); }

/* exp(x) for x <= 0, relative error below 2e-7: 2^n times a polynomial on |r| <= ln(2)/2. Below -87 it is 0 (the
   smallest normal number; -inf too); NaN stays NaN. Adding 1.5 * 2^23 rounds to an integer held in the low bits. */
static inline vec exp_of_negative(vec x) {
    const float magic = 12582912.0f;
    ivec small = x < -87.0f;
    vec shifted = x * 1.44269504f + magic;
    vec n = shifted - magic;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec exponent = ((ivec)shifted - (ivec)((vec){0} + magic)) << 23;
    vec result = (vec)((ivec)p + exponent);
    return choose(small, (vec){0}, choose(x != x, x, result));
}

static float row_maximum(const float *x, int64_t size) {
    vec best = (vec){0} + x[0], other = best;
    int64_t i = 0;
    for (; i + 2 * LANES <= size; i += 2 * LANES) {
        vec a = load(x + i), b = load(x + i + LANES);
        best = choose(a > best, a, best);
        other = choose(b > other, b, other);
    }
    best = choose(other > best, other, best);
    float maximum = best[0];
    for (int lane = 1; lane < LANES; lane++) maximum = best[lane] > maximum ? best[lane] : maximum;
    for (; i < size; i++) maximum = x[i] > maximum ? x[i] : maximum;
    return maximum;
}

/* x <- exp(x - maximum); returns the sum. `keep` = 0 leaves x alone. */
static float row_exponentials(float *x, int64_t size, float maximum, int keep) {
    vec sum = {0}, other = {0};
    int64_t i = 0;
    for (; i + 2 * LANES <= size; i += 2 * LANES) {
        vec a = exp_of_negative(load(x + i) - maximum), b = exp_of_negative(load(x + i + LANES) - maximum);
        sum += a;
        other += b;
        if (keep) {
            store(x + i, a);
            store(x + i + LANES, b);
        }
    }
    sum += other;
    double total = 0;
    for (int lane = 0; lane < LANES; lane++) total += sum[lane];
    for (; i < size; i++) {
        float e = expf(x[i] - maximum);
        total += e;
        if (keep) x[i] = e;
    }
    return (float)total;
}

/* logits [rows, vocabulary], rows `stride` floats apart; labels [rows], -100 = does not count (loss and gradient 0,
   whatever its logits hold). Labels are checked by the caller. vocabulary >= 1. */
void mm_softmax_rows(float *logits, const int64_t *labels, float *losses, int64_t rows, int64_t vocabulary,
                     int64_t stride, int with_gradient, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        float *x = logits + row * stride;
        int64_t label = labels[row];
        if (label == -100) {
            losses[row] = 0;
            if (with_gradient) memset(x, 0, vocabulary * sizeof(float));
            continue;
        }
        float maximum = row_maximum(x, vocabulary), target = x[label] - maximum;
        float sum = row_exponentials(x, vocabulary, maximum, with_gradient);
        losses[row] = logf(sum) - target;
        if (with_gradient) {
            float scale = 1.0f / sum;
            for (int64_t i = 0; i < vocabulary; i++) x[i] *= scale;
            x[label] -= 1.0f;
        }
    }
}
