#include "thin_rows.h"

/* Floats of scratch for mm_thin_linear. */
int64_t mm_thin_linear_scratch(int64_t rows, int64_t in) { return operand_floats(rows, in) + full_rows(rows); }

/* y [rows, out] = x [rows, in] W^T for one weight matrix of `format`, scale [out] for int8. */
void mm_thin_linear(const float *x, int64_t rows, int64_t in, const char *weight, const float *scale, int64_t out,
                    float *y, float *scratch, int format, int threads) {
    struct product product = {weight, scale, out, y};
    struct operand operand = {(char *)scratch, scratch + operand_floats(rows, in)};
    int64_t worthwhile = out * in * bytes_of(format) / LEAST_BYTES + 1;
    if (threads > worthwhile) threads = (int)worthwhile;
    make_operand(operand, x, rows, in, format, 0, 1);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (by_tiles(rows, in, format)) open_tiles();
        multiply(&product, 1, operand, rows, in, format);
        if (by_tiles(rows, in, format)) close_tiles();
    }
}
