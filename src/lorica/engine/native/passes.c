/* What surrounds the matrix products of a training pass, forth and back: norms, gates, and the factors of few rows.

   In: memory of torch tensors. Out: the same numbers as torch's own operations up to rounding. `real` is the backbone's
   dtype, all arithmetic is in float, and factors are float. Refuses to know adapters' methods, models and Python. */

#include "rows.h"

/* Heads of one row lie side by side, `width` each; rows of x are `stride` apart, all others contiguous. root is the
   factor by which x becomes hat. */
void norm_forth(const real *x, const float *factor, real *y, float *root, long rows, long heads, long width,
                long stride, float eps, int round) {
    for (long n = 0; n < rows; n++, x += stride)
        for (long h = 0; h < heads; h++, y += width) *root++ = norm_row(x + h * width, factor, y, width, eps, round);
}

static inline void norm_row_back(const float *dy, const real *x, const float *factor, float root, real *dx, long width) {
    vec dot = {0};
    for (long i = 0; i < width; i += LANES) dot += load_float(dy + i) * load_float(factor + i) * load(x + i);
    float mean = total(dot) * root * root / width;
    for (long i = 0; i < width; i += LANES)
        store(dx + i, (load_float(dy + i) * load_float(factor + i) - load(x + i) * mean) * root);
}

/* dx from dy, x and root. dy and dx are contiguous. */
void norm_back(const real *dy, const real *x, const float *factor, const float *root, real *dx, long rows, long heads,
               long width, long stride) {
    float wide[width];
    for (long n = 0; n < rows; n++, x += stride)
        for (long h = 0; h < heads; h++, dy += width, dx += width) {
            for (long i = 0; i < width; i += LANES) store_float(wide + i, load(dy + i));
            norm_row_back(wide, x + h * width, factor, *root++, dx, width);
        }
}

/* Heads normed where there is a factor [dim], and rotated.  x [rows, heads, dim], rows `stride` apart; y [rows, heads,
   dim]; root [rows, heads], which is written where there is a factor. */
void turn_forth(const real *x, const float *factor, const float *cosines, const float *sines, real *y, float *root,
                long rows, long heads, long dim, long stride, float eps) {
    float head[dim];
    for (long n = 0; n < rows; n++, x += stride, cosines += dim, sines += dim)
        for (long h = 0; h < heads; h++, y += dim) {
            float r = turn_head(x + h * dim, factor, cosines, sines, head, dim, eps);
            if (factor) *root++ = r;
            for (long i = 0; i < dim; i += LANES) store(y + i, load_float(head + i));
        }
}

/* dx [rows, heads, dim] from dy, whose rows and heads are `row` and `head` apart. Without a factor x is not read. */
void turn_back(const real *dy, const real *x, const float *factor, const float *cosines, const float *sines,
               const float *root, real *dx, long rows, long heads, long dim, long stride, long row, long head) {
    float given[dim], turned[dim];
    long half = dim / 2;
    for (long n = 0; n < rows; n++, x += stride, dy += row, cosines += dim, sines += dim)
        for (long h = 0; h < heads; h++, dx += dim) {
            for (long i = 0; i < dim; i += LANES) store_float(given + i, load(dy + h * head + i));
            for (long i = 0; i < half; i++) {
                turned[i] = given[i] * cosines[i] + given[i + half] * sines[i + half];
                turned[i + half] = given[i + half] * cosines[i + half] + given[i] * sines[i];
            }
            if (factor) norm_row_back(turned, x + h * dim, factor, *root++, dx, dim);
            else for (long i = 0; i < dim; i += LANES) store(dx + i, load_float(turned + i));
        }
}

/* y = silu(g) * u, silu rounded first.  g and u are `stride` from row to row, y is contiguous. */
void gate_forth(const real *g, const real *u, real *y, long rows, long width, long stride) {
    for (long n = 0; n < rows; n++, g += stride, u += stride, y += width) gate_row(g, u, y, width);
}

void gate_back(const real *dy, const real *g, const real *u, real *dg, real *du, long rows, long width, long stride) {
    for (long n = 0; n < rows; n++, g += stride, u += stride, dy += width, dg += width, du += width)
        for (long i = 0; i < width; i += LANES) {
            vec v = load(g + i), d = load(dy + i), s = 1.0f / (1.0f + exponential(-v));
            store(du + i, d * v * s);
            store(dg + i, d * load(u + i) * s * (1.0f + v * (1.0f - s)));
        }
}

/* Factors of all maps of one input: A [rank, in], B [out, rank] of the columns from `first` on, and their gradients. */
typedef struct { const float *a, *b; float *da, *db; int64_t rank, first, out; float scale, unused; } term;

/* h = x A^T of all terms side by side, `ranks` in all, and y += scale h B^T.  x [rows, in], y [rows, total]. */
void factors_forth(const term *terms, const float *x, float *y, float *h, long count, long rows, long in, long total_out,
                   long ranks) {
    for (long n = 0; n < rows; n++, x += in, y += total_out, h += ranks) {
        float *own = h;
        for (const term *t = terms; t < terms + count; own += t->rank, t++) {
            for (long r = 0; r < t->rank; r++) {
                vec s = {0};
                for (long i = 0; i < in; i += LANES) s += load_float(x + i) * load_float(t->a + r * in + i);
                own[r] = total(s);
            }
            for (long o = 0; o < t->out; o++) {
                const float *b = t->b + o * t->rank;
                vec sum = {0};
                long r = 0;
                for (; r + LANES <= t->rank; r += LANES) sum += load_float(own + r) * load_float(b + r);
                float s = total(sum);
                for (; r < t->rank; r++) s += own[r] * b[r];
                y[t->first + o] += t->scale * s;
            }
        }
    }
}

/* dh = scale dy B, dB = scale dy^T h, dA = dh^T x; a gradient that nobody wants is null. */
void factors_back(const term *terms, const float *x, const float *dy, const float *h, float *dh, long count, long rows,
                  long in, long total_out, long ranks) {
    long at = 0;
    for (const term *t = terms; t < terms + count; at += t->rank, t++) {
        long rank = t->rank;
        for (long n = 0; n < rows; n++) {
            float *own = dh + n * ranks + at;
            const float *d = dy + n * total_out + t->first;
            for (long r = 0; r < rank; r++) own[r] = 0;
            for (long o = 0; o < t->out; o++) for (long r = 0; r < rank; r++) own[r] += d[o] * t->b[o * rank + r];
            for (long r = 0; r < rank; r++) own[r] *= t->scale;
        }
        if (t->db)
            for (long o = 0; o < t->out; o++) {
                float *own = t->db + o * rank;
                for (long r = 0; r < rank; r++) own[r] = 0;
                for (long n = 0; n < rows; n++) {
                    float d = dy[n * total_out + t->first + o] * t->scale;
                    for (long r = 0; r < rank; r++) own[r] += d * h[n * ranks + at + r];
                }
            }
        if (t->da)
            for (long r = 0; r < rank; r++)
                for (long i = 0; i < in; i += LANES) {
                    vec s = {0};
                    for (long n = 0; n < rows; n++) s += dh[n * ranks + at + r] * load_float(x + n * in + i);
                    store_float(t->da + r * in + i, s);
                }
    }
}

/* dx += dh A of all terms. */
void factors_input(const term *terms, const float *dh, real *dx, long count, long rows, long in, long ranks) {
    for (long n = 0; n < rows; n++, dx += in, dh += ranks)
        for (long i = 0; i < in; i += LANES) {
            vec s = load(dx + i);
            const float *own = dh;
            for (const term *t = terms; t < terms + count; own += t->rank, t++)
                for (long r = 0; r < t->rank; r++) s += own[r] * load_float(t->a + r * in + i);
            store(dx + i, s);
        }
}

/* Products of up to four rows with a weight that a cache holds: they wait for the weight alone.  W [out, in]; out is a
   multiple of four. */
#define ROWS static inline __attribute__((always_inline)) void

ROWS forth(const int rows, const real *w, const real *bias, const float *x, real *y, long in, long out, long stride) {
    for (long o = 0; o < out; o += 4, w += 4 * in) {
        vec sum[4][4] = {{{0}}}; /* of row and output */
        for (long i = 0; i < in; i += LANES) {
            vec u[4];
            for (int n = 0; n < rows; n++) u[n] = load_float(x + n * in + i);
            ahead(w + 4 * in + i, in);
            for (int k = 0; k < 4; k++) {
                vec v = load(w + k * in + i);
                for (int n = 0; n < rows; n++) sum[n][k] += u[n] * v;
            }
        }
        vec4 added = {0};
        if (bias) for (int k = 0; k < 4; k++) added[k] = wide_of(bias[o + k]);
        for (int n = 0; n < rows; n++) store4(y + n * stride + o, totals(sum[n]) + added);
    }
}

/* y = x W^T + b.  x [rows, in] in float, y [rows] of `stride`. */
void linear_forth(const real *w, const real *bias, const float *x, real *y, long rows, long in, long out, long stride) {
    switch (rows) {
        case 1: forth(1, w, bias, x, y, in, out, stride); break;
        case 2: forth(2, w, bias, x, y, in, out, stride); break;
        case 3: forth(3, w, bias, x, y, in, out, stride); break;
        case 4: forth(4, w, bias, x, y, in, out, stride); break;
    }
}

ROWS back(const int rows, const real *w, const real *dy, float *dx, long in, long out, long stride) {
    for (long o = 0; o < out; o += 4, w += 4 * in) {
        float d[4][4];
        for (int k = 0; k < 4; k++) for (int n = 0; n < rows; n++) d[k][n] = wide_of(dy[n * stride + o + k]);
        for (long i = 0; i < in; i += LANES) {
            vec v[4];
            ahead(w + 4 * in + i, in);
            for (int k = 0; k < 4; k++) v[k] = load(w + k * in + i);
            for (int n = 0; n < rows; n++) {
                float *own = dx + n * in + i;
                store_float(own, load_float(own) + d[0][n] * v[0] + d[1][n] * v[1] + d[2][n] * v[2] + d[3][n] * v[3]);
            }
        }
    }
}

/* dx += dy W.  dx [rows, in] in float, dy [rows] of `stride`. */
void linear_back(const real *w, const real *dy, float *dx, long rows, long in, long out, long stride) {
    switch (rows) {
        case 1: back(1, w, dy, dx, in, out, stride); break;
        case 2: back(2, w, dy, dx, in, out, stride); break;
        case 3: back(3, w, dy, dx, in, out, stride); break;
        case 4: back(4, w, dy, dx, in, out, stride); break;
    }
}
