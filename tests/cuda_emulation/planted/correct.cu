// correct.cu: kernels without a fault; no flavour of the emulation may report anything.
#include "kernels/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <mma.h>

namespace {

// out[block] = sum of in[block * blockDim ..], by shuffles in a warp and shared memory between warps.
template <int THREADS> __global__ void sum_kernel(const float *in, float *out) {
    __shared__ float partial[THREADS / 32];
    float v = in[blockIdx.x * THREADS + threadIdx.x];
    for (int d = 16; d; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x < 32) {
        v = threadIdx.x < THREADS / 32 ? partial[threadIdx.x] : 0.0f;
        for (int d = 16; d; d /= 2) v += __shfl_down_sync(0xffffffffu, v, d);
        if (threadIdx.x == 0) out[blockIdx.x] = v;
    }
}

// Reverses each block's elements, `rounds` times, in dynamic shared memory.
__global__ void reverse_kernel(const int *in, int *out, int rounds) {
    RAST_DYNAMIC_SHARED(int, tile);
    const unsigned t = threadIdx.x, n = blockDim.x;
    int v = in[blockIdx.x * n + t];
    for (int r = 0; r < rounds; r++) {
        tile[t] = v;
        __syncthreads();
        v = tile[n - 1 - t];
        __syncthreads();
    }
    out[blockIdx.x * n + t] = v;
}

// Neighbours in a warp exchange by shared memory and __syncwarp.
__global__ void exchange_kernel(const int *in, int *out) {
    __shared__ int tile[64];
    const unsigned t = threadIdx.x;
    tile[t] = in[t];
    __syncwarp();
    const int v = tile[t ^ 1];
    __syncwarp();
    tile[t] = v + 1;
    __syncwarp();
    out[t] = tile[t ^ 1];
}

// The last block sums what all blocks left (fences and an atomic counter).
__global__ void last_block_kernel(const int *in, int *partial, unsigned *counter, int *out) {
    __shared__ int last;
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = in[blockIdx.x] * 2;
        __threadfence();
        last = atomicAdd(counter, 1u) == gridDim.x - 1;
        if (last) __threadfence();
    }
    __syncthreads();
    if (!last) return;
    if (threadIdx.x == 0) {
        int sum = 0;
        for (unsigned b = 0; b < gridDim.x; b++) sum += partial[b];
        *out = sum;
    }
}

// c = a b, 16x16x16, one warp; a row-major, b column-major.
template <class T> __global__ void product_kernel(const T *a, const T *b, float *c) {
    using namespace nvcuda;
    wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> fa;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> fb;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> fc;
    wmma::fill_fragment(fc, 0.0f);
    wmma::load_matrix_sync(fa, a, 16);
    wmma::load_matrix_sync(fb, b, 16);
    wmma::mma_sync(fc, fa, fb, fc);
    for (int i = 0; i < fc.num_elements; i++) fc.x[i] *= 2.0f;
    wmma::store_matrix_sync(c, fc, 16, wmma::mem_row_major);
}

// out: [12, n] results of votes, shuffles, predicates and atomics, by thread.
__global__ void operations_kernel(const int *in, int *out, int *total) {
    const unsigned t = threadIdx.x, n = blockDim.x;
    const int v = in[t];
    const unsigned lower = t % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
    out[0 * n + t] = (int)__ballot_sync(0xffffffffu, v > 0);
    out[1 * n + t] = __any_sync(0xffffffffu, v > 6) + 2 * __all_sync(0xffffffffu, v > -9);
    out[2 * n + t] = __shfl_sync(0xffffffffu, v, 3);
    out[3 * n + t] = __shfl_sync(0xffffffffu, v, 3, 8);
    out[4 * n + t] = __shfl_up_sync(0xffffffffu, v, 2);
    out[5 * n + t] = __shfl_down_sync(0xffffffffu, v, 5, 16);
    out[6 * n + t] = __shfl_xor_sync(0xffffffffu, v, 9, 16);
    if (t % 32 < 16)
        out[7 * n + t] = __shfl_xor_sync(lower, v, 1);
    else
        out[7 * n + t] = (int)__ballot_sync(lower, v > 0);
    out[8 * n + t] = __syncthreads_count(v > 0);
    out[9 * n + t] = __syncthreads_or(v == 7) + 2 * __syncthreads_and(v < 100);
    atomicAdd(&total[0], v);
    atomicMax(&total[1], v);
    atomicMin(&total[2], v);
    atomicOr((unsigned *)&total[3], (unsigned)v);
    atomicAdd((float *)&total[4], (float)v);
    out[10 * n + t] = (int)(__popc((unsigned)v) + 100 * __clz(v) + 10000 * __ffs(v));
    out[11 * n + t] = __float_as_int(__shfl_sync(0xffffffffu, (float)v, 1)) ^ (int)__brev((unsigned)v);
}

__global__ void copy_kernel(const float *in, float *out, int n) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) out[i] = in[i];
}

__global__ void strided_kernel(const float *in, float *out, int stride) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    out[i] = in[(size_t)i * (size_t)stride];
}

// Column sums of in [rows, gridDim.x * blockDim.x].
__global__ void rows_kernel(const float *in, float *out, int rows) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    float sum = 0.0f;
    for (int r = 0; r < rows; r++) sum += in[(size_t)r * gridDim.x * blockDim.x + i];
    out[i] = sum;
}

__global__ void vector_kernel(const float4 *in, float4 *out) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = in[i];
}

__global__ void order_kernel(unsigned *counter, unsigned *ticket) {
    ticket[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1u);
}

// Copies a thread's element of each of `n` tiles, a group each; every third tile is zeros. out: [2, n, 32], the tiles behind a wait
// that leaves out `prior` groups, and behind one for all. Tiles that may be missing are read only to `peek`: a race.
__global__ void groups_kernel(const int *in, int *out, int n, int prior, int peek) {
    RAST_DYNAMIC_SHARED(int, tile);
    const int t = (int)threadIdx.x;
    for (int i = 0; i < n; i++) {
        __pipeline_memcpy_async(&tile[32 * i + t], &in[32 * i + t], 4, i % 3 == 2 ? 4 : 0);
        __pipeline_commit();
    }
    __pipeline_wait_prior((size_t)prior);
    for (int i = 0; i < (peek ? n : n - prior); i++) out[32 * i + t] = tile[32 * i + t];
    __pipeline_wait_prior(0);
    for (int i = 0; i < n; i++) out[32 * (n + i) + t] = tile[32 * i + t];
}

// A block's shared memory as it finds it.
__global__ void fresh_kernel(unsigned *out) {
    __shared__ unsigned fixed[4];
    RAST_DYNAMIC_SHARED(unsigned, tile);
    out[2 * blockIdx.x] = fixed[1];
    out[2 * blockIdx.x + 1] = tile[3];
    fixed[1] = tile[3] = 5;
}

template <class T, class F> __global__ void convert_kernel(const float *in, T *out, float *back, int n, F round) {
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
        out[i] = round(in[i]);
        back[i] = (float)out[i];
    }
}

// y[i] = y[i] * a + b, for orders of streams.
__global__ void affine_kernel(float *y, float a, float b) { y[threadIdx.x] = y[threadIdx.x] * a + b; }

} // namespace

extern "C" {
void launch_sum(const float *in, float *out, int blocks) {
    RAST_LAUNCH(sum_kernel<128>, blocks, 128, 0, nullptr, in, out);
}
void launch_reverse(const int *in, int *out, int blocks, int threads, int rounds, size_t shared) {
    RAST_LAUNCH(reverse_kernel, blocks, threads, shared, nullptr, in, out, rounds);
}
cudaError_t allow_reverse(int bytes) {
    return cudaFuncSetAttribute(reverse_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
void launch_exchange(const int *in, int *out) { RAST_LAUNCH(exchange_kernel, 1, 64, 0, nullptr, in, out); }
void launch_last_block(const int *in, int *partial, unsigned *counter, int *out, int blocks) {
    RAST_LAUNCH(last_block_kernel, blocks, 64, 0, nullptr, in, partial, counter, out);
}
void launch_product_bf16(const void *a, const void *b, float *c) {
    RAST_LAUNCH((product_kernel<__nv_bfloat16>), 1, 32, 0, nullptr, static_cast<const __nv_bfloat16 *>(a),
                static_cast<const __nv_bfloat16 *>(b), c);
}
void launch_product_half(const void *a, const void *b, float *c) {
    RAST_LAUNCH((product_kernel<__half>), 1, 32, 0, nullptr, static_cast<const __half *>(a),
                static_cast<const __half *>(b), c);
}
void launch_operations(const int *in, int *out, int *total, int threads) {
    RAST_LAUNCH(operations_kernel, 1, threads, 0, nullptr, in, out, total);
}
void launch_copy(const float *in, float *out, int n, dim3 *grid, dim3 *block, cudaStream_t stream) {
    RAST_LAUNCH(copy_kernel, *grid, *block, 0, stream, in, out, n);
}
void launch_strided(const float *in, float *out, int n, int stride) {
    RAST_LAUNCH(strided_kernel, n / 64, 64, 0, nullptr, in, out, stride);
}
void launch_rows(const float *in, float *out, int n, int rows) {
    RAST_LAUNCH(rows_kernel, n / 64, 64, 0, nullptr, in, out, rows);
}
void launch_vector(const float *in, float *out, int n) {
    RAST_LAUNCH(vector_kernel, n / 256, 64, 0, nullptr, reinterpret_cast<const float4 *>(in),
                reinterpret_cast<float4 *>(out));
}
void launch_order(unsigned *counter, unsigned *ticket, int blocks, int threads) {
    RAST_LAUNCH(order_kernel, blocks, threads, 0, nullptr, counter, ticket);
}
void launch_groups(const int *in, int *out, int n, int prior, int peek) {
    RAST_LAUNCH(groups_kernel, 1, 32, (size_t)n * 128, nullptr, in, out, n, prior, peek);
}
void launch_fresh(unsigned *out, int blocks) { RAST_LAUNCH(fresh_kernel, blocks, 1, 16, nullptr, out); }
void launch_convert_half(const float *in, void *out, float *back, int n) {
    auto round = [](float v) { return __float2half_rn(v); };
    RAST_LAUNCH((convert_kernel<__half, decltype(round)>), 1, 64, 0, nullptr, in, static_cast<__half *>(out), back, n,
                round);
}
void launch_convert_bf16(const float *in, void *out, float *back, int n) {
    auto round = [](float v) { return __float2bfloat16_rn(v); };
    RAST_LAUNCH((convert_kernel<__nv_bfloat16, decltype(round)>), 1, 64, 0, nullptr, in,
                static_cast<__nv_bfloat16 *>(out), back, n, round);
}
void launch_affine(float *y, float a, float b, cudaStream_t stream) {
    RAST_LAUNCH(affine_kernel, 1, 32, 0, stream, y, a, b);
}
}
