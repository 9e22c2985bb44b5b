/* Rounding that pushes errors out of the directions of queries: `quant/rounding.py`, in columns. */
#ifndef ROTORQUANT_SWEEP_H
#define ROTORQUANT_SWEEP_H

#include "append.h"
#include "columns.h"
#include "nearest.h"

/* What the sweep reads of a head's Hessian level I + F F', of rotated vectors: F and the gains p_i,
   (d, RANK), and what the error of a coordinate adds to the next one, p_(i + 1) . f_i, (d,). */
typedef struct {
    float *level, *factor, *gains, *next;
} Feedback;

INLINE int64_t feedback_floats(int64_t d) { return padded(d) * (2 * RANK + 1) + 16; }

INLINE Feedback feedback_at(float *memory, int64_t d)
{
    float *gains = memory + padded(d) * RANK, *next = gains + padded(d) * RANK;
    return (Feedback){next + padded(d), memory, gains, next};
}

static double energy_of(const float *factor, int64_t d)
{
    double sum = 0;
    for (int64_t i = 0; i < d * RANK; i++)
        sum += (double)factor[i] * factor[i];
    return sum;
}

/* F, turned along with the keys, of the same strength: `ChannelStatistics.hessians_from`. Its
   columns are directions of queries, in units of the channels' scales. */
static void take_factor(float *factor, const Coding *coding, int64_t b, int64_t h)
{
    const Rope *rope = &coding->rope;
    int64_t d = coding->d, step = coding->channels.stride_t;
    int64_t between = between_pairs(rope), other = within_pair(rope);
    const float *scale = (const float *)place(&coding->channels, b, h, 0);
    copy_tile(factor, RANK, &coding->factor, RANK, b, h, 0, (int)d);
    if (!rope->pairs)
        return;
    const float *frequency = frequencies(rope, b);
    double before = energy_of(factor, d);
    for (int64_t i = 0; i < rope->pairs; i++) {
        float *one = factor + i * between * RANK, *two = one + other * RANK;
        float angle = (float)coding->position * frequency[i], cos = cosf(angle), sin = sinf(angle);
        float first = scale[i * between * step], second = scale[(i * between + other) * step];
        for (int r = 0; r < RANK; r++) {
            float x = one[r] / first, y = two[r] / second;
            one[r] = (x * cos - y * sin) * first;
            two[r] = (x * sin + y * cos) * second;
        }
    }
    double after = energy_of(factor, d);
    float strength = after > 0 ? (float)sqrt(before / after) : 1;
    for (int64_t i = 0; i < d * RANK; i++)
        factor[i] = from_half(to_half(factor[i] * strength));
}

/* T F, the level, and from the last row backwards the gains p = (level I + sum over rows from here
   on of f f')^-1 f. The inverse takes in one row after the other (Sherman and Morrison), in
   float64. */
static void make_feedback(Feedback feedback, const Coding *coding, int64_t b, int64_t h)
{
    int64_t d = coding->d;
    float *unrotated = feedback.gains; /* which come later */
    take_factor(unrotated, coding, b, h);
    *feedback.level = (float)(coding->ridge + 1 - energy_of(unrotated, d) / (double)d);
    memset(feedback.factor, 0, d * RANK * sizeof(float));
    for (int64_t k = 0; k < d; k++)
        for (int64_t j = 0; j < d; j++) {
            float w = coding->rotation[j * d + k];
            for (int r = 0; r < RANK; r++)
                feedback.factor[j * RANK + r] += w * unrotated[k * RANK + r];
        }
    double inverse[RANK][RANK] = {{0}};
    for (int r = 0; r < RANK; r++)
        inverse[r][r] = 1 / (double)*feedback.level;
    for (int64_t i = d - 1; i >= 0; i--) {
        const float *f = feedback.factor + i * RANK;
        double product[RANK] = {0}, energy = 1;
        for (int q = 0; q < RANK; q++)
            for (int r = 0; r < RANK; r++)
                product[r] += inverse[q][r] * f[q];
        for (int r = 0; r < RANK; r++)
            energy += product[r] * f[r];
        for (int q = 0; q < RANK; q++)
            for (int r = 0; r < RANK; r++)
                inverse[q][r] -= product[q] / energy * product[r];
        for (int r = 0; r < RANK; r++)
            feedback.gains[i * RANK + r] = (float)(product[r] / energy);
    }
    for (int64_t i = 0; i < d; i++) {
        double sum = 0;
        for (int r = 0; r < RANK && i + 1 < d; r++)
            sum += (double)feedback.gains[(i + 1) * RANK + r] * feedback.factor[i * RANK + r];
        feedback.next[i] = (float)sum;
    }
}

/* Codes and centroids (d, TOKENS) of vectors y, and F' (y - c), (RANK, TOKENS); `bits` is a
   constant.

   The step from one coordinate to the next is short: what all errors but the last add to the next
   coordinate is known before that last error is. */
INLINE void sweep(int bits, const CodeBook *book, const Feedback *feedback, const float *y,
                  int64_t d, uint8_t *codes, float *c, float *lost)
{
    for (int t = 0; t < TOKENS; t += WIDTH) {
        Floats s[RANK] = {{0}}, wanted = load(y + t);
        for (int64_t i = 0; i < d; i++) {
            const float *f = feedback->factor + i * RANK;
            Floats own = load(y + i * TOKENS + t), next = all(0), parts[4] = {{0}};
            if (i + 1 < d) {
                const float *p = feedback->gains + (i + 1) * RANK;
                next = load(y + (i + 1) * TOKENS + t);
                for (int r = 0; r < RANK; r++)
                    parts[r % 4] += all(p[r]) * s[r];
                next += (parts[0] + parts[1]) + (parts[2] + parts[3]);
            }
            Ints code = nearest(book, bits, wanted);
            Floats chosen = look_up(&book->table, bits, code), error = own - chosen;
            wanted = next + all(feedback->next[i]) * error;
            for (int r = 0; r < RANK; r++)
                s[r] += all(f[r]) * error;
            store_codes(codes + i * TOKENS + t, code);
            store(c + i * TOKENS + t, chosen);
        }
        for (int r = 0; r < RANK; r++)
            store(lost + r * TOKENS + t, s[r]);
    }
}

#endif
