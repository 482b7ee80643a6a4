/* attention.c: rope, KV cache and attention.
 *
 * K lies transposed in a block, [kv head][head_dim][32 tokens], V as [kv head][32 tokens][head_dim]: the lanes of a score are
 * keys, those of an output are dimensions, and no sum runs across lanes but the softmax's.
 *
 * A row's keys are taken in segments of 256 absolute positions. Each gives a partial result of its own, and these are merged
 * in order: the same roundings whether one thread does all segments of a row or several share them. A unit is a few rows, which
 * go through each segment together: what they have in common of it, a prompt's own keys or a shared prefix, is read once.
 */
#include <math.h>
#include <string.h>

#include "ops.h"

enum {
    SEGMENT_BLOCKS = CPU_SEGMENT / RAST_BLOCK_TOKENS,
    TILE_QUERIES = CPU_ATTEND_ROWS, /* that one call of a kernel takes; more where a row has more */
    UNIT_QUERIES = 24,              /* that go through a segment after each other, while it stays in the cache */
    FEW_UNITS = 8,                  /* units a thread below which rows go alone, and then segments of a row */
};

typedef struct {
    const cpu_kernels *k;
    rast_pass pass;
    rast_kv kv;
    rast_dev q, new_k, new_v, table, y;
    int32_t interleaved;
    size_t window;
    float scale;
    size_t tile_rows, unit_rows; /* of a call of the kernel; of a unit */
    float *partial;    /* [units, n_segments, unit_rows, row_floats], or NULL: a unit's segments are taken together */
    size_t n_segments; /* of the longest context */
} attention_args;

static size_t group_of(const rast_kv *kv) { return (size_t)kv->n_heads / (size_t)kv->n_kv_heads; }

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* A row's result of one K/V head, partial or whole: m [group], l [group], acc [group, head_dim]. */
static size_t row_floats(const rast_kv *kv) { return cpu_partial_floats(group_of(kv), (size_t)kv->head_dim); }

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
    const size_t n = (size_t)cpu_ints(pass->count)[RAST_OF_ROWS] * (size_t)pass->n_models;
    const size_t width = (size_t)(kv->n_heads + 2 * kv->n_kv_heads) * (size_t)kv->head_dim;
    cpu_record_small(q, rope_unit, n, n * width, &a, sizeof a, (size_t)kv->head_dim * sizeof(float));
}

/* ---- attention ----------------------------------------------------------------------------------------------------- */

typedef struct { /* a K/V head of a model and the rows [first, first + n) of the pass */
    size_t model, head, first, n;
} place;

static size_t n_rows_of(const attention_args *a) { return (size_t)cpu_ints(a->pass.count)[RAST_OF_ROWS]; }

static place place_of(const attention_args *a, size_t unit) {
    const size_t n_rows = n_rows_of(a), n_kv = (size_t)a->kv.n_kv_heads;
    const size_t n_chunks = (n_rows + a->unit_rows - 1) / a->unit_rows; /* those of a head follow each other */
    const size_t first = unit % n_chunks * a->unit_rows;
    return (place){unit / n_chunks / n_kv, unit / n_chunks % n_kv, first, least(n_rows - first, a->unit_rows)};
}

static size_t row_at(const attention_args *a, const place *p, size_t r) {
    return p->model * (size_t)a->pass.cap_rows + p->first + r;
}

typedef struct { /* keys that a row sees: [lo, hi) */
    size_t lo, hi;
} range;

static range range_of(const attention_args *a, const place *p, size_t r) {
    const size_t hi = (size_t)cpu_ints(a->pass.pos)[p->first + r] + 1;
    return (range){a->window && hi > a->window ? hi - a->window : 0, hi};
}

/* What row r sees of a segment; 0 if nothing. */
static int find_keys(const attention_args *a, const place *p, size_t r, size_t segment, cpu_keys *keys) {
    const rast_kv *kv = &a->kv;
    const size_t base = segment * CPU_SEGMENT, seg = (size_t)cpu_ints(a->pass.row_seg)[p->first + r];
    const size_t head = p->head * (size_t)kv->head_dim * RAST_BLOCK_TOKENS * cpu_type_bytes(kv->type);
    const range seen = range_of(a, p, r);
    if (seen.hi <= base || seen.lo >= base + CPU_SEGMENT) return 0;
    keys->lo = seen.lo > base ? seen.lo - base : 0;
    keys->hi = least(seen.hi - base, CPU_SEGMENT);
    for (size_t b = keys->lo / RAST_BLOCK_TOKENS; b * RAST_BLOCK_TOKENS < keys->hi; b++) {
        const uint8_t *block = block_of(a, p->model, seg, base + b * RAST_BLOCK_TOKENS);
        keys->k[b] = block + head;
        keys->v[b] = block + kv->v_offset + head;
    }
    return 1;
}

/* Leading blocks that row r has in common with the row before it. */
static size_t shared_blocks(const attention_args *a, const place *p, size_t r) {
    const int32_t *seg = cpu_ints(a->pass.row_seg) + p->first + r;
    if (seg[0] == seg[-1]) return SIZE_MAX;
    return a->pass.prefix_blocks ? (size_t)cpu_ints(a->pass.prefix_blocks)[seg[0]] : 0;
}

/* Room for the queries of a unit, and for a tile's scores; in floats. */
static size_t query_floats(const attention_args *a) { return a->unit_rows * group_of(&a->kv) * (size_t)a->kv.head_dim; }
static size_t score_floats(const attention_args *a) { return a->tile_rows * group_of(&a->kv) * CPU_SEGMENT; }

static void scale_queries(const attention_args *a, const place *p, float *q) {
    const size_t dim = (size_t)a->kv.head_dim, n = group_of(&a->kv) * dim;
    for (size_t r = 0; r < p->n; r++) {
        const float *row = (const float *)cpu_ptr(a->q) + row_at(a, p, r) * (size_t)a->kv.n_heads * dim + p->head * n;
        for (size_t i = 0; i < n; i++) q[r * n + i] = row[i] * a->scale;
    }
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

static void finish(const attention_args *a, const place *p, size_t r, float *total) {
    const rast_kv *kv = &a->kv;
    const size_t dim = (size_t)kv->head_dim, group = group_of(kv);
    const size_t at = (row_at(a, p, r) * (size_t)kv->n_heads + p->head * group) * dim;
    for (size_t h = 0; h < group; h++)
        for (size_t i = 0; i < dim; i++) total[2 * group + h * dim + i] /= total[group + h];
    a->k->store(total + 2 * group, (char *)cpu_ptr(a->y) + at * cpu_type_bytes(a->pass.act_type), group * dim,
                a->pass.act_type);
}

typedef struct {     /* a call of the kernel */
    size_t at;       /* unit * n_segments + segment */
    size_t first, n; /* rows [first, first + n) of the unit, which see something of the segment */
    size_t shared;   /* leading blocks of the segment that they have in common */
    place p;
    size_t from, to; /* the unit's rows see segments [from, to) */
    cpu_keys keys[CPU_ATTEND_ROWS];
} attend_call;

static void look_at_unit(const attention_args *a, attend_call *c, size_t unit) {
    c->p = place_of(a, unit);
    c->from = SIZE_MAX, c->to = 0;
    for (size_t r = 0; r < c->p.n; r++) {
        const range seen = range_of(a, &c->p, r);
        c->from = least(c->from, seen.lo / CPU_SEGMENT);
        if ((seen.hi - 1) / CPU_SEGMENT >= c->to) c->to = (seen.hi - 1) / CPU_SEGMENT + 1;
    }
}

/* The next call from c->at, c->first on; 0 if there is none before `end`. */
static int find_call(const attention_args *a, attend_call *c, size_t end) {
    size_t unit = SIZE_MAX;
    for (; c->at < end; c->at++, c->first = 0) {
        if (c->at / a->n_segments != unit) look_at_unit(a, c, unit = c->at / a->n_segments);
        const size_t segment = c->at - unit * a->n_segments, before = segment * SEGMENT_BLOCKS;
        if (segment >= c->to) {
            c->at = (unit + 1) * a->n_segments - 1;
            continue;
        }
        if (segment < c->from) {
            c->at += c->from - segment - 1;
            continue;
        }
        for (; c->first < c->p.n; c->first++) {
            size_t shared = SIZE_MAX;
            for (c->n = 0; c->n < a->tile_rows && c->first + c->n < c->p.n; c->n++) {
                if (!find_keys(a, &c->p, c->first + c->n, segment, &c->keys[c->n])) break;
                if (c->n) shared = least(shared, shared_blocks(a, &c->p, c->first + c->n));
            }
            c->shared = shared > before ? shared - before : 0;
            if (c->n) return 1;
        }
    }
    return 0;
}

/* The keys and values of a call, but for those that a row shares with the row before it. */
static void list_keys(const attention_args *a, const attend_call *c, cpu_fetch *list) {
    const size_t before = c->at % a->n_segments * SEGMENT_BLOCKS;
    size_t n_keys = 0;
    for (size_t v = 0; v < 2; v++)
        for (size_t r = 0; r < c->n; r++) {
            const cpu_keys *keys = &c->keys[r];
            const size_t shared = c->first + r ? shared_blocks(a, &c->p, c->first + r) : 0;
            size_t b = keys->lo / RAST_BLOCK_TOKENS;
            if (shared > before + b) b = least(shared - before, SEGMENT_BLOCKS);
            for (; b * RAST_BLOCK_TOKENS < keys->hi; b++) list->run[n_keys++] = v ? keys->v[b] : keys->k[b];
        }
    list->n_runs = n_keys;
    list->run_bytes = (size_t)a->kv.head_dim * RAST_BLOCK_TOKENS * cpu_type_bytes(a->kv.type);
}

static float *partial_at(const attention_args *a, size_t at) {
    return a->partial + at * a->unit_rows * row_floats(&a->kv);
}

/* Adds a call's rows to those of their unit, total: [unit_rows, row_floats]. some: scratch, [tile_rows, row_floats]. */
static void attend_rows(const attention_args *a, const attend_call *c, const cpu_fetch *next, const float *q,
                        float *scores, float *some, float *total) {
    const size_t floats = row_floats(&a->kv), group = group_of(&a->kv), dim = (size_t)a->kv.head_dim;
    const size_t segment = c->at % a->n_segments;
    size_t begin[CPU_ATTEND_ROWS], n_begin = 0; /* whether it is a row's first segment */
    for (size_t r = 0; r < c->n; r++)
        n_begin += begin[r] = a->partial || range_of(a, &c->p, c->first + r).lo / CPU_SEGMENT == segment;
    float *rows = total + c->first * floats, *out = n_begin == c->n ? rows : some;
    a->k->attend(q + c->first * group * dim, c->n, group, dim, c->keys, c->shared, a->kv.type, scores, out, next);
    for (size_t r = 0; r < c->n && out != rows; r++)
        if (begin[r])
            memcpy(rows + r * floats, some + r * floats, floats * sizeof *rows);
        else
            merge(rows + r * floats, some + r * floats, group, dim);
}

/* What comes next is fetched in small steps while a call computes: asked for at once, it would take longer than the call. */
static void attend_task(const void *args, size_t begin, size_t end, const cpu_worker *worker) {
    const attention_args *a = args;
    const size_t floats = row_floats(&a->kv),
                 each = a->partial ? 1 : a->n_segments; /* segments of a unit of the task */
    float *q = worker->scratch, *scores = q + query_floats(a), *some = scores + score_floats(a);
    float *own = some + a->tile_rows * floats;
    attend_call calls[2] = {{.at = begin * each}, {0}}, *now = &calls[0], *next = &calls[1];
    cpu_fetch list = {0};
    size_t unit = SIZE_MAX;
    for (int more = find_call(a, now, end * each); more && now->at < end * each;) {
        list.n_runs = 0;
        next->at = now->at, next->first = now->first + now->n;
        more = find_call(a, next, worker->soon * each);
        if (more) list_keys(a, next, &list);
        if (now->at / a->n_segments != unit) scale_queries(a, &now->p, q);
        unit = now->at / a->n_segments;
        attend_rows(a, now, &list, q, scores, some, a->partial ? partial_at(a, now->at) : own);
        if (!a->partial && (!more || next->at / a->n_segments != unit))
            for (size_t r = 0; r < now->p.n; r++) finish(a, &now->p, r, own + r * floats);
        attend_call *done = now;
        now = next, next = done;
    }
}

static void merge_unit(const void *args, size_t unit, const cpu_worker *worker) {
    const attention_args *a = args;
    const size_t floats = row_floats(&a->kv), group = group_of(&a->kv), dim = (size_t)a->kv.head_dim;
    const place p = place_of(a, unit);
    (void)worker;
    for (size_t r = 0; r < p.n; r++) {
        const range seen = range_of(a, &p, r);
        size_t s = seen.lo / CPU_SEGMENT;
        float *total = partial_at(a, unit * a->n_segments + s) + r * floats;
        while (++s * CPU_SEGMENT < seen.hi)
            merge(total, partial_at(a, unit * a->n_segments + s) + r * floats, group, dim);
        finish(a, &p, r, total);
    }
}

static size_t units_of(const attention_args *a) {
    return (n_rows_of(a) + a->unit_rows - 1) / a->unit_rows * (size_t)a->pass.n_models * (size_t)a->kv.n_kv_heads;
}

void cpu_attention(rast_queue *q, const rast_pass *pass, rast_dev query, const rast_kv *kv, int32_t window, float scale,
                   rast_dev y) {
    const size_t group = group_of(kv), floats = row_floats(kv), few = FEW_UNITS * (size_t)cpu_queue_threads(q);
    attention_args a = {.k = cpu_queue_kernels(q),
                        .pass = *pass,
                        .kv = *kv,
                        .q = query,
                        .y = y,
                        .window = (size_t)window,
                        .scale = scale};
    const size_t n_rows = n_rows_of(&a);
    size_t context = 0;
    if (n_rows == 0) return;
    for (int32_t s = 0; s < cpu_ints(pass->count)[1]; s++)
        if ((size_t)cpu_ints(pass->seg_ctx)[s] > context) context = (size_t)cpu_ints(pass->seg_ctx)[s];
    a.n_segments = (context + CPU_SEGMENT - 1) / CPU_SEGMENT;
    a.tile_rows = group < TILE_QUERIES ? TILE_QUERIES / group : 1;
    a.unit_rows = group < UNIT_QUERIES ? UNIT_QUERIES / group / a.tile_rows * a.tile_rows : 1;
    while (a.unit_rows > a.tile_rows && units_of(&a) < few) a.unit_rows -= a.tile_rows;
    const size_t n_chunks = (n_rows + a.unit_rows - 1) / a.unit_rows; /* of about equal size */
    a.unit_rows = ((n_rows + n_chunks - 1) / n_chunks + a.tile_rows - 1) / a.tile_rows * a.tile_rows;
    const size_t n_units = units_of(&a);
    const size_t room = (query_floats(&a) + score_floats(&a) + a.tile_rows * floats) * sizeof(float);
    if (cpu_queue_threads(q) > 1 && a.n_segments > 1 && n_units < few) {
        a.partial = cpu_temp(q, n_units * a.n_segments * a.unit_rows * floats * sizeof(float));
        if (!a.partial) return;
        cpu_record_pieces(q, attend_task, n_units * a.n_segments, CPU_PIECES, &a, sizeof a, room);
        cpu_record(q, merge_unit, n_units, &a, sizeof a, 0);
        return;
    }
    cpu_record_pieces(q, attend_task, n_units, CPU_PIECES, &a, sizeof a, room + a.unit_rows * floats * sizeof(float));
}
