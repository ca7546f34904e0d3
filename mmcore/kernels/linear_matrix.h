/* One of the matrices that linear multiplies with. */
#ifndef MM_LINEAR_MATRIX_H
#define MM_LINEAR_MATRIX_H

#include <stdint.h>

/* W [out, in] of a format, scale [out] for int8; y [rows, out] the product or its gradient, y_row numbers from row to row;
   grad [out, in] is dW. */
struct matrix {
    const char *weight;
    const float *scale;
    char *y;
    float *grad;
    int64_t out, y_row;
};

#endif
