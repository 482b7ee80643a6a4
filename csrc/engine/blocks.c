/* blocks.c: the allocator of logical KV blocks, with counted references. */
#include "engine.h"

#include <stdlib.h>
#include <string.h>

int rast_blocks_init(rast_blocks *b, size_t n, rast_error *err) {
    memset(b, 0, sizeof *b);
    b->refs = calloc(n, sizeof *b->refs);
    b->free = malloc(n * sizeof *b->free);
    if (!b->refs || !b->free) {
        rast_blocks_clear(b);
        return rast_fail(err, RAST_ERR_MEMORY, "no memory for a table of %zu KV blocks", n);
    }
    b->n = b->n_free = n;
    for (size_t i = 0; i < n; i++) b->free[i] = (int32_t)(n - 1 - i);
    return RAST_OK;
}

void rast_blocks_clear(rast_blocks *b) {
    free(b->refs);
    free(b->free);
    memset(b, 0, sizeof *b);
}

int32_t rast_blocks_take(rast_blocks *b) {
    const int32_t block = b->free[--b->n_free];
    b->refs[block] = 1;
    return block;
}

void rast_blocks_share(rast_blocks *b, int32_t block) { b->refs[block]++; }

void rast_blocks_drop(rast_blocks *b, int32_t block) {
    if (--b->refs[block] == 0) b->free[b->n_free++] = block;
}
