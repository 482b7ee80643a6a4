/* glu.cu: SwiGLU, y = silu(gate) * up. */
#include "device.h"

using namespace rast;

namespace {

constexpr int THREADS = 256;

/* Grid: rows, parts of a row, models. gate, up [n_models, cap_rows, dim] float32; y the same of pass.act_type */
template <int N> __global__ void glu_kernel(rast_pass pass, rast_dev gate, rast_dev up, int32_t dim, rast_dev y) {
    const int32_t row = static_cast<int32_t>(blockIdx.x);
    const size_t m = blockIdx.z, i = (static_cast<size_t>(blockIdx.y) * THREADS + threadIdx.x) * N;
    if (row >= ints(pass.count)[RAST_OF_ROWS] || i >= static_cast<size_t>(dim)) return;
    const size_t at =
        (m * static_cast<size_t>(pass.cap_rows) + static_cast<size_t>(row)) * static_cast<size_t>(dim) + i;
    float g[N], u[N];
    vector<float, N>::load(address<const float>(gate) + at, g);
    vector<float, N>::load(address<const float>(up) + at, u);
#pragma unroll
    for (int j = 0; j < N; j++) u[j] *= g[j] / (expf(-g[j]) + 1.0f);
    store<N>(address<void>(y), pass.act_type, at, u);
}

} // namespace

void rast_kernel_glu(cudaStream_t stream, const rast_pass *pass, rast_dev gate, rast_dev up, int32_t dim, rast_dev y) {
    const bool vectors = dim % 4 == 0 && gate % 16 == 0 && up % 16 == 0 && y % 16 == 0;
    const dim3 grid(static_cast<unsigned>(pass->cap_rows),
                    ceil_div(static_cast<size_t>(dim), THREADS * (vectors ? 4u : 1u)),
                    static_cast<unsigned>(pass->n_models));
    if (vectors)
        RAST_LAUNCH((glu_kernel<4>), grid, THREADS, 0, stream, *pass, gate, up, dim, y);
    else
        RAST_LAUNCH((glu_kernel<1>), grid, THREADS, 0, stream, *pass, gate, up, dim, y);
}
