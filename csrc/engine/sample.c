/* sample.c: one sequence: its tokens, what ends it, and which ids its next token must not be. */
#include "engine.h"

#include <stdlib.h>
#include <string.h>

#include "../rng.h"

int rast_sample_new(const rast_model *m, rast_job *job, uint32_t index, rast_sample **out, rast_error *err) {
    *out = NULL;
    const size_t n_nets = (size_t)m->n_nets;
    rast_sample *s = calloc(1, sizeof *s);
    if (!s) goto memory;
    s->job = job;
    s->index = index;
    s->slot = -1;
    s->n_ids = job->n_ids;
    s->tail = -1;
    s->stream = rast_mix(job->stream + 0x9E3779B97F4A7C15u * ((uint64_t)job->first_copy + index + 1));
    s->cached = calloc(n_nets, sizeof *s->cached);
    s->start = calloc(n_nets, sizeof *s->start);
    s->end = calloc(n_nets, sizeof *s->end);
    s->draft = calloc((size_t)rast_most_drafts(job) + 1, sizeof *s->draft);
    s->ids = malloc(rast_job_tokens(job) * sizeof *s->ids);
    s->blocks = malloc(rast_blocks_for(rast_job_tokens(job)) * sizeof *s->blocks);
    if (!s->cached || !s->start || !s->end || !s->draft || !s->ids || !s->blocks) goto memory;
    memcpy(s->ids, job->ids, job->n_ids * sizeof *s->ids);
    *out = s;
    return RAST_OK;
memory:
    rast_sample_free(s);
    return rast_fail(err, RAST_ERR_MEMORY, "no memory for a sample");
}

void rast_sample_free(rast_sample *s) {
    if (!s) return;
    free(s->ids);
    free(s->blocks);
    free(s->cached);
    free(s->start);
    free(s->end);
    free(s->draft);
    free(s);
}

/* A stop string ends the sample when it ends inside the last token; it may begin in the prompt, as in HuggingFace. */
static int ends_with_stop_string(const rast_model *m, const rast_sample *s) {
    const rast_job *job = s->job;
    const uint8_t *string = job->stop.strings;
    for (size_t i = 0; i < job->stop.n_strings; string += job->stop.string_len[i++]) {
        const size_t len = job->stop.string_len[i];
        const size_t last = (size_t)s->ids[s->n_ids - 1];
        const size_t n_last = last < m->n_pieces ? m->piece_start[last + 1] - m->piece_start[last] : 0;
        /* every end inside the last token: walk back through the tokens' bytes and compare */
        for (size_t cut = 0; cut < n_last; cut++) {
            size_t left = len, skip = cut;
            for (size_t t = s->n_ids; left && t > 0; t--) {
                const size_t id = (size_t)s->ids[t - 1];
                if (id >= m->n_pieces) break;
                const uint8_t *piece = m->piece_bytes + m->piece_start[id];
                const size_t n = m->piece_start[id + 1] - m->piece_start[id] - skip;
                const size_t take = n < left ? n : left;
                if (take && memcmp(piece + n - take, string + left - take, take) != 0) break;
                left -= take;
                skip = 0;
            }
            if (!left) return 1;
        }
    }
    return 0;
}

rast_finish rast_sample_append(const rast_model *m, rast_sample *s, int32_t token) {
    const rast_stop *stop = &s->job->stop;
    s->ids[s->n_ids++] = token;
    s->history_stale = 1;
    for (size_t i = 0; i < stop->n_eos; i++)
        if (stop->eos[i] == token) return RAST_FINISH_EOS;
    if (stop->n_strings && ends_with_stop_string(m, s)) return RAST_FINISH_STOP;
    return rast_sample_n_new(s) >= (size_t)stop->max_new ? RAST_FINISH_LENGTH : RAST_RUNNING;
}

static int eos_forbidden(const rast_sample *s, uint32_t n_draft) {
    return s->job->stop.n_eos && rast_sample_n_new(s) + n_draft < (size_t)s->job->sampling.min_new_tokens;
}

int rast_sample_has_mask(const rast_sample *s, uint32_t n_draft) {
    const rast_sampling *sampling = &s->job->sampling;
    return sampling->n_suppress || sampling->n_bad_words || eos_forbidden(s, n_draft);
}

static int32_t token_at(const rast_sample *s, size_t i) { return i < s->n_ids ? s->ids[i] : s->draft[i - s->n_ids]; }

static void forbid(uint32_t *mask, int32_t id) { mask[id / 32] &= ~((uint32_t)1 << (id % 32)); }

void rast_sample_mask(const rast_sample *s, uint32_t n_draft, int32_t n_vocab, uint32_t *mask) {
    const rast_sampling *sampling = &s->job->sampling;
    memset(mask, 0xff, ((size_t)n_vocab + 31) / 32 * sizeof *mask);
    for (size_t i = 0; i < sampling->n_suppress; i++) forbid(mask, sampling->suppress[i]);
    if (eos_forbidden(s, n_draft))
        for (size_t i = 0; i < s->job->stop.n_eos; i++) forbid(mask, s->job->stop.eos[i]);
    const int32_t *word = sampling->bad_words;
    const size_t n = s->n_ids + n_draft;
    for (size_t i = 0; i < sampling->n_bad_words; word += sampling->bad_word_len[i++]) {
        const size_t before = sampling->bad_word_len[i] - 1; /* tokens that must precede the forbidden one */
        size_t same = 0;
        if (before > n) continue;
        while (same < before && token_at(s, n - before + same) == word[same]) same++;
        if (same == before) forbid(mask, word[before]);
    }
}
