/* costs.c: what steps take on this machine: plain ones, passes that draw drafts and checks of drafts, each by its rows.
 *
 * A machine changes its speed, by what others do on it, for all steps alike, and some steps are timed seldom. So seconds are
 * split in two: cost * slowness. When a time differs from what was expected, a fixed part of the difference goes to the
 * slowness and a fixed part to the step's own cost, on a logarithmic scale. What a kind's costs have moved is then always in
 * the same proportion to what it has moved the slowness, so the slowness is an average of all steps' times, in which a
 * plain step counts many times as much as another one: it stays as bounded as they are, however they vary.
 */
#include "engine.h"

#include <math.h>

enum {
    CERTAIN = 2, /* measurements make a cost known; one may have been disturbed */
    EARLY = 8,   /* of these the n-th counts 1 / n, if that is more than its part */
    OLD = 1000,  /* choices after which a cost of drafts that was not measured again is forgotten */
};
static const float TO_SLOWNESS[RAST_PACE_KINDS] = {.25f, 0, .15f}; /* passes that draw come in numbers: left out */
static const float TO_COST[RAST_PACE_KINDS] = {.02f, .1f, .1f};
static const float MOST = .4f; /* of a difference counts: ± 50 % */

static const uint16_t WIDTH[RAST_PACE_WIDTHS] = {1,  2,  3,  4,  5,  6,  7,  8,   10,  12,  14,  16,
                                                 20, 24, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512};

size_t rast_costs_width(size_t rows) {
    size_t i = 0;
    while (i + 1 < RAST_PACE_WIDTHS && WIDTH[i] < rows) i++;
    return i;
}

static int is_known(const rast_costs *c, rast_pace_kind kind, size_t width) {
    const rast_cost *cost = &c->step[kind][width];
    return cost->times >= CERTAIN && (kind == RAST_PACE_PLAIN || c->used - cost->at <= OLD);
}

/* The known widths next to this one, at it if it is known; 1: there are some on both sides. */
static int known_around(const rast_costs *c, rast_pace_kind kind, size_t width, size_t *lo, size_t *hi) {
    *lo = *hi = width;
    while (*lo > 0 && !is_known(c, kind, *lo)) --*lo;
    while (*hi + 1 < RAST_PACE_WIDTHS && !is_known(c, kind, *hi)) ++*hi;
    return is_known(c, kind, *lo) && is_known(c, kind, *hi);
}

/* On the line through what two widths cost. */
static float between(size_t width, size_t lo, float at_lo, size_t hi, float at_hi) {
    if (lo == hi) return at_lo;
    const float share = (float)(WIDTH[width] - WIDTH[lo]) / (float)(WIDTH[hi] - WIDTH[lo]);
    return at_lo + share * (at_hi - at_lo);
}

/* What a step of all nets is known to cost at a width, by one of its kind, else by a check: which reads less. 0: it is not. */
static float plain_at(const rast_costs *c, size_t width) {
    if (is_known(c, RAST_PACE_PLAIN, width)) return c->step[RAST_PACE_PLAIN][width].cost;
    if (!is_known(c, RAST_PACE_CHECK, width)) return 0;
    return c->step[RAST_PACE_CHECK][width].cost / c->share[RAST_PACE_CHECK];
}

/* A step of all nets: as known, or between known neighbours, or beyond them on the same line; with a single one, like it: so
 * an unknown width looks cheap and is tried. 0: nothing is known. */
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

/* Outside of what was measured: as much of a step of all nets as it reads of the weights. */
float rast_costs_of(const rast_costs *c, rast_pace_kind kind, size_t rows) {
    size_t lo, hi;
    if (!rows) return 0;
    const size_t width = rast_costs_width(rows);
    if (known_around(c, kind, width, &lo, &hi))
        return between(width, lo, c->step[kind][lo].cost, hi, c->step[kind][hi].cost);
    return c->share[kind] * plain_cost(c, width);
}

int rast_costs_know(const rast_costs *c, rast_pace_kind kind, size_t rows) {
    size_t lo, hi;
    return known_around(c, kind, rast_costs_width(rows), &lo, &hi);
}

size_t rast_costs_widest(const rast_costs *c) {
    size_t i = RAST_PACE_WIDTHS - 1;
    while (i && plain_at(c, i) == 0) i--;
    return WIDTH[i];
}

void rast_costs_begin(rast_costs *c, uint64_t nets, float share_of_drafts) {
    *c = (rast_costs){.nets = nets, .slowness = 1};
    c->share[RAST_PACE_PLAIN] = 1;
    c->share[RAST_PACE_DRAFT] = share_of_drafts;
    c->share[RAST_PACE_CHECK] = 1 - share_of_drafts;
}

void rast_costs_learn(rast_costs *c, rast_pace_kind kind, size_t rows, float seconds) {
    const size_t width = rast_costs_width(rows);
    rast_cost *known = &c->step[kind][width];
    const float now = seconds / c->slowness;
    if (!(now > 0)) return;
    if (known->times >= CERTAIN && !is_known(c, kind, width)) known->times = 0;
    known->at = c->used;
    if (known->times < EARLY) known->times++;
    if (known->times <= CERTAIN) {
        known->cost = known->times == 1 ? now : fminf(known->cost, now);
        return;
    }
    const float off = fminf(fmaxf(logf(now / known->cost), -MOST), MOST);
    const float part = known->times < EARLY ? fmaxf(1 / (float)known->times, TO_COST[kind]) : TO_COST[kind];
    c->slowness *= expf(TO_SLOWNESS[kind] * off);
    known->cost *= expf(part * off);
}
