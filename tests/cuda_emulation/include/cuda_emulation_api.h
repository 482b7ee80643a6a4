/* cuda_emulation_api.h: what a test can set and ask of the emulation. Every setting has an environment variable that is read
 * when the library is first used (in brackets), and can be changed at any time unless said otherwise. */
#ifndef CUDA_EMULATION_API_H
#define CUDA_EMULATION_API_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* 0: threads, blocks and streams in their natural order; else in an order drawn from the seed. [CUDA_EMULATION_SEED] */
void cuda_emulation_seed(uint64_t seed);

/* Visible devices [CUDA_EMULATION_DEVICES, 1], their compute capability as 10 * major + minor [CUDA_EMULATION_CAPABILITY,
 * 90], the driver's version as in cudaDriverGetVersion [CUDA_EMULATION_DRIVER, 13000; 0: no driver], and bytes of memory
 * of each [CUDA_EMULATION_MEMORY, 4 GiB]. */
void cuda_emulation_devices(int n);
void cuda_emulation_capability(int capability);
void cuda_emulation_driver(int version);
void cuda_emulation_memory(size_t bytes);

/* The oldest device, likewise, that the kernels have code for [CUDA_EMULATION_IMAGES, 80]. */
void cuda_emulation_images(int capability);
/* Whether cuBLAS that lacks memory says NOT_INITIALIZED or EXECUTION_FAILED, as NVIDIA's may, and not ALLOC_FAILED
 * [CUDA_EMULATION_VAGUE_BLAS, 0]. */
void cuda_emulation_vague_blas(int on);

/* Devices that a context was made on, as bits: by selecting one, as from CUDA 12 on, or by using it. */
unsigned cuda_emulation_contexts(void);

/* The n-th call from now on (1: the next) of a cuda* or cublas* function that returns a status fails, or a launch does; error
 * as cudaError (cuBLAS calls return CUBLAS_STATUS_ALLOC_FAILED for cudaErrorMemoryAllocation, else
 * CUBLAS_STATUS_EXECUTION_FAILED). 0: none. An error that corrupts a context stays, as below. [CUDA_EMULATION_FAIL_CALL=n:error] */
void cuda_emulation_fail_call(uint64_t n, int error);
/* The n-th piece of queued work fails while it runs, and the error stays, as after an illegal access: all that uses the device
 * gives it again, and nothing can be released.
 * [CUDA_EMULATION_FAIL_WORK=n:error] */
void cuda_emulation_fail_work(uint64_t n, int error);
uint64_t cuda_emulation_calls(void); /* such calls so far */

/* The last report (a divergent barrier, a copy out of bounds, ...), "" if none; valid until the next. Also on stderr, unless
 * CUDA_EMULATION_QUIET is set. */
const char *cuda_emulation_report(void);
/* Clears whatever is still queued; what is allocated stays. After a lasting error it does what a new process would: nothing is
 * left of memory, streams, events, graphs and handles. Real devices have no such way back. */
void cuda_emulation_reset(void);

/* Allocations that have not been freed: of the device, pinned; streams, events, graphs and handles alive. */
typedef struct {
    uint64_t device_allocations, device_bytes, device_bytes_peak, host_allocations, host_registrations;
    uint64_t streams, events, graphs, graph_execs, cublas_handles;
} cuda_emulation_alive_t;
void cuda_emulation_alive(cuda_emulation_alive_t *);

/* What kernels did to global memory (flavour SANITIZE=count; elsewhere only launches, blocks and threads are counted). A
 * request is one instruction of one warp; its sectors are the distinct aligned 32 bytes that its lanes touch. A product of
 * cuBLAS counts as one launch, under the name of the function, and as nothing else. */
typedef struct {
    uint64_t launches, blocks, threads;
    uint64_t load_requests, load_sectors, load_bytes; /* bytes: what the lanes asked for */
    uint64_t store_requests, store_sectors, store_bytes;
    uint64_t atomic_requests, atomic_sectors, atomic_bytes;
    uint64_t distinct_load_sectors,
        distinct_store_sectors; /* each counted once a launch: what a perfect cache leaves */
} cuda_emulation_counts;
/* The sum over kernels whose name (as written at the launch) contains `kernel`; NULL: all. Returns the number of kernels. */
int cuda_emulation_counters(const char *kernel, cuda_emulation_counts *);
void cuda_emulation_counters_clear(void);
/* Name of the i-th kernel that was launched since the last clear; NULL past the end. */
const char *cuda_emulation_kernel(int i);

#ifdef __cplusplus
}
#endif
#endif
