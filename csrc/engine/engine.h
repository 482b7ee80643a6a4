/* engine.h: what the files of the engine share: requests, samples, block table, and the plan of one step.
 *
 * A request is what the user asked for; each of its samples is a sequence of its own. A step takes every running sample one
 * draw further (or one prefill chunk), all of them in one batch: admit -> plan -> record and run -> collect.
 */
#ifndef RAST_ENGINE_H
#define RAST_ENGINE_H

#include <stdatomic.h>

#include "../model/model.h"

/* ---- blocks.c: logical KV blocks, counted references; every net has its own storage behind a block ---------------- */

typedef struct {
    uint32_t *refs; /* [n] */
    int32_t *free;  /* stack of the free ones, lowest on top while fresh */
    size_t n, n_free;
} rast_blocks;

int rast_blocks_init(rast_blocks *b, size_t n, rast_error *err);
void rast_blocks_clear(rast_blocks *b);
int32_t rast_blocks_take(rast_blocks *b); /* the caller checks n_free first */
void rast_blocks_share(rast_blocks *b, int32_t block);
void rast_blocks_drop(rast_blocks *b, int32_t block);
static inline size_t rast_blocks_for(size_t tokens) { return (tokens + RAST_BLOCK_TOKENS - 1) / RAST_BLOCK_TOKENS; }

/* ---- request.c: checked copies of what the user asked for --------------------------------------------------------- */

typedef struct {
    uint64_t id, tag, stream; /* stream: of (seed, prompt); a sample adds its copy index */
    uint32_t first_copy, n_samples;
    int32_t *ids; /* [n_ids] */
    size_t n_ids;
    float *coef;     /* [n_nets] */
    uint64_t active; /* nets to run: coef != 0, and net 0 */
    int32_t limit;   /* ids from here on lack an embedding in one of them: never drawn, never drafted */
    uint32_t transfer_start;
    rast_sampling sampling; /* arrays owned */
    rast_stop stop;         /* arrays owned */
    int32_t n_draft;
    uint32_t want, prompt_from;
    double deadline; /* CLOCK_MONOTONIC seconds, 0 = none */
    int cancelled;
    uint32_t n_admitted, n_ended; /* samples */
    int prefix_known;             /* later samples need not wait for the first one's prefill */
    int32_t *prefix;              /* [n_prefix] blocks with the first n_ids - 1 tokens of all active nets, referenced */
    size_t n_prefix;
} rast_job;

int rast_job_new(const rast_model *m, const rast_request *r, rast_job **out, rast_error *err);
void rast_job_free(rast_job *job);
static inline size_t rast_job_tokens(const rast_job *job) { return job->n_ids + (size_t)job->stop.max_new; }
double rast_now(void); /* CLOCK_MONOTONIC, seconds */

/* ---- sample.c: one sequence ---------------------------------------------------------------------------------------- */

typedef struct {
    rast_job *job;
    uint32_t index; /* among the job's samples */
    uint64_t stream;
    int32_t *ids; /* [n_ids] prompt and new tokens, room for all; NULL while it waits */
    size_t n_ids;
    int32_t *blocks; /* [n_blocks] */
    size_t n_blocks;
    uint32_t *cached; /* [n_nets] tokens in each net's KV cache */
    int32_t slot;     /* row of history and of drawn; -1: waiting */
    int fresh;        /* drawn[slot] is the last id */
    int history_stale;
    uint32_t n_reported; /* prompt positions that went out */
    /* this step's plan */
    int scheduled, draws;
    uint32_t *end; /* [n_nets] tokens in the cache after the pass, drafts included */
    int32_t *draft;
    uint32_t n_draft;
    size_t first_out, n_prompt_out, n_draw_out;
} rast_sample;

int rast_sample_new(const rast_model *m, rast_job *job, uint32_t index, rast_sample **out, rast_error *err);
void rast_sample_free(rast_sample *s);
static inline size_t rast_sample_n_new(const rast_sample *s) { return s->n_ids - s->job->n_ids; }
/* Prompt positions are still to be reported (RAST_WANT_PROMPT). */
static inline int rast_sample_prompt_pending(const rast_sample *s) {
    return s->job->want & RAST_WANT_PROMPT && s->index == 0 && s->n_reported < s->job->n_ids;
}
/* Appends a token and says whether the sample ends with it. */
rast_finish rast_sample_append(const rast_model *m, rast_sample *s, int32_t token);
/* 1 if some ids are forbidden for the token after ids + the first n_draft drafts; then clears their bits in mask. */
int rast_sample_has_mask(const rast_sample *s, uint32_t n_draft);
void rast_sample_mask(const rast_sample *s, uint32_t n_draft, int32_t n_vocab, uint32_t *mask);

/* ---- plan.c: the rows of a step, as passes ------------------------------------------------------------------------- */

typedef struct { /* bytes that travel to the device at once; addresses are offsets until they are resolved */
    uint8_t *host;
    size_t used, cap;
    rast_dev dev;
    size_t dev_cap;
} rast_arena;

typedef struct { /* one pass of some nets of a class */
    uint64_t mask;
    int32_t nets[RAST_MAX_NETS], n_nets, cls;
    rast_pass pass; /* device fields: offsets into the arena, then addresses */
    uint32_t max_end;
} rast_pass_plan;

typedef struct {
    rast_pass_plan *passes; /* [n_passes], room for one a net */
    int32_t n_passes;
    size_t n_out, n_masks, n_rows;
    uint32_t flags;            /* RAST_DRAW_* of all outputs, or-ed */
    size_t draw, coef, copies; /* offsets into the arena: [n_out], [n_out, n_nets], [n_copies, 2] */
} rast_plan;

typedef struct {
    uint64_t mask;
    rast_view *view;
} rast_view_entry;

typedef struct { /* an array on the device and its copy here, grown as wanted */
    rast_dev dev;
    void *host;
    size_t cap; /* bytes */
} rast_rows;

struct rast_engine {
    rast_model *model;
    rast_queue *queue, *upload;
    rast_blocks blocks;
    rast_dev *kv; /* [n_nets] */
    size_t kv_bytes;
    rast_workspace *work; /* [n_classes] */
    rast_view_entry *views;
    size_t n_views, cap_views;
    int32_t max_rows, max_seqs, cap_out;

    rast_job **jobs;
    size_t n_jobs, cap_jobs;
    rast_sample **waiting, **running; /* in order of arrival */
    size_t n_waiting, cap_waiting, n_running;
    int32_t *free_slots;
    int32_t n_free_slots;
    uint64_t next_id;

    rast_plan plan;
    rast_arena arena;
    int32_t *copies; /* [n_copies, 2] blocks (from, to) to copy before the next passes */
    size_t n_copies, cap_copies;
    rast_term *terms;   /* [n_nets] */
    int32_t *rows_left; /* [n_nets] while planning */
    rast_rows history;  /* [max_seqs, words] 32-bit words, made when a penalty first needs it */
    rast_rows masks;    /* [n_masks, words] 32-bit words */
    rast_rows logits, scores, parts;
    rast_dev drawn, out; /* [max_seqs] int32, [cap_out] rast_drawn */
    int32_t words;       /* ceil(n_vocab / 32) */

    rast_drawn *results; /* [cap_out] */
    int32_t *token;      /* [cap_out] */
    float *logprob;
    rast_stats *stats;
    rast_chunk *chunks;
    size_t n_chunks, cap_chunks; /* a failed step leaves its chunks for the next one */
    int failed;
    rast_error *errors; /* [max_seqs] behind chunk.error */
    size_t n_errors;

    rast_drafter drafter;
    void *drafter_user;
    atomic_int interrupted;
    uint64_t n_steps, n_rows, n_drafted, n_accepted;
};

/* Chooses the rows of every running sample, fills plan and arena (offsets only). Changes nothing of a sample but its plan. */
int rast_plan_step(rast_engine *e, rast_error *err);
/* Records what the plan says and runs it; results, rows and so on are on the host afterwards. */
int rast_run_plan(rast_engine *e, rast_error *err);

/* Returns *array with room for n + 1 items of `size` bytes (doubling), or NULL and the array unchanged. */
void *rast_grow(void *array, size_t *cap, size_t n, size_t size);

#endif
