/* Statistics with AVX2 and FMA. */
#if defined(__x86_64__)
#define MOMENT moment_avx2
#define BLOCK block_avx2
#define HESSIAN hessian_avx2
#define USE_AVX2
#include "targets.h"
BEGIN_TARGET("avx2,fma,f16c")
#include "moment_body.h"
#include "block_body.h"
#include "hessian_body.h"
END_TARGET
#endif
