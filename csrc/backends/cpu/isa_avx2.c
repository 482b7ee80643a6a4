/* isa_avx2.c: the kernels for AVX2 with FMA and F16C. */
#if defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>

#define ISA_NAME "avx2"
#define LANES 8
#define TILE_X 2
#define TILE_GROUPS 4
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

/* A 4 x 4 transposition in each half, which holds rows 4h .. 4h + 3. */
static inline void v_rows16(const char *p, size_t stride, vi out[4]) {
    __m256i r[4];
    for (size_t i = 0; i < 4; i++) {
        const char *row = p + i * stride;
        r[i] = _mm256_castsi128_si256(_mm_loadu_si128((const void *)row));
        r[i] = _mm256_inserti128_si256(r[i], _mm_loadu_si128((const void *)(row + 4 * stride)), 1);
    }
    const __m256i ab = _mm256_unpacklo_epi32(r[0], r[1]), cd = _mm256_unpacklo_epi32(r[2], r[3]);
    const __m256i ab2 = _mm256_unpackhi_epi32(r[0], r[1]), cd2 = _mm256_unpackhi_epi32(r[2], r[3]);
    out[0] = (vi)_mm256_unpacklo_epi64(ab, cd);
    out[1] = (vi)_mm256_unpackhi_epi64(ab, cd);
    out[2] = (vi)_mm256_unpacklo_epi64(ab2, cd2);
    out[3] = (vi)_mm256_unpackhi_epi64(ab2, cd2);
}

static inline int32_t load_i32(const void *p) {
    int32_t i;
    __builtin_memcpy(&i, p, sizeof i);
    return i;
}

static inline __m128i rows4_of_4(const char *p, size_t stride) {
    __m128i v = _mm_cvtsi32_si128(load_i32(p));
    v = _mm_insert_epi32(v, load_i32(p + stride), 1);
    v = _mm_insert_epi32(v, load_i32(p + 2 * stride), 2);
    return _mm_insert_epi32(v, load_i32(p + 3 * stride), 3);
}

static inline vi v_rows4(const char *p, size_t stride) {
    return (vi)_mm256_inserti128_si256(_mm256_castsi128_si256(rows4_of_4(p, stride)),
                                       rows4_of_4(p + 4 * stride, stride), 1);
}

static inline vf halves_to_floats(__m256i v) { /* in the low half of each lane, zeros above */
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0x08);
    return (vf)_mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}
static inline vf v_low_f16(vi v) { return halves_to_floats(_mm256_and_si256((__m256i)v, _mm256_set1_epi32(0xffff))); }
static inline vf v_high_f16(vi v) { return halves_to_floats(_mm256_srli_epi32((__m256i)v, 16)); }

#define I8_OFFSET 0

static inline __m256i x_bytes(const int8_t *x, int j) { return _mm256_set1_epi32(load_i32(x + 4 * j)); }

/* Pairs of products of bytes 0 .. 15 fit 16 bits eight times over; those of |w| and x with w's sign fit once. */
static inline vi v_dot_u4(vi acc, const vi *w, const int8_t *x) {
    __m256i sum = _mm256_setzero_si256();
    for (int j = 0; j < 8; j++) sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16((__m256i)w[j], x_bytes(x, j)));
    return acc + (vi)_mm256_madd_epi16(sum, _mm256_set1_epi16(1));
}
static inline vi v_dot_i8(vi acc, const vi *w, const int8_t *x) {
    for (int j = 0; j < 8; j++) {
        const __m256i wj = (__m256i)w[j], signed_x = _mm256_sign_epi8(x_bytes(x, j), wj);
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(wj), signed_x);
        acc += (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
    return acc;
}

#include "kernels.inc"

const cpu_kernels cpu_kernels_avx2 = KERNELS;
#else
typedef int isa_avx2_is_for_x86_64;
#endif
