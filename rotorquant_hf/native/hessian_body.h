/* What errors of coded vectors cost those who read them.

   As `ChannelStatistics.read_by` and `LowRankHessian.of`, the references, in float64 throughout. A
   basis of the strongest directions is (d, RANK), so that a row fills vectors whatever d is.
*/
#include "statistics.h"
#include "team.h"
#include "vectors.h"

enum { PAIRED = WIDTH / 2, PARTS = RANK / PAIRED };

typedef double Doubles __attribute__((vector_size(8 * PAIRED)));

#if defined(USE_AVX512)
enum { BASIS_ROWS = 4 };
#else
enum { BASIS_ROWS = 2 }; /* what 16 registers hold */
#endif

typedef struct {
    double *h;                                   /* (d, d) */
    double *basis, *product;                     /* (d, RANK) */
    double gram[RANK * RANK], inverse[RANK * RANK]; /* each row is an input */
} Subspace;

/* `rows` rows of out = M in, a constant. */
INLINE void product_rows(int rows, double *out, const double *m, int64_t row_step, int64_t step,
                         const double *in, int64_t size)
{
    Doubles sums[BASIS_ROWS][PARTS] = {{{0}}}, part;
    for (int64_t k = 0; k < size; k++)
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < PARTS; p++) {
                memcpy(&part, in + k * RANK + p * PAIRED, sizeof part);
                sums[r][p] += m[r * row_step + k * step] * part;
            }
    memcpy(out, sums, rows * RANK * sizeof(double));
}

/* out (rows, RANK) = M in, with in (size, RANK) and M[r][k] at m[r row_step + k step]. */
static void times(double *out, int64_t rows, const double *m, int64_t row_step, int64_t step,
                  const double *in, int64_t size)
{
    for (; rows >= BASIS_ROWS; rows -= BASIS_ROWS) {
        product_rows(BASIS_ROWS, out, m, row_step, step, in, size);
        out += BASIS_ROWS * RANK, m += BASIS_ROWS * row_step;
    }
    for (; rows > 0; rows--, out += RANK, m += row_step)
        product_rows(1, out, m, row_step, step, in, size);
}

/* The lower factor L of a = L L', in its place, with zeros above. NaN if there is none. */
static void factorise(double *a)
{
    for (int j = 0; j < RANK; j++) {
        double *row = a + j * RANK, square = row[j];
        for (int k = 0; k < j; k++)
            square -= row[k] * row[k];
        row[j] = sqrt(square);
        for (int i = j + 1; i < RANK; i++) {
            double *below = a + i * RANK, left = below[j];
            for (int k = 0; k < j; k++)
                left -= below[k] * row[k];
            below[j] = left / row[j];
            row[i] = 0;
        }
    }
}

/* The transposed inverse of a lower factor, upper. */
static void invert(double *inverse, const double *lower)
{
    memset(inverse, 0, RANK * RANK * sizeof(double));
    for (int j = 0; j < RANK; j++)
        for (int i = j; i < RANK; i++) {
            double left = i == j;
            for (int k = j; k < i; k++)
                left -= lower[i * RANK + k] * inverse[j * RANK + k];
            inverse[j * RANK + i] = left / lower[i * RANK + i];
        }
}

static int turns(const Hessian *asked, int64_t b)
{
    const float *frequency = frequencies(&asked->rope, b);
    for (int64_t i = 0; i < asked->rope.pairs; i++)
        if (frequency[i] != 0)
            return 1;
    return 0;
}

/* The moment of queries to come, if RoPE turns the keys along with them: `Rope.spread_moment`. */
static void spread(double *h, const Hessian *asked, const float *moment, int64_t b)
{
    int64_t d = asked->d, pairs = asked->rope.pairs, size = 2 * pairs;
    int64_t step = between_pairs(&asked->rope), other = within_pair(&asked->rope);
    const float *turn = (const float *)place(&asked->by_turn, b, 0, 0);
    for (int64_t k = 0; k < pairs; k++) {
        const float *first = moment + k * step * d, *second = first + other * d;
        const float *by_cos = (const float *)place(&asked->by_cos, b, 0, k);
        const float *by_sin = (const float *)place(&asked->by_sin, b, 0, k);
        double *one = h + k * step * d, *two = one + other * d;
        for (int64_t l = 0; l < pairs; l++) {
            int64_t i = l * step, j = i + other;
            double cr = by_cos[2 * l], ci = by_cos[2 * l + 1];
            double sr = by_sin[2 * l], si = by_sin[2 * l + 1];
            double ar = first[i], ai = second[i], br = first[j], bi = second[j];
            one[i] = (cr * ar - ci * ai) - (sr * br - si * bi);
            two[i] = (cr * ai + ci * ar) - (sr * bi + si * br);
            one[j] = (cr * br - ci * bi) + (sr * ar - si * ai);
            two[j] = (cr * bi + ci * br) + (sr * ai + si * ar);
        }
        for (int64_t l = size; l < d; l++) {
            double re = turn[2 * k], im = turn[2 * k + 1];
            one[l] = h[l * d + k * step] = re * first[l] - im * second[l];
            two[l] = h[l * d + k * step + other] = re * second[l] + im * first[l];
        }
    }
    for (int64_t i = size; i < d; i++)
        for (int64_t j = size; j < d; j++)
            h[i * d + j] = moment[i * d + j];
}

/* In units of the channels' scales, of mean diagonal 1 and the ridge. 0 if an entry of the diagonal
   is negative, or NaN. */
static int scale_moment(double *h, const Hessian *asked, int64_t b, int64_t head)
{
    int64_t d = asked->d, step = asked->scale.stride_t;
    const float *scale = (const float *)place(&asked->scale, b, head, 0);
    double level = 0, mean = 0;
    for (int64_t i = 0; i < d; i++)
        level += h[i * d + i] / (double)d;
    for (int64_t i = 0; i < d; i++) {
        h[i * d + i] += level * asked->level;
        if (!(h[i * d + i] >= 0))
            return 0;
        for (int64_t j = 0; j < d; j++)
            h[i * d + j] *= (double)scale[i * step] * scale[j * step];
        mean += h[i * d + i] / (double)d;
    }
    for (int64_t i = 0; i < d; i++) {
        for (int64_t j = 0; j < d && mean > 0; j++)
            h[i * d + j] /= mean;
        h[i * d + i] += asked->ridge;
    }
    return 1;
}

/* The strongest directions, by subspace iteration, as long as what they have beyond the others. */
static int find_directions(Subspace *s, const Hessian *asked)
{
    int64_t d = asked->d;
    double strength[RANK] = {0}, rest = (double)d * (1 + asked->ridge), found = 0;
    memcpy(s->basis, asked->start, d * RANK * sizeof(double));
    for (int64_t n = 0; n <= asked->iterations; n++) {
        times(s->product, d, s->h, d, 1, s->basis, d);
        if (n == asked->iterations)
            break;
        times(s->gram, RANK, s->product, 1, RANK, s->product, d);
        factorise(s->gram);
        invert(s->inverse, s->gram);
        times(s->basis, d, s->product, RANK, 1, s->inverse, RANK);
    }
    times(s->gram, RANK, s->basis, 1, RANK, s->product, d);
    factorise(s->gram);
    times(s->product, d, s->basis, RANK, 1, s->gram, RANK);
    for (int64_t i = 0; i < d; i++)
        for (int r = 0; r < RANK; r++)
            strength[r] += s->product[i * RANK + r] * s->product[i * RANK + r];
    for (int r = 0; r < RANK; r++)
        found += strength[r];
    rest = d > RANK ? (rest - found) / (double)(d - RANK) : asked->ridge;
    for (int r = 0; r < RANK; r++) {
        double share = 1 - rest / strength[r];
        strength[r] = share > 0 ? sqrt(share) : 0;
    }
    for (int64_t i = 0; i < d; i++)
        for (int r = 0; r < RANK; r++)
            s->product[i * RANK + r] *= strength[r];
    return isfinite(found);
}

typedef struct {
    const Hessian *asked;
    int *wrong;
} Wanted;

static int64_t subspace_doubles(int64_t d) { return d * d + 2 * d * RANK; }

static void hessian_of_head(const void *wanted, int64_t item, float *scratch)
{
    const Wanted *work = wanted;
    const Hessian *asked = work->asked;
    int64_t d = asked->d, b = item / asked->heads, size = d * d;
    Subspace s = {.h = (double *)scratch};
    s.basis = s.h + size, s.product = s.basis + d * RANK;
    if (asked->before && turns(asked, b))
        spread(s.h, asked, asked->before + item * size, b);
    else
        for (int64_t i = 0; i < size; i++)
            s.h[i] = asked->moment[item * size + i];
    if (!scale_moment(s.h, asked, b, item % asked->heads) || !find_directions(&s, asked)) {
        __atomic_store_n(work->wrong, 1, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t i = 0; i < d * RANK; i++)
        asked->factor[item * d * RANK + i] = to_half((float)s.product[i]);
}

int HESSIAN(const Hessian *hessian, Team team, int threads)
{
    int wrong = 0;
    Wanted work = {hessian, &wrong};
    int64_t floats = 2 * subspace_doubles(hessian->d);
    int done = for_each(hessian_of_head, &work, hessian->batch * hessian->heads, floats, team,
                        threads);
    return done ? done : wrong;
}
