/* memory_read.c: reads memory as fast as one thread can and does nothing else: the yardstick of decoding, which can be no
 * faster than its weights are read. */
#include "rast.h"

#include <string.h>

typedef uint64_t vector __attribute__((vector_size(64)));
enum { VECTORS = 4, AHEAD = 4096 }; /* in flight at once; bytes of prefetch distance */

uint64_t rast_memory_read(const void *data, size_t bytes) {
    const uint8_t *p = data;
    vector sum[VECTORS] = {{0}};
    size_t i = 0;
    for (; bytes - i >= sizeof sum; i += sizeof sum)
        for (size_t j = 0; j < VECTORS; j++) {
            vector v;
            __builtin_prefetch((const void *)((uintptr_t)p + i + j * sizeof v + AHEAD)); /* may lie behind the end */
            memcpy(&v, p + i + j * sizeof v, sizeof v);
            sum[j] ^= v;
        }
    uint64_t all = 0;
    for (size_t j = 0; j < VECTORS; j++)
        for (size_t k = 0; k < sizeof(vector) / sizeof(uint64_t); k++) all ^= sum[j][k];
    for (; i < bytes; i++) all ^= (uint64_t)p[i] << (8 * (i % 8));
    return all;
}
