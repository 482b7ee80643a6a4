/* draw.h: from the combined logits of one output row to a token: processors, filters and the draw.
 *
 * Rows are handled in tiles of DRAW_TILE ids that begin at a multiple of DRAW_TILE; entries beyond the vocabulary are -inf.
 */
#ifndef RAST_CPU_DRAW_H
#define RAST_CPU_DRAW_H

#include "cpu.h"

enum { DRAW_TILE = 128, DRAW_WORDS = DRAW_TILE / 32 }; /* ids of a tile, and words of a bit mask over them */

/* The best id so far. Sampling: key = (double)x + rast_gumbel(r), added in double; greedy: key = x. Equal keys: the lowest
 * id wins, so that the result depends on the row alone and not on the order of comparison. */
typedef struct {
    double key;
    int32_t id; /* -1: none, and key is -inf */
} draw_best;

/* Bits first .. first + DRAW_TILE - 1 of a row of n_words words; 0 beyond its end. */
void draw_bits(const uint32_t *row, size_t n_words, size_t first, uint32_t bits[DRAW_WORDS]);

/* Repetition penalty, allowed ids and (when sampling) temperature on the tile x at `first` of output o. */
void draw_process(const rast_logits *l, size_t o, size_t first, float *x);

float draw_tile_max(const float *x);

void draw_merge(draw_best *best, double key, int32_t id);

/* Offers a tile of processed logits whose maximum is `max`. */
void draw_tile(const cpu_kernels *k, const rast_draw *d, size_t first, const float *x, float max, draw_best *best);

int draw_has_filter(const rast_draw *d);

/* Top-k, top-p and min-p on a row of processed logits [n_vocab] with the maxima of its tiles. Writes the ids that stay, in
 * ascending order, and their logits; returns how many. ids, x and weight are buffers of draw_capacity(n_vocab) each. Ids
 * with equal logits share one fate: at top-p's boundary all of them stay. */
size_t draw_filter(const cpu_kernels *k, const rast_draw *d, const float *row, const float *tile_max, size_t n_vocab,
                   int32_t *ids, float *x, float *weight);

static inline size_t draw_n_tiles(size_t n_vocab) { return (n_vocab + DRAW_TILE - 1) / DRAW_TILE; }
static inline size_t draw_capacity(size_t n_vocab) { return draw_n_tiles(n_vocab) * DRAW_TILE; }

/* Draws one of the n ids that draw_filter left. */
void draw_kept(const rast_draw *d, const int32_t *ids, const float *x, size_t n, draw_best *best);

#endif
