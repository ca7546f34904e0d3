/* The formats that weights are kept in, and rows of them as fp32. */
#ifndef MM_WEIGHT_FORMATS_H
#define MM_WEIGHT_FORMATS_H

#include <stdint.h>
#include <string.h>

enum format { FP32, BF16, INT8 };

static inline int bytes_of(int format) { return format == FP32 ? 4 : format == BF16 ? 2 : 1; }

/* out[i] = w[i], i < count; the scale of int8 is not applied. */
static inline void widen(float *out, const char *w, int64_t count, int format) {
    if (format == FP32) {
        memcpy(out, w, count * sizeof *out);
    } else if (format == BF16) {
        uint32_t *bits = (uint32_t *)out;
        for (int64_t i = 0; i < count; i++) bits[i] = (uint32_t)((const uint16_t *)w)[i] << 16;
    } else {
        for (int64_t i = 0; i < count; i++) out[i] = ((const int8_t *)w)[i];
    }
}

#endif
