/* pace.c: how many drafts pay: for each sequence its own number, those that together give the most tokens a second.
 *
 * A draft stands only if those before it do: with acceptance a, a sequence's draft number j adds a^j tokens on average. It costs
 * a row of the step that checks it and, if a net draws it, a row of that net's pass number j (and of one pass more, behind the
 * last draft). So drafts are handed out one after the other, and of all numbers the one is taken with the best ratio of what it is
 * worth to seconds: 0 where drafts do not pay.
 *
 * Seconds are those from step to step, of so many rows, on this machine, with what the host does in between: a device that is
 * given its next step ahead does not wait for that, but with drafts it does. Acceptance is what became of earlier drafts. Both
 * change, and what is not tried is not known: now and then a step goes without drafts, or one sequence has a single one. No token
 * depends on the choice, so it may follow the clock.
 */
#include "engine.h"

#include <math.h>

enum {
    PLAIN_LEAST = 16,   /* steps after which a plain one shows what it costs now, and how many more... */
    PLAIN_GAIN = 100,   /* ...for each multiple of its speed that drafts gain: so it costs about 1 % */
    DRAFT_LEAST = 64,   /* steps after which a draft shows whether it stands now, */
    DRAFT_LATEST = 192, /* and how many more after some in vain */
    CERTAIN = 2,        /* measurements; one may have been disturbed */
};
static const float WORTH = 1.05f;                                    /* drafts have to gain so much */
static const float FIRST[RAST_DRAFT_SOURCES] = {.7f, .3f, .4f, .6f}; /* acceptance while nothing is known */
static const float OF_ALL = 4;      /* what all samples' acceptance counts, in drafts, beside a sample's own */
static const float FORGET = .97f;   /* with each step that checks drafts */
static const float FADE = .99f;     /* with each step that does not */
static const float UNLIKELY = .02f; /* to stand: not worth a look */
static const float NUDGE = 1.03f;
static const float DISTURBED = 1.5f; /* what is known, beside a new time: it was not the step */

/* ---- what steps take ----------------------------------------------------------------------------------------------- */

static const uint16_t WIDTH[RAST_PACE_WIDTHS] = {1,  2,  3,  4,  5,  6,  7,  8,   10,  12,  14,  16,
                                                 20, 24, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512};

static size_t width_of(size_t rows) {
    size_t i = 0;
    while (i + 1 < RAST_PACE_WIDTHS && WIDTH[i] < rows) i++;
    return i;
}

static int is_known(const rast_costs *c, rast_pace_kind kind, size_t width) {
    return c->step[kind][width].times >= CERTAIN;
}

/* What a step of all nets is known to take at a width, by one of its kind, else by a check: which reads less. 0: it is not. */
static float plain_at(const rast_costs *c, size_t width) {
    if (is_known(c, RAST_PACE_PLAIN, width)) return c->step[RAST_PACE_PLAIN][width].seconds;
    if (!is_known(c, RAST_PACE_CHECK, width)) return 0;
    return c->step[RAST_PACE_CHECK][width].seconds / c->share[RAST_PACE_CHECK];
}

/* On the line through what two widths take. */
static float between(size_t width, size_t lo, float at_lo, size_t hi, float at_hi) {
    if (lo == hi) return at_lo;
    const float share = (float)(WIDTH[width] - WIDTH[lo]) / (float)(WIDTH[hi] - WIDTH[lo]);
    return at_lo + share * (at_hi - at_lo);
}

/* Seconds of a step of all nets: as known, or between known neighbours, or beyond them on the same line; with a single one,
 * like it: so an unknown width looks cheap and is tried. 0: nothing is known. */
static float plain_cost(const rast_costs *c, size_t width) {
    size_t lo = width, hi = width;
    while (lo > 0 && plain_at(c, lo) == 0) lo--;
    while (hi + 1 < RAST_PACE_WIDTHS && plain_at(c, hi) == 0) hi++;
    const float below = plain_at(c, lo), above = plain_at(c, hi);
    if (below == 0) return above;
    if (above > 0) return between(width, lo, below, hi, above);
    size_t before = lo;
    while (before > 0 && (before == lo || plain_at(c, before) == 0)) before--;
    const float least = plain_at(c, before);
    return least > 0 && least < below ? between(width, before, least, lo, below) : below;
}

/* Seconds of a step of so many rows. Outside of what was measured: as much of a step of all nets as it reads of the weights. */
static float cost(const rast_costs *c, rast_pace_kind kind, size_t rows) {
    if (!rows) return 0;
    const size_t width = width_of(rows);
    size_t lo = width, hi = width;
    while (lo > 0 && !is_known(c, kind, lo)) lo--;
    while (hi + 1 < RAST_PACE_WIDTHS && !is_known(c, kind, hi)) hi++;
    if (is_known(c, kind, lo) && is_known(c, kind, hi))
        return between(width, lo, c->step[kind][lo].seconds, hi, c->step[kind][hi].seconds);
    return c->share[kind] * plain_cost(c, width);
}

/* A step of `rows` rows, `undrafted` of them of samples whose drafts no net drew: for these all nets run. */
static float cost_of_check(const rast_costs *c, size_t rows, size_t undrafted) {
    if (rows == undrafted) return cost(c, RAST_PACE_PLAIN, rows);
    return cost(c, RAST_PACE_CHECK, rows) + cost(c, RAST_PACE_DRAFT, undrafted);
}

/* Steps are tried up to half as wide again as any before, or with a draft for everyone. */
static size_t widest(const rast_engine *e) {
    const rast_costs *c = &e->pace.costs[e->pace.set];
    size_t i = RAST_PACE_WIDTHS - 1;
    while (i && plain_at(c, i) == 0) i--;
    size_t rows = (3 * (size_t)WIDTH[i] + 1) / 2;
    if (rows < 2 * e->n_running) rows = 2 * e->n_running;
    return rows < (size_t)e->max_rows ? rows : (size_t)e->max_rows;
}

/* Plain steps of this width were measured, or narrower and wider ones. */
static int is_plain_known(const rast_costs *c, size_t width) {
    size_t lo = width, hi = width;
    while (lo > 0 && !is_known(c, RAST_PACE_PLAIN, lo)) lo--;
    while (hi + 1 < RAST_PACE_WIDTHS && !is_known(c, RAST_PACE_PLAIN, hi)) hi++;
    return is_known(c, RAST_PACE_PLAIN, lo) && is_known(c, RAST_PACE_PLAIN, hi);
}

/* A step of the base alone says nothing about one of all nets: the costs of the last few sets are kept, each apart. */
static rast_costs *find_costs(rast_engine *e) {
    rast_pace *p = &e->pace;
    uint64_t nets = 0;
    int32_t i = 0, oldest = 0, draft_net = 0;
    for (size_t j = 0; j < e->n_running; j++) {
        nets |= rast_sample_draw_mask(e->running[j]);
        if (!draft_net) draft_net = rast_sample_draft_net(e->running[j]);
    }
    for (; i < RAST_PACE_SETS && p->costs[i].nets != nets; i++)
        if (p->costs[i].used < p->costs[oldest].used) oldest = i;
    p->set = i < RAST_PACE_SETS ? i : oldest;
    rast_costs *c = &p->costs[p->set];
    if (i == RAST_PACE_SETS) {
        size_t all = 0;
        for (int32_t m = 0; m < e->model->n_nets; m++) all += nets >> m & 1 ? e->model->nets[m].weight_bytes : 0;
        *c = (rast_costs){.nets = nets};
        c->share[RAST_PACE_PLAIN] = 1;
        c->share[RAST_PACE_DRAFT] = draft_net ? (float)e->model->nets[draft_net].weight_bytes / (float)all : 0;
        c->share[RAST_PACE_CHECK] = 1 - c->share[RAST_PACE_DRAFT];
    }
    c->used = ++p->n_choices;
    return c;
}

/* From the step before to the end of this one, without the passes in between that drew drafts. */
static double whole_step(rast_engine *e, const rast_flight *f, double seconds) {
    rast_pace *p = &e->pace;
    if (e->plan.draft_net) {
        p->drawing += seconds;
        return seconds;
    }
    const double whole = e->landed - (p->since > 0 ? p->since : f->start) - p->drawing;
    p->since = e->landed;
    p->drawing = 0;
    return whole;
}

void rast_pace_time(rast_engine *e, const rast_flight *f, double seconds) {
    const rast_plan *plan = &e->plan;
    const double whole = whole_step(e, f, seconds);
    size_t rows = 0, undrafted = 0;
    int ahead = e->runs_ahead;
    if (e->pace.set < 0) return;
    rast_costs *c = &e->pace.costs[e->pace.set];
    for (size_t i = 0; i < e->n_running; i++) {
        const rast_sample *s = e->running[i];
        const size_t n = s->n_draw_out;
        if (!s->scheduled) continue;
        if (s->n_prompt_out || !n || (!plan->draft_net && s->end[0] - s->start[0] != n)) return; /* a prompt's rows */
        rows += n;
        if (!s->draft_net) undrafted += n;
        ahead &= rast_may_run_ahead(s->job);
    }
    if (!rows || rows != f->n_out) return; /* or some of it was for samples that have ended meanwhile */
    const rast_pace_kind kind = plan->draft_net     ? RAST_PACE_DRAFT
                                : rows == undrafted ? RAST_PACE_PLAIN
                                                    : RAST_PACE_CHECK;
    float now = (float)whole, *known = &c->step[kind][width_of(rows)].seconds;
    uint32_t *times = &c->step[kind][width_of(rows)].times;
    if (kind == RAST_PACE_PLAIN && ahead) /* one after the other, host and device work at the same time */
        now = fmaxf((float)seconds, (float)(whole - seconds));
    if (kind == RAST_PACE_CHECK) now -= cost(c, RAST_PACE_DRAFT, undrafted);
    if (now <= 0) return;
    if (!*times || *known > DISTURBED * now)
        *known = now;
    else if (*times < CERTAIN)
        *known = fminf(*known, now);
    else /* a little towards it, however far it is: this follows the median */
        *known *= now > *known ? NUDGE : 1 / NUDGE;
    if (*times < CERTAIN) ++*times;
}

/* ---- what becomes of drafts ------------------------------------------------------------------------------------------ */

static float acceptance(const rast_pace *p, const rast_sample *s, int32_t source) {
    const rast_record *own = &s->record, *all = &p->record;
    const float before = (all->stood[source] + OF_ALL * FIRST[source]) / (all->tried[source] + OF_ALL);
    return fminf((own->stood[source] + OF_ALL * before) / (own->tried[source] + OF_ALL), .98f);
}

static void add_to_record(rast_record *r, int32_t source, float stood, float tried) {
    r->stood[source] = r->stood[source] * FORGET + stood;
    r->tried[source] = r->tried[source] * FORGET + tried;
}

void rast_pace_learn(rast_engine *e, rast_sample *s, size_t n, int ended) {
    for (size_t i = 0; i < RAST_DRAFT_SOURCES && !s->n_draft; i++)
        s->record.stood[i] *= FADE, s->record.tried[i] *= FADE;
    if (!s->n_draft) return;
    const float stood = (float)(n - 1), tried = stood + (!ended && n - 1 < s->n_draft ? 1 : 0);
    add_to_record(&e->pace.record, s->source, stood, tried);
    add_to_record(&s->record, s->source, stood, tried);
}

/* ---- the choice ------------------------------------------------------------------------------------------------------ */

static int is_auto(const rast_sample *s) {
    return s->job->n_draft == RAST_DRAFT_AUTO && s->most && rast_sample_n_new(s) > 0;
}

/* Nobody has a draft yet. `grams`: those that can look up do so. */
static void begin_handing_out(rast_engine *e, int grams) {
    for (size_t i = 0; i < e->n_running; i++) {
        rast_sample *s = e->running[i];
        s->given = 0;
        s->given_source = grams && s->gram ? rast_gram_source(s->gram) : 0;
        s->accepts = s->chance = s->extra = 0;
        if (is_auto(s) && (s->given_source || rast_sample_draft_net(s)))
            s->accepts = s->chance = acceptance(&e->pace, s, s->given_source);
    }
}

/* Others wait for a place in the batch: what it gives counts, not how soon it ends. */
static int somebody_waits(const rast_engine *e) { return e->n_parked || e->next_job; }

/* Steps that the sample still needs at most, with the drafts that it has. */
static float steps_left(const rast_sample *s) {
    return (float)((size_t)s->job->stop.max_new - rast_sample_n_new(s)) / (1 + s->extra);
}

/* Who gets the next draft: where others wait the one whose draft stands most likely, else the one that needs the most steps. NULL:
 * no draft is likely to stand. */
static rast_sample *next_to_get(const rast_engine *e) {
    const int waits = somebody_waits(e);
    rast_sample *best = NULL;
    for (size_t i = 0; i < e->n_running; i++) {
        rast_sample *s = e->running[i];
        if (s->chance < UNLIKELY) continue;
        if (!best || (waits ? s->chance > best->chance : steps_left(s) > steps_left(best))) best = s;
    }
    return best;
}

/* What a row more costs in a pass that draws drafts. */
static float one_more(const rast_costs *c, size_t *rows) {
    const float before = cost(c, RAST_PACE_DRAFT, *rows);
    return cost(c, RAST_PACE_DRAFT, ++*rows) - before;
}

/* The share of its row in what a sequence costs, beside what a step costs anyway. */
static float share_of_rows(const rast_costs *c, size_t n) {
    const float all = cost(c, RAST_PACE_PLAIN, n), one = cost(c, RAST_PACE_PLAIN, 1);
    return n > 1 ? fminf(fmaxf((all - one) / (float)(n - 1) * (float)n / all, 0), 1) : 1;
}

/* Tokens that a step is worth. Where others wait, those that it gives. Else a sequence that gets ahead only saves its row in the
 * steps that the others still need; steps are saved when the one that needs the most needs less. */
static float worth(const rast_engine *e, float share) {
    float sum = 0, steps = 0, plain_steps = 0;
    for (size_t i = 0; i < e->n_running; i++) {
        const rast_sample *s = e->running[i];
        sum += s->extra;
        steps = fmaxf(steps, steps_left(s));
        plain_steps = fmaxf(plain_steps, steps_left(s) * (1 + s->extra));
    }
    const float n = (float)e->n_running;
    if (somebody_waits(e) || steps <= 0) return n + sum;
    return n + share * sum + (1 - share) * n * (plain_steps / steps - 1);
}

/* Gives drafts out as long as there are rows. The number that is worth the most a second, if more than *best, is kept. */
static void hand_out(rast_engine *e, int grams, float *best) {
    const rast_costs *c = &e->pace.costs[e->pace.set];
    const size_t n = e->n_running, limit = widest(e);
    size_t rows = n, undrafted = n, n_drawn[RAST_PACE_MOST + 1] = {0}; /* rows of each pass that draws */
    const float share = share_of_rows(c, n);
    float drawing = 0;
    begin_handing_out(e, grams);
    for (size_t n_given = 1; rows < limit; n_given++) {
        rast_sample *s = next_to_get(e);
        if (!s) return;
        s->extra += s->chance;
        rows++;
        if (s->given_source) {
            undrafted++;
        } else {
            if (!s->given) drawing += one_more(c, &n_drawn[0]), undrafted--;
            drawing += one_more(c, &n_drawn[s->given + 1]);
        }
        s->given++;
        s->chance = s->given < s->most ? s->chance * s->accepts : 0;
        if (n_given % (1 + n / 8) && n_given % n) continue; /* so that large batches need no more time for it */
        const float rate = worth(e, share) / (drawing + cost_of_check(c, rows, undrafted));
        if (rate <= *best) continue;
        *best = rate;
        for (size_t i = 0; i < n; i++)
            e->running[i]->k = e->running[i]->given, e->running[i]->source = e->running[i]->given_source;
    }
}

/* One draft of one sample, another one each time. */
static void try_a_draft(rast_engine *e) {
    const size_t n = e->n_running;
    for (size_t i = 0; i < n; i++) {
        rast_sample *s = e->running[(i + e->pace.n_choices) % n];
        if (!is_auto(s) || !(s->gram || rast_sample_draft_net(s))) continue;
        const int grams = s->gram && (!rast_sample_draft_net(s) || e->pace.n_choices & 1);
        s->source = grams ? rast_gram_source(s->gram) : 0;
        s->k = 1;
        return;
    }
}

void rast_pace_choose(rast_engine *e) {
    rast_pace *p = &e->pace;
    const size_t n = e->n_running;
    const uint32_t steps = 1 + e->n_ahead; /* since the last choice */
    const rast_costs *c = find_costs(e);
    int any = 0, grams = 0, nets = 0;
    for (size_t i = 0; i < n; i++) {
        rast_sample *s = e->running[i];
        if (s->job->n_draft != RAST_DRAFT_AUTO) continue;
        s->k = 0;
        any |= is_auto(s);
        grams |= is_auto(s) && s->gram;
        nets |= is_auto(s) && rast_sample_draft_net(s);
    }
    if (!any) return;
    if (p->rests) {
        p->rests -= p->rests < steps ? p->rests : steps;
        p->since_draft += steps;
        return;
    }
    if (++p->since_plain > PLAIN_LEAST + p->plain_later || !is_plain_known(c, width_of(n))) {
        p->since_plain = 0;
        return;
    }
    const float plain = (float)n / cost(c, RAST_PACE_PLAIN, n);
    float best = plain * WORTH;
    if (grams) hand_out(e, 1, &best);
    if (nets) hand_out(e, 0, &best);
    if (best > plain * WORTH) {
        p->plain_later = (uint32_t)(PLAIN_GAIN * fminf(best / plain - 1, 4));
        p->draft_later = p->since_draft = 0;
        return;
    }
    p->since_plain = 0;
    p->rests = (uint32_t)n / 8;
    p->since_draft += steps;
    if (p->since_draft <= DRAFT_LEAST + p->draft_later || !(grams || nets)) return;
    try_a_draft(e);
    p->since_draft = 0;
    p->draft_later = p->draft_later < DRAFT_LATEST ? 2 * p->draft_later + DRAFT_LEAST : DRAFT_LATEST;
}
