/* isa_portable.c: the kernels for any machine. */
#include <stdint.h>
#include <string.h>

#define ISA_NAME "portable"
#define LANES 4
#define TILE_X 2
#define TILE_GROUPS 4
#define DOT_BF16_NATIVE 0

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

static inline vf v_fma(vf a, vf b, vf c) { return a * b + c; }

static inline float half_to_float(uint16_t h) {
    uint32_t bits = (uint32_t)(h & 0x7fff) << 13;
    float f;
    memcpy(&f, &bits, sizeof f);
    f *= 0x1p112f; /* the exponent's new bias; subnormals too */
    memcpy(&bits, &f, sizeof f);
    if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000;
    bits |= (uint32_t)(h & 0x8000) << 16;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static inline uint16_t float_to_half(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (bits >= 0x47800000) return (uint16_t)(sign | 0x7c00); /* 65536 and more */
    if (bits < 0x38800000) {                                  /* subnormal: the sum's last bit is worth 2^-24 */
        float magnitude;
        memcpy(&magnitude, &bits, sizeof magnitude);
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, sizeof bits);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    bits += 0xfff + (bits >> 13 & 1) - ((127u - 15u) << 23);
    return (uint16_t)(sign | bits >> 13);
}

static inline vf v_load_bf16(const void *p) {
    typedef uint32_t wide __attribute__((vector_size(4 * LANES)));
    uint16_t h __attribute__((vector_size(2 * LANES)));
    memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, wide) << 16);
}

static inline vf v_load_f16(const void *p) {
    uint16_t h[LANES];
    vf v;
    memcpy(h, p, sizeof h);
    for (int i = 0; i < LANES; i++) v[i] = half_to_float(h[i]);
    return v;
}

static inline void v_store_f16(void *p, vf v) {
    uint16_t h[LANES];
    for (int i = 0; i < LANES; i++) h[i] = float_to_half(v[i]);
    memcpy(p, h, sizeof h);
}

static inline void v_sum4(vf a, vf b, vf c, vf d, float *y) {
    const vf all[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) y[i] = (all[i][0] + all[i][2]) + (all[i][1] + all[i][3]);
}

static inline vi v_rows4(const char *p, size_t stride) {
    int32_t words[LANES];
    vi v;
    for (size_t i = 0; i < LANES; i++) memcpy(&words[i], p + i * stride, sizeof *words);
    memcpy(&v, words, sizeof v);
    return v;
}

static inline void v_rows16(const char *p, size_t stride, vi out[4]) {
    for (size_t j = 0; j < 4; j++) out[j] = v_rows4(p + 4 * j, stride);
}

static inline vf v_low_f16(vi v) {
    vf f;
    for (int i = 0; i < LANES; i++) f[i] = half_to_float((uint16_t)v[i]);
    return f;
}
static inline vf v_high_f16(vi v) { return v_low_f16(v >> 16); }

#define I8_OFFSET 0

/* Even and odd bytes apart, in 16 bits, which a pair of products fits. */
static inline vi v_dot_i8(vi acc, const vi *w, const int8_t *x) {
    typedef int16_t pairs __attribute__((vector_size(4 * LANES)));
    typedef uint16_t upairs __attribute__((vector_size(4 * LANES)));
    typedef uint32_t words __attribute__((vector_size(4 * LANES)));
    for (int j = 0; j < 8; j++) {
        int32_t four;
        memcpy(&four, x + 4 * j, sizeof four);
        const pairs a = (pairs)w[j], b = (pairs)((vi){0} + four);
        const pairs even = ((pairs)((upairs)a << 8) >> 8) * ((pairs)((upairs)b << 8) >> 8), odd = (a >> 8) * (b >> 8);
        const vi sum = (vi)(even + odd);
        acc += (sum >> 16) + ((vi)((words)sum << 16) >> 16);
    }
    return acc;
}
static inline vi v_dot_u4(vi acc, const vi *w, const int8_t *x) { return v_dot_i8(acc, w, x); }

#include "kernels.inc"

const cpu_kernels cpu_kernels_portable = KERNELS;
