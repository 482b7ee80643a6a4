/* isa_avx512vnni.c: the kernels for AVX-512 with products of bytes (VNNI): the same results as isa_avx512.c's, sooner. */
#if defined(__x86_64__)
#define ISA_NAME "avx512"
#define DOT_BF16_NATIVE 0
#define DOT_I8_NATIVE 1
#include "avx512.h"
#include "kernels.inc"

const cpu_kernels cpu_kernels_avx512vnni = KERNELS;
#else
typedef int isa_avx512vnni_is_for_x86_64;
#endif
