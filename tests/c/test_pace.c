/* test_pace.c: how many drafts the engine chooses, on machines that are made up: sequences whose drafts stand by given odds, and
 * steps that take given seconds. Nothing runs and no clock is read, so every figure here is the same on each machine.
 *
 * What is compared is work: the sum of what all steps cost on average, whatever they took. So neither the machine's speed nor
 * noise makes a choice look better or worse than it was. */
#include "check.h"
#include "engine/engine.h"

#include <math.h>
#include <string.h>

enum { MOST_SAMPLES = 32, N_NETS = 3 };

/* ---- machines ------------------------------------------------------------------------------------------------------- */

typedef struct { /* of nets whose weights cost `base`, 1 and 1 */
    const char *name;
    float base, row;   /* each row after the first costs so much of one row */
    size_t free_rows;  /* up to so many rows cost no more than one */
    float host;        /* beside each pass */
} machine;

typedef enum { STEADY, NOISY, JUMPS, DRIFTS, PLAIN_IN_TURNS, CHECKS_IN_TURNS, DRAFTS_IN_TURNS, ALL_IN_TURNS, N_TIMES } times;
static const char *const TIMES[N_TIMES] = {"steady",         "noisy",           "jumping",         "drifting",
                                           "plain in turns", "checks in turns", "drafts in turns", "all in turns"};

typedef struct {
    rast_engine *e;
    rast_model *m;
    rast_job job[MOST_SAMPLES];
    rast_sample sample[MOST_SAMPLES], *running[MOST_SAMPLES];
    uint32_t start[MOST_SAMPLES], end[MOST_SAMPLES];
    const machine *on;
    times how;
    uint64_t n_passes[RAST_PACE_KINDS], n_steps;
    double now, work;
    size_t n_tokens, n_drafts;
} world;

static int in_turns(times how, rast_pace_kind kind) {
    return how == ALL_IN_TURNS || (how == PLAIN_IN_TURNS && kind == RAST_PACE_PLAIN) ||
           (how == DRAFTS_IN_TURNS && kind == RAST_PACE_DRAFT) || (how == CHECKS_IN_TURNS && kind == RAST_PACE_CHECK);
}

/* What a pass of nets with so much weight costs on average. */
static double cost(const world *w, rast_pace_kind kind, double weight, size_t rows) {
    const machine *on = w->on;
    const double more = rows > on->free_rows ? (double)(rows - on->free_rows) : 0;
    return (weight * (1 + on->row * more) + on->host) * (in_turns(w->how, kind) ? 1.5 : 1);
}

static double random_share(void) { return (uniform() + 1) / 2; }

/* The machine's speed now, and what is special about this pass. */
static double factor(world *w, rast_pace_kind kind) {
    double f = 1;
    if (in_turns(w->how, kind)) f *= (w->n_passes[kind]++ & 1 ? 2 : 1) / 1.5;
    if (w->how == NOISY) f *= random_share() < .02 ? 1 + 5 * random_share() : 1 + .1 * (random_share() - .5);
    if (w->how == JUMPS) f *= w->n_steps / 60 & 1 ? 1.35 : 1;
    if (w->how == DRIFTS) f *= 1 + .4 * sin((double)w->n_steps / 150);
    return f;
}

/* A pass runs: the engine hears how long it took. `drawing`: of the expert, for drafts; else all are checked. */
static void pass(world *w, int drawing, size_t rows, size_t undrafted) {
    rast_engine *e = w->e;
    rast_flight f = {.start = w->now, .n_out = rows};
    const rast_pace_kind kind = drawing            ? RAST_PACE_DRAFT
                                : rows == undrafted ? RAST_PACE_PLAIN
                                                    : RAST_PACE_CHECK;
    double all = 0;
    if (kind != RAST_PACE_DRAFT) all += cost(w, kind, w->on->base + 1 + (kind == RAST_PACE_PLAIN), rows);
    if (kind == RAST_PACE_DRAFT || (kind == RAST_PACE_CHECK && undrafted))
        all += cost(w, RAST_PACE_DRAFT, 1, drawing ? rows : undrafted);
    w->work += all;
    w->now += 1e-3 * all * factor(w, kind);
    e->landed = w->now;
    e->plan.draft_net = drawing;
    rast_pace_time(e, &f, w->now - f.start);
}

/* ---- sequences ------------------------------------------------------------------------------------------------------ */

static void world_new(world *w, const machine *on, times how) {
    memset(w, 0, sizeof *w);
    w->on = on;
    w->how = how;
    w->e = calloc(1, sizeof *w->e);
    w->m = calloc(1, sizeof *w->m);
    CHECK(w->e && w->m, "memory");
    w->m->n_nets = N_NETS;
    w->m->nets = calloc(N_NETS, sizeof *w->m->nets);
    CHECK(w->m->nets, "memory");
    for (int i = 0; i < N_NETS; i++) w->m->nets[i].weight_bytes = (size_t)(1e6f * (i ? 1 : on->base));
    w->e->model = w->m;
    w->e->running = w->running;
    w->e->max_rows = 512;
}

static void world_free(world *w) {
    free(w->m->nets);
    free(w->m);
    free(w->e);
}

static void begin(world *w, size_t n, size_t n_new, int32_t n_draft) {
    w->e->n_running = n;
    for (size_t i = 0; i < n; i++) {
        rast_job *job = &w->job[i];
        rast_sample *s = &w->sample[i];
        *job = (rast_job){.n_ids = 8, .active = 7, .n_draft = n_draft, .draft_net = 1, .stop.max_new = (int32_t)n_new};
        job->sampling.repetition_penalty = 1;
        *s = (rast_sample){.job = job, .n_ids = 8, .start = &w->start[i], .end = &w->end[i]};
        w->running[i] = s;
    }
    w->e->pace.since = 0;
}

/* What the samples may choose from, as draft.c tells. */
static void offer(world *w, double looks_up) {
    for (size_t i = 0; i < w->e->n_running; i++) {
        rast_sample *s = w->running[i];
        const size_t left = (size_t)s->job->stop.max_new - rast_sample_n_new(s);
        s->most = !rast_sample_n_new(s) ? 0 : (uint32_t)(left - 1 < RAST_PACE_MOST ? left - 1 : RAST_PACE_MOST);
        s->gram = s->most && random_share() < looks_up ? 3 : 0;
        s->source = 0;
        s->k = s->job->n_draft < 0 ? s->most : (uint32_t)s->job->n_draft < s->most ? (uint32_t)s->job->n_draft : s->most;
    }
    rast_pace_choose(w->e);
}

static void draw_drafts(world *w) {
    uint32_t most = 0;
    for (size_t i = 0; i < w->e->n_running; i++) {
        rast_sample *s = w->running[i];
        s->n_draft = s->k;
        s->draft_net = s->k && !s->source;
        if (s->draft_net && s->k > most) most = s->k;
        w->n_drafts += s->k;
    }
    for (uint32_t j = 0; most && j <= most; j++) {
        size_t rows = 0;
        for (size_t i = 0; i < w->e->n_running; i++) {
            rast_sample *s = w->running[i];
            s->scheduled = s->draft_net && j <= s->k;
            s->n_draw_out = 1;
            rows += (size_t)s->scheduled;
        }
        pass(w, 1, rows, 0);
    }
}

/* One step of all; `stands`: the odds of a draft of the expert, and of one looked up. */
static void step(world *w, const double stands[2], double looks_up) {
    rast_engine *e = w->e;
    size_t rows = 0, undrafted = 0, kept = 0;
    w->n_steps++;
    offer(w, looks_up);
    draw_drafts(w);
    for (size_t i = 0; i < e->n_running; i++) {
        rast_sample *s = w->running[i];
        s->scheduled = 1;
        s->n_draw_out = 1 + s->k;
        s->end[0] = s->start[0] + (uint32_t)s->n_draw_out;
        rows += s->n_draw_out;
        if (!s->draft_net) undrafted += s->n_draw_out;
    }
    pass(w, 0, rows, undrafted);
    for (size_t i = 0; i < e->n_running; i++) {
        rast_sample *s = w->running[i];
        size_t n = 1;
        while (n <= s->k && random_share() < stands[s->source != 0]) n++;
        s->n_ids += n;
        w->n_tokens += n;
        const int ends = rast_sample_n_new(s) >= (size_t)s->job->stop.max_new;
        rast_pace_learn(e, s, n, ends);
        if (!ends) w->running[kept++] = s;
    }
    e->n_running = kept;
}

static void run(world *w, size_t n, size_t n_new, int32_t n_draft, const double stands[2], double looks_up) {
    begin(w, n, n_new, n_draft);
    while (w->e->n_running) step(w, stands, looks_up);
}

/* Work of so many batches with a number of drafts, in shares of what it is with none. */
static double work_of(const machine *on, times how, size_t n, int32_t n_draft, double stands, size_t n_batches) {
    enum { N_NEW = 128 };
    world w;
    double work[2];
    for (int i = 0; i < 2; i++) {
        world_new(&w, on, how);
        for (size_t j = 0; j < n_batches; j++) run(&w, n, N_NEW, i ? n_draft : 0, (double[2]){stands, 0}, 0);
        work[i] = w.work;
        world_free(&w);
    }
    return work[1] / work[0];
}

int main(void) {
    static const machine machines[] = {{"5 x", 5, .1f, 1, .1f},    {"20 x", 20, .1f, 1, .1f}, {"2 x", 2, .12f, 1, .1f},
                                       {"small", 4, .3f, 1, 2},    {"wide", 5, .02f, 32, .5f}, {"narrow", 5, .5f, 1, 0}};
    static const double odds[] = {0, .3, .6, .8, .95};
    static const size_t sizes[] = {1, 2, 4, 8, 16, 32};
    double worst = 0;
    for (size_t i = 0; i < sizeof machines / sizeof *machines; i++)
        for (size_t a = 0; a < sizeof odds / sizeof *odds; a++) {
            printf("%-8s %.2f ", machines[i].name, odds[a]);
            for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
                double best = 1, most = 0, sum = 0;
                static const int32_t ks[] = {1, 2, 3, 4, 6, 8, 12};
                for (size_t k = 0; k < sizeof ks / sizeof *ks; k++)
                    best = fmin(best, work_of(&machines[i], STEADY, sizes[s], ks[k], odds[a], 4));
                for (int how = 0; how < N_TIMES; how++) {
                    const double got = work_of(&machines[i], (times)how, sizes[s], RAST_DRAFT_AUTO, odds[a], 8);
                    if (getenv("V") ) printf("[%s %.3f]", TIMES[how], got);
                    most = fmax(most, got);
                    sum += got;
                }
                printf(" | %2zu: %.2f %.2f %.3f", sizes[s], best, sum / N_TIMES, most);
                worst = fmax(worst, most);
            }
            printf("\n");
        }
    printf("worst %.3f\n", worst);
    return 0;
}
