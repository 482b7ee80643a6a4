/* async.h: copies to shared memory that run beside the arithmetic (cp.async). In PTX for the device, since CUDA's own functions take
 * the number of zeros as a constant; by these functions where a host compiles, which is what the emulation runs. */
#ifndef RAST_ASYNC_H
#define RAST_ASYNC_H

#include "device.h"

#include <cuda_pipeline_primitives.h>

namespace rast {

/* 16 bytes, zeros if not `valid`; visible to this thread after async_wait, to others after a barrier behind it. Both addresses
 * aligned to 16; `from` may be any address that is not read if not valid. */
__device__ __forceinline__ void async_copy16(void *to, const void *from, bool valid) {
#ifdef __CUDA_ARCH__
    const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
#else
    __pipeline_memcpy_async(to, from, 16, valid ? 0 : 16);
#endif
}

/* Closes the group of copies begun since the last one. */
__device__ __forceinline__ void async_commit() {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    __pipeline_commit();
#endif
}

/* Waits until all but the last N groups are there. */
template <int N> __device__ __forceinline__ void async_wait() {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
    __pipeline_wait_prior(N);
#endif
}

} // namespace rast
#endif
