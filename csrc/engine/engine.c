/* engine.c: the life of an engine, and the requests it holds. */
#include "engine.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_BLOCKS = 1 << 30 };

/* ---- life ---------------------------------------------------------------------------------------------------------- */

static size_t block_bytes(const rast_model *m) {
    size_t bytes = 0;
    for (int32_t i = 0; i < m->n_nets; i++) bytes += rast_kv_block_bytes(&m->nets[i]);
    return bytes;
}

/* Of a device with memory of its own: what requests may ask for beyond the workspace, a step's worth of each. */
static size_t bytes_on_demand(const rast_engine *e) {
    const size_t n_seqs = (size_t)e->max_seqs, row = (size_t)e->model->n_vocab * sizeof(float);
    size_t drafts = rast_draft_rows(e);
    if (drafts > n_seqs * RAST_PACE_MOST) drafts = n_seqs * RAST_PACE_MOST;
    /* logits; those kept from drafting; histories and masks */
    return n_seqs * row + drafts * row + 2 * n_seqs * (size_t)e->words * sizeof(uint32_t);
}

/* "": the memory is the process's own. */
static void describe_memory(const rast_memory *memory, size_t on_demand, char *out, size_t size) {
    const double mib = 1 << 20;
    *out = 0;
    if (memory->total)
        snprintf(
            out, size,
            "; of the device's %.1f MiB %.1f are free beside %.1f MiB of weights and %.1f MiB of a step's "
            "workspace, %.1f of these are left for what CUDA loads and keeps, and %.1f for what requests may ask for",
            (double)memory->total / mib, (double)memory->free / mib, (double)memory->weights / mib,
            (double)memory->work / mib, (double)memory->kept / mib, (double)on_demand / mib);
}

/* Blocks that the budget pays for, but no more than max_seqs samples of the longest context could use. Memory is only reserved
 * here, so what is not there would be missed in the middle of a run. */
static int make_cache(rast_engine *e, size_t budget, rast_error *err) {
    rast_model *m = e->model;
    const size_t one = block_bytes(m);
    rast_memory memory;
    int status = m->ops->memory(m->ctx, &memory, err);
    if (status) return status;
    char plan[360];
    size_t left = rast_memory_left(&memory), context = 0, most;
    e->on_demand = memory.total ? bytes_on_demand(e) : 0;
    e->kept = memory.kept;
    describe_memory(&memory, e->on_demand, plan, sizeof plan);
    left -= left < e->on_demand ? left : e->on_demand;
    if (!budget) budget = left / 100 * (size_t)m->ops->cache_percent;
    for (int32_t i = 0; i < m->n_nets; i++)
        if ((size_t)m->nets[i].config.max_context > context) context = (size_t)m->nets[i].config.max_context;
    size_t n = budget / one;
    if (rast_mul(rast_blocks_for(context) + 1, (size_t)e->max_seqs, &most) && n > most) n = most;
    if (n > MAX_BLOCKS) n = MAX_BLOCKS;
    if (!n)
        return rast_fail(err, RAST_ERR_MEMORY,
                         "the KV cache budget of %zu bytes is too small: %d tokens of all models take %zu%s", budget,
                         RAST_BLOCK_TOKENS, one, plan);
    if (n > left / one)
        return rast_fail(err, RAST_ERR_MEMORY,
                         "a KV cache for %zu tokens takes %zu bytes, and %zu are free: there is room for %zu tokens%s",
                         n * RAST_BLOCK_TOKENS, n * one, left, left / one * RAST_BLOCK_TOKENS, plan);
    status = rast_blocks_init(&e->blocks, n, (size_t)m->n_nets, err);
    for (int32_t i = 0; i < m->n_nets && status == RAST_OK; i++)
        status = m->ops->alloc(m->ctx, n * rast_kv_block_bytes(&m->nets[i]), RAST_MEM_CACHE, &e->kv[i], err);
    e->kv_bytes = n * one;
    return status;
}

int rast_engine_new(rast_model *m, const rast_budget *budget, rast_engine **out, rast_error *err) {
    const rast_budget defaults = {0};
    *out = NULL;
    if (!budget) budget = &defaults;
    if (budget->max_rows < 0 || budget->max_rows > 1 << 20 || budget->max_seqs < 0 || budget->max_seqs > 1 << 20)
        return rast_fail(err, RAST_ERR_VALUE, "max_rows = %d and max_seqs = %d must lie in 0 (default) to %d",
                         budget->max_rows, budget->max_seqs, 1 << 20);
    int status = RAST_ERR_MEMORY;
    const size_t n_nets = (size_t)m->n_nets;
    rast_engine *e = calloc(1, sizeof *e);
    if (!e) return rast_fail(err, RAST_ERR_MEMORY, "no memory for an engine");
    e->model = m;
    e->max_rows = budget->max_rows ? budget->max_rows : 512;
    e->max_seqs = budget->max_seqs ? budget->max_seqs : 64;
    if (e->max_seqs > e->max_rows) e->max_seqs = e->max_rows; /* a step holds a row of every sample */
    e->cap_out = e->max_rows + e->max_seqs;                   /* a prompt's last row can be asked for twice */
    e->words = (m->n_vocab + 31) / 32;
    e->next_id = 1;
    e->check_at = INFINITY;
    const char *ahead = getenv("RAST_RUN_AHEAD");
    e->runs_ahead = m->ops->asynchronous && (!ahead || strcmp(ahead, "0") != 0);
    atomic_init(&e->interrupted, 0);

    const size_t n_seqs = (size_t)e->max_seqs, n_out = (size_t)e->cap_out;
    e->kv = calloc(n_nets, sizeof *e->kv);
    e->work = calloc((size_t)m->n_classes, sizeof *e->work);
    e->running = calloc(n_seqs, sizeof(rast_sample *));
    e->parked = calloc(n_seqs, sizeof(rast_sample *));
    e->order = calloc(n_seqs, sizeof(rast_sample *));
    e->free_slots = calloc(n_seqs, sizeof *e->free_slots);
    e->plan.passes = calloc(n_nets, sizeof *e->plan.passes);
    e->terms = calloc(n_nets, sizeof *e->terms);
    e->rows_left = calloc(n_nets, sizeof *e->rows_left);
    for (int i = 0; i < 2; i++) e->flights[i].results = calloc(n_out, sizeof(rast_drawn));
    e->token = calloc(n_out, sizeof *e->token);
    e->logprob = calloc(n_out, sizeof *e->logprob);
    e->stats = calloc(n_out, sizeof *e->stats);
    e->errors = calloc(n_seqs, sizeof *e->errors);
    if (!e->kv || !e->work || !e->running || !e->parked || !e->order || !e->free_slots || !e->plan.passes ||
        !e->terms || !e->rows_left || !e->flights[0].results || !e->flights[1].results || !e->token || !e->logprob ||
        !e->stats || !e->errors) {
        rast_fail(err, RAST_ERR_MEMORY, "no memory for an engine of %d samples", e->max_seqs);
        goto fail;
    }
    while (e->n_free_slots < e->max_seqs) {
        e->free_slots[e->n_free_slots] = e->max_seqs - 1 - e->n_free_slots;
        e->n_free_slots++;
    }
    const int32_t n_queues = !m->ops->overlaps ? 1 : m->n_classes < RAST_MAX_QUEUES ? m->n_classes : RAST_MAX_QUEUES;
    status = m->ops->queue_new(m->ctx, &e->upload, err);
    while (status == RAST_OK && e->n_queues < n_queues) {
        status = m->ops->queue_new(m->ctx, &e->queues[e->n_queues], err);
        e->n_queues += status == RAST_OK;
    }
    for (int32_t c = 0; c < m->n_classes && status == RAST_OK; c++)
        status = rast_workspace_new(m, &m->classes[c], e->max_rows, e->cap_out, &e->work[c], err);
    if (status == RAST_OK) status = m->ops->alloc(m->ctx, n_seqs * sizeof(int32_t), RAST_MEM_DATA, &e->drawn, err);
    if (status == RAST_OK) status = m->ops->alloc(m->ctx, n_out * sizeof(rast_drawn), RAST_MEM_DATA, &e->out, err);
    if (status == RAST_OK) status = rast_reserve_step(e, err);
    if (status == RAST_OK) status = make_cache(e, budget->kv_bytes, err);
    if (status) goto fail;
    *out = e;
    return RAST_OK;
fail:
    rast_engine_free(e);
    return status;
}

static void free_rows(rast_engine *e, rast_rows *r) {
    e->model->ops->release(e->model->ctx, r->dev);
    free(r->host);
}

void rast_engine_free(rast_engine *e) {
    if (!e) return;
    const rast_model *m = e->model;
    for (int i = 0; i < 2; i++) rast_drop_flight(e, &e->flights[i]); /* nothing may run in what is freed */
    for (size_t i = 0; i < e->n_running; i++) rast_sample_free(e->running[i]);
    for (size_t i = 0; i < e->n_parked; i++) rast_sample_free(e->parked[i]);
    for (rast_job *job = e->first_job, *after; job; job = after) {
        after = job->after;
        rast_job_free(job);
    }
    for (size_t i = 0; i < e->n_views; i++) rast_view_free(e->views[i].view);
    for (int32_t i = 0; e->kv && i < m->n_nets; i++) m->ops->release(m->ctx, e->kv[i]);
    for (int32_t c = 0; e->work && c < m->n_classes; c++) rast_workspace_free(e->model, &e->work[c]);
    rast_rows *rows[] = {&e->history, &e->masks, &e->logits, &e->scores, &e->parts, &e->saved};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) free_rows(e, rows[i]);
    m->ops->release(m->ctx, e->drawn);
    m->ops->release(m->ctx, e->out);
    for (int i = 0; i < 2; i++) {
        m->ops->release(m->ctx, e->flights[i].arena);
        free(e->flights[i].results);
    }
    while (e->n_queues) m->ops->queue_free(e->queues[--e->n_queues]);
    if (e->upload) m->ops->queue_free(e->upload);
    rast_blocks_clear(&e->blocks);
    void *plain[] = {e->kv,          e->work,       e->views,      e->running, e->parked, e->terms,
                     e->token,       e->free_slots, e->arena.host, e->logprob, e->stats,  e->rows_left,
                     e->plan.passes, e->chunks,     e->errors,     e->order};
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++) free(plain[i]);
    free(e);
}

/* ---- requests ------------------------------------------------------------------------------------------------------ */

static int check_room(const rast_engine *e, const rast_job *job, rast_error *err) {
    for (int32_t i = 0; i < e->model->n_nets; i++) {
        const rast_net_state *net = &e->model->nets[i];
        if (job->active >> i & 1 && rast_job_tokens(job) > (size_t)net->config.max_context)
            return rast_fail(err, RAST_ERR_VALUE,
                             "prompt (%zu tokens) and max_new_tokens (%d) exceed the context of %s (%d tokens)",
                             job->n_ids, job->stop.max_new, net->name, net->config.max_context);
    }
    const size_t need = rast_blocks_for(rast_job_tokens(job));
    if (need > e->blocks.n)
        return rast_fail(
            err, RAST_ERR_MEMORY,
            "prompt (%zu tokens) and max_new_tokens (%d) need a KV cache for %zu tokens (%zu bytes), and this "
            "one has room for %zu (%zu bytes): allow more memory or ask for less",
            job->n_ids, job->stop.max_new, need * RAST_BLOCK_TOKENS, need * block_bytes(e->model),
            e->blocks.n * RAST_BLOCK_TOKENS, e->kv_bytes);
    return RAST_OK;
}

int rast_engine_add(rast_engine *e, const rast_request *request, uint64_t *id, rast_error *err) {
    rast_job *job;
    int status = rast_job_new(e->model, request, &job, err);
    if (status) return status;
    status = check_room(e, job, err);
    if (status) {
        rast_job_free(job);
        return status;
    }
    job->id = e->next_id++;
    job->before = e->last_job;
    *(e->last_job ? &e->last_job->after : &e->first_job) = job;
    e->last_job = job;
    if (!e->next_job) e->next_job = job;
    if (job->deadline != 0 && job->deadline < e->check_at) e->check_at = job->deadline;
    if (id) *id = job->id;
    return RAST_OK;
}

static void cancel(rast_engine *e, rast_job *job) {
    job->cancelled = 1;
    e->check_at = 0;
}

int rast_engine_cancel(rast_engine *e, uint64_t id) {
    for (rast_job *job = e->first_job; job; job = job->after)
        if (job->id == id) {
            cancel(e, job);
            return RAST_OK;
        }
    return RAST_ERR_VALUE;
}

void rast_engine_cancel_all(rast_engine *e) {
    for (rast_job *job = e->first_job; job; job = job->after) cancel(e, job);
}

void rast_engine_interrupt(rast_engine *e) { atomic_store(&e->interrupted, 1); }

int rast_engine_busy(const rast_engine *e) { return e->first_job != NULL; }

void rast_engine_set_drafter(rast_engine *e, rast_drafter drafter, void *user) {
    e->drafter = drafter;
    e->drafter_user = user;
}

void rast_engine_get_info(const rast_engine *e, rast_engine_info *out) {
    rast_memory memory;
    if (e->model->ops->memory(e->model->ctx, &memory, NULL) || !memory.total) memory = (rast_memory){0};
    *out = (rast_engine_info){.max_rows = e->max_rows,
                              .max_seqs = e->max_seqs,
                              .n_blocks = e->blocks.n,
                              .n_free = rast_blocks_room(&e->blocks),
                              .n_cached = e->blocks.n_kept,
                              .block_tokens = RAST_BLOCK_TOKENS,
                              .kv_bytes = e->kv_bytes,
                              .steps = e->n_steps,
                              .rows = e->n_rows,
                              .drafted = e->n_drafted,
                              .accepted = e->n_accepted,
                              .rejected = e->n_rejected,
                              .draft_steps = e->n_draft_steps,
                              .step_seconds = e->seconds[0],
                              .draft_seconds = e->seconds[1],
                              .reused = e->n_reused,
                              .preempted = e->n_preempted,
                              .evicted = e->blocks.n_evicted,
                              .device_bytes = memory.total,
                              .device_free = memory.free,
                              .device_weights = memory.weights,
                              .device_work = memory.work,
                              .device_kept = e->kept + e->on_demand};
}
