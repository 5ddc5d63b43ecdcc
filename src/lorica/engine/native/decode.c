/* What surrounds the matrix products of one decoding step, for rows of one token each.

   In: contiguous memory of torch tensors. Out: the same numbers as torch's own operations up to rounding, in one pass
   over memory each. `real` is the backbone's dtype; all arithmetic is in float. A row's numbers never depend on another
   row's. Refuses to know adapters' methods, models and Python; knows neither threads nor allocation. */

#include "rows.h"

/* sum = x + branch where there is one; y = sum / sqrt(mean(sum^2) + eps) * factor.  [rows, width] */
void norm(const real *x, const real *branch, const float *factor, real *sum, real *y, long rows, long width, float eps) {
    for (long n = 0; n < rows; n++, x += width, y += width) {
        if (!branch) { norm_row(x, factor, y, width, eps, 0); continue; }
        for (long i = 0; i < width; i += LANES) store(sum + i, load(x + i) + load(branch + i));
        norm_row(sum, factor, y, width, eps, 0);
        sum += width; branch += width;
    }
}

/* y = silu(x[:, :width]) * x[:, width:].  x [rows, 2 width] */
void gate(const real *x, real *y, long rows, long width) {
    for (long n = 0; n < rows; n++, x += 2 * width, y += width) gate_row(x, x + width, y, width);
}

/* Heads normed where there is a factor [queries + groups, dim], and rotated.
   x [rows, stride] holds queries, keys, values side by side; q [rows, queries, dim], k [rows, groups, dim]. */
void turn(const real *x, const float *factor, const float *cosines, const float *sines, float *q, float *k,
          long rows, long queries, long groups, long dim, long stride, float eps) {
    for (long n = 0; n < rows; n++, x += stride, cosines += dim, sines += dim)
        for (long h = 0; h < queries + groups; h++) {
            float *y = h < queries ? q : k;
            if (h < queries) q += dim; else k += dim;
            turn_head(x + h * dim, factor ? factor + h * dim : 0, cosines, sines, y, dim, eps);
        }
}

/* Scores of `heads` queries at the slots [from, to) of one key head, written at `scores + slot`, `slots` apart. */
static void score(const float *q, const float *keys, const float *values, float *scores, long heads, long dim, long slots,
                  long from, long to, float scale) {
    long s = from;
    for (; s + 4 <= to; s += 4)
        for (long h = 0; h < heads; h++) {
            const float *k = keys + s * dim;
            vec sum[4] = {{0}};
            for (long i = 0; i < dim; i += LANES) {
                vec v = load_float(q + h * dim + i);
                for (int j = 0; j < 4; j++) sum[j] += v * load_float(k + j * dim + i);
            }
            if (!h) stream(values + s * dim, 4 * dim);
            vec4 all = totals(sum) * scale;
            memcpy(scores + h * slots + s, &all, sizeof all);
        }
    for (; s < to; s++)
        for (long h = 0; h < heads; h++) {
            vec a = {0};
            for (long i = 0; i < dim; i += LANES) a += load_float(q + h * dim + i) * load_float(keys + s * dim + i);
            scores[h * slots + s] = total(a) * scale;
        }
}

/* Attention of one query of each row over what its row has kept, [first, slot] without what a window hides: with a
   window a key is seen below `always`, and from slot - window + 1 on.
   q [rows, heads, dim], k [rows, groups, dim], v [rows] of `v_stride`, keys and values [rows, groups, capacity, dim],
   y [rows, heads, dim], scratch [heads / groups, capacity]. Writes the newest key and value at `slot`. */
void attend(const float *q, const float *k, const real *v, float *keys, float *values, real *y, float *scratch,
            const int64_t *first, const int64_t *always, long rows, long heads, long groups, long dim, long v_stride,
            long capacity, long slot, long window, float scale) {
    long own = heads / groups, stop = slot + 1;
    for (long n = 0; n < rows; n++, v += v_stride)
        for (long g = 0; g < groups; g++, q += own * dim, k += dim, keys += capacity * dim, values += capacity * dim) {
            memcpy(keys + slot * dim, k, dim * sizeof *k);
            for (long i = 0; i < dim; i += LANES) store_float(values + slot * dim + i, load(v + g * dim + i));
            long begin[2] = {first[n], stop}, end[2] = {stop, stop};
            if (window && stop - window > first[n]) {
                end[0] = always[n] > first[n] ? always[n] : first[n];
                begin[1] = stop - window > end[0] ? stop - window : end[0];
            }
            for (int part = 0; part < 2; part++)
                score(q, keys, values, scratch, own, dim, capacity, begin[part], end[part], scale);
            for (long h = 0; h < own; h++, y += dim) {
                float *weight = scratch + h * capacity, most = -__builtin_inff(), sum = 0;
                for (int part = 0; part < 2; part++)
                    for (long s = begin[part]; s < end[part]; s++) most = weight[s] <= most ? most : weight[s];
                float acc[dim];
                memset(acc, 0, sizeof acc);
                for (int part = 0; part < 2; part++) {
                    long s = begin[part];
                    for (; s + LANES <= end[part]; s += LANES) {
                        vec w = exponential(load_float(weight + s) - most);
                        store_float(weight + s, w);
                        sum += total(w);
                    }
                    for (; s < end[part]; s++) {
                        vec w = exponential((vec){weight[s] - most});
                        weight[s] = w[0];
                        sum += w[0];
                    }
                    for (s = begin[part]; s + 4 <= end[part]; s += 4) {
                        if (!h) stream(keys + (capacity + s) * dim, 4 * dim);
                        for (long i = 0; i < dim; i += LANES) {
                            const float *u = values + s * dim + i;
                            store_float(acc + i, load_float(acc + i) + weight[s] * load_float(u)
                                + weight[s + 1] * load_float(u + dim) + weight[s + 2] * load_float(u + 2 * dim)
                                + weight[s + 3] * load_float(u + 3 * dim));
                        }
                    }
                    for (; s < end[part]; s++)
                        for (long i = 0; i < dim; i += LANES)
                            store_float(acc + i, load_float(acc + i) + weight[s] * load_float(values + s * dim + i));
                }
                for (long i = 0; i < dim; i += LANES) store(y + i, load_float(acc + i) / sum);
            }
        }
}

/* The factors of one row at one map; a null A adapts nothing. A [rank, in], B [rank, out]. */
typedef struct { const real *a, *b; int64_t rank; } factors;

/* Rows that read the same factors together. */
#define BUNCH 4

/* hidden = A x of R rows, `in` and `rank` apart; rows of B, `size` long, are read next. */
static inline __attribute__((always_inline)) void inward(const factors *own, const float *x, float *hidden, long in,
                                                         long size, const int R) {
    long rank = own->rank, r = 0;
    for (; r + 4 <= rank; r += 4) {
        const real *a = own->a + r * in, *next = r + 8 <= rank ? a + 4 * in : own->b;
        long apart = r + 8 <= rank ? in : size;
        vec sum[BUNCH][4] = {{{0}}};
        for (long i = 0; i < in; i += LANES) {
            ahead(next + i, apart);
            for (int k = 0; k < 4; k++) {
                vec v = load(a + k * in + i);
                for (int n = 0; n < R; n++) sum[n][k] += load_float(x + n * in + i) * v;
            }
        }
        for (int n = 0; n < R; n++) {
            vec4 all = totals(sum[n]);
            memcpy(hidden + n * rank + r, &all, sizeof all);
        }
    }
    for (; r < rank; r++)
        for (int n = 0; n < R; n++) {
            vec s = {0};
            for (long i = 0; i < in; i += LANES) s += load_float(x + n * in + i) * load(own->a + r * in + i);
            hidden[n * rank + r] = total(s);
        }
}

/* y += hidden B of R rows, `stride` apart; rows of `after`, `in` long, are read next. */
static inline __attribute__((always_inline)) void outward(const factors *own, const float *hidden, float *y,
                                                          const real *after, long in, long size, long stride, const int R) {
    long rank = own->rank, r = 0;
    for (; r + 4 <= rank; r += 4) {
        const real *b = own->b + r * size, *next = r + 8 <= rank ? b + 4 * size : after;
        long apart = r + 8 <= rank ? size : in;
        for (long o = 0; o < size; o += LANES) {
            vec v[4];
            ahead(next + o, apart);
            for (int k = 0; k < 4; k++) v[k] = load(b + k * size + o);
            for (int n = 0; n < R; n++) {
                const float *h = hidden + n * rank + r;
                float *at = y + n * stride + o;
                store_float(at, load_float(at) + h[0] * v[0] + h[1] * v[1] + h[2] * v[2] + h[3] * v[3]);
            }
        }
    }
    for (; r < rank; r++)
        for (int n = 0; n < R; n++)
            for (long o = 0; o < size; o += LANES) {
                float *at = y + n * stride + o;
                store_float(at, load_float(at) + hidden[n * rank + r] * load(own->b + r * size + o));
            }
}

/* Numbers in float: themselves, or copies at `wide`. Copies are written back by `narrowed`. */
#ifdef HALF
static inline float *widened(const real *x, float *wide, long count) {
    for (long i = 0; i < count; i += LANES) store_float(wide + i, load(x + i));
    return wide;
}
static inline void narrowed(const float *wide, real *y, long count) {
    for (long i = 0; i < count; i += LANES) store(y + i, load_float(wide + i));
}
#else
static inline float *widened(const real *x, float *wide, long count) { return (float *)x; }
static inline void narrowed(const float *wide, real *y, long count) {}
#endif

/* How many rows, one or BUNCH, have the factors of the first. */
static inline long alike(const factors *table, long rows, long maps) {
    if (rows < BUNCH) return 1;
    for (int n = 1; n < BUNCH; n++)
        if (memcmp(table, table + n * maps, maps * sizeof *table)) return 1;
    return BUNCH;
}

/* y[n] += x[n] A^T B at every map, side by side.  x [rows, in], y [rows, sum of sizes], table [rows, maps],
   hidden [BUNCH largest rank], wide [BUNCH (in + sum of sizes)] */
void low_rank(const factors *table, const real *x, real *y, float *hidden, float *wide, const int64_t *sizes,
              long rows, long in, long maps) {
    long all = 0, count;
    for (long m = 0; m < maps; m++) all += sizes[m];
    for (long n = 0; n < rows; n += count, table += count * maps, x += count * in, y += count * all) {
        count = alike(table, rows - n, maps);
        const float *row = widened(x, wide, count * in);
        float *out = widened(y, wide + BUNCH * in, count * all), *own = out;
        for (long m = 0; m < maps; own += sizes[m], m++) {
            const factors *f = table + m;
            if (!f->rank) continue;
            const real *after = n + count == rows && m + 1 == maps ? f->b : m + 1 == maps ? table[count * maps].a : f[1].a;
            if (count == 1) {
                inward(f, row, hidden, in, sizes[m], 1);
                outward(f, hidden, own, after, in, sizes[m], all, 1);
            } else {
                inward(f, row, hidden, in, sizes[m], BUNCH);
                outward(f, hidden, own, after, in, sizes[m], all, BUNCH);
            }
        }
        narrowed(out, y, count * all);
    }
}

/* b [out, rank] times scale as [rank, out], which `low_rank` reads. */
void transpose(const float *b, real *y, long rank, long out, float scale) {
    for (long o = 0; o < out; o += LANES, b += LANES * rank)
        for (long r = 0; r < rank; r++) {
            vec v;
            for (int k = 0; k < LANES; k++) v[k] = b[k * rank + r];
            store(y + r * out + o, v * scale);
        }
}

#define BLOCK 256

/* exp(slope (l - most)) of one block of logits; returns their sum. */
static double exponentials(const real *logits, float *out, long count, float most, float slope) {
    vec sum = {0};
    long i = 0;
    for (; i + LANES <= count; i += LANES) {
        vec e = exponential((load(logits + i) - most) * slope);
        store_float(out + i, e);
        sum += e;
    }
    double all = total(sum);
    for (; i < count; i++) {
        out[i] = exponential((vec){(wide_of(logits[i]) - most) * slope})[0];
        all += out[i];
    }
    return all;
}

static float largest(const real *logits, long count) {
    float most = -__builtin_inff(), lanes[LANES];
    vec m = (vec){0} + most;
    long i = 0;
    for (; i + LANES <= count; i += LANES) { vec v = load(logits + i); m = choose(v > m, v, m); }
    store_float(lanes, m);
    for (int k = 0; k < LANES; k++) most = lanes[k] > most ? lanes[k] : most;
    for (; i < count; i++) most = wide_of(logits[i]) > most ? wide_of(logits[i]) : most;
    return most;
}

/* The next token of each row, and its log-probability without heat: the likeliest where the row's heat is 0, else by
   the inverse of the heated distribution at the row's uniform number. Where a logit is no number, no log-probability
   is. mass [vocabulary / BLOCK, rounded up] */
void draw(const real *logits, const float *heat, const float *uniform, int64_t *token, float *logprob, double *mass,
          long rows, long vocabulary) {
    for (long n = 0; n < rows; n++, logits += vocabulary) {
        double all = 0, heated = 0;
        float most = largest(logits, vocabulary), own[BLOCK];
        float slope = heat[n] > 1e-30f ? 1.0f / heat[n] : 1e30f;
        long best = 0;
        for (long v = 0, k = 0; v < vocabulary; v += BLOCK, k++) {
            long count = vocabulary - v < BLOCK ? vocabulary - v : BLOCK;
            mass[k] = exponentials(logits + v, own, count, most, 1.0f);
            all += mass[k];
            if (heat[n] != 0 && slope != 1.0f) mass[k] = exponentials(logits + v, own, count, most, slope);
            heated += mass[k];
        }
        if (heat[n] == 0) {
            while (best + 1 < vocabulary && wide_of(logits[best]) != most) best++;
        } else {
            double left = uniform[n] * heated;
            long v = 0, k = 0;
            for (; v + BLOCK < vocabulary && mass[k] <= left; v += BLOCK, k++) left -= mass[k];
            long count = vocabulary - v < BLOCK ? vocabulary - v : BLOCK;
            exponentials(logits + v, own, count, most, slope);
            for (long i = 0; i < count; i++) {
                if (own[i] > 0) best = v + i; /* the limit, should rounding leave more than there is */
                if ((left -= own[i]) < 0) break;
            }
        }
        token[n] = best;
        logprob[n] = wide_of(logits[best]) - most - logf((float)all);
    }
}
