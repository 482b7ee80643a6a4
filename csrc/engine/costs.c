/* costs.c: what steps take on this machine: plain ones, passes that draw drafts and checks of drafts, each by its rows.
 *
 * A machine changes its speed, by what others do on it, for all steps alike, and some steps are timed seldom. So seconds are
 * split in two: cost * slowness. When a time differs from what was expected, a fixed part of the difference goes to the
 * slowness and a fixed part to the step's own cost, both as exponents. Each cost then moves in proportion to what it adds to
 * the slowness, which so is an average of how far all steps' times have moved, a plain step's counting most: neither
 * runs away from the other, however the times vary.
 */
#include "engine.h"

#include <math.h>

enum {
    CERTAIN = 2, /* measurements make a cost known; one may have been disturbed */
    EARLY = 8, /* so many tell nothing about the machine's speed: the n-th moves the cost by 1 / n of the difference */
    OLD = 500, /* choices after which a cost of drafts that was not measured again is forgotten */
};
static const float TO_SLOWNESS[RAST_PACE_KINDS] = {.25f, 0, .15f}; /* passes that draw come in numbers: left out */
static const float TO_COST[RAST_PACE_KINDS] = {.05f, .1f, .1f};
static const float APART = 2.2f; /* of the first two times: the longer one is so many times the other */
static const float FAR = .15f;   /* from what was expected, in shares of it */
static const float MOST = .5f;   /* of a difference counts, in shares of what was expected */

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

/* The nearest known width beyond `from`; itself if there is none. */
static size_t next_known(const rast_costs *c, size_t from, int wider) {
    for (size_t i = from; wider ? i + 1 < RAST_PACE_WIDTHS : i > 0;) {
        i = wider ? i + 1 : i - 1;
        if (plain_at(c, i) > 0) return i;
    }
    return from;
}

/* Beyond all known widths: on the line through the two next ones, but not dearer by row than `near`, nor cheaper if wider. With
 * a single one, like it: so an unknown width looks cheap and is tried. */
static float beyond(const rast_costs *c, size_t width, size_t near, size_t far) {
    const float at_near = plain_at(c, near);
    if (near == far) return at_near;
    const float line = between(width, near, at_near, far, plain_at(c, far));
    return fmaxf(line, at_near * fminf(1, (float)WIDTH[width] / (float)WIDTH[near]));
}

/* A step of all nets: as known, or on the line between known neighbours, or beyond them. 0: nothing is known. */
static float plain_cost(const rast_costs *c, size_t width) {
    if (plain_at(c, width) > 0) return plain_at(c, width);
    const size_t lo = next_known(c, width, 0), hi = next_known(c, width, 1);
    if (lo == width) return hi == width ? 0 : fminf(beyond(c, width, hi, next_known(c, hi, 1)), plain_at(c, hi));
    if (hi == width) return beyond(c, width, lo, next_known(c, lo, 0));
    return between(width, lo, plain_at(c, lo), hi, plain_at(c, hi));
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

int rast_costs_doubt(const rast_costs *c, rast_pace_kind kind, size_t rows) {
    const rast_cost *known = &c->step[kind][rast_costs_width(rows)];
    return known->times <= EARLY || fabsf(known->off) > FAR;
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

/* The mean of the first two times; but if they are too far apart, one was disturbed, and the other counts. */
static void begin_cost(rast_cost *known, float now) {
    const float least = fminf(known->cost, now), most = fmaxf(known->cost, now);
    known->cost = known->times == 1 ? now : most > APART * least ? least : (least + most) / 2;
}

void rast_costs_learn(rast_costs *c, rast_pace_kind kind, size_t rows, float seconds) {
    const size_t width = rast_costs_width(rows);
    rast_cost *known = &c->step[kind][width];
    const float now = seconds / c->slowness;
    if (!(now > 0)) return;
    if (known->times >= CERTAIN && !is_known(c, kind, width)) known->times = 0;
    known->at = c->used;
    if (known->times <= EARLY) known->times++;
    if (known->times <= CERTAIN) {
        begin_cost(known, now);
        return;
    }
    const float off = fminf(fmaxf(now / known->cost - 1, -MOST), MOST);
    known->off = off;
    if (known->times <= EARLY) {
        known->cost *= expf(off / (float)known->times);
        return;
    }
    c->slowness *= expf(TO_SLOWNESS[kind] * off);
    known->cost *= expf(TO_COST[kind] * off);
}
