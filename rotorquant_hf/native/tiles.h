/* Tiles: a few tokens as float32, rows of `stride` floats, zeros behind the last channel. */
#ifndef ROTORQUANT_TILES_H
#define ROTORQUANT_TILES_H

#include "codes.h"
#include "plain.h"

enum { TOKENS = 32, MAX_SIZE = 4096 };

/* Codes of a vector, a byte each. */
static void unpack(uint8_t *codes, const uint8_t *packed, int bits, int64_t size)
{
    int shift = 0;
    for (int plane = 0; plane < 3 && PLANES[bits][plane]; plane++) {
        int width = PLANES[bits][plane], mask = (1 << width) - 1;
        int64_t bytes = (size * width + 7) / 8;
        for (int64_t i = 0; i < size; i++) {
            int code = (packed[i % bytes] >> (i / bytes * width) & mask) << shift;
            codes[i] = (uint8_t)(shift ? codes[i] | code : code);
        }
        packed += bytes;
        shift += width;
    }
}

/* Centroids of packed tokens, not scaled, of planes that end on vectors; `bits` is a constant. */
INLINE void look_up_vectors(float *tile, int64_t stride, const uint8_t *packed, int64_t row,
                            int bits, int64_t size, const Table *table, int count)
{
    int64_t bytes = size * WIDEST(bits) / 8;
    for (int64_t i = 0; i < bytes; i += WIDTH) {
        Slice slice = slice_of(bits, size, i);
        for (int t = 0; t < count; t++) {
            float *out = tile + t * stride + i;
            Codes codes = codes_of(&slice, packed + t * row);
            for (int slot = 0; slot < SLOTS(bits); slot++)
                store(out + slot * bytes, centroids(&slice, table, &codes, slot));
        }
    }
}

static void look_up_tile(float *tile, int64_t stride, const Term *term, int64_t b, int64_t h,
                         int64_t first, int count)
{
    int bits = (int)term->bits;
    int64_t size = term->size, row = term->codes.stride_t;
    const uint8_t *packed = place(&term->codes, b, h, first);
    Table table = table_of(term->table, bits);
    if (ends_on_vectors(bits, size)) {
        switch (bits) {
#define CASE(BITS) \
    case BITS: \
        look_up_vectors(tile, stride, packed, row, BITS, size, &table, count); \
        break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
        }
    } else {
        uint8_t codes[MAX_SIZE];
        for (int t = 0; t < count; t++) {
            unpack(codes, packed + t * row, bits, size);
            for (int64_t i = 0; i < size; i++)
                tile[t * stride + i] = term->table[codes[i]];
        }
    }
    for (int t = 0; t < count; t++)
        for (int64_t i = size; i < stride; i++)
            tile[t * stride + i] = 0;
}

/* One number of each token. */
static void copy_scales(float *scales, const Tensor *x, int64_t b, int64_t h, int64_t first,
                        int count)
{
    const uint8_t *from = place(x, b, h, first);
#if defined(USE_AVX512) || defined(USE_AVX2)
    if (x->type == FLOAT16 && x->stride_t == 1 && count == TOKENS) {
        for (int t = 0; t < TOKENS; t += 8)
            _mm256_storeu_ps(scales + t,
                             _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 2 * t))));
        return;
    }
#elif defined(USE_NEON)
    if (x->type == FLOAT16 && x->stride_t == 1 && count == TOKENS) {
        for (int t = 0; t < TOKENS; t += 4) {
            float16x4_t some;
            memcpy(&some, from + 2 * t, 8);
            store(scales + t, (Floats)vcvt_f32_f16(some));
        }
        return;
    }
#endif
    for (int t = 0; t < count; t++)
        scales[t] = number(from + t * x->stride_t * element_size(x->type), x->type);
    for (int t = count; t < TOKENS; t++)
        scales[t] = 0;
}

#define ROWS 4
#if defined(USE_AVX512)
#define COLUMNS 4
#else
#define COLUMNS 2
#endif

#if defined(USE_AVX512) || defined(USE_AVX2)
/* Sums over the lanes of four vectors, side by side in every 128 bits. */
INLINE Floats sums_by_four(const Floats *x)
{
#if defined(USE_AVX512)
#define LOW_PS(a, b) (Floats)_mm512_unpacklo_ps((__m512)(a), (__m512)(b))
#define HIGH_PS(a, b) (Floats)_mm512_unpackhi_ps((__m512)(a), (__m512)(b))
#define LOW_PD(a, b) (Floats)_mm512_unpacklo_pd((__m512d)(a), (__m512d)(b))
#define HIGH_PD(a, b) (Floats)_mm512_unpackhi_pd((__m512d)(a), (__m512d)(b))
#else
#define LOW_PS(a, b) (Floats)_mm256_unpacklo_ps((__m256)(a), (__m256)(b))
#define HIGH_PS(a, b) (Floats)_mm256_unpackhi_ps((__m256)(a), (__m256)(b))
#define LOW_PD(a, b) (Floats)_mm256_unpacklo_pd((__m256d)(a), (__m256d)(b))
#define HIGH_PD(a, b) (Floats)_mm256_unpackhi_pd((__m256d)(a), (__m256d)(b))
#endif
    Floats first = LOW_PS(x[0], x[1]) + HIGH_PS(x[0], x[1]);
    Floats second = LOW_PS(x[2], x[3]) + HIGH_PS(x[2], x[3]);
    return LOW_PD(first, second) + HIGH_PD(first, second);
}
#endif

/* out[r][c] = the sum over the lanes of sums[r][c]. */
INLINE void store_sums(int rows, float *out, Floats sums[ROWS][COLUMNS])
{
#if defined(USE_AVX512)
    __m512 x[ROWS];
    for (int r = 0; r < ROWS; r++)
        x[r] = (__m512)sums_by_four(sums[r]);
    __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(x[0], x[1], 0x88),
                             _mm512_shuffle_f32x4(x[0], x[1], 0xdd));
    __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(x[2], x[3], 0x88),
                             _mm512_shuffle_f32x4(x[2], x[3], 0xdd));
    Floats all_rows = (Floats)_mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88),
                                            _mm512_shuffle_f32x4(a, b, 0xdd));
#elif defined(USE_AVX2)
    __m256 a = (__m256)sums_by_four(sums[0]), b = (__m256)sums_by_four(sums[2]);
    Floats all_rows = (Floats)_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20),
                                            _mm256_permute2f128_ps(a, b, 0x31));
#else
    float all_rows[ROWS * COLUMNS];
    for (int i = 0; i < ROWS * COLUMNS; i++)
        all_rows[i] = sum(sums[i / COLUMNS][i % COLUMNS]);
#endif
    for (int r = 0; r < rows; r++)
        memcpy(out + r * TOKENS, (const float *)&all_rows + r * COLUMNS, COLUMNS * sizeof(float));
}

/* out[r][t] = <a[r], tile[t]> of `rows` rows, a constant of at most ROWS, and all tokens. */
INLINE void products_of(int rows, float *out, const float *a, int64_t a_stride, const float *tile,
                        int64_t stride)
{
    for (int t = 0; t < TOKENS; t += COLUMNS) {
        Floats sums[ROWS][COLUMNS] = {{{0}}};
        for (int64_t i = 0; i < stride; i += WIDTH) {
            Floats x[COLUMNS];
            for (int c = 0; c < COLUMNS; c++)
                x[c] = load(tile + (t + c) * stride + i);
            for (int r = 0; r < rows; r++) {
                Floats y = load(a + r * a_stride + i);
                for (int c = 0; c < COLUMNS; c++)
                    sums[r][c] += y * x[c];
            }
        }
        store_sums(rows, out + t, sums);
    }
}

static void products(int64_t rows, float *out, const float *a, int64_t a_stride, const float *tile,
                     int64_t stride)
{
    for (; rows >= 4; rows -= 4, out += 4 * TOKENS, a += 4 * a_stride)
        products_of(4, out, a, a_stride, tile, stride);
    if (rows == 3)
        products_of(3, out, a, a_stride, tile, stride);
    if (rows == 2)
        products_of(2, out, a, a_stride, tile, stride);
    if (rows == 1)
        products_of(1, out, a, a_stride, tile, stride);
}

/* out[r] += sum over tokens of weights[r][t] tile[t]. */
INLINE void sums_of(int rows, float *out, int64_t out_stride, const float *weights,
                    const float *tile, int64_t stride, int count)
{
    int64_t i = 0;
    for (; i + COLUMNS * WIDTH <= stride; i += COLUMNS * WIDTH) {
        Floats sums[ROWS][COLUMNS];
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < COLUMNS; c++)
                sums[r][c] = load(out + r * out_stride + i + c * WIDTH);
        for (int t = 0; t < count; t++) {
            Floats x[COLUMNS];
            for (int c = 0; c < COLUMNS; c++)
                x[c] = load(tile + t * stride + i + c * WIDTH);
            for (int r = 0; r < rows; r++) {
                Floats w = all(weights[r * TOKENS + t]);
                for (int c = 0; c < COLUMNS; c++)
                    sums[r][c] += w * x[c];
            }
        }
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < COLUMNS; c++)
                store(out + r * out_stride + i + c * WIDTH, sums[r][c]);
    }
    for (; i < stride; i += WIDTH)
        for (int r = 0; r < rows; r++) {
            Floats s = load(out + r * out_stride + i);
            for (int t = 0; t < count; t++)
                s += all(weights[r * TOKENS + t]) * load(tile + t * stride + i);
            store(out + r * out_stride + i, s);
        }
}

static void add_sums(int64_t rows, float *out, int64_t out_stride, const float *weights,
                     const float *tile, int64_t stride, int count)
{
    for (; rows >= 4; rows -= 4, out += 4 * out_stride, weights += 4 * TOKENS)
        sums_of(4, out, out_stride, weights, tile, stride, count);
    if (rows == 3)
        sums_of(3, out, out_stride, weights, tile, stride, count);
    if (rows == 2)
        sums_of(2, out, out_stride, weights, tile, stride, count);
    if (rows == 1)
        sums_of(1, out, out_stride, weights, tile, stride, count);
}

#endif
