/* draw.c: see draw.h. */
#include "draw.h"

#include "../../rng.h"

#include <math.h>
#include <string.h>

static const double LN2 = 0.693147180559945309417;
/* Slack on bounds of Gumbel numbers: far above the rounding errors of log and exp, far below what costs time. */
static const double SLACK = 1e-9;

void draw_bits(const uint32_t *row, size_t n_words, size_t first, uint32_t bits[DRAW_WORDS]) {
    for (size_t i = 0, w = first / 32; i < DRAW_WORDS; i++, w++) bits[i] = w < n_words ? row[w] : 0;
}

/* ---- processors -------------------------------------------------------------------------------------------------- */

/* Ids of the tile that the output's sequence holds: the slot's history and the drafts before this output. */
static void seen_bits(const rast_logits *l, size_t o, size_t first, uint32_t seen[DRAW_WORDS]) {
    const rast_draw *draws = (const rast_draw *)l->draw;
    const int32_t slot = draws[o].slot;
    const size_t words = (size_t)l->history_words;
    memset(seen, 0, DRAW_WORDS * sizeof *seen);
    if (slot < 0) return;
    if (l->history) draw_bits((const uint32_t *)l->history + (size_t)slot * words, words, first, seen);
    for (size_t p = o + 1; p-- > 0;) {
        if (draws[p].slot != slot) continue;
        if (draws[p].draft < 0) break;
        const size_t i = (size_t)draws[p].draft - first; /* wraps to a large number below the tile */
        if (i < DRAW_TILE) seen[i / 32] |= 1u << i % 32;
    }
}

void draw_process(const rast_logits *l, size_t o, size_t first, float *x) {
    const rast_draw *d = (const rast_draw *)l->draw + o;
    uint32_t bits[DRAW_WORDS];
    if (d->repetition_penalty != 1.0f) {
        seen_bits(l, o, first, bits);
        for (size_t w = 0; w < DRAW_WORDS; w++) {
            for (uint32_t b = bits[w]; b; b &= b - 1) {
                float *v = x + w * 32 + (size_t)__builtin_ctz(b);
                *v = *v > 0 ? *v / d->repetition_penalty : *v * d->repetition_penalty;
            }
        }
    }
    if (d->mask >= 0) {
        const size_t words = (size_t)l->history_words;
        draw_bits((const uint32_t *)l->allowed + (size_t)d->mask * words, words, first, bits);
        for (size_t w = 0; w < DRAW_WORDS; w++)
            for (uint32_t b = ~bits[w]; b; b &= b - 1) x[w * 32 + (size_t)__builtin_ctz(b)] = -INFINITY;
    }
    if (d->flags & RAST_DRAW_SAMPLE && d->temperature != 1.0f)
        for (size_t i = 0; i < DRAW_TILE; i++) x[i] /= d->temperature;
}

/* ---- draw -------------------------------------------------------------------------------------------------------- */

float draw_tile_max(const float *x) {
    float lane[CPU_LANES], max = -INFINITY; /* lanes, so that compilers vectorise without reordering NaN */
    for (size_t j = 0; j < CPU_LANES; j++) lane[j] = -INFINITY;
    for (size_t i = 0; i < DRAW_TILE; i += CPU_LANES)
        for (size_t j = 0; j < CPU_LANES; j++) lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
    for (size_t j = 0; j < CPU_LANES; j++) max = lane[j] > max ? lane[j] : max;
    return max;
}

void draw_merge(draw_best *best, double key, int32_t id) {
    if (key > best->key || (key == best->key && id < best->id)) *best = (draw_best){key, id};
}

/* With n = ~r: u = 1 - (n + 1/2) / 2^32 and -log(u) >= 1 - u, so gumbel(r) <= 32 log 2 - log(n + 1/2), and in whole bits
 * <= (leading zeros of n + 1) log 2. Two logarithms are spent only on ids that could still win by these bounds. */
static void offer(double x, uint32_t r, int32_t id, draw_best *best) {
    const uint32_t n = ~r;
    const int zeros = n ? __builtin_clz(n) : 32;
    if (x + (zeros + 1) * LN2 + SLACK < best->key) return;
    draw_merge(best, x + rast_gumbel(r), id);
}

void draw_tile(const cpu_kernels *k, const rast_draw *d, size_t first, const float *x, float max, draw_best *best) {
    if (max == -INFINITY) return;
    if (!(d->flags & RAST_DRAW_SAMPLE)) {
        if ((double)max < best->key) return;
        for (size_t i = 0; i < DRAW_TILE; i++)
            if (x[i] == max) {
                draw_merge(best, (double)max, (int32_t)(first + i));
                return;
            }
        return;
    }
    /* What the tile's best must draw to win bounds n; a tile far below the best needs no random numbers. */
    const double n_max = exp(32 * LN2 - (best->key - (double)max) + SLACK);
    if (n_max < 0.5) return;
    const uint32_t r_min = n_max < 0x1p32 - 1 ? ~(uint32_t)n_max : 0;
    uint32_t r[DRAW_TILE], hit = 0;
    k->random(d->stream, d->position, (uint32_t)first, DRAW_TILE, r);
    for (size_t i = 0; i < DRAW_TILE; i++) hit |= r[i] >= r_min;
    if (!hit) return;
    for (size_t i = 0; i < DRAW_TILE; i++)
        if (r[i] >= r_min && x[i] > -INFINITY) offer((double)x[i], r[i], (int32_t)(first + i), best);
}

void draw_kept(const rast_draw *d, const int32_t *ids, const float *x, size_t n, draw_best *best) {
    for (size_t i = 0; i < n; i++) {
        if ((double)x[i] + 33 * LN2 + SLACK < best->key) continue;
        uint32_t r[4];
        rast_philox(d->stream, (uint32_t)ids[i] / 4, d->position, r);
        offer((double)x[i], r[ids[i] % 4], ids[i], best);
    }
}

/* ---- filters ----------------------------------------------------------------------------------------------------- */

int draw_has_filter(const rast_draw *d) {
    return d->flags & RAST_DRAW_SAMPLE && (d->top_k > 0 || d->top_p < 1.0f || d->min_p > 0.0f);
}

enum { DIGIT_BITS = 11, N_BUCKETS = 1 << DIGIT_BITS };

/* Maps floats to integers of the same order. */
static uint32_t order_key(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

/* The smallest of x[n] at which the weight of all values up to and including it is more than `share` of the whole plus
 * `count`; the greatest if there is none. weight NULL: 1 each. A radix search: one histogram for each digit of the key
 * replaces sorting, and takes the same time for any input. */
static float threshold(const float *x, const float *weight, size_t n, double share, double count) {
    static const int shift[] = {21, 10, 0};
    double bucket[N_BUCKETS], below = 0, target = count;
    uint32_t prefix = 0;
    int prefix_shift = 32;
    for (int level = 0; level < 3; level++) {
        const uint32_t digits = (1u << (prefix_shift - shift[level])) - 1;
        uint32_t last = 0, b = 0;
        memset(bucket, 0, sizeof bucket);
        for (size_t i = 0; i < n; i++) {
            const uint32_t key = order_key(x[i]);
            if (level && key >> prefix_shift != prefix) continue;
            const uint32_t digit = key >> shift[level] & digits;
            bucket[digit] += weight ? (double)weight[i] : 1.0;
            last = digit > last ? digit : last;
        }
        if (!level && share > 0)
            for (uint32_t i = 0; i <= last; i++) target += share * bucket[i];
        while (b < last && !(below + bucket[b] > target)) below += bucket[b++];
        prefix = level ? prefix << (prefix_shift - shift[level]) | b : b;
        prefix_shift = shift[level];
    }
    const uint32_t u = prefix & 0x80000000u ? prefix & 0x7fffffffu : ~prefix;
    float result;
    memcpy(&result, &u, sizeof result);
    return result;
}

/* Keeps the entries whose level is at least min (and those equal to `always`), in order. level is x or weight; weight may
 * be NULL. */
static size_t keep(int32_t *ids, float *x, float *weight, size_t n, const float *level, float min, float always) {
    size_t kept = 0;
    for (size_t i = 0; i < n; i++) {
        if (!(level[i] >= min || x[i] == always)) continue;
        ids[kept] = ids[i];
        if (weight) weight[kept] = weight[i];
        x[kept++] = x[i];
    }
    return kept;
}

size_t draw_filter(const cpu_kernels *k, const rast_draw *d, const float *row, const float *tile_max, size_t n_vocab,
                   int32_t *ids, float *x, float *weight) {
    const size_t n_tiles = draw_n_tiles(n_vocab), top_k = d->top_k > 0 ? (size_t)d->top_k : SIZE_MAX;
    float floor = -INFINITY, max = -INFINITY;
    size_t n = 0;

    /* The k-th greatest logit is at least the k-th greatest maximum of a tile: other tiles need not be read. */
    for (size_t t = 0; t < n_tiles; t++) {
        max = tile_max[t] > max ? tile_max[t] : max;
        if (tile_max[t] > -INFINITY) x[n++] = tile_max[t];
    }
    if (n > top_k) floor = threshold(x, NULL, n, 0, (double)(n - top_k));
    n = 0;
    for (size_t t = 0; t < n_tiles; t++) {
        if (!(tile_max[t] > -INFINITY && tile_max[t] >= floor)) continue;
        const size_t first = t * DRAW_TILE, end = n_vocab < first + DRAW_TILE ? n_vocab : first + DRAW_TILE;
        for (size_t v = first; v < end; v++) {
            if (!(row[v] > -INFINITY && row[v] >= floor)) continue;
            ids[n] = (int32_t)v;
            x[n++] = row[v];
        }
    }
    if (n > top_k) {
        const float least = threshold(x, NULL, n, 0, (double)(n - top_k));
        n = keep(ids, x, NULL, n, x, least, max);
    }
    if (!n || !(d->top_p < 1.0f || d->min_p > 0.0f)) return n;

    for (size_t first = 0; first < n; first += DRAW_TILE) {
        float below_max[DRAW_TILE];
        for (size_t i = 0; i < DRAW_TILE; i++) below_max[i] = first + i < n ? x[first + i] - max : -INFINITY;
        k->exp(below_max, weight + first, DRAW_TILE);
    }
    if (d->top_p < 1.0f) {
        const float least = threshold(x, weight, n, 1.0 - (double)d->top_p, 0);
        n = keep(ids, x, weight, n, x, least, max);
    }
    return d->min_p > 0.0f ? keep(ids, x, weight, n, weight, d->min_p, max) : n;
}
