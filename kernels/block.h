/* block.h: reductions over a warp and over a block, in an order that is always the same. All threads take part and get
 * the result; `shared` [warps of the block] is free again after the next barrier.
 */
#ifndef RAST_KERNELS_BLOCK_H
#define RAST_KERNELS_BLOCK_H

#include "launch.h"

static const unsigned ALL_LANES = 0xffffffffu;

template <class T> __device__ __forceinline__ T larger(T a, T b) { return b > a ? b : a; }
template <class T> __device__ __forceinline__ T smaller(T a, T b) { return b < a ? b : a; }

template <class T> __device__ __forceinline__ T warp_max(T x) {
    for (int i = 16; i > 0; i /= 2) x = larger(x, __shfl_xor_sync(ALL_LANES, x, i));
    return x;
}

template <class T> __device__ __forceinline__ T warp_min(T x) {
    for (int i = 16; i > 0; i /= 2) x = smaller(x, __shfl_xor_sync(ALL_LANES, x, i));
    return x;
}

template <class T> __device__ __forceinline__ T warp_sum(T x) {
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(ALL_LANES, x, i);
    return x;
}

/* Gives every thread all warps' values of x in `shared`. */
template <class T> __device__ __forceinline__ void share_by_warp(T x, T *shared) {
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
}

template <class T> __device__ T block_max(T x, T *shared) {
    share_by_warp(warp_max(x), shared);
    x = shared[0];
    for (unsigned w = 1; w < blockDim.x / 32; w++) x = larger(x, shared[w]);
    return x;
}

template <class T> __device__ T block_min(T x, T *shared) {
    share_by_warp(warp_min(x), shared);
    x = shared[0];
    for (unsigned w = 1; w < blockDim.x / 32; w++) x = smaller(x, shared[w]);
    return x;
}

template <class T> __device__ T block_sum(T x, T *shared) {
    share_by_warp(warp_sum(x), shared);
    x = shared[0];
    for (unsigned w = 1; w < blockDim.x / 32; w++) x += shared[w];
    return x;
}

#endif
