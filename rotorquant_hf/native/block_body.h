/* Scales and means of channels: `ChannelStatistics.of_block` is the reference. */
#include "team.h"
#include "turned.h"

/* What a block is like: of every head its largest magnitude, (batch, heads), and means of the
   vectors over that, of their squares, and of the vectors before they were turned, (batch, heads,
   d). */
typedef struct {
    const Block *block;
    float *peak, *mean, *energy, *before;
} Measured;

static float peak_of_head(float *tile, int64_t stride, const Turned *x, int64_t b, int64_t h)
{
    Floats peak = {0};
    for (int64_t first = 0; first < x->tokens; first += VECTORS) {
        int count = tile_count(x, first);
        take_tile(tile, stride, x, b, h, first, count);
        for (int64_t i = 0; i < count * stride; i += WIDTH) {
            Floats a = load(tile + i);
            peak = larger(larger(a, -a), peak);
        }
    }
    float found = largest(peak);
    return found > 0 ? found : 1;
}

/* Sums += x, and += x^2 where these are asked for, over the vectors. */
INLINE void add_vectors(float *sums, float *squares, const float *tile, int64_t stride, int count)
{
    for (int64_t i = 0; i < stride; i += WIDTH) {
        Floats sum = {0}, square = {0};
        for (int t = 0; t < count; t++) {
            Floats x = load(tile + t * stride + i);
            sum += x;
            square += x * x;
        }
        store(sums + i, load(sums + i) + sum);
        if (squares)
            store(squares + i, load(squares + i) + square);
    }
}

static void store_means(float *means, const float *sums, int64_t d, int64_t count)
{
    for (int64_t i = 0; i < d; i++)
        means[i] = sums[i] / (float)count;
}

static void measure_head(const void *asked, int64_t item, float *tile)
{
    const Measured *measured = asked;
    const Turned *x = &measured->block->x;
    int64_t b = item / x->heads, h = item % x->heads, d = x->d, stride = padded(d);
    float *sums = tile + VECTORS * stride, *squares = sums + stride, *before = squares + stride;
    float peak = peak_of_head(tile, stride, x, b, h);
    memset(sums, 0, 3 * stride * sizeof(float));
    for (int64_t first = 0; first < x->tokens; first += VECTORS) {
        int count = tile_count(x, first);
        take_tile(tile, stride, x, b, h, first, count);
        for (int64_t i = 0; i < count * stride; i += WIDTH)
            store(tile + i, load(tile + i) / all(peak));
        add_vectors(sums, squares, tile, stride, count);
        if (x->rope.pairs) {
            turn_back(tile, stride, x, b, first, count);
            add_vectors(before, NULL, tile, stride, count);
        }
    }
    measured->peak[item] = peak;
    store_means(measured->mean + item * d, sums, d, x->tokens);
    store_means(measured->energy + item * d, squares, d, x->tokens);
    store_means(measured->before + item * d, before, d, x->tokens);
}

/* The energy of a head; 1 of zeros. */
static double total_of(const float *energy, int64_t d)
{
    double total = 0;
    for (int64_t i = 0; i < d; i++)
        total += energy[i];
    return total > 0 ? total : 1;
}

/* Whether the vectors of a row agree with each other, turned back, as well as they do turned. */
static int is_turned(const Measured *measured, int64_t b)
{
    const Block *block = measured->block;
    int64_t heads = block->x.heads, d = block->x.d;
    double excess = 0;
    for (int64_t h = b * heads; h < (b + 1) * heads; h++) {
        const float *before = measured->before + h * d, *mean = measured->mean + h * d;
        double of_head = 0;
        for (int64_t i = 0; i < d; i++)
            of_head += (double)before[i] * before[i] - block->turns * mean[i] * mean[i];
        excess += of_head / total_of(measured->energy + h * d, d);
    }
    return excess >= 0;
}

/* The channel that shares a scale with channel i: itself, if none does. */
static int64_t partner(int64_t layout, int64_t i, int64_t d)
{
    if (layout == ALONE || d % 2)
        return i;
    if (layout == INTERLEAVED)
        return i ^ 1;
    return i < d / 2 ? i + d / 2 : i - d / 2;
}

static double shared(const float *x, int64_t layout, int64_t i, int64_t d)
{
    return ((double)x[i] + x[partner(layout, i, d)]) / 2;
}

static double median_of_shared(const float *x, int64_t layout, int64_t d)
{
    for (int64_t i = 0;; i++) {
        int64_t below = 0, equal = 0;
        double own = shared(x, layout, i, d);
        for (int64_t j = 0; j < d; j++) {
            double other = shared(x, layout, j, d);
            below += other < own;
            equal += other == own;
        }
        if ((below <= (d - 1) / 2 && (d - 1) / 2 < below + equal) || i == d - 1)
            return own;
    }
}

static void store_scale(float *scale, const Block *block, const float *energy, float peak)
{
    int64_t d = block->x.d;
    double total = total_of(energy, d), least = total * block->min_rms * block->min_rms / (double)d;
    double coded = 0; /* the energy of x / scale */
    if (block->power == 0) {
        *scale = (float)(sqrt(total) * peak);
        return;
    }
    for (int64_t i = 0; i < d; i++) {
        double own = shared(energy, block->layout, i, d);
        scale[i] = powf((float)(own > least ? own : least), (float)block->power);
        coded += energy[i] / (double)scale[i];
    }
    for (int64_t i = 0; i < d; i++)
        scale[i] = (float)(sqrt(scale[i] * (coded > 0 ? coded : 1)) * peak);
}

/* The mean of all channels, turned to where the vectors will be, or that of offset channels. */
static void store_center(float *center, const Measured *measured, int64_t b, int64_t item,
                         int turned)
{
    const Block *block = measured->block;
    const Turned *x = &block->x;
    int64_t d = x->d, pairs = x->rope.pairs;
    const float *mean = measured->mean + item * d, *energy = measured->energy + item * d;
    double peak = measured->peak[item];
    if (block->center == OFFSET) {
        double median = median_of_shared(energy, block->layout, d);
        for (int64_t i = 0; i < d; i++) {
            int64_t other = partner(block->layout, i, d);
            double own = shared(energy, block->layout, i, d);
            double constant = ((double)mean[i] * mean[i] + (double)mean[other] * mean[other]) / 2;
            int large = own > block->offset_energy * median;
            center[i] = large && constant > block->offset_share * own ? (float)(mean[i] * peak) : 0;
        }
        return;
    }
    const float *before = measured->before + item * d;
    for (int64_t i = 0; i < d; i++)
        center[i] = (float)((turned ? before : mean)[i] * peak);
    if (!turned)
        return;
    const float *turn = (const float *)place(&block->spread, b, 0, 0);
    int64_t step = between_pairs(&x->rope), other = within_pair(&x->rope);
    for (int64_t k = 0; k < pairs; k++) {
        double re = turn[2 * k], im = turn[2 * k + 1];
        double one = before[k * step], two = before[k * step + other];
        center[k * step] = (float)((one * re - two * im) * peak);
        center[k * step + other] = (float)((one * im + two * re) * peak);
    }
}

int BLOCK(const Block *block, Team team, int threads)
{
    const Turned *x = &block->x;
    int64_t d = x->d, pairs = x->rope.pairs, heads = x->batch * x->heads;
    float *memory = aligned_alloc(64, (heads * (3 * d + 1) * sizeof(float) + 63) / 64 * 64);
    if (!memory)
        return -1;
    Measured measured = {block, memory, memory + heads, NULL, NULL};
    measured.energy = measured.mean + heads * d;
    measured.before = measured.energy + heads * d;
    int done = for_each(measure_head, &measured, heads, (VECTORS + 3) * padded(d), team, threads);
    for (int64_t b = 0; b < x->batch && !done; b++) {
        int turned = pairs && is_turned(&measured, b);
        for (int64_t i = 0; i < pairs; i++)
            block->turning[b * pairs + i] = turned ? frequencies(&x->rope, b)[i] : 0;
        for (int64_t h = b * x->heads; h < (b + 1) * x->heads; h++) {
            float *scale = block->scale + h * (block->power == 0 ? 1 : d);
            store_scale(scale, block, measured.energy + h * d, measured.peak[h]);
            if (block->mean)
                store_center(block->mean + h * d, &measured, b, h, turned);
        }
    }
    free(memory);
    return done;
}
