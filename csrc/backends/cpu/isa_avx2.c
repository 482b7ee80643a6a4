/* isa_avx2.c: the kernels for AVX2 with FMA and F16C. */
#if defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>

#define ISA_NAME "avx2"
#define LANES 8
#define TILE_W 4
#define TILE_X 2
#define STREAM_W 4

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

static inline vf v_fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static inline float v_sum(vf v) {
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
static inline vf v_load_bf16(const void *p) {
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16);
}
static inline vf v_load_f16(const void *p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128(p)); }
static inline void v_store_f16(void *p, vf v) {
    _mm_storeu_si128(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#include "kernels.inc"

const cpu_kernels cpu_kernels_avx2 = KERNELS;
#else
typedef int isa_avx2_is_for_x86_64;
#endif
