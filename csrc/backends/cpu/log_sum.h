/* log_sum.h: sums of exponentials that can be merged: of the lanes of a span, then of spans in order. */
#ifndef RAST_CPU_LOG_SUM_H
#define RAST_CPU_LOG_SUM_H

#include "kernels.h"

#include <math.h>
#include <string.h>

typedef struct {
    double sum; /* of exp(l - max) */
    double dif; /* of exp(l - max) * (l - base) */
    float max;  /* -inf: nothing yet */
} log_sum;

static const log_sum LOG_SUM_EMPTY = {0, 0, -INFINITY};

static inline void cpu_stats_clear(cpu_stats *s) {
    memset(s, 0, sizeof *s);
    for (size_t i = 0; i < CPU_LANES; i++) s->max_t[i] = s->max_b[i] = -INFINITY;
}

/* The lanes of cpu_stats as one sum; dif may be NULL. */
static inline log_sum log_sum_of_lanes(const cpu_kernels *k, const float *max, const float *sum, const float *dif) {
    log_sum r = LOG_SUM_EMPTY;
    float below[CPU_LANES], scale[CPU_LANES];
    for (size_t i = 0; i < CPU_LANES; i++) r.max = max[i] > r.max ? max[i] : r.max;
    if (r.max == -INFINITY) return r;
    for (size_t i = 0; i < CPU_LANES; i++) below[i] = max[i] - r.max;
    k->exp(below, scale, CPU_LANES);
    for (size_t i = 0; i < CPU_LANES; i++) {
        r.sum += (double)scale[i] * (double)sum[i];
        if (dif) r.dif += (double)scale[i] * (double)dif[i];
    }
    return r;
}

static inline void log_sum_add(log_sum *a, log_sum b) {
    if (b.max == -INFINITY) return;
    const double scale = exp(-fabs((double)a->max - (double)b.max));
    log_sum *low = b.max > a->max ? a : &b;
    low->sum *= scale;
    low->dif *= scale;
    a->sum += b.sum;
    a->dif += b.dif;
    a->max = b.max > a->max ? b.max : a->max;
}

/* log of the sum of exp(l) */
static inline double log_sum_value(const log_sum *a) { return (double)a->max + log(a->sum); }

#endif
