/* Second moments of queries, as they are and as they were before RoPE: `QueryMoment.of` is the
   reference. */
#include "team.h"
#include "turned.h"

#if defined(USE_AVX512)
enum { SUM_ROWS = 4, SUM_VECTORS = 4 };
#else
enum { SUM_ROWS = 4, SUM_VECTORS = 2 }; /* what 16 registers hold */
#endif

/* Rows i ... of sums += x x' over the vectors, `columns` times WIDTH of them from j on. */
INLINE void add_block(int columns, float *sums, const float *tile, int64_t stride, int64_t i,
                      int64_t j, int count)
{
    Floats block[SUM_ROWS][SUM_VECTORS];
    for (int r = 0; r < SUM_ROWS; r++)
        for (int c = 0; c < columns; c++)
            block[r][c] = load(sums + (i + r) * stride + j + c * WIDTH);
    for (int t = 0; t < count; t++) {
        const float *x = tile + t * stride;
        for (int r = 0; r < SUM_ROWS; r++)
            for (int c = 0; c < columns; c++)
                block[r][c] += all(x[i + r]) * load(x + j + c * WIDTH);
    }
    for (int r = 0; r < SUM_ROWS; r++)
        for (int c = 0; c < columns; c++)
            store(sums + (i + r) * stride + j + c * WIDTH, block[r][c]);
}

/* Sums (stride, stride) += x x' over the vectors, on the diagonal and above it. */
static void add_products(float *sums, const float *tile, int64_t stride, int count)
{
    for (int64_t i = 0; i < stride; i += SUM_ROWS) {
        int64_t j = i / WIDTH * WIDTH;
        for (; j + SUM_VECTORS * WIDTH <= stride; j += SUM_VECTORS * WIDTH)
            add_block(SUM_VECTORS, sums, tile, stride, i, j, count);
        for (; j < stride; j += WIDTH)
            add_block(1, sums, tile, stride, i, j, count);
    }
}

/* Sums over `count` vectors to a symmetric mean (d, d). */
static void store_mean(float *mean, const float *sums, int64_t stride, int64_t d, int64_t count)
{
    for (int64_t i = 0; i < d; i++)
        for (int64_t j = i; j < d; j++)
            mean[i * d + j] = mean[j * d + i] = sums[i * stride + j] / (float)count;
}

static void moment_of_head(const void *asked, int64_t item, float *tile)
{
    const Moment *moment = asked;
    const Turned *x = &moment->x;
    int64_t heads = x->heads / moment->group, b = item / heads, first_head = item % heads;
    int64_t d = x->d, stride = padded(d), count = moment->group * x->tokens;
    float *sums = tile + VECTORS * stride, *before = sums + stride * stride;
    memset(sums, 0, 2 * stride * stride * sizeof(float));
    first_head *= moment->group;
    for (int64_t h = first_head; h < first_head + moment->group; h++)
        for (int64_t first = 0; first < x->tokens; first += VECTORS) {
            int some = tile_count(x, first);
            take_tile(tile, stride, x, b, h, first, some);
            add_products(sums, tile, stride, some);
            if (moment->before) {
                turn_back(tile, stride, x, b, first, some);
                add_products(before, tile, stride, some);
            }
        }
    store_mean(moment->mean + item * d * d, sums, stride, d, count);
    if (moment->before)
        store_mean(moment->before + item * d * d, before, stride, d, count);
}

int MOMENT(const Moment *moment, Team team, int threads)
{
    int64_t stride = padded(moment->x.d), heads = moment->x.heads / moment->group;
    int64_t floats = (VECTORS + 2 * stride) * stride;
    return for_each(moment_of_head, moment, moment->x.batch * heads, floats, team, threads);
}
