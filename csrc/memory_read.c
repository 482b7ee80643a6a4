/* memory_read.c: reads memory as fast as one thread can and does nothing else: the yardstick of decoding, which can be no
 * faster than its weights are read. */
#include "rast.h"

#include <string.h>

typedef uint64_t vector __attribute__((vector_size(64)));

/* Several places at once keep more requests under way than one; their number and the prefetch distance are measured. */
enum { STREAMS = 4, AHEAD = 2048 };

static inline __attribute__((always_inline)) uint64_t read_streams(const uint8_t *p, size_t bytes) {
    const size_t each = bytes / STREAMS / sizeof(vector) * sizeof(vector);
    vector sum[STREAMS] = {{0}};
    for (size_t i = 0; i < each; i += sizeof(vector))
        for (size_t j = 0; j < STREAMS; j++) {
            const uint8_t *at = p + j * each + i;
            vector v;
            __builtin_prefetch((const void *)((uintptr_t)at + AHEAD)); /* may lie behind the end */
            memcpy(&v, at, sizeof v);
            sum[j] ^= v;
        }
    uint64_t all = 0;
    for (size_t j = 0; j < STREAMS; j++)
        for (size_t k = 0; k < sizeof(vector) / sizeof(uint64_t); k++) all ^= sum[j][k];
    for (size_t i = STREAMS * each; i < bytes; i++) all ^= (uint64_t)p[i] << (8 * (i % 8));
    return all;
}

#if defined(__x86_64__)
/* A whole cache line by one load: about a quarter faster than by four loads. */
static __attribute__((target("avx512f"))) uint64_t read_lines(const uint8_t *p, size_t bytes) {
    return read_streams(p, bytes);
}
#endif

uint64_t rast_memory_read(const void *data, size_t bytes) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) return read_lines(data, bytes);
#endif
    return read_streams(data, bytes);
}
