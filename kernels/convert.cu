/* convert.cu: an array of one float type to another. */
#include "device.h"

using namespace rast;

namespace {

constexpr int THREADS = 256;

/* in, out: n elements; the grid goes over them as often as it must */
template <int N>
__global__ void convert_kernel(rast_dev in, int32_t in_type, rast_dev out, int32_t out_type, size_t n) {
    const size_t step = static_cast<size_t>(gridDim.x) * THREADS * N;
    for (size_t i = (static_cast<size_t>(blockIdx.x) * THREADS + threadIdx.x) * N; i < n; i += step) {
        float v[N];
        if (n - i >= N) {
            load<N>(address<const void>(in), in_type, i, v);
            store<N>(address<void>(out), out_type, i, v);
        } else {
            for (size_t j = i; j < n; j++) {
                load<1>(address<const void>(in), in_type, j, v);
                store<1>(address<void>(out), out_type, j, v);
            }
        }
    }
}

} // namespace

cudaError_t rast_kernel_available(void) {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void *>(convert_kernel<4>));
}

void rast_kernel_convert(cudaStream_t stream, rast_dev in, int32_t in_type, rast_dev out, int32_t out_type, size_t n) {
    if (n == 0) return;
    const bool vectors = in % (4 * type_bytes(in_type)) == 0 && out % (4 * type_bytes(out_type)) == 0;
    const size_t blocks = (n + THREADS * 4 - 1) / (THREADS * 4);
    const unsigned grid = static_cast<unsigned>(blocks < 1u << 20 ? blocks : 1u << 20);
    if (vectors)
        RAST_LAUNCH((convert_kernel<4>), grid, THREADS, 0, stream, in, in_type, out, out_type, n);
    else
        RAST_LAUNCH((convert_kernel<1>), grid, THREADS, 0, stream, in, in_type, out, out_type, n);
}
