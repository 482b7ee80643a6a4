/* step.c: one step of every sample: make place, admit, plan, run, collect.
 *
 * Where the device works by itself, a step that repeats the one before, each sample one token further, is planned and
 * submitted while that one runs, and collected by the next call. Its tokens are still unknown here: it reads them where
 * they were drawn. Samples that turn out to have ended have their row in it for nothing; their blocks and slots can be
 * given away at once, since whatever comes later follows it on the device.
 */
#include "engine.h"

#include <math.h>

enum { ASK_AGAIN = 8 }; /* steps run ahead before one is planned with all tokens known, which drafts need */

/* ---- samples that end before the step -------------------------------------------------------------------------------- */

/* Room for n chunks more, and for all that the rest of a step can give, so that collecting cannot fail. */
static int make_room(rast_engine *e, size_t n, rast_error *err) {
    const size_t most = e->n_chunks + n + 3 * (size_t)e->max_seqs;
    rast_chunk *chunks = rast_grow(e->chunks, &e->cap_chunks, most, sizeof *chunks);
    if (!chunks) return rast_fail(err, RAST_ERR_MEMORY, "no memory for the results of a step");
    e->chunks = chunks;
    return RAST_OK;
}

static rast_chunk *add_chunk(rast_engine *e, const rast_job *job, uint32_t sample, uint32_t position,
                             rast_finish finish) {
    rast_chunk *c = &e->chunks[e->n_chunks++];
    *c = (rast_chunk){.id = job->id, .tag = job->tag, .sample = sample, .position = position, .finish = finish};
    return c;
}

static rast_chunk *sample_chunk(rast_engine *e, const rast_sample *s, rast_finish finish) {
    return add_chunk(e, s->job, s->index, (uint32_t)rast_sample_n_new(s), finish);
}

/* How a sample with n_new tokens has to end now; now = 0: only if it was cancelled. A deadline does not end a sample before
 * its first token (as in HuggingFace), unless none of its request has begun. */
static rast_finish must_end(const rast_job *job, size_t n_new, double now) {
    const int owed = job->stop.max_new > 0 && job->begun && !n_new;
    if (job->cancelled) return RAST_FINISH_CANCELLED;
    return job->deadline != 0 && now >= job->deadline && !owed ? RAST_FINISH_TIME : RAST_RUNNING;
}

static size_t end_stopped(rast_engine *e, rast_sample **list, size_t n, double now) {
    size_t kept = 0;
    for (size_t i = 0; i < n; i++) {
        rast_sample *s = list[i];
        const rast_finish finish = must_end(s->job, rast_sample_n_new(s), now);
        if (!finish) {
            list[kept++] = s;
            continue;
        }
        sample_chunk(e, s, finish);
        rast_end_sample(e, s);
    }
    return kept;
}

/* The samples that are not even made; looked at only when a request was cancelled or a deadline has passed. */
static int end_unmade(rast_engine *e, double now, rast_error *err) {
    if (now < e->check_at) return RAST_OK;
    double next = INFINITY;
    for (rast_job *job = e->next_job, *after; job; job = after) {
        after = job->after;
        const rast_finish finish = must_end(job, 0, now);
        const uint32_t n = job->n_samples - job->n_made;
        if (!finish || !n) {
            if (job->deadline > now && job->deadline < next) next = job->deadline;
            continue;
        }
        int status = make_room(e, n, err);
        if (status) return status;
        while (job->n_made < job->n_samples) add_chunk(e, job, job->n_made++, 0, finish);
        rast_end_samples(e, job, n);
    }
    e->check_at = next;
    return RAST_OK;
}

static size_t drop_samples(rast_engine *e, rast_sample **list, size_t n, const rast_job *job) {
    size_t kept = 0;
    for (size_t i = 0; i < n; i++) {
        if (list[i]->job == job)
            rast_end_sample(e, list[i]);
        else
            list[kept++] = list[i];
    }
    return kept;
}

void rast_engine_discard(rast_engine *e, uint64_t id) {
    rast_job *job = e->first_job;
    while (job && job->id != id) job = job->after;
    if (!job) return;
    const uint32_t n_unmade = job->n_samples - job->n_made;
    job->n_made = job->n_samples;
    e->n_running = drop_samples(e, e->running, e->n_running, job);
    e->n_parked = drop_samples(e, e->parked, e->n_parked, job);
    if (n_unmade) rast_end_samples(e, job, n_unmade); /* so the job lived until here */
}

/* ---- results ------------------------------------------------------------------------------------------------------- */

/* Outputs [from, from + n) of the sample, all of its prompt's or all of its draws, as a chunk. */
static rast_chunk *chunk_of_rows(rast_engine *e, const rast_sample *s, size_t from, size_t n, uint32_t position) {
    const uint32_t want = s->job->want;
    const size_t o = s->first_out + from, row = (size_t)e->model->n_vocab, n_nets = (size_t)e->model->n_nets;
    rast_chunk *c = sample_chunk(e, s, RAST_RUNNING);
    c->n = (uint32_t)n;
    c->position = position;
    c->token = e->token + o;
    if (want & RAST_WANT_LOGPROBS) c->logprob = e->logprob + o;
    if (want & RAST_WANT_STATS) c->stats = e->stats + o;
    if (want & RAST_WANT_LOGITS) c->logits = (const float *)e->logits.host + ((size_t)s->first_logits + from) * row;
    if (want & RAST_WANT_COMPONENTS)
        c->parts = (const float *)e->parts.host + ((size_t)s->first_parts + from) * row * n_nets;
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
    sample_chunk(e, s, RAST_FINISH_ERROR)->error = kept;
    return RAST_FINISH_ERROR;
}

static rast_finish collect_prompt(rast_engine *e, rast_sample *s) {
    const uint32_t end = s->end[0] - s->n_draft;
    const size_t first = end - s->n_prompt_out;
    rast_error why;
    for (size_t i = 0; i < s->n_prompt_out; i++)
        if (check_output(e, s, i, first + i, &why)) return fail_sample(e, s, &why);
    if (end > s->n_reported) s->n_reported = end;
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
    e->n_rejected += !finish && n - 1 < s->n_draft;
    if (!finish && s->job->deadline != 0 && rast_now() >= s->job->deadline) finish = RAST_FINISH_TIME;
    rast_chunk *c = chunk_of_rows(e, s, s->n_prompt_out, n, first);
    if (s->job->want & RAST_WANT_SCORES)
        c->scores = (const float *)e->scores.host + (size_t)s->first_scores * (size_t)e->model->n_vocab;
    c->finish = finish;
    c->n_drafted = s->n_draft;
    rast_pace_learn(e, s, n, finish != RAST_RUNNING);
    return finish;
}

static rast_finish collect(rast_engine *e, rast_sample *s) {
    rast_finish finish = RAST_RUNNING;
    if (!s->scheduled) return finish;
    if (rast_sample_prompt_pending(s)) finish = collect_prompt(e, s);
    if (!finish && s->draws) finish = collect_draws(e, s);
    rast_commit(e, s);
    return finish;
}

/* ---- running ahead --------------------------------------------------------------------------------------------------- */

/* The sample n tokens further, nothing else of it changed: what is planned for it, and what it will hold then. */
static void move_rows(const rast_engine *e, rast_sample *s, int n) {
    for (int32_t m = 0; m < e->model->n_nets; m++)
        if (rast_sample_draw_mask(s) >> m & 1) s->start[m] += (uint32_t)n, s->end[m] += (uint32_t)n;
}

static void move_sample(const rast_engine *e, rast_sample *s, int n) {
    for (int32_t m = 0; m < e->model->n_nets; m++)
        if (rast_sample_draw_mask(s) >> m & 1) s->cached[m] += (uint32_t)n;
    s->n_ids += (size_t)n;
}

/* In the step on its way it has one row, whose draw decides nothing about how the next row is computed and drawn. */
static int will_repeat(const rast_engine *e, const rast_sample *s) {
    const rast_job *job = s->job;
    const size_t n_new = rast_sample_n_new(s) + 1;
    if (!s->scheduled || !s->fresh || s->tail >= 0 || s->n_prompt_out || s->n_draw_out != 1) return 0;
    for (int32_t m = 0; m < e->model->n_nets; m++) {
        const int runs = rast_sample_draw_mask(s) >> m & 1;
        if (s->end[m] != s->start[m] + (uint32_t)runs || (runs && s->end[m] != s->n_ids)) return 0;
    }
    if (n_new == (size_t)job->stop.max_new || n_new == job->transfer_start) return 0;
    return rast_may_run_ahead(job) && (!job->n_draft || e->n_ahead < ASK_AGAIN);
}

/* Submits the step after the one on its way, if that is like it and nobody else can join; 1: it did; -1: not, or not all of it.
 * What cannot be done now, for want of memory too, the next call does. */
static int run_ahead(rast_engine *e) {
    const rast_flight *now = &e->flights[e->turn];
    rast_flight *f = rast_other_flight(e, now);
    const size_t n = e->n_running;
    if (!e->runs_ahead || now->n_out != n)
        return 0; /* its outputs are those of the samples that run now, in their order */
    for (size_t i = 0; i < n; i++)
        if (!will_repeat(e, e->running[i])) return 0;
    for (size_t i = 0; i < n; i++) {
        rast_sample *s = e->running[i];
        if (s->n_blocks >= rast_blocks_for(s->n_ids + 1)) continue;
        const int32_t block = rast_blocks_take(&e->blocks);
        if (block < 0) return 0;
        s->blocks[s->n_blocks++] = block;
    }
    if (rast_admit(e, NULL) || e->n_running > n) return 0;
    for (size_t i = 0; i < n; i++) {
        move_sample(e, e->running[i], 1);
        e->running[i]->ids[e->running[i]->n_ids - 1] = -1; /* not known, and not read: the sample is fresh */
    }
    int status = rast_plan_step(e, NULL);
    if (status == RAST_OK) status = rast_submit_plan(e, f, NULL);
    for (size_t i = 0; i < n; i++) {
        move_sample(e, e->running[i], -1);
        move_rows(e, e->running[i], -1); /* and so again the rows of the step on its way */
    }
    return status == RAST_OK ? 1 : -1;
}

/* ---- the public step ----------------------------------------------------------------------------------------------- */

/* Plans and submits a step of all samples that run now, their tokens known. */
static int begin_step(rast_engine *e, rast_error *err) {
    int status = rast_draft(e, err);
    e->n_ahead = 0;
    if (status == RAST_OK) status = rast_plan_step(e, err);
    return status ? status : rast_submit_plan(e, &e->flights[e->turn], err);
}

int rast_engine_step(rast_engine *e, const rast_chunk **chunks, size_t *n, rast_error *err) {
    *chunks = NULL;
    *n = 0;
    if (atomic_exchange(&e->interrupted, 0)) return rast_fail(err, RAST_ERR_INTERRUPTED, "interrupted");
    if (!e->failed)
        e->n_chunks = 0;
    else
        e->pace.since = e->pace.drawing = 0; /* what came before the failure is no measure of this step */
    e->failed = 1;                           /* until the step has succeeded */
    e->n_errors = 0;
    const double now = rast_now();
    int status = end_unmade(e, 0, err);
    if (status == RAST_OK) status = make_room(e, 0, err);
    if (status) return status;
    e->n_running = end_stopped(e, e->running, e->n_running, now);
    e->n_parked = end_stopped(e, e->parked, e->n_parked, 0);
    rast_flight *f = &e->flights[e->turn];
    if (!e->n_running) rast_drop_flight(e, f); /* all that it ran for have ended */
    const int is_on_its_way = f->n_events > 0;
    if (!is_on_its_way) {
        rast_make_place(e);
        status = rast_admit(e, err);
    }
    e->n_parked = end_stopped(e, e->parked, e->n_parked, now); /* those that found no room in time */
    if (status == RAST_OK) status = end_unmade(e, now, err);
    if (status == RAST_OK && e->n_running && !is_on_its_way) status = begin_step(e, err);
    if (status) return status;
    int ahead = 0;
    if (e->n_running) {
        ahead = run_ahead(e);
        status = rast_wait_flight(e, f, err);
        if (status) { /* the step behind it stands on what has failed */
            rast_drop_flight(e, rast_other_flight(e, f));
            return status;
        }
        e->n_steps++;
        for (size_t o = 0; o < f->n_out; o++) {
            e->token[o] = e->results[o].token;
            e->logprob[o] = e->results[o].logprob;
            e->stats[o] = e->results[o].stats;
        }
    }
    size_t kept = 0;
    for (size_t i = 0; i < e->n_running; i++) {
        rast_sample *s = e->running[i];
        const rast_finish finish = collect(e, s);
        if (finish) {
            rast_end_sample(e, s);
            continue;
        }
        e->running[kept++] = s;
        if (ahead > 0) move_rows(e, s, 1);
        if (ahead < 0) s->fresh = 0; /* a part of that step may have run, and drawn over it */
    }
    e->n_running = kept;
    if (!kept) e->pace.since = 0;
    if (ahead > 0) e->turn ^= 1, e->n_ahead++;
    *chunks = e->chunks;
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
