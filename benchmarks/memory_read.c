/* memory_read.c: reads a buffer from memory as fast as one thread can: what decode.py calls the roofline. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint64_t vector __attribute__((vector_size(64)));

uint64_t memory_read(const uint8_t *data, size_t bytes) {
    vector sum[4] = {{0}};
    for (size_t i = 0; i + sizeof sum <= bytes; i += sizeof sum)
        for (size_t j = 0; j < 4; j++) {
            vector v;
            const uint8_t *p = data + i + j * sizeof v;
            __builtin_prefetch(p + 4096);
            memcpy(&v, p, sizeof v);
            sum[j] ^= v;
        }
    for (size_t j = 1; j < 4; j++) sum[0] ^= sum[j];
    return sum[0][0] ^ sum[0][1] ^ sum[0][2] ^ sum[0][3] ^ sum[0][4] ^ sum[0][5] ^ sum[0][6] ^ sum[0][7];
}
