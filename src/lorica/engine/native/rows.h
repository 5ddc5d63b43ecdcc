/* What becomes of one row or one head, in one place for decoding steps and training passes.

   In: contiguous memory. Out: the same numbers as torch's own operations up to rounding; all arithmetic is in float.
   Refuses to know how many rows there are and where they lie. */

#pragma once

#include "lanes.h"

static inline float inverse_root(const real *x, long width, float eps) {
    vec squares = {0};
    for (long i = 0; i < width; i += LANES) { vec v = load(x + i); squares += v * v; }
    return 1.0f / __builtin_sqrtf(total(squares) / width + eps);
}

/* hat = x / sqrt(mean(x^2) + eps), y = hat * factor; hat is rounded first if `round`. Returns that root's inverse. */
static inline float norm_row(const real *x, const float *factor, real *y, long width, float eps, int round) {
    float root = inverse_root(x, width, eps);
    for (long i = 0; i < width; i += LANES) {
        vec hat = load(x + i) * root;
        store(y + i, (round ? rounded(hat) : hat) * load_float(factor + i));
    }
    return root;
}

/* y = silu(g) * u, silu rounded first. */
static inline void gate_row(const real *g, const real *u, real *y, long width) {
    for (long i = 0; i < width; i += LANES) {
        vec v = load(g + i);
        store(y + i, rounded(v / (1.0f + exponential(-v))) * load(u + i));
    }
}

/* y = head cosines + swap(head) sines with the halves of head = x / sqrt(mean(x^2) + eps) * factor swapped; the sines of
   the first half are negative. Without a factor head is x. Returns the root's inverse, or 1. */
static inline float turn_head(const real *x, const float *factor, const float *cosines, const float *sines, float *y,
                              long dim, float eps) {
    float head[dim], root = factor ? inverse_root(x, dim, eps) : 1.0f;
    long half = dim / 2;
    for (long i = 0; i < dim; i += LANES) {
        vec v = load(x + i);
        store_float(head + i, factor ? v * root * load_float(factor + i) : v);
    }
    for (long i = 0; i < half; i++) {
        y[i] = head[i] * cosines[i] + head[i + half] * sines[i];
        y[i + half] = head[i + half] * cosines[i + half] + head[i] * sines[i + half];
    }
    return root;
}
