// faults.cu: `faults NAME wrong` runs a small program with one fault, which a flavour of the emulation must report with kernel
// and line; `faults NAME right` runs it without, and nothing may be reported. Lines marked FAULT are where reports must point.
#include "kernels/launch.h"

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_pipeline_primitives.h>
#include <mma.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace {

template <class T> T *device(size_t n, int byte = 0) {
    T *p;
    if (cudaMalloc(&p, n * sizeof(T)) || cudaMemset(p, byte, n * sizeof(T))) abort();
    return p;
}

/* ---- races ----------------------------------------------------------------------------------------------------------- */

__global__ void block_race_kernel(int *out, bool right) {
    __shared__ int tile[64];
    tile[threadIdx.x] = (int)threadIdx.x;
    if (right) __syncthreads();
    out[threadIdx.x] = tile[63 - threadIdx.x]; // FAULT block_race
}
void block_race(bool right) { RAST_LAUNCH(block_race_kernel, 1, 64, 0, nullptr, device<int>(64), right); }

// The barrier that is missing is the second: the next round's writes meet this round's reads.
__global__ void missing_barrier_kernel(int *out, bool right) {
    RAST_DYNAMIC_SHARED(int, tile);
    int sum = 0;
    for (int round = 0; round < 3; round++) {
        tile[threadIdx.x] = (int)threadIdx.x + round; // FAULT missing_barrier
        __syncthreads();
        sum += tile[63 - threadIdx.x];
        if (right) __syncthreads();
    }
    out[threadIdx.x] = sum;
}
void missing_barrier(bool right) { RAST_LAUNCH(missing_barrier_kernel, 1, 64, 256, nullptr, device<int>(64), right); }

__global__ void warp_race_kernel(int *out, bool right) {
    __shared__ int tile[32];
    tile[threadIdx.x] = (int)threadIdx.x;
    if (right) __syncwarp();
    out[threadIdx.x] = tile[threadIdx.x ^ 1]; // FAULT warp_race
}
void warp_race(bool right) { RAST_LAUNCH(warp_race_kernel, 1, 32, 0, nullptr, device<int>(32), right); }

// A shuffle is no barrier for memory.
__global__ void shuffle_race_kernel(int *out, bool right) {
    __shared__ int tile[32];
    tile[threadIdx.x] = (int)threadIdx.x;
    if (right)
        __syncwarp();
    else
        __shfl_xor_sync(0xffffffffu, 1, 1);
    out[threadIdx.x] = tile[threadIdx.x ^ 1]; // FAULT shuffle_race
}
void shuffle_race(bool right) { RAST_LAUNCH(shuffle_race_kernel, 1, 32, 0, nullptr, device<int>(32), right); }

// A __syncwarp orders its own warp only.
__global__ void other_warp_kernel(int *out, bool right) {
    __shared__ int tile[64];
    tile[threadIdx.x] = (int)threadIdx.x;
    __syncwarp();
    out[threadIdx.x] = tile[right ? threadIdx.x ^ 1 : threadIdx.x ^ 32]; // FAULT other_warp
}
void other_warp(bool right) { RAST_LAUNCH(other_warp_kernel, 1, 64, 0, nullptr, device<int>(64), right); }

// Nor does the second warp's, coming after the first's, order anything between the two.
__global__ void later_warp_kernel(int *out, bool right) {
    __shared__ int tile[32];
    if (threadIdx.x < 32) tile[threadIdx.x] = (int)threadIdx.x;
    __syncwarp();
    if (right) __syncthreads();
    if (threadIdx.x >= 32) out[threadIdx.x] = tile[threadIdx.x - 32]; // FAULT later_warp
}
void later_warp(bool right) { RAST_LAUNCH(later_warp_kernel, 1, 64, 0, nullptr, device<int>(64), right); }

// Copies that run beside the thread: nobody has waited, not even for the thread's own.
__global__ void missing_wait_kernel(const int *in, int *out, bool right) {
    __shared__ int tile[64];
    __pipeline_memcpy_async(&tile[threadIdx.x], &in[threadIdx.x], 4);
    __pipeline_commit();
    if (right) __pipeline_wait_prior(0);
    out[threadIdx.x] = tile[threadIdx.x]; // FAULT missing_wait
    __pipeline_wait_prior(0);
}
void missing_wait(bool right) {
    RAST_LAUNCH(missing_wait_kernel, 1, 64, 0, nullptr, device<int>(64), device<int>(64), right);
}

// The wait is there, but comes after the barrier that tells the others.
__global__ void late_wait_kernel(const int *in, int *out, bool right) {
    __shared__ int tile[64];
    __pipeline_memcpy_async(&tile[threadIdx.x], &in[threadIdx.x], 4);
    __pipeline_commit();
    if (right) __pipeline_wait_prior(0);
    __syncthreads();
    if (!right) __pipeline_wait_prior(0);
    out[threadIdx.x] = tile[63 - threadIdx.x]; // FAULT late_wait
}
void late_wait(bool right) {
    RAST_LAUNCH(late_wait_kernel, 1, 64, 0, nullptr, device<int>(64), device<int>(64), right);
}

// Tiles of 64 in two stages, the next under way. Wrong: a wait for too few groups, no commit, no barrier behind the last reads.
__global__ void stages_kernel(const int *in, int *out, int n, bool waits, bool commits, bool shared) {
    __shared__ int tile[2][64];
    const unsigned t = threadIdx.x;
    int sum = 0;
    __pipeline_memcpy_async(&tile[0][t], &in[t], 4);
    __pipeline_commit();
    for (int i = 0; i < n; i++) {
        if (i + 1 < n)
            __pipeline_memcpy_async(&tile[(i + 1) % 2][t], &in[(i + 1) * 64 + (int)t], 4); // FAULT reused_stage
        if (commits) __pipeline_commit();
        __pipeline_wait_prior(waits ? 1 : 2);
        __syncthreads();
        sum += tile[i % 2][63 - t]; // FAULT short_wait missing_commit
        if (shared) __syncthreads();
    }
    out[t] = sum;
}
void run_stages(bool waits, bool commits, bool shared) {
    RAST_LAUNCH(stages_kernel, 1, 64, 0, nullptr, device<int>(4 * 64), device<int>(64), 4, waits, commits, shared);
}
void short_wait(bool right) { run_stages(right, true, true); }
void missing_commit(bool right) { run_stages(true, right, true); }
void reused_stage(bool right) { run_stages(true, true, right); }

// What is copied changes before the wait.
__global__ void changed_source_kernel(int *in, int *out, bool right) {
    __shared__ int tile[32];
    __pipeline_memcpy_async(&tile[threadIdx.x], &in[threadIdx.x], 4);
    __pipeline_commit();
    if (right) __pipeline_wait_prior(0);
    in[threadIdx.x] = 1; // FAULT changed_source
    __pipeline_wait_prior(0);
    out[threadIdx.x] = tile[threadIdx.x];
}
void changed_source(bool right) {
    RAST_LAUNCH(changed_source_kernel, 1, 32, 0, nullptr, device<int>(32), device<int>(32), right);
}

// Blocks write the same element.
__global__ void grid_race_kernel(int *out, bool right) {
    out[right ? blockIdx.x : 0] = (int)blockIdx.x; // FAULT grid_race
}
void grid_race(bool right) { RAST_LAUNCH(grid_race_kernel, 4, 1, 0, nullptr, device<int>(4), right); }

// The same, by threads of equal number, and before a barrier.
__global__ void grid_barrier_race_kernel(int *out, bool right) {
    out[right ? blockIdx.x * 32 + threadIdx.x : threadIdx.x] = (int)blockIdx.x; // FAULT grid_barrier_race
    __syncthreads();
}
void grid_barrier_race(bool right) {
    RAST_LAUNCH(grid_barrier_race_kernel, 4, 32, 0, nullptr, device<int>(128), right);
}

__global__ void fence_kernel(int *partial, unsigned *counter, int *out, bool right) {
    partial[blockIdx.x] = (int)blockIdx.x;
    if (right) __threadfence();
    if (atomicAdd(counter, 1u) != gridDim.x - 1) return;
    __threadfence();
    int sum = 0;
    for (unsigned b = 0; b < gridDim.x; b++) sum += partial[b]; // FAULT fence
    *out = sum;
}
void fence(bool right) {
    RAST_LAUNCH(fence_kernel, 3, 1, 0, nullptr, device<int>(3), device<unsigned>(1), device<int>(1), right);
}

__global__ void write_kernel(int *p, int value) {
    p[threadIdx.x] = value; // FAULT missing_event
}
__global__ void read_kernel(const int *p, int *out) { out[threadIdx.x] = p[threadIdx.x]; }
void missing_event(bool right) {
    cudaStream_t a, b;
    cudaEvent_t event;
    int *p = device<int>(32), *out = device<int>(32);
    if (cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking) || cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking) ||
        cudaEventCreateWithFlags(&event, cudaEventDisableTiming))
        abort();
    cudaDeviceSynchronize();
    RAST_LAUNCH(write_kernel, 1, 32, 0, a, p, 7);
    cudaEventRecord(event, a);
    if (right) cudaStreamWaitEvent(b, event, 0);
    RAST_LAUNCH(read_kernel, 1, 32, 0, b, p, out);
}

// Branches of a graph that do not wait for each other.
__global__ void graph_write_kernel(int *p) {
    p[threadIdx.x] = 3; // FAULT graph_race
}
void graph_race(bool right) {
    cudaStream_t a, b;
    cudaEvent_t fork, middle, join;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    int *p = device<int>(32), *out = device<int>(32);
    cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking);
    cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking);
    cudaEventCreate(&fork);
    cudaEventCreate(&middle);
    cudaEventCreate(&join);
    cudaDeviceSynchronize();
    cudaStreamBeginCapture(a, cudaStreamCaptureModeGlobal);
    cudaEventRecord(fork, a);
    cudaStreamWaitEvent(b, fork, 0);
    RAST_LAUNCH(graph_write_kernel, 1, 32, 0, a, p);
    cudaEventRecord(middle, a);
    if (right) cudaStreamWaitEvent(b, middle, 0);
    RAST_LAUNCH(read_kernel, 1, 32, 0, b, p, out);
    cudaEventRecord(join, b);
    cudaStreamWaitEvent(a, join, 0);
    if (cudaStreamEndCapture(a, &graph) || cudaGraphInstantiate(&exec, graph, 0) || cudaGraphLaunch(exec, a) ||
        cudaGraphLaunch(exec, a))
        abort();
}

// The host reads pinned memory that a copy is still to fill.
void host_race(bool right) {
    cudaStream_t a;
    int *host, *p = device<int>(32);
    cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking);
    if (cudaMallocHost(&host, 128)) abort();
    cudaDeviceSynchronize();
    cudaMemcpyAsync(host, p, 128, cudaMemcpyDeviceToHost, a);
    if (right) cudaStreamSynchronize(a);
    printf("%d\n", host[5]); // FAULT host_race
}

/* ---- bounds ---------------------------------------------------------------------------------------------------------- */

__global__ void read_bounds_kernel(const int *in, int *out, int shift) {
    out[threadIdx.x] = in[threadIdx.x + (unsigned)shift]; // FAULT read_bounds
}
void read_bounds(bool right) {
    RAST_LAUNCH(read_bounds_kernel, 1, 32, 0, nullptr, device<int>(32), device<int>(32), right ? 0 : 1);
}
__global__ void write_bounds_kernel(char *out, int shift) {
    out[(int)threadIdx.x + shift] = 1; // FAULT write_bounds
}
void write_bounds(bool right) { RAST_LAUNCH(write_bounds_kernel, 1, 33, 0, nullptr, device<char>(33), right ? 0 : -1); }
__global__ void freed_kernel(int *p) {
    p[threadIdx.x] = 1; // FAULT freed
}
void freed(bool right) {
    int *p = device<int>(32), *other = device<int>(32);
    cudaFree(right ? other : p);
    if (!right) { /* hidden from the check of arguments */
        struct Hidden {
            int *p;
        };
        RAST_LAUNCH(+[](Hidden h) { freed_kernel(h.p); }, 1, 32, 0, nullptr, Hidden{p});
    } else {
        RAST_LAUNCH(freed_kernel, 1, 32, 0, nullptr, p);
    }
}
template <int N> __global__ void fixed_shared_kernel(int *out, int n) {
    __shared__ int tile[N];
    tile[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = tile[(int)threadIdx.x + n - N]; // FAULT fixed_shared
}
void fixed_shared(bool right) {
    RAST_LAUNCH(fixed_shared_kernel<30>, 1, 30, 0, nullptr, device<int>(32), right ? 30 : 31);
}
__global__ void dynamic_shared_kernel(int *out) {
    RAST_DYNAMIC_SHARED(int, tile);
    tile[threadIdx.x] = 1; // FAULT dynamic_shared
    out[threadIdx.x] = tile[threadIdx.x];
}
void dynamic_shared(bool right) {
    RAST_LAUNCH(dynamic_shared_kernel, 1, 33, right ? 132 : 128, nullptr, device<int>(33));
}
__global__ void alignment_kernel(const float *in, float4 *out, int shift) {
    out[threadIdx.x] = *reinterpret_cast<const float4 *>(in + 4 * threadIdx.x + shift); // FAULT alignment
}
void alignment(bool right) {
    RAST_LAUNCH(alignment_kernel, 1, 2, 0, nullptr, device<float>(16), device<float4>(2), right ? 0 : 1);
}

__global__ void copy_kernel(const int *in, int *out, int n) {
    RAST_DYNAMIC_SHARED(int, tile);
    const unsigned at = 4 * threadIdx.x;
    __pipeline_memcpy_async(tile + at, in + at, 16); // FAULT copy_source copy_target copy_alignment
    __pipeline_commit();
    __pipeline_wait_prior(0);
    if ((int)threadIdx.x < n) out[threadIdx.x] = tile[at];
}
void copy_source(bool right) {
    RAST_LAUNCH(copy_kernel, 1, 32, 512, nullptr, device<int>(right ? 128 : 127), device<int>(32), 32);
}
void copy_target(bool right) {
    RAST_LAUNCH(copy_kernel, 1, 32, right ? 512 : 496, nullptr, device<int>(128), device<int>(32), 31);
}
void copy_alignment(bool right) {
    RAST_LAUNCH(copy_kernel, 1, 32, 512, nullptr, device<int>(132) + (right ? 4 : 2), device<int>(32), 32);
}

/* ---- addresses ------------------------------------------------------------------------------------------------------- */

__global__ void host_pointer_kernel(const int *in, int *out) { out[threadIdx.x] = in[threadIdx.x]; }
void host_pointer(bool right) {
    static int host[32];
    RAST_LAUNCH(host_pointer_kernel, 1, 32, 0, nullptr, right ? device<int>(32) : host, device<int>(32));
}
struct Pointers {
    const int *in;
};
__global__ void hidden_host_pointer_kernel(Pointers p, int *out) {
    out[threadIdx.x] = p.in[threadIdx.x]; // FAULT hidden_host_pointer
}
void hidden_host_pointer(bool right) {
    int *host = static_cast<int *>(calloc(32, 4));
    RAST_LAUNCH(hidden_host_pointer_kernel, 1, 32, 0, nullptr, Pointers{right ? device<int>(32) : host},
                device<int>(32));
    cudaDeviceSynchronize();
    free(host);
}
void device_on_host(bool right) {
    int *p = device<int>(1), host = 0;
    cudaDeviceSynchronize();
    if (right)
        cudaMemcpy(&host, p, 4, cudaMemcpyDeviceToHost);
    else
        host = *p; // FAULT device_on_host
    printf("%d\n", host);
}
void product_bounds(bool right) {
    cublasHandle_t h;
    const float one = 1, zero = 0;
    if (cublasCreate(&h)) abort();
    cublasSgemm(h, CUBLAS_OP_T, CUBLAS_OP_N, 4, 3, 5, &one, device<float>(right ? 20 : 19), 5, device<float>(15), 5,
                &zero, device<float>(12), 4);
    cudaDeviceSynchronize();
    cublasDestroy(h);
}

/* ---- barriers and warps ---------------------------------------------------------------------------------------------- */

__global__ void ended_barrier_kernel(int n) {
    if ((int)threadIdx.x >= n) return;
    __syncthreads(); // FAULT ended_barrier
}
void ended_barrier(bool right) { RAST_LAUNCH(ended_barrier_kernel, 1, 64, 0, nullptr, right ? 64 : 40); }
__global__ void begun_barrier_kernel(int n) {
    if ((int)threadIdx.x < n) return;
    __syncthreads(); // FAULT begun_barrier
}
void begun_barrier(bool right) { RAST_LAUNCH(begun_barrier_kernel, 1, 64, 0, nullptr, right ? 0 : 24); }
__global__ void two_barriers_kernel(bool right) {
    if (right || threadIdx.x < 32)
        __syncthreads(); // FAULT two_barriers
    else
        __syncthreads(); // FAULT two_barriers
}
void two_barriers(bool right) { RAST_LAUNCH(two_barriers_kernel, 1, 64, 0, nullptr, right); }
__global__ void ended_lane_kernel(int *out, int n) {
    if ((int)threadIdx.x >= n) return;
    out[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1, 1); // FAULT ended_lane
}
void ended_lane(bool right) { RAST_LAUNCH(ended_lane_kernel, 1, 32, 0, nullptr, device<int>(32), right ? 32 : 31); }
__global__ void unnamed_lane_kernel(int *out, int source) {
    if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, source); // FAULT unnamed_lane
}
void unnamed_lane(bool right) { RAST_LAUNCH(unnamed_lane_kernel, 1, 32, 0, nullptr, device<int>(32), right ? 15 : 16); }
__global__ void not_in_mask_kernel(int *out, unsigned mask) {
    out[threadIdx.x] = (int)__ballot_sync(mask, 1); // FAULT not_in_mask
}
void not_in_mask(bool right) {
    RAST_LAUNCH(not_in_mask_kernel, 1, 32, 0, nullptr, device<int>(32), right ? 0xffffffffu : 0xfffffffeu);
}
__global__ void different_kernel(int *out, bool right) {
    if (right || threadIdx.x < 7)
        out[threadIdx.x] = (int)__ballot_sync(0xffffffffu, 1); // FAULT different
    else
        out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
}
void different(bool right) { RAST_LAUNCH(different_kernel, 1, 32, 0, nullptr, device<int>(32), right); }
__global__ void fragment_kernel(const __nv_bfloat16 *in, int stride) {
    using namespace nvcuda;
    wmma::fragment<wmma::matrix_a, 16, 16, 16, __nv_bfloat16, wmma::row_major> f;
    wmma::load_matrix_sync(f, in, (unsigned)stride); // FAULT fragment
}
void fragment(bool right) {
    RAST_LAUNCH(fragment_kernel, 1, 32, 0, nullptr, device<__nv_bfloat16>(16 * 24), right ? 24 : 20);
}

#define FAULT(name) {#name, name}
const struct {
    const char *name;
    void (*run)(bool right);
} programs[] = {
    FAULT(block_race),     FAULT(missing_barrier), FAULT(warp_race),
    FAULT(shuffle_race),   FAULT(other_warp),      FAULT(later_warp),
    FAULT(begun_barrier),  FAULT(missing_wait),    FAULT(late_wait),
    FAULT(short_wait),     FAULT(missing_commit),  FAULT(reused_stage),
    FAULT(changed_source), FAULT(grid_race),       FAULT(grid_barrier_race),
    FAULT(fence),          FAULT(missing_event),   FAULT(graph_race),
    FAULT(host_race),      FAULT(read_bounds),     FAULT(write_bounds),
    FAULT(freed),          FAULT(fixed_shared),    FAULT(dynamic_shared),
    FAULT(copy_source),    FAULT(copy_target),     FAULT(copy_alignment),
    FAULT(alignment),      FAULT(host_pointer),    FAULT(hidden_host_pointer),
    FAULT(device_on_host), FAULT(product_bounds),  FAULT(ended_barrier),
    FAULT(two_barriers),   FAULT(ended_lane),      FAULT(unnamed_lane),
    FAULT(not_in_mask),    FAULT(different),       FAULT(fragment),
};

} // namespace

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    for (const auto &p : programs) {
        if (strcmp(p.name, argv[1]) != 0 && strcmp("all", argv[1]) != 0) continue;
        p.run(strcmp(argv[2], "right") == 0);
        cudaError_t e = cudaDeviceSynchronize();
        if (e == cudaSuccess) e = cudaGetLastError();
        if (e != cudaSuccess) {
            printf("%s: %s\n", p.name, cudaGetErrorName(e));
            return 3;
        }
    }
    return 0;
}
