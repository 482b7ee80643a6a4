/* plan.c: chooses the rows of a step and lays them out as passes, outputs and draw parameters. */
#include "engine.h"

#include <stdlib.h>
#include <string.h>

enum { ALIGN = 64, MAX_ROW_BYTES = 64 << 20 /* of logits in one step, for prompts */ };

void *rast_grow(void *array, size_t *cap, size_t n, size_t size) {
    if (n < *cap) return array;
    size_t want = *cap ? *cap : 8, bytes;
    while (want <= n)
        if (!rast_mul(want, 2, &want)) return NULL;
    if (!rast_mul(want, size, &bytes)) return NULL;
    void *grown = realloc(array, bytes);
    if (grown) *cap = want;
    return grown;
}

/* Room for `bytes` more in the arena; *offset is where. The host pointer may move with the next call. */
static int arena_take(rast_arena *a, size_t bytes, size_t *offset, rast_error *err) {
    size_t end;
    if (!rast_add(a->used, bytes, &end) || !rast_add(end, ALIGN, &end)) goto memory;
    if (end > a->cap) {
        size_t cap = a->cap ? a->cap : 4096;
        while (cap < end)
            if (!rast_mul(cap, 2, &cap)) goto memory;
        uint8_t *host = realloc(a->host, cap);
        if (!host) goto memory;
        a->host = host;
        a->cap = cap;
    }
    *offset = a->used;
    memset(a->host + a->used, 0, end - a->used);
    a->used = end / ALIGN * ALIGN;
    return RAST_OK;
memory:
    return rast_fail(err, RAST_ERR_MEMORY, "no memory for the description of a step");
}

static int arena_take_ints(rast_arena *a, size_t n, rast_dev *offset, rast_error *err) {
    size_t at = 0;
    int status = arena_take(a, n * sizeof(int32_t), &at, err);
    *offset = at;
    return status;
}

static int32_t *ints(const rast_arena *a, rast_dev offset) { return (int32_t *)(void *)(a->host + offset); }

static int32_t bucket(size_t n, int32_t cap) {
    int32_t b = 1;
    while ((size_t)b < n && b < cap) b *= 2;
    return b < cap ? b : cap;
}

static int has(uint64_t mask, int32_t net) { return mask >> net & 1; }

/* The sample's drafts are this net's, and their rows in its cache. */
static int drew(const rast_sample *s, int32_t net) { return s->draft_net && s->draft_net == net; }

/* ---- which rows ---------------------------------------------------------------------------------------------------- */

/* Tokens that the net should have cached when the sample is ready to draw: the prompt but its last token always, so that a
 * prefix is complete for all nets; everything where the net has a part in the outputs. */
static size_t target(const rast_sample *s, int32_t net) {
    if (has(rast_sample_draw_mask(s), net) || rast_sample_prompt_pending(s)) return s->n_ids;
    return s->job->n_ids - 1;
}

/* Prompt rows with logits are many bytes: so many at once. */
static size_t prompt_rows_limit(const rast_engine *e, const rast_sample *s) {
    const uint32_t want = s->job->want;
    size_t planes = 0;
    if (!rast_sample_prompt_pending(s)) return SIZE_MAX;
    if (want & RAST_WANT_LOGITS) planes += 1;
    if (want & RAST_WANT_COMPONENTS) planes += (size_t)e->model->n_nets;
    if (!planes) return SIZE_MAX;
    const size_t rows = MAX_ROW_BYTES / (planes * (size_t)e->model->n_vocab * sizeof(float));
    const size_t wanted = rast_sample_first_wanted(s), silent = wanted > s->start[0] ? wanted - s->start[0] : 0;
    return silent + (rows ? rows : 1);
}

/* Rows of a net that a sample may take when `reserved` samples behind it still want one each; one it always may. */
static size_t rows_for(const rast_engine *e, int32_t net, size_t reserved) {
    const size_t left = (size_t)e->rows_left[net];
    return left > reserved + 1 ? left - reserved : left < 1 ? 0 : 1;
}

/* Drafts that no net has room for stay unchecked. */
static void limit_drafts(const rast_engine *e, rast_sample *s, size_t reserved) {
    for (int32_t m = 0; m < e->model->n_nets; m++) {
        if (!has(rast_sample_draw_mask(s), m) || drew(s, m)) continue;
        const size_t left = (size_t)e->rows_left[m] > reserved ? (size_t)e->rows_left[m] - reserved : 0;
        if (s->n_draft > left) s->n_draft = (uint32_t)left;
    }
}

/* First position that each net has to compute: behind what the blocks hold by now, whoever filled them, but no prompt position
 * that is still to be reported is skipped; those go through all nets together. */
static void find_start(const rast_engine *e, rast_sample *s) {
    const int pending = rast_sample_prompt_pending(s);
    const size_t wanted = rast_sample_first_wanted(s), last = s->n_ids - 1;
    const size_t bound = pending && wanted < last ? wanted : last;
    uint32_t least = UINT32_MAX;
    for (int32_t m = 0; m < e->model->n_nets; m++) {
        size_t at = s->cached[m];
        while (at < bound && has(s->job->active, m)) {
            const size_t block = at / RAST_BLOCK_TOKENS;
            size_t known = block * RAST_BLOCK_TOKENS + rast_blocks_filled(&e->blocks, s->blocks[block], m);
            if (known > bound) known = bound;
            if (known <= at) break;
            at = known;
        }
        s->start[m] = (uint32_t)at;
        if (has(s->job->active, m) && s->start[m] < least) least = s->start[m];
    }
    for (int32_t m = 0; m < e->model->n_nets && pending; m++)
        if (has(s->job->active, m)) s->start[m] = least;
}

/* Takes over what the sample's tail block has of the last block's tokens. Returns where the rows of this step must end: before
 * that block as long as another sample computes these tokens. */
static size_t use_tail(const rast_engine *e, rast_sample *s) {
    const size_t first = rast_sample_last_block(s), want = s->n_ids - 1 - first;
    s->copies = 0;
    s->tail_done = 0;
    if (s->tail < 0) return SIZE_MAX;
    for (int32_t m = 0; m < e->model->n_nets; m++) {
        if (!has(s->job->active, m) || target(s, m) <= s->start[m]) continue;
        if (s->start[m] < first) return first;
        if (rast_blocks_filled(&e->blocks, s->tail, m) < want && rast_blocks_claimed(&e->blocks, s->tail, m))
            return first;
    }
    s->tail_done = 1;
    for (int32_t m = 0; m < e->model->n_nets; m++) {
        const size_t known = rast_blocks_filled(&e->blocks, s->tail, m), got = known < want ? known : want;
        if (!has(s->job->active, m) || s->start[m] != first || !got) continue;
        s->start[m] = (uint32_t)(first + got);
        s->copies |= (uint64_t)1 << m;
    }
    return SIZE_MAX;
}

/* Where a run of rows from the net's start to `end` must end: before a block that another sample computes in this step. */
static size_t open_end(const rast_engine *e, const rast_sample *s, int32_t m, size_t end) {
    for (size_t i = s->start[m] / RAST_BLOCK_TOKENS; i * RAST_BLOCK_TOKENS < end; i++)
        if (rast_blocks_claimed(&e->blocks, s->blocks[i], m))
            return i * RAST_BLOCK_TOKENS > s->start[m] ? i * RAST_BLOCK_TOKENS : s->start[m];
    return end;
}

static void claim_rows(rast_engine *e, const rast_sample *s, int claim) {
    for (int32_t m = 0; m < e->model->n_nets && s->scheduled; m++)
        for (size_t i = s->start[m] / RAST_BLOCK_TOKENS; s->end[m] > s->start[m] && i * RAST_BLOCK_TOKENS < s->end[m];
             i++)
            rast_blocks_claim(&e->blocks, s->blocks[i], m, claim);
}

static void choose_rows(rast_engine *e, rast_sample *s, size_t reserved) {
    const int32_t n_nets = e->model->n_nets;
    const uint64_t active = s->job->active;
    s->scheduled = s->draws = 0;
    s->first_draw = 0;
    find_start(e, s);
    if (s->draft_net) s->start[s->draft_net] = (uint32_t)s->n_ids + s->n_draft;
    const size_t stop = use_tail(e, s), limit = prompt_rows_limit(e, s);
    size_t take = limit;
    int fits = 1;
    for (int32_t m = 0; m < n_nets; m++) {
        s->end[m] = s->start[m];
        if (!has(active, m) || target(s, m) <= s->start[m]) continue;
        const size_t left = rows_for(e, m, reserved), end = open_end(e, s, m, target(s, m));
        if (target(s, m) - s->start[m] > (left < limit ? left : limit) || end < target(s, m) || stop < target(s, m))
            fits = 0;
        if (left < take) take = left;
        if (rast_sample_prompt_pending(s) && end - s->start[m] < take) take = end - s->start[m];
    }
    if (fits) {
        s->draws = s->job->stop.max_new > 0;
        for (int32_t m = 0; m < n_nets; m++)
            if (has(active, m) && target(s, m) > s->start[m]) {
                s->end[m] = (uint32_t)target(s, m);
                e->rows_left[m] -= (int32_t)(s->end[m] - s->start[m]);
            }
        limit_drafts(e, s, reserved);
        for (int32_t m = 0; m < n_nets; m++)
            if (s->n_draft && has(rast_sample_draw_mask(s), m) && !drew(s, m)) {
                s->end[m] += s->n_draft;
                e->rows_left[m] -= (int32_t)s->n_draft;
            }
        s->scheduled = 1;
    } else {
        s->n_draft = 0;
    }
    for (int32_t m = 0; m < n_nets && take && !fits; m++) {
        size_t end = s->start[m] + take;
        if (!has(active, m)) continue;
        if (end > target(s, m)) end = target(s, m);
        if (end > s->n_ids - 1) end = s->n_ids - 1; /* the last row goes when all nets can take it */
        if (end > stop) end = stop;
        end = open_end(e, s, m, end);
        if (end <= s->start[m]) continue;
        s->end[m] = (uint32_t)end;
        e->rows_left[m] -= (int32_t)(end - s->start[m]);
        s->scheduled = 1;
    }
    claim_rows(e, s, 1);
}

/* All nets of the next draw lack only the last token. */
static int is_decoding(const rast_engine *e, const rast_sample *s) {
    for (int32_t m = 0; m < e->model->n_nets; m++)
        if (has(rast_sample_draw_mask(s), m) && s->cached[m] + 1 < s->n_ids) return 0;
    return rast_sample_n_new(s) > 0;
}

/* ---- outputs ------------------------------------------------------------------------------------------------------- */

static void count_outputs(rast_engine *e, rast_sample *s) {
    s->first_out = e->plan.n_out;
    s->n_prompt_out = s->n_draw_out = 0;
    if (!s->scheduled) return;
    if (rast_sample_prompt_pending(s)) {
        const size_t wanted = rast_sample_first_wanted(s), from = s->start[0] > wanted ? s->start[0] : wanted;
        const size_t end = s->end[0] - s->n_draft;
        if (end > from) s->n_prompt_out = end - from;
    }
    if (s->draws) s->n_draw_out = 1 + s->n_draft;
    const size_t n = s->n_prompt_out + s->n_draw_out;
    s->first_logits = e->plan.n_logits;
    s->first_scores = e->plan.n_scores;
    s->first_parts = e->plan.n_parts;
    if (s->job->want & RAST_WANT_LOGITS) e->plan.n_logits += (int32_t)n;
    if (s->job->want & RAST_WANT_SCORES) e->plan.n_scores += (int32_t)s->n_draw_out;
    if (s->job->want & RAST_WANT_COMPONENTS) e->plan.n_parts += (int32_t)n;
    e->plan.n_out += n;
}

/* Position whose row gives output i of the sample. */
static size_t output_position(const rast_sample *s, size_t i) {
    if (i < s->n_prompt_out) return s->end[0] - s->n_draft - s->n_prompt_out + i;
    return s->n_ids - 1 + s->first_draw + (i - s->n_prompt_out);
}

static uint32_t draw_flags(uint32_t want) {
    return (want & RAST_WANT_LOGPROBS ? RAST_DRAW_LOGPROB : 0u) | (want & RAST_WANT_STATS ? RAST_DRAW_STATS : 0u) |
           (want & RAST_WANT_LOGITS ? RAST_DRAW_LOGITS : 0u) | (want & RAST_WANT_COMPONENTS ? RAST_DRAW_PARTS : 0u);
}

static rast_draw *draws_at(const rast_engine *e) { return (rast_draw *)(void *)(e->arena.host + e->plan.draw); }

/* How the token i behind the next one is drawn, given the drafts before it. */
static rast_draw new_draw(rast_engine *e, const rast_sample *s, uint32_t i) {
    const rast_sampling *sampling = &s->job->sampling;
    return (rast_draw){.temperature = sampling->temperature,
                       .top_p = sampling->top_p,
                       .min_p = sampling->min_p,
                       .repetition_penalty = sampling->repetition_penalty,
                       .top_k = sampling->top_k,
                       .flags = sampling->do_sample ? RAST_DRAW_SAMPLE : 0u,
                       .stream = s->stream,
                       .position = (uint32_t)(s->n_ids + i),
                       .target = -1,
                       .slot = s->slot,
                       .draft = -1,
                       .limit = s->job->limit,
                       .mask = rast_sample_has_mask(s, i) ? (int32_t)e->plan.n_masks++ : -1};
}
/* An output that nothing is drawn for. */
static const rast_draw nothing = {
    .temperature = 1, .top_p = 1, .repetition_penalty = 1, .target = -2, .slot = -1, .draft = -1, .mask = -1};

/* Places for the parameters of all outputs; those behind n_out, up to a bucket, are of outputs that nobody asked for, with
 * all coefficients 0. */
static int take_outputs(rast_engine *e, size_t n_terms, rast_error *err) {
    rast_plan *plan = &e->plan;
    plan->n_drawn = plan->n_out;
    if (e->model->ops->replays && plan->n_out && plan->n_out <= (size_t)e->max_seqs)
        plan->n_drawn = (size_t)bucket(plan->n_out, e->max_seqs);
    int status = arena_take(&e->arena, plan->n_drawn * sizeof(rast_draw), &plan->draw, err);
    if (status == RAST_OK) status = arena_take(&e->arena, plan->n_drawn * n_terms * sizeof(float), &plan->coef, err);
    for (size_t o = plan->n_out; o < plan->n_drawn && status == RAST_OK; o++) draws_at(e)[o] = nothing;
    return status;
}

static void describe_outputs(rast_engine *e, rast_sample *s) {
    const rast_job *job = s->job;
    const size_t n_nets = (size_t)e->model->n_nets;
    rast_draw *draw = draws_at(e) + s->first_out;
    float *coef = (float *)(void *)(e->arena.host + e->plan.coef) + s->first_out * n_nets;
    for (size_t i = 0; i < s->n_prompt_out; i++, draw++, coef += n_nets) {
        const size_t next = output_position(s, i) + 1;
        *draw = nothing;
        draw->flags = draw_flags(job->want);
        draw->target = next < job->n_ids ? job->ids[next] : -2;
        draw->limit = job->limit;
        draw->logits_row = s->first_logits + (int32_t)i;
        draw->parts_row = s->first_parts + (int32_t)i;
        memcpy(coef, job->coef, n_nets * sizeof *coef);
    }
    for (uint32_t i = 0; i < s->n_draw_out; i++, draw++, coef += n_nets) {
        *draw = new_draw(e, s, i);
        draw->draft = i ? s->draft[i - 1] : -1;
        draw->flags |= draw_flags(job->want) | (job->want & RAST_WANT_SCORES ? RAST_DRAW_SCORES : 0u);
        draw->logits_row = s->first_logits + (int32_t)(s->n_prompt_out + i);
        draw->parts_row = s->first_parts + (int32_t)(s->n_prompt_out + i);
        draw->scores_row = s->first_scores + (int32_t)i;
        if (rast_sample_n_new(s) < job->transfer_start)
            coef[0] = 1;
        else
            memcpy(coef, job->coef, n_nets * sizeof *coef);
    }
}

/* ---- passes -------------------------------------------------------------------------------------------------------- */

static int same_rows(const rast_engine *e, int32_t a, int32_t b) {
    for (size_t i = 0; i < e->n_running; i++) {
        const rast_sample *s = e->running[i];
        if (!s->scheduled) continue;
        if (s->start[a] != s->start[b] || s->end[a] != s->end[b]) return 0;
    }
    return 1;
}

static int by_blocks(const void *x, const void *y) {
    const rast_sample *a = *(rast_sample *const *)x, *b = *(rast_sample *const *)y;
    const size_t n = a->n_blocks < b->n_blocks ? a->n_blocks : b->n_blocks;
    const int order = memcmp(a->blocks, b->blocks, n * sizeof *a->blocks);
    return order ? order : (a->n_blocks > b->n_blocks) - (a->n_blocks < b->n_blocks);
}

/* Samples that begin with the same blocks follow each other in a pass, so that a device can read these once. */
static void order_samples(rast_engine *e) {
    memcpy(e->order, e->running, e->n_running * sizeof *e->order);
    qsort(e->order, e->n_running, sizeof *e->order, by_blocks);
}

/* Leading ones that two tables have in common, of n_a and n_b blocks. */
static int32_t common_blocks(const int32_t *a, size_t n_a, const int32_t *b, size_t n_b) {
    size_t n = 0;
    while (n < n_a && n < n_b && a[n] == b[n]) n++;
    return (int32_t)n;
}

static int fill_pass(rast_engine *e, rast_pass_plan *p, rast_error *err) {
    const int32_t net = p->nets[0];
    rast_pass *pass = &p->pass;
    rast_arena *a = &e->arena;
    size_t n_rows = 0, n_segs = 0, n_ctx = 0;
    for (size_t i = 0; i < e->n_running; i++) {
        const rast_sample *s = e->running[i];
        if (!s->scheduled || s->end[net] == s->start[net]) continue;
        n_rows += s->end[net] - s->start[net];
        n_segs++;
        if (s->end[net] > n_ctx) n_ctx = s->end[net];
    }
    p->max_end = (uint32_t)n_ctx;
    *pass = (rast_pass){.n_models = p->n_nets,
                        .cap_rows = bucket(n_rows, e->max_rows),
                        .cap_segs = bucket(n_segs, e->max_seqs),
                        .cap_out = bucket(e->plan.n_out, e->cap_out),
                        .cap_ctx = bucket(n_ctx, INT32_MAX),
                        .act_type = e->model->nets[net].dtype};
    const size_t rows = (size_t)pass->cap_rows, segs = (size_t)pass->cap_segs;
    pass->table_stride = (pass->cap_ctx + RAST_BLOCK_TOKENS - 1) / RAST_BLOCK_TOKENS;
    int status = arena_take_ints(a, 3, &pass->count, err);
    if (status == RAST_OK) status = arena_take_ints(a, rows, &pass->token, err);
    if (status == RAST_OK) status = arena_take_ints(a, rows, &pass->pos, err);
    if (status == RAST_OK) status = arena_take_ints(a, rows, &pass->row_seg, err);
    if (status == RAST_OK) status = arena_take_ints(a, segs + 1, &pass->seg_row, err);
    if (status == RAST_OK) status = arena_take_ints(a, segs, &pass->seg_ctx, err);
    if (status == RAST_OK) status = arena_take_ints(a, segs, &pass->prefix_blocks, err);
    if (status == RAST_OK) status = arena_take_ints(a, (size_t)pass->cap_out, &pass->out_row, err);
    if (status == RAST_OK) status = arena_take_ints(a, segs * (size_t)pass->table_stride, &pass->block_table, err);
    if (status) return status;

    int32_t *count = ints(a, pass->count), *token = ints(a, pass->token), *pos = ints(a, pass->pos);
    int32_t *row_seg = ints(a, pass->row_seg), *seg_row = ints(a, pass->seg_row), *seg_ctx = ints(a, pass->seg_ctx);
    int32_t *out_row = ints(a, pass->out_row), *prefix = ints(a, pass->prefix_blocks);
    int32_t *table = ints(a, pass->block_table);
    size_t n_before = 0; /* blocks of the segment before */
    int32_t row = 0, seg = 0;
    for (size_t i = 0; i < e->n_running; i++) {
        const rast_sample *s = e->order[i];
        if (!s->scheduled) continue;
        const size_t from = s->start[net], end = s->end[net];
        for (size_t o = 0; o < s->n_prompt_out + s->n_draw_out; o++) {
            const size_t at = output_position(s, o);
            out_row[s->first_out + o] = at >= from && at < end ? row + (int32_t)(at - from) : -1;
        }
        if (from == end) continue;
        seg_row[seg] = row;
        seg_ctx[seg] = (int32_t)end;
        const size_t n_blocks = rast_blocks_for(end);
        memcpy(table, s->blocks, n_blocks * sizeof *table);
        if (seg) prefix[seg] = common_blocks(table, n_blocks, table - pass->table_stride, n_before);
        n_before = n_blocks;
        table += pass->table_stride;
        for (size_t t = from; t < end; t++, row++) {
            token[row] = t < s->n_ids ? s->ids[t] : s->draft[t - s->n_ids];
            if (s->fresh && t == s->n_ids - 1) token[row] = -1 - s->slot;
            pos[row] = (int32_t)t;
            row_seg[row] = seg;
        }
        seg++;
    }
    seg_row[seg] = row;
    count[0] = row, count[1] = seg, count[2] = (int32_t)e->plan.n_out;
    e->plan.n_rows += (size_t)row * (size_t)p->n_nets;
    return RAST_OK;
}

/* Tails that samples take over in this net. */
static int list_copies(rast_engine *e, int32_t net, rast_error *err) {
    rast_plan *plan = &e->plan;
    size_t n = 0;
    for (size_t i = 0; i < e->n_running; i++) n += e->running[i]->scheduled && has(e->running[i]->copies, net);
    plan->n_copies[net] = (int32_t)n;
    if (!n) return RAST_OK;
    int status = arena_take(&e->arena, n * 2 * sizeof(int32_t), &plan->copies[net], err);
    if (status) return status;
    int32_t *pair = ints(&e->arena, plan->copies[net]);
    for (size_t i = 0; i < e->n_running; i++) {
        const rast_sample *s = e->running[i];
        if (!s->scheduled || !has(s->copies, net)) continue;
        *pair++ = s->tail;
        *pair++ = s->blocks[rast_sample_last_block(s) / RAST_BLOCK_TOKENS];
    }
    return RAST_OK;
}

/* Which outputs take a net's logits from where its drafts left them. */
static int list_saved(rast_engine *e, int32_t net, rast_error *err) {
    rast_plan *plan = &e->plan;
    int any = 0;
    for (size_t i = 0; i < e->n_running; i++)
        any |= e->running[i]->scheduled && e->running[i]->n_draw_out && drew(e->running[i], net);
    if (!any) return RAST_OK;
    int status = arena_take(&e->arena, plan->n_drawn * sizeof(int32_t), &plan->saved_row[net], err);
    if (status) return status;
    int32_t *row = ints(&e->arena, plan->saved_row[net]);
    for (size_t o = 0; o < plan->n_drawn; o++) row[o] = -1;
    for (size_t i = 0; i < e->n_running; i++) {
        const rast_sample *s = e->running[i];
        for (size_t o = 0; s->scheduled && drew(s, net) && o < s->n_draw_out; o++)
            row[s->first_out + s->n_prompt_out + o] = s->first_saved + (int32_t)o;
    }
    plan->has_saved |= (uint64_t)1 << net;
    return RAST_OK;
}

static int plan_passes(rast_engine *e, rast_error *err) {
    rast_plan *plan = &e->plan;
    const int32_t n_nets = e->model->n_nets;
    order_samples(e);
    int status = RAST_OK;
    uint64_t planned = 0;
    for (int32_t m = 0; m < n_nets && status == RAST_OK; m++) {
        int runs = 0;
        for (size_t i = 0; i < e->n_running && !runs; i++)
            runs = e->running[i]->scheduled && e->running[i]->end[m] > e->running[i]->start[m];
        if (!runs || has(planned, m)) continue;
        rast_pass_plan *p = &plan->passes[plan->n_passes];
        *p = (rast_pass_plan){.cls = e->model->nets[m].cls};
        for (int32_t other = m; other < n_nets; other++) {
            if (has(planned, other) || e->model->nets[other].cls != p->cls || !same_rows(e, m, other)) continue;
            p->nets[p->n_nets++] = other;
            p->mask |= (uint64_t)1 << other;
        }
        planned |= p->mask;
        plan->n_passes++;
        status = fill_pass(e, p, err);
    }
    return status;
}

static void clear_plan(rast_engine *e) {
    rast_plan *plan = &e->plan;
    plan->n_passes = 0;
    plan->n_out = plan->n_masks = plan->n_rows = 0;
    plan->n_logits = plan->n_scores = plan->n_parts = 0;
    plan->draft_net = 0;
    plan->has_saved = 0;
    memset(plan->n_copies, 0, sizeof plan->n_copies);
    e->arena.used = 0;
}

int rast_plan_draft(rast_engine *e, int32_t net, uint32_t j, rast_error *err) {
    rast_plan *plan = &e->plan;
    clear_plan(e);
    plan->draft_net = net;
    for (size_t i = 0; i < e->n_running; i++) {
        rast_sample *s = e->running[i];
        s->scheduled = s->draws = drew(s, net) && s->n_draft >= j;
        s->first_draw = j;
        if (j) s->history_stale = 1; /* the draft before belongs to it */
        s->copies = 0;
        s->first_out = plan->n_out;
        s->n_prompt_out = 0;
        s->n_draw_out = (size_t)s->draws;
        for (int32_t m = 0; m < e->model->n_nets; m++) s->start[m] = s->end[m] = s->cached[m];
        s->start[net] = (uint32_t)s->n_ids - 1 + j;
        s->end[net] = s->start[net] + (uint32_t)s->draws;
        plan->n_out += s->n_draw_out;
    }
    int status = take_outputs(e, 1, err);
    if (status) return status;
    for (size_t i = 0; i < e->n_running; i++) {
        const rast_sample *s = e->running[i];
        if (!s->scheduled) continue;
        rast_draw *draw = draws_at(e) + s->first_out;
        *draw = new_draw(e, s, j);
        draw->flags |= RAST_DRAW_PARTS;
        draw->parts_row = s->first_saved + (int32_t)j;
        if (j == s->n_draft) draw->target = -2; /* the last row is for the step that checks */
        ((float *)(void *)(e->arena.host + plan->coef))[s->first_out] = 1;
    }
    return plan_passes(e, err);
}

int rast_plan_step(rast_engine *e, rast_error *err) {
    const int32_t n_nets = e->model->n_nets;
    clear_plan(e);
    for (int32_t m = 0; m < n_nets; m++) e->rows_left[m] = e->max_rows;
    size_t behind = e->n_running;
    for (size_t i = 0; i < e->n_running; i++) /* a row for everyone, before drafts and prompts take what is left */
        if (is_decoding(e, e->running[i])) choose_rows(e, e->running[i], --behind);
    for (size_t i = 0; i < e->n_running; i++)
        if (!is_decoding(e, e->running[i])) choose_rows(e, e->running[i], --behind);
    for (size_t i = 0; i < e->n_running; i++) {
        claim_rows(e, e->running[i], 0);
        count_outputs(e, e->running[i]);
    }

    int status = take_outputs(e, (size_t)n_nets, err);
    for (int32_t m = 0; m < n_nets && status == RAST_OK; m++) {
        status = list_copies(e, m, err);
        if (status == RAST_OK) status = list_saved(e, m, err);
    }
    if (status) return status;
    for (size_t i = 0; i < e->n_running; i++)
        if (e->running[i]->scheduled) describe_outputs(e, e->running[i]);

    return plan_passes(e, err);
}
