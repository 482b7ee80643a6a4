/* bias.cu: adds the bias of a matrix product to its rows. */
#include "device.h"

using namespace rast;

namespace {

constexpr int THREADS = 128;

/* Grid: rows, parts of a row, models. bias [n_models][out]; y [n_models, cap_rows, out] float32 */
template <int N> __global__ void bias_kernel(rast_pass pass, models bias, int32_t type, int32_t out, rast_dev y) {
    const int32_t row = static_cast<int32_t>(blockIdx.x);
    const size_t m = blockIdx.z, i = (static_cast<size_t>(blockIdx.y) * THREADS + threadIdx.x) * N;
    if (row >= ints(pass.count)[RAST_OF_ROWS] || i >= static_cast<size_t>(out)) return;
    float *to = address<float>(y) +
                (m * static_cast<size_t>(pass.cap_rows) + static_cast<size_t>(row)) * static_cast<size_t>(out) + i;
    float b[N], v[N];
    load<N>(address<const void>(bias.data[m]), type, i, b);
    vector<float, N>::load(to, v);
#pragma unroll
    for (int j = 0; j < N; j++) v[j] += b[j];
    vector<float, N>::store(to, v);
}

} // namespace

void rast_kernel_bias(cudaStream_t stream, const rast_pass *pass, const rast_weight *const *bias, rast_dev y) {
    const models all = models_of(bias, pass->n_models);
    const int32_t out = bias[0]->in, type = bias[0]->type;
    const bool vectors = out % 4 == 0 && y % 16 == 0 && aligned(all, pass->n_models, 4 * type_bytes(type));
    const dim3 grid(static_cast<unsigned>(pass->cap_rows),
                    ceil_div(static_cast<size_t>(out), THREADS * (vectors ? 4u : 1u)),
                    static_cast<unsigned>(pass->n_models));
    if (vectors)
        RAST_LAUNCH((bias_kernel<4>), grid, THREADS, 0, stream, *pass, all, type, out, y);
    else
        RAST_LAUNCH((bias_kernel<1>), grid, THREADS, 0, stream, *pass, all, type, out, y);
}
