/* What vectors are like before they are coded: what `rotorquant_moment`, `rotorquant_block`
   and `rotorquant_hessian` take.

   All fields have 8 bytes, in the order of the classes in `library.py`. Tensors as in attend.h; the
   last axis of each lies side by side.
*/
#ifndef ROTORQUANT_STATISTICS_H
#define ROTORQUANT_STATISTICS_H

#include "append.h"

/* Vectors, and how RoPE has turned them. */
typedef struct {
    int64_t batch, heads, tokens, d; /* as many tokens as are looked at */
    Tensor x;                        /* (batch, heads, tokens or more, d) */
    const int64_t *places;           /* of the tokens that are looked at, or NULL: all */
    Rope rope;
    Tensor cos, sin;                 /* of the angles, (batch, any, tokens, pairs) float32 */
} Turned;

/* Second moments: the means of x x' over the vectors of `group` neighbouring heads each. */
typedef struct {
    Turned x;
    int64_t group;
    float *mean;   /* (batch, heads / group, d, d), contiguous */
    float *before; /* the same of the vectors before they were turned, or NULL */
} Moment;

enum { NOT = 0, ALL = 1, OFFSET = 2 };       /* channels that are centred */
enum { ALONE = 0, HALF = 1, INTERLEAVED = 2 }; /* pairs of channels that share a scale */

/* Scales and means of the channels of a block of vectors: `ChannelStatistics.of_block`. */
typedef struct {
    Turned x;
    double power;
    int64_t center, layout;
    Tensor spread;        /* the mean turns of the positions that the mean is to fit, complex
                             (batch, any, 1, pairs); or no data */
    double turns, min_rms, offset_energy, offset_share; /* limits: see there */
    float *scale;         /* (batch, heads, d); with power 0 (batch, heads) */
    float *mean;          /* (batch, heads, d), or NULL */
    float *turning;       /* (batch, pairs): frequencies of rows that RoPE has turned, else 0; or
                             NULL */
} Block;

/* What errors of coded vectors cost those who read them: `ChannelStatistics.read_by`. */
typedef struct {
    int64_t batch, heads, d;      /* d >= RANK */
    const float *moment;          /* of the queries, (batch, heads, d, d), contiguous */
    const float *before;          /* the same before they were turned, or NULL */
    Rope rope;                    /* in rows that it turns, that is taken, turned to where the
                                     queries will be */
    Tensor by_cos, by_sin;        /* how to, complex (batch, any, pairs, pairs) */
    Tensor by_turn;               /* and with channels that stay, (batch, any, 1, pairs) */
    double level;                 /* to be added to the diagonal, as a share of its mean */
    Tensor scale;                 /* of the channels, as in `Coding` */
    const double *start;          /* of the subspace iteration, (d, RANK) */
    double ridge;
    int64_t iterations;
    uint16_t *factor;             /* (batch, heads, d, RANK) float16, contiguous */
} Hessian;

/* 0, or -1 if there is no memory. */
int moment_portable(const Moment *moment, Team team, int threads);
int moment_avx2(const Moment *moment, Team team, int threads);
int moment_avx512(const Moment *moment, Team team, int threads);
int block_portable(const Block *block, Team team, int threads);
int block_avx2(const Block *block, Team team, int threads);
int block_avx512(const Block *block, Team team, int threads);

/* The same, or 1 if a moment is not positive semidefinite, or not finite. */
int hessian_portable(const Hessian *hessian, Team team, int threads);
int hessian_avx2(const Hessian *hessian, Team team, int threads);
int hessian_avx512(const Hessian *hessian, Team team, int threads);

#endif
