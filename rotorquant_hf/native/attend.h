/* Attention of some queries over cached keys and values: what `rotorquant_attend` takes.

   All fields have 8 bytes, in the order of `Arguments` in `library.py`. Strides are in elements,
   those of codes in bytes; neighbouring channels lie side by side. Shapes: queries (batch, heads *
   group, n, d_k), of which heads g k ... g k + g - 1 read kv head k.
*/
#ifndef ROTORQUANT_ATTEND_H
#define ROTORQUANT_ATTEND_H

#include <stdint.h>

enum { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2, BOOLEAN = 3 };
enum { MAX_TERMS = 4 };

/* A tensor (batch, heads, tokens, ...). */
typedef struct {
    const void *data;
    int64_t type;
    int64_t stride_b, stride_h, stride_t;
} Tensor;

static inline int64_t element_size(int64_t type)
{
    return type == FLOAT32 ? 4 : type == BOOLEAN ? 1 : 2;
}

/* Where token t of a row and head is. Codes are BOOLEAN: bytes. */
static inline const uint8_t *place(const Tensor *x, int64_t b, int64_t h, int64_t t)
{
    int64_t elements = b * x->stride_b + h * x->stride_h + t * x->stride_t;
    return (const uint8_t *)x->data + elements * element_size(x->type);
}

/* How RoPE turns vectors: pair i are channels 2 i and 2 i + 1, or else i and i + pairs. */
typedef struct {
    int64_t pairs, interleaved; /* no pairs: it is not known, or nothing turns */
    Tensor frequencies;         /* in radians a token, (batch, any, 1, pairs) float32 */
} Rope;

/* From the first channel of a pair to that of the next one, and to the second of the same. */
static inline int64_t between_pairs(const Rope *rope) { return rope->interleaved ? 2 : 1; }
static inline int64_t within_pair(const Rope *rope) { return rope->interleaved ? 1 : rope->pairs; }

static inline const float *frequencies(const Rope *rope, int64_t b)
{
    return (const float *)place(&rope->frequencies, b, 0, 0);
}

/* One term of packed vectors: scale * (centroids of the codes) @ basis. */
typedef struct {
    Tensor codes, scale;
    int64_t bits, size;   /* of a code; codes of a vector */
    const float *table;   /* (2^bits,) */
    const float *basis;   /* (size, d) */
} Term;

/* Keys or values: those in full precision before and after the packed ones, and these. */
typedef struct {
    int64_t d;
    Tensor sinks, recent;
    int64_t terms;
    Term term[MAX_TERMS];
    Tensor scale; /* of the channels, float32; its stride_t is that of the channels */
    Tensor mean;  /* float32, or no data */
} Side;

typedef struct {
    int64_t batch, heads, group, n;
    int64_t sinks, packed, recent; /* tokens */
    double factor, softcap;        /* of the inner products; 0 for none */
    int64_t causal;                /* query i sees tokens up to tokens - n + i */
    Tensor query;                  /* float32 */
    float *out;                    /* (batch, heads * group, n, d_v), contiguous */
    const float *sink_logits;      /* (heads * group,), or NULL */
    Tensor mask; /* (batch, heads * group, n, tokens), FLOAT32 or BOOLEAN, or no data */
    int64_t mask_stride_k;         /* of the tokens */
    Side keys, values;
} Arguments;

/* Runs a function once on each of so many threads. */
typedef void (*Team)(void (*work)(void *), void *data, unsigned threads, unsigned flags);

/* 0, or -1 if there is no memory. */
int attend_portable(const Arguments *arguments, Team team, int threads);
int attend_avx2(const Arguments *arguments, Team team, int threads);
int attend_avx512(const Arguments *arguments, Team team, int threads);

#endif
