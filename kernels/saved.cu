/* saved.cu: logits that were kept from drafting, among those that a product has just given. */
#include "device.h"

using namespace rast;

namespace {

constexpr int THREADS = 256;

/* Grid: outputs, parts of a row. saved [rows, n_vocab], row [n_out], logits [n_out, stride] */
__global__ void saved_kernel(rast_dev saved, rast_dev row, int32_t n_vocab, rast_dev logits, size_t stride) {
    const int32_t from = ints(row)[blockIdx.x];
    const size_t i = static_cast<size_t>(blockIdx.y) * THREADS + threadIdx.x, n = static_cast<size_t>(n_vocab);
    if (from < 0 || i >= n) return;
    address<float>(logits)[blockIdx.x * stride + i] = address<const float>(saved)[static_cast<size_t>(from) * n + i];
}

} // namespace

void rast_kernel_saved(cudaStream_t stream, rast_dev saved, rast_dev row, int32_t n_out, int32_t n_vocab,
                       rast_dev logits, size_t stride) {
    const dim3 grid(static_cast<unsigned>(n_out), ceil_div(static_cast<size_t>(n_vocab), THREADS));
    RAST_LAUNCH(saved_kernel, grid, THREADS, 0, stream, saved, row, n_vocab, logits, stride);
}
