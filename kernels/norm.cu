/* norm.cu: RMSNorm, with the residual that joins the stream before it. A group is normalised by a warp or by a block. */
#include "device.h"

using namespace rast;

namespace {

constexpr int KEEP = 4;         /* vectors that a thread keeps in registers between its two passes */
constexpr int WARP_GROUP = 512; /* longest group that a warp takes */
constexpr int GROUPS = 4;       /* warps of a block that take a group each */
constexpr int MAX_THREADS = 1024;

/* Sum over the block if it is one group's, else over the warp; every thread gets it. */
__device__ float group_sum(float x) {
    __shared__ float parts[MAX_THREADS / WARP];
    x = warp_sum(x);
    if (blockDim.y > 1 || blockDim.x == WARP) return x;
    const int n_warps = static_cast<int>(blockDim.x) / WARP;
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    const int lane = static_cast<int>(threadIdx.x) % WARP;
    return warp_sum(lane < n_warps ? parts[lane] : 0.0f);
}

/* Grid: rows or outputs, groups of a row / blockDim.y, models. x, add, y [n_models, cap, dim], add or none; w [n_models][group] */
template <int N>
__global__ void __launch_bounds__(MAX_THREADS)
    norm_kernel(rast_pass pass, int extent, int32_t cap, rast_dev x, rast_dev add, models w, int32_t w_type,
                int32_t dim, int32_t group, float eps, rast_dev y, int32_t y_type) {
    const int32_t row = static_cast<int32_t>(blockIdx.x);
    const size_t m = blockIdx.z,
                 g = (static_cast<size_t>(blockIdx.y) * blockDim.y + threadIdx.y) * static_cast<size_t>(group);
    if (row >= ints(pass.count)[extent] || g >= static_cast<size_t>(dim)) return;
    const size_t at = (m * static_cast<size_t>(cap) + static_cast<size_t>(row)) * static_cast<size_t>(dim) + g;
    float *from = address<float>(x) + at;
    const float *more = add ? address<const float>(add) + at : nullptr;
    const int32_t first = static_cast<int32_t>(threadIdx.x) * N, step = static_cast<int32_t>(blockDim.x) * N;

    float kept[KEEP][N], squares = 0;
    const auto take = [&](int32_t i, float *v) {
        vector<float, N>::load(from + i, v);
        if (more) {
            float a[N];
            vector<float, N>::load(more + i, a);
#pragma unroll
            for (int j = 0; j < N; j++) v[j] += a[j];
            vector<float, N>::store(from + i, v);
        }
#pragma unroll
        for (int j = 0; j < N; j++) squares = fmaf(v[j], v[j], squares);
    };
#pragma unroll
    for (int k = 0; k < KEEP; k++)
        if (first + k * step < group) take(first + k * step, kept[k]);
    for (int32_t i = first + KEEP * step; i < group; i += step) {
        float v[N];
        take(i, v);
    }
    const float scale = 1.0f / sqrtf(group_sum(squares) / static_cast<float>(group) + eps);

    const void *weight = address<const void>(w.data[m]);
    const auto give = [&](int32_t i, const float *v) {
        float out[N];
        load<N>(weight, w_type, static_cast<size_t>(i), out);
#pragma unroll
        for (int j = 0; j < N; j++) out[j] *= v[j] * scale;
        store<N>(address<void>(y), y_type, at + static_cast<size_t>(i), out);
    };
#pragma unroll
    for (int k = 0; k < KEEP; k++)
        if (first + k * step < group) give(first + k * step, kept[k]);
    for (int32_t i = first + KEEP * step; i < group; i += step) {
        float v[N];
        vector<float, N>::load(from + i, v);
        give(i, v);
    }
}

} // namespace

void rast_kernel_norm(cudaStream_t stream, const rast_pass *pass, int extent, rast_dev x, rast_dev add,
                      const rast_weight *const *w, int32_t dim, int32_t group, float eps, rast_dev y, int32_t y_type) {
    const models all = models_of(w, pass->n_models);
    const bool vectors = group % 4 == 0 && x % 16 == 0 && add % 16 == 0 && y % 16 == 0 &&
                         aligned(all, pass->n_models, 4 * type_bytes(w[0]->type));
    const size_t per_row = static_cast<size_t>(dim / group), vector_size = vectors ? 4 : 1;
    const int32_t cap = cap_of(*pass, extent);
    dim3 block(WARP, GROUPS);
    if (group > WARP_GROUP) {
        const unsigned threads = whole_warps(static_cast<size_t>(group) / vector_size / 2);
        block = dim3(threads < MAX_THREADS ? threads : MAX_THREADS, 1);
    }
    const dim3 grid(static_cast<unsigned>(cap), ceil_div(per_row, block.y), static_cast<unsigned>(pass->n_models));
    if (vectors)
        RAST_LAUNCH((norm_kernel<4>), grid, block, 0, stream, *pass, extent, cap, x, add, all, w[0]->type, dim, group,
                    eps, y, y_type);
    else
        RAST_LAUNCH((norm_kernel<1>), grid, block, 0, stream, *pass, extent, cap, x, add, all, w[0]->type, dim, group,
                    eps, y, y_type);
}
