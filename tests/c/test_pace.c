/* test_pace.c: how many drafts the engine chooses, on machines that are made up: sequences whose drafts stand by given odds, and
 * steps that take given seconds. Nothing runs and no clock is read, so every figure here is the same on each machine.
 *
 * What is compared is work: the sum of what all steps cost on average, whatever they took. So neither the machine's speed nor
 * noise makes a choice look better or worse than it was. */
#include "check.h"
#include "engine/engine.h"

#include <math.h>
#include <string.h>

enum { MOST_SAMPLES = 32, N_NETS = 3, N_PROMPT = 16, N_NEW = 128, LOOKED_UP = 7 };

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
    int32_t ids[MOST_SAMPLES][N_PROMPT + N_NEW + RAST_PACE_MOST + 1];
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
    *s = (rast_sample){.job = job, .ids = w->ids[i], .n_ids = N_PROMPT};
    s->start = &w->start[i], s->end = &w->end[i];
    for (size_t j = 0; j < N_PROMPT; j++) s->ids[j] = LOOKED_UP;
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

/* The sample's tokens: one more than drafts that stand. Each may be what lookup says, the token that the prompt consists of. */
static void draw(world *w, rast_sample *s) {
    size_t n = 0;
    int stands;
    do {
        const int is_looked_up = chance(w->stands[1]);
        s->ids[s->n_ids++] = is_looked_up ? LOOKED_UP : LOOKED_UP + 1;
        stands = n++ < s->k && (s->source ? is_looked_up : chance(w->stands[0]));
    } while (stands);
    rast_pace_learn(w->e, s, n, rast_sample_n_new(s) >= (size_t)s->job->stop.max_new);
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
        draw(w, s);
        if (rast_sample_n_new(s) < (size_t)s->job->stop.max_new) w->running[kept++] = s;
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
 * always, at any size of the batch; nor much more than with the best fixed number of drafts. All that it has to find out counts. Steps
 * of two times in turns are no machine's: there a little more is let pass. */
static void test_never_slower(void) {
    static const int32_t fixed[] = {1, 2, 3, 5, 8, 12};
    double sum = 0, most = 0, most_in_turns = 0, most_disagreeing = 0, farthest = 0;
    size_t n = 0;
    for (size_t i = 0; i < COUNT(MACHINES) * COUNT(ODDS) * COUNT(SIZES); i++) {
        const size_t a = i / COUNT(MACHINES) % COUNT(ODDS), size = i / COUNT(MACHINES) / COUNT(ODDS);
        workload load = {&MACHINES[i % COUNT(MACHINES)], STEADY, ODDS[a], SIZES[size], (int)((i + a + size) % 2)};
        double best = work_of(&load, 0);
        for (size_t k = 0; k < COUNT(fixed); k++) best = fmin(best, work_of(&load, fixed[k]));
        for (int how = 0; how < N_TIMES; how++) {
            load.how = (times)how;
            const double work = work_of(&load, RAST_DRAFT_AUTO), share = work / work_of(&load, 0);
            CHECK(share < (how <= DRIFTS ? 1 / .97 : 1.06), "%s, %s, %.2f stand, %zu at once%s: %.3f of plain",
                  load.on->name, TIMES[how], load.stands, load.n, load.wait ? ", others wait" : "", share);
            if (how > DRIFTS) { /* other costs, so another best number too */
                most_in_turns = fmax(most_in_turns, share);
                continue;
            }
            CHECK(work < 1.5 * best, "%s, %s, %.2f stand, %zu at once%s: %.3f of the best", load.on->name, TIMES[how],
                  load.stands, load.n, load.wait ? ", others wait" : "", work / best);
            most = fmax(most, share);
            if (load.stands == 0) most_disagreeing = fmax(most_disagreeing, share);
            farthest = fmax(farthest, work / best);
            sum += work / best, n++;
        }
    }
    CHECK(sum < 1.05 * (double)n, "%.3f of the best fixed number's work on average", sum / (double)n);
    printf("of the work without drafts: at most %.3f, %.3f if no draft ever stands, %.3f with steps of two times in "
           "turns; of "
           "the work with the best fixed number of drafts: on average %.3f, at most %.3f\n",
           most, most_disagreeing, most_in_turns, sum / (double)n, farthest);
}

/* Whatever the times do, what is thought of a plain step stays near what it takes: the two parts of it do not run away. */
static void test_costs_stay(void) {
    for (int how = 0; how < N_TIMES; how++)
        for (size_t a = 0; a < COUNT(ODDS); a++) {
            world w;
            world_new(&w, &MACHINES[0], (times)how, ODDS[a]);
            rng_state = 1;
            for (int batch = 0; batch < 200; batch++) {
                run(&w, 2, 2, RAST_DRAFT_AUTO);
                const rast_costs *c = &w.e->pace.costs[0];
                const double is = 1e3 * c->slowness * rast_costs_of(c, RAST_PACE_PLAIN, 2) /
                                  cost(&w, RAST_PACE_PLAIN, MACHINES[0].base + 2, 2);
                CHECK(is > .5 && is < 2, "%s, %.2f stand: %.2f of a plain step's cost after %d batches", TIMES[how],
                      ODDS[a], is, batch);
                CHECK(c->slowness > .3f && c->slowness < 3, "%s, %.2f stand: slowness %g after %d batches", TIMES[how],
                      ODDS[a], (double)c->slowness, batch);
            }
            world_free(&w);
        }
}

/* A request whose number is fixed leaves no plain steps to measure: the other one gets drafts all the same. */
static void test_beside_a_fixed_number(void) {
    world w;
    world_new(&w, &MACHINES[0], STEADY, .9);
    begin(&w, &w.sample[0], N_NEW, 4);
    begin(&w, &w.sample[1], N_NEW, RAST_DRAFT_AUTO);
    int first = 0;
    for (int i = 1; !first && i < 30; i++) {
        step(&w);
        if (w.sample[1].k) first = i;
    }
    CHECK(first, "no drafts beside a request with a number of its own");
    world_free(&w);
}

/* Earlier ids where they are known to serve, the expert elsewhere: in one batch, and in one step. */
static void test_sources(void) {
    static const double stands[][2] = {{.9, .05}, {.05, .9}, {.9, .9}};
    for (size_t i = 0; i < COUNT(stands); i++) {
        world w;
        world_new(&w, &MACHINES[1], STEADY, stands[i][0]);
        w.stands[1] = stands[i][1];
        w.looks_up = .5;
        rng_state = 1;
        run(&w, 4, 40, RAST_DRAFT_AUTO);
        const size_t *n = w.n_drafts;
        if (i == 0) CHECK(n[0] > 20 * n[1], "%zu of the expert, %zu looked up, which do not stand", n[0], n[1]);
        if (i == 1) CHECK(n[1] > 3 * n[0], "%zu of the expert, which do not stand, %zu looked up", n[0], n[1]);
        if (i == 2) CHECK(w.n_mixed > 50, "%zu steps with drafts of both kinds", w.n_mixed);
        world_free(&w);
    }
}

int main(void) {
    test_beside_a_fixed_number();
    test_sources();
    test_costs_stay();
    test_never_slower();
    return 0;
}
