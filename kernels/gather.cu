/* gather.cu: the residual stream of the rows that need logits, with what the last layer adds to it. */
#include "device.h"

using namespace rast;

namespace {

constexpr int THREADS = 128;

/* Grid: outputs, parts of a row, models. x, add [n_models, cap_rows, dim], y [n_models, cap_out, dim] float32 */
template <int N> __global__ void gather_kernel(rast_pass pass, rast_dev x, rast_dev add, int32_t dim, rast_dev y) {
    const int32_t o = static_cast<int32_t>(blockIdx.x);
    const size_t m = blockIdx.z, n = static_cast<size_t>(dim);
    const size_t i = (static_cast<size_t>(blockIdx.y) * THREADS + threadIdx.x) * N;
    if (o >= ints(pass.count)[RAST_OF_OUTS] || i >= n) return;
    const int32_t row = ints(pass.out_row)[o];
    float v[N] = {}, a[N] = {};
    if (row >= 0) {
        const size_t at = (m * static_cast<size_t>(pass.cap_rows) + static_cast<size_t>(row)) * n + i;
        vector<float, N>::load(address<const float>(x) + at, v);
        vector<float, N>::load(address<const float>(add) + at, a);
    }
#pragma unroll
    for (int j = 0; j < N; j++) v[j] += a[j];
    vector<float, N>::store(
        address<float>(y) + (m * static_cast<size_t>(pass.cap_out) + static_cast<size_t>(o)) * n + i, v);
}

} // namespace

void rast_kernel_gather(cudaStream_t stream, const rast_pass *pass, rast_dev x, rast_dev add, int32_t dim, rast_dev y) {
    const bool vectors = dim % 4 == 0 && x % 16 == 0 && add % 16 == 0 && y % 16 == 0;
    const dim3 grid(static_cast<unsigned>(pass->cap_out),
                    ceil_div(static_cast<size_t>(dim), THREADS * (vectors ? 4u : 1u)),
                    static_cast<unsigned>(pass->n_models));
    if (vectors)
        RAST_LAUNCH((gather_kernel<4>), grid, THREADS, 0, stream, *pass, x, add, dim, y);
    else
        RAST_LAUNCH((gather_kernel<1>), grid, THREADS, 0, stream, *pass, x, add, dim, y);
}
