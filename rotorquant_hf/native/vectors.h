/* Vectors of WIDTH floats, for whatever processor the file that includes this is compiled for.

   Arithmetic is that of the compiler's vector types (GCC and Clang). What these lack, looking up
   centroids, is written with intrinsics where the processor has an instruction for it. An ARM
   processor of 64 bits always has NEON: what is compiled for any processor takes it there.
*/
#ifndef ROTORQUANT_VECTORS_H
#define ROTORQUANT_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(USE_AVX512)
#include <immintrin.h>
#define WIDTH 16
#elif defined(USE_AVX2)
#include <immintrin.h>
#define WIDTH 8
#else
#define WIDTH 4
#if defined(__aarch64__)
#include <arm_neon.h>
#define USE_NEON
#endif
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));

INLINE Floats load(const float *from)
{
    Floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store(float *to, Floats x) { memcpy(to, &x, sizeof x); }

INLINE Floats all(float x) { return x - (Floats){0}; }

/* Bits of a where the mask has them, of b where not. */
INLINE Ints choose_bits(Ints mask, Ints a, Ints b)
{
#if defined(USE_AVX512)
    return (Ints)_mm512_ternarylogic_epi32((__m512i)mask, (__m512i)a, (__m512i)b, 0xca);
#else
    return (mask & a) | (~mask & b);
#endif
}

INLINE Floats choose(Ints mask, Floats a, Floats b)
{
    return (Floats)choose_bits(mask, (Ints)a, (Ints)b);
}

/* b if either is NaN. */
INLINE Floats larger(Floats a, Floats b)
{
#if defined(USE_AVX512)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(USE_AVX2)
    return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return choose(a > b, a, b);
#endif
}

INLINE float sum(Floats x)
{
#if defined(USE_AVX512)
    return _mm512_reduce_add_ps((__m512)x);
#elif defined(USE_NEON)
    return vaddvq_f32((float32x4_t)x);
#else
    float total = 0;
    for (int i = 0; i < WIDTH; i++)
        total += x[i];
    return total;
#endif
}

/* e^x of x <= 0, 0 below -87; to 2 units in the last place.

   2^k e^r with k the integer nearest to x / ln 2, and e^r by its Taylor polynomial: |r| <= 0.35. */
INLINE Floats exponential(Floats x)
{
    Floats scaled = larger(x, all(-88.0f)) * all(1.44269504f);
    Floats nearest = (scaled + all(12582912.0f)) - all(12582912.0f);
    Floats r = (larger(x, all(-88.0f)) - nearest * all(0.693359375f)) +
               nearest * all(2.12194440e-4f);
    Floats p = all(1.0f / 5040);
    p = p * r + all(1.0f / 720);
    p = p * r + all(1.0f / 120);
    p = p * r + all(1.0f / 24);
    p = p * r + all(1.0f / 6);
    p = p * r + all(0.5f);
    p = p * r + all(1.0f);
    p = p * r + all(1.0f);
    Ints power = (__builtin_convertvector(nearest, Ints) + 127) << 23;
    return choose(x < all(-87.0f), all(0.0f), p * (Floats)power);
}

INLINE float from_half(uint16_t x)
{
    /* Exponent and mantissa to their places, and 2^112 for the difference of the biases. */
    uint32_t magnitude = (uint32_t)(x & 0x7fff) << 13, sign = (uint32_t)(x & 0x8000) << 16, bits;
    float value;
    memcpy(&value, &magnitude, 4);
    value *= 5.192296858534828e33f;
    memcpy(&bits, &value, 4);
    bits |= sign | ((x & 0x7c00) == 0x7c00 ? 0x7f800000u : 0);
    memcpy(&value, &bits, 4);
    return value;
}

/* The nearest float16, of two the even one. */
INLINE uint16_t to_half(float x)
{
    uint32_t bits, sign;
    memcpy(&bits, &x, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits >= 0x47800000) /* 65536 and more, infinity, NaN */
        return (uint16_t)(sign | (bits > 0x7f800000 ? 0x7e00 : 0x7c00));
    if (bits < 0x38800000) { /* subnormal: the last place of 0.5 is 2^-24 */
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, 4);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    bits += 0xfff + (bits >> 13 & 1) - 0x38000000;
    return (uint16_t)(sign | bits >> 13);
}

INLINE float from_bfloat(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE Ints all_ints(int x) { return x - (Ints){0}; }

#if defined(USE_AVX512)
static const Ints LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(USE_AVX2)
static const Ints LANE = {0, 1, 2, 3, 4, 5, 6, 7};
#else
static const Ints LANE = {0, 1, 2, 3};
#endif

/* WIDTH bytes as integers. */
INLINE Ints widened(const uint8_t *from)
{
#if defined(USE_AVX512)
    return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif defined(USE_AVX2)
    return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#elif defined(USE_NEON)
    uint32_t bytes;
    memcpy(&bytes, from, 4);
    return (Ints)vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes))));
#else
    return (Ints){from[0], from[1], from[2], from[3]};
#endif
}

/* Half as many bytes, twice. */
INLINE Ints twice(const uint8_t *from)
{
#if defined(USE_AVX512)
    int64_t half;
    memcpy(&half, from, 8);
    return (Ints)_mm512_cvtepu8_epi32(_mm_set1_epi64x(half));
#elif defined(USE_AVX2)
    int32_t half;
    memcpy(&half, from, 4);
    return (Ints)_mm256_cvtepu8_epi32(_mm_set1_epi32(half));
#else
    return (Ints){from[0], from[1], from[0], from[1]};
#endif
}

/* A table of centroids, (2^bits,); a small one in registers too, one of less than a register over
   and over. */
typedef struct {
    const float *entries;
    Floats part[4];
} Table;

INLINE Table table_of(const float *entries, int bits)
{
    Table table = {.entries = entries};
    int size = 1 << bits;
    for (int n = 0; n < 4 && (n == 0 || n * WIDTH < size); n++) {
        float some[WIDTH];
        for (int i = 0; i < WIDTH; i++)
            some[i] = entries[(n * WIDTH + i) & (size - 1)];
        table.part[n] = load(some);
    }
    return table;
}

/* Entries of a table. Of at most 16 codes may have bits above their own. */
INLINE Floats look_up(const Table *table, int bits, Ints codes)
{
#if defined(USE_AVX512)
    __m512i at = (__m512i)codes;
    if (bits <= 4)
        return (Floats)_mm512_permutexvar_ps(at, (__m512)table->part[0]);
    if (bits > 6)
        return (Floats)_mm512_i32gather_ps(at, table->entries, 4);
    __m512 low = _mm512_permutex2var_ps((__m512)table->part[0], at, (__m512)table->part[1]);
    if (bits == 5)
        return (Floats)low;
    __m512 high = _mm512_permutex2var_ps((__m512)table->part[2], at, (__m512)table->part[3]);
    __mmask16 is_high = _mm512_test_epi32_mask(at, _mm512_set1_epi32(32));
    return (Floats)_mm512_mask_blend_ps(is_high, low, high);
#elif defined(USE_AVX2)
    if (bits > 4)
        return (Floats)_mm256_i32gather_ps(table->entries, (__m256i)codes, 4);
    __m256 low = _mm256_permutevar8x32_ps((__m256)table->part[0], (__m256i)codes);
    if (bits <= 3)
        return (Floats)low;
    __m256 high = _mm256_permutevar8x32_ps((__m256)table->part[1], (__m256i)codes);
    return (Floats)_mm256_blendv_ps(low, high, (__m256)_mm256_slli_epi32((__m256i)codes, 28));
#elif defined(USE_NEON)
    if (bits <= 4) {
        /* The four bytes of entry c are bytes 4 c ... 4 c + 3 of the table. */
        uint32x4_t own = (uint32x4_t)(codes & ((1 << bits) - 1));
        uint8x16_t at = (uint8x16_t)(own * 0x04040404 + 0x03020100);
        uint8x16x4_t bytes;
        for (int n = 0; n < 4; n++)
            bytes.val[n] = (uint8x16_t)table->part[n];
        if (bits <= 2)
            return (Floats)vqtbl1q_u8(bytes.val[0], at);
        if (bits == 3)
            return (Floats)vqtbl2q_u8((uint8x16x2_t){{bytes.val[0], bytes.val[1]}}, at);
        return (Floats)vqtbl4q_u8(bytes, at);
    }
    return (Floats){table->entries[codes[0]], table->entries[codes[1]], table->entries[codes[2]],
                    table->entries[codes[3]]};
#else
    Floats found;
    for (int i = 0; i < WIDTH; i++)
        found[i] = table->entries[codes[i] & ((1 << bits) - 1)];
    return found;
#endif
}

INLINE float largest(Floats x)
{
#if defined(USE_AVX512)
    return _mm512_reduce_max_ps((__m512)x);
#elif defined(USE_NEON)
    return vmaxnmvq_f32((float32x4_t)x);
#else
    float found = x[0];
    for (int i = 1; i < WIDTH; i++)
        found = x[i] > found ? x[i] : found;
    return found;
#endif
}

#endif
