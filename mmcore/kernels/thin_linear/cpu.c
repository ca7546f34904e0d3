#include "thin_rows.h"

/* y [rows, out] = x [rows, in] W^T for one weight matrix of `format`, scale [out] for int8. scratch [rows, in] is used
   for bf16. */
void mm_thin_linear(const float *x, int64_t rows, int64_t in, const char *weight, const float *scale, int64_t out,
                    float *y, float *scratch, int format, int threads) {
    struct product product = {weight, scale, out, y};
    int64_t worthwhile = out * in * bytes_of(format) / LEAST_BYTES + 1;
    if (threads > worthwhile) threads = (int)worthwhile;
    if (format == BF16) {
        even_then_odd(x, scratch, rows, in);
        x = scratch;
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    multiply(&product, 1, x, rows, in, format);
}
