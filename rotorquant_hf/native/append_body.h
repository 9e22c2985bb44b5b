/* Coding vectors into the rows of a store.

   As `RotorQuantMSE.code` and `RotorQuantProd.encode`, the references, TOKENS vectors of a head at
   a time and in columns. The operations are theirs, in the order in which they have them, so that
   codes differ only where a coordinate lies on the boundary of two, to the rounding of sums.
*/
#include <stdlib.h>

#include "append.h"
#include "columns.h"
#include "nearest.h"
#include "sweep.h"
#include "team.h"

/* What is worked on at a time: columns (d, TOKENS), and numbers of each of the vectors. */
typedef struct {
    float *u, *y, *c;                                /* u is overwritten once it is rotated */
    float *along, *nearest_along, *swept_along;      /* F' of y, and of its centroids */
    uint8_t *codes, *swept;                          /* (d, TOKENS), then signs */
    float *peak, *norm, *scale;
} Scratch;

typedef struct {
    const Coding *coding;
    CodeBook book;
    int64_t tiles;
    int64_t scratch_floats;
    float *scratch, *feedback;
    int too_large;
} Work;

enum { ALONG = RANK * TOKENS };

static Scratch scratch_at(float *memory, const Coding *coding)
{
    int64_t columns = coding->d * TOKENS;
    int64_t codes = coding->d > coding->projections ? coding->d : coding->projections;
    Scratch s = {.u = memory, .y = memory + columns, .c = memory + 2 * columns};
    s.along = memory + 3 * columns;
    s.nearest_along = s.along + ALONG;
    s.swept_along = s.nearest_along + ALONG;
    s.peak = s.swept_along + ALONG;
    s.norm = s.peak + TOKENS;
    s.scale = s.norm + TOKENS;
    s.codes = (uint8_t *)(s.scale + TOKENS);
    s.swept = s.codes + codes * TOKENS;
    return s;
}

static int64_t scratch_floats(const Coding *coding)
{
    int64_t codes = coding->d > coding->projections ? coding->d : coding->projections;
    int64_t floats = 3 * coding->d * TOKENS + 3 * ALONG + 3 * TOKENS;
    floats += (codes + coding->d) * TOKENS / 4;
    return (floats + 15) / 16 * 16;
}

static Feedback feedback_of(const Work *work, int64_t b, int64_t h)
{
    const Coding *coding = work->coding;
    float *memory = work->feedback + (b * coding->heads + h) * feedback_floats(coding->d);
    return feedback_at(memory, coding->d);
}

static void prepare(void *data, int64_t item, int64_t thread)
{
    const Work *work = data;
    int64_t b = item / work->coding->heads, h = item % work->coding->heads;
    (void)thread;
    make_feedback(feedback_of(work, b, h), work->coding, b, h);
}

/* u = (x - mean) / scale of the channels, over each vector's largest magnitude, over its norm. */
static void normalise(Scratch *s, const Coding *coding, int64_t b, int64_t h, int64_t first,
                      int count)
{
    const float *scale = (const float *)place(&coding->channels, b, h, 0);
    const float *mean = coding->mean.data ? (const float *)place(&coding->mean, b, h, 0) : 0;
    take_columns(s->u, &coding->x, coding->d, b, h, first, count);
    for (int t = 0; t < TOKENS; t += WIDTH) {
        Floats peak = {0}, square = {0};
        for (int64_t i = 0; i < coding->d; i++) {
            float *at = s->u + i * TOKENS + t;
            Floats centred = load(at) - all(mean ? mean[i] : 0);
            Floats u = centred / all(scale[i * coding->channels.stride_t]);
            store(at, u);
            peak = larger(larger(u, -u), peak);
        }
        peak = choose(peak > all(0), peak, all(1));
        for (int64_t i = 0; i < coding->d; i++) {
            float *at = s->u + i * TOKENS + t;
            Floats u = load(at) / peak;
            store(at, u);
            square += u * u;
        }
        store(s->peak + t, peak);
        store(s->norm + t, square);
    }
    for (int t = 0; t < TOKENS; t++)
        s->norm[t] = sqrtf(s->norm[t]);
    for (int t = 0; t < TOKENS; t += WIDTH) {
        Floats norm = larger(load(s->norm + t), all(1)); /* 1 or more unless it is 0 */
        for (int64_t i = 0; i < coding->d; i++)
            store(s->u + i * TOKENS + t, load(s->u + i * TOKENS + t) / norm);
    }
}

/* Codes and centroids, each the nearest; `bits` is a constant. */
INLINE void round_columns(int bits, const CodeBook *book, const float *y, int64_t d, uint8_t *codes,
                          float *c)
{
    for (int64_t i = 0; i < d * TOKENS; i += WIDTH) {
        Ints code = nearest(book, bits, load(y + i));
        store_codes(codes + i, code);
        store(c + i, look_up(&book->table, bits, code));
    }
}

INLINE Floats root(Floats x)
{
    for (int i = 0; i < WIDTH; i++)
        x[i] = sqrtf(x[i]);
    return x;
}

/* The scale of WIDTH unit vectors, of y' c and c' c. */
INLINE Floats scale_of(int64_t rule, Floats yc, Floats cc)
{
    if (rule == NORM)
        return all(1);
    if (rule == MATCHED)
        return all(1) / root(cc);
    if (rule == LEAST_SQUARES)
        return yc / cc;
    return all(1) / larger(yc, all(0x1p-126f)); /* positive but for zeros */
}

/* The scales of WIDTH vectors y with centroids c. With F' of both also the errors under the
   Hessian, by which least squares are then weighted. */
INLINE Floats weigh(int64_t rule, int64_t d, const float *y, const float *c, float level,
                    const float *y_along, const float *c_along, Floats *error)
{
    Floats yc = {0}, cc = {0}, ee = {0};
    for (int64_t i = 0; i < d * TOKENS; i += TOKENS) {
        yc += load(y + i) * load(c + i);
        cc += load(c + i) * load(c + i);
    }
    if (!y_along)
        return scale_of(rule, yc, cc);
    if (rule == LEAST_SQUARES) {
        yc *= all(level), cc *= all(level);
        for (int i = 0; i < ALONG; i += TOKENS) {
            yc += load(y_along + i) * load(c_along + i);
            cc += load(c_along + i) * load(c_along + i);
        }
    }
    Floats scale = scale_of(rule, yc, cc);
    if (rule == LEAST_SQUARES) /* negative, for a vector that few queries see */
        scale = choose(scale < all(0), all(0), scale);
    for (int64_t i = 0; i < d * TOKENS; i += TOKENS) {
        Floats e = load(y + i) - scale * load(c + i);
        ee += e * e;
    }
    ee *= all(level);
    for (int i = 0; i < ALONG; i += TOKENS) {
        Floats e = load(y_along + i) - scale * load(c_along + i);
        ee += e * e;
    }
    *error = ee;
    return scale;
}

/* Codes, centroids and scales of unit vectors; `bits` is a constant. With a Hessian they are those
   of the sweep, where these do better than the nearest. */
INLINE void quantise(int bits, const Work *work, Scratch *s, int64_t b, int64_t h)
{
    const Coding *coding = work->coding;
    int64_t d = coding->d, rule = coding->rule;
    if (!coding->factor.data) {
        round_columns(bits, &work->book, s->y, d, s->codes, s->c);
        for (int t = 0; t < TOKENS; t += WIDTH)
            store(s->scale + t, weigh(rule, d, s->y + t, s->c + t, 0, 0, 0, 0));
        return;
    }
    Feedback feedback = feedback_of(work, b, h);
    float *swept = s->u;
    round_columns(bits, &work->book, s->y, d, s->codes, s->c);
    multiply(s->along, RANK, feedback.factor, 1, RANK, s->y, d);
    multiply(s->nearest_along, RANK, feedback.factor, 1, RANK, s->c, d);
    sweep(bits, &work->book, &feedback, s->y, d, s->swept, swept, s->swept_along);
    for (int i = 0; i < ALONG; i += WIDTH)
        store(s->swept_along + i, load(s->along + i) - load(s->swept_along + i));
    for (int t = 0; t < TOKENS; t += WIDTH) {
        Floats error = {0}, swept_error = {0};
        Floats scale = weigh(rule, d, s->y + t, s->c + t, *feedback.level, s->along + t,
                             s->nearest_along + t, &error);
        Floats swept_scale = weigh(rule, d, s->y + t, swept + t, *feedback.level, s->along + t,
                                   s->swept_along + t, &swept_error);
        Ints better = swept_error < error;
        store(s->scale + t, choose(better, swept_scale, scale));
        for (int64_t i = t; i < d * TOKENS; i += TOKENS) {
            store(s->c + i, choose(better, load(swept + i), load(s->c + i)));
            Ints code = (widened(s->swept + i) & better) | (widened(s->codes + i) & ~better);
            store_codes(s->codes + i, code);
        }
    }
}

/* Scales in float16; 0 if one is too large for that, or NaN. */
static int store_scales(Scratch *s, const Coding *coding, int64_t b, int64_t h, int64_t first,
                        int count)
{
    int fits = 1;
    for (int t = 0; t < TOKENS; t += WIDTH)
        store(s->scale + t, load(s->norm + t) * load(s->scale + t) * load(s->peak + t));
    for (int t = 0; t < count; t++) {
        uint16_t half = to_half(s->scale[t]);
        fits &= s->scale[t] <= 65504;
        memcpy(row_of(&coding->scale, b, h, first + t), &half, 2);
        s->scale[t] = from_half(half);
    }
    return fits;
}

/* The norm of what is left of each vector, and the signs of its projections. */
static void project(Scratch *s, const Coding *coding, int64_t b, int64_t h, int64_t first,
                    int count)
{
    int64_t d = coding->d, m = coding->projections;
    float norms[TOKENS], *dots = s->y; /* y is not needed any more */
    for (int t = 0; t < TOKENS; t += WIDTH) {
        Floats scale = load(s->scale + t), peak = load(s->peak + t), norm = load(s->norm + t);
        Floats square = {0};
        for (int64_t i = t; i < d * TOKENS; i += TOKENS) {
            Floats r = load(s->y + i) * norm - load(s->c + i) * scale / peak;
            store(s->u + i, r);
            square += r * r;
        }
        store(norms + t, square);
    }
    for (int64_t r = 0; r < m; r += d) {
        int64_t rows = m - r < d ? m - r : d;
        multiply(dots, rows, coding->projection + r * d, d, 1, s->u, d);
        for (int64_t i = 0; i < rows * TOKENS; i++)
            s->codes[r * TOKENS + i] = dots[i] >= 0;
    }
    pack(row_of(&coding->signs, b, h, first), coding->signs.stride_t, s->codes, 1, m, count);
    for (int t = 0; t < count; t++) {
        float norm = sqrtf(norms[t]) * s->peak[t];
        uint16_t half = to_half(norm > 65504 ? 65504 : norm);
        memcpy(row_of(&coding->residual_norm, b, h, first + t), &half, 2);
    }
}

static void code_tile(void *data, int64_t item, int64_t thread)
{
    Work *work = data;
    const Coding *coding = work->coding;
    int64_t bh = item / work->tiles, b = bh / coding->heads, h = bh % coding->heads;
    int64_t first = item % work->tiles * TOKENS, left = coding->tokens - first, d = coding->d;
    int count = (int)(left < TOKENS ? left : TOKENS);
    Scratch s = scratch_at(work->scratch + thread * work->scratch_floats, coding);
    normalise(&s, coding, b, h, first, count);
    multiply(s.y, d, coding->rotation, d, 1, s.u, d);
    switch (coding->bits) {
#define CASE(BITS) \
    case BITS: \
        quantise(BITS, work, &s, b, h); \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
    }
    if (!store_scales(&s, coding, b, h, first, count))
        __atomic_store_n(&work->too_large, 1, __ATOMIC_RELAXED);
    pack(row_of(&coding->codes, b, h, first), coding->codes.stride_t, s.codes, (int)coding->bits, d,
         count);
    if (coding->projections)
        project(&s, coding, b, h, first, count);
}

int APPEND(const Coding *coding, Team team, int threads)
{
    int64_t pairs = coding->batch * coding->heads;
    Work work = {.coding = coding};
    if (pairs * coding->tokens == 0)
        return 0;
    work.book = code_book(coding->boundaries, coding->centroids, (int)coding->bits);
    work.tiles = (coding->tokens + TOKENS - 1) / TOKENS;
    work.scratch_floats = scratch_floats(coding);
    int64_t floats = (threads > 1 ? threads : 1) * work.scratch_floats;
    int64_t feedback = coding->factor.data ? pairs * feedback_floats(coding->d) : 0;
    work.scratch = aligned_alloc(64, ((floats + feedback) * sizeof(float) + 63) / 64 * 64);
    if (!work.scratch)
        return NO_MEMORY;
    work.feedback = work.scratch + floats;
    if (feedback)
        share(prepare, &work, pairs, team, threads);
    share(code_tile, &work, pairs * work.tiles, team, threads);
    free(work.scratch);
    return work.too_large ? TOO_LARGE : 0;
}
