/* The formats that weights are kept in, and rows of them as fp32. */
#ifndef MM_WEIGHT_FORMATS_H
#define MM_WEIGHT_FORMATS_H

#include <stdint.h>
#include <string.h>

enum format { FP32, BF16, INT8, ROUNDED }; /* the last: fp32 in memory, rounded to bf16 for its products */

static inline int bytes_of(int format) { return format == BF16 ? 2 : format == INT8 ? 1 : 4; }

/* out[i] = w[i], i < count; the scale of int8 is not applied. */
static inline void widen(float *out, const char *w, int64_t count, int format) {
    if (format == FP32 || format == ROUNDED) {
        memcpy(out, w, count * sizeof *out);
    } else if (format == BF16) {
        for (int64_t i = 0; i < count; i++) {
            uint32_t bits = (uint32_t)((const uint16_t *)w)[i] << 16;
            memcpy(out + i, &bits, sizeof bits);
        }
    } else {
        for (int64_t i = 0; i < count; i++) out[i] = ((const int8_t *)w)[i];
    }
}

#endif
