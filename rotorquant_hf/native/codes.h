/* Codes of packed vectors, a vector of registers at a time, and their centroids. */
#ifndef ROTORQUANT_CODES_H
#define ROTORQUANT_CODES_H

#include "attend.h"
#include "vectors.h"

/* Widths of the planes of codes: see `quant/packing.py`. */
static const uint8_t PLANES[9][3] = {{0}, {1}, {2}, {2, 1}, {4}, {4, 1}, {4, 2}, {4, 2, 1}, {8}};

#define WIDEST(bits) PLANES[bits][0]
#define SLOTS(bits) (8 / WIDEST(bits)) /* codes that have a part in each byte of the widest plane */

/* Whether all planes of codes are of whole vectors, the narrower ones at least of half. */
static int ends_on_vectors(int bits, int64_t size)
{
    for (int n = 0; n < 3 && PLANES[bits][n]; n++) {
        int64_t width = PLANES[bits][n], bytes = size * width / 8;
        int half = n > 0 && 2 * bytes == WIDTH;
        if (size * width % 8 || (bytes % WIDTH && !half))
            return 0;
    }
    return 1;
}

/* Where the codes are that have a part in bytes i ... i + WIDTH - 1 of the widest plane: the same of
   every token. `bits` is a constant wherever there is a slice, so that nothing of this is computed
   at run time but what depends on i. */
typedef struct {
    int bits, planes;
    int64_t from[3]; /* the first byte, in the packed vector */
    /* Of narrower planes: whether there is but half a vector of them, which is read twice; where
       the bits go in a code; and how far down those of the widest plane's first slot are. */
    int half[3], up[3];
    Ints down[3];
} Slice;

INLINE Slice slice_of(int bits, int64_t size, int64_t i)
{
    const uint8_t *widths = PLANES[bits];
    Slice slice = {.bits = bits, .planes = widths[1] ? widths[2] ? 3 : 2 : 1, .from = {i}};
    int64_t end = size * widths[0] / 8;
    int up = widths[0];
    for (int n = 1; n < slice.planes; n++) {
        int64_t bytes = size * widths[n] / 8;
        int half = 2 * bytes == WIDTH;
        slice.half[n] = half;
        slice.from[n] = end + (half ? 0 : i % bytes);
        slice.down[n] = all_ints((int)(i / bytes));
        if (half)
            slice.down[n] += LANE / (WIDTH / 2);
        slice.down[n] *= widths[n];
        slice.up[n] = up;
        end += bytes;
        up += widths[n];
    }
    return slice;
}

/* The bytes of a slice of one packed vector, those of narrower planes moved to their places. Of 3
   bits: codes of even slots at bits 0 and 4, and of odd ones. */
typedef struct {
    Ints plane[3];
} Codes;

INLINE Codes codes_of(const Slice *slice, const uint8_t *packed)
{
    Codes codes = {{widened(packed + slice->from[0])}};
    for (int n = 1; n < slice->planes; n++) {
        const uint8_t *from = packed + slice->from[n];
        codes.plane[n] = slice->half[n] ? twice(from) : widened(from);
        if (slice->bits != 3)
            codes.plane[n] <<= slice->up[n];
    }
    if (slice->bits == 3) {
        Ints wide = codes.plane[0], narrow = codes.plane[1] >> slice->down[1];
        codes.plane[0] = choose_bits(all_ints(0x33), wide, narrow << 2);
        codes.plane[1] = choose_bits(all_ints(0x33), wide >> 2, narrow);
    }
    return codes;
}

/* Centroids of the codes in one slot of each byte. */
INLINE Floats centroids(const Slice *slice, const Table *table, const Codes *codes, int slot)
{
    const uint8_t *widths = PLANES[slice->bits];
    int down = slot * widths[0];
    if (slice->bits == 3)
        return look_up(table, 3, codes->plane[slot % 2] >> slot / 2 * 4);
    Ints code = codes->plane[0] >> down;
    if (slice->bits > 4)
        code &= (1 << widths[0]) - 1;
    for (int n = 1; n < slice->planes; n++) {
        int mask = ((1 << widths[n]) - 1) << slice->up[n];
        code |= codes->plane[n] >> (slice->down[n] + down) & mask;
    }
    return look_up(table, slice->bits, code);
}

#endif
