/* Columns: some vectors side by side, of which row i holds their coordinates i.

   One instruction then works on one coordinate of WIDTH vectors, and none has to add up the lanes
   of a register. What becomes of a vector does not depend on those beside it.
*/
#ifndef ROTORQUANT_COLUMNS_H
#define ROTORQUANT_COLUMNS_H

#include "tiles.h"

#if defined(USE_AVX512)
enum { PRODUCT_ROWS = 8 };
#else
enum { PRODUCT_ROWS = 4 }; /* with two vectors of each row, what 16 registers hold */
#endif

/* `rows` rows of out = M in, a constant. */
INLINE void multiply_rows(int rows, float *out, const float *m, int64_t row_step, int64_t step,
                          const float *in, int64_t size)
{
    for (int t = 0; t < TOKENS; t += 2 * WIDTH) {
        Floats sums[PRODUCT_ROWS][2] = {{{0}}};
        for (int64_t k = 0; k < size; k++) {
            Floats a = load(in + k * TOKENS + t), b = load(in + k * TOKENS + t + WIDTH);
            for (int r = 0; r < rows; r++) {
                Floats w = all(m[r * row_step + k * step]);
                sums[r][0] += w * a;
                sums[r][1] += w * b;
            }
        }
        for (int r = 0; r < rows; r++) {
            store(out + r * TOKENS + t, sums[r][0]);
            store(out + r * TOKENS + t + WIDTH, sums[r][1]);
        }
    }
}

/* out (rows, TOKENS) = M in, with in (size, TOKENS) and M[r][k] at m[r row_step + k step]. */
static void multiply(float *out, int64_t rows, const float *m, int64_t row_step, int64_t step,
                     const float *in, int64_t size)
{
    for (; rows >= PRODUCT_ROWS; rows -= PRODUCT_ROWS) {
        multiply_rows(PRODUCT_ROWS, out, m, row_step, step, in, size);
        out += PRODUCT_ROWS * TOKENS, m += PRODUCT_ROWS * row_step;
    }
    for (; rows > 0; rows--, out += TOKENS, m += row_step)
        multiply_rows(1, out, m, row_step, step, in, size);
}

/* Tokens of a tensor as columns, zeros behind the last. */
static void take_columns(float *out, const Tensor *x, int64_t d, int64_t b, int64_t h,
                         int64_t first, int count)
{
    int64_t size = element_size(x->type);
    for (int t = 0; t < count; t++) {
        const uint8_t *from = place(x, b, h, first + t), *end = from + d * size;
        float *to = out + t;
        if (x->type == FLOAT32)
            for (; from < end; from += 4, to += TOKENS)
                *to = number(from, FLOAT32);
        else if (x->type == BFLOAT16)
            for (; from < end; from += 2, to += TOKENS)
                *to = number(from, BFLOAT16);
        else
            for (; from < end; from += 2, to += TOKENS)
                *to = number(from, FLOAT16);
    }
    for (int64_t i = 0; i < d && count < TOKENS; i++)
        memset(out + i * TOKENS + count, 0, (TOKENS - count) * sizeof(float));
}

/* A row of a store, to be written. */
INLINE uint8_t *row_of(const Tensor *x, int64_t b, int64_t h, int64_t t)
{
    return (uint8_t *)place(x, b, h, t);
}

/* Codes (size, TOKENS), a byte each, into the planes of `count` rows: see `quant/packing.py`. */
static void pack(uint8_t *out, int64_t row, const uint8_t *codes, int bits, int64_t size, int count)
{
    int shift = 0;
    for (int plane = 0; plane < 3 && PLANES[bits][plane]; plane++) {
        int width = PLANES[bits][plane], mask = (1 << width) - 1;
        int64_t bytes = (size * width + 7) / 8;
        for (int64_t i = 0; i < bytes; i++) {
            uint8_t byte[TOKENS] = {0};
            for (int slot = 0; slot < 8 / width && slot * bytes + i < size; slot++) {
                const uint8_t *code = codes + (slot * bytes + i) * TOKENS;
                for (int t = 0; t < TOKENS; t++)
                    byte[t] |= (uint8_t)((code[t] >> shift & mask) << (slot * width));
            }
            for (int t = 0; t < count; t++)
                out[t * row + i] = byte[t];
        }
        out += bytes;
        shift += width;
    }
}

#endif
