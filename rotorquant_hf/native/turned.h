/* Vectors that RoPE has turned, a tile at a time, and turned back where they lie: so they are read
   once from memory. */
#ifndef ROTORQUANT_TURNED_H
#define ROTORQUANT_TURNED_H

#include "plain.h"
#include "statistics.h"

enum { VECTORS = 64 }; /* of a tile */

static int tile_count(const Turned *x, int64_t first)
{
    return (int)(x->tokens - first < VECTORS ? x->tokens - first : VECTORS);
}

static void take_tile(float *tile, int64_t stride, const Turned *x, int64_t b, int64_t h,
                      int64_t first, int count)
{
    if (!x->places) {
        copy_tile(tile, stride, &x->x, x->d, b, h, first, count);
        return;
    }
    for (int t = 0; t < count; t++)
        copy_tile(tile + t * stride, stride, &x->x, x->d, b, h, x->places[first + t], 1);
}

/* Vectors as they were before RoPE turned them. */
static void turn_back(float *tile, int64_t stride, const Turned *x, int64_t b, int64_t first,
                      int count)
{
    int64_t pairs = x->rope.pairs;
    for (int t = 0; t < count; t++, tile += stride) {
        const float *restrict cos = (const float *)place(&x->cos, b, 0, first + t);
        const float *restrict sin = (const float *)place(&x->sin, b, 0, first + t);
        float *restrict one = tile, *restrict other = tile + pairs;
        for (int64_t i = 0; i < pairs && !x->rope.interleaved; i++) {
            float a = one[i], c = other[i];
            one[i] = a * cos[i] + c * sin[i];
            other[i] = c * cos[i] - a * sin[i];
        }
        for (int64_t i = 0; i < pairs && x->rope.interleaved; i++) {
            float a = tile[2 * i], c = tile[2 * i + 1];
            tile[2 * i] = a * cos[i] + c * sin[i];
            tile[2 * i + 1] = c * cos[i] - a * sin[i];
        }
    }
}

#endif
