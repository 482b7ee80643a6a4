/* draft.c: guesses of what follows each decoding sample, for the step to check.
 *
 * Every draw is argmax(processed logit + g) with g keyed by (stream, position, id). A draft from a net is that net's own
 * draw with the same g, and stands iff it equals the target's own draw at its position (drafter-invariant coupling, arXiv
 * 2408.07978): so no token depends on the drafts. A net that draws k drafts runs k + 1 single rows, one after the other, and
 * its logits are kept: the step that checks runs the other nets only. The other source is free: what followed the latest
 * earlier place with the same last ids (prompt lookup).
 */
#include "engine.h"

enum { GRAM_MOST = 4, GRAM_LEAST = 2, MAX_ROW_BYTES = 128 << 20 /* of logits in one step, for drafts */ };

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

/* Where an earlier run of the last ids ends, the longest and latest; 0: nowhere. */
static size_t find_gram(const int32_t *ids, size_t n) {
    for (size_t gram = GRAM_MOST; gram >= GRAM_LEAST; gram--)
        for (size_t end = n - 1; end >= gram && end < n; end--) {
            size_t same = 0;
            while (same < gram && ids[end - 1 - same] == ids[n - 1 - same]) same++;
            if (same == gram) return end;
        }
    return 0;
}

static void look_up(rast_engine *e, rast_sample *s, size_t k) {
    const size_t at = k ? find_gram(s->ids, s->n_ids) : 0;
    size_t n = 0;
    if (!at) return;
    k = take_blocks(e, s, k);
    for (; n < k && at + n < s->n_ids; n++) s->draft[n] = s->ids[at + n];
    keep_valid(s, n);
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
        e->running[i]->looked_up = 0;
    }
}

int rast_draft(rast_engine *e, rast_error *err) {
    size_t spare = (size_t)e->max_rows > e->n_running ? (size_t)e->max_rows - e->n_running : 0, n_saved = 0;
    size_t room = rast_draft_rows(e);
    uint32_t most[RAST_MAX_NETS] = {0};
    int begins = 0;
    drop_drafts(e);
    rast_pace_choose(e);
    for (size_t i = 0; i < e->n_running; i++) begins |= !rast_sample_n_new(e->running[i]);
    if (begins) spare /= 2; /* the rest is for prompts */
    for (size_t i = 0; i < e->n_running; i++) {
        rast_sample *s = e->running[i];
        const int32_t net = rast_sample_n_new(s) < s->job->transfer_start ? 0 : s->job->draft_net;
        const size_t wanted = rows_wanted(e, s);
        size_t k = most_drafts(e, s);
        if (k > spare) k = spare;
        if (wanted && k > room / wanted) k = room / wanted;
        if (!k) continue;
        if (e->drafter) {
            ask_drafter(e, s, k);
        } else {
            look_up(e, s, rast_pace_grams(e, s, net, k));
            s->looked_up = s->n_draft > 0;
            if (s->n_draft) k = 0;
            k = rast_pace_drafts(e, s, net, k);
            const size_t fit = room ? (room - 1) / (wanted + 1) : 0;
            if (k > fit) k = fit;
            k = take_blocks(e, s, k);
            if (k) {
                s->draft_net = net;
                s->n_draft = (uint32_t)k;
                s->first_saved = (int32_t)n_saved;
                n_saved += k + 1;
                room -= k + 1;
                if (most[net] < k) most[net] = (uint32_t)k;
            }
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
