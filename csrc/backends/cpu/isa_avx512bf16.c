/* isa_avx512bf16.c: the kernels for AVX-512 with products of bf16 pairs. */
#if defined(__x86_64__)
#define ISA_NAME "avx512bf16"
#define DOT_BF16_NATIVE
#define STREAM_W 1
#include <stddef.h>

#include "avx512.h"

static inline __attribute__((always_inline)) void dot_tile_bf16(const char *w, size_t w_stride, int nw, const char *x,
                                                                size_t x_stride, int nx, size_t k, float *y,
                                                                size_t y_stride, int prefetch);

#include "kernels.inc"

/* 32 values of each row from `at` on; fewer at the end of a row, with zeros behind. */
#define DOT_STEP(LOAD)                                                                                                 \
    do {                                                                                                               \
        for (int j = 0; j < nx; j++) xv[j] = (__m512bh)LOAD(x + (size_t)j * x_stride + at * 2);                        \
        for (int i = 0; i < nw; i++) {                                                                                 \
            const char *p = w + (size_t)i * w_stride + at * 2;                                                         \
            if (prefetch) _mm_prefetch(p + PREFETCH, _MM_HINT_T0);                                                     \
            const __m512bh wv = (__m512bh)LOAD(p);                                                                     \
            for (int j = 0; j < nx; j++) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], wv, xv[j]);                           \
        }                                                                                                              \
    } while (0)
#define LOAD_ALL(p) _mm512_loadu_si512(p)
#define LOAD_PART(p) _mm512_maskz_loadu_epi16(live, p)

/* As dot_tile, 32 pairs a vector; one accumulator a result. */
static inline __attribute__((always_inline)) void dot_tile_bf16(const char *w, size_t w_stride, int nw, const char *x,
                                                                size_t x_stride, int nx, size_t k, float *y,
                                                                size_t y_stride, int prefetch) {
    __m512 acc[TILE_W][TILE_X];
    __m512bh xv[TILE_X];
    for (int i = 0; i < nw; i++)
        for (int j = 0; j < nx; j++) acc[i][j] = _mm512_setzero_ps();
    size_t at = 0;
    for (; at + 32 <= k; at += 32) DOT_STEP(LOAD_ALL);
    if (at < k) {
        const __mmask32 live = ((__mmask32)1 << (k - at)) - 1;
        DOT_STEP(LOAD_PART);
    }
    for (int i = 0; i < nw; i++)
        for (int j = 0; j < nx; j++) y[(size_t)j * y_stride + (size_t)i] = v_sum((vf)acc[i][j]);
}

const cpu_kernels cpu_kernels_avx512bf16 = KERNELS;
#else
typedef int isa_avx512bf16_is_for_x86_64;
#endif
