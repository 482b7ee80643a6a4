/* pace.c: how many drafts pay: the number with the most tokens a second, by what steps have taken and how many drafts stood.
 *
 * With acceptance a, k drafts give (1 - a^(k+1)) / (1 - a) tokens on average. From a net they cost k + 1 of its passes over one
 * row a sample, and a pass of the other nets over k + 1; from earlier ids only a pass of all nets over k + 1. No token depends
 * on the choice, so it can follow the clock.
 */
#include "engine.h"

#include <math.h>

enum {
    PLAIN_AGAIN = 128, /* steps after which a plain one shows what it costs now */
    DRAFT_AGAIN = 64,  /* steps after which a draft shows whether it stands now */
};
static const float WORTH = 1.02f;        /* drafts have to gain so much */
static const float FIRST[] = {.7f, .4f}; /* acceptance while nothing is known: from a net, from earlier ids */
static const float FORGET = .97f;
static const float UNSURE = 1.5f; /* a step that takes so much less than is known */

/* ---- what steps take ----------------------------------------------------------------------------------------------- */

static const uint16_t WIDTH[RAST_PACE_WIDTHS] = {1,  2,  3,  4,  5,  6,  7,  8,   10,  12,  14,  16,
                                                 20, 24, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512};

static size_t width_of(size_t rows) {
    size_t i = 0;
    while (i + 1 < RAST_PACE_WIDTHS && WIDTH[i] < rows) i++;
    return i;
}

/* Seconds of a step of so many rows. Where it was not measured: between its neighbours; beyond them the nearest, so that an
 * unknown width looks cheap and is tried. 0: nothing was measured. */
static float cost(const rast_pace *p, rast_pace_kind kind, size_t rows) {
    const float *seconds = p->costs[p->set].seconds[kind];
    const size_t at = width_of(rows);
    size_t lo = at, hi = at;
    while (lo > 0 && seconds[lo] == 0) lo--;
    while (hi + 1 < RAST_PACE_WIDTHS && seconds[hi] == 0) hi++;
    if (seconds[lo] == 0 || seconds[hi] == 0) return seconds[lo] + seconds[hi];
    if (lo == hi) return seconds[at];
    const float share = (float)(WIDTH[at] - WIDTH[lo]) / (float)(WIDTH[hi] - WIDTH[lo]);
    return seconds[lo] + share * (seconds[hi] - seconds[lo]);
}

/* A step of the base alone says nothing about one of all nets: the costs of the last few sets are kept, each apart. */
static void find_costs(rast_engine *e) {
    rast_pace *p = &e->pace;
    uint64_t nets = 0;
    int32_t i = 0, oldest = 0;
    for (size_t j = 0; j < e->n_running; j++) nets |= rast_sample_draw_mask(e->running[j]);
    for (; i < RAST_PACE_SETS && p->costs[i].nets != nets; i++)
        if (p->costs[i].used < p->costs[oldest].used) oldest = i;
    p->set = i < RAST_PACE_SETS ? i : oldest;
    if (i == RAST_PACE_SETS) p->costs[oldest] = (rast_costs){.nets = nets};
    p->costs[p->set].used = ++p->n_steps;
}

void rast_pace_time(rast_engine *e, double seconds) {
    const rast_plan *plan = &e->plan;
    rast_pace_kind kind = plan->draft_net ? RAST_PACE_DRAFT : RAST_PACE_PLAIN;
    size_t rows = 0;
    for (size_t i = 0; i < e->n_running; i++) {
        const rast_sample *s = e->running[i];
        const size_t n = s->n_draw_out;
        if (!s->scheduled) continue;
        if (s->n_prompt_out || !n || (!plan->draft_net && s->end[0] - s->start[0] != n)) return; /* a prompt's rows */
        if (!plan->draft_net && s->draft_net) kind = RAST_PACE_CHECK;
        rows += n;
    }
    if (!rows) return;
    float *known = &e->pace.costs[e->pace.set].seconds[kind][width_of(rows)];
    const float now = (float)seconds;
    if (*known > 0 && *known <= UNSURE * now) {
        *known += .2f * (fminf(now, 2 * *known) - *known); /* a disturbance counts little */
        return;
    }
    *known = now; /* the first, or what was known was disturbed */
    /* all else is compared with the plain step: while its cost is not sure, another one */
    if (kind == RAST_PACE_PLAIN && rows == e->n_running) e->pace.since_plain = PLAIN_AGAIN;
}

/* ---- what becomes of drafts ------------------------------------------------------------------------------------------ */

static float acceptance(float stood, float tried, float first, float weight) {
    return fminf((stood + weight * first) / (tried + weight), .98f);
}

static float of_all(const rast_pace *p, int looked_up) {
    return acceptance(p->n_stood[looked_up], p->n_tried[looked_up], FIRST[looked_up], 2);
}

void rast_pace_learn(rast_engine *e, rast_sample *s, size_t n, int ended) {
    rast_pace *p = &e->pace;
    if (!s->n_draft) return;
    const float stood = (float)(n - 1), tried = stood + (!ended && n - 1 < s->n_draft ? 1 : 0);
    const int from = s->looked_up;
    p->n_stood[from] = p->n_stood[from] * FORGET + stood;
    p->n_tried[from] = p->n_tried[from] * FORGET + tried;
    if (from) return;
    s->n_stood = s->n_stood * FORGET + stood;
    s->n_tried = s->n_tried * FORGET + tried;
}

/* Tokens of a step with k drafts, on average. */
static float tokens(float a, size_t k) { return (1 - powf(a, (float)(k + 1))) / (1 - a); }

/* ---- the choice ------------------------------------------------------------------------------------------------------ */

static int is_auto(const rast_sample *s) {
    return s->job->n_draft == RAST_DRAFT_AUTO && rast_sample_n_new(s) > 0 && !rast_sample_prompt_pending(s);
}

/* Tokens of a step in which every sample that drafts by a net takes k, the others 1. */
static float tokens_of_all(const rast_engine *e, size_t k) {
    float sum = 0;
    for (size_t i = 0; i < e->n_running; i++) {
        const rast_sample *s = e->running[i];
        const int drafts = is_auto(s) && s->job->draft_net;
        sum += drafts ? tokens(acceptance(s->n_stood, s->n_tried, of_all(&e->pace, 0), 4), k) : 1;
    }
    return sum;
}

static uint32_t choose_net(const rast_engine *e, size_t n, size_t n_net, float *rate) {
    const rast_pace *p = &e->pace;
    const float plain = tokens_of_all(e, 0) / cost(p, RAST_PACE_PLAIN, n);
    uint32_t best = 0;
    *rate = plain;
    for (uint32_t k = 1; k <= RAST_PACE_MOST && n + n_net * k <= (size_t)e->max_rows; k++) {
        if (n_net * (k + 1) > rast_draft_rows(e)) break;
        const float drafts = cost(p, RAST_PACE_DRAFT, n_net) * (float)(k + 1);
        const float now = tokens_of_all(e, k) / (drafts + cost(p, RAST_PACE_CHECK, n + n_net * k));
        if (now > *rate && now > plain * WORTH) *rate = now, best = k;
    }
    return best;
}

void rast_pace_choose(rast_engine *e) {
    rast_pace *p = &e->pace;
    size_t n = e->n_running, n_auto = 0, n_net = 0;
    for (size_t i = 0; i < n; i++) {
        n_auto += (size_t)is_auto(e->running[i]);
        n_net += is_auto(e->running[i]) && e->running[i]->job->draft_net;
    }
    p->k = p->grams = 0;
    find_costs(e);
    if (!n_auto) return;
    if (p->since_plain >= PLAIN_AGAIN || p->costs[p->set].seconds[RAST_PACE_PLAIN][width_of(n)] == 0) {
        p->since_plain = 0;
        return;
    }
    float rate = (float)n / cost(p, RAST_PACE_PLAIN, n);
    if (n_net) p->k = choose_net(e, n, n_net, &rate);
    /* One sample in n looks up: what a step with its drafts gives, beside what it gives without. */
    for (uint32_t k = 1; k <= RAST_PACE_MOST && n * (k + 1) <= (size_t)e->max_rows; k++) {
        const float now = (float)n * tokens(of_all(p, 1), k) / cost(p, RAST_PACE_PLAIN, n * (k + 1));
        if (now > rate * WORTH) rate = now, p->grams = k;
    }
    if (p->since_draft >= DRAFT_AGAIN && !p->k && !p->grams) {
        p->k = 1;
        p->grams = 2;
    }
    p->since_plain++;
    p->since_draft = p->k || p->grams ? 0 : p->since_draft + 1;
}

size_t rast_pace_grams(const rast_engine *e, const rast_sample *s, int32_t net, size_t k) {
    const size_t want = is_auto(s) ? e->pace.grams : net || s->job->n_draft < 0 ? 0 : k;
    return want < k ? want : k;
}

size_t rast_pace_drafts(const rast_engine *e, const rast_sample *s, int32_t net, size_t k) {
    const size_t want = !net ? 0 : is_auto(s) ? e->pace.k : s->job->n_draft < 0 ? 0 : k;
    return want < k ? want : k;
}
