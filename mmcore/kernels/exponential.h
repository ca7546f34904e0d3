/* exp(x) for x <= 0 in plain arithmetic, so that a loop over it becomes vector instructions: libm's expf, called one
   number at a time, made a scan of 131,072 gates cost more than its 8.4 million multiplications. */
#ifndef MM_EXPONENTIAL_H
#define MM_EXPONENTIAL_H

#include <stdint.h>
#include <string.h>

/* 2^n e^r with x = n ln 2 + r, |r| <= ln 2 / 2; Taylor's polynomial of degree 7 leaves 5e-9 of it. Error at most
   1.2 units in the last place; 0 below -87.3 (where floats lose digits), and NaN for NaN. */
static inline __attribute__((always_inline)) float exp_negative(float x)
{
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, held in the low bits */
    float bounded = x < -87.3f ? -87.3f : x;
    float shifted = bounded * 1.44269504f + shift;
    float n = shifted - shift;
    float r = bounded - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts, the first exact in 10 bits */
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000u;
    float power;
    memcpy(&power, &bits, sizeof power);
    return x < -87.3f ? 0.0f : p * power;
}

#endif
