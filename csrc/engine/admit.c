/* admit.c: samples come and go: which of them run, and which blocks they hold.
 *
 * Running samples are those that came first. A sample is admitted with the blocks of its tokens so far and takes others as
 * it grows; when none is left, the one that came last gives its blocks up and waits, first in line, to compute them again.
 * Blocks of tokens that another sample has computed, or is about to, are shared; where that one has only begun, the
 * plan lets the others wait for it. The first sample's longest length always fits (rast_engine_add has checked), so all end.
 */
#include "engine.h"

#include <stdlib.h>
#include <string.h>

/* Last block first, so that it is also the first to be evicted. */
static void release_blocks(rast_engine *e, rast_sample *s) {
    if (s->tail >= 0) rast_blocks_drop(&e->blocks, s->tail);
    s->tail = -1;
    while (s->n_blocks) rast_blocks_drop(&e->blocks, s->blocks[--s->n_blocks]);
    s->n_linked = 0;
    memset(s->cached, 0, (size_t)e->model->n_nets * sizeof *s->cached);
}

static void leave_slot(rast_engine *e, rast_sample *s) {
    if (s->slot >= 0) e->free_slots[e->n_free_slots++] = s->slot;
    s->slot = -1;
    s->fresh = 0;
}

/* ---- the end ----------------------------------------------------------------------------------------------------------- */

static void remove_job(rast_engine *e, rast_job *job) {
    *(job->before ? &job->before->after : &e->first_job) = job->after;
    *(job->after ? &job->after->before : &e->last_job) = job->before;
    rast_job_free(job);
}

void rast_end_samples(rast_engine *e, rast_job *job, uint32_t n) {
    job->n_ended += n;
    while (e->next_job && e->next_job->n_made == e->next_job->n_samples) e->next_job = e->next_job->after;
    if (job->n_ended == job->n_samples) remove_job(e, job);
}

void rast_end_sample(rast_engine *e, rast_sample *s) {
    rast_job *job = s->job;
    release_blocks(e, s);
    leave_slot(e, s);
    rast_sample_free(s);
    rast_end_samples(e, job, 1);
}

/* ---- place for those that run ------------------------------------------------------------------------------------------ */

static void preempt_last(rast_engine *e) {
    rast_sample *s = e->running[--e->n_running];
    s->scheduled = 0;
    release_blocks(e, s);
    leave_slot(e, s);
    e->parked[e->n_parked++] = s;
    e->n_preempted++;
}

void rast_make_place(rast_engine *e) {
    for (size_t i = 0; i < e->n_running; i++) {
        rast_sample *s = e->running[i];
        while (i < e->n_running && s->n_blocks < rast_blocks_for(s->n_ids)) {
            const int32_t block = rast_blocks_take(&e->blocks);
            if (block >= 0)
                s->blocks[s->n_blocks++] = block;
            else
                preempt_last(e); /* it may be s itself */
        }
    }
}

/* ---- admission ----------------------------------------------------------------------------------------------------------- */

static int can_grow(const rast_sample *s) {
    return rast_blocks_for(rast_job_tokens(s->job)) > rast_blocks_for(s->n_ids);
}

/* Blocks that stay free at an admission: one for everybody who may still want one, so that nobody has to give way soon. */
static size_t margin(const rast_engine *e, const rast_sample *s) {
    size_t n = (size_t)can_grow(s);
    for (size_t i = 0; i < e->n_running; i++) n += (size_t)can_grow(e->running[i]);
    return e->n_running ? n : 0;
}

static int32_t parent_of(const rast_sample *s, size_t block) { return block ? s->blocks[block - 1] : -1; }

/* The sample's tail does not have all tokens of all the sample's nets, but for those in `except`. */
static int tail_lacks(const rast_engine *e, const rast_sample *s, uint64_t except) {
    const size_t want = (s->n_at_first - 1) % RAST_BLOCK_TOKENS;
    for (int32_t m = 0; m < e->model->n_nets; m++)
        if ((s->job->active & ~except) >> m & 1 && rast_blocks_filled(&e->blocks, s->tail, m) < want) return 1;
    return 0;
}

/* Makes the block where the sample's prompt ends findable by these tokens; found from now on is this one. */
static void enter_tail(rast_engine *e, const rast_sample *s) {
    const size_t last = (s->n_at_first - 1) / RAST_BLOCK_TOKENS, first = last * RAST_BLOCK_TOKENS;
    rast_blocks_enter(&e->blocks, s->blocks[last], parent_of(s, last), s->ids + first, s->n_at_first - first,
                      RAST_BLOCK_TAIL);
    e->blocks.block[s->blocks[last]].nets = s->job->active;
}

/* Makes the sample's own blocks findable before they are filled. What another sample has entered stays its own, but for a
 * tail that lacks something which nobody else is about to add. */
static void promise_blocks(rast_engine *e, rast_sample *s, int tail_is_idle) {
    const size_t last = s->n_blocks - 1;
    for (; s->n_linked < last; s->n_linked++) {
        const int32_t parent = parent_of(s, s->n_linked), *ids = s->ids + s->n_linked * RAST_BLOCK_TOKENS;
        if (rast_blocks_find(&e->blocks, parent, ids, RAST_BLOCK_TOKENS) >= 0) return;
        rast_blocks_enter(&e->blocks, s->blocks[s->n_linked], parent, ids, RAST_BLOCK_TOKENS, RAST_BLOCK_FULL);
    }
    const int32_t *ids = s->ids + last * RAST_BLOCK_TOKENS;
    if (rast_blocks_find(&e->blocks, parent_of(s, last), ids, s->n_ids - last * RAST_BLOCK_TOKENS) < 0 ||
        (s->tail >= 0 && tail_lacks(e, s, tail_is_idle ? 0 : e->blocks.block[s->tail].nets)))
        enter_tail(e, s);
}

/* Gives the sample a slot and the blocks of its tokens, where they are known shared ones; 0: there is no room yet. The last
 * token's block is never shared, since its row has to be computed for the draw. */
static int admit_one(rast_engine *e, rast_sample *s) {
    rast_blocks *b = &e->blocks;
    const size_t last = rast_sample_last_block(s), n_last = s->n_ids - last, n_blocks = rast_blocks_for(s->n_ids);
    const int pending = rast_sample_prompt_pending(s);
    size_t limit = last, n = 0, room = rast_blocks_room(b);
    int32_t tail = -1;
    if (pending && rast_sample_first_wanted(s) < limit) limit = rast_sample_first_wanted(s);
    for (; (n + 1) * RAST_BLOCK_TOKENS <= limit; n++) {
        const int32_t known = rast_blocks_find(b, parent_of(s, n), s->ids + n * RAST_BLOCK_TOKENS, RAST_BLOCK_TOKENS);
        if (known < 0) break;
        s->blocks[n] = known;
        room -= b->block[known].refs == 0;
    }
    const size_t need = n_blocks - n + margin(e, s);
    if (need > room) return 0;
    if (n * RAST_BLOCK_TOKENS == last && n_last > 1 && !pending) {
        tail = rast_blocks_find(b, parent_of(s, n), s->ids + last, n_last);
        if (tail >= 0 && b->block[tail].refs == 0 && need > room - 1) tail = -1;
    }
    const int tail_is_idle = tail >= 0 && b->block[tail].refs == 0;
    for (size_t i = 0; i < n; i++) rast_blocks_share(b, s->blocks[i]);
    if (tail >= 0) rast_blocks_share(b, tail);
    for (s->n_blocks = n; s->n_blocks < n_blocks; s->n_blocks++) s->blocks[s->n_blocks] = rast_blocks_take(b);
    s->tail = tail;
    s->n_at_first = s->n_ids;
    s->n_linked = n;
    promise_blocks(e, s, tail_is_idle);
    s->slot = e->free_slots[--e->n_free_slots];
    s->history_stale = 1;
    s->job->begun = 1;
    return 1;
}

/* The sample that is next in line, on top of `parked`; *none where there is none. */
static int next_in_line(rast_engine *e, int *none, rast_error *err) {
    rast_job *job = e->next_job;
    *none = 0;
    if (e->n_parked) return RAST_OK;
    if (!job) {
        *none = 1;
        return RAST_OK;
    }
    int status = rast_sample_new(e->model, job, job->n_made, &e->parked[0], err);
    if (status) return status;
    e->n_parked = 1;
    job->n_made++;
    while (e->next_job && e->next_job->n_made == e->next_job->n_samples) e->next_job = e->next_job->after;
    return RAST_OK;
}

int rast_admit(rast_engine *e, rast_error *err) {
    while (e->n_free_slots) { /* in order of arrival: nobody overtakes */
        int none;
        int status = next_in_line(e, &none, err);
        if (status) return e->n_running ? RAST_OK : status; /* those that run need no more memory */
        if (none || !admit_one(e, e->parked[e->n_parked - 1])) break;
        e->running[e->n_running++] = e->parked[--e->n_parked];
    }
    return RAST_OK;
}

/* ---- after a step -------------------------------------------------------------------------------------------------------- */

/* Makes blocks findable that are full in all of the sample's nets; one that another sample has entered takes their place. */
static void link_blocks(rast_engine *e, rast_sample *s) {
    rast_blocks *b = &e->blocks;
    for (;; s->n_linked++) {
        const size_t i = s->n_linked, end = (i + 1) * RAST_BLOCK_TOKENS;
        for (int32_t m = 0; m < e->model->n_nets; m++)
            if (s->job->active >> m & 1 && s->cached[m] < end) return;
        const int32_t own = s->blocks[i], *ids = s->ids + i * RAST_BLOCK_TOKENS;
        const int32_t known = rast_blocks_find(b, parent_of(s, i), ids, RAST_BLOCK_TOKENS);
        if (known == own) continue;
        if (known < 0) {
            rast_blocks_enter(b, own, parent_of(s, i), ids, RAST_BLOCK_TOKENS, RAST_BLOCK_FULL);
            continue;
        }
        for (int32_t m = 0; m < e->model->n_nets; m++)
            if (s->job->active >> m & 1 && rast_blocks_filled(b, known, m) < RAST_BLOCK_TOKENS) return;
        rast_blocks_share(b, known);
        rast_blocks_drop(b, own);
        s->blocks[i] = known;
    }
}

static void drop_tail(rast_engine *e, rast_sample *s) {
    const size_t own = (s->n_at_first - 1) / RAST_BLOCK_TOKENS;
    if (tail_lacks(e, s, 0) && !e->blocks.block[s->blocks[own]].length[RAST_BLOCK_TAIL]) enter_tail(e, s);
    rast_blocks_drop(&e->blocks, s->tail);
    s->tail = -1;
}

void rast_commit(rast_engine *e, rast_sample *s) {
    for (int32_t m = 0; m < e->model->n_nets; m++) {
        if (!(s->job->active >> m & 1)) continue;
        const size_t end = s->end[m] < s->n_ids ? s->end[m] : s->n_ids - 1; /* rejected drafts leave the cache */
        for (size_t i = s->cached[m] / RAST_BLOCK_TOKENS; i * RAST_BLOCK_TOKENS < end; i++)
            rast_blocks_fill(&e->blocks, s->blocks[i], m, end - i * RAST_BLOCK_TOKENS);
        if (m == 0 && s->start[m] > s->cached[m]) e->n_reused += s->start[m] - s->cached[m];
        s->cached[m] = (uint32_t)end;
    }
    if (s->tail >= 0 && s->tail_done) drop_tail(e, s);
    link_blocks(e, s);
}
