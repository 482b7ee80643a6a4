/* run.c: records what a plan says, runs it and brings the results to the host. */
#include "engine.h"

#include <stdlib.h>
#include <string.h>

/* At least `bytes`, contents not kept. */
static int ensure(rast_engine *e, rast_rows *r, size_t bytes, rast_error *err) {
    const rast_ops *ops = e->model->ops;
    if (bytes <= r->cap) return RAST_OK;
    ops->release(e->model->ctx, r->dev);
    free(r->host);
    memset(r, 0, sizeof *r);
    r->host = malloc(bytes);
    if (!r->host) return rast_fail(err, RAST_ERR_MEMORY, "no memory for %zu bytes of logits or masks", bytes);
    int status = ops->alloc(e->model->ctx, bytes, RAST_MEM_DATA, &r->dev, err);
    if (status == RAST_OK) r->cap = bytes;
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
static int prepare(rast_engine *e, rast_error *err) {
    const rast_plan *plan = &e->plan;
    const size_t n_vocab = (size_t)e->model->n_vocab, n_nets = (size_t)e->model->n_nets, words = (size_t)e->words;
    int status = RAST_OK, history = 0;
    for (size_t i = 0; i < e->n_running; i++) history |= uses_history(e->running[i]);
    if (history) status = ensure_rows(e, &e->history, (size_t)e->max_seqs, words, err);
    if (status == RAST_OK) status = ensure_rows(e, &e->masks, plan->n_masks, words, err);
    if (status == RAST_OK) status = ensure_rows(e, &e->logits, (size_t)plan->n_logits, n_vocab, err);
    if (status == RAST_OK) status = ensure_rows(e, &e->scores, (size_t)plan->n_scores, n_vocab, err);
    if (status == RAST_OK) status = ensure_rows(e, &e->parts, (size_t)plan->n_parts * n_nets, n_vocab, err);
    if (status == RAST_OK && e->arena.used > e->arena.dev_cap) {
        e->model->ops->release(e->model->ctx, e->arena.dev);
        e->arena.dev = 0, e->arena.dev_cap = 0;
        status = e->model->ops->alloc(e->model->ctx, e->arena.cap, RAST_MEM_DATA, &e->arena.dev, err);
        if (status == RAST_OK) e->arena.dev_cap = e->arena.cap;
    }
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

static int upload(rast_engine *e, rast_event *event, rast_error *err) {
    const rast_ops *ops = e->model->ops;
    const size_t words = (size_t)e->words, row = words * sizeof(uint32_t);
    uint32_t *history = e->history.host, *mask = e->masks.host;
    ops->begin(e->upload, 0);
    ops->copy(e->upload, e->arena.dev, at(e->arena.host), e->arena.used, RAST_COPY_TO_DEVICE);
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
    if (e->plan.n_masks)
        ops->copy(e->upload, e->masks.dev, at(e->masks.host), e->plan.n_masks * row, RAST_COPY_TO_DEVICE);
    return ops->submit(e->upload, event, err);
}

static void resolve(rast_engine *e) {
    for (int32_t i = 0; i < e->plan.n_passes; i++) {
        rast_pass *p = &e->plan.passes[i].pass;
        rast_dev *fields[] = {&p->count,   &p->token,   &p->pos,         &p->row_seg,      &p->seg_row,
                              &p->seg_ctx, &p->out_row, &p->block_table, &p->prefix_blocks};
        for (size_t f = 0; f < sizeof fields / sizeof *fields; f++) *fields[f] += e->arena.dev;
        p->drawn = e->drawn;
    }
}

static int record_copies(rast_engine *e, rast_error *err) {
    for (int32_t net = 0; net < e->model->n_nets; net++) {
        rast_view *view;
        if (!e->plan.n_copies[net]) continue;
        int status = view_of(e, (uint64_t)1 << net, &net, 1, &view, err);
        if (status) return status;
        rast_view_copy_blocks(view, e->queue, e->arena.dev + e->plan.copies[net], e->plan.n_copies[net]);
    }
    return RAST_OK;
}

static int record_passes(rast_engine *e, rast_error *err) {
    size_t placed[RAST_MAX_NETS] = {0}; /* by class: nets whose outputs already have their place */
    for (int32_t m = 0; m < e->model->n_nets; m++) e->terms[m].hidden = 0;
    for (int32_t i = 0; i < e->plan.n_passes; i++) {
        const rast_pass_plan *p = &e->plan.passes[i];
        const rast_net_state *net = &e->model->nets[p->nets[0]];
        const rast_workspace *w = &e->work[p->cls];
        rast_view *view;
        int status = view_of(e, p->mask, p->nets, p->n_nets, &view, err);
        if (status) return status;
        const size_t row = (size_t)p->pass.cap_out * (size_t)net->config.hidden_size;
        const size_t bytes = row * (net->dtype == RAST_F32 ? 4u : 2u), before = placed[p->cls];
        rast_forward(view, e->queue, &p->pass, w, w->last + before * row * sizeof(float), w->hidden + before * bytes);
        for (int32_t j = 0; j < p->n_nets; j++) e->terms[p->nets[j]].hidden = w->hidden + (before + (size_t)j) * bytes;
        placed[p->cls] += (size_t)p->n_nets;
    }
    return RAST_OK;
}

static int has_saved(const rast_plan *plan, int32_t net) { return plan->has_saved >> net & 1; }

static void record_combine(rast_engine *e) {
    const rast_model *m = e->model;
    const rast_plan *plan = &e->plan;
    const size_t n_out = plan->n_out, row = (size_t)m->n_vocab * sizeof(float);
    const int32_t draft = plan->draft_net; /* the pair's draws are of this net alone, whose logits are kept */
    for (int32_t i = 0; i < m->n_nets; i++) {
        const rast_net_state *net = &m->nets[i];
        rast_term *t = &e->terms[i];
        t->head = &net->weights[W_HEAD];
        t->hidden_type = net->dtype;
        t->n_rows = net->config.vocab_size;
        t->uncommon = net->uncommon;
        t->n_uncommon = net->n_uncommon;
        t->saved = has_saved(plan, i) ? e->saved.dev : 0;
        t->saved_row = has_saved(plan, i) ? e->arena.dev + plan->saved_row[i] : 0;
    }
    const rast_logits l = {.n_terms = draft ? 1 : m->n_nets,
                           .n_out = (int32_t)n_out,
                           .n_vocab = m->n_vocab,
                           .n_valid = m->n_valid,
                           .terms = e->terms + draft,
                           .coef = e->arena.dev + plan->coef,
                           .draw = e->arena.dev + plan->draw,
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
    m->ops->combine(e->queue, &l);
    m->ops->copy(e->queue, at(e->results), e->out, n_out * sizeof *e->results, RAST_COPY_TO_HOST);
    const struct {
        const rast_rows *rows;
        size_t n;
    } planes[] = {{&e->logits, (size_t)plan->n_logits},
                  {&e->scores, (size_t)plan->n_scores},
                  {&e->parts, (size_t)plan->n_parts * (size_t)m->n_nets}};
    for (size_t i = 0; i < sizeof planes / sizeof *planes; i++)
        if (planes[i].n)
            m->ops->copy(e->queue, at(planes[i].rows->host), planes[i].rows->dev, planes[i].n * row, RAST_COPY_TO_HOST);
}

static int run_plan(rast_engine *e, rast_error *err) {
    const rast_ops *ops = e->model->ops;
    rast_event event;
    if (e->n_views > RAST_MAX_VIEWS) free_views(e);
    int status = prepare(e, err);
    if (status == RAST_OK) status = upload(e, &event, err);
    if (status) return status;
    resolve(e);
    ops->begin(e->queue, 0);
    ops->depend(e->queue, event);
    status = record_copies(e, err);
    if (status == RAST_OK) status = record_passes(e, err);
    if (status) return status; /* the next begin() forgets what was recorded */
    if (e->plan.n_out) record_combine(e);
    status = ops->submit(e->queue, &event, err);
    if (status == RAST_OK) status = ops->wait(e->model->ctx, event, err);
    for (size_t i = 0; i < e->n_running && status == RAST_OK; i++)
        if (e->running[i]->scheduled && uses_history(e->running[i])) e->running[i]->history_stale = 0;
    return status;
}

int rast_save_drafts(rast_engine *e, size_t n, rast_error *err) {
    return ensure_rows(e, &e->saved, n, (size_t)e->model->n_vocab, err);
}

int rast_run_plan(rast_engine *e, rast_error *err) {
    const double start = rast_now();
    int status = run_plan(e, err);
    if (status == RAST_OK) {
        e->n_rows += e->plan.n_rows;
        const double seconds = rast_now() - start;
        e->seconds[e->plan.draft_net > 0] += seconds;
        e->n_draft_steps += e->plan.draft_net > 0;
        rast_pace_time(e, seconds);
    }
    for (size_t i = 0; i < e->n_running && status; i++)
        e->running[i]->fresh = 0; /* what a failed step drew stands in `drawn`, but the sample does not have it */
    return status;
}
