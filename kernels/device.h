/* device.h: what the kernels share: addresses, element types, vector loads and stores, reductions.
 *
 * Loads and stores take the type at run time where a kernel is bound by memory, and as a template argument where it is not.
 * A vector of n elements wants an address aligned to its size.
 */
#ifndef RAST_DEVICE_H
#define RAST_DEVICE_H

#include "launch.h"

#include "kernels.h"

#include <cstdint>
#include <cstring>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace rast {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

/* ---- host ---------------------------------------------------------------------------------------------------------- */

struct models { /* an address for each model, as a kernel argument */
    rast_dev data[RAST_KERNEL_MODELS];
};

inline models models_of(const rast_weight *const *w, int32_t n) {
    models all = {};
    for (int32_t i = 0; i < n; i++) all.data[i] = w[i]->data;
    return all;
}

inline models models_of(const rast_dev *base, int32_t n) {
    models all = {};
    for (int32_t i = 0; i < n; i++) all.data[i] = base[i];
    return all;
}

inline bool aligned(const models &all, int32_t n, size_t bytes) {
    for (int32_t i = 0; i < n; i++)
        if (all.data[i] % bytes) return false;
    return true;
}

__host__ __device__ inline size_t type_bytes(int32_t type) { return type == RAST_F32 ? 4 : 2; }
inline unsigned ceil_div(size_t n, size_t by) { return static_cast<unsigned>((n + by - 1) / by); }
inline unsigned whole_warps(size_t threads) { return ceil_div(threads, WARP) * WARP; }
inline int32_t cap_of(const rast_pass &pass, int extent) {
    return extent == RAST_OF_ROWS ? pass.cap_rows : pass.cap_out;
}

/* ---- addresses ----------------------------------------------------------------------------------------------------- */

template <class T> __device__ __forceinline__ T *address(rast_dev d) {
    return reinterpret_cast<T *>(static_cast<uintptr_t>(d));
}
__device__ __forceinline__ const int32_t *ints(rast_dev d) { return address<const int32_t>(d); }

/* ---- types: 32 bits as two elements, and back, rounded to nearest even ---------------------------------------------- */

template <class T> __device__ __forceinline__ float2 unpack(uint32_t bits);
template <> __device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t bits) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}
template <> __device__ __forceinline__ float2 unpack<__half>(uint32_t bits) {
    __half2 pair;
    memcpy(&pair, &bits, sizeof pair);
    return __half22float2(pair);
}

template <class T> __device__ __forceinline__ uint32_t pack(float low, float high);
template <> __device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}
template <> __device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T> __device__ __forceinline__ T rounded(float x);
template <> __device__ __forceinline__ float rounded<float>(float x) { return x; }
template <> __device__ __forceinline__ __nv_bfloat16 rounded<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ __half rounded<__half>(float x) { return __float2half_rn(x); }

/* ---- vectors of N elements: 1, or 4 to 16 bytes --------------------------------------------------------------------- */

template <class T, int N> struct vector {
    static_assert(sizeof(T) == 2 && (N == 2 || N == 4 || N == 8), "4 to 16 bytes");
    static __device__ __forceinline__ void load(const T *p, float *out) {
        uint32_t words[N / 2];
        if constexpr (N == 2) {
            words[0] = *reinterpret_cast<const uint32_t *>(p);
        } else if constexpr (N == 4) {
            const uint2 w = *reinterpret_cast<const uint2 *>(p);
            words[0] = w.x, words[1] = w.y;
        } else {
            const uint4 w = *reinterpret_cast<const uint4 *>(p);
            words[0] = w.x, words[1] = w.y, words[2] = w.z, words[3] = w.w;
        }
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            const float2 pair = unpack<T>(words[i]);
            out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
        }
    }
    static __device__ __forceinline__ void store(T *p, const float *in) {
        uint32_t words[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; i++) words[i] = pack<T>(in[2 * i], in[2 * i + 1]);
        if constexpr (N == 2)
            *reinterpret_cast<uint32_t *>(p) = words[0];
        else if constexpr (N == 4)
            *reinterpret_cast<uint2 *>(p) = make_uint2(words[0], words[1]);
        else
            *reinterpret_cast<uint4 *>(p) = make_uint4(words[0], words[1], words[2], words[3]);
    }
};

template <class T> struct vector<T, 1> {
    static __device__ __forceinline__ void load(const T *p, float *out) { *out = to_float(*p); }
    static __device__ __forceinline__ void store(T *p, const float *in) { *p = rounded<T>(*in); }
};

template <> struct vector<float, 1> {
    static __device__ __forceinline__ void load(const float *p, float *out) { *out = *p; }
    static __device__ __forceinline__ void store(float *p, const float *in) { *p = *in; }
};

template <> struct vector<float, 2> {
    static __device__ __forceinline__ void load(const float *p, float *out) {
        const float2 v = *reinterpret_cast<const float2 *>(p);
        out[0] = v.x, out[1] = v.y;
    }
    static __device__ __forceinline__ void store(float *p, const float *in) {
        *reinterpret_cast<float2 *>(p) = make_float2(in[0], in[1]);
    }
};

template <> struct vector<float, 4> {
    static __device__ __forceinline__ void load(const float *p, float *out) {
        const float4 v = *reinterpret_cast<const float4 *>(p);
        out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
    }
    static __device__ __forceinline__ void store(float *p, const float *in) {
        *reinterpret_cast<float4 *>(p) = make_float4(in[0], in[1], in[2], in[3]);
    }
};

/* N elements from element i on of an array of `type`. */
template <int N> __device__ __forceinline__ void load(const void *p, int32_t type, size_t i, float *out) {
    if (type == RAST_F32)
        vector<float, N>::load(static_cast<const float *>(p) + i, out);
    else if (type == RAST_BF16)
        vector<__nv_bfloat16, N>::load(static_cast<const __nv_bfloat16 *>(p) + i, out);
    else
        vector<__half, N>::load(static_cast<const __half *>(p) + i, out);
}

template <int N> __device__ __forceinline__ void store(void *p, int32_t type, size_t i, const float *in) {
    if (type == RAST_F32)
        vector<float, N>::store(static_cast<float *>(p) + i, in);
    else if (type == RAST_BF16)
        vector<__nv_bfloat16, N>::store(static_cast<__nv_bfloat16 *>(p) + i, in);
    else
        vector<__half, N>::store(static_cast<__half *>(p) + i, in);
}

/* ---- reductions: every lane of the warp takes part and gets the result ----------------------------------------------- */

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int o = WARP / 2; o; o /= 2) x += __shfl_xor_sync(ALL_LANES, x, o);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int o = WARP / 2; o; o /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, o));
    return x;
}

} // namespace rast
#endif
