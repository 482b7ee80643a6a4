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
    PLAIN_FIRST = 8,    /* steps after which a plain one is measured, the first times; */
    PLAIN_LEAST = 16,   /* steps after which a plain one shows what it costs now, and how many more... */
    PLAIN_GAIN = 100,   /* ...for each multiple of its speed that drafts gain: so it costs about 1 % */
    DRAFT_LEAST = 64,   /* steps after which a draft shows whether it stands now, */
    DRAFT_LATEST = 192, /* and how many more after some in vain */
};
static const float WORTH = 1.1f;                                     /* drafts have to gain so much */
static const float FIRST[RAST_DRAFT_SOURCES] = {.7f, .3f, .4f, .6f}; /* acceptance while nothing is known */
static const float OF_ALL = 4;      /* what all samples' acceptance counts, in drafts, beside a sample's own */
static const float FORGET = .97f;   /* with each step that shows what became of some */
static const float FADE = .99f;     /* with each step that does not, of the net's */
static const float UNLIKELY = .02f; /* to stand: not worth a look */
static const float LEAST = .25f;    /* of a check's time is not the pass that is taken off it */

/* ---- what steps take ----------------------------------------------------------------------------------------------- */

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
        rast_costs_begin(c, nets, draft_net ? (float)e->model->nets[draft_net].weight_bytes / (float)all : 0);
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
        if (!rast_sample_n_new(s) || !n || (!plan->draft_net && s->end[0] - s->start[0] != n))
            return; /* a prompt's rows, or its last block was copied */
        rows += n;
        if (!s->draft_net) undrafted += n;
        ahead &= rast_may_run_ahead(s->job);
    }
    if (!rows || rows != f->n_out) return; /* or some of it was for samples that have ended meanwhile */
    const rast_pace_kind kind = plan->draft_net     ? RAST_PACE_DRAFT
                                : rows == undrafted ? RAST_PACE_PLAIN
                                                    : RAST_PACE_CHECK;
    float now = (float)whole;
    if (kind == RAST_PACE_PLAIN && ahead) /* one after the other, host and device work at the same time */
        now = fmaxf((float)seconds, (float)(whole - seconds));
    if (kind == RAST_PACE_CHECK) /* without the drafting net's part of it */
        now = fmaxf(now - c->slowness * rast_costs_of(c, RAST_PACE_DRAFT, undrafted), LEAST * now);
    rast_costs_learn(c, kind, rows, now);
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

/* What lookup would have given is known whoever drafted, and if nobody did. */
static void learn_lookup(rast_pace *p, rast_sample *s, size_t n) {
    const int32_t *was = s->ids + s->gram_end, *is = s->ids + s->n_ids - n, source = rast_gram_source(s->gram);
    size_t same = 0;
    while (same < n && was[same] == is[same]) same++;
    add_to_record(&p->record, source, (float)same, (float)(same + (same < n)));
    add_to_record(&s->record, source, (float)same, (float)(same + (same < n)));
    s->gram = 0; /* steps that run ahead do not look again */
}

void rast_pace_learn(rast_engine *e, rast_sample *s, size_t n, int ended) {
    if (s->gram) learn_lookup(&e->pace, s, n);
    if (!s->n_draft) s->record.stood[0] *= FADE, s->record.tried[0] *= FADE;
    if (!s->n_draft || s->source) return;
    const float stood = (float)(n - 1), tried = stood + (!ended && n - 1 < s->n_draft ? 1 : 0);
    add_to_record(&e->pace.record, 0, stood, tried);
    add_to_record(&s->record, 0, stood, tried);
}

/* ---- the choice ------------------------------------------------------------------------------------------------------ */

/* Which sequences look up, of those that can: the others have drafts of the net. */
typedef enum { NOBODY, WHERE_LIKELIER, EVERYBODY } lookup;

typedef struct { /* a step, while drafts are handed out */
    size_t rows, undrafted;
    size_t drawn[RAST_PACE_MOST + 1]; /* rows of each pass that draws */
    float drawing;                    /* what these cost */
} load;

static int is_auto(const rast_sample *s) { return s->job->n_draft == RAST_DRAFT_AUTO; }

static int can_draft(const rast_sample *s) {
    return s->most && rast_sample_n_new(s) && (s->gram || rast_sample_draft_net(s));
}

static int32_t source_of(const rast_engine *e, const rast_sample *s, lookup who) {
    const int32_t source = s->gram ? rast_gram_source(s->gram) : 0;
    if (!source || !rast_sample_draft_net(s) || who == EVERYBODY) return source;
    return who == WHERE_LIKELIER && acceptance(&e->pace, s, source) >= acceptance(&e->pace, s, 0) ? source : 0;
}

/* A pass that draws has a row more. */
static void draw_one(const rast_costs *c, load *l, size_t pass) {
    if (pass > RAST_PACE_MOST) { /* of a request with a number of its own: somebody else is hardly there */
        l->drawing += rast_costs_of(c, RAST_PACE_DRAFT, 1);
        return;
    }
    const float before = rast_costs_of(c, RAST_PACE_DRAFT, l->drawn[pass]);
    l->drawing += rast_costs_of(c, RAST_PACE_DRAFT, ++l->drawn[pass]) - before;
}

static void give(const rast_costs *c, load *l, rast_sample *s) {
    s->extra += s->chance;
    l->rows++;
    if (s->given_source) {
        l->undrafted++;
    } else {
        if (!s->given) draw_one(c, l, 0), l->undrafted--;
        draw_one(c, l, s->given + 1);
    }
    s->given++;
    s->chance = s->given < s->most ? s->chance * s->accepts : 0;
}

/* Only those that have a number of their own get it. */
static load begin_handing_out(rast_engine *e, lookup who) {
    const rast_costs *c = &e->pace.costs[e->pace.set];
    load l = {.rows = e->n_running, .undrafted = e->n_running};
    for (size_t i = 0; i < e->n_running; i++) {
        rast_sample *s = e->running[i];
        s->given = 0;
        s->accepts = s->chance = s->extra = 0;
        s->given_source = is_auto(s) ? source_of(e, s, who) : s->source;
        if (can_draft(s)) s->accepts = s->chance = acceptance(&e->pace, s, s->given_source);
        while (!is_auto(s) && can_draft(s) && s->given < s->k) give(c, &l, s);
    }
    return l;
}

/* All nets run for the rows of samples whose drafts no net drew. */
static float cost_of(const rast_costs *c, const load *l) {
    if (l->rows == l->undrafted) return rast_costs_of(c, RAST_PACE_PLAIN, l->rows);
    return l->drawing + rast_costs_of(c, RAST_PACE_CHECK, l->rows) + rast_costs_of(c, RAST_PACE_DRAFT, l->undrafted);
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
        if (!is_auto(s) || s->chance < UNLIKELY) continue;
        if (!best || (waits ? s->chance > best->chance : steps_left(s) > steps_left(best))) best = s;
    }
    return best;
}

/* The share of its row in what a sequence costs, beside what a step costs anyway. */
static float share_of_rows(const rast_costs *c, size_t n) {
    const float all = rast_costs_of(c, RAST_PACE_PLAIN, n), one = rast_costs_of(c, RAST_PACE_PLAIN, 1);
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

/* Steps are tried up to half as wide again as any before, or with a draft for everyone. */
static size_t most_rows(const rast_engine *e, const rast_costs *c) {
    size_t rows = (3 * rast_costs_widest(c) + 1) / 2;
    if (rows < 2 * e->n_running) rows = 2 * e->n_running;
    return rows < (size_t)e->max_rows ? rows : (size_t)e->max_rows;
}

/* Gives drafts out as long as there are rows. The number that is worth the most a second, if more than *best, is kept. */
static void hand_out(rast_engine *e, lookup who, float share, float *best) {
    const rast_costs *c = &e->pace.costs[e->pace.set];
    const size_t n = e->n_running, limit = most_rows(e, c);
    load l = begin_handing_out(e, who);
    for (size_t n_given = 1; l.rows < limit; n_given++) {
        rast_sample *s = next_to_get(e);
        if (!s) return;
        give(c, &l, s);
        if (n_given % (1 + n / 8) && n_given % n) continue; /* so that large batches need no more time for it */
        const float rate = worth(e, share) / cost_of(c, &l);
        if (rate <= *best) continue;
        *best = rate;
        for (size_t i = 0; i < n; i++)
            if (is_auto(e->running[i]))
                e->running[i]->k = e->running[i]->given, e->running[i]->source = e->running[i]->given_source;
    }
}

/* What the best drafts give, in multiples of what the step gives without; 0: none give WORTH. */
static float choose(rast_engine *e, int grams, int nets) {
    const rast_costs *c = &e->pace.costs[e->pace.set];
    const float share = share_of_rows(c, e->n_running);
    const load without = begin_handing_out(e, NOBODY);
    const float rate = worth(e, share) / cost_of(c, &without);
    float best = rate * WORTH;
    if (grams) hand_out(e, EVERYBODY, share, &best);
    if (grams && nets) hand_out(e, WHERE_LIKELIER, share, &best);
    if (nets) hand_out(e, NOBODY, share, &best);
    return best > rate * WORTH ? best / rate : 0;
}

/* One draft of one sample, another one each time. */
static void try_a_draft(rast_engine *e) {
    const size_t n = e->n_running;
    for (size_t i = 0; i < n; i++) {
        rast_sample *s = e->running[(i + e->pace.n_choices) % n];
        if (!is_auto(s) || !can_draft(s)) continue;
        s->source = source_of(e, s, NOBODY);
        s->k = 1;
        return;
    }
}

/* Steps without drafts, for now and then one has to show whether a draft stands, and what it costs. */
static void go_without(rast_engine *e, uint32_t steps) {
    rast_pace *p = &e->pace;
    p->rests = (uint32_t)e->n_running / 8;
    p->since_draft += steps;
    if (p->since_draft <= DRAFT_LEAST + p->draft_later) return;
    try_a_draft(e);
    p->since_draft = 0;
    p->draft_later = p->draft_later < DRAFT_LATEST ? 2 * p->draft_later + DRAFT_LEAST : DRAFT_LATEST;
}

void rast_pace_choose(rast_engine *e) {
    rast_pace *p = &e->pace;
    const size_t n = e->n_running;
    const uint32_t steps = 1 + e->n_ahead; /* since the last choice */
    rast_costs *c = find_costs(e);
    uint64_t *plain_at = &c->plain_at[rast_costs_width(n)];
    int fixed = 0, grams = 0, nets = 0;
    for (size_t i = 0; i < n; i++) {
        rast_sample *s = e->running[i];
        if (is_auto(s)) s->k = 0;
        fixed |= s->k && can_draft(s); /* so this will be no plain step anyway */
        grams |= is_auto(s) && can_draft(s) && s->gram;
        nets |= is_auto(s) && can_draft(s) && rast_sample_draft_net(s);
    }
    if (!grams && !nets) return;
    if (p->rests) {
        p->rests -= p->rests < steps ? p->rests : steps;
        p->since_draft += steps;
        *plain_at = p->n_choices;
        return;
    }
    const uint64_t since = p->n_choices - *plain_at;
    const int is_due = since > (rast_costs_doubt(c, RAST_PACE_PLAIN, n) ? PLAIN_FIRST : PLAIN_LEAST + p->plain_later);
    if (fixed ? rast_costs_of(c, RAST_PACE_PLAIN, n) == 0 : is_due || !rast_costs_know(c, RAST_PACE_PLAIN, n)) {
        *plain_at = p->n_choices;
        return;
    }
    const float gain = choose(e, grams, nets);
    if (gain > 0) {
        p->plain_later = (uint32_t)(PLAIN_GAIN * fminf(gain - 1, 4));
        p->draft_later = p->since_draft = 0;
        return;
    }
    *plain_at = p->n_choices;
    go_without(e, steps);
}
