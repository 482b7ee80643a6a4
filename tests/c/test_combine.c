/* test_combine.c: the fused transfer step of the CPU backend against a naive reference, on every ISA of this machine.
 *
 * Each case is a random scene (models, vocabularies, requests). It first runs with all rows and statistics asked for: the
 * models' logits are compared with products in double precision, and everything after them with a reference that starts
 * from these logits and sorts, sums and draws in the plainest way. Then the same scene runs without rows, with other
 * thread counts, from saved logits, and one sequence at a time, and must give the same bits.
 */
#include "../../csrc/backends/cpu/draw.h"
#include "check.h"

#include <inttypes.h>
#include <string.h>

enum { MAX_TERMS = 5, K = 40, SLOTS = 8, MASKS = 3, MAX_UNCOMMON = 40 };
enum { ALL_ROWS = RAST_DRAW_LOGITS | RAST_DRAW_SCORES | RAST_DRAW_PARTS };

/* Begins a scene. */
static void set_seed(uint64_t seed) {
    static char text[32];
    snprintf(text, sizeof text, "seed %" PRIu64, seed);
    checking = text;
    rng_state = seed;
}

static float normal(void) {
    double s = 0;
    for (int i = 0; i < 12; i++) s += (double)(rng() >> 11) * 0x1p-53;
    return (float)(s - 6);
}

/* ---- scenes ------------------------------------------------------------------------------------------------------ */

typedef struct {
    size_t n_terms, n_out, n_vocab, n_valid, words;
    int flat; /* all logits nearly equal: the draw is all that counts */
    rast_term term[MAX_TERMS];
    rast_weight head[MAX_TERMS];
    void *weight[MAX_TERMS], *hidden[MAX_TERMS];
    float *saved[MAX_TERMS];
    int32_t uncommon[MAX_TERMS][MAX_UNCOMMON];
    float *coef;
    rast_draw *draw;
    uint32_t *history, *allowed;
} scene;

typedef struct {
    rast_drawn *out;
    int32_t drawn[SLOTS];
    float *logits, *scores, *parts;
} result;

static int ascending(const void *a, const void *b) { return *(const int32_t *)a - *(const int32_t *)b; }

static void make_uncommon(scene *s, size_t m) {
    int32_t *ids = s->uncommon[m], n = 0;
    for (size_t i = 0; i < MAX_UNCOMMON; i++) ids[i] = (int32_t)below((size_t)s->term[m].n_rows);
    qsort(ids, MAX_UNCOMMON, sizeof *ids, ascending);
    for (size_t i = 0, count = 1 + below(MAX_UNCOMMON); i < count; i++)
        if (!n || ids[i] != ids[n - 1]) ids[n++] = ids[i];
    s->term[m].uncommon = ids;
    s->term[m].n_uncommon = n;
}

static void make_term(scene *s, size_t m, const cpu_kernels *k) {
    static const int types[][2] = {{RAST_F32, RAST_F32}, {RAST_BF16, RAST_BF16}, {RAST_BF16, RAST_F32},
                                   {RAST_F16, RAST_F16}, {RAST_F16, RAST_F32},   {RAST_F16, RAST_BF16},
                                   {RAST_F32, RAST_BF16}};
    size_t pair = below(sizeof types / sizeof *types);
    if (!k->dot[types[pair][0]][types[pair][1]]) pair = 0;
    const int w_type = types[pair][0], x_type = types[pair][1];
    rast_term *t = &s->term[m];
    const size_t rows = m == 0 || chance(0.5) ? s->n_vocab : s->n_vocab / 2 + below(s->n_vocab) + 1;
    t->n_rows = (int32_t)rows;

    if (s->flat || chance(0.25)) { /* saved, with many ties */
        s->saved[m] = zeroed(s->n_out * s->n_vocab, sizeof(float));
        for (size_t i = 0; i < s->n_out * s->n_vocab; i++)
            s->saved[m][i] = i % s->n_vocab < rows ? rintf(normal() * (s->flat ? 1 : 6)) / 2 : -INFINITY;
        t->saved = (rast_dev)s->saved[m];
    } else {
        const size_t n_w = rows * K, n_x = s->n_out * K;
        float *w = zeroed(n_w, sizeof *w), *x = zeroed(n_x, sizeof *x);
        for (size_t i = 0; i < n_w; i++) w[i] = normal() * 0.5f;
        for (size_t i = 0; i < n_x; i++) x[i] = normal();
        s->weight[m] = zeroed(n_w, 4);
        s->hidden[m] = zeroed(n_x, 4);
        k->store(w, s->weight[m], n_w, w_type);
        k->store(x, s->hidden[m], n_x, x_type);
        s->head[m] = (rast_weight){.data = (rast_dev)s->weight[m],
                                   .out = (int32_t)rows,
                                   .in = K,
                                   .type = w_type,
                                   .stride = K * (w_type == RAST_F32 ? 4u : 2u)};
        t->head = &s->head[m];
        t->hidden = (rast_dev)s->hidden[m];
        t->hidden_type = x_type;
        free(w);
        free(x);
    }
    if (m > 0 && chance(0.4)) make_uncommon(s, m);
}

static void make_draw(scene *s, size_t o) {
    rast_draw *d = &s->draw[o];
    *d = (rast_draw){
        .temperature = 1, .top_p = 1, .repetition_penalty = 1, .target = -1, .slot = -1, .draft = -1, .mask = -1};
    d->stream = rng();
    d->position = (uint32_t)below(4096);
    if (chance(0.75)) d->flags |= RAST_DRAW_SAMPLE;
    if (chance(0.5)) d->temperature = 0.3f + 0.1f * (float)below(15);
    if (chance(0.3)) d->top_k = (int32_t)(1 + below(chance(0.8) ? 60 : 2 * s->n_vocab));
    if (chance(0.3)) d->top_p = 0.05f + 0.05f * (float)below(19);
    if (chance(0.2)) d->min_p = 0.05f * (float)below(21);
    if (chance(0.4)) d->repetition_penalty = 0.7f + 0.1f * (float)below(9);
    if (chance(0.3)) d->mask = (int32_t)below(MASKS);
    if (chance(0.15))
        d->target = (int32_t)below(s->n_vocab);
    else if (chance(0.1))
        d->target = -2;
    if (o < SLOTS * 4) { /* runs of up to four outputs of one slot: the last draw and drafts */
        d->slot = (int32_t)(o / 4);
        if (o % 4) d->draft = (int32_t)below(s->n_vocab);
    }
}

static void make_scene(scene *s, uint64_t seed, const cpu_kernels *k) {
    static const size_t vocabs[] = {1, 2, 5, 31, 127, 128, 129, 1000, 1024, 1025, 2531, 5003};
    set_seed(seed);
    *s = (scene){.n_terms = 1 + below(MAX_TERMS), .n_vocab = vocabs[below(sizeof vocabs / sizeof *vocabs)]};
    s->n_out = chance(0.05) && s->n_vocab < 1100 ? 120 + below(150) : 1 + below(12);
    s->flat = chance(0.1);
    s->n_valid = chance(0.5) ? s->n_vocab : s->n_vocab / 2 + 1;
    s->words = (s->n_vocab + 31) / 32;
    s->coef = zeroed(s->n_out * s->n_terms, sizeof *s->coef);
    s->draw = zeroed(s->n_out, sizeof *s->draw);
    s->history = zeroed(SLOTS * s->words, sizeof *s->history);
    s->allowed = zeroed(MASKS * s->words, sizeof *s->allowed);
    for (size_t m = 0; m < s->n_terms; m++) make_term(s, m, k);
    for (size_t o = 0; o < s->n_out; o++) {
        make_draw(s, o);
        for (size_t m = 0; m < s->n_terms; m++) {
            float *c = &s->coef[o * s->n_terms + m];
            *c = m == 0 ? 1 : (m % 2 ? 0.5f : -0.5f) * (float)(1 + below(3));
            if (m > 0 && chance(0.3)) { /* switched off: must not matter, even as NaN */
                *c = 0;
                const float nan_row[K] = {NAN};
                if (s->hidden[m])
                    k->store(nan_row, (char *)s->hidden[m] + o * K * (s->term[m].hidden_type == RAST_F32 ? 4u : 2u), K,
                             s->term[m].hidden_type);
            }
        }
    }
    for (size_t i = 0; i < SLOTS * s->words; i++) s->history[i] = (uint32_t)(rng() & rng() & rng());
    for (size_t i = 0; i < MASKS * s->words; i++)
        s->allowed[i] = (uint32_t)(i < s->words ? rng() : rng() | rng() | rng());
}

static void free_scene(scene *s) {
    for (size_t m = 0; m < s->n_terms; m++) {
        free(s->weight[m]);
        free(s->hidden[m]);
        free(s->saved[m]);
    }
    free(s->coef);
    free(s->draw);
    free(s->history);
    free(s->allowed);
}

static result new_result(const scene *s) {
    const size_t n = s->n_out * s->n_vocab;
    return (result){.out = zeroed(s->n_out, sizeof(rast_drawn)),
                    .logits = zeroed(n, sizeof(float)),
                    .scores = zeroed(n, sizeof(float)),
                    .parts = zeroed(n * s->n_terms, sizeof(float))};
}

static void free_result(result *r) {
    free(r->out);
    free(r->logits);
    free(r->scores);
    free(r->parts);
}

/* Runs outputs o .. o + n - 1 with `flags` added to what the scene's draws ask for; results go to the same places of r. */
static void run(rast_ctx *ctx, const scene *s, size_t o, size_t n, uint32_t flags, const float *saved, result *r) {
    const rast_ops *ops = &rast_cpu_ops;
    const size_t rows = s->n_out * s->n_vocab;
    rast_term term[MAX_TERMS];
    float *saved_copy = NULL;
    rast_draw *draw = zeroed(n, sizeof *draw);
    rast_queue *q;
    rast_event event;
    rast_error err;

    for (size_t i = 0; i < n; i++) {
        draw[i] = s->draw[o + i];
        draw[i].flags |= flags;
        draw[i].logits_row = draw[i].scores_row = draw[i].parts_row = (int32_t)(o + i);
    }
    if (saved) { /* [n_out, n_terms, n_vocab] to [n_terms, n_out, n_vocab] */
        saved_copy = zeroed(rows * s->n_terms, sizeof(float));
        for (size_t i = 0; i < s->n_out * s->n_terms; i++)
            memcpy(saved_copy + (i % s->n_terms * s->n_out + i / s->n_terms) * s->n_vocab, saved + i * s->n_vocab,
                   s->n_vocab * sizeof(float));
    }
    for (size_t m = 0; m < s->n_terms; m++) {
        term[m] = s->term[m];
        if (saved) {
            term[m].hidden = 0;
            term[m].head = NULL;
            term[m].saved = (rast_dev)(saved_copy + (m * s->n_out + o) * s->n_vocab);
        } else if (term[m].saved) {
            term[m].saved += o * s->n_vocab * sizeof(float);
        } else {
            term[m].hidden += o * K * (term[m].hidden_type == RAST_F32 ? 4u : 2u);
        }
    }
    const rast_logits l = {.n_terms = (int32_t)s->n_terms,
                           .n_out = (int32_t)n,
                           .n_vocab = (int32_t)s->n_vocab,
                           .n_valid = (int32_t)s->n_valid,
                           .terms = term,
                           .coef = (rast_dev)(s->coef + o * s->n_terms),
                           .draw = (rast_dev)draw,
                           .history = (rast_dev)s->history,
                           .allowed = (rast_dev)s->allowed,
                           .history_words = (int32_t)s->words,
                           .out = (rast_dev)(r->out + o),
                           .drawn = (rast_dev)r->drawn,
                           .logits = (rast_dev)r->logits,
                           .scores = (rast_dev)r->scores,
                           .parts = (rast_dev)r->parts};
    CHECK(!ops->queue_new(ctx, &q, &err), "%s", err.message);
    CHECK(!ops->begin(q, 0), "begin");
    ops->combine(q, &l);
    CHECK(!ops->submit(q, &event, &err), "%s", err.message);
    CHECK(!ops->wait(ctx, event, &err), "%s", err.message);
    ops->queue_free(q);
    free(draw);
    free(saved_copy);
}

/* ---- reference --------------------------------------------------------------------------------------------------- */

static int bit(const uint32_t *bits, size_t i) { return (int)(bits[i / 32] >> i % 32 & 1); }

static size_t limit_of(const scene *s, size_t o) {
    size_t limit = s->n_valid;
    for (size_t m = 0; m < s->n_terms; m++)
        if (s->coef[o * s->n_terms + m] != 0 && (size_t)s->term[m].n_rows < limit) limit = (size_t)s->term[m].n_rows;
    return limit;
}

static int is_uncommon(const scene *s, size_t o, size_t v) {
    for (size_t m = 1; m < s->n_terms; m++)
        for (int32_t i = 0; s->coef[o * s->n_terms + m] != 0 && i < s->term[m].n_uncommon; i++)
            if ((size_t)s->uncommon[m][i] == v) return 1;
    return 0;
}

static double log_sum_exp(const float *x, const uint8_t *use, size_t n) {
    double max = -INFINITY, sum = 0;
    for (size_t i = 0; i < n; i++)
        if (use[i] && (double)x[i] > max) max = (double)x[i];
    for (size_t i = 0; i < n; i++)
        if (use[i]) sum += exp((double)x[i] - max);
    return max == -INFINITY ? -INFINITY : max + log(sum);
}

static void check_parts(const scene *s, size_t o, const float *parts, const cpu_kernels *k) {
    for (size_t m = 0; m < s->n_terms; m++) {
        const float *part = parts + (o * s->n_terms + m) * s->n_vocab;
        const rast_term *t = &s->term[m];
        const int active = m == 0 || s->coef[o * s->n_terms + m] != 0;
        for (size_t v = 0; v < s->n_vocab; v++) {
            if (!active) {
                CHECK(isnan(part[v]), "output %zu term %zu id %zu: %g", o, m, v, (double)part[v]);
            } else if (v >= (size_t)t->n_rows) {
                CHECK(part[v] == -INFINITY, "output %zu term %zu id %zu: %g", o, m, v, (double)part[v]);
            } else if (t->saved) {
                CHECK(part[v] == s->saved[m][o * s->n_vocab + v], "output %zu term %zu id %zu", o, m, v);
            } else {
                float w[K], x[K];
                double sum = 0, size = 0;
                k->load((const char *)s->weight[m] + v * t->head->stride, w, K, t->head->type);
                k->load((const char *)s->hidden[m] + o * K * (t->hidden_type == RAST_F32 ? 4u : 2u), x, K,
                        t->hidden_type);
                for (size_t i = 0; i < K; i++)
                    sum += (double)w[i] * (double)x[i], size += fabs((double)w[i] * (double)x[i]);
                CHECK(fabs(sum - (double)part[v]) <= 1e-5 * size + 1e-30, "output %zu term %zu id %zu: %g, not %g", o,
                      m, v, (double)part[v], sum);
            }
        }
    }
}

static void check_logits(const scene *s, size_t o, const float *parts, const float *logits) {
    const size_t limit = limit_of(s, o);
    uint8_t *common = zeroed(s->n_vocab, 1);
    double lse[MAX_TERMS];
    for (size_t v = 0; v < limit; v++) common[v] = !is_uncommon(s, o, v);
    for (size_t m = 0; m < s->n_terms; m++) {
        lse[m] = log_sum_exp(parts + m * s->n_vocab, common, s->n_vocab);
        if (lse[m] == -INFINITY) lse[m] = 0;
    }
    for (size_t v = 0; v < s->n_vocab; v++) {
        double sum = 0;
        float exact = 0;
        for (size_t m = 0; m < s->n_terms; m++) {
            const float c = s->coef[o * s->n_terms + m];
            if (c == 0) continue;
            exact += c * parts[m * s->n_vocab + v];
            sum += (double)c * (m > 0 && v < limit && !common[v] ? lse[m] : (double)parts[m * s->n_vocab + v]);
        }
        if (v >= limit)
            CHECK(logits[v] == -INFINITY, "output %zu id %zu: %g", o, v, (double)logits[v]);
        else if (common[v])
            CHECK(logits[v] == exact, "output %zu id %zu: %.9g, not %.9g", o, v, (double)logits[v], (double)exact);
        else
            CHECK(fabs((double)logits[v] - sum) < 1e-4, "output %zu id %zu: %g, not %g", o, v, (double)logits[v], sum);
    }
    free(common);
}

/* Processed logits before the filters. */
static void process(const scene *s, size_t o, const float *logits, float *x) {
    const rast_draw *d = &s->draw[o];
    uint8_t *seen = zeroed(s->n_vocab, 1);
    if (d->slot >= 0) {
        for (size_t v = 0; v < s->n_vocab; v++) seen[v] = (uint8_t)bit(s->history + (size_t)d->slot * s->words, v);
        for (size_t p = o; s->draw[p].draft >= 0; p--) seen[s->draw[p].draft] = 1;
    }
    for (size_t v = 0; v < s->n_vocab; v++) {
        x[v] = logits[v];
        if (seen[v]) x[v] = x[v] > 0 ? x[v] / d->repetition_penalty : x[v] * d->repetition_penalty;
        if (d->mask >= 0 && !bit(s->allowed + (size_t)d->mask * s->words, v)) x[v] = -INFINITY;
        if (d->flags & RAST_DRAW_SAMPLE) x[v] /= d->temperature;
    }
    free(seen);
}

typedef struct {
    float x;
    size_t id;
} entry;

static int by_logit(const void *a, const void *b) {
    const entry *p = a, *q = b;
    return p->x != q->x ? (p->x < q->x ? -1 : 1) : (p->id > q->id) - (p->id < q->id);
}

/* HuggingFace's warpers. keep[v]: 1 stays, 0 goes, 2: so near to the boundary that rounding decides; equal logits share
 * one fate. */
static void filter(const rast_draw *d, const float *x, size_t n_vocab, uint8_t *keep) {
    entry *e = zeroed(n_vocab, sizeof *e);
    size_t n = 0, lo = 0;
    for (size_t v = 0; v < n_vocab; v++)
        if (x[v] > -INFINITY) e[n++] = (entry){x[v], v};
    memset(keep, 0, n_vocab);
    qsort(e, n, sizeof *e, by_logit);
    if (d->top_k > 0 && (size_t)d->top_k < n)
        for (lo = n - (size_t)d->top_k; lo > 0 && e[lo - 1].x == e[lo].x; lo--) {}
    for (size_t i = lo; i < n; i++) keep[e[i].id] = 1;
    double total = 0, sum = 0;
    for (size_t i = lo; i < n; i++) total += exp((double)(e[i].x - e[n - 1].x));
    for (size_t i = lo; i < n && d->top_p < 1;) {
        size_t end = i;
        for (; end < n && e[end].x == e[i].x; end++) sum += exp((double)(e[end].x - e[n - 1].x)) / total;
        const double slack = sum - (1 - (double)d->top_p);
        for (; i < end; i++) keep[e[i].id] = end == n ? 1 : fabs(slack) < 1e-6 ? 2 : slack > 0;
    }
    for (size_t i = lo; i < n && d->min_p > 0 && e[i].x < e[n - 1].x; i++) {
        const double slack = exp((double)(e[i].x - e[n - 1].x)) - (double)d->min_p;
        if (keep[e[i].id]) keep[e[i].id] = fabs(slack) < 1e-6 ? 2 : slack < 0 ? 0 : keep[e[i].id];
    }
    free(e);
}

static int32_t draw_token(const rast_draw *d, const float *scores, size_t n) {
    double best = -INFINITY;
    int32_t token = -1;
    for (size_t v = 0; v < n; v++) {
        uint32_t r[4];
        rast_philox(d->stream, (uint32_t)v / 4, d->position, r);
        const double key = (double)scores[v] + (d->flags & RAST_DRAW_SAMPLE ? rast_gumbel(r[v % 4]) : 0);
        if (key > best) best = key, token = (int32_t)v;
    }
    return token;
}

static void check_scores(const scene *s, size_t o, const float *logits, const float *scores) {
    const rast_draw *d = &s->draw[o];
    float *x = zeroed(s->n_vocab, sizeof *x);
    uint8_t *keep = zeroed(s->n_vocab, 1);
    process(s, o, logits, x);
    if (d->flags & RAST_DRAW_SAMPLE)
        filter(d, x, s->n_vocab, keep);
    else
        memset(keep, 1, s->n_vocab);
    for (size_t v = 0; v < s->n_vocab; v++) {
        const int same = scores[v] == x[v];
        CHECK(keep[v] == 1   ? same
              : keep[v] == 0 ? scores[v] == -INFINITY
                             : same || scores[v] == -INFINITY,
              "output %zu id %zu: score %g, processed %g, keep %d (top_k %d top_p %g min_p %g)", o, v,
              (double)scores[v], (double)x[v], keep[v], d->top_k, (double)d->top_p, (double)d->min_p);
    }
    free(x);
    free(keep);
}

static int close_to(double x, double y, double tolerance) {
    return x == y || (isnan(x) && isnan(y)) || fabs(x - y) <= tolerance * (1 + fabs(y));
}

static void check_drawn(const scene *s, size_t o, const result *r) {
    const rast_draw *d = &s->draw[o];
    const rast_drawn *out = &r->out[o];
    const float *logits = r->logits + o * s->n_vocab, *base = r->parts + o * s->n_terms * s->n_vocab;
    const size_t limit = limit_of(s, o);
    uint8_t *use = zeroed(s->n_vocab, 1);
    double kl = 0, logprob = NAN, base_logprob = NAN;
    int32_t base_token = -1;

    const int32_t token = d->target == -2  ? -1
                          : d->target >= 0 ? d->target
                                           : draw_token(d, r->scores + o * s->n_vocab, s->n_vocab);
    CHECK(out->token == token, "output %zu: token %d, not %d", o, out->token, token);
    CHECK(out->bad == (d->target == -1 && token < 0 ? -2 : -1), "output %zu: bad %d", o, out->bad);
    memset(use, 1, limit);
    const double lse = log_sum_exp(logits, use, s->n_vocab);
    memset(use, 1, s->n_valid);
    const double base_lse = log_sum_exp(base, use, s->n_vocab);
    for (size_t v = 0; v < limit; v++) {
        kl += exp((double)logits[v] - lse) * ((double)logits[v] - lse - ((double)base[v] - base_lse));
        if (base_token < 0 || base[v] > base[base_token]) base_token = (int32_t)v;
    }
    if (token >= 0) {
        logprob = (double)logits[token] - lse;
        base_logprob = (size_t)token < s->n_valid ? (double)base[token] - base_lse : -INFINITY;
    }
    CHECK(close_to((double)out->logprob, logprob, 1e-5), "output %zu: %g, not %g", o, (double)out->logprob, logprob);
    CHECK(close_to((double)out->stats.base_logprob, base_logprob, 1e-5), "output %zu: %g, not %g", o,
          (double)out->stats.base_logprob, base_logprob);
    CHECK(out->stats.kl >= 0 && close_to((double)out->stats.kl, kl, 3e-5), "output %zu: %g, not %g", o,
          (double)out->stats.kl, kl);
    CHECK(out->stats.base_token == base_token, "output %zu: %d, not %d", o, out->stats.base_token, base_token);
    free(use);
}

/* ---- cases ------------------------------------------------------------------------------------------------------- */

static void check_same(const scene *s, const result *a, const result *b, const char *what) {
    for (size_t o = 0; o < s->n_out; o++)
        CHECK(!memcmp(&a->out[o], &b->out[o], sizeof a->out[o]),
              "output %zu differs %s: tokens %d and %d, bad %d and %d", o, what, a->out[o].token, b->out[o].token,
              a->out[o].bad, b->out[o].bad);
    CHECK(!memcmp(a->drawn, b->drawn, sizeof a->drawn), "drawn differs %s", what);
}

static void check_rows(const scene *s, const result *a, const result *b, const char *what) {
    const size_t n = s->n_out * s->n_vocab * sizeof(float);
    CHECK(!memcmp(a->logits, b->logits, n), "logits differ %s", what);
    CHECK(!memcmp(a->scores, b->scores, n), "scores differ %s", what);
}

static void test_scene(rast_ctx *one, rast_ctx *many, const cpu_kernels *k, uint64_t seed) {
    const uint32_t measure = RAST_DRAW_LOGPROB | RAST_DRAW_STATS;
    scene s;
    make_scene(&s, seed, k);
    result all = new_result(&s), r;
    run(one, &s, 0, s.n_out, ALL_ROWS | measure, NULL, &all);
    for (size_t o = 0; o < s.n_out; o++) {
        check_parts(&s, o, all.parts, k);
        check_logits(&s, o, all.parts + o * s.n_terms * s.n_vocab, all.logits + o * s.n_vocab);
        check_scores(&s, o, all.logits + o * s.n_vocab, all.scores + o * s.n_vocab);
        check_drawn(&s, o, &all);
        const int32_t slot = s.draw[o].slot;
        const int last = slot >= 0 && (o + 1 == s.n_out || s.draw[o + 1].slot != slot);
        if (last && all.out[o].token >= 0) CHECK(all.drawn[slot] == all.out[o].token, "slot %d", slot);
    }

    r = new_result(&s);
    run(one, &s, 0, s.n_out, measure, NULL, &r);
    check_same(&s, &all, &r, "without rows");
    free_result(&r);
    r = new_result(&s);
    run(many, &s, 0, s.n_out, ALL_ROWS | measure, all.parts, &r);
    check_same(&s, &all, &r, "from saved logits");
    check_rows(&s, &all, &r, "from saved logits");
    free_result(&r);
    r = new_result(&s);
    for (size_t o = 0, n; o < s.n_out; o += n) {
        for (n = 1; o + n < s.n_out && s.draw[o + n].draft >= 0; n++) {}
        run(many, &s, o, n, measure, NULL, &r);
    }
    check_same(&s, &all, &r, "alone");
    free_result(&r);
    r = new_result(&s);
    run(many, &s, 0, s.n_out, 0, NULL, &r);
    for (size_t o = 0; o < s.n_out; o++) {
        CHECK(r.out[o].token == all.out[o].token, "output %zu: token %d", o, r.out[o].token);
        CHECK(isnan(r.out[o].logprob) && isnan(r.out[o].stats.kl), "output %zu: statistics that nobody wants", o);
    }
    free_result(&r);
    free_result(&all);
    free_scene(&s);
}

/* NaN or Inf in terms that count is reported for that output alone, with the first such term. */
static void test_bad(rast_ctx *ctx, const cpu_kernels *k, uint64_t seed) {
    const float values[] = {NAN, INFINITY, -INFINITY};
    scene s;
    make_scene(&s, seed, k);
    result good = new_result(&s), bad = new_result(&s), rows = new_result(&s);
    run(ctx, &s, 0, s.n_out, ALL_ROWS, NULL, &rows);
    run(ctx, &s, 0, s.n_out, 0, rows.parts, &good);
    const size_t o = below(s.n_out);
    int32_t first = -1;
    for (int i = 0; i < 2; i++) {
        const size_t m = below(s.n_terms);
        const size_t n = (size_t)s.term[m].n_rows < s.n_vocab ? (size_t)s.term[m].n_rows : s.n_vocab;
        rows.parts[(o * s.n_terms + m) * s.n_vocab + below(n)] = values[below(3)];
        if (s.coef[o * s.n_terms + m] != 0 && (first < 0 || (int32_t)m < first)) first = (int32_t)m;
    }
    run(ctx, &s, 0, s.n_out, 0, rows.parts, &bad);
    for (size_t p = 0; p < s.n_out; p++) {
        const int hit = p == o && first >= 0;
        CHECK(bad.out[p].bad == (hit ? first : good.out[p].bad), "output %zu: bad %d", p, bad.out[p].bad);
        CHECK(bad.out[p].token == (hit ? -1 : good.out[p].token), "output %zu: token %d", p, bad.out[p].token);
    }
    free_result(&good);
    free_result(&bad);
    free_result(&rows);
    free_scene(&s);
}

/* A base with coefficient 0 is still measured, and its NaN is nobody's error. */
static void test_base_off(rast_ctx *ctx, const cpu_kernels *k, uint64_t seed) {
    scene s;
    make_scene(&s, seed, k);
    if (s.n_terms > 1) {
        for (size_t o = 0; o < s.n_out; o++) {
            s.coef[o * s.n_terms] = 0;
            s.coef[o * s.n_terms + 1] = 1;
            s.draw[o].target = 0;
        }
        result r = new_result(&s), nan = new_result(&s);
        run(ctx, &s, 0, s.n_out, ALL_ROWS | RAST_DRAW_LOGPROB | RAST_DRAW_STATS, NULL, &r);
        for (size_t o = 0; o < s.n_out; o++)
            for (size_t v = 0; v < s.n_vocab; v++) r.parts[o * s.n_terms * s.n_vocab + v] = NAN;
        run(ctx, &s, 0, s.n_out, RAST_DRAW_LOGPROB, r.parts, &nan);
        for (size_t o = 0; o < s.n_out; o++) {
            if (r.out[o].bad >= 0) continue; /* term 1 was switched off with NaN */
            CHECK(r.out[o].stats.base_token >= 0, "output %zu", o);
            CHECK(nan.out[o].bad == -1 && nan.out[o].logprob == r.out[o].logprob, "output %zu: %g, not %g", o,
                  (double)nan.out[o].logprob, (double)r.out[o].logprob);
        }
        free_result(&r);
        free_result(&nan);
    }
    free_scene(&s);
}

/* The bounds that spare logarithms and whole tiles never change the draw. */
static void test_draw(const cpu_kernels *k, uint64_t seed) {
    enum { TILES = 8 };
    float x[TILES * DRAW_TILE];
    set_seed(seed);
    const float scale = 0.5f * (float)below(8);
    for (size_t i = 0; i < TILES * DRAW_TILE; i++) x[i] = chance(0.05) ? -INFINITY : scale * normal();
    for (uint32_t position = 0; position < 8; position++) {
        const rast_draw d = {.flags = RAST_DRAW_SAMPLE, .stream = rng(), .position = position};
        draw_best best = {-INFINITY, -1};
        for (size_t t = 0; t < TILES; t++)
            draw_tile(k, &d, t * DRAW_TILE, x + t * DRAW_TILE, draw_tile_max(x + t * DRAW_TILE), &best);
        CHECK(best.id == draw_token(&d, x, TILES * DRAW_TILE), "position %u: %d", position, best.id);
    }
}

int main(int argc, char **argv) {
    const uint64_t n_seeds = argc > 1 ? strtoull(argv[1], NULL, 10) : 80;
    const cpu_kernels *kernels[8];
    const size_t n = cpu_kernels_available(kernels);
    for (size_t i = 0; i < n; i++) {
        rast_ctx *one, *many;
        rast_error err;
        rast_device device = {.n_threads = 1, .isa = kernels[i]->name};
        CHECK(!rast_cpu_ops.open(&device, &one, &err), "%s", err.message);
        device.n_threads = 3;
        CHECK(!rast_cpu_ops.open(&device, &many, &err), "%s", err.message);
        for (uint64_t seed = 1; seed <= n_seeds; seed++) {
            test_scene(one, many, kernels[i], seed);
            test_bad(many, kernels[i], seed);
            test_base_off(one, kernels[i], seed);
            test_draw(kernels[i], seed);
        }
        rast_cpu_ops.close(one);
        rast_cpu_ops.close(many);
        printf("combine, %s: %llu scenes\n", kernels[i]->name, (unsigned long long)n_seeds);
    }
    return 0;
}
