/* ops.c: the ops but attention: each a task over rows, or over blocks of weight rows. */
#include "ops.h"

#include <string.h>

enum {
    COPY_UNIT = 1 << 20,    /* bytes */
    MATMUL_UNIT = 1 << 16,  /* bytes of weights that one unit reads */
    FEW_ROWS = 4,           /* no more activation rows than these: the longer what is read in one go, the better */
    MANY_ROWS = 32,         /* more activation rows than these come from L3 for every unit: it had better be large, */
    LARGE_UNIT = 600 << 10, /* what stays in L2 beside them, */
    THREAD_UNITS = 4,       /* but so many units for each thread */
    MANY_MATMUL_ROWS = 96,  /* weight rows of a unit for more than a few activation rows, at most, */
    LEAST_ROWS = 24,        /* and at least: pieces of so many wait for each other's activations */
    BIAS_ROWS = 512,
    GLU_COST = 2, /* of a value, beside that of others */
    MAX_JOBS = 4,
};

typedef struct {
    const cpu_kernels *k;
    rast_pass pass;
    const rast_weight *const *w;
    rast_dev x, add, y;
    int32_t extent, dim, group, type;
    float eps;
} row_args; /* of ops that take rows one by one; a unit is a row of a model */

static int32_t n_of(const rast_pass *pass, int extent) { return cpu_ints(pass->count)[extent]; }
static size_t cap_of(const rast_pass *pass, int extent) {
    return (size_t)(extent == RAST_OF_ROWS ? pass->cap_rows : pass->cap_out);
}

/* Unit → model and row; returns the row's index in [n_models, cap]. */
static size_t row_of(const row_args *a, size_t unit, size_t *model, size_t *row) {
    const size_t n = (size_t)n_of(&a->pass, a->extent);
    *model = unit / n;
    *row = unit % n;
    return *model * cap_of(&a->pass, a->extent) + *row;
}

/* of `width` values each */
static void record_rows(rast_queue *q, cpu_task_fn fn, size_t width, row_args *a) {
    const size_t n = (size_t)n_of(&a->pass, a->extent) * (size_t)a->pass.n_models;
    a->k = cpu_queue_kernels(q);
    cpu_record_small(q, fn, n, n * width, a, sizeof *a, 0);
}

/* ---- copies -------------------------------------------------------------------------------------------------------- */

typedef struct {
    uint8_t *dst;
    const uint8_t *src;
    size_t bytes;
} copy_args;

static void copy_unit(const void *args, size_t unit, const cpu_worker *worker) {
    const copy_args *a = args;
    const size_t at = unit * COPY_UNIT, left = a->bytes - at;
    (void)worker;
    memcpy(a->dst + at, a->src + at, left < COPY_UNIT ? left : COPY_UNIT);
}

void cpu_copy(rast_queue *q, rast_dev dst, rast_dev src, size_t bytes, int kind) {
    const copy_args a = {cpu_ptr(dst), cpu_ptr(src), bytes};
    (void)kind; /* one memory */
    cpu_record(q, copy_unit, (bytes + COPY_UNIT - 1) / COPY_UNIT, &a, sizeof a, 0);
}

typedef struct {
    const rast_dev *base;
    size_t block_stride, n;
    const int32_t *pairs;
} copy_blocks_args;

static void copy_blocks_unit(const void *args, size_t unit, const cpu_worker *worker) {
    const copy_blocks_args *a = args;
    uint8_t *base = cpu_ptr(a->base[unit / a->n]);
    const int32_t *pair = a->pairs + unit % a->n * 2;
    (void)worker;
    memcpy(base + (size_t)pair[1] * a->block_stride, base + (size_t)pair[0] * a->block_stride, a->block_stride);
}

void cpu_copy_blocks(rast_queue *q, const rast_dev *base, int32_t n_models, size_t block_stride, rast_dev pairs,
                     int32_t n) {
    const copy_blocks_args a = {base, block_stride, (size_t)n, cpu_ints(pairs)};
    cpu_record(q, copy_blocks_unit, (size_t)n_models * (size_t)n, &a, sizeof a, 0);
}

/* ---- rows ---------------------------------------------------------------------------------------------------------- */

static void embed_unit(const void *args, size_t unit, const cpu_worker *worker) {
    const row_args *a = args;
    size_t m, r;
    const size_t at = row_of(a, unit, &m, &r);
    const rast_weight *w = a->w[m];
    int32_t token = cpu_ints(a->pass.token)[r];
    (void)worker;
    if (token < 0) token = cpu_ints(a->pass.drawn)[-1 - token];
    a->k->load_row(cpu_ptr(w->data), w->stride, (size_t)token, (float *)cpu_ptr(a->y) + at * (size_t)w->in,
                   (size_t)w->in, w->type);
}

void cpu_embed(rast_queue *q, const rast_pass *pass, const rast_weight *const *w, rast_dev y) {
    row_args a = {.pass = *pass, .w = w, .y = y};
    record_rows(q, embed_unit, (size_t)w[0]->in, &a);
}

static void norm_unit(const void *args, size_t unit, const cpu_worker *worker) {
    const row_args *a = args;
    size_t m, r;
    const size_t at = row_of(a, unit, &m, &r) * (size_t)a->dim, group = (size_t)a->group;
    float *x = (float *)cpu_ptr(a->x) + at;
    const float *add = a->add ? (const float *)cpu_ptr(a->add) + at : NULL;
    char *y = (char *)cpu_ptr(a->y) + at * cpu_type_bytes(a->type);
    (void)worker;
    for (size_t g = 0; g < (size_t)a->dim; g += group)
        a->k->norm(x + g, add ? add + g : NULL, cpu_ptr(a->w[m]->data), a->w[m]->type, group, a->eps,
                   y + g * cpu_type_bytes(a->type), a->type);
}

void cpu_norm(rast_queue *q, const rast_pass *pass, int extent, rast_dev x, rast_dev add, const rast_weight *const *w,
              int32_t dim, int32_t group, float eps, rast_dev y, int32_t y_type) {
    row_args a = {.pass = *pass,
                  .w = w,
                  .x = x,
                  .add = add,
                  .y = y,
                  .extent = extent,
                  .dim = dim,
                  .group = group,
                  .type = y_type,
                  .eps = eps};
    record_rows(q, norm_unit, (size_t)dim, &a);
}

static void glu_unit(const void *args, size_t unit, const cpu_worker *worker) {
    const row_args *a = args;
    size_t m, r;
    const size_t at = row_of(a, unit, &m, &r) * (size_t)a->dim;
    const int32_t type = a->pass.act_type;
    (void)worker;
    a->k->glu((const float *)cpu_ptr(a->x) + at, (const float *)cpu_ptr(a->add) + at, (size_t)a->dim,
              (char *)cpu_ptr(a->y) + at * cpu_type_bytes(type), type);
}

void cpu_glu(rast_queue *q, const rast_pass *pass, rast_dev gate, rast_dev up, int32_t dim, rast_dev y) {
    row_args a = {.pass = *pass, .x = gate, .add = up, .dim = dim, .y = y};
    record_rows(q, glu_unit, GLU_COST * (size_t)dim, &a);
}

static void gather_unit(const void *args, size_t unit, const cpu_worker *worker) {
    const row_args *a = args;
    size_t m, o;
    const size_t dim = (size_t)a->dim, to = row_of(a, unit, &m, &o) * dim;
    const int32_t row = cpu_ints(a->pass.out_row)[o];
    float *y = (float *)cpu_ptr(a->y) + to;
    (void)worker;
    if (row < 0) {
        memset(y, 0, dim * sizeof *y);
        return;
    }
    const size_t from = (m * (size_t)a->pass.cap_rows + (size_t)row) * dim;
    const float *x = (const float *)cpu_ptr(a->x) + from, *add = (const float *)cpu_ptr(a->add) + from;
    for (size_t i = 0; i < dim; i++) y[i] = x[i] + add[i];
}

void cpu_gather(rast_queue *q, const rast_pass *pass, rast_dev x, rast_dev add, int32_t dim, rast_dev y) {
    row_args a = {.pass = *pass, .x = x, .add = add, .y = y, .dim = dim, .extent = RAST_OF_OUTS};
    record_rows(q, gather_unit, (size_t)dim, &a);
}

/* ---- matrix products ----------------------------------------------------------------------------------------------- */

typedef struct {
    const cpu_kernels *k;
    rast_pass pass;
    rast_mm jobs[MAX_JOBS];
    size_t rows[MAX_JOBS];      /* weight rows of a unit */
    size_t units[MAX_JOBS + 1]; /* [n_jobs + 1] first unit of each job, all models */
    void *const *groups;        /* quantized activations, where weights are quantized */
    size_t groups_at[MAX_JOBS]; /* where a job's begin: [n_models, live rows, in / 32] cpu_group */
} matmul_args;

typedef struct {
    const cpu_kernels *k;
    rast_pass pass;
    rast_dev x;
    size_t n, at; /* row length; where they go */
    void *const *groups;
} quantize_args;

static void quantize_unit(const void *args, size_t unit, const cpu_worker *worker) {
    const quantize_args *a = args;
    const size_t n_rows = (size_t)n_of(&a->pass, RAST_OF_ROWS), m = unit / n_rows, r = unit % n_rows;
    const size_t row = (m * (size_t)a->pass.cap_rows + r) * a->n;
    cpu_group *to = (cpu_group *)(void *)((char *)*a->groups + a->at) + unit * (a->n / CPU_GROUP);
    (void)worker;
    a->k->quantize((const char *)cpu_ptr(a->x) + row * cpu_type_bytes(a->pass.act_type), a->pass.act_type, a->n, to);
}

/* Records what quantizes the activations of the jobs with quantized weights, each x once. */
static void record_quantize(rast_queue *q, matmul_args *a, int32_t n_jobs) {
    const size_t n_rows = (size_t)n_of(&a->pass, RAST_OF_ROWS) * (size_t)a->pass.n_models;
    size_t bytes = 0;
    for (int32_t j = 0; j < n_jobs; j++) {
        const rast_weight *w = a->jobs[j].w[0];
        if (w->type < RAST_N_DTYPES) continue;
        int32_t same = 0;
        while (same < j && (a->jobs[same].x != a->jobs[j].x || a->jobs[same].w[0]->type < RAST_N_DTYPES)) same++;
        a->groups_at[j] = same < j ? a->groups_at[same] : bytes;
        if (same < j) continue;
        const quantize_args x = {a->k, a->pass, a->jobs[j].x, (size_t)w->in, bytes, cpu_shared(q, 0)};
        cpu_record_small(q, quantize_unit, n_rows, n_rows * (size_t)w->in, &x, sizeof x, 0);
        bytes += n_rows * ((size_t)w->in / CPU_GROUP) * sizeof(cpu_group);
    }
    a->groups = cpu_shared(q, bytes);
}

/* Weight rows [first, first + n) of a job's model. */
static void multiply(const matmul_args *a, size_t j, size_t m, size_t first, size_t n) {
    const rast_mm *job = &a->jobs[j];
    const rast_weight *w = job->w[m];
    const size_t n_out = (size_t)w->out, n_in = (size_t)w->in, cap = (size_t)a->pass.cap_rows;
    const size_t n_rows = (size_t)n_of(&a->pass, RAST_OF_ROWS), x_stride = n_in * cpu_type_bytes(a->pass.act_type);
    float *y = (float *)cpu_ptr(job->y) + m * cap * n_out + first;
    if (w->type < RAST_N_DTYPES) {
        a->k->dot[w->type][a->pass.act_type](cpu_ptr(w->data), w->stride, first, n,
                                             (const char *)cpu_ptr(job->x) + m * cap * x_stride, x_stride, n_rows, n_in,
                                             y, n_out);
    } else {
        const size_t stride = n_in / CPU_GROUP * sizeof(cpu_group);
        a->k->dot_groups[w->type - RAST_Q8_0](cpu_ptr(w->data), w->stride, first, n,
                                              (const char *)*a->groups + a->groups_at[j] + m * n_rows * stride, stride,
                                              n_rows, n_in, y, n_out);
    }
    const rast_weight *b = job->bias ? job->bias[m] : NULL;
    for (size_t at = 0; b && at < n; at += BIAS_ROWS) {
        float bias[BIAS_ROWS];
        const size_t some = n - at < BIAS_ROWS ? n - at : BIAS_ROWS;
        a->k->load((const char *)cpu_ptr(b->data) + (first + at) * cpu_type_bytes(b->type), bias, some, b->type);
        for (size_t r = 0; r < n_rows; r++)
            for (size_t i = 0; i < some; i++) y[r * n_out + at + i] += bias[i];
    }
}

static void matmul_piece(const void *args, size_t begin, size_t end, const cpu_worker *worker) {
    const matmul_args *a = args;
    const size_t n_models = (size_t)a->pass.n_models;
    const int few = n_of(&a->pass, RAST_OF_ROWS) <= FEW_ROWS; /* then weights come from memory once, whatever n is */
    (void)worker;
    for (size_t j = 0, unit = begin, n; unit < end; unit += n) {
        while (unit >= a->units[j + 1]) j++;
        const size_t per_model = (a->units[j + 1] - a->units[j]) / n_models, m = (unit - a->units[j]) / per_model;
        const size_t at = (unit - a->units[j]) % per_model,
                     left = per_model - at < end - unit ? per_model - at : end - unit;
        const size_t first = at * a->rows[j], n_out = (size_t)a->jobs[j].w[m]->out;
        n = few ? left : 1;
        multiply(a, j, m, first, n_out - first < n * a->rows[j] ? n_out - first : n * a->rows[j]);
    }
}

/* Weight rows of a unit, a multiple of `least`: no result depends on it. */
static size_t unit_rows(const rast_weight *w, size_t n_rows, size_t n_models, size_t n_threads, size_t least) {
    size_t rows = MATMUL_UNIT / w->stride;
    if (n_rows > MANY_ROWS) {
        const size_t share = (size_t)w->out * n_models / (n_threads * THREAD_UNITS);
        const size_t large = LARGE_UNIT / w->stride, wanted = large < share ? large : share;
        if (wanted > rows) rows = wanted;
    }
    if (n_rows > FEW_ROWS) {
        if (rows < LEAST_ROWS) rows = LEAST_ROWS;
        if (rows > MANY_MATMUL_ROWS) rows = MANY_MATMUL_ROWS;
    }
    return rows < least ? least : rows / least * least;
}

void cpu_matmul(rast_queue *q, const rast_pass *pass, const rast_mm *jobs, int32_t n) {
    for (; n > 0; jobs += MAX_JOBS, n -= MAX_JOBS) {
        const size_t n_threads = (size_t)cpu_queue_threads(q), n_rows = (size_t)n_of(pass, RAST_OF_ROWS);
        matmul_args a = {.k = cpu_queue_kernels(q), .pass = *pass};
        const int32_t n_jobs = n < MAX_JOBS ? n : MAX_JOBS;
        for (int32_t j = 0; j < n_jobs; j++) {
            const rast_weight *w = jobs[j].w[0];
            const size_t least = w->type < RAST_N_DTYPES ? 4 : CPU_LANES; /* what a kernel takes together */
            const size_t rows = unit_rows(w, n_rows, (size_t)pass->n_models, n_threads, least);
            a.jobs[j] = jobs[j];
            a.rows[j] = rows;
            a.units[j + 1] = a.units[j] + (size_t)pass->n_models * (((size_t)w->out + rows - 1) / rows);
        }
        record_quantize(q, &a, n_jobs);
        cpu_record_pieces(q, matmul_piece, a.units[n_jobs], n_rows <= MANY_ROWS ? 1 : CPU_PIECES, &a, sizeof a, 0);
    }
}
