/* isa_avx512bf16.c: the kernels for AVX-512 with products of bf16 pairs, and of bytes (VNNI). */
#if defined(__x86_64__)
#define ISA_NAME "avx512bf16"
#define DOT_BF16_NATIVE 1
#define DOT_I8_NATIVE 1
#include "avx512.h"

static inline vf v_dot_bf16(vf w, vf x, vf acc) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x); }

#include "kernels.inc"

const cpu_kernels cpu_kernels_avx512bf16 = KERNELS;
#else
typedef int isa_avx512bf16_is_for_x86_64;
#endif
