/* blocks.c: logical KV blocks: who holds them, which tokens they keep, and how these are found again.
 *
 * A block that can be found has a key: its parent (the block of the 32 tokens before it), and its own tokens. The parent's
 * number stands for all tokens before, since a block keeps its number as long as a block that follows it can be found. So
 * equal keys mean equal tokens from the first one on, whatever the hash.
 */
#include "engine.h"

#include <stdlib.h>
#include <string.h>

#include "../rng.h"

enum { FILLED = 0x7f, CLAIMED = 0x80 }; /* of blocks.filled */

int rast_blocks_init(rast_blocks *b, size_t n, size_t n_nets, rast_error *err) {
    size_t n_filled;
    memset(b, 0, sizeof *b);
    b->n_buckets = 1;
    while (b->n_buckets < n) b->n_buckets *= 2;
    b->block = calloc(n, sizeof *b->block);
    b->free = calloc(n, sizeof *b->free);
    b->bucket = calloc(b->n_buckets, sizeof *b->bucket);
    b->filled = rast_mul(n, n_nets, &n_filled) ? calloc(n_filled, 1) : NULL;
    if (!b->block || !b->free || !b->bucket || !b->filled) {
        rast_blocks_clear(b);
        return rast_fail(err, RAST_ERR_MEMORY, "no memory for a table of %zu KV blocks", n);
    }
    b->n = n;
    b->n_nets = n_nets;
    b->oldest = b->newest = -1;
    return RAST_OK;
}

void rast_blocks_clear(rast_blocks *b) {
    free(b->block);
    free(b->free);
    free(b->bucket);
    free(b->filled);
    memset(b, 0, sizeof *b);
}

/* ---- the index: entry 2 * block + kind, stored + 1 so that 0 ends a chain ------------------------------------------- */

static size_t bucket_of(const rast_blocks *b, int32_t parent, const int32_t *ids, size_t n) {
    uint64_t hash = rast_mix((uint64_t)(uint32_t)parent << 8 | n);
    for (size_t i = 0; i < n; i++) hash = rast_mix(hash + 0x9E3779B97F4A7C15u + (uint32_t)ids[i]);
    return (size_t)hash & (b->n_buckets - 1);
}

int32_t rast_blocks_find(const rast_blocks *b, int32_t parent, const int32_t *ids, size_t n) {
    for (uint32_t at = b->bucket[bucket_of(b, parent, ids, n)]; at;) {
        const rast_block *block = &b->block[(at - 1) / 2];
        const int kind = (at - 1) % 2;
        if (block->parent == parent && block->length[kind] == n && !memcmp(block->ids, ids, n * sizeof *ids))
            return (int32_t)((at - 1) / 2);
        at = block->chain[kind];
    }
    return -1;
}

void rast_blocks_enter(rast_blocks *b, int32_t at, int32_t parent, const int32_t *ids, size_t n, rast_block_kind kind) {
    rast_block *block = &b->block[at];
    uint32_t *bucket = &b->bucket[bucket_of(b, parent, ids, n)];
    if (!block->length[RAST_BLOCK_FULL] && !block->length[RAST_BLOCK_TAIL] && parent >= 0) b->block[parent].children++;
    block->parent = parent;
    block->length[kind] = (uint8_t)n;
    memcpy(block->ids, ids, n * sizeof *ids);
    block->chain[kind] = *bucket;
    *bucket = 2 * (uint32_t)at + (uint32_t)kind + 1;
}

static int can_be_found(const rast_block *block) {
    return block->length[RAST_BLOCK_FULL] || block->length[RAST_BLOCK_TAIL];
}

/* Takes the block out of the index. */
static void forget(rast_blocks *b, int32_t at) {
    rast_block *block = &b->block[at];
    if (can_be_found(block) && block->parent >= 0) b->block[block->parent].children--;
    for (int kind = 0; kind < 2; kind++) {
        if (!block->length[kind]) continue;
        uint32_t *link = &b->bucket[bucket_of(b, block->parent, block->ids, block->length[kind])];
        while (*link != 2 * (uint32_t)at + (uint32_t)kind + 1) link = &b->block[(*link - 1) / 2].chain[(*link - 1) % 2];
        *link = block->chain[kind];
        block->length[kind] = 0;
    }
}

/* ---- blocks that nobody holds, but that can be found: from the one used longest ago to the newest --------------------- */

static void keep(rast_blocks *b, int32_t at) {
    rast_block *block = &b->block[at];
    block->older = b->newest;
    block->newer = -1;
    if (b->newest >= 0)
        b->block[b->newest].newer = at;
    else
        b->oldest = at;
    b->newest = at;
    b->n_kept++;
}

static void unkeep(rast_blocks *b, int32_t at) {
    const rast_block *block = &b->block[at];
    if (block->older >= 0)
        b->block[block->older].newer = block->newer;
    else
        b->oldest = block->newer;
    if (block->newer >= 0)
        b->block[block->newer].older = block->older;
    else
        b->newest = block->older;
    b->n_kept--;
}

/* ---- holding ---------------------------------------------------------------------------------------------------------- */

size_t rast_blocks_room(const rast_blocks *b) { return b->n_returned + (b->n - b->n_touched) + b->n_kept; }

int32_t rast_blocks_take(rast_blocks *b) {
    int32_t at;
    if (b->n_returned) {
        at = b->free[--b->n_returned];
    } else if (b->n_touched < b->n) {
        at = (int32_t)b->n_touched++;
    } else {
        at = b->oldest; /* a parent is let go after its children, so it is hardly ever older */
        while (at >= 0 && b->block[at].children) at = b->block[at].newer;
        if (at < 0) return -1;
        unkeep(b, at);
        forget(b, at);
        b->n_evicted++;
    }
    b->block[at].refs = 1;
    memset(b->filled + (size_t)at * b->n_nets, 0, b->n_nets);
    return at;
}

void rast_blocks_share(rast_blocks *b, int32_t at) {
    if (b->block[at].refs++ == 0) unkeep(b, at);
}

void rast_blocks_drop(rast_blocks *b, int32_t at) {
    rast_block *block = &b->block[at];
    if (--block->refs) return;
    int worth = block->children > 0; /* a block that nobody has begun to fill is not */
    for (size_t m = 0; m < b->n_nets; m++) worth |= b->filled[(size_t)at * b->n_nets + m] > 0;
    if (worth && can_be_found(block)) {
        keep(b, at);
        return;
    }
    forget(b, at);
    b->free[b->n_returned++] = at;
}

/* ---- filling ---------------------------------------------------------------------------------------------------------- */

static uint8_t *filled(const rast_blocks *b, int32_t at, int32_t net) {
    return &b->filled[(size_t)at * b->n_nets + (size_t)net];
}

size_t rast_blocks_filled(const rast_blocks *b, int32_t at, int32_t net) { return *filled(b, at, net) & FILLED; }

void rast_blocks_fill(rast_blocks *b, int32_t at, int32_t net, size_t n) {
    if (n > RAST_BLOCK_TOKENS) n = RAST_BLOCK_TOKENS;
    uint8_t *f = filled(b, at, net);
    if (n > (*f & FILLED)) *f = (uint8_t)((*f & CLAIMED) | n);
}

int rast_blocks_claimed(const rast_blocks *b, int32_t at, int32_t net) { return *filled(b, at, net) & CLAIMED; }

void rast_blocks_claim(rast_blocks *b, int32_t at, int32_t net, int claim) {
    uint8_t *f = filled(b, at, net);
    *f = (uint8_t)((*f & FILLED) | (claim ? CLAIMED : 0));
}
