/* combine.c: the fused transfer step: heads, weighted sum, statistics and draw by tiles of the vocabulary.
 *
 * A first task runs over spans of the vocabulary: each tile's logits of all terms are computed into scratch, summed and
 * go straight on to statistics, processors and draw, so that no row of logits is stored unless somebody asks for it or
 * top-k, top-p or min-p need it whole. A second task, over output rows, merges the spans in order and finishes the row.
 * Spans and tiles have fixed places, so a row's result depends on neither the other outputs nor the threads.
 *
 * Uncommon ids mean another token in some active term. There, the terms above 0 give their log-sum-exp over the common
 * ids instead of a logit, which is known only after all spans: the first task leaves these few ids out, the second adds
 * them. Likewise the log-probability of one token recomputes that token's logits instead of storing them all.
 */
#include "draw.h"
#include "log_sum.h"

#include "../../error.h"

#include <math.h>
#include <string.h>

enum {
    SPAN_TILES = 8,         /* tiles of a unit of the first task */
    GROUP_FLOATS = 8 << 10, /* logits of a group of tiles: of few outputs, several tiles are multiplied in one go */
    OUT_BLOCK = 128,        /* outputs of a unit; their logits of one tile stay in cache (192 KiB) */
};

/* What a span of an output has found. */
typedef struct {
    draw_best draw, base_first;
    log_sum combined, base;
    int32_t bad; /* first term with NaN or Inf; n_terms: only their sum; or -1 */
} span_part;

/* What is known of an output before it runs. */
typedef struct {
    float *row;      /* [n_vocab] where processed logits go; or NULL: nowhere */
    float *tile_max; /* [n_tiles] maxima of the row's tiles, if top-k, top-p or min-p follow; or NULL */
    int32_t limit;   /* ids from here on cannot be drawn */
    int32_t has_uncommon;
} out_plan;

typedef struct {      /* hidden rows as the product with a term's head takes them */
    const char *rows; /* [n_out] */
    size_t stride;
    cpu_dot_fn dot;
} term_input;

typedef struct {
    rast_logits l;
    const cpu_kernels *k;
    const term_input *inputs; /* [n_terms] */
    const out_plan *plan;     /* [n_out] */
    span_part *parts;         /* [n_out, n_spans] */
    log_sum *term_sums;       /* [n_out, n_spans, n_terms] over common ids; NULL: no term has uncommon ids */
    const uint32_t *uncommon; /* [n_terms, n_tiles * DRAW_WORDS] bits; NULL likewise */
    size_t n_spans, n_tiles, n_blocks;
    int any_filter; /* some output has a row to filter */
} combine_job;

/* ---- descriptors ------------------------------------------------------------------------------------------------- */

static const rast_draw *draw_of(const combine_job *j, size_t o) { return (const rast_draw *)j->l.draw + o; }

static const float *coef_of(const rast_logits *l, size_t o) { return (const float *)l->coef + o * (size_t)l->n_terms; }

static int wants_sums(const rast_draw *d) { return (d->flags & (RAST_DRAW_LOGPROB | RAST_DRAW_STATS)) != 0; }

/* Whether output o needs term m's logits: in the sum, or of the base also to report on. */
static int needs_term(const combine_job *j, size_t o, size_t m) {
    return coef_of(&j->l, o)[m] != 0 || (m == 0 && draw_of(j, o)->flags & (RAST_DRAW_STATS | RAST_DRAW_PARTS));
}

/* The tile's ids that are uncommon for output o, as bits; returns whether there are any. */
static uint32_t uncommon_bits(const combine_job *j, size_t o, size_t tile, uint32_t bits[DRAW_WORDS]) {
    const float *coef = coef_of(&j->l, o);
    uint32_t any = 0;
    memset(bits, 0, DRAW_WORDS * sizeof *bits);
    if (!j->plan[o].has_uncommon) return 0;
    for (size_t m = 1; m < (size_t)j->l.n_terms; m++) {
        if (coef[m] == 0) continue;
        const uint32_t *term = j->uncommon + (m * j->n_tiles + tile) * DRAW_WORDS;
        for (size_t w = 0; w < DRAW_WORDS; w++) any |= bits[w] |= term[w];
    }
    return any;
}

/* ---- logits of one term ------------------------------------------------------------------------------------------ */

static size_t element_size(int32_t type) { return type == RAST_F32 ? 4 : 2; }

/* [n_vocab] logits of term m that were saved for output o, or NULL: the head gives them */
static const float *saved_row(const rast_logits *l, size_t m, size_t o) {
    const rast_term *term = &l->terms[m];
    const int32_t row = !term->saved ? -1 : term->saved_row ? ((const int32_t *)term->saved_row)[o] : (int32_t)o;
    return row < 0 ? NULL : (const float *)term->saved + (size_t)row * (size_t)l->n_vocab;
}

/* y[i, 0 .. n_ids) = logits of ids first .. first + n_ids - 1 of outputs o .. o + n - 1, rows y_stride floats apart */
static void term_logits(const combine_job *j, size_t m, size_t first, size_t n_ids, size_t o, size_t n, float *y,
                        size_t y_stride) {
    const rast_logits *l = &j->l;
    const rast_weight *head = l->terms[m].head;
    const term_input *in = &j->inputs[m];
    for (size_t i = 0, end; i < n; i = end) {
        const float *saved = saved_row(l, m, o + i);
        end = i + 1;
        if (saved) {
            memcpy(y + i * y_stride, saved + first, n_ids * sizeof *y);
            continue;
        }
        while (end < n && !saved_row(l, m, o + end)) end++;
        if (!in->dot) continue; /* outputs without the term, among others whose logits were saved */
        in->dot((const void *)head->data, head->stride, first, n_ids, in->rows + (o + i) * in->stride, in->stride,
                end - i, (size_t)head->in, y + i * y_stride, y_stride);
    }
}

/* The sum's one rounding sequence, whether over a tile or for one id. */
static void add_term(float *sum, float coef, const float *logits, size_t n) {
    for (size_t i = 0; i < n; i++) sum[i] += coef * logits[i];
}

static int has_bad(const float *x, size_t n) {
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t u;
        memcpy(&u, x + i, sizeof u);
        bad |= (u & 0x7f800000u) == 0x7f800000u;
    }
    return bad != 0;
}

/* ---- what follows the sum of a tile ------------------------------------------------------------------------------ */

/* Stores n values; when patching, only those that are there (the others were stored before). */
static void store_tile(float *row, const float *x, size_t n, int patch) {
    if (!patch) memcpy(row, x, n * sizeof *row);
    for (size_t i = 0; patch && i < n; i++)
        if (x[i] > -INFINITY) row[i] = x[i];
}

/* Takes the tile's combined logits x (and the base's, if STATS wants them) to statistics, rows and draw. patch: x holds
 * only the uncommon ids of a tile that has been finished without them, and -inf elsewhere. */
static void finish_tile(const combine_job *j, size_t o, size_t tile, const float *x, const float *base, int patch,
                        cpu_stats *stats, draw_best *best) {
    const rast_logits *l = &j->l;
    const rast_draw *d = draw_of(j, o);
    const out_plan *plan = &j->plan[o];
    const size_t first = tile * DRAW_TILE, n_vocab = (size_t)l->n_vocab;
    const size_t n = n_vocab - first < DRAW_TILE ? n_vocab - first : DRAW_TILE;

    if (wants_sums(d)) j->k->tile_stats(x, d->flags & RAST_DRAW_STATS ? base : NULL, DRAW_TILE, stats);
    if (d->flags & RAST_DRAW_LOGITS)
        store_tile((float *)l->logits + (size_t)d->logits_row * n_vocab + first, x, n, patch);
    if (!plan->row && d->target != -1) return;

    float processed[DRAW_TILE];
    memcpy(processed, x, sizeof processed);
    draw_process(l, o, first, processed);
    if (plan->row) store_tile(plan->row + first, processed, n, patch);
    const float max = draw_tile_max(processed);
    if (plan->tile_max) {
        if (!patch || max > plan->tile_max[tile]) plan->tile_max[tile] = max;
    } else if (d->target == -1) {
        draw_tile(j->k, d, first, processed, max, best);
    }
}

/* ---- first task: spans of the vocabulary ------------------------------------------------------------------------- */

typedef struct {
    size_t group, width;       /* tiles of a group; their floats */
    float *base, *other, *sum; /* [block, width] each */
    cpu_stats *stats;          /* [block] */
    cpu_stats *term_stats;     /* [block, n_terms], or NULL */
} span_scratch;

_Static_assert((size_t)OUT_BLOCK *DRAW_TILE >= GROUP_FLOATS, "scratch of a whole block is enough for the last one");

/* The scratch's parts in `memory`; *bytes is how much they take (0: too much to count). */
static span_scratch span_layout(size_t block, size_t n_terms, int has_uncommon, void *memory, size_t *bytes) {
    const size_t fit = GROUP_FLOATS / (block * DRAW_TILE), group = fit < 1 ? 1 : fit < SPAN_TILES ? fit : SPAN_TILES;
    const size_t floats = block * group * DRAW_TILE;
    size_t n_stats = block, size;
    if (has_uncommon && !(rast_mul(block, n_terms, &n_stats) && rast_add(n_stats, block, &n_stats))) n_stats = SIZE_MAX;
    if (!rast_mul(n_stats, sizeof(cpu_stats), &size) || !rast_add(size, 3 * floats * sizeof(float), &size)) size = 0;
    *bytes = size;
    span_scratch s = {.group = group, .width = group * DRAW_TILE, .base = memory};
    if (!memory) return s;
    s.other = s.base + floats;
    s.sum = s.other + floats;
    s.stats = (cpu_stats *)(s.sum + floats);
    s.term_stats = has_uncommon ? s.stats + block : NULL;
    return s;
}

static void write_part(const combine_job *j, size_t o, size_t m, size_t first, size_t n, const float *logits) {
    const size_t n_vocab = (size_t)j->l.n_vocab;
    float *row = (float *)j->l.parts + ((size_t)draw_of(j, o)->parts_row * (size_t)j->l.n_terms + m) * n_vocab + first;
    for (size_t i = 0; i < n; i++) row[i] = logits ? logits[i] : NAN;
}

static float *logits_of(const span_scratch *s, size_t m) { return m == 0 ? s->base : s->other; }

/* How many of n ids from `first` on term m has. */
static size_t live_ids(const combine_job *j, size_t m, size_t first, size_t n) {
    const size_t has = (size_t)j->l.terms[m].n_rows, n_vocab = (size_t)j->l.n_vocab,
                 end = has < n_vocab ? has : n_vocab;
    const size_t live = end > first ? end - first : 0;
    return live < n ? live : n;
}

/* Term m's logits of the n_tiles tiles from `tile` on, of outputs o .. o + n - 1, if any of these needs them. */
static void multiply_group(const combine_job *j, const span_scratch *s, size_t m, size_t tile, size_t n_tiles, size_t o,
                           size_t n) {
    const size_t first = tile * DRAW_TILE, live = live_ids(j, m, first, n_tiles * DRAW_TILE);
    int needed = 0;
    for (size_t i = 0; i < n && !needed; i++) needed = needs_term(j, o + i, m);
    if (needed && live) term_logits(j, m, first, live, o, n, logits_of(s, m), s->width);
}

/* Adds term m's logits of a tile, the g-th of the group, to the sums of outputs o .. o + n - 1. */
static void add_tile(const combine_job *j, const span_scratch *s, size_t m, size_t tile, size_t g, size_t span,
                     size_t o, size_t n) {
    const rast_logits *l = &j->l;
    const size_t first = tile * DRAW_TILE, n_vocab = (size_t)l->n_vocab, n_terms = (size_t)l->n_terms;
    const size_t n_ids = n_vocab - first < DRAW_TILE ? n_vocab - first : DRAW_TILE;
    const size_t live = live_ids(j, m, first, DRAW_TILE);

    for (size_t i = 0; i < n; i++) {
        const rast_draw *d = draw_of(j, o + i);
        const float coef = coef_of(l, o + i)[m];
        float *logits = logits_of(s, m) + i * s->width + g * DRAW_TILE;
        if (needs_term(j, o + i, m))
            for (size_t v = live; v < DRAW_TILE; v++) logits[v] = -INFINITY;
        if (d->flags & RAST_DRAW_PARTS) write_part(j, o + i, m, first, n_ids, needs_term(j, o + i, m) ? logits : NULL);
        if (coef == 0) continue;

        span_part *part = &j->parts[(o + i) * j->n_spans + span];
        if (has_bad(logits, live) && (part->bad < 0 || (int32_t)m < part->bad)) part->bad = (int32_t)m;
        add_term(s->sum + i * s->width + g * DRAW_TILE, coef, logits, DRAW_TILE);
        if (m > 0 && j->plan[o + i].has_uncommon) {
            uint32_t bits[DRAW_WORDS];
            uncommon_bits(j, o + i, tile, bits);
            const size_t limit = (size_t)j->plan[o + i].limit;
            for (size_t v = 0; v < DRAW_TILE; v++)
                if (first + v >= limit || bits[v / 32] >> v % 32 & 1) logits[v] = -INFINITY;
            j->k->tile_stats(logits, NULL, DRAW_TILE, &s->term_stats[i * n_terms + m]);
        }
    }
}

/* Finishes the tile of one output, whose sum and base logits are complete. */
static void end_tile(const combine_job *j, size_t o, size_t tile, float *sum, float *base, cpu_stats *stats,
                     span_part *part) {
    const size_t first = tile * DRAW_TILE, limit = (size_t)j->plan[o].limit, valid = (size_t)j->l.n_valid;
    const size_t drawable = limit > first ? limit - first : 0;
    uint32_t bits[DRAW_WORDS];

    if (part->bad < 0 && has_bad(sum, drawable < DRAW_TILE ? drawable : DRAW_TILE)) part->bad = j->l.n_terms;
    for (size_t v = drawable; v < DRAW_TILE; v++) sum[v] = -INFINITY;
    if (uncommon_bits(j, o, tile, bits))
        for (size_t v = 0; v < DRAW_TILE; v++)
            if (bits[v / 32] >> v % 32 & 1) sum[v] = -INFINITY;
    if (draw_of(j, o)->flags & RAST_DRAW_STATS) {
        for (size_t v = valid > first ? valid - first : 0; v < DRAW_TILE; v++) base[v] = -INFINITY;
        if ((double)draw_tile_max(base) > part->base_first.key)
            for (size_t v = 0; v < drawable && v < DRAW_TILE; v++)
                draw_merge(&part->base_first, (double)base[v], (int32_t)(first + v));
    }
    finish_tile(j, o, tile, sum, base, 0, stats, &part->draw);
}

static void span_unit(const combine_job *j, size_t unit, const cpu_worker *worker) {
    const size_t n_terms = (size_t)j->l.n_terms, n_out = (size_t)j->l.n_out;
    const size_t span = unit / j->n_blocks, o = unit % j->n_blocks * OUT_BLOCK;
    const size_t n = n_out - o < OUT_BLOCK ? n_out - o : OUT_BLOCK;
    const size_t begin = span * SPAN_TILES, end = begin + SPAN_TILES < j->n_tiles ? begin + SPAN_TILES : j->n_tiles;
    size_t bytes;
    const span_scratch s = span_layout(n, n_terms, j->uncommon != NULL, worker->scratch, &bytes);

    for (size_t i = 0; i < n; i++) {
        const draw_best none = {-INFINITY, -1};
        j->parts[(o + i) * j->n_spans + span] = (span_part){none, none, LOG_SUM_EMPTY, LOG_SUM_EMPTY, -1};
        if (wants_sums(draw_of(j, o + i))) cpu_stats_clear(&s.stats[i]);
        for (size_t m = 0; j->plan[o + i].has_uncommon && m < n_terms; m++)
            cpu_stats_clear(&s.term_stats[i * n_terms + m]);
    }
    for (size_t tile = begin, n_tiles; tile < end; tile += n_tiles) {
        n_tiles = end - tile < s.group ? end - tile : s.group;
        memset(s.sum, 0, n * s.width * sizeof *s.sum);
        for (size_t m = 0; m < n_terms; m++) {
            multiply_group(j, &s, m, tile, n_tiles, o, n);
            for (size_t g = 0; g < n_tiles; g++) add_tile(j, &s, m, tile + g, g, span, o, n);
        }
        for (size_t g = 0; g < n_tiles; g++)
            for (size_t i = 0; i < n; i++) {
                const size_t at = i * s.width + g * DRAW_TILE;
                end_tile(j, o + i, tile + g, s.sum + at, s.base + at, &s.stats[i],
                         &j->parts[(o + i) * j->n_spans + span]);
            }
    }
    for (size_t i = 0; i < n; i++) {
        const rast_draw *d = draw_of(j, o + i);
        const size_t at = (o + i) * j->n_spans + span;
        const cpu_stats *st = &s.stats[i];
        if (wants_sums(d)) j->parts[at].combined = log_sum_of_lanes(j->k, st->max_t, st->sum_t, st->dif_t);
        if (d->flags & RAST_DRAW_STATS) j->parts[at].base = log_sum_of_lanes(j->k, st->max_b, st->sum_b, NULL);
        for (size_t m = 0; j->plan[o + i].has_uncommon && m < n_terms; m++) {
            st = &s.term_stats[i * n_terms + m];
            j->term_sums[at * n_terms + m] = log_sum_of_lanes(j->k, st->max_t, st->sum_t, NULL);
        }
    }
}

static void span_task(const void *args, size_t begin, size_t end, const cpu_worker *worker) {
    for (; begin < end; begin++) span_unit(args, begin, worker);
}

/* ---- second task: rows ------------------------------------------------------------------------------------------- */

/* lse[m] = log-sum-exp of term m over the common ids; 0 where there is none, as a constant then says nothing. */
static void term_constants(const combine_job *j, size_t o, float *lse) {
    const size_t n_terms = (size_t)j->l.n_terms;
    for (size_t m = 0; m < n_terms; m++) {
        log_sum sum = LOG_SUM_EMPTY;
        for (size_t s = 0; s < j->n_spans; s++) log_sum_add(&sum, j->term_sums[(o * j->n_spans + s) * n_terms + m]);
        lse[m] = sum.max > -INFINITY ? (float)log_sum_value(&sum) : 0;
    }
}

static float one_logit(const combine_job *j, size_t o, size_t m, size_t id) {
    float y = -INFINITY;
    if (id < (size_t)j->l.terms[m].n_rows && id < (size_t)j->l.n_vocab) term_logits(j, m, id, 1, o, 1, &y, 1);
    return y;
}

/* The combined, unprocessed logit of one id, equal to what the tiles give. */
static float one_sum(const combine_job *j, size_t o, size_t id, const float *lse) {
    const float *coef = coef_of(&j->l, o);
    uint32_t bits[DRAW_WORDS] = {0};
    float sum = 0;
    if (id >= (size_t)j->plan[o].limit) return -INFINITY;
    uncommon_bits(j, o, id / DRAW_TILE, bits);
    const int uncommon = bits[id % DRAW_TILE / 32] >> id % 32 & 1;
    for (size_t m = 0; m < (size_t)j->l.n_terms; m++) {
        if (coef[m] == 0) continue;
        const float logit = m > 0 && uncommon ? lse[m] : one_logit(j, o, m, id);
        add_term(&sum, coef[m], &logit, 1);
    }
    return sum;
}

/* Adds what the spans left out. */
static void add_uncommon(const combine_job *j, size_t o, const float *lse, span_part *all) {
    const size_t limit = (size_t)j->plan[o].limit;
    cpu_stats stats;
    cpu_stats_clear(&stats);
    for (size_t tile = 0; tile < j->n_tiles && tile * DRAW_TILE < limit; tile++) {
        const size_t first = tile * DRAW_TILE;
        uint32_t bits[DRAW_WORDS];
        float sum[DRAW_TILE], base[DRAW_TILE];
        if (!uncommon_bits(j, o, tile, bits)) continue;
        for (size_t v = 0; v < DRAW_TILE; v++) {
            const int here = bits[v / 32] >> v % 32 & 1 && first + v < limit;
            sum[v] = here ? one_sum(j, o, first + v, lse) : -INFINITY;
            base[v] = here ? one_logit(j, o, 0, first + v) : -INFINITY;
        }
        finish_tile(j, o, tile, sum, base, 1, &stats, &all->draw);
    }
    if (wants_sums(draw_of(j, o)))
        log_sum_add(&all->combined, log_sum_of_lanes(j->k, stats.max_t, stats.sum_t, stats.dif_t));
}

/* Filters the row of processed logits and draws from what stays. buffers: 3 * draw_capacity elements. */
static void filter_row(const combine_job *j, size_t o, void *buffers, draw_best *best) {
    const rast_draw *d = draw_of(j, o);
    const out_plan *plan = &j->plan[o];
    const size_t n_vocab = (size_t)j->l.n_vocab, capacity = draw_capacity(n_vocab);
    int32_t *ids = buffers;
    float *x = (float *)(ids + capacity), *weight = x + capacity;
    const size_t n = draw_filter(j->k, d, plan->row, plan->tile_max, n_vocab, ids, x, weight);
    if (d->target == -1) draw_kept(d, ids, x, n, best);
    if (d->flags & RAST_DRAW_SCORES) {
        for (size_t v = 0; v < n_vocab; v++) plan->row[v] = -INFINITY;
        for (size_t i = 0; i < n; i++) plan->row[ids[i]] = x[i];
    }
}

/* Of several outputs of a slot (drafts to verify), the last one's token is the slot's. */
static int is_last_of_slot(const combine_job *j, size_t o) {
    const int32_t slot = draw_of(j, o)->slot;
    for (size_t p = o + 1; p < (size_t)j->l.n_out; p++)
        if (draw_of(j, p)->slot == slot) return 0;
    return slot >= 0;
}

static void row_task(const void *args, size_t o, const cpu_worker *worker) {
    const combine_job *j = args;
    const rast_draw *d = draw_of(j, o);
    float *lse = worker->scratch; /* [n_terms], after the buffers of filter_row */
    rast_drawn *out = (rast_drawn *)j->l.out + o;
    span_part all = j->parts[o * j->n_spans];

    if (j->any_filter) lse += 3 * draw_capacity((size_t)j->l.n_vocab);
    *out = (rast_drawn){.token = -1, .logprob = NAN, .stats = {-1, NAN, NAN}, .bad = -1};
    for (size_t s = 1; s < j->n_spans; s++) {
        const span_part *part = &j->parts[o * j->n_spans + s];
        if (part->bad >= 0 && (all.bad < 0 || part->bad < all.bad)) all.bad = part->bad;
        draw_merge(&all.draw, part->draw.key, part->draw.id);
        draw_merge(&all.base_first, part->base_first.key, part->base_first.id);
        log_sum_add(&all.combined, part->combined);
        log_sum_add(&all.base, part->base);
    }
    out->bad = all.bad;
    if (all.bad >= 0) return;
    if (j->plan[o].has_uncommon) {
        term_constants(j, o, lse);
        add_uncommon(j, o, lse, &all);
    }
    if (j->plan[o].tile_max) filter_row(j, o, worker->scratch, &all.draw);

    out->token = d->target >= 0 ? d->target : all.draw.id;
    if (d->target == -1 && out->token < 0) out->bad = -2;
    if (j->l.drawn && out->token >= 0 && is_last_of_slot(j, o)) ((int32_t *)j->l.drawn)[d->slot] = out->token;
    const double lse_combined = log_sum_value(&all.combined), lse_base = log_sum_value(&all.base);
    if (d->flags & RAST_DRAW_STATS) {
        const double kl = all.combined.dif / all.combined.sum - (lse_combined - lse_base);
        out->stats.base_token = all.base_first.id;
        out->stats.kl = (float)(kl < 0 ? 0 : kl);
    }
    if (out->token < 0) return;
    const size_t token = (size_t)out->token;
    if (d->flags & RAST_DRAW_LOGPROB) out->logprob = (float)((double)one_sum(j, o, token, lse) - lse_combined);
    if (d->flags & RAST_DRAW_STATS) {
        const double logit = token < (size_t)j->l.n_valid ? (double)one_logit(j, o, 0, token) : -INFINITY;
        out->stats.base_logprob = (float)(logit - lse_base);
    }
}

/* ---- recording --------------------------------------------------------------------------------------------------- */

/* a * b * size bytes of temporary memory; a size that overflows fails like one that does not exist. */
static void *temp_array(rast_queue *q, size_t a, size_t b, size_t size) {
    size_t bytes;
    if (!rast_mul(a, b, &bytes) || !rast_mul(bytes, size, &bytes) || bytes > PTRDIFF_MAX) bytes = PTRDIFF_MAX;
    return cpu_temp(q, bytes);
}

static const uint32_t *record_uncommon(rast_queue *q, const rast_logits *l, size_t n_tiles) {
    const size_t n_terms = (size_t)l->n_terms, words = n_tiles * DRAW_WORDS;
    uint32_t *bits = temp_array(q, n_terms, words, sizeof *bits);
    if (!bits) return NULL;
    memset(bits, 0, n_terms * words * sizeof *bits);
    for (size_t m = 1; m < n_terms; m++)
        for (int32_t i = 0; i < l->terms[m].n_uncommon; i++) {
            const size_t id = (size_t)l->terms[m].uncommon[i];
            if (id < (size_t)l->n_vocab) bits[m * words + id / 32] |= 1u << id % 32;
        }
    return bits;
}

/* Plans all outputs (descriptors are final when an op is recorded); NULL: out of memory. */
static const out_plan *record_plan(rast_queue *q, const rast_logits *l, size_t n_tiles, int *any_filter) {
    const size_t n_out = (size_t)l->n_out, n_vocab = (size_t)l->n_vocab;
    const rast_draw *draws = (const rast_draw *)l->draw;
    out_plan *plan = temp_array(q, n_out, 1, sizeof *plan);
    if (!plan) return NULL;
    *any_filter = 0;
    for (size_t o = 0; o < n_out; o++) {
        const rast_draw *d = &draws[o];
        const int scores = (d->flags & RAST_DRAW_SCORES) != 0;
        plan[o] = (out_plan){.limit = l->n_valid < l->n_vocab ? l->n_valid : l->n_vocab};
        for (int32_t m = 0; m < l->n_terms; m++) {
            if (coef_of(l, o)[m] == 0) continue;
            if (l->terms[m].n_rows < plan[o].limit) plan[o].limit = l->terms[m].n_rows;
            if (m > 0 && l->terms[m].n_uncommon > 0) plan[o].has_uncommon = 1;
        }
        if (d->limit > 0 && d->limit < plan[o].limit) plan[o].limit = d->limit;
        if (scores) plan[o].row = (float *)l->scores + (size_t)d->scores_row * n_vocab;
        if (!draw_has_filter(d) || !(scores || d->target == -1)) continue;
        *any_filter = 1;
        if (!scores && !(plan[o].row = temp_array(q, n_vocab, 1, sizeof(float)))) return NULL;
        if (!(plan[o].tile_max = temp_array(q, n_tiles, 1, sizeof(float)))) return NULL;
    }
    return plan;
}

typedef struct {
    const cpu_kernels *k;
    const rast_term *term;
    cpu_group *groups; /* [n_out, in / 32] */
} quantize_job;

static void quantize_task(const void *args, size_t o, const cpu_worker *worker) {
    const quantize_job *j = args;
    const size_t n = (size_t)j->term->head->in;
    const char *hidden = (const char *)j->term->hidden + o * n * element_size(j->term->hidden_type);
    (void)worker;
    j->k->quantize(hidden, j->term->hidden_type, n, j->groups + o * (n / CPU_GROUP));
}

/* Says where each term's hidden rows are, and records what quantizes them where the head is quantized; NULL: out of
 * memory. */
static const term_input *record_inputs(rast_queue *q, const rast_logits *l) {
    const cpu_kernels *k = cpu_queue_kernels(q);
    const size_t n_terms = (size_t)l->n_terms, n_out = (size_t)l->n_out;
    term_input *inputs = temp_array(q, n_terms, 1, sizeof *inputs);
    if (!inputs) return NULL;
    for (size_t m = 0; m < n_terms; m++) {
        const rast_term *term = &l->terms[m];
        const rast_weight *head = term->head;
        if (!term->hidden) {
            inputs[m] = (term_input){0};
            continue;
        }
        const size_t n = (size_t)head->in;
        if (head->type < RAST_N_DTYPES) {
            inputs[m] = (term_input){(const char *)term->hidden, n * element_size(term->hidden_type),
                                     k->dot[head->type][term->hidden_type]};
            continue;
        }
        const quantize_job job = {k, term, temp_array(q, n_out, n / CPU_GROUP, sizeof(cpu_group))};
        if (!job.groups) return NULL;
        cpu_record_small(q, quantize_task, n_out, n_out * n, &job, sizeof job, 0);
        inputs[m] = (term_input){(const char *)job.groups, n / CPU_GROUP * sizeof(cpu_group),
                                 k->dot_groups[head->type - RAST_Q8_0]};
    }
    return inputs;
}

void cpu_combine(rast_queue *q, const rast_logits *l) {
    if (l->n_out <= 0) return;
    const size_t n_out = (size_t)l->n_out, n_terms = (size_t)l->n_terms;
    combine_job job = {.l = *l, .k = cpu_queue_kernels(q), .n_tiles = draw_n_tiles((size_t)l->n_vocab)};
    int any_uncommon = 0;
    job.n_spans = (job.n_tiles + SPAN_TILES - 1) / SPAN_TILES;
    job.n_blocks = (n_out + OUT_BLOCK - 1) / OUT_BLOCK;

    if (!(job.inputs = record_inputs(q, l))) return;
    if (!(job.plan = record_plan(q, l, job.n_tiles, &job.any_filter))) return;
    for (size_t o = 0; o < n_out; o++) any_uncommon |= job.plan[o].has_uncommon;
    if (!(job.parts = temp_array(q, n_out, job.n_spans, sizeof *job.parts))) return;
    if (any_uncommon) {
        /* n_out * n_spans has been allocated, so it does not overflow */
        if (!(job.uncommon = record_uncommon(q, l, job.n_tiles))) return;
        if (!(job.term_sums = temp_array(q, n_out * job.n_spans, n_terms, sizeof *job.term_sums))) return;
    }

    size_t span_bytes, row_bytes, n_units, filter_bytes = 0;
    span_layout(n_out < OUT_BLOCK ? n_out : OUT_BLOCK, n_terms, any_uncommon, NULL, &span_bytes);
    if (!span_bytes || !rast_mul(job.n_spans, job.n_blocks, &n_units) ||
        (job.any_filter && !rast_mul(draw_capacity((size_t)l->n_vocab), 3 * sizeof(float), &filter_bytes)) ||
        !rast_mul(n_terms, sizeof(float), &row_bytes) || !rast_add(row_bytes, filter_bytes, &row_bytes)) {
        cpu_temp(q, PTRDIFF_MAX); /* fails, which submit reports */
        return;
    }
    cpu_record_pieces(q, span_task, n_units, job.n_blocks > 1 ? CPU_PIECES : 1, &job, sizeof job, span_bytes);
    cpu_record(q, row_task, n_out, &job, sizeof job, row_bytes);
}
