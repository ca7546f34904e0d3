#include "thin_rows.h"

/* `count` matrices weights[m] [outs[m], in], all fp32 or all bf16, applied to the same x [rows, in]. Results lie one
   after the other in y: matrix m at rows * (outs[0] + .. + outs[m-1]), as [rows, outs[m]]. scratch [rows, in] is used
   for bf16. */
void mm_thin_linear(const float *x, int64_t rows, int64_t in, int64_t count, const char *const *weights,
                    const int64_t *outs, float *y, float *scratch, int bf16, int threads) {
    struct product list[count];
    int64_t total = 0;
    for (int64_t m = 0; m < count; total += outs[m], m++)
        list[m] = (struct product){weights[m], outs[m], y + rows * total};
    int64_t worthwhile = total * in * (bf16 ? 2 : 4) / LEAST_BYTES + 1;
    if (threads > worthwhile) threads = (int)worthwhile;
    if (bf16) {
        even_then_odd(x, scratch, rows, in);
        x = scratch;
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    multiply(list, count, x, rows, in, bf16);
}
