/* cuda_pipeline_primitives.h: copies to shared memory that run beside the thread, in groups. The latest that CUDA allows is what
 * happens: from the call on the destination holds no numbers, and what is copied comes at the wait for its group (src/block.cc). */
#ifndef CUDA_EMULATION_PIPELINE_PRIMITIVES_H
#define CUDA_EMULATION_PIPELINE_PRIMITIVES_H

#include "cuda_emulation.h"

namespace cuda_emulation {

void async_check(const void *to, const void *from, size_t bytes, size_t zeros, const char *file, int line);
void async_copy(void *to, const void *from, size_t bytes, size_t zeros);
void async_commit();
void async_wait(size_t prior, const char *file, int line);

/* The accesses of a copy, for the sanitizers of the kernel that begins it. */
template <class T> __forceinline__ void async_access(void *to, const void *from, size_t zeros) {
    *static_cast<volatile T *>(to) = ~static_cast<T>(0);
    if (zeros == 0) (void)*static_cast<const volatile T *>(from);
}

} // namespace cuda_emulation

__forceinline__ void __pipeline_memcpy_async(void *to, const void *from, size_t bytes, size_t zeros = 0,
                                             CUDA_EMULATION_SITE) {
    ::cuda_emulation::async_check(to, from, bytes, zeros, file, line);
    if (bytes == 4)
        ::cuda_emulation::async_access<uint32_t>(to, from, zeros);
    else if (bytes == 8)
        ::cuda_emulation::async_access<uint64_t>(to, from, zeros);
    else
        ::cuda_emulation::async_access<unsigned __int128>(to, from, zeros);
    ::cuda_emulation::async_copy(to, from, bytes, zeros);
}
__forceinline__ void __pipeline_commit() { ::cuda_emulation::async_commit(); }
__forceinline__ void __pipeline_wait_prior(size_t prior, CUDA_EMULATION_SITE) {
    ::cuda_emulation::async_wait(prior, file, line);
}

#endif
