/* The library: what this processor runs of it, and a module for Python to find it by. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <string.h>

#include "append.h"
#include "attend.h"
#include "push.h"
#include "statistics.h"

#define EXPORT __attribute__((visibility("default")))

/* The levels that this processor has, from the best down. */
EXPORT const char *rotorquant_level(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return "avx512";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
        return "avx2";
#endif
    return "portable";
}

#if defined(__x86_64__)
#define RUN(NAME, ...) \
    (!strcmp(level, "avx512")  ? NAME##_avx512(__VA_ARGS__) \
     : !strcmp(level, "avx2") ? NAME##_avx2(__VA_ARGS__) \
                              : NAME##_portable(__VA_ARGS__))
#else
#define RUN(NAME, ...) ((void)level, NAME##_portable(__VA_ARGS__))
#endif

EXPORT int rotorquant_attend(const Arguments *arguments, const char *level, Team team, int threads)
{
    return RUN(attend, arguments, team, threads);
}

EXPORT int rotorquant_append(const Coding *coding, const char *level, Team team, int threads)
{
    return RUN(append, coding, team, threads);
}

EXPORT int rotorquant_moment(const Moment *moment, const char *level, Team team, int threads)
{
    return RUN(moment, moment, team, threads);
}

EXPORT int rotorquant_block(const Block *block, const char *level, Team team, int threads)
{
    return RUN(block, block, team, threads);
}

EXPORT int rotorquant_hessian(const Hessian *hessian, const char *level, Team team, int threads)
{
    return RUN(hessian, hessian, team, threads);
}

EXPORT int rotorquant_push(const Push *push) { return push_tokens(push); }

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_library", NULL, -1, NULL};

PyMODINIT_FUNC PyInit__library(void) { return PyModule_Create(&module); }
