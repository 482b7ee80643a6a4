/* engine.h: what the files of the engine share: requests, samples, block table, and the plan of one step.
 *
 * A request is what the user asked for; each of its samples is a sequence of its own. A step takes every running sample one
 * draw further (or one prefill chunk), all of them in one batch: make place, admit -> plan -> record and submit -> wait, collect.
 */
#ifndef RAST_ENGINE_H
#define RAST_ENGINE_H

#include <stdatomic.h>

#include "../model/model.h"

/* ---- blocks.c: logical KV blocks; every net has its own storage behind a block ------------------------------------ */

typedef enum { RAST_BLOCK_FULL = 0, RAST_BLOCK_TAIL = 1 } rast_block_kind; /* 32 tokens; where a prompt ends */

typedef struct {
    uint32_t refs;     /* samples that hold it */
    uint32_t children; /* blocks that can be found and follow it */
    int32_t parent;    /* the block before it, -1: it begins a sequence */
    uint32_t chain[2]; /* next entry of the same bucket, by kind */
    uint8_t length[2]; /* tokens under which it can be found, by kind; 0: it cannot */
    uint64_t nets;     /* of a tail: the nets of the sample that entered it, and fills it */
    int32_t older, newer;
    int32_t ids[RAST_BLOCK_TOKENS];
} rast_block;

typedef struct {
    rast_block *block; /* [n] */
    uint8_t *filled;   /* [n, n_nets] tokens in each net's storage, and whether somebody adds to them in this step */
    uint32_t *bucket;  /* [n_buckets] */
    int32_t *free;     /* stack of those that came back */
    size_t n, n_nets, n_buckets;
    size_t n_touched;  /* blocks from here on were never used */
    size_t n_returned; /* on the stack */
    size_t n_kept;     /* held by nobody, but findable */
    int32_t oldest, newest;
    uint64_t n_evicted;
} rast_blocks;

int rast_blocks_init(rast_blocks *b, size_t n, size_t n_nets, rast_error *err);
void rast_blocks_clear(rast_blocks *b);
size_t rast_blocks_room(const rast_blocks *b); /* how many take() can give */
int32_t rast_blocks_take(rast_blocks *b);      /* a free one, else the kept one that was used longest ago; -1: none */
void rast_blocks_share(rast_blocks *b, int32_t block);
void rast_blocks_drop(rast_blocks *b, int32_t block);
/* The block that follows `parent` (-1: nothing) with these n tokens, or -1; and makes one findable so. */
int32_t rast_blocks_find(const rast_blocks *b, int32_t parent, const int32_t *ids, size_t n);
void rast_blocks_enter(rast_blocks *b, int32_t block, int32_t parent, const int32_t *ids, size_t n,
                       rast_block_kind kind);
size_t rast_blocks_filled(const rast_blocks *b, int32_t block, int32_t net);
void rast_blocks_fill(rast_blocks *b, int32_t block, int32_t net, size_t n); /* now n tokens, or more if it had more */
int rast_blocks_claimed(const rast_blocks *b, int32_t block, int32_t net);
void rast_blocks_claim(rast_blocks *b, int32_t block, int32_t net, int claim);
static inline size_t rast_blocks_for(size_t tokens) { return (tokens + RAST_BLOCK_TOKENS - 1) / RAST_BLOCK_TOKENS; }

/* ---- request.c: checked copies of what the user asked for --------------------------------------------------------- */

typedef struct rast_job {
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
    int32_t n_draft, draft_net;
    uint32_t want, prompt_from;
    double deadline; /* CLOCK_MONOTONIC seconds, 0 = none */
    int cancelled;
    int begun;                       /* a sample was admitted */
    uint32_t n_made, n_ended;        /* samples: made so far, ended so far */
    struct rast_job *before, *after; /* in order of arrival */
} rast_job;

int rast_job_new(const rast_model *m, const rast_request *r, rast_job **out, rast_error *err);
void rast_job_free(rast_job *job);
static inline size_t rast_job_tokens(const rast_job *job) { return job->n_ids + (size_t)job->stop.max_new; }
/* Its steps can be submitted a step ahead: there are not always drafts, a penalty or bad words do not look at the tokens, and it
 * wants no rows, of which there is room for one step's. */
static inline int rast_may_run_ahead(const rast_job *job) {
    return job->n_draft <= 0 && job->sampling.repetition_penalty == 1 && !job->sampling.n_bad_words &&
           !(job->want & (RAST_WANT_LOGITS | RAST_WANT_SCORES | RAST_WANT_COMPONENTS));
}
double rast_now(void); /* CLOCK_MONOTONIC, seconds */

/* ---- sample.c: one sequence ---------------------------------------------------------------------------------------- */

/* Drafts come from a net, or from behind an earlier run of the last 2 to 4 ids: source 0, then one for each length. */
enum { RAST_GRAM_LEAST = 2, RAST_GRAM_MOST = 4, RAST_DRAFT_SOURCES = 2 + RAST_GRAM_MOST - RAST_GRAM_LEAST };
typedef struct
{ /* what became of drafts, the older the less: those that stood, and those whose predecessors all stood */
    float stood[RAST_DRAFT_SOURCES], tried[RAST_DRAFT_SOURCES];
} rast_record;

typedef struct {
    rast_job *job;
    uint32_t index; /* among the job's samples */
    uint64_t stream;
    int32_t *ids; /* [n_ids] prompt and new tokens, room for all */
    size_t n_ids;
    int32_t *blocks; /* [n_blocks], room for all; those of the prompt at least while it runs, none while it waits */
    size_t n_blocks;
    size_t n_linked;   /* leading blocks that stand in the index, where others find them */
    int32_t tail;      /* held until it is copied: a block that begins with the prompt's last tokens; or -1 */
    size_t n_at_first; /* tokens when it was admitted: the tail ends there */
    uint32_t *cached;  /* [n_nets] leading tokens in each net's KV cache */
    int32_t slot;      /* row of history and of drawn; -1: waiting */
    int fresh;         /* drawn[slot] is the last id */
    int history_stale;
    uint32_t n_reported; /* prompt positions that went out */
    rast_record record;
    /* this step's plan */
    int scheduled, draws;
    uint64_t copies; /* nets that get the tail's tokens before the passes */
    int tail_done;   /* nothing more comes from the tail */
    uint32_t *start; /* [n_nets] first position to compute: what others have computed meanwhile is skipped */
    uint32_t *end;   /* [n_nets] tokens in the cache after the pass, drafts included */
    int32_t *draft;  /* [n_draft] tokens that may follow ids */
    uint32_t n_draft;
    int32_t draft_net; /* net that drew them and has their rows in its cache already; 0: none */
    size_t gram_end;   /* where the latest of the longest earlier runs of the last ids ends */
    uint32_t gram;     /* ids that are the same there; 0: no such place */
    uint32_t most, k;  /* drafts that it could have checked; those that pay (rast_pace_choose) */
    int32_t source;    /* of these: 0 the net, else a gram */
    uint32_t given;    /* while drafts are handed out: how many it has, of which source, */
    int32_t given_source;
    float accepts, chance; /* how often one stands after those before it, and whether all stand and one more */
    float extra;           /* tokens that they are worth on average */
    int32_t first_saved;   /* row of saved logits for its first draw, the others follow */
    uint32_t first_draw;   /* draws of this pass begin so far behind the next one: > 0 while drafting */
    size_t first_out, n_prompt_out, n_draw_out;
    int32_t first_logits, first_scores, first_parts; /* rows of its outputs, where it asks for them */
} rast_sample;

int rast_sample_new(const rast_model *m, rast_job *job, uint32_t index, rast_sample **out, rast_error *err);
void rast_sample_free(rast_sample *s);
static inline size_t rast_sample_n_new(const rast_sample *s) { return s->n_ids - s->job->n_ids; }
/* Prompt positions are still to be reported (RAST_WANT_PROMPT). */
static inline int rast_sample_prompt_pending(const rast_sample *s) {
    return s->job->want & RAST_WANT_PROMPT && s->index == 0 && s->n_reported < s->job->n_ids;
}
/* First prompt position that is still to be reported, and so to be computed by this sample itself. */
static inline size_t rast_sample_first_wanted(const rast_sample *s) {
    return s->n_reported > s->job->prompt_from ? s->n_reported : s->job->prompt_from;
}
/* First position of the block that holds the last token. */
static inline size_t rast_sample_last_block(const rast_sample *s) {
    return (s->n_ids - 1) / RAST_BLOCK_TOKENS * RAST_BLOCK_TOKENS;
}
/* Nets that take part in the next draw. */
static inline uint64_t rast_sample_draw_mask(const rast_sample *s) {
    return rast_sample_n_new(s) < s->job->transfer_start ? 1 : s->job->active;
}
/* The net whose draws are drafts of the next token; 0: none. */
static inline int32_t rast_sample_draft_net(const rast_sample *s) {
    return rast_sample_n_new(s) < s->job->transfer_start ? 0 : s->job->draft_net;
}
/* Appends a token and says whether the sample ends with it. */
rast_finish rast_sample_append(const rast_model *m, rast_sample *s, int32_t token);
/* 1 if some ids are forbidden for the token after ids + the first n_draft drafts; then clears their bits in mask. */
int rast_sample_has_mask(const rast_sample *s, uint32_t n_draft);
void rast_sample_mask(const rast_sample *s, uint32_t n_draft, int32_t n_vocab, uint32_t *mask);

/* ---- plan.c: the rows of a step, as passes ------------------------------------------------------------------------- */

enum { RAST_MAX_QUEUES = 4 };

typedef struct
{ /* bytes that travel to the device at once, to a flight's; addresses are offsets until they are resolved */
    uint8_t *host;
    size_t used, cap;
} rast_arena;

typedef struct {                            /* a step on its way: submitted, and not waited for yet */
    rast_event events[RAST_MAX_QUEUES + 2]; /* of its submissions, in order; each runs after those it names */
    int32_t n_events;                       /* 0: there is none */
    rast_dev arena;                         /* its descriptors on the device */
    size_t arena_cap;
    rast_drawn *results; /* [cap_out] on the host, once it has been waited for */
    size_t n_out, n_rows;
    double start;
} rast_flight;

typedef struct { /* one pass of some nets of a class */
    uint64_t mask;
    int32_t nets[RAST_MAX_NETS], n_nets, cls;
    rast_pass pass; /* device fields: offsets into the arena, then addresses */
    uint32_t max_end;
    rast_dev last, hidden; /* where its outputs go, in the workspace of its class */
} rast_pass_plan;

typedef struct {
    rast_pass_plan *passes; /* [n_passes], room for one a net */
    int32_t n_passes;
    size_t n_out, n_masks, n_rows;
    size_t n_drawn; /* n_out, and rows that nobody asked for up to a bucket, where graphs are kept */
    int32_t n_logits, n_scores, n_parts; /* outputs that ask for these rows */
    size_t draw, coef;                   /* offsets into the arena: [n_drawn], [n_drawn, n_nets] */
    int32_t draft_net;                   /* the pass draws this net's drafts; 0: an ordinary step */
    size_t saved_row[RAST_MAX_NETS]; /* offset into the arena, by has_saved: [n_drawn] row of the saved logits, or -1 */
    uint64_t has_saved;              /* nets whose logits were saved for some of the outputs */
    size_t copies[RAST_MAX_NETS];    /* likewise, of each net: [n_copies, 2] blocks (from, to) */
    int32_t n_copies[RAST_MAX_NETS];
} rast_plan;

enum { RAST_MAX_VIEWS = 256 }; /* that are kept from step to step */

typedef struct {
    uint64_t mask;
    rast_view *view;
} rast_view_entry;

typedef struct { /* an array on the device and its copy here, grown as wanted */
    rast_dev dev;
    void *host;
    size_t cap; /* bytes */
} rast_rows;

/* ---- costs.c: what steps take ---------------------------------------------------------------------------------------- */

enum { RAST_PACE_MOST = 12, RAST_PACE_WIDTHS = 24, RAST_PACE_SETS = 4 };
typedef enum { RAST_PACE_PLAIN = 0, RAST_PACE_DRAFT = 1, RAST_PACE_CHECK = 2, RAST_PACE_KINDS } rast_pace_kind;

typedef struct { /* of a step; seconds are so much, times the slowness of the machine */
    float cost;
    float off;      /* so much longer the last time took, as a share */
    uint32_t times; /* measured, up to some */
    uint64_t at;    /* `used` of that time */
} rast_cost;

typedef struct {
    uint64_t nets;                /* that take part in the steps' draws */
    uint64_t used;                /* the last choice that looked at it */
    float share[RAST_PACE_KINDS]; /* of these nets' bytes that a step reads */
    float slowness;
    rast_cost step[RAST_PACE_KINDS][RAST_PACE_WIDTHS]; /* by rows */
    uint64_t plain_at[RAST_PACE_WIDTHS];               /* the last choice of a plain step, by samples */
} rast_costs;

/* Nothing is known but what the drafting net's weights are of all. */
void rast_costs_begin(rast_costs *c, uint64_t nets, float share_of_drafts);
void rast_costs_learn(rast_costs *c, rast_pace_kind kind, size_t rows, float seconds);
float rast_costs_of(const rast_costs *c, rast_pace_kind kind,
                    size_t rows); /* estimated from others if need be; 0: nothing is known */
/* Steps of the kind were measured at so many rows, or narrower and wider ones. */
int rast_costs_know(const rast_costs *c, rast_pace_kind kind, size_t rows);
/* They were measured a few times only, or took another time last. */
int rast_costs_doubt(const rast_costs *c, rast_pace_kind kind, size_t rows);
size_t rast_costs_widest(const rast_costs *c); /* rows of the widest step that is known */
size_t rast_costs_width(size_t rows);          /* which width they count as */

/* ---- pace.c: how many drafts pay ----------------------------------------------------------------------------------- */

typedef struct {
    rast_costs costs[RAST_PACE_SETS];
    int32_t set;                                    /* whose costs are this step's; -1: nobody's */
    uint64_t n_choices;                             /* made so far */
    rast_record record;                             /* of all samples */
    uint32_t since_draft, plain_later, draft_later; /* steps */
    double since, drawing; /* when the last step had run, 0: nobody waited for another; seconds of passes since then */
    uint32_t
        rests; /* steps for which the choice of no drafts holds: in a large batch it takes time, and changes slowly */
} rast_pace;

struct rast_engine {
    rast_model *model;
    rast_queue *queues[RAST_MAX_QUEUES],
        *upload; /* class c runs on queue c, or the last; the transfer step on the first */
    int32_t n_queues;
    rast_blocks blocks;
    rast_dev *kv; /* [n_nets] */
    size_t kv_bytes;
    size_t kept,
        on_demand;        /* bytes that the device was left with when the cache was made, for itself and for requests */
    rast_workspace *work; /* [n_classes] */
    rast_view_entry *views;
    size_t n_views, cap_views;
    int32_t max_rows, max_seqs, cap_out;

    rast_job *first_job, *last_job, *next_job; /* next_job: the first of which samples are still to be made */
    rast_sample **running;                     /* in order of arrival: all before those in `parked` */
    rast_sample **parked;                      /* a stack, first come on top: preempted, or made and without room yet */
    rast_sample **order;                       /* `running` once more, sorted while a step is planned */
    size_t n_running, n_parked;                /* at most max_seqs together */
    double check_at;                           /* when requests that have not begun may have to end */
    int32_t *free_slots;
    int32_t n_free_slots;
    uint64_t next_id;

    rast_plan plan;
    rast_arena arena;
    rast_flight flights[2]; /* [turn] is the step to collect next; the other one may run behind it (step.c) */
    int32_t turn;
    int runs_ahead;     /* a step may be submitted before the one before it is collected */
    uint32_t n_ahead;   /* such steps, one after the other, in which nobody was asked for drafts */
    double landed;      /* when the last step had run */
    rast_term *terms;   /* [n_nets] */
    int32_t *rows_left; /* [n_nets] while planning */
    rast_rows history;  /* [max_seqs, words] 32-bit words, made when a penalty first needs it */
    rast_rows masks;    /* [n_masks, words] 32-bit words */
    rast_rows logits, scores, parts;
    rast_rows saved;     /* logits of the drafts' net, for the step that checks them */
    rast_dev drawn, out; /* [max_seqs] int32, [cap_out] rast_drawn */
    int32_t words;       /* ceil(n_vocab / 32) */

    const rast_drawn *results; /* of the step that was waited for last */
    int32_t *token;            /* [cap_out] */
    float *logprob;
    rast_stats *stats;
    rast_chunk *chunks;
    size_t n_chunks, cap_chunks; /* a failed step leaves its chunks for the next one */
    int failed;
    rast_error *errors; /* [max_seqs] behind chunk.error */
    size_t n_errors;

    rast_pace pace;
    rast_drafter drafter;
    void *drafter_user;
    atomic_int interrupted;
    uint64_t n_steps, n_rows, n_drafted, n_accepted, n_rejected, n_draft_steps, n_reused, n_preempted;
    double seconds[2]; /* of steps; of drafting */
};

/* admit.c: samples come and go. */
/* Frees the sample, and its request after the last one. The caller takes it out of its list. */
void rast_end_sample(rast_engine *e, rast_sample *s);
/* Counts n samples of a job as ended; frees it after the last one. */
void rast_end_samples(rast_engine *e, rast_job *job, uint32_t n);
/* Blocks for every running sample's tokens; where there are none, those that came last give way. */
void rast_make_place(rast_engine *e);
int rast_admit(rast_engine *e, rast_error *err);
/* After a step: what the sample computed, others can use. */
void rast_commit(rast_engine *e, rast_sample *s);

/* draft.c: guesses of what follows, before a step checks them. */
/* Rows of logits that drafts may add to a step. */
size_t rast_draft_rows(const rast_engine *e);
int rast_draft(rast_engine *e, rast_error *err);

/* pace.c. Says for each sample that leaves it to the engine how many drafts pay in the coming step, and from which source. */
void rast_pace_choose(rast_engine *e);
/* What `gram` equal ids are as a source. */
static inline int32_t rast_gram_source(uint32_t gram) { return (int32_t)gram - RAST_GRAM_LEAST + 1; }
/* The flight has landed just now and had the device for so long. */
void rast_pace_time(rast_engine *e, const rast_flight *f, double seconds);
/* What became of a sample's drafts when n tokens stand; ended: the last of them is its end. */
void rast_pace_learn(rast_engine *e, rast_sample *s, size_t n, int ended);
/* The most drafts that a sample of the job can ever have. */
static inline int32_t rast_most_drafts(const rast_job *job) {
    const int32_t most = job->n_draft < 0 ? RAST_PACE_MOST : job->n_draft;
    return most < job->stop.max_new ? most : job->stop.max_new;
}

/* The passes of one net that draw draft number j of every sample that wants it (see draft.c). */
int rast_plan_draft(rast_engine *e, int32_t net, uint32_t j, rast_error *err);
/* Chooses the rows of every running sample, fills plan and arena (offsets only). Changes nothing of a sample but its plan. */
int rast_plan_step(rast_engine *e, rast_error *err);
/* Room for n rows of logits in `saved`, n at most rast_draft_rows; what was there is gone. */
int rast_save_drafts(rast_engine *e, size_t n, rast_error *err);
/* Records what the plan says and submits it, as the step behind all that are on their way. */
int rast_submit_plan(rast_engine *e, rast_flight *f, rast_error *err);
/* Makes ready what the largest step needs on the device, so that what is left can become KV cache. */
int rast_reserve_step(rast_engine *e, rast_error *err);
/* Waits for the flight; results, rows and so on are on the host afterwards. */
int rast_wait_flight(rast_engine *e, rast_flight *f, rast_error *err);
/* Waits for the flight, whose results and errors nobody wants. */
void rast_drop_flight(rast_engine *e, rast_flight *f);
/* Submits and waits. */
int rast_run_plan(rast_engine *e, rast_error *err);
static inline rast_flight *rast_other_flight(rast_engine *e, const rast_flight *f) {
    return &e->flights[f == &e->flights[0]];
}

/* Returns *array with room for n + 1 items of `size` bytes (doubling), or NULL and the array unchanged. */
void *rast_grow(void *array, size_t *cap, size_t n, size_t size);

#endif
