/* Sixteen numbers at a time. `real` is the dtype of a backbone, float or (with -DHALF) bfloat16; all arithmetic is in
   float. In: contiguous memory. Refuses to know what is computed. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));

static inline vec load_float(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }
static inline void store_float(float *p, vec v) { memcpy(p, &v, sizeof v); }

#ifdef HALF /* bfloat16: the upper half of a float */
typedef uint16_t real;
static inline float wide_of(real v) { union { uint32_t u; float f; } c = {(uint32_t)v << 16}; return c.f; }
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

static inline vec load(const real *p) {
#ifdef __AVX512F__ /* gcc 12 takes five instructions for the conversion below */
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#else
    halves h; memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, bits) << 16);
#endif
}
static inline void store(real *p, vec v) { /* to the nearest, ties to even; what is no number stays none */
#ifdef __AVX512BF16__
    __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &h, sizeof h);
#else
    bits b = (bits)v, odd = (b >> 16) & 1, nan = (bits)((b & 0x7fffffff) > 0x7f800000);
    b = (((b + 0x7fff + odd) >> 16) & ~nan) | (0x7fc0 & nan);
    halves h = __builtin_convertvector(b, halves);
    memcpy(p, &h, sizeof h);
#endif
}
static inline vec rounded(vec v) { real all[LANES]; store(all, v); return load(all); }
#else
typedef float real;
static inline float wide_of(real v) { return v; }
static inline vec load(const real *p) { return load_float(p); }
static inline void store(real *p, vec v) { store_float(p, v); }
static inline vec rounded(vec v) { return v; }
#endif

static inline vec choose(ints which, vec yes, vec no) { return (vec)(((ints)yes & which) | ((ints)no & ~which)); }

typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));

static inline vec4 quarter(vec v) { /* four sums that make up all */
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
    vec8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
#else
    vec8 h[2]; memcpy(h, &v, sizeof h); h[0] += h[1];
    vec4 q[2]; memcpy(q, h, sizeof q);
    return q[0] + q[1];
#endif
}

static inline float total(vec v) { vec4 b = quarter(v); return (b[0] + b[2]) + (b[1] + b[3]); }

/* The totals of four, each summed up as `total` does. */
static inline vec4 totals(const vec v[4]) {
    vec4 a = quarter(v[0]), b = quarter(v[1]), c = quarter(v[2]), d = quarter(v[3]);
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
    vec4 ab = __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
    vec4 cd = __builtin_shufflevector(c, d, 0, 1, 4, 5) + __builtin_shufflevector(c, d, 2, 3, 6, 7);
    return __builtin_shufflevector(ab, cd, 0, 2, 4, 6) + __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
#else
    return (vec4){(a[0] + a[2]) + (a[1] + a[3]), (b[0] + b[2]) + (b[1] + b[3]), (c[0] + c[2]) + (c[1] + c[3]),
                  (d[0] + d[2]) + (d[1] + d[3])};
#endif
}

/* Asks for what is read soon, and not for the cache nearest to the core, whose misses are few at a time: so memory is
   read half as fast again. */
static inline void soon(const void *p) { __builtin_prefetch(p, 0, 1); }

/* Of four streams, `stride` apart, what they come to next: each is too short for the processor to foresee it. */
static inline void ahead(const real *next, long stride) { for (int k = 0; k < 4; k++) soon(next + k * stride); }

/* Of one stream. */
static inline void stream(const float *next, long count) { for (long i = 0; i < count; i += LANES) soon(next + i); }

static inline void store4(real *p, vec4 v) {
    real all[LANES];
    vec wide = {v[0], v[1], v[2], v[3]};
    store(all, wide);
    memcpy(p, all, 4 * sizeof *all);
}

static inline vec exponential(vec x) { /* Cody and Waite's reduction; relative error below 2e-7 in [-87, 88] */
    const vec zero = {0};
    x = choose(x < -87.0f, zero - 87.0f, x); /* what is no number stays none */
    x = choose(x > 88.0f, zero + 88.0f, x);
    vec shifted = x * 1.44269504f + 12582912.0f; /* 1.5 · 2^23: the integer is in the lowest bits now */
    ints n = (ints)shifted - 0x4b400000;
    vec whole = shifted - 12582912.0f, r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f; p = p * r + 4.1665795894e-2f; p = p * r + 1.6666665459e-1f; p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)((n + 127) << 23);
}
