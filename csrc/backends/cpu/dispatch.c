/* dispatch.c: which kernels this machine can run. */
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

extern const cpu_kernels cpu_kernels_portable, cpu_kernels_avx2, cpu_kernels_avx512, cpu_kernels_avx512vnni,
    cpu_kernels_avx512bf16;

#if defined(__x86_64__)
static int has_f16c(void) { /* not every compiler's __builtin_cpu_supports knows it */
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}
#endif

size_t cpu_kernels_available(const cpu_kernels *out[8]) {
    size_t n = 0;
    out[n++] = &cpu_kernels_portable;
#if defined(__x86_64__)
    __builtin_cpu_init(); /* asks the operating system too whether it keeps the wide registers */
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
        out[n++] = &cpu_kernels_avx2;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
            const int vnni = __builtin_cpu_supports("avx512vnni"); /* the same results under the same name */
            out[n++] = vnni ? &cpu_kernels_avx512vnni : &cpu_kernels_avx512;
            if (vnni && __builtin_cpu_supports("avx512bf16")) out[n++] = &cpu_kernels_avx512bf16;
        }
    }
#endif
    return n;
}
