/* run.c: records what a plan says, submits it, and brings the results to the host.
 *
 * Two steps can be on their way: descriptors and results are there twice. All else is there once, and may be: work of one
 * queue runs in order, a class of nets has its own queue, and a step's passes wait for the transfer step before.
 */
#include "engine.h"

#include <stdlib.h>
#include <string.h>

#include "../rng.h"

static int is_flying(const rast_engine *e) { return e->flights[0].n_events || e->flights[1].n_events; }

/* What a step on its way may use is not released: the next one has to wait for it. */
static int may_grow(const rast_engine *e, rast_error *err) {
    return is_flying(e) ? rast_fail(err, RAST_ERR_MEMORY, "no room for a step while another one runs") : RAST_OK;
}

/* At least `bytes`, contents not kept. */
static int ensure(rast_engine *e, rast_rows *r, size_t bytes, rast_error *err) {
    const rast_ops *ops = e->model->ops;
    if (bytes <= r->cap) return RAST_OK;
    int status = may_grow(e, err);
    if (status) return status;
    ops->release(e->model->ctx, r->dev);
    free(r->host);
    memset(r, 0, sizeof *r);
    r->host = malloc(bytes);
    if (!r->host) return rast_fail(err, RAST_ERR_MEMORY, "no memory for %zu bytes of logits or masks", bytes);
    status = ops->alloc(e->model->ctx, bytes, RAST_MEM_DATA, &r->dev, err);
    if (status == RAST_OK) r->cap = bytes;
    return status;
}

/* For this step, and for the one that may run behind it. */
static int ensure_arenas(rast_engine *e, const rast_flight *now, rast_error *err) {
    const rast_ops *ops = e->model->ops;
    if (e->arena.used <= now->arena_cap) return RAST_OK;
    int status = may_grow(e, err);
    for (int i = 0; i < 2 && status == RAST_OK; i++) {
        rast_flight *f = &e->flights[i];
        if (f->arena_cap >= e->arena.cap || (f != now && !e->runs_ahead)) continue;
        ops->release(e->model->ctx, f->arena);
        f->arena = 0, f->arena_cap = 0;
        status = ops->alloc(e->model->ctx, e->arena.cap, RAST_MEM_DATA, &f->arena, err);
        if (status == RAST_OK) f->arena_cap = e->arena.cap;
    }
    return status;
}

static int ensure_rows(rast_engine *e, rast_rows *r, size_t rows, size_t width, rast_error *err) {
    size_t bytes;
    if (!rast_mul(rows, width, &bytes) || !rast_mul(bytes, 4, &bytes))
        return rast_fail(err, RAST_ERR_MEMORY, "%zu rows of %zu values are too large", rows, width);
    return ensure(e, r, bytes, err);
}

static rast_dev at(const void *host) { return (rast_dev)(uintptr_t)host; }

/* The view of a set of nets, made at first use and kept. */
static int view_of(rast_engine *e, uint64_t mask, const int32_t *nets, int32_t n, rast_view **out, rast_error *err) {
    for (size_t i = 0; i < e->n_views; i++)
        if (e->views[i].mask == mask) {
            *out = e->views[i].view;
            return RAST_OK;
        }
    rast_dev kv[RAST_MAX_NETS];
    for (int32_t i = 0; i < n; i++) kv[i] = e->kv[nets[i]];
    rast_view_entry *grown = rast_grow(e->views, &e->cap_views, e->n_views, sizeof *e->views);
    if (!grown) return rast_fail(err, RAST_ERR_MEMORY, "no memory for a view of %d nets", n);
    e->views = grown;
    int status = rast_view_new(e->model, nets, n, kv, out, err);
    if (status == RAST_OK) e->views[e->n_views++] = (rast_view_entry){mask, *out};
    return status;
}

/* Requests with ever other coefficients must not fill the memory with views. */
static void free_views(rast_engine *e) {
    while (e->n_views) rast_view_free(e->views[--e->n_views].view);
}

static int uses_history(const rast_sample *s) { return s->draws && s->job->sampling.repetition_penalty != 1; }

/* Everything that may need memory, before anything is recorded. */
static int prepare(rast_engine *e, rast_flight *f, rast_error *err) {
    const rast_plan *plan = &e->plan;
    const size_t n_vocab = (size_t)e->model->n_vocab, n_nets = (size_t)e->model->n_nets, words = (size_t)e->words;
    int status = RAST_OK, history = 0;
    for (size_t i = 0; i < e->n_running; i++) history |= uses_history(e->running[i]);
    if (history) status = ensure_rows(e, &e->history, (size_t)e->max_seqs, words, err);
    if (status == RAST_OK) status = ensure_rows(e, &e->masks, plan->n_masks, words, err);
    if (status == RAST_OK) status = ensure_rows(e, &e->logits, (size_t)plan->n_logits, n_vocab, err);
    if (status == RAST_OK) status = ensure_rows(e, &e->scores, (size_t)plan->n_scores, n_vocab, err);
    if (status == RAST_OK) status = ensure_rows(e, &e->parts, (size_t)plan->n_parts * n_nets, n_vocab, err);
    if (status == RAST_OK) status = ensure_arenas(e, f, err);
    for (int32_t i = 0; i < plan->n_passes && status == RAST_OK; i++)
        status = rast_rope_extend(e->model, &e->model->classes[plan->passes[i].cls], plan->passes[i].max_end, err);
    return status;
}

static void fill_history(const rast_sample *s, uint32_t *row, size_t words) {
    memset(row, 0, words * sizeof *row);
    for (size_t i = 0; i < s->n_ids + s->first_draw; i++) {
        const int32_t id = i < s->n_ids ? s->ids[i] : s->draft[i - s->n_ids];
        if ((size_t)id / 32 < words) row[id / 32] |= (uint32_t)1 << (id % 32);
    }
}

/* The end of the step on its way, which the coming one follows; 0: there is none. */
static rast_event end_of_step_before(rast_engine *e, const rast_flight *f) {
    const rast_flight *before = rast_other_flight(e, f);
    return before->n_events ? before->events[before->n_events - 1] : 0;
}

static int upload(rast_engine *e, rast_flight *f, rast_error *err) {
    const rast_ops *ops = e->model->ops;
    const size_t words = (size_t)e->words, row = words * sizeof(uint32_t);
    uint32_t *history = e->history.host, *mask = e->masks.host;
    ops->begin(e->upload, 0);
    ops->copy(e->upload, f->arena, at(e->arena.host), e->arena.used, RAST_COPY_TO_DEVICE);
    for (size_t i = 0; i < e->n_running; i++) {
        const rast_sample *s = e->running[i];
        if (!s->scheduled || !uses_history(s) || !s->history_stale) continue;
        const size_t offset = (size_t)s->slot * words;
        fill_history(s, history + offset, words);
        ops->copy(e->upload, e->history.dev + (size_t)s->slot * row, at(history + offset), row, RAST_COPY_TO_DEVICE);
    }
    for (size_t i = 0; i < e->n_running; i++) { /* in the order in which describe_outputs numbered them */
        const rast_sample *s = e->running[i];
        for (uint32_t o = 0; s->scheduled && o < s->n_draw_out; o++)
            if (rast_sample_has_mask(s, s->first_draw + o)) {
                rast_sample_mask(s, s->first_draw + o, e->model->n_vocab, mask);
                mask += words;
            }
    }
    if (e->plan.n_masks) {
        const rast_event before = end_of_step_before(e, f);
        if (before) ops->depend(e->upload, before); /* which reads them too */
        ops->copy(e->upload, e->masks.dev, at(e->masks.host), e->plan.n_masks * row, RAST_COPY_TO_DEVICE);
    }
    int status = ops->submit(e->upload, &f->events[0], err);
    f->n_events = status == RAST_OK;
    return status;
}

static void resolve(rast_engine *e, const rast_flight *f) {
    for (int32_t i = 0; i < e->plan.n_passes; i++) {
        rast_pass *p = &e->plan.passes[i].pass;
        rast_dev *fields[] = {&p->count,   &p->token,   &p->pos,         &p->row_seg,      &p->seg_row,
                              &p->seg_ctx, &p->out_row, &p->block_table, &p->prefix_blocks};
        for (size_t d = 0; d < sizeof fields / sizeof *fields; d++) *fields[d] += f->arena;
        p->drawn = e->drawn;
    }
}

/* ---- queues: classes run beside each other where the device can --------------------------------------------------------- */

static int32_t queue_of(const rast_engine *e, int32_t net) {
    const int32_t cls = e->model->nets[net].cls;
    return cls < e->n_queues ? cls : e->n_queues - 1;
}

/* Queues with something to do before the transfer step, as bits. */
static uint32_t used_queues(const rast_engine *e) {
    uint32_t used = 0;
    for (int32_t i = 0; i < e->plan.n_passes; i++) used |= 1u << queue_of(e, e->plan.passes[i].nets[0]);
    for (int32_t net = 0; net < e->model->n_nets; net++)
        if (e->plan.n_copies[net]) used |= 1u << queue_of(e, net);
    return used;
}

/* Gives every pass its place for outputs, and the terms their rows. */
static void place_outputs(rast_engine *e, const rast_flight *f) {
    const rast_model *m = e->model;
    size_t placed[RAST_MAX_NETS] = {0}; /* by class: nets whose outputs already have their place */
    for (int32_t i = 0; i < m->n_nets; i++) {
        const rast_net_state *net = &m->nets[i];
        e->terms[i] = (rast_term){.head = &net->weights[W_HEAD],
                                  .hidden_type = net->dtype,
                                  .n_rows = net->config.vocab_size,
                                  .uncommon = net->uncommon,
                                  .n_uncommon = net->n_uncommon};
        if (!(e->plan.has_saved >> i & 1)) continue;
        e->terms[i].saved = e->saved.dev;
        e->terms[i].saved_row = f->arena + e->plan.saved_row[i];
    }
    for (int32_t i = 0; i < e->plan.n_passes; i++) {
        rast_pass_plan *p = &e->plan.passes[i];
        const rast_net_state *net = &m->nets[p->nets[0]];
        const rast_workspace *w = &e->work[p->cls];
        const size_t row = (size_t)p->pass.cap_out * (size_t)net->config.hidden_size;
        const size_t bytes = row * (net->dtype == RAST_F32 ? 4u : 2u), before = placed[p->cls];
        p->last = w->last + before * row * sizeof(float);
        p->hidden = w->hidden + before * bytes;
        for (int32_t j = 0; j < p->n_nets; j++) e->terms[p->nets[j]].hidden = p->hidden + (size_t)j * bytes;
        placed[p->cls] += (size_t)p->n_nets;
    }
}

/* ---- keys: all that a recording depends on besides what lives as long as the engine --------------------------------------- */

static void add_to_key(uint64_t *key, uint64_t value) { *key = rast_mix(*key ^ value) + 0x9E3779B97F4A7C15u; }

/* Decoding steps are worth a graph: they repeat, and are short beside the time it takes to enqueue them. */
static int is_worth_a_graph(const rast_engine *e, int32_t queue) {
    for (int32_t net = 0; net < e->model->n_nets; net++)
        if (e->plan.n_copies[net] && queue_of(e, net) == queue) return 0;
    for (int32_t i = 0; i < e->plan.n_passes; i++)
        if (e->plan.passes[i].pass.cap_rows > e->max_seqs) return 0;
    return e->model->ops->replays && e->plan.n_out <= (size_t)e->max_seqs;
}

static void add_passes_to_key(const rast_engine *e, int32_t queue, uint64_t *key) {
    for (int32_t i = 0; i < e->plan.n_passes; i++) {
        const rast_pass_plan *plan = &e->plan.passes[i];
        const rast_pass *p = &plan->pass;
        if (queue_of(e, plan->nets[0]) != queue) continue;
        const uint64_t values[] = {plan->mask,
                                   plan->last,
                                   plan->hidden,
                                   (uint64_t)p->n_models,
                                   (uint64_t)p->cap_rows,
                                   (uint64_t)p->cap_segs,
                                   (uint64_t)p->cap_out,
                                   (uint64_t)p->cap_ctx,
                                   p->count,
                                   p->token,
                                   p->drawn,
                                   p->pos,
                                   p->row_seg,
                                   p->seg_row,
                                   p->seg_ctx,
                                   p->block_table,
                                   (uint64_t)p->table_stride,
                                   p->prefix_blocks,
                                   p->out_row};
        for (size_t v = 0; v < sizeof values / sizeof *values; v++) add_to_key(key, values[v]);
    }
}

static void add_combine_to_key(const rast_engine *e, const rast_flight *f, const rast_logits *l, uint64_t *key) {
    const rast_rows *planes[] = {&e->logits, &e->scores, &e->parts};
    const int32_t counts[] = {e->plan.n_logits, e->plan.n_scores, e->plan.n_parts};
    const uint64_t values[] = {(uint64_t)e->plan.draft_net,
                               (uint64_t)l->n_out,
                               l->coef,
                               l->draw,
                               l->history,
                               l->allowed,
                               l->out,
                               l->drawn,
                               l->logits,
                               l->scores,
                               l->parts,
                               at(f->results)};
    for (size_t v = 0; v < sizeof values / sizeof *values; v++) add_to_key(key, values[v]);
    for (int32_t i = 0; i < l->n_terms; i++) {
        add_to_key(key, l->terms[i].hidden);
        add_to_key(key, l->terms[i].saved);
        add_to_key(key, l->terms[i].saved_row);
    }
    for (size_t i = 0; i < sizeof planes / sizeof *planes; i++) {
        add_to_key(key, (uint64_t)counts[i]);
        if (counts[i]) add_to_key(key, at(planes[i]->host));
    }
}

/* ---- recording --------------------------------------------------------------------------------------------------------------- */

static int record_copies(rast_engine *e, const rast_flight *f, int32_t queue, rast_error *err) {
    for (int32_t net = 0; net < e->model->n_nets; net++) {
        rast_view *view;
        if (!e->plan.n_copies[net] || queue_of(e, net) != queue) continue;
        int status = view_of(e, (uint64_t)1 << net, &net, 1, &view, err);
        if (status) return status;
        rast_view_copy_blocks(view, e->queues[queue], f->arena + e->plan.copies[net], e->plan.n_copies[net]);
    }
    return RAST_OK;
}

static int record_passes(rast_engine *e, int32_t queue, rast_error *err) {
    for (int32_t i = 0; i < e->plan.n_passes; i++) {
        const rast_pass_plan *p = &e->plan.passes[i];
        rast_view *view;
        if (queue_of(e, p->nets[0]) != queue) continue;
        int status = view_of(e, p->mask, p->nets, p->n_nets, &view, err);
        if (status) return status;
        rast_forward(view, e->queues[queue], &p->pass, &e->work[p->cls], p->last, p->hidden);
    }
    return RAST_OK;
}

static rast_logits describe_combine(const rast_engine *e, const rast_flight *f) {
    const rast_plan *plan = &e->plan;
    const int32_t draft = plan->draft_net; /* drafts are drawn from this net alone, whose logits are kept */
    return (rast_logits){.n_terms = draft ? 1 : e->model->n_nets,
                         .n_out = (int32_t)plan->n_drawn,
                         .n_vocab = e->model->n_vocab,
                         .n_valid = e->model->n_valid,
                         .terms = e->terms + draft,
                         .coef = f->arena + plan->coef,
                         .draw = f->arena + plan->draw,
                         .history = e->history.dev,
                         .allowed = plan->n_masks ? e->masks.dev : 0,
                         .history_words = e->words,
                         .out = e->out,
                         .drawn = e->drawn,
                         .logits = plan->n_logits ? e->logits.dev : 0,
                         .scores = plan->n_scores ? e->scores.dev : 0,
                         .parts = draft           ? e->saved.dev
                                  : plan->n_parts ? e->parts.dev
                                                  : 0};
}

static void record_combine(rast_engine *e, const rast_flight *f, const rast_logits *l) {
    const rast_plan *plan = &e->plan;
    const rast_ops *ops = e->model->ops;
    const size_t row = (size_t)e->model->n_vocab * sizeof(float);
    const struct {
        const rast_rows *rows;
        size_t n;
    } planes[] = {{&e->logits, (size_t)plan->n_logits},
                  {&e->scores, (size_t)plan->n_scores},
                  {&e->parts, (size_t)plan->n_parts * (size_t)e->model->n_nets}};
    ops->combine(e->queues[0], l);
    ops->copy(e->queues[0], at(f->results), e->out, plan->n_drawn * sizeof *f->results, RAST_COPY_TO_HOST);
    for (size_t i = 0; i < sizeof planes / sizeof *planes; i++)
        if (planes[i].n)
            ops->copy(e->queues[0], at(planes[i].rows->host), planes[i].rows->dev, planes[i].n * row,
                      RAST_COPY_TO_HOST);
}

/* Records and submits one queue's passes (passes != 0) and perhaps the transfer step: after the upload and the step before, or
 * if it is that alone, after all submissions so far. */
static int submit_queue(rast_engine *e, rast_flight *f, int32_t queue, int passes, const rast_logits *l,
                        rast_error *err) {
    const rast_ops *ops = e->model->ops;
    const rast_event before = end_of_step_before(e, f);
    rast_queue *q = e->queues[queue];
    uint64_t key = is_worth_a_graph(e, queue);
    int status = RAST_OK;
    if (key && passes) add_passes_to_key(e, queue, &key);
    if (key && l) add_combine_to_key(e, f, l, &key);
    const int is_kept = ops->begin(q, key);
    for (int32_t i = 0; i < (passes ? 1 : f->n_events); i++) ops->depend(q, f->events[i]);
    if (before) ops->depend(q, before);
    if (!is_kept && passes) {
        status = record_copies(e, f, queue, err);
        if (status == RAST_OK) status = record_passes(e, queue, err);
    }
    if (status) return status; /* the next begin() forgets what was recorded */
    if (!is_kept && l) record_combine(e, f, l);
    status = ops->submit(q, &f->events[f->n_events], err);
    f->n_events += status == RAST_OK;
    return status;
}

static int submit_all(rast_engine *e, rast_flight *f, rast_error *err) {
    if (e->n_views > RAST_MAX_VIEWS && !is_flying(e)) free_views(e);
    int status = prepare(e, f, err);
    if (status == RAST_OK) status = upload(e, f, err);
    if (status) return status;
    resolve(e, f);
    place_outputs(e, f);
    const rast_logits l = describe_combine(e, f);
    const uint32_t used = used_queues(e);
    const int together = used == 1; /* everything on the first queue, as one submission */
    for (int32_t queue = 0; queue < e->n_queues && status == RAST_OK; queue++)
        if (used >> queue & 1) status = submit_queue(e, f, queue, 1, together && e->plan.n_out ? &l : NULL, err);
    if (status == RAST_OK && !together && e->plan.n_out) status = submit_queue(e, f, 0, 0, &l, err);
    return status;
}

int rast_reserve_step(rast_engine *e, rast_error *err) {
    const rast_model *m = e->model;
    const rast_ops *ops = m->ops;
    int status = RAST_OK;
    if (!ops->reserve) return RAST_OK;
    for (int32_t c = 0; c < m->n_classes && status == RAST_OK; c++) {
        const rast_class *cls = &m->classes[c];
        rast_queue *q = e->queues[queue_of(e, cls->first_net)];
        const rast_dev nowhere[RAST_MAX_NETS] = {0};
        int32_t nets[RAST_MAX_NETS], n = 0, context = 1;
        rast_view *view;
        while (context < cls->max_context && context <= INT32_MAX / 2) context *= 2; /* as passes are padded */
        for (int32_t i = 0; i < m->n_nets; i++)
            if (m->nets[i].cls == c) nets[n++] = i;
        status = rast_view_new(e->model, nets, n, nowhere, &view, err);
        if (status) return status;
        const rast_pass pass = {.n_models = n,
                                .cap_rows = e->max_rows,
                                .cap_segs = e->max_seqs,
                                .cap_out = e->cap_out,
                                .cap_ctx = context,
                                .act_type = m->nets[nets[0]].dtype};
        ops->begin(q, 0);
        rast_forward(view, q, &pass, &e->work[c], e->work[c].last, e->work[c].hidden);
        status = ops->reserve(q, err);
        rast_view_free(view);
    }
    if (status) return status;
    for (int32_t i = 0; i < m->n_nets; i++) {
        const rast_net_state *net = &m->nets[i];
        e->terms[i] = (rast_term){.hidden = e->work[net->cls].hidden,
                                  .head = &net->weights[W_HEAD],
                                  .hidden_type = net->dtype,
                                  .n_rows = net->config.vocab_size,
                                  .uncommon = net->uncommon,
                                  .n_uncommon = net->n_uncommon};
    }
    ops->begin(e->queues[0], 0);
    ops->combine(e->queues[0], &(rast_logits){.n_terms = m->n_nets,
                                              .n_out = e->cap_out,
                                              .n_vocab = m->n_vocab,
                                              .n_valid = m->n_valid,
                                              .terms = e->terms,
                                              .history_words = e->words});
    return ops->reserve(e->queues[0], err);
}

static int wait_all(rast_engine *e, rast_flight *f, rast_error *err) {
    int status = RAST_OK;
    while (f->n_events) {
        const int waited = e->model->ops->wait(e->model->ctx, f->events[--f->n_events], status ? NULL : err);
        if (status == RAST_OK) status = waited;
    }
    return status;
}

void rast_drop_flight(rast_engine *e, rast_flight *f) { wait_all(e, f, NULL); }

/* What a failed step drew stands in `drawn`, but the samples do not have it. */
static void forget_drawn(rast_engine *e) {
    for (size_t i = 0; i < e->n_running; i++) e->running[i]->fresh = 0;
}

int rast_submit_plan(rast_engine *e, rast_flight *f, rast_error *err) {
    f->start = rast_now();
    f->n_out = e->plan.n_out;
    f->n_rows = e->plan.n_rows;
    int status = submit_all(e, f, err);
    if (status == RAST_OK) return RAST_OK;
    rast_drop_flight(e, f); /* nothing of it may run into the next one */
    forget_drawn(e);
    return status;
}

int rast_wait_flight(rast_engine *e, rast_flight *f, rast_error *err) {
    int status = wait_all(e, f, err);
    if (status) {
        forget_drawn(e);
        return status;
    }
    const double now = rast_now(), seconds = now - (f->start > e->landed ? f->start : e->landed);
    e->landed = now;
    e->results = f->results;
    e->n_rows += f->n_rows;
    e->seconds[e->plan.draft_net > 0] += seconds;
    e->n_draft_steps += e->plan.draft_net > 0;
    rast_pace_time(e, f, seconds);
    for (size_t i = 0; i < e->n_running; i++)
        if (e->running[i]->scheduled && uses_history(e->running[i])) e->running[i]->history_stale = 0;
    return RAST_OK;
}

int rast_run_plan(rast_engine *e, rast_error *err) {
    rast_flight *f = &e->flights[e->turn];
    int status = rast_submit_plan(e, f, err);
    return status ? status : rast_wait_flight(e, f, err);
}

int rast_save_drafts(rast_engine *e, size_t n, rast_error *err) {
    const size_t most = rast_draft_rows(e);
    size_t rows = 1;
    while (rows < n) rows *= 2; /* grows seldom: devices drop their graphs when memory is released */
    return ensure_rows(e, &e->saved, rows < most ? rows : most, (size_t)e->model->n_vocab, err);
}
