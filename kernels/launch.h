/* launch.h: the one place where kernels differ between nvcc and the host emulation of tests/cuda_emulation/.
 *
 *   RAST_LAUNCH(kernel, grid, block, shared_bytes, stream, args...)   kernel<<<grid, block, shared_bytes, stream>>>(args...);
 *                                                                     parenthesise a kernel with commas: (k<a, b>)
 *   RAST_DYNAMIC_SHARED(type, name)     in a kernel: `name` points to the launch's shared_bytes, aligned to 16
 */
#ifndef RAST_LAUNCH_H
#define RAST_LAUNCH_H

#ifdef RAST_CUDA_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#define RAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                                    \
    kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)
#define RAST_DYNAMIC_SHARED(type, name)                                                                                \
    extern __shared__ __align__(16) unsigned char rast_dynamic_shared[];                                               \
    type *name = reinterpret_cast<type *>(rast_dynamic_shared)
#endif

#endif
