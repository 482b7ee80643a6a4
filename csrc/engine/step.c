/* step.c: one step of every sample: admit, plan, run, collect. */
#include "engine.h"

#include <stdlib.h>
#include <string.h>

/* ---- samples come and go ------------------------------------------------------------------------------------------- */

static void drop_prefix(rast_engine *e, rast_job *job) {
    for (size_t i = 0; i < job->n_prefix; i++) rast_blocks_drop(&e->blocks, job->prefix[i]);
    free(job->prefix);
    job->prefix = NULL;
    job->n_prefix = 0;
}

/* Copies that a failed step left undone must not hit a block's next owner. */
static void drop_copies(rast_engine *e, const rast_sample *s) {
    size_t kept = 0;
    for (size_t i = 0; i < e->n_copies; i++) {
        int ours = 0;
        for (size_t b = 0; b < s->n_blocks && !ours; b++) ours = s->blocks[b] == e->copies[2 * i + 1];
        if (ours) continue;
        e->copies[2 * kept] = e->copies[2 * i];
        e->copies[2 * kept + 1] = e->copies[2 * i + 1];
        kept++;
    }
    e->n_copies = kept;
}

/* Frees the sample, and its request after the last one. The caller takes it out of its list. */
static void end_sample(rast_engine *e, rast_sample *s) {
    rast_job *job = s->job;
    drop_copies(e, s);
    for (size_t i = 0; i < s->n_blocks; i++) rast_blocks_drop(&e->blocks, s->blocks[i]);
    if (s->slot >= 0)
        e->free_slots[e->n_free_slots++] = s->slot;
    else
        job->n_admitted++;                    /* it never will be: nobody keeps the prefix for it */
    if (s->index == 0) job->prefix_known = 1; /* the others do without, if it had none to give */
    rast_sample_free(s);
    if (++job->n_ended < job->n_samples) return;
    drop_prefix(e, job);
    for (size_t i = 0; i < e->n_jobs; i++)
        if (e->jobs[i] == job) {
            memmove(&e->jobs[i], &e->jobs[i + 1], (e->n_jobs - i - 1) * sizeof *e->jobs);
            e->n_jobs--;
            break;
        }
    rast_job_free(job);
}

static rast_chunk *add_chunk(rast_engine *e, const rast_sample *s, rast_finish finish) {
    rast_chunk *c = &e->chunks[e->n_chunks++]; /* rast_engine_step made room */
    *c = (rast_chunk){.id = s->job->id, .tag = s->job->tag, .sample = s->index, .finish = finish};
    c->position = (uint32_t)rast_sample_n_new(s);
    return c;
}

/* A deadline does not end a sample before its first token (as in HuggingFace), unless none of its request has begun. */
static size_t end_stopped(rast_engine *e, rast_sample **list, size_t n) {
    const double t = rast_now();
    size_t kept = 0;
    for (size_t i = 0; i < n; i++) {
        rast_sample *s = list[i];
        const int owed = s->job->stop.max_new > 0 && s->job->n_admitted > 0 && (s->slot < 0 || !rast_sample_n_new(s));
        const int late = s->job->deadline != 0 && t >= s->job->deadline && !owed;
        if (!s->job->cancelled && !late) {
            list[kept++] = s;
            continue;
        }
        add_chunk(e, s, s->job->cancelled ? RAST_FINISH_CANCELLED : RAST_FINISH_TIME);
        end_sample(e, s);
    }
    return kept;
}

/* Gives the sample its blocks (the prompt's shared ones, where the request has a prefix, and room for all it may become),
 * its slot and its tokens. 1: admitted; 0: no room yet; negative: no memory. */
static int admit_one(rast_engine *e, rast_sample *s) {
    rast_job *job = s->job;
    const size_t n_blocks = rast_blocks_for(rast_job_tokens(job)), n_known = job->n_prefix ? job->n_ids - 1 : 0;
    const size_t n_shared = n_known / RAST_BLOCK_TOKENS;
    if (!e->n_free_slots || e->blocks.n_free < n_blocks - n_shared) return 0;
    int32_t *copies = rast_grow(e->copies, &e->cap_copies, e->n_copies, 2 * sizeof *copies);
    if (!copies) return -1;
    e->copies = copies;
    s->ids = malloc(rast_job_tokens(job) * sizeof *s->ids);
    s->blocks = malloc(n_blocks * sizeof *s->blocks);
    if (!s->ids || !s->blocks) {
        free(s->ids);
        free(s->blocks);
        s->ids = NULL, s->blocks = NULL;
        return -1;
    }
    memcpy(s->ids, job->ids, job->n_ids * sizeof *s->ids);
    for (size_t i = 0; i < n_blocks; i++) {
        if (i < n_shared)
            rast_blocks_share(&e->blocks, s->blocks[i] = job->prefix[i]);
        else
            s->blocks[i] = rast_blocks_take(&e->blocks);
    }
    s->n_blocks = n_blocks;
    if (n_known % RAST_BLOCK_TOKENS) {
        e->copies[2 * e->n_copies] = job->prefix[n_shared];
        e->copies[2 * e->n_copies + 1] = s->blocks[n_shared];
        e->n_copies++;
    }
    for (int32_t m = 0; m < e->model->n_nets; m++)
        if (job->active >> m & 1) s->cached[m] = (uint32_t)n_known;
    s->slot = e->free_slots[--e->n_free_slots];
    s->history_stale = 1;
    job->n_admitted++;
    return 1;
}

static int admit(rast_engine *e, rast_error *err) {
    size_t kept = 0, i = 0;
    int admitted = 1;
    for (; i < e->n_waiting; i++) {
        rast_sample *s = e->waiting[i];
        if (s->job->cancelled || (s->index > 0 && !s->job->prefix_known)) {
            e->waiting[kept++] = s;
            continue;
        }
        admitted = admit_one(e, s);
        if (admitted == 0 && e->n_running == 0) { /* only kept prefixes are in the way */
            for (size_t j = 0; j < e->n_jobs; j++) drop_prefix(e, e->jobs[j]);
            admitted = admit_one(e, s);
        }
        if (admitted <= 0) break; /* in order of arrival: nobody overtakes */
        e->running[e->n_running++] = s;
    }
    memmove(&e->waiting[kept], &e->waiting[i], (e->n_waiting - i) * sizeof(rast_sample *));
    e->n_waiting = kept + (e->n_waiting - i);
    if (admitted >= 0 || e->n_running > 0) return RAST_OK; /* those that run need no more memory */
    return rast_fail(err, RAST_ERR_MEMORY, "no memory for another sample");
}

/* Once the first sample has its prompt cached, its blocks serve the request's other samples. */
static void keep_prefix(rast_engine *e, rast_sample *s) {
    rast_job *job = s->job;
    if (s->index != 0 || job->prefix_known) return;
    for (int32_t m = 0; m < e->model->n_nets; m++)
        if (job->active >> m & 1 && s->cached[m] + 1 < job->n_ids) return;
    job->prefix_known = 1;
    const size_t n = rast_blocks_for(job->n_ids - 1);
    job->prefix = malloc(n * sizeof *job->prefix);
    if (!job->prefix) return; /* the others compute it themselves */
    for (size_t i = 0; i < n; i++) rast_blocks_share(&e->blocks, job->prefix[i] = s->blocks[i]);
    job->n_prefix = n;
}

/* ---- results ------------------------------------------------------------------------------------------------------- */

/* Outputs [from, from + n) of the sample as a chunk. */
static rast_chunk *chunk_of_rows(rast_engine *e, const rast_sample *s, size_t from, size_t n, uint32_t position) {
    const uint32_t want = s->job->want;
    const size_t o = s->first_out + from, row = (size_t)e->model->n_vocab, n_nets = (size_t)e->model->n_nets;
    rast_chunk *c = add_chunk(e, s, RAST_RUNNING);
    c->n = (uint32_t)n;
    c->position = position;
    c->token = e->token + o;
    if (want & RAST_WANT_LOGPROBS) c->logprob = e->logprob + o;
    if (want & RAST_WANT_STATS) c->stats = e->stats + o;
    if (want & RAST_WANT_LOGITS) c->logits = (const float *)e->logits.host + o * row;
    if (want & RAST_WANT_COMPONENTS) c->parts = (const float *)e->parts.host + o * row * n_nets;
    return c;
}

/* What is wrong with one output of the sample, whose row is at `position`. */
static int check_output(const rast_engine *e, const rast_sample *s, size_t output, size_t position, rast_error *err) {
    const int32_t bad = e->results[s->first_out + output].bad;
    if (bad == e->model->n_nets)
        return rast_fail(err, RAST_ERR_NUMERIC,
                         "the sum of all models' logits overflows at position %zu: the transfer strength is too large",
                         position);
    if (bad >= 0)
        return rast_fail(err, RAST_ERR_NUMERIC, "NaN or Inf in the logits of %s at position %zu: check its weights",
                         e->model->nets[bad].name, position);
    if (bad == -2)
        return rast_fail(err, RAST_ERR_VALUE, "no token can be drawn at position %zu: every one is forbidden",
                         position + 1);
    return RAST_OK;
}

static rast_finish fail_sample(rast_engine *e, const rast_sample *s, const rast_error *why) {
    rast_error *kept = &e->errors[e->n_errors++]; /* at most one a running sample */
    *kept = *why;
    add_chunk(e, s, RAST_FINISH_ERROR)->error = kept;
    return RAST_FINISH_ERROR;
}

static rast_finish collect_prompt(rast_engine *e, rast_sample *s) {
    const uint32_t end = s->end[0] - s->n_draft;
    const size_t first = end - s->n_prompt_out;
    rast_error why;
    for (size_t i = 0; i < s->n_prompt_out; i++)
        if (check_output(e, s, i, first + i, &why)) return fail_sample(e, s, &why);
    s->n_reported = end;
    if (s->n_prompt_out) chunk_of_rows(e, s, 0, s->n_prompt_out, (uint32_t)first)->prompt = 1;
    if (end < s->job->n_ids || s->job->stop.max_new > 0) return RAST_RUNNING;
    e->chunks[e->n_chunks - 1].finish = RAST_FINISH_LENGTH;
    return RAST_FINISH_LENGTH;
}

/* Draws in order. Each stands; the first that is not the draft of its position ends the run, for what lies behind it was
 * computed from another token. */
static rast_finish collect_draws(rast_engine *e, rast_sample *s) {
    rast_finish finish = RAST_RUNNING;
    rast_error why;
    const uint32_t first = (uint32_t)rast_sample_n_new(s);
    size_t n = 0;
    do {
        const size_t output = s->n_prompt_out + n;
        if (check_output(e, s, output, s->n_ids - 1, &why)) {
            if (n) break; /* what stands goes out; the next step meets the error again */
            return fail_sample(e, s, &why);
        }
        finish = rast_sample_append(e->model, s, e->token[s->first_out + output]);
        n++;
    } while (!finish && n < s->n_draw_out && s->draft[n - 1] == s->ids[s->n_ids - 1]);
    s->fresh = s->n_draw_out == 1;
    e->n_drafted += s->n_draft;
    e->n_accepted += n - 1;
    if (!finish && s->job->deadline != 0 && rast_now() >= s->job->deadline) finish = RAST_FINISH_TIME;
    rast_chunk *c = chunk_of_rows(e, s, s->n_prompt_out, n, first);
    if (s->job->want & RAST_WANT_SCORES)
        c->scores = (const float *)e->scores.host + (s->first_out + s->n_prompt_out) * (size_t)e->model->n_vocab;
    c->finish = finish;
    return finish;
}

static rast_finish collect(rast_engine *e, rast_sample *s) {
    rast_finish finish = RAST_RUNNING;
    if (!s->scheduled) return finish;
    if (rast_sample_prompt_pending(s)) finish = collect_prompt(e, s);
    if (!finish && s->draws) finish = collect_draws(e, s);
    for (int32_t m = 0; m < e->model->n_nets; m++) /* rejected drafts leave the cache */
        s->cached[m] = s->end[m] < s->n_ids ? s->end[m] : (uint32_t)s->n_ids - 1;
    keep_prefix(e, s);
    return finish;
}

/* ---- the public step ----------------------------------------------------------------------------------------------- */

/* Room for all chunks that a step can give, so that collecting cannot fail. */
static int make_room(rast_engine *e, rast_error *err) {
    if (!e->failed) e->n_chunks = 0;
    const size_t most = e->n_chunks + e->n_waiting + 3 * (size_t)e->max_seqs;
    rast_chunk *chunks = rast_grow(e->chunks, &e->cap_chunks, most, sizeof *chunks);
    if (!chunks) return rast_fail(err, RAST_ERR_MEMORY, "no memory for the results of a step");
    e->chunks = chunks;
    e->n_errors = 0;
    e->failed = 1; /* until the step has succeeded */
    return RAST_OK;
}

int rast_engine_step(rast_engine *e, const rast_chunk **chunks, size_t *n, rast_error *err) {
    *chunks = NULL;
    *n = 0;
    if (atomic_exchange(&e->interrupted, 0)) return rast_fail(err, RAST_ERR_INTERRUPTED, "interrupted");
    int status = make_room(e, err);
    if (status) return status;
    e->n_running = end_stopped(e, e->running, e->n_running);
    status = admit(e, err);
    e->n_waiting = end_stopped(e, e->waiting, e->n_waiting); /* those that found no room */
    if (status == RAST_OK && e->n_running) status = rast_plan_step(e, err);
    if (status == RAST_OK && e->n_running) status = rast_run_plan(e, err);
    if (status) return status;
    *chunks = e->chunks;
    if (e->n_running) {
        e->n_copies = 0;
        e->n_steps++;
        e->n_rows += e->plan.n_rows;
        for (size_t o = 0; o < e->plan.n_out; o++) {
            e->token[o] = e->results[o].token;
            e->logprob[o] = e->results[o].logprob;
            e->stats[o] = e->results[o].stats;
        }
    }
    size_t kept = 0;
    for (size_t i = 0; i < e->n_running; i++) {
        rast_sample *s = e->running[i];
        const rast_finish finish = collect(e, s);
        if (s->job->n_prefix && s->job->n_admitted == s->job->n_samples) drop_prefix(e, s->job);
        if (finish)
            end_sample(e, s);
        else
            e->running[kept++] = s;
    }
    e->n_running = kept;
    *n = e->n_chunks;
    e->failed = 0;
    return RAST_OK;
}

int rast_engine_run(rast_engine *e, int (*on)(void *user, const rast_chunk *chunks, size_t n), void *user,
                    rast_error *err) {
    while (rast_engine_busy(e)) {
        const rast_chunk *chunks;
        size_t n;
        int status = rast_engine_step(e, &chunks, &n, err);
        if (status) return status;
        if (n && on && on(user, chunks, n)) return rast_fail(err, RAST_ERR_INTERRUPTED, "stopped by the caller");
    }
    return RAST_OK;
}
