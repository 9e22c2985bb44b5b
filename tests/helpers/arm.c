/* What the native library needs of a system where there is none: memory, and five functions of the
   host's (`arm.py`), which sees the call by its number.
*/
#include <stddef.h>
#include <stdint.h>

#define HOST(number) __asm__ volatile("svc #" #number "\n ret")

__attribute__((naked)) float expf(float x) { HOST(1); }
__attribute__((naked)) float tanhf(float x) { HOST(2); }
__attribute__((naked)) float powf(float x, float y) { HOST(3); }
__attribute__((naked)) float cosf(float x) { HOST(4); }
__attribute__((naked)) float sinf(float x) { HOST(5); }

static uint8_t heap[1 << 26] __attribute__((aligned(64)));
static size_t used;

/* Of a call, whose blocks are all freed at its end. */
void *aligned_alloc(size_t alignment, size_t size)
{
    size_t begin = (used + alignment - 1) / alignment * alignment;
    if (begin + size > sizeof heap)
        return NULL;
    used = begin + size;
    return heap + begin;
}

void free(void *memory) { used = (size_t)((uint8_t *)memory - heap); }

void *memcpy(void *to, const void *from, size_t size)
{
    for (size_t i = 0; i < size; i++)
        ((volatile uint8_t *)to)[i] = ((const uint8_t *)from)[i];
    return to;
}

void *memset(void *to, int value, size_t size)
{
    for (size_t i = 0; i < size; i++)
        ((volatile uint8_t *)to)[i] = (uint8_t)value;
    return to;
}
