/* New tokens of keys and values take their places behind the recent ones.

   All fields have 8 bytes, in the order of `PushArguments` in `library.py`.
*/
#ifndef ROTORQUANT_PUSH_H
#define ROTORQUANT_PUSH_H

#include <string.h>

#include "attend.h"

typedef struct {
    int64_t d;
    Tensor from, to; /* (batch, heads, tokens, d) of one type, the second from its first free place */
} Pushed;

typedef struct {
    int64_t batch, heads, tokens;
    Pushed keys, values;
} Push;

/* Whether none of the numbers is NaN or infinite: their exponents have other bits than ones. */
static int all_finite(const uint8_t *from, int64_t type, int64_t count)
{
    int found = 0;
    if (type == FLOAT32) {
        const uint32_t *bits = (const uint32_t *)from;
        for (int64_t i = 0; i < count; i++)
            found |= (bits[i] & 0x7f800000) == 0x7f800000;
    } else {
        const uint16_t *bits = (const uint16_t *)from, ones = type == FLOAT16 ? 0x7c00 : 0x7f80;
        for (int64_t i = 0; i < count; i++)
            found |= (bits[i] & ones) == ones;
    }
    return !found;
}

static int push_side(const Push *push, const Pushed *side)
{
    int64_t type = side->from.type, size = side->d * element_size(type);
    for (int64_t b = 0; b < push->batch; b++)
        for (int64_t h = 0; h < push->heads; h++)
            for (int64_t t = 0; t < push->tokens; t++) {
                const uint8_t *token = place(&side->from, b, h, t);
                if (!all_finite(token, type, side->d))
                    return 0;
                memcpy((uint8_t *)place(&side->to, b, h, t), token, size);
            }
    return 1;
}

/* 0, or 1 if a number is NaN or infinite: the places are then still free, whatever they hold. */
static int push_tokens(const Push *push)
{
    return !(push_side(push, &push->keys) && push_side(push, &push->values));
}

#endif
