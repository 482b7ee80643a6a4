/* test_pace.c: how many drafts the engine chooses, on machines that are made up: sequences whose drafts stand by given odds, and
 * steps that take given seconds. Nothing runs and no clock is read, so every figure here is the same on each machine.
 *
 * What is compared is work: the sum of what all steps cost on average, whatever they took. So neither the machine's speed nor
 * noise makes a choice look better or worse than it was. */
#include "check.h"
#include "engine/engine.h"

#include <math.h>
#include <string.h>

enum { MOST_SAMPLES = 32, N_NETS = 3, N_PROMPT = 8, N_NEW = 128 };

/* ---- machines ------------------------------------------------------------------------------------------------------- */

typedef struct { /* of nets whose weights cost `base`, 1 and 1 */
    const char *name;
    float base, row;  /* each row after the first costs so much of one row */
    size_t free_rows; /* up to so many rows cost no more than one */
    float host;       /* beside each pass */
} machine;

typedef enum {
    STEADY,
    NOISY,
    JUMPS,
    DRIFTS,
    PLAIN_IN_TURNS,
    CHECKS_IN_TURNS,
    DRAFTS_IN_TURNS,
    ALL_IN_TURNS,
    N_TIMES
} times;
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
    double stands[2],
        looks_up;       /* the odds of a draft of the expert and of one looked up; of there being one to look up */
    size_t n_waiting;   /* sequences that wait for a place */
    size_t n_drafts[2]; /* by the same sources */
    size_t n_mixed;     /* steps with drafts of both */
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
    if (w->how == NOISY) f *= chance(.02) ? 1 + 5 * random_share() : 1 + .1 * (random_share() - .5);
    if (w->how == JUMPS) f *= w->n_steps / 60 & 1 ? 1.35 : 1;
    if (w->how == DRIFTS) f *= 1 + .4 * sin((double)w->n_steps / 150);
    return f;
}

/* A pass runs: the engine hears how long it took. `drawing`: of the expert, for drafts; else all are checked. */
static void pass(world *w, int drawing, size_t rows, size_t undrafted) {
    rast_engine *e = w->e;
    rast_flight f = {.start = w->now, .n_out = rows};
    const rast_pace_kind kind = drawing ? RAST_PACE_DRAFT : rows == undrafted ? RAST_PACE_PLAIN : RAST_PACE_CHECK;
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

static void world_new(world *w, const machine *on, times how, double stands) {
    memset(w, 0, sizeof *w);
    w->on = on;
    w->how = how;
    w->stands[0] = stands;
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

/* ---- sequences ------------------------------------------------------------------------------------------------------ */

static void begin(world *w, rast_sample *s, size_t n_new, int32_t n_draft) {
    const size_t i = (size_t)(s - w->sample);
    rast_job *job = &w->job[i];
    *job = (rast_job){.n_ids = N_PROMPT, .active = 7, .n_draft = n_draft, .draft_net = 1};
    job->stop.max_new = (int32_t)n_new;
    job->sampling.repetition_penalty = 1;
    *s = (rast_sample){.job = job, .n_ids = N_PROMPT, .start = &w->start[i], .end = &w->end[i]};
    w->running[w->e->n_running++] = s;
}

/* What the samples may choose from, as draft.c tells. */
static void offer(world *w) {
    for (size_t i = 0; i < w->e->n_running; i++) {
        rast_sample *s = w->running[i];
        const int32_t asked = rast_most_drafts(s->job);
        const size_t n_new = rast_sample_n_new(s), left = (size_t)s->job->stop.max_new - n_new;
        s->most = !n_new ? 0 : (uint32_t)(left - 1 < (size_t)asked ? left - 1 : (size_t)asked);
        s->gram = s->most && s->job->n_draft < 0 && chance(w->looks_up) ? 3 : 0;
        s->source = 0;
        s->k = s->most;
    }
    w->e->next_job = w->n_waiting ? w->job : NULL;
    rast_pace_choose(w->e);
}

static void draw_drafts(world *w) {
    uint32_t most = 0;
    size_t n[2] = {0};
    for (size_t i = 0; i < w->e->n_running; i++) {
        rast_sample *s = w->running[i];
        s->n_draft = s->k;
        s->draft_net = s->k && !s->source;
        if (s->draft_net && s->k > most) most = s->k;
        n[s->source != 0] += s->k;
    }
    w->n_drafts[0] += n[0], w->n_drafts[1] += n[1];
    w->n_mixed += n[0] && n[1];
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

/* One step of all. */
static void step(world *w) {
    rast_engine *e = w->e;
    size_t rows = 0, undrafted = 0, kept = 0;
    w->n_steps++;
    offer(w);
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
        while (n <= s->k && chance(w->stands[s->source != 0])) n++;
        s->n_ids += n;
        const int ends = rast_sample_n_new(s) >= (size_t)s->job->stop.max_new;
        rast_pace_learn(e, s, n, ends);
        if (!ends) w->running[kept++] = s;
    }
    e->n_running = kept;
}

/* So many sequences of other lengths, each in a free place as soon as there is one. */
static void run(world *w, size_t n_places, size_t n, int32_t n_draft) {
    w->n_waiting = n;
    w->e->pace.since = 0;
    for (size_t begun = 0; w->n_waiting || w->e->n_running; step(w))
        for (size_t i = 0; i < n_places && w->n_waiting; i++) {
            int is_free = 1;
            for (size_t j = 0; j < w->e->n_running; j++) is_free &= w->running[j] != &w->sample[i];
            if (!is_free) continue;
            begin(w, &w->sample[i], N_NEW - N_NEW / 2 * (begun * 7 % n_places) / n_places, n_draft);
            begun++, w->n_waiting--;
        }
}

typedef struct {
    const machine *on;
    times how;
    double stands;
    size_t n; /* sequences at once, */
    int wait; /* and others that wait for a place; or in batches one after the other */
} workload;

static double work_of(const workload *load, int32_t n_draft) {
    enum { N_BATCHES = 8 };
    world w;
    world_new(&w, load->on, load->how, load->stands);
    rng_state = 1;
    for (size_t i = 0; i < (load->wait ? 1 : N_BATCHES); i++)
        run(&w, load->n, load->wait ? N_BATCHES * load->n : load->n, n_draft);
    const double work = w.work;
    world_free(&w);
    return work;
}

/* ---- what is to hold ------------------------------------------------------------------------------------------------ */

static const machine MACHINES[] = {{"base of 5", 5, .1f, 1, .1f},   {"base of 20", 20, .1f, 1, .1f},
                                   {"base of 2", 2, .12f, 1, .1f},  {"slow host", 4, .3f, 1, 2},
                                   {"free rows", 5, .02f, 32, .5f}, {"dear rows", 5, .5f, 1, 0}};
static const double ODDS[] = {0, .3, .6, .8, .95};
static const size_t SIZES[] = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32};

#define COUNT(array) (sizeof(array) / sizeof *(array))

/* With drafts as the engine chooses them nothing takes more than 1 / 0.97 of what it takes with none, whether a pair never agrees or
 * always, whatever the times do; and not much more than with the best fixed number of drafts. All that it has to find out counts. */
static void test_never_slower(void) {
    static const int32_t fixed[] = {1, 2, 3, 5, 8, 12};
    double sum = 0, most = 0, most_disagreeing = 0, farthest = 0;
    size_t n = 0;
    for (size_t m = 0; m < COUNT(MACHINES); m++)
        for (size_t a = 0; a < COUNT(ODDS); a++)
            for (size_t s = 0; s < COUNT(SIZES); s++)
                for (int wait = 0; wait < 2; wait++) {
                    workload load = {&MACHINES[m], STEADY, ODDS[a], SIZES[s], wait};
                    double best = work_of(&load, 0);
                    for (size_t k = 0; k < COUNT(fixed); k++) best = fmin(best, work_of(&load, fixed[k]));
                    for (int how = 0; how < N_TIMES; how++) {
                        rng_state = 1;
                        load.how = (times)how;
                        const double plain = work_of(&load, 0), work = work_of(&load, RAST_DRAFT_AUTO);
                        if (work > plain / .97)
                            printf("OVER "),
                                printf("%s, %s, %.2f stand, %zu at once%s: %.3f of plain\n", MACHINES[m].name,
                                       TIMES[how], ODDS[a], SIZES[s], wait ? ", others wait" : "", work / plain);
                        most = fmax(most, work / plain);
                        if (!a) most_disagreeing = fmax(most_disagreeing, work / plain);
                        if (how > DRIFTS) continue; /* other costs, so another best number */
                        if (work / best > farthest) {
                            farthest = work / best;
                            if (getenv("RAST_TEST_TELL"))
                                printf("%s, %s, %.2f stand, %zu at once%s: %.3f of the best fixed number's\n",
                                       MACHINES[m].name, TIMES[how], ODDS[a], SIZES[s], wait ? ", others wait" : "",
                                       work / best);
                        }
                        sum += work / best, n++;
                    }
                }
    printf("work in shares of that without drafts: at most %.3f, for a pair that never agrees %.3f; of the best fixed "
           "number of drafts: mean %.3f, at most %.3f\n",
           most, most_disagreeing, sum / (double)n, farthest);
}

int main(void) {
    test_never_slower();
    return 0;
}
