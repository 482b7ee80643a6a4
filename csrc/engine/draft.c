/* draft.c: guesses of what follows each decoding sample, for the step to check.
 *
 * Every draw is argmax(processed logit + g) with g keyed by (stream, position, id). A draft from a net is that net's own
 * draw with the same g, and stands iff it equals the target's own draw at its position (drafter-invariant coupling, arXiv
 * 2408.07978): so no token depends on the drafts. A net that draws k drafts runs k + 1 single rows, one after the other, and
 * its logits are kept: the step that checks runs the other nets only. The other source is free: what followed the latest
 * earlier place with the same last ids (prompt lookup). pace.c chooses between them, and how many.
 */
#include "engine.h"

enum { MAX_ROW_BYTES = 128 << 20 /* of logits in one step, for drafts */, SPAN = 64 };

static int has(uint64_t mask, int32_t net) { return mask >> net & 1; }

/* How many drafts the sample could have checked: it must lack nothing but its last token, in every net of the draw. */
static size_t most_drafts(const rast_engine *e, const rast_sample *s) {
    const rast_job *job = s->job;
    const size_t n_new = rast_sample_n_new(s), most_new = (size_t)job->stop.max_new;
    size_t k = (size_t)rast_most_drafts(job);
    if (!k || n_new + 1 >= most_new || rast_sample_prompt_pending(s) || s->tail >= 0) return 0;
    for (int32_t m = 0; m < e->model->n_nets; m++) {
        if (has(rast_sample_draw_mask(s), m) && s->cached[m] + 1 < s->n_ids) return 0;
        if (has(job->active, m) && s->cached[m] + 1 < job->n_ids) return 0;
    }
    if (k > most_new - n_new - 1) k = most_new - n_new - 1;
    if (n_new < job->transfer_start && k > job->transfer_start - n_new - 1) k = job->transfer_start - n_new - 1;
    return k;
}

size_t rast_draft_rows(const rast_engine *e) { return MAX_ROW_BYTES / ((size_t)e->model->n_vocab * sizeof(float)); }

/* Rows of logits that each of the sample's drafts adds to what the step gives back. */
static size_t rows_wanted(const rast_engine *e, const rast_sample *s) {
    const uint32_t want = s->job->want;
    return (want & RAST_WANT_LOGITS ? 1u : 0u) + (want & RAST_WANT_SCORES ? 1u : 0u) +
           (want & RAST_WANT_COMPONENTS ? (size_t)e->model->n_nets : 0u);
}

/* Blocks for k drafts, or for as many as there is room for: for drafts nobody gives way. */
static size_t take_blocks(rast_engine *e, rast_sample *s, size_t k) {
    while (k && s->n_blocks < rast_blocks_for(s->n_ids + k)) {
        const int32_t block = rast_blocks_take(&e->blocks);
        if (block >= 0)
            s->blocks[s->n_blocks++] = block;
        else
            k = s->n_blocks * RAST_BLOCK_TOKENS - s->n_ids;
    }
    return k;
}

/* A draft must have an embedding in every net that will see it. */
static void keep_valid(rast_sample *s, size_t n) {
    s->n_draft = 0;
    while (s->n_draft < n && s->draft[s->n_draft] >= 0 && s->draft[s->n_draft] < s->job->limit) s->n_draft++;
}

/* Finds the longest earlier run of the last ids, and the latest of those. Spans without the last id are passed over as a whole,
 * by a loop that compilers turn into wide comparisons: a long context's ids are read in far less time than its keys. */
static void find_gram(rast_sample *s) {
    const int32_t *ids = s->ids, *last = ids + s->n_ids - 1;
    s->gram = 0;
    for (size_t end = s->n_ids - 1, stop; end >= RAST_GRAM_LEAST && s->gram < RAST_GRAM_MOST; end = stop) {
        int any = 0;
        stop = end > SPAN ? end - SPAN : 0;
        for (size_t i = stop; i < end; i++) any |= ids[i] == *last;
        for (size_t at = end; any && at > stop && s->gram < RAST_GRAM_MOST; at--) {
            uint32_t same = 0;
            while (same < RAST_GRAM_MOST && same < at && ids[at - 1 - same] == *(last - same)) same++;
            if (same >= RAST_GRAM_LEAST && same > s->gram) s->gram = same, s->gram_end = at;
        }
    }
}

/* What followed there; behind the last id it goes on with the drafts themselves. */
static void look_up(rast_engine *e, rast_sample *s, size_t k) {
    k = take_blocks(e, s, k);
    for (size_t n = 0, at = s->gram_end; n < k; n++, at++)
        s->draft[n] = at < s->n_ids ? s->ids[at] : s->draft[at - s->n_ids];
    keep_valid(s, k);
}

static void ask_drafter(rast_engine *e, rast_sample *s, size_t k) {
    k = take_blocks(e, s, k);
    if (!k) return;
    const size_t n = e->drafter(e->drafter_user, s->job->tag, s->index, s->ids, s->n_ids, s->draft, k);
    keep_valid(s, n < k ? n : k);
}

/* The net draws: pass j gives draft j, and the last one only the logits behind the last draft. */
static int draw_drafts(rast_engine *e, int32_t net, uint32_t most, rast_error *err) {
    for (uint32_t j = 0; j <= most; j++) {
        int status = rast_plan_draft(e, net, j, err);
        if (status == RAST_OK && e->plan.n_out) status = rast_run_plan(e, err);
        if (status) return status;
        for (size_t i = 0; i < e->n_running; i++) {
            rast_sample *s = e->running[i];
            if (!s->scheduled || j == s->n_draft) continue;
            const int32_t token = e->results[s->first_out].token;
            int ends = token < 0 || token >= s->job->limit;
            for (size_t n = 0; n < s->job->stop.n_eos; n++) ends |= token == s->job->stop.eos[n];
            s->draft[j] = token;
            if (ends) s->n_draft = j; /* nothing follows; the check draws this token itself */
        }
    }
    return RAST_OK;
}

static void drop_drafts(rast_engine *e) {
    for (size_t i = 0; i < e->n_running; i++) {
        e->running[i]->n_draft = 0;
        e->running[i]->draft_net = 0;
    }
}

/* How many drafts each sample may have, and from where. */
static void choose_drafts(rast_engine *e) {
    int any = 0;
    for (size_t i = 0; i < e->n_running; i++) {
        rast_sample *s = e->running[i];
        const int is_auto = s->job->n_draft == RAST_DRAFT_AUTO;
        s->most = (uint32_t)most_drafts(e, s);
        s->gram = 0;
        if (s->most && !e->drafter && (is_auto || !rast_sample_draft_net(s))) find_gram(s);
        s->source = s->gram ? rast_gram_source(s->gram) : 0;
        s->k = s->most;
        any |= is_auto;
    }
    e->pace.set = -1;
    if (any && !e->drafter) rast_pace_choose(e);
}

int rast_draft(rast_engine *e, rast_error *err) {
    size_t spare = (size_t)e->max_rows > e->n_running ? (size_t)e->max_rows - e->n_running : 0, n_saved = 0;
    size_t room = rast_draft_rows(e);
    uint32_t most[RAST_MAX_NETS] = {0};
    int begins = 0;
    drop_drafts(e);
    choose_drafts(e);
    for (size_t i = 0; i < e->n_running; i++) begins |= !rast_sample_n_new(e->running[i]);
    if (begins) spare /= 2; /* the rest is for prompts */
    for (size_t i = 0; i < e->n_running; i++) {
        rast_sample *s = e->running[i];
        const int32_t net = rast_sample_draft_net(s);
        const size_t wanted = rows_wanted(e, s);
        size_t k = s->k;
        if (k > spare) k = spare;
        if (wanted && k > room / wanted) k = room / wanted;
        if (!k) continue;
        if (e->drafter) {
            ask_drafter(e, s, k);
        } else if (s->source) {
            look_up(e, s, k);
        } else if (net) {
            const size_t fit = room ? (room - 1) / (wanted + 1) : 0;
            k = take_blocks(e, s, k < fit ? k : fit);
            if (!k) continue;
            s->draft_net = net;
            s->n_draft = (uint32_t)k;
            s->first_saved = (int32_t)n_saved;
            n_saved += k + 1;
            room -= k + 1;
            if (most[net] < k) most[net] = (uint32_t)k;
        }
        spare -= s->n_draft;
        room -= s->n_draft * wanted;
    }
    int status = n_saved ? rast_save_drafts(e, n_saved, err) : RAST_OK;
    if (status == RAST_ERR_MEMORY) { /* drafts can be done without */
        drop_drafts(e);
        return RAST_OK;
    }
    for (int32_t net = 1; net < e->model->n_nets && status == RAST_OK; net++)
        if (most[net]) status = draw_drafts(e, net, most[net], err);
    for (size_t i = 0; i < e->n_running; i++)
        if (e->running[i]->draft_net) e->running[i]->fresh = 0, e->running[i]->history_stale = 1;
    return status;
}
