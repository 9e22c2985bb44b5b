/* Vectors in full precision, of whatever type, as rows of float32. */
#ifndef ROTORQUANT_PLAIN_H
#define ROTORQUANT_PLAIN_H

#include "attend.h"
#include "vectors.h"

INLINE int64_t padded(int64_t size) { return (size + 15) / 16 * 16; }

INLINE float number(const uint8_t *from, int64_t type)
{
    float value;
    uint16_t half;
    if (type == FLOAT32) {
        memcpy(&value, from, 4);
        return value;
    }
    memcpy(&half, from, 2);
    return type == FLOAT16 ? from_half(half) : from_bfloat(half);
}

/* Tokens in full precision. */
static void copy_tile(float *tile, int64_t stride, const Tensor *x, int64_t d, int64_t b, int64_t h,
                      int64_t first, int count)
{
    for (int t = 0; t < count; t++, tile += stride) {
        const uint8_t *from = place(x, b, h, first + t);
        if (x->type == FLOAT32)
            memcpy(tile, from, 4 * d);
        else if (x->type == BFLOAT16)
            for (int64_t i = 0; i < d; i++)
                tile[i] = number(from + 2 * i, BFLOAT16);
        else
            for (int64_t i = 0; i < d; i++)
                tile[i] = number(from + 2 * i, FLOAT16);
        memset(tile + d, 0, 4 * (stride - d));
    }
}

#endif
