/* isa_avx2.c: the kernels for AVX2 with FMA and F16C. */
#if defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>

#define ISA_NAME "avx2"
#define LANES 8
#define TILE_X 2
#define DOT_BF16_NATIVE 0

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

static inline vf v_fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static inline vf v_load_bf16(const void *p) {
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16);
}
static inline vf v_load_f16(const void *p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128(p)); }
static inline void v_store_f16(void *p, vf v) {
    _mm_storeu_si128(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

/* Lanes i and i + 4 first, then a 4 x 4 transposition: i and i + 2, i and i + 1. */
static inline void v_sum4(vf a, vf b, vf c, vf d, float *y) {
    const __m256 ac = _mm256_add_ps(_mm256_permute2f128_ps((__m256)a, (__m256)c, 0x20),
                                    _mm256_permute2f128_ps((__m256)a, (__m256)c, 0x31));
    const __m256 bd = _mm256_add_ps(_mm256_permute2f128_ps((__m256)b, (__m256)d, 0x20),
                                    _mm256_permute2f128_ps((__m256)b, (__m256)d, 0x31));
    const __m256 s = _mm256_add_ps(_mm256_unpacklo_ps(ac, bd), _mm256_unpackhi_ps(ac, bd)); /* a0 b0 a1 b1, c0 d0 .. */
    const __m128 ab = _mm256_castps256_ps128(s), cd = _mm256_extractf128_ps(s, 1);
    _mm_storeu_ps(y, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
}

#include "kernels.inc"

const cpu_kernels cpu_kernels_avx2 = KERNELS;
#else
typedef int isa_avx2_is_for_x86_64;
#endif
