/* Products with packed vectors, and sums of them, straight from their codes.

   As `products` and `add_sums` of the tile that `look_up_tile` makes, which is neither stored nor
   loaded: of few rows, as in decoding, that took a quarter of the time.
*/
#ifndef ROTORQUANT_FUSED_H
#define ROTORQUANT_FUSED_H

#include "tiles.h"

/* Vectors that stay in registers while tokens are summed up. */
#if defined(USE_AVX512) || defined(USE_NEON)
enum { SUMS_IN_REGISTERS = 16 };
#elif defined(USE_AVX2)
enum { SUMS_IN_REGISTERS = 8 };
#else
enum { SUMS_IN_REGISTERS = 0 };
#endif

/* Whether `fused_products` takes so many rows and such vectors. */
static int are_products_fused(int64_t rows, const Term *term)
{
    return SUMS_IN_REGISTERS > 0 && rows <= ROWS && term->bits <= 4 &&
           ends_on_vectors((int)term->bits, term->size);
}

/* Whether `fused_sums` does. */
static int are_sums_fused(int64_t rows, const Term *term)
{
    return are_products_fused(rows, term) && rows * SLOTS(term->bits) <= SUMS_IN_REGISTERS;
}

/* `rows` and `bits` are constants. Of `count` tokens, and none is read behind them. */
INLINE void products_of_codes(int rows, int bits, int64_t size, float *out, const float *a,
                              int64_t a_stride, const uint8_t *packed, int64_t row,
                              const Table *table, int count)
{
    int64_t bytes = size * WIDEST(bits) / 8;
    for (int t = 0; t < TOKENS; t += COLUMNS) {
        Floats sums[ROWS][COLUMNS];
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; c++) {
            /* The last token again instead of one that is not there. */
            const uint8_t *token = packed + (t + c < count ? t + c : count - 1) * row;
            Floats own[ROWS] = {{0}};
            for (int64_t i = 0; i < bytes; i += WIDTH) {
                Slice slice = slice_of(bits, size, i);
                Codes codes = codes_of(&slice, token);
                for (int slot = 0; slot < SLOTS(bits); slot++) {
                    Floats x = centroids(&slice, table, &codes, slot);
                    for (int r = 0; r < rows; r++)
                        own[r] += load(a + r * a_stride + slot * bytes + i) * x;
                }
            }
            for (int r = 0; r < ROWS; r++)
                sums[r][c] = own[r];
        }
        store_sums(rows, out + t, sums);
    }
}

/* `rows` and `bits` are constants. */
INLINE void sums_of_codes(int rows, int bits, int64_t size, float *out, int64_t out_stride,
                          const float *weights, const uint8_t *packed, int64_t row,
                          const Table *table, int count)
{
    int64_t bytes = size * WIDEST(bits) / 8;
    for (int64_t i = 0; i < bytes; i += WIDTH) {
        Slice slice = slice_of(bits, size, i);
        Floats sums[ROWS][8];
        for (int r = 0; r < rows; r++)
            for (int slot = 0; slot < SLOTS(bits); slot++)
                sums[r][slot] = load(out + r * out_stride + slot * bytes + i);
        for (int t = 0; t < count; t++) {
            Codes codes = codes_of(&slice, packed + t * row);
            for (int slot = 0; slot < SLOTS(bits); slot++) {
                Floats x = centroids(&slice, table, &codes, slot);
                for (int r = 0; r < rows; r++)
                    sums[r][slot] += all(weights[r * TOKENS + t]) * x;
            }
        }
        for (int r = 0; r < rows; r++)
            for (int slot = 0; slot < SLOTS(bits); slot++)
                store(out + r * out_stride + slot * bytes + i, sums[r][slot]);
    }
}

/* A function with its rows and bits as constants; of usual bits its usual sizes too, which leaves
   no slice to be found at run time. */
#define OF_ANY_SIZE(FUNCTION, ROWS_, BITS, ...) \
    case BITS: \
        FUNCTION(ROWS_, BITS, size, __VA_ARGS__); \
        break;
#define OF_USUAL_SIZE(FUNCTION, ROWS_, BITS, ...) \
    case BITS: \
        if (size == 64) \
            FUNCTION(ROWS_, BITS, 64, __VA_ARGS__); \
        else if (size == 128) \
            FUNCTION(ROWS_, BITS, 128, __VA_ARGS__); \
        else \
            FUNCTION(ROWS_, BITS, size, __VA_ARGS__); \
        break;
#define OF_ROWS(FUNCTION, ROWS_, ...) \
    case ROWS_: \
        switch (term->bits) { \
            OF_ANY_SIZE(FUNCTION, ROWS_, 1, __VA_ARGS__) \
            OF_USUAL_SIZE(FUNCTION, ROWS_, 2, __VA_ARGS__) \
            OF_USUAL_SIZE(FUNCTION, ROWS_, 3, __VA_ARGS__) \
            OF_USUAL_SIZE(FUNCTION, ROWS_, 4, __VA_ARGS__) \
        } \
        break;
#define FUSED(FUNCTION, ...) \
    int64_t row = term->codes.stride_t, size = term->size; \
    const uint8_t *packed = place(&term->codes, b, h, first); \
    Table table = table_of(term->table, (int)term->bits); \
    switch (rows) { \
        OF_ROWS(FUNCTION, 1, __VA_ARGS__, packed, row, &table, count) \
        OF_ROWS(FUNCTION, 2, __VA_ARGS__, packed, row, &table, count) \
        OF_ROWS(FUNCTION, 3, __VA_ARGS__, packed, row, &table, count) \
        OF_ROWS(FUNCTION, 4, __VA_ARGS__, packed, row, &table, count) \
    }

/* As `products` of the tile of a term's tokens. */
static void fused_products(int64_t rows, float *out, const float *a, int64_t a_stride,
                           const Term *term, int64_t b, int64_t h, int64_t first, int count)
{
    FUSED(products_of_codes, out, a, a_stride)
}

/* As `add_sums` of the tile of a term's tokens. */
static void fused_sums(int64_t rows, float *out, int64_t out_stride, const float *weights,
                       const Term *term, int64_t b, int64_t h, int64_t first, int count)
{
    FUSED(sums_of_codes, out, out_stride, weights)
}

#endif
