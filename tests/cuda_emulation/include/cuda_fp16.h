/* cuda_fp16.h: IEEE half precision as a storage type with conversions (round to nearest even) and float arithmetic. */
#ifndef CUDA_EMULATION_FP16_H
#define CUDA_EMULATION_FP16_H

#include "cuda_emulation.h"

namespace cuda_emulation {
static inline float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = h & 0x7fffu;
    if (rest >= 0x7c00u) return cuda_emulation_bits<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
    /* Exponents and mantissa move into place; a multiplication by 2^112 rebiases, subnormals too. */
    float magnitude = cuda_emulation_bits<float>(rest << 13) * 5.192296858534828e33f;
    return cuda_emulation_bits<float>(sign | cuda_emulation_bits<uint32_t>(magnitude));
}
static inline uint16_t float_to_half(float f) {
    uint32_t bits = cuda_emulation_bits<uint32_t>(f), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return (uint16_t)0x7fffu; /* CUDA's NaN */
    if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);
    if (rest < 0x38800000u) { /* subnormal: the addition rounds to multiples of 2^-24 */
        float shifted = cuda_emulation_bits<float>(rest) + 0.5f;
        return (uint16_t)(sign | (cuda_emulation_bits<uint32_t>(shifted) - 0x3f000000u));
    }
    return (uint16_t)(sign | ((rest + 0xfffu + ((rest >> 13) & 1u) - 0x38000000u) >> 13));
}
} // namespace cuda_emulation

struct __half_raw {
    unsigned short x;
};

struct __half {
    unsigned short bits;
    __half() = default;
    __half(float f) : bits(cuda_emulation::float_to_half(f)) {}
    __half(double f) : bits(cuda_emulation::float_to_half((float)f)) {}
    __half(int v) : bits(cuda_emulation::float_to_half((float)v)) {}
    __half(__half_raw r) : bits(r.x) {}
    operator float() const { return cuda_emulation::half_to_float(bits); }
    operator __half_raw() const { return {bits}; }
};
struct alignas(4) __half2 {
    __half x, y;
    __half2() = default;
    __half2(__half x_, __half y_) : x(x_), y(y_) {}
};
using half = __half;
using half2 = __half2;

static inline float __half2float(__half h) { return cuda_emulation::half_to_float(h.bits); }
static inline __half __float2half(float f) { return __half(f); }
static inline __half __float2half_rn(float f) { return __half(f); }
static inline unsigned short __half_as_ushort(__half h) { return h.bits; }
static inline __half __ushort_as_half(unsigned short v) { return __half(__half_raw{v}); }
static inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
static inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
static inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
static inline __half2 __float2half2_rn(float a) { return {__half(a), __half(a)}; }
static inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
static inline __half __low2half(__half2 v) { return v.x; }
static inline __half __high2half(__half2 v) { return v.y; }
static inline float __low2float(__half2 v) { return __half2float(v.x); }
static inline float __high2float(__half2 v) { return __half2float(v.y); }

static inline __half operator+(__half a, __half b) { return __half((float)a + (float)b); }
static inline __half operator-(__half a, __half b) { return __half((float)a - (float)b); }
static inline __half operator*(__half a, __half b) { return __half((float)a * (float)b); }
static inline __half operator/(__half a, __half b) { return __half((float)a / (float)b); }

#endif
