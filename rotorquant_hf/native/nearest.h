/* The nearest centroid of each coordinate. */
#ifndef ROTORQUANT_NEAREST_H
#define ROTORQUANT_NEAREST_H

#include "vectors.h"

/* A code book, and its boundaries in two stages: all with the same four bits (or fewer) on top, and
   for codes of more bits the boundaries themselves. */
typedef struct {
    float coarse[15];
    const float *boundaries;
    Table table;
} CodeBook;

static CodeBook code_book(const float *boundaries, const float *centroids, int bits)
{
    CodeBook book = {.boundaries = boundaries, .table = table_of(centroids, bits)};
    int below = bits > 4 ? bits - 4 : 0;
    for (int i = 0; i < (1 << (bits - below)) - 1; i++)
        book.coarse[i] = boundaries[((i + 1) << below) - 1];
    return book;
}

/* The index, one more where y is above a boundary. */
INLINE Ints counted(Ints index, Floats y, Floats boundary)
{
#if defined(USE_AVX512)
    __mmask16 above = _mm512_cmp_ps_mask((__m512)y, (__m512)boundary, _CMP_GT_OQ);
    __m512i before = (__m512i)index;
    return (Ints)_mm512_mask_sub_epi32(before, above, before, _mm512_set1_epi32(-1));
#else
    return index - (y > boundary);
#endif
}

/* Entries of a table in memory. */
INLINE Floats gathered(const float *table, Ints index)
{
#if defined(USE_AVX512)
    return (Floats)_mm512_i32gather_ps((__m512i)index, table, 4);
#elif defined(USE_AVX2)
    return (Floats)_mm256_i32gather_ps(table, (__m256i)index, 4);
#else
    Floats found;
    for (int i = 0; i < WIDTH; i++)
        found[i] = table[index[i]];
    return found;
#endif
}

/* How many boundaries lie below; `bits` is a constant. Comparing with every boundary has no chain
   of steps that wait for one another as a search has; of more than 15 a search goes on. */
INLINE Ints nearest(const CodeBook *book, int bits, Floats y)
{
    int below = bits > 4 ? bits - 4 : 0;
    Ints odd = {0}, even = {0};
    for (int i = 0; i < (1 << (bits - below)) - 1; i++)
        if (i & 1)
            odd = counted(odd, y, all(book->coarse[i]));
        else
            even = counted(even, y, all(book->coarse[i]));
    Ints index = (odd + even) << below;
    for (int bit = below - 1; bit >= 0; bit--) {
        Ints upper = index + (1 << bit);
        Ints above = counted(all_ints(0), y, gathered(book->boundaries, upper - 1));
        index += above << bit;
    }
    return index;
}

/* Codes of WIDTH vectors, a byte each. */
INLINE void store_codes(uint8_t *to, Ints codes)
{
#if defined(USE_AVX512)
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8((__m512i)codes));
#else
    typedef uint8_t Bytes __attribute__((vector_size(WIDTH)));
    Bytes bytes = __builtin_convertvector(codes, Bytes);
    memcpy(to, &bytes, sizeof bytes);
#endif
}

#endif
