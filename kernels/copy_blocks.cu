/* copy_blocks.cu: copies whole KV blocks inside a model's storage. */
#include "device.h"

using namespace rast;

namespace {

constexpr int THREADS = 256, VECTORS = 4; /* of a thread, so many reads under way */

/* Grid: parts of a block, pairs, models. T: the unit of a copy; units of a block; pairs [n, 2] (from, to) */
template <class T> __global__ void copy_blocks_kernel(models base, size_t block_stride, size_t units, rast_dev pairs) {
    const int32_t *pair = ints(pairs) + 2 * static_cast<size_t>(blockIdx.y);
    char *storage = address<char>(base.data[blockIdx.z]);
    const T *from = reinterpret_cast<const T *>(storage + static_cast<size_t>(pair[0]) * block_stride);
    T *to = reinterpret_cast<T *>(storage + static_cast<size_t>(pair[1]) * block_stride);
    const size_t first = static_cast<size_t>(blockIdx.x) * THREADS * VECTORS + threadIdx.x;
    T v[VECTORS];
#pragma unroll
    for (int k = 0; k < VECTORS; k++)
        if (first + static_cast<size_t>(k) * THREADS < units) v[k] = from[first + static_cast<size_t>(k) * THREADS];
#pragma unroll
    for (int k = 0; k < VECTORS; k++)
        if (first + static_cast<size_t>(k) * THREADS < units) to[first + static_cast<size_t>(k) * THREADS] = v[k];
}

} // namespace

void rast_kernel_copy_blocks(cudaStream_t stream, const rast_dev *base, int32_t n_models, size_t block_stride,
                             rast_dev pairs, int32_t n) {
    if (n == 0 || block_stride == 0) return;
    const models all = models_of(base, n_models);
    const bool vectors = block_stride % 16 == 0 && aligned(all, n_models, 16);
    const size_t units = vectors ? block_stride / 16 : block_stride;
    const dim3 grid(ceil_div(units, THREADS * VECTORS), static_cast<unsigned>(n), static_cast<unsigned>(n_models));
    if (vectors)
        RAST_LAUNCH((copy_blocks_kernel<uint4>), grid, THREADS, 0, stream, all, block_stride, units, pairs);
    else
        RAST_LAUNCH((copy_blocks_kernel<char>), grid, THREADS, 0, stream, all, block_stride, units, pairs);
}
