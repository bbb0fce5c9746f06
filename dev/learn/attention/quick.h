// quick.h: e^x, tanh and the logistic function without libm, so that loops which call them are vectorised (libm's take
// one number at a time), and give the same bits with any library.

#pragma once
#include <stdint.h>
#include <string.h>

// e^x to 2 units in the last place, in a form that compilers vectorise: x = n ln2 + r with |r| <= ln2/2, so that
// e^x = 2^n e^r. Adding 1.5 2^23 rounds x/ln2 to n, and leaves n in the low bits, from where it is shifted into the
// exponent. ln2 is subtracted in two parts, of which n times the first is exact. e^r is Taylor's polynomial. Below -87.3 the result is 0, above 88.3 it grows no more; NaN stays NaN.
static inline float exp_quick(float x) {
    float clamped = x < -87.3f ? -87.3f : x > 88.3f ? 88.3f : x;
    float shifted = clamped * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    float r = clamped - n * 0.693145752f - n * 1.42860677e-6f;
    float p = 1.98412698e-4f * r + 1.38888889e-3f;
    p = (((p * r + 8.33333333e-3f) * r + 4.16666667e-2f) * r + 1.66666667e-1f) * r;
    p = ((p + 0.5f) * r + 1) * r + 1;
    uint32_t bits, power;
    memcpy(&bits, &shifted, 4);
    power = (bits << 23) + (127u << 23);
    float two_n;
    memcpy(&two_n, &power, 4);
    return x < -87.3f ? 0 : p * two_n;
}
static inline float logistic_quick(float x) { return 1 / (1 + exp_quick(-x)); }
static inline float tanh_quick(float x) { return 1 - 2 / (1 + exp_quick(2 * x)); } // absolute error 1e-7
