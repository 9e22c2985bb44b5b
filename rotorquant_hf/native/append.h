/* Coding vectors into the rows of a store: what `rotorquant_append` takes.

   All fields have 8 bytes, in the order of `AppendArguments` in `library.py`. Tensors as in
   attend.h; the last axis of each lies side by side.
*/
#ifndef ROTORQUANT_APPEND_H
#define ROTORQUANT_APPEND_H

#include "attend.h"

enum { RANK = 16 }; /* of the Hessian */

/* Rules for the scale of a vector: see `quant/mse.py`. */
enum { NORM = 0, MATCHED = 1, LEAST_SQUARES = 2, UNBIASED = 3 };

typedef struct {
    int64_t batch, heads, tokens, d;
    int64_t bits, rule;
    Tensor x;                /* (batch, heads, tokens, d) */
    Tensor channels;         /* their scales, float32; its stride_t is that of the channels */
    Tensor mean;             /* (batch, heads, 1, d) float32, or no data */
    const float *rotation;   /* T, (d, d) */
    const float *boundaries; /* (2^bits - 1,), ascending */
    const float *centroids;  /* (2^bits,) */
    Tensor factor;           /* of the Hessian, (batch, heads, d, RANK), or no data */
    double ridge;            /* what it adds to a mean diagonal of 1 */
    Rope rope;               /* by which it turns along with the vectors */
    int64_t position;        /* to where */
    int64_t projections;     /* of the residual, or 0 */
    const float *projection; /* S, (projections, d) */
    /* What is written: rows (batch, heads, tokens, ...). */
    Tensor codes, scale;          /* bytes; float16 */
    Tensor signs, residual_norm;  /* the same, with projections */
} Coding;

enum { NO_MEMORY = -1, TOO_LARGE = 1 };

/* 0; NO_MEMORY; TOO_LARGE if a vector is too large for a float16 scale, or has no norm at all: the
   rows are then of no use. */
int append_portable(const Coding *coding, Team team, int threads);
int append_avx2(const Coding *coding, Team team, int threads);
int append_avx512(const Coding *coding, Team team, int threads);

#endif
