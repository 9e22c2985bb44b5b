/* Statistics with AVX-512, as server processors since 2017 have it. */
#if defined(__x86_64__)
#define MOMENT moment_avx512
#define BLOCK block_avx512
#define HESSIAN hessian_avx512
#define USE_AVX512
#include "targets.h"
BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "moment_body.h"
#include "block_body.h"
#include "hessian_body.h"
END_TARGET
#endif
