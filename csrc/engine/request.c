/* request.c: checks a request at the border and keeps a copy of it. */
#include "engine.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../rng.h"

enum { MAX_SAMPLES = 1 << 24 };

double rast_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int check_sampling(const rast_sampling *s, rast_error *err) {
    if (s->do_sample && !(s->temperature > 0 && isfinite(s->temperature)))
        return rast_fail(err, RAST_ERR_VALUE, "temperature = %g must be positive", (double)s->temperature);
    if (s->top_k < 0) return rast_fail(err, RAST_ERR_VALUE, "top_k = %d must not be negative", s->top_k);
    if (!(s->top_p > 0 && s->top_p <= 1))
        return rast_fail(err, RAST_ERR_VALUE, "top_p = %g must lie in (0, 1]", (double)s->top_p);
    if (!(s->min_p >= 0 && s->min_p <= 1))
        return rast_fail(err, RAST_ERR_VALUE, "min_p = %g must lie in [0, 1]", (double)s->min_p);
    if (!(s->repetition_penalty > 0 && isfinite(s->repetition_penalty)))
        return rast_fail(err, RAST_ERR_VALUE, "repetition_penalty = %g must be positive",
                         (double)s->repetition_penalty);
    if (s->min_new_tokens < 0)
        return rast_fail(err, RAST_ERR_VALUE, "min_new_tokens = %d must not be negative", s->min_new_tokens);
    return RAST_OK;
}

static int check_ids(const rast_model *m, const char *what, const int32_t *ids, size_t n, rast_error *err) {
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= m->n_vocab)
            return rast_fail(err, RAST_ERR_VALUE, "%s: token id %d is out of range (0 to %d)", what, ids[i],
                             m->n_vocab - 1);
    return RAST_OK;
}

static int check_request(const rast_model *m, const rast_request *r, rast_error *err) {
    const rast_stop *stop = &r->stop;
    if (r->n_ids < 1 || !r->ids) return rast_fail(err, RAST_ERR_VALUE, "the prompt is empty");
    if (r->n_coef != (size_t)m->n_nets || !r->coef)
        return rast_fail(err, RAST_ERR_VALUE, "%zu coefficients for %d nets", r->n_coef, m->n_nets);
    if (r->n_samples < 1 || r->n_samples > MAX_SAMPLES)
        return rast_fail(err, RAST_ERR_VALUE, "n_samples = %u must lie in 1 to %d", r->n_samples, MAX_SAMPLES);
    if (stop->max_new < 0) return rast_fail(err, RAST_ERR_VALUE, "max_new = %d must not be negative", stop->max_new);
    if (stop->max_new == 0 && !(r->want & RAST_WANT_PROMPT))
        return rast_fail(err, RAST_ERR_VALUE, "max_new = 0 asks for nothing, unless the prompt is to be evaluated");
    if (stop->max_new == 0 && r->n_samples != 1)
        return rast_fail(err, RAST_ERR_VALUE, "a prompt is evaluated once: n_samples = %u with max_new = 0",
                         r->n_samples);
    if (r->want & RAST_WANT_PROMPT && r->prompt_from >= r->n_ids)
        return rast_fail(err, RAST_ERR_VALUE, "prompt_from = %u lies beyond the prompt", r->prompt_from);
    if (r->n_draft < 0 && r->n_draft != RAST_DRAFT_AUTO)
        return rast_fail(err, RAST_ERR_VALUE, "n_draft = %d must not be negative", r->n_draft);
    if (r->draft_net < 0 || r->draft_net >= m->n_nets)
        return rast_fail(err, RAST_ERR_VALUE, "draft_net = %d is out of range (0 to %d)", r->draft_net, m->n_nets - 1);
    if (!(stop->max_time >= 0)) return rast_fail(err, RAST_ERR_VALUE, "max_time must not be negative");
    if (stop->n_strings && !m->piece_bytes)
        return rast_fail(err, RAST_ERR_VALUE, "stop strings need the bytes of the tokens (a tokenizer)");
    for (size_t i = 0; i < stop->n_strings; i++)
        if (!stop->string_len[i]) return rast_fail(err, RAST_ERR_VALUE, "stop string %zu is empty", i);
    for (size_t i = 0; i < r->sampling.n_bad_words; i++)
        if (!r->sampling.bad_word_len[i]) return rast_fail(err, RAST_ERR_VALUE, "bad word %zu is empty", i);
    for (size_t i = 0; i < r->n_coef; i++) {
        const rast_net_state *net = &m->nets[i];
        if (!isfinite(r->coef[i]))
            return rast_fail(err, RAST_ERR_VALUE, "the coefficient of %s is not finite", net->name);
        if (i > 0 && r->coef[i] == 0) continue;
        for (size_t j = 0; j < r->n_ids; j++)
            if (r->ids[j] < 0 || r->ids[j] >= net->config.vocab_size)
                return rast_fail(err, RAST_ERR_VALUE,
                                 "%s has no embedding for prompt token id %d at position %zu (its "
                                 "ids are 0 to %d)",
                                 net->name, r->ids[j], j, net->config.vocab_size - 1);
    }
    int status = check_sampling(&r->sampling, err);
    if (status == RAST_OK) status = check_ids(m, "eos", stop->eos, stop->n_eos, err);
    if (status == RAST_OK) status = check_ids(m, "suppress", r->sampling.suppress, r->sampling.n_suppress, err);
    size_t n_bad = 0;
    for (size_t i = 0; i < r->sampling.n_bad_words; i++) n_bad += r->sampling.bad_word_len[i];
    if (status == RAST_OK) status = check_ids(m, "bad_words", r->sampling.bad_words, n_bad, err);
    return status;
}

/* *out = a copy of n items; NULL stays NULL where n is 0. Returns 0 when memory runs out. */
static int keep(const void *data, size_t n, size_t size, void *out) {
    void *copy = NULL;
    size_t bytes;
    if (n) {
        if (!rast_mul(n, size, &bytes) || !(copy = malloc(bytes))) return 0;
        memcpy(copy, data, bytes);
    }
    memcpy(out, &copy, sizeof copy);
    return 1;
}

int rast_job_new(const rast_model *m, const rast_request *r, rast_job **out, rast_error *err) {
    *out = NULL;
    int status = check_request(m, r, err);
    if (status) return status;
    rast_job *job = calloc(1, sizeof *job);
    if (!job) goto memory;
    job->tag = r->tag;
    job->first_copy = r->first_copy;
    job->n_samples = r->n_samples;
    job->n_ids = r->n_ids;
    job->transfer_start = r->transfer_start;
    job->n_draft = r->n_draft < RAST_DRAFT_MAX ? r->n_draft : RAST_DRAFT_MAX;
    job->draft_net = r->coef[r->draft_net] != 0 ? r->draft_net : 0;
    job->want = r->want;
    job->prompt_from = r->prompt_from;
    job->deadline = r->stop.max_time > 0 ? rast_now() + r->stop.max_time : 0;

    size_t n_bad = 0, n_bytes = 0;
    for (size_t i = 0; i < r->sampling.n_bad_words; i++) n_bad += r->sampling.bad_word_len[i];
    for (size_t i = 0; i < r->stop.n_strings; i++) n_bytes += r->stop.string_len[i];
    rast_sampling *sampling = &job->sampling;
    rast_stop *stop = &job->stop;
    *sampling = r->sampling;
    sampling->suppress = NULL, sampling->bad_words = NULL, sampling->bad_word_len = NULL;
    *stop = r->stop;
    stop->eos = NULL, stop->strings = NULL, stop->string_len = NULL;
    if (!keep(r->ids, r->n_ids, sizeof *r->ids, &job->ids) || !keep(r->coef, r->n_coef, sizeof *r->coef, &job->coef) ||
        !keep(r->sampling.suppress, sampling->n_suppress, sizeof(int32_t), &sampling->suppress) ||
        !keep(r->sampling.bad_words, n_bad, sizeof(int32_t), &sampling->bad_words) ||
        !keep(r->sampling.bad_word_len, sampling->n_bad_words, sizeof(size_t), &sampling->bad_word_len) ||
        !keep(r->stop.eos, stop->n_eos, sizeof(int32_t), &stop->eos) ||
        !keep(r->stop.strings, n_bytes, 1, &stop->strings) ||
        !keep(r->stop.string_len, stop->n_strings, sizeof(size_t), &stop->string_len))
        goto memory;

    job->active = 1;
    job->limit = m->nets[0].config.vocab_size;
    for (size_t i = 0; i < r->n_coef; i++) {
        if (r->coef[i] == 0) continue;
        job->active |= (uint64_t)1 << i;
        if (m->nets[i].config.vocab_size < job->limit) job->limit = m->nets[i].config.vocab_size;
    }
    uint64_t hash = r->n_ids;
    for (size_t i = 0; i < r->n_ids; i++) hash = rast_mix(hash + 0x9E3779B97F4A7C15u + (uint32_t)r->ids[i]);
    job->stream = rast_mix(rast_mix(r->seed + 0x9E3779B97F4A7C15u) ^ hash);
    *out = job;
    return RAST_OK;
memory:
    rast_job_free(job);
    return rast_fail(err, RAST_ERR_MEMORY, "no memory for a request of %zu prompt tokens", r->n_ids);
}

void rast_job_free(rast_job *job) {
    if (!job) return;
    free(job->ids);
    free(job->coef);
    free((void *)job->sampling.suppress);
    free((void *)job->sampling.bad_words);
    free((void *)job->sampling.bad_word_len);
    free((void *)job->stop.eos);
    free((void *)job->stop.strings);
    free((void *)job->stop.string_len);
    free(job);
}
