/* isa_avx512.c: the kernels for AVX-512 (F, BW, VL, DQ). */
#if defined(__x86_64__)
#define ISA_NAME "avx512"
#define DOT_BF16_NATIVE 0
#define DOT_I8_NATIVE 0
#include "avx512.h"
#include "kernels.inc"

const cpu_kernels cpu_kernels_avx512 = KERNELS;
#else
typedef int isa_avx512_is_for_x86_64;
#endif
