/* Whole decoding steps in one call: adapted maps, layers made of those and of what decode.c has, tokens drawn from them.

   In: contiguous memory of torch tensors, and where each part of a trunk lies, in float alone. Out: final hidden states of
   rows of one token each, or the tokens that follow. A row's numbers never depend on another row's, nor on how many there
   are. Refuses to know modules, adapters' methods and Python; knows neither threads nor allocation. */

#include "rows.h"
#pragma GCC visibility push(hidden) /* ours, whatever else in the process has these names */
#include "decode.c"
#pragma GCC visibility pop

#define PANEL (2 * LANES)
#ifdef __AVX512F__
#define TILE 12 /* rows whose sums of one panel stay in registers */
#else
#define TILE 3
#endif

/* Maps of one input side by side. `weight`: panels [out / PANEL, in, PANEL]; `bias` [out] and `table` [rows, maps] may
   be null. */
typedef struct {
    const float *weight, *bias;
    const factors *table;
    const int64_t *sizes;
    int64_t in, out, maps, rank;
} linear;

typedef struct {
    linear qkv, out, both, down;
    const float *norm, *after, *turn;
    float *keys, *values; /* [places, groups, capacity, dim] */
    const int64_t *first, *always; /* of each place, as `attend` reads them */
    int64_t window;
    float eps, after_eps, turn_eps, scale;
} layer;

typedef struct {
    const layer *layers;
    const float *norm;
    int64_t count, width, heads, groups, dim, capacity;
    float eps;
} trunk;

/* What is around a trunk where tokens follow tokens: embedding [vocabulary, width], signed cosines and sines of every
   position [positions, dim]. */
typedef struct {
    const trunk *trunk;
    const float *embedding, *cosines, *sines;
    linear head;
} sampler;

/* One panel of y for R rows. */
static inline __attribute__((always_inline)) void tile(const float *x, const float *w, const float *bias, float *y,
                                                       long in, long out, const int R) {
    vec a[R], b[R];
    for (int r = 0; r < R; r++) {
        a[r] = bias ? load_float(bias) : (vec){0};
        b[r] = bias ? load_float(bias + LANES) : (vec){0};
    }
    for (long i = 0; i < in; i++, w += PANEL) {
        vec u = load_float(w), v = load_float(w + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) { float s = x[r * in + i]; a[r] += u * s; b[r] += v * s; }
    }
    for (int r = 0; r < R; r++) { store_float(y + r * out, a[r]); store_float(y + r * out + LANES, b[r]); }
}

static void product(const linear *m, const float *x, float *y, long rows) {
    long in = m->in, out = m->out;
    const float *w = m->weight;
    for (long o = 0; o < out; o += PANEL, w += PANEL * in)
        for (long n = 0; n < rows; n += TILE) {
            const float *own = x + n * in, *bias = m->bias ? m->bias + o : 0;
            float *at = y + n * out + o;
            switch (rows - n < TILE ? rows - n : TILE) {
#define ROWS(r) case r: tile(own, w, bias, at, in, out, r); break;
                ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
            }
        }
}

/* weight [out, in] as panels. */
void panels(const float *weight, float *y, long out, long in) {
    for (long o = 0; o < out; o += PANEL)
        for (long i = 0; i < in; i++)
            for (long k = 0; k < PANEL; k++) *y++ = weight[(o + k) * in + i];
}

/* y = x W^T + b, and y[n] += x[n] A^T B at every map, of the rows [start, stop) of x and y; the latter not for rows
   whose place, where there are places, is below zero.  scratch [BUNCH largest rank] */
static void adapted_rows(const linear *m, const float *x, float *y, const int64_t *places, float *scratch, long start,
                         long stop) {
    long rows = stop - start, end;
    product(m, x, y, rows);
    for (long n = 0; m->table && n < rows; n = end + 1) {
        for (end = n; end < rows && (!places || places[end] >= 0); end++) {}
        low_rank(m->table + (start + n) * m->maps, x + n * m->in, y + n * m->out, scratch, 0, m->sizes, end - n, m->in,
                 m->maps);
    }
}

void adapted(const linear *m, const float *x, float *y, float *scratch, long start, long stop) {
    adapted_rows(m, x + start * m->in, y + start * m->out, 0, scratch, start, stop);
}

/* Floats of scratch that `walk` needs for so many rows. */
long walk_scratch(const trunk *t, long rows) {
    long most = 0, low = 0, dim = t->dim, own = t->heads / t->groups;
    for (const layer *l = t->layers; l < t->layers + t->count; l++) {
        const linear *all[4] = {&l->qkv, &l->out, &l->both, &l->down};
        long wide = l->qkv.out > l->both.out + l->down.in ? l->qkv.out : l->both.out + l->down.in;
        most = wide > most ? wide : most;
        for (int k = 0; k < 4; k++) low = BUNCH * all[k]->rank > low ? BUNCH * all[k]->rank : low;
    }
    return rows * (most + t->width + (2 * t->heads + t->groups) * dim) + own * t->capacity + low;
}

/* y = the trunk's last norm of x [rows, width], embeddings that are overwritten. Cosines and sines [rows, dim]; `places`
   of rows in the memory of keys, where they are below zero nothing of a row is wanted. The first row is the maps' row
   `start`. scratch: `walk_scratch` for as many rows. */
static void layers(const trunk *t, float *x, const float *cosines, const float *sines, const int64_t *places, float *y,
                   float *scratch, long start, long rows, long slot) {
    long stop = start + rows, width = t->width, heads = t->heads, groups = t->groups, dim = t->dim;
    float *branch = scratch, *q = branch + rows * width, *k = q + rows * heads * dim, *mixed = k + rows * groups * dim;
    float *scores = mixed + rows * heads * dim, *wide = scores + heads / groups * t->capacity;
    const layer *l = t->layers, *end = l + t->count;
    norm(x, 0, t->count ? l->norm : t->norm, 0, y, rows, width, t->count ? l->eps : t->eps);
    for (; l < end; l++) {
        long own = l->qkv.out, kept = groups * t->capacity * dim;
        float *low = wide + rows * own;
        adapted_rows(&l->qkv, y, wide, places, low, start, stop);
        turn(wide, l->turn, cosines, sines, q, k, rows, heads, groups, dim, own, l->turn_eps);
        for (long n = 0; n < rows; n++) {
            float *out = mixed + n * heads * dim;
            long p = places[n];
            if (p < 0) { memset(out, 0, heads * dim * sizeof *out); continue; }
            attend(q + n * heads * dim, k + n * groups * dim, wide + n * own + (heads + groups) * dim,
                   l->keys + p * kept, l->values + p * kept, out, scores, l->first + p, l->always + p, 1, heads,
                   groups, dim, own, t->capacity, slot, l->window, l->scale);
        }
        adapted_rows(&l->out, mixed, branch, places, low, start, stop);
        norm(x, branch, l->after, x, y, rows, width, l->after_eps);
        float *gated = wide + rows * l->both.out;
        low = gated + rows * l->down.in;
        adapted_rows(&l->both, y, wide, places, low, start, stop);
        gate(wide, gated, rows, l->down.in);
        adapted_rows(&l->down, gated, branch, places, low, start, stop);
        int last = l + 1 == end;
        norm(x, branch, last ? t->norm : l[1].norm, x, y, rows, width, last ? t->eps : l[1].eps);
    }
}

/* The same of the rows [start, stop). */
void walk(const trunk *t, float *x, const float *cosines, const float *sines, const int64_t *places, float *y,
          float *scratch, long start, long stop, long slot) {
    long in = start * t->width, turn = start * t->dim;
    layers(t, x + in, cosines + turn, sines + turn, places + start, y + in, scratch, start, stop - start, slot);
}

/* Floats of scratch that `sample` needs for so many rows. */
long sample_scratch(const sampler *s, long rows) {
    long own = walk_scratch(s->trunk, rows), head = BUNCH * s->head.rank;
    return rows * (2 * s->trunk->width + 2 * s->trunk->dim + s->head.out) + (own > head ? own : head);
}

/* The next `count` tokens of the rows [start, stop) of `all`, one after the other, and their log-probabilities without
   heat: each is drawn as `draw` does, and fed where the one before it was not yet. ids, positions, places and heat [all]
   are of the first token that is fed, which is kept at `slot`; uniform, tokens and logprobs [count, all].
   scratch: `sample_scratch`; mass [vocabulary / BLOCK, rounded up] */
void sample(const sampler *s, const int64_t *ids, const int64_t *positions, const int64_t *places, const float *heat,
           const float *uniform, int64_t *tokens, float *logprobs, float *scratch, double *mass, long start, long stop,
           long all, long slot, long count) {
    const trunk *t = s->trunk;
    long rows = stop - start, width = t->width, dim = t->dim;
    float *x = scratch, *y = x + rows * width, *cosines = y + rows * width, *sines = cosines + rows * dim;
    float *logits = sines + rows * dim, *rest = logits + rows * s->head.out;
    ids += start; positions += start; places += start; heat += start; uniform += start; tokens += start; logprobs += start;
    for (long k = 0; k < count; k++, ids = tokens, tokens += all, logprobs += all, uniform += all) {
        for (long n = 0; n < rows; n++) {
            long p = positions[n] + k;
            memcpy(x + n * width, s->embedding + ids[n] * width, width * sizeof *x);
            memcpy(cosines + n * dim, s->cosines + p * dim, dim * sizeof *x);
            memcpy(sines + n * dim, s->sines + p * dim, dim * sizeof *x);
        }
        layers(t, x, cosines, sines, places, y, rest, start, rows, slot + k);
        adapted_rows(&s->head, y, logits, places, rest, start, stop);
        draw(logits, heat, uniform, tokens, logprobs, mass, rows, s->head.out);
    }
}
