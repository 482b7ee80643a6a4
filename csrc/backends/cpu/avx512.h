/* avx512.h: the vector operations that all AVX-512 files give to kernels.inc; DOT_I8_NATIVE: with VNNI. */
#include <immintrin.h>
#include <stdint.h>

#define LANES 16
#define TILE_X 6
#define TILE_GROUPS 8

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

static inline vf v_fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
static inline vf v_load_bf16(const void *p) {
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16);
}
static inline vf v_load_f16(const void *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(p)); }
static inline void v_store_f16(void *p, vf v) {
    _mm256_storeu_si256(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

/* Lanes i and i + 8, then i and i + 4, of a and b, ... side by side; then in quarters. */
static inline void v_sum4(vf a, vf b, vf c, vf d, float *y) {
    const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44),
                                    _mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xee));
    const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4((__m512)c, (__m512)d, 0x44),
                                    _mm512_shuffle_f32x4((__m512)c, (__m512)d, 0xee));
    __m512 s = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4e));
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xb1));
    _mm_storeu_ps(y, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, s)));
}

/* A 4 x 4 transposition in each quarter, which holds rows 4q .. 4q + 3. */
static inline void v_rows16(const char *p, size_t stride, vi out[4]) {
    __m512i r[4];
    for (size_t i = 0; i < 4; i++) {
        const char *row = p + i * stride;
        r[i] = _mm512_castsi128_si512(_mm_loadu_si128((const void *)row));
        r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const void *)(row + 4 * stride)), 1);
        r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const void *)(row + 8 * stride)), 2);
        r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const void *)(row + 12 * stride)), 3);
    }
    const __m512i ab = _mm512_unpacklo_epi32(r[0], r[1]), cd = _mm512_unpacklo_epi32(r[2], r[3]);
    const __m512i ab2 = _mm512_unpackhi_epi32(r[0], r[1]), cd2 = _mm512_unpackhi_epi32(r[2], r[3]);
    out[0] = (vi)_mm512_unpacklo_epi64(ab, cd);
    out[1] = (vi)_mm512_unpackhi_epi64(ab, cd);
    out[2] = (vi)_mm512_unpacklo_epi64(ab2, cd2);
    out[3] = (vi)_mm512_unpackhi_epi64(ab2, cd2);
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
    const __m256i lo =
        _mm256_inserti128_si256(_mm256_castsi128_si256(rows4_of_4(p, stride)), rows4_of_4(p + 4 * stride, stride), 1);
    const __m256i hi = _mm256_inserti128_si256(_mm256_castsi128_si256(rows4_of_4(p + 8 * stride, stride)),
                                               rows4_of_4(p + 12 * stride, stride), 1);
    return (vi)_mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
}

static inline vf v_low_f16(vi v) { return (vf)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)v)); }
static inline vf v_high_f16(vi v) {
    return (vf)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)v, 16)));
}

static inline __m512i x_bytes(const int8_t *x, int j) { return _mm512_set1_epi32(load_i32(x + 4 * j)); }

#if DOT_I8_NATIVE
#define I8_OFFSET 128 /* the instruction wants one side unsigned */

/* Two sums, because one would wait for itself. */
static inline vi v_dot_u4(vi acc, const vi *w, const int8_t *x) {
    __m512i a = (__m512i)acc, b = _mm512_setzero_si512();
    for (int j = 0; j < 4; j++) {
        a = _mm512_dpbusd_epi32(a, (__m512i)w[j], x_bytes(x, j));
        b = _mm512_dpbusd_epi32(b, (__m512i)w[4 + j], x_bytes(x, 4 + j));
    }
    return (vi)_mm512_add_epi32(a, b);
}
static inline vi v_dot_i8(vi acc, const vi *w, const int8_t *x) { return v_dot_u4(acc, w, x); }
#else
#define I8_OFFSET 0

/* Pairs of products of bytes 0 .. 15 fit 16 bits eight times over; those of |w| and x with w's sign fit once. */
static inline vi v_dot_u4(vi acc, const vi *w, const int8_t *x) {
    __m512i sum = _mm512_setzero_si512();
    for (int j = 0; j < 8; j++) sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16((__m512i)w[j], x_bytes(x, j)));
    return acc + (vi)_mm512_madd_epi16(sum, _mm512_set1_epi16(1));
}
static inline vi v_dot_i8(vi acc, const vi *w, const int8_t *x) {
    for (int j = 0; j < 8; j++) {
        const __m512i wj = (__m512i)w[j], xj = x_bytes(x, j);
        const __m512i signed_x = _mm512_mask_sub_epi8(xj, _mm512_movepi8_mask(wj), _mm512_setzero_si512(), xj);
        const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(wj), signed_x);
        acc += (vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
    }
    return acc;
}
#endif
