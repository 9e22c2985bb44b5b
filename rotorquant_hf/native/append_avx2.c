/* Coding with AVX2 and FMA. */
#if defined(__x86_64__)
#define APPEND append_avx2
#define USE_AVX2
#include "targets.h"
BEGIN_TARGET("avx2,fma,f16c")
#include "append_body.h"
END_TARGET
#endif
