/* The library: what this processor runs of it, and a module for Python to find it by. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <string.h>

#include "append.h"
#include "attend.h"
#include "push.h"

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

EXPORT int rotorquant_attend(const Arguments *arguments, const char *level, Team team, int threads)
{
#if defined(__x86_64__)
    if (!strcmp(level, "avx512"))
        return attend_avx512(arguments, team, threads);
    if (!strcmp(level, "avx2"))
        return attend_avx2(arguments, team, threads);
#endif
    return attend_portable(arguments, team, threads);
}

EXPORT int rotorquant_append(const Coding *coding, const char *level, Team team, int threads)
{
#if defined(__x86_64__)
    if (!strcmp(level, "avx512"))
        return append_avx512(coding, team, threads);
    if (!strcmp(level, "avx2"))
        return append_avx2(coding, team, threads);
#endif
    return append_portable(coding, team, threads);
}

EXPORT int rotorquant_push(const Push *push) { return push_tokens(push); }

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_library", NULL, -1, NULL};

PyMODINIT_FUNC PyInit__library(void) { return PyModule_Create(&module); }
