/* embed.cu: rows of the embedding matrices, as float32. */
#include "device.h"

using namespace rast;

namespace {

constexpr int THREADS = 128;

/* Grid: rows, parts of a row, models. w [n_models] matrices of rows of `stride` bytes; y [n_models, cap_rows, in] float32 */
template <int N>
__global__ void embed_kernel(rast_pass pass, models w, int32_t type, size_t stride, int32_t in, rast_dev y) {
    const int32_t row = static_cast<int32_t>(blockIdx.x);
    const size_t m = blockIdx.z, i = (static_cast<size_t>(blockIdx.y) * THREADS + threadIdx.x) * N;
    if (row >= ints(pass.count)[RAST_OF_ROWS] || i >= static_cast<size_t>(in)) return;
    int32_t token = ints(pass.token)[row];
    if (token < 0) token = ints(pass.drawn)[-1 - token];
    float x[N];
    load<N>(address<const char>(w.data[m]) + static_cast<size_t>(token) * stride, type, i, x);
    const size_t at = (m * static_cast<size_t>(pass.cap_rows) + static_cast<size_t>(row)) * static_cast<size_t>(in);
    vector<float, N>::store(address<float>(y) + at + i, x);
}

} // namespace

void rast_kernel_embed(cudaStream_t stream, const rast_pass *pass, const rast_weight *const *w, rast_dev y) {
    const models all = models_of(w, pass->n_models);
    const size_t in = static_cast<size_t>(w[0]->in), stride = w[0]->stride;
    const bool vectors = in % 4 == 0 && stride % 16 == 0 && aligned(all, pass->n_models, 16) && y % 16 == 0;
    const dim3 grid(static_cast<unsigned>(pass->cap_rows), ceil_div(in, THREADS * (vectors ? 4u : 1u)),
                    static_cast<unsigned>(pass->n_models));
    if (vectors)
        RAST_LAUNCH((embed_kernel<4>), grid, THREADS, 0, stream, *pass, all, w[0]->type, stride, w[0]->in, y);
    else
        RAST_LAUNCH((embed_kernel<1>), grid, THREADS, 0, stream, *pass, all, w[0]->type, stride, w[0]->in, y);
}
