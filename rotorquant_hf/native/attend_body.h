/* Attention of some queries over cached keys and values, sinks, packed and recent tokens.

   As `attention/torch_attention.py`, the reference, with three steps of its own, each shared by
   all threads: queries are folded into the coordinates of the codes, a block of them reads a share
   of the tokens tile by tile with a running softmax, and the shares are put together and unfolded.
*/
#include <stdlib.h>

#include "fused.h"
#include "team.h"

enum { BLOCK = 16, MIN_SHARE = 512, MAX_ROWS = 8192 };

typedef struct {
    const Arguments *a;
    int64_t begin, count; /* query tokens of this round */
    int64_t rows;         /* of a kv head: count of each of its query heads */
    int64_t blocks, shares, share; /* of rows; of packed tokens, and how many these are */
    int64_t folded_stride, state_stride;
    float *folded; /* (batch * heads * rows,): <q, mean>, q, and q in every term's elements */
    float *states;        /* (batch * heads * rows, shares): State */
} Round;

/* What a row knows of its share, then sums: of exact values, and of every term's elements. */
enum { PEAK, MASS, PACKED_MASS, SUMS = 16 };

INLINE int64_t terms_size(const Side *side)
{
    int64_t size = 0;
    for (int i = 0; i < side->terms; i++)
        size += padded(side->term[i].size);
    return size;
}

static void fold(void *data, int64_t item, int64_t thread)
{
    (void)thread;
    Round *round = data;
    const Arguments *a = round->a;
    const Side *keys = &a->keys;
    int64_t d = keys->d, row = item % round->rows, bh = item / round->rows;
    int64_t b = bh / a->heads, h = bh % a->heads;
    int64_t head = h * a->group + row / round->count, i = round->begin + row % round->count;
    const float *query = (const float *)place(&a->query, b, head, i);
    float *out = round->folded + item * round->folded_stride;
    float *plain = out + 16, *scaled = plain + padded(d), *elements = scaled;
    float channels[MAX_SIZE];
    double offset = 0;
    for (int64_t c = 0; c < padded(d); c++)
        plain[c] = c < d ? query[c] * (float)a->factor : 0;
    if (keys->mean.data) {
        const float *mean = (const float *)place(&keys->mean, b, h, 0);
        for (int64_t c = 0; c < d; c++)
            offset += (double)plain[c] * mean[c];
    }
    out[0] = (float)offset;
    if (!a->packed)
        return;
    const float *scale = (const float *)place(&keys->scale, b, h, 0);
    for (int64_t c = 0; c < d; c++)
        channels[c] = plain[c] * scale[c * keys->scale.stride_t];
    for (int term = 0; term < keys->terms; term++) {
        int64_t size = keys->term[term].size, j = 0;
        for (; j < size; j++) {
            const float *basis = keys->term[term].basis + j * d;
            Floats sums = {0};
            float rest = 0;
            int64_t c = 0;
            for (; c + WIDTH <= d; c += WIDTH)
                sums += load(channels + c) * load(basis + c);
            for (; c < d; c++)
                rest += channels[c] * basis[c];
            elements[j] = sum(sums) + rest;
        }
        for (; j < padded(size); j++)
            elements[j] = 0;
        elements += padded(size);
    }
}

/* Scores of a tile in place: the rules of the softmax; -inf for what is not seen. */
static void apply_rules(const Round *round, float *scores, int64_t row, int64_t b, int64_t h,
                        int64_t first, int count)
{
    const Arguments *a = round->a;
    int64_t i = round->begin + row % round->count, head = h * a->group + row / round->count;
    int64_t tokens = a->sinks + a->packed + a->recent;
    if (a->softcap > 0)
        for (int t = 0; t < count; t++)
            scores[t] = (float)a->softcap * tanhf(scores[t] / (float)a->softcap);
    if (a->mask.data) {
        const uint8_t *mask = place(&a->mask, b, head, i);
        int64_t size = element_size(a->mask.type), step = a->mask_stride_k;
        for (int t = 0; t < count; t++) {
            const uint8_t *at = mask + (first + t) * step * size;
            if (a->mask.type == BOOLEAN)
                scores[t] = *at ? scores[t] : -INFINITY;
            else
                scores[t] += number(at, FLOAT32);
        }
    }
    if (a->causal)
        for (int64_t t = 0; t < count; t++)
            if (first + t > tokens - a->n + i)
                scores[t] = -INFINITY;
    for (int t = count; t < TOKENS; t++)
        scores[t] = -INFINITY;
}

/* Whether none of the rows sees any of the tokens: half of a prompt's own are in its queries'
   future, and reading a mask takes a hundredth of the time of reading keys and values. */
static int is_hidden(const Round *round, int64_t row, int64_t rows, int64_t b, int64_t h,
                     int64_t first, int count)
{
    const Arguments *a = round->a;
    int64_t tokens = a->sinks + a->packed + a->recent, step = a->mask_stride_k;
    int masked = a->mask.data && a->mask.type == BOOLEAN;
    for (int64_t r = row; r < row + rows; r++) {
        int64_t i = round->begin + r % round->count, head = h * a->group + r / round->count;
        if (a->causal && first > tokens - a->n + i)
            continue;
        if (!masked)
            return 0;
        const uint8_t *mask = place(&a->mask, b, head, i) + first * step;
        for (int t = 0; t < count; t++)
            if (mask[t * step])
                return 0;
    }
    return 1;
}

/* Weights exp(score - peak) of a row in place of its scores; the sums so far shrink with a new
   peak. */
static void weigh(float *state, int64_t sums, float *scores, int is_packed)
{
    Floats highest = all(-INFINITY), masses = {0};
    Ints unordered = {0};
    for (int t = 0; t < TOKENS; t += WIDTH) {
        Floats x = load(scores + t);
        unordered |= x != x;
        highest = larger(highest, x);
    }
    for (int i = 0; i < WIDTH; i++)
        if (unordered[i]) { /* NaN does not get lost */
            state[PEAK] = state[PEAK] == -INFINITY ? 0 : state[PEAK];
            state[MASS] = NAN;
        }
    float found = largest(highest), peak = found > state[PEAK] ? found : state[PEAK], mass;
    if (peak == -INFINITY) {
        memset(scores, 0, TOKENS * sizeof(float));
        return;
    }
    if (peak > state[PEAK]) {
        float shrink = state[PEAK] == -INFINITY ? 0 : expf(state[PEAK] - peak);
        state[MASS] *= shrink;
        state[PACKED_MASS] *= shrink;
        for (int64_t i = 0; i < sums; i += WIDTH)
            store(state + SUMS + i, load(state + SUMS + i) * all(shrink));
        state[PEAK] = peak;
    }
    for (int t = 0; t < TOKENS; t += WIDTH) {
        Floats weights = exponential(load(scores + t) - all(peak));
        store(scores + t, weights);
        masses += weights;
    }
    mass = sum(masses);
    state[MASS] += mass;
    if (is_packed)
        state[PACKED_MASS] += mass;
}

/* A block of rows reads tokens in full precision, `before` of all being before them. */
static void read_exact(Round *round, const float *folded, float *state, int64_t row, int64_t rows,
                       int64_t b, int64_t h, const Tensor *keys, const Tensor *values,
                       int64_t tokens, int64_t before, float *tile, float *scores)
{
    const Arguments *a = round->a;
    int64_t d_k = padded(a->keys.d), d_v = padded(a->values.d), step = round->state_stride;
    for (int64_t first = 0; first < tokens; first += TOKENS) {
        int count = (int)(tokens - first < TOKENS ? tokens - first : TOKENS);
        if (is_hidden(round, row, rows, b, h, before + first, count))
            continue;
        copy_tile(tile, d_k, keys, a->keys.d, b, h, first, count);
        products(rows, scores, folded + 16, round->folded_stride, tile, d_k);
        for (int64_t r = 0; r < rows; r++) {
            apply_rules(round, scores + r * TOKENS, row + r, b, h, before + first, count);
            weigh(state + r * step, step - SUMS, scores + r * TOKENS, 0);
        }
        copy_tile(tile, d_v, values, a->values.d, b, h, first, count);
        add_sums(rows, state + SUMS, step, scores, tile, d_v, count);
    }
}

static void read_packed(Round *round, const float *folded, float *state, int64_t row, int64_t rows,
                        int64_t b, int64_t h, int64_t begin, int64_t end, float *tile,
                        float *scores)
{
    const Arguments *a = round->a;
    const Side *keys = &a->keys, *values = &a->values;
    int64_t step = round->state_stride;
    float *some = scores + BLOCK * TOKENS, scales[TOKENS];
    for (int64_t first = begin; first < end; first += TOKENS) {
        int count = (int)(end - first < TOKENS ? end - first : TOKENS);
        if (is_hidden(round, row, rows, b, h, a->sinks + first, count))
            continue;
        const float *queries = folded + 16 + padded(keys->d);
        for (int term = 0; term < keys->terms; term++) {
            const Term *x = &keys->term[term];
            float *out = term ? some : scores;
            if (are_products_fused(rows, x)) {
                fused_products(rows, out, queries, round->folded_stride, x, b, h, first, count);
            } else {
                look_up_tile(tile, padded(x->size), x, b, h, first, count);
                products(rows, out, queries, round->folded_stride, tile, padded(x->size));
            }
            copy_scales(scales, &x->scale, b, h, first, count);
            for (int64_t r = 0; r < rows; r++)
                for (int t = 0; t < TOKENS; t += WIDTH) {
                    float *score = scores + r * TOKENS + t;
                    Floats before = term ? load(score) : all(folded[r * round->folded_stride]);
                    store(score, before + load(out + r * TOKENS + t) * load(scales + t));
                }
            queries += padded(x->size);
        }
        for (int64_t r = 0; r < rows; r++) {
            apply_rules(round, scores + r * TOKENS, row + r, b, h, a->sinks + first, count);
            weigh(state + r * step, step - SUMS, scores + r * TOKENS, 1);
        }
        float *sums = state + SUMS + padded(values->d);
        for (int term = 0; term < values->terms; term++) {
            const Term *x = &values->term[term];
            copy_scales(scales, &x->scale, b, h, first, count);
            for (int64_t r = 0; r < rows; r++)
                for (int t = r * TOKENS; t < (r + 1) * TOKENS; t += WIDTH)
                    store(some + t, load(scores + t) * load(scales + t % TOKENS));
            if (are_sums_fused(rows, x)) {
                fused_sums(rows, sums, step, some, x, b, h, first, count);
            } else {
                look_up_tile(tile, padded(x->size), x, b, h, first, count);
                add_sums(rows, sums, step, some, tile, padded(x->size), count);
            }
            sums += padded(x->size);
        }
    }
}

/* A share of the tokens, read by a block of rows. */
static void read_share(void *data, int64_t item, int64_t thread)
{
    (void)thread;
    Round *round = data;
    const Arguments *a = round->a;
    int64_t share = item % round->shares, block = item / round->shares % round->blocks;
    int64_t bh = item / round->shares / round->blocks, b = bh / a->heads, h = bh % a->heads;
    int64_t row = block * BLOCK, rows = round->rows - row < BLOCK ? round->rows - row : BLOCK;
    int64_t begin = share * round->share, end = begin + round->share;
    int64_t step = round->state_stride;
    const float *folded = round->folded + (bh * round->rows + row) * round->folded_stride;
    /* The rows of a share lie one after the other. */
    float *state = round->states + ((bh * round->shares + share) * round->rows + row) * step;
    static __thread float scratch[TOKENS * MAX_SIZE + 2 * BLOCK * TOKENS]
        __attribute__((aligned(64)));
    float *tile = scratch, *scores = scratch + TOKENS * MAX_SIZE;
    for (int64_t r = 0; r < rows; r++) {
        memset(state + r * step, 0, step * sizeof(float));
        state[r * step + PEAK] = -INFINITY;
    }
    end = end < a->packed ? end : a->packed;
    if (share == 0)
        read_exact(round, folded, state, row, rows, b, h, &a->keys.sinks, &a->values.sinks,
                   a->sinks, 0, tile, scores);
    if (begin < end)
        read_packed(round, folded, state, row, rows, b, h, begin, end, tile, scores);
    if (share == round->shares - 1)
        read_exact(round, folded, state, row, rows, b, h, &a->keys.recent, &a->values.recent,
                   a->recent, a->sinks + a->packed, tile, scores);
}

/* The shares of a row, put together in the first. */
static void unfold(void *data, int64_t item, int64_t thread)
{
    (void)thread;
    Round *round = data;
    const Arguments *a = round->a;
    const Side *values = &a->values;
    int64_t d = values->d, row = item % round->rows, bh = item / round->rows;
    int64_t b = bh / a->heads, h = bh % a->heads, step = round->state_stride;
    int64_t head = h * a->group + row / round->count, i = round->begin + row % round->count;
    float *first = round->states + (bh * round->shares * round->rows + row) * step;
    float peak = a->sink_logits ? a->sink_logits[head] : -INFINITY;
    float *out = a->out + ((b * a->heads * a->group + head) * a->n + i) * d;
    for (int64_t s = 0; s < round->shares; s++) {
        float found = first[s * round->rows * step + PEAK];
        peak = found > peak ? found : peak;
    }
    if (peak == -INFINITY) {
        memset(out, 0, d * sizeof(float));
        return;
    }
    float mass = a->sink_logits ? expf(a->sink_logits[head] - peak) : 0, packed_mass = 0;
    for (int64_t s = 0; s < round->shares; s++) {
        const float *state = first + s * round->rows * step;
        float weight = state[PEAK] == -INFINITY ? 0 : expf(state[PEAK] - peak);
        mass += weight * state[MASS];
        packed_mass += weight * state[PACKED_MASS];
        for (int64_t j = SUMS; j < step; j += WIDTH)
            store(first + j, load(state + j) * all(weight) + (s ? load(first + j) : all(0)));
    }
    const float *sums = first + SUMS + padded(d);
    float vector[MAX_SIZE] = {0};
    if (a->packed) {
        for (int term = 0; term < values->terms; term++) {
            int64_t size = values->term[term].size;
            for (int64_t j = 0; j < size; j++)
                for (int64_t c = 0; c < d; c++)
                    vector[c] += sums[j] * values->term[term].basis[j * d + c];
            sums += padded(size);
        }
        const float *scale = (const float *)place(&values->scale, b, h, 0);
        for (int64_t c = 0; c < d; c++)
            vector[c] *= scale[c * values->scale.stride_t];
        if (values->mean.data) {
            const float *mean = (const float *)place(&values->mean, b, h, 0);
            for (int64_t c = 0; c < d; c++)
                vector[c] += packed_mass * mean[c];
        }
    }
    for (int64_t c = 0; c < d; c++)
        out[c] = (vector[c] + first[SUMS + c]) / mass;
}

int ATTEND(const Arguments *a, Team team, int threads)
{
    int64_t pairs = a->batch * a->heads, most;
    Round round = {.a = a};
    if (pairs * a->group == 0)
        return 0;
    most = MAX_ROWS / (pairs * a->group);
    round.folded_stride = 16 + padded(a->keys.d) + terms_size(&a->keys);
    round.state_stride = SUMS + padded(a->values.d) + terms_size(&a->values);
    most = most < 1 ? 1 : most > a->n ? a->n : most;
    for (; round.begin < a->n; round.begin += round.count) {
        round.count = a->n - round.begin < most ? a->n - round.begin : most;
        round.rows = a->group * round.count;
        round.blocks = (round.rows + BLOCK - 1) / BLOCK;
        /* Of few rows each thread takes some shares, so that the last to end is not long alone. */
        int64_t wanted = threads > 1 ? 4 * threads / (pairs * round.blocks) + 1 : 1;
        int64_t possible = a->packed / MIN_SHARE;
        round.shares = wanted < possible ? wanted : possible < 1 ? 1 : possible;
        round.share = (a->packed + round.shares - 1) / round.shares;
        round.share = (round.share + TOKENS - 1) / TOKENS * TOKENS;
        int64_t rows = pairs * round.rows;
        int64_t floats = rows * (round.folded_stride + round.shares * round.state_stride);
        float *memory = aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
        if (!memory)
            return -1;
        round.folded = memory, round.states = memory + rows * round.folded_stride;
        share(fold, &round, rows, team, threads);
        share(read_share, &round, pairs * round.blocks * round.shares, team, threads);
        share(unfold, &round, rows, team, threads);
        free(memory);
    }
    return 0;
}
