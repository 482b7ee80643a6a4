/* attention.c: rope, KV cache and attention.
 *
 * K lies transposed in a block, [kv head][head_dim][32 tokens], V as [kv head][32 tokens][head_dim]: the lanes of a score are
 * keys, those of an output are dimensions, and no sum runs across lanes but the softmax's.
 *
 * A row's keys are taken in segments of 256 absolute positions. Each gives a partial result of its own, and these are merged
 * in order: the same roundings whether one thread does all segments of a row or several share them.
 */
#include <math.h>
#include <string.h>

#include "ops.h"

enum {
    SEGMENT = 256, /* keys */
    SEGMENT_BLOCKS = SEGMENT / RAST_BLOCK_TOKENS,
    FEW_UNITS = 8, /* units a thread below which segments of a row are shared out */
};

typedef struct {
    const cpu_kernels *k;
    rast_pass pass;
    rast_kv kv;
    rast_dev q, new_k, new_v, table, y;
    int32_t interleaved;
    size_t window;
    float scale;
    float *partial;    /* [units, n_segments, partial_floats], or NULL: a unit does its segments itself */
    size_t n_segments; /* of the longest context */
} attention_args;

static size_t group_of(const rast_kv *kv) { return (size_t)kv->n_heads / (size_t)kv->n_kv_heads; }

/* A partial result: m [group], l [group], acc [group, head_dim]. */
static size_t partial_floats(const rast_kv *kv) { return group_of(kv) * ((size_t)kv->head_dim + 2); }

static uint8_t *block_of(const attention_args *a, size_t model, size_t seg, size_t position) {
    const int32_t *blocks = cpu_ints(a->pass.block_table) + seg * (size_t)a->pass.table_stride;
    return (uint8_t *)cpu_ptr(a->kv.base[model]) + (size_t)blocks[position / RAST_BLOCK_TOKENS] * a->kv.block_stride;
}

/* ---- rope and cache ------------------------------------------------------------------------------------------------ */

static void rope_unit(const void *args, size_t unit, const cpu_worker *worker) {
    const attention_args *a = args;
    const rast_kv *kv = &a->kv;
    const size_t n_rows = (size_t)cpu_ints(a->pass.count)[RAST_OF_ROWS], m = unit / n_rows, r = unit % n_rows;
    const size_t dim = (size_t)kv->head_dim, size = cpu_type_bytes(kv->type), n_kv = (size_t)kv->n_kv_heads;
    const size_t row = m * (size_t)a->pass.cap_rows + r, p = (size_t)cpu_ints(a->pass.pos)[r];
    const float *angles = (const float *)cpu_ptr(a->table) + p * dim;
    uint8_t *block = block_of(a, m, (size_t)cpu_ints(a->pass.row_seg)[r], p);
    uint8_t *rounded = worker->scratch;
    const size_t slot = p % RAST_BLOCK_TOKENS;

    float *q = (float *)cpu_ptr(a->q) + row * (size_t)kv->n_heads * dim;
    for (size_t h = 0; h < (size_t)kv->n_heads; h++) a->k->rope(q + h * dim, angles, dim, a->interleaved);
    for (size_t h = 0; h < n_kv; h++) {
        float *k = (float *)cpu_ptr(a->new_k) + (row * n_kv + h) * dim;
        const float *v = (const float *)cpu_ptr(a->new_v) + (row * n_kv + h) * dim;
        uint8_t *k_out = block + h * dim * RAST_BLOCK_TOKENS * size + slot * size;
        a->k->rope(k, angles, dim, a->interleaved);
        a->k->store(k, rounded, dim, kv->type);
        if (size == 4)
            for (size_t i = 0; i < dim; i++) memcpy(k_out + i * RAST_BLOCK_TOKENS * 4, rounded + i * 4, 4);
        else
            for (size_t i = 0; i < dim; i++) memcpy(k_out + i * RAST_BLOCK_TOKENS * 2, rounded + i * 2, 2);
        a->k->store(v, block + kv->v_offset + (h * RAST_BLOCK_TOKENS + slot) * dim * size, dim, kv->type);
    }
}

void cpu_rope_kv(rast_queue *q, const rast_pass *pass, rast_dev query, rast_dev k, rast_dev v, rast_dev table,
                 int32_t interleaved, const rast_kv *kv) {
    const attention_args a = {.k = cpu_queue_kernels(q),
                              .pass = *pass,
                              .kv = *kv,
                              .q = query,
                              .new_k = k,
                              .new_v = v,
                              .table = table,
                              .interleaved = interleaved};
    cpu_record(q, rope_unit, (size_t)cpu_ints(pass->count)[RAST_OF_ROWS] * (size_t)pass->n_models, &a, sizeof a,
               (size_t)kv->head_dim * sizeof(float));
}

/* ---- attention ----------------------------------------------------------------------------------------------------- */

typedef struct { /* one row and K/V head of a model, and the keys it sees: [lo, hi) */
    size_t model, seg, head, row, lo, hi;
} place;

static place place_of(const attention_args *a, size_t unit) {
    const size_t n_rows = (size_t)cpu_ints(a->pass.count)[RAST_OF_ROWS], n_kv = (size_t)a->kv.n_kv_heads;
    const size_t r = unit % n_rows; /* rows of a head follow each other: they share keys */
    place p = {.model = unit / n_rows / n_kv, .head = unit / n_rows % n_kv, .hi = (size_t)cpu_ints(a->pass.pos)[r] + 1};
    p.seg = (size_t)cpu_ints(a->pass.row_seg)[r];
    p.row = p.model * (size_t)a->pass.cap_rows + r;
    p.lo = a->window && p.hi > a->window ? p.hi - a->window : 0;
    return p;
}

/* The partial result of one segment; 0 if the row sees no key in it. q: room for the scaled queries. */
static int attend_segment(const attention_args *a, const place *p, size_t segment, float *q, float *partial) {
    const rast_kv *kv = &a->kv;
    const size_t base = segment * SEGMENT, lo = p->lo > base ? p->lo - base : 0;
    const size_t hi = p->hi < base + SEGMENT ? p->hi - base : SEGMENT;
    if (p->hi <= base || lo >= hi) return 0;
    const size_t dim = (size_t)kv->head_dim, group = group_of(kv), size = cpu_type_bytes(kv->type);
    const size_t head = p->head * dim * RAST_BLOCK_TOKENS * size;
    const void *k[SEGMENT_BLOCKS] = {NULL}, *v[SEGMENT_BLOCKS] = {NULL};
    for (size_t b = lo / RAST_BLOCK_TOKENS; b * RAST_BLOCK_TOKENS < hi; b++) {
        const uint8_t *block = block_of(a, p->model, p->seg, base + b * RAST_BLOCK_TOKENS);
        k[b] = block + head;
        v[b] = block + kv->v_offset + head;
    }
    const float *query = (const float *)cpu_ptr(a->q) + (p->row * (size_t)kv->n_heads + p->head * group) * dim;
    for (size_t i = 0; i < group * dim; i++) q[i] = query[i] * a->scale;
    a->k->attend(q, group, dim, k, v, kv->type, lo, hi, partial, partial + group, partial + 2 * group);
    return 1;
}

/* to += from */
static void merge(float *to, const float *from, size_t group, size_t dim) {
    for (size_t h = 0; h < group; h++) {
        const float m = to[h] > from[h] ? to[h] : from[h], keep = expf(to[h] - m), take = expf(from[h] - m);
        float *acc = to + 2 * group + h * dim;
        const float *more = from + 2 * group + h * dim;
        to[h] = m;
        to[group + h] = to[group + h] * keep + from[group + h] * take;
        for (size_t i = 0; i < dim; i++) acc[i] = acc[i] * keep + more[i] * take;
    }
}

static void finish(const attention_args *a, const place *p, float *total) {
    const rast_kv *kv = &a->kv;
    const size_t dim = (size_t)kv->head_dim, group = group_of(kv);
    const size_t at = (p->row * (size_t)kv->n_heads + p->head * group) * dim;
    for (size_t h = 0; h < group; h++)
        for (size_t i = 0; i < dim; i++) total[2 * group + h * dim + i] /= total[group + h];
    a->k->store(total + 2 * group, (char *)cpu_ptr(a->y) + at * cpu_type_bytes(a->pass.act_type), group * dim,
                a->pass.act_type);
}

static void row_unit(const void *args, size_t unit, const cpu_worker *worker) {
    const attention_args *a = args;
    const size_t floats = partial_floats(&a->kv), group = group_of(&a->kv), dim = (size_t)a->kv.head_dim;
    const place p = place_of(a, unit);
    float *total = worker->scratch, *partial = total + floats, *q = partial + floats;
    int any = 0;
    for (size_t s = p.lo / SEGMENT; s * SEGMENT < p.hi; s++) {
        if (!attend_segment(a, &p, s, q, any ? partial : total)) continue;
        if (any) merge(total, partial, group, dim);
        any = 1;
    }
    finish(a, &p, total);
}

static void segment_unit(const void *args, size_t unit, const cpu_worker *worker) {
    const attention_args *a = args;
    const place p = place_of(a, unit / a->n_segments);
    attend_segment(a, &p, unit % a->n_segments, worker->scratch, a->partial + unit * partial_floats(&a->kv));
}

static void merge_unit(const void *args, size_t unit, const cpu_worker *worker) {
    const attention_args *a = args;
    const size_t floats = partial_floats(&a->kv), group = group_of(&a->kv), dim = (size_t)a->kv.head_dim;
    const place p = place_of(a, unit);
    float *row = a->partial + unit * a->n_segments * floats, *total = row + p.lo / SEGMENT * floats;
    (void)worker;
    for (size_t s = p.lo / SEGMENT + 1; s * SEGMENT < p.hi; s++) merge(total, row + s * floats, group, dim);
    finish(a, &p, total);
}

void cpu_attention(rast_queue *q, const rast_pass *pass, rast_dev query, const rast_kv *kv, int32_t window, float scale,
                   rast_dev y) {
    const size_t n_units =
        (size_t)cpu_ints(pass->count)[RAST_OF_ROWS] * (size_t)pass->n_models * (size_t)kv->n_kv_heads;
    const size_t floats = partial_floats(kv), q_floats = group_of(kv) * (size_t)kv->head_dim;
    attention_args a = {.k = cpu_queue_kernels(q),
                        .pass = *pass,
                        .kv = *kv,
                        .q = query,
                        .y = y,
                        .window = (size_t)window,
                        .scale = scale};
    size_t context = 0;
    for (int32_t s = 0; s < cpu_ints(pass->count)[1]; s++)
        if ((size_t)cpu_ints(pass->seg_ctx)[s] > context) context = (size_t)cpu_ints(pass->seg_ctx)[s];
    a.n_segments = (context + SEGMENT - 1) / SEGMENT;
    const size_t threads = (size_t)cpu_queue_threads(q);
    if (threads > 1 && a.n_segments > 1 && n_units < FEW_UNITS * threads) {
        a.partial = cpu_temp(q, n_units * a.n_segments * floats * sizeof(float));
        if (!a.partial) return;
        cpu_record(q, segment_unit, n_units * a.n_segments, &a, sizeof a, q_floats * sizeof(float));
        cpu_record(q, merge_unit, n_units, &a, sizeof a, 0);
        return;
    }
    cpu_record(q, row_unit, n_units, &a, sizeof a, (2 * floats + q_floats) * sizeof(float));
}
