/* cpu.c: the CPU as a device: memory, weights in place, and queues of tasks. */
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "../../error.h"
#include "limits.h"
#include "ops.h"
#include "pool.h"

enum {
    ALIGN = 64,
    HEADER = 4096,
    FEW_VALUES = 6 << 10, /* about what one thread does while others hear of a task and report its end */
};

struct rast_ctx {
    const cpu_kernels *kernels;
    cpu_pool *pool;
    int32_t n_threads;
};

typedef struct { /* memory by pieces, which do not move; kept from step to step */
    struct piece {
        uint8_t *data;
        size_t cap;
    } *pieces;
    size_t n_pieces, cap_pieces, current, used;
} arena;

struct rast_queue {
    rast_ctx *ctx;
    cpu_task *tasks;
    size_t n_tasks, cap_tasks, scratch_bytes;
    arena memory;
    void **scratch; /* [n_threads] */
    size_t scratch_cap;
    void *shared;
    size_t shared_bytes, shared_cap;
    int failed; /* recording ran out of memory */
};

/* ---- device -------------------------------------------------------------------------------------------------------- */

size_t rast_cpu_isas(const char *out[8]) {
    const cpu_kernels *kernels[8];
    const size_t n = cpu_kernels_available(kernels);
    for (size_t i = 0; i < n; i++) out[i] = kernels[i]->name;
    return n;
}

static int choose_kernels(const char *name, const cpu_kernels **out, rast_error *err) {
    const cpu_kernels *all[8];
    const size_t n = cpu_kernels_available(all);
    char names[128] = "";
    if (!name || !*name) {
        *out = all[n - 1];
        return RAST_OK;
    }
    for (size_t i = 0; i < n; i++) {
        if (strcmp(all[i]->name, name) == 0) {
            *out = all[i];
            return RAST_OK;
        }
        strncat(names, i ? ", " : "", sizeof names - strlen(names) - 1);
        strncat(names, all[i]->name, sizeof names - strlen(names) - 1);
    }
    return rast_fail(err, RAST_ERR_UNSUPPORTED, "instruction set '%s' is not available; this machine has: %s", name,
                     names);
}

static int32_t usable_cores(void) {
    cpu_set_t set;
    const int32_t quota = cpu_quota("");
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    if (sched_getaffinity(0, sizeof set, &set) == 0) n = CPU_COUNT(&set);
    return n < 1 ? 1 : n < quota ? (int32_t)n : quota;
}

static void cpu_close(rast_ctx *ctx) {
    if (!ctx) return;
    cpu_pool_free(ctx->pool);
    free(ctx);
}

static int cpu_open(const rast_device *device, rast_ctx **out, rast_error *err) {
    *out = NULL;
    if (device->n_threads < 0 || device->n_threads > 4096)
        return rast_fail(err, RAST_ERR_VALUE, "n_threads = %d is out of range (0 to 4096)", device->n_threads);
    rast_ctx *ctx = calloc(1, sizeof *ctx);
    if (!ctx) return rast_fail(err, RAST_ERR_MEMORY, "no memory for a device");
    int status = choose_kernels(device->isa ? device->isa : getenv("RAST_CPU_ISA"), &ctx->kernels, err);
    ctx->n_threads = device->n_threads ? device->n_threads : usable_cores();
    if (status == RAST_OK) status = cpu_pool_new(ctx->n_threads, &ctx->pool, err);
    if (status) {
        cpu_close(ctx);
        return status;
    }
    *out = ctx;
    return RAST_OK;
}

static const char *cpu_isa(const rast_ctx *ctx) { return ctx->kernels->name; }
static int32_t cpu_n_threads(const rast_ctx *ctx) { return ctx->n_threads; }

/* ---- memory -------------------------------------------------------------------------------------------------------- */

/* All kinds come straight from the system: zeroed, and backed page by page, huge ones if it can, as they are touched. */
static int cpu_alloc(rast_ctx *ctx, size_t bytes, int kind, rast_dev *out, rast_error *err) {
    size_t total;
    (void)ctx;
    *out = 0;
    if (!rast_add(bytes, HEADER, &total)) return rast_fail(err, RAST_ERR_MEMORY, "%zu bytes are too many", bytes);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | (kind != RAST_MEM_DATA ? MAP_NORESERVE : 0);
    uint8_t *memory = mmap(NULL, total, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED)
        return rast_fail(err, RAST_ERR_MEMORY, "cannot allocate %zu bytes: %s", bytes, strerror(errno));
    madvise(memory, total, MADV_HUGEPAGE); /* may fail: then pages are small */
    memcpy(memory, &total, sizeof total);
    *out = (rast_dev)(uintptr_t)(memory + HEADER);
    return RAST_OK;
}

static void cpu_release(rast_ctx *ctx, rast_dev memory) {
    size_t total;
    (void)ctx;
    if (!memory) return;
    uint8_t *start = (uint8_t *)(uintptr_t)memory - HEADER;
    memcpy(&total, start, sizeof total);
    munmap(start, total);
}

static int cpu_memory(rast_ctx *ctx, rast_memory *out, rast_error *err) {
    size_t left = cpu_memory_left("");
    struct rlimit limit;
    (void)ctx, (void)err;
    if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
        const size_t mapped = cpu_memory_mapped(""), most = (size_t)limit.rlim_cur;
        const size_t room = most > mapped ? most - mapped : 0;
        if (mapped != SIZE_MAX && left > room) left = room;
    }
    *out = (rast_memory){.free = left == SIZE_MAX ? (size_t)1 << 30 : left};
    return RAST_OK;
}

static int cpu_bind(rast_ctx *ctx, const rast_tensor *t, int32_t act_type, rast_weight *out, rast_error *err) {
    if (t->n_dims != 1 && t->n_dims != 2)
        return rast_fail(err, RAST_ERR_VALUE, "tensor %s has %d dimensions, not 1 or 2", t->name ? t->name : "?",
                         t->n_dims);
    const size_t n_out = t->n_dims == 2 ? t->shape[0] : 1, n_in = t->shape[t->n_dims == 2];
    const char *name = t->name ? t->name : "?";
    (void)ctx, (void)act_type; /* any two types multiply */
    if (!rast_type_group(t->dtype))
        return rast_fail(err, RAST_ERR_UNSUPPORTED, "tensor %s: unknown dtype %d", name, t->dtype);
    const size_t stride = rast_row_bytes(t->dtype, n_in);
    if (n_in && !stride)
        return rast_fail(err, RAST_ERR_VALUE, "tensor %s: rows of %zu are not whole groups, or too large", name, n_in);
    if (n_out > INT32_MAX || n_in > INT32_MAX) return rast_fail(err, RAST_ERR_VALUE, "tensor %s is too large", name);
    *out = (rast_weight){.data = (rast_dev)(uintptr_t)t->data,
                         .out = (int32_t)n_out,
                         .in = (int32_t)n_in,
                         .type = t->dtype,
                         .stride = stride};
    return RAST_OK;
}

static void cpu_unbind(rast_ctx *ctx, rast_weight *w) {
    (void)ctx;
    memset(w, 0, sizeof *w);
}

/* ---- queues -------------------------------------------------------------------------------------------------------- */

static void *arena_take(arena *a, size_t bytes) {
    size_t need;
    if (!rast_add(bytes, ALIGN - 1, &need)) return NULL;
    need = need / ALIGN * ALIGN;
    while (a->current < a->n_pieces && a->pieces[a->current].cap - a->used < need) {
        a->current++;
        a->used = 0;
    }
    if (a->current == a->n_pieces) {
        if (a->n_pieces == a->cap_pieces) {
            const size_t cap = a->cap_pieces ? 2 * a->cap_pieces : 8;
            struct piece *pieces = realloc(a->pieces, cap * sizeof *pieces);
            if (!pieces) return NULL;
            a->pieces = pieces;
            a->cap_pieces = cap;
        }
        const size_t cap = need > 1 << 18 ? need : 1 << 18;
        uint8_t *data = aligned_alloc(ALIGN, cap);
        if (!data) return NULL;
        a->pieces[a->n_pieces++] = (struct piece){data, cap};
        a->used = 0;
    }
    void *out = a->pieces[a->current].data + a->used;
    a->used += need;
    return out;
}

static void arena_clear(arena *a) {
    for (size_t i = 0; i < a->n_pieces; i++) free(a->pieces[i].data);
    free(a->pieces);
    memset(a, 0, sizeof *a);
}

static void cpu_queue_free(rast_queue *q) {
    if (!q) return;
    for (int32_t i = 0; q->scratch && i < q->ctx->n_threads; i++) free(q->scratch[i]);
    free(q->scratch);
    free(q->shared);
    free(q->tasks);
    arena_clear(&q->memory);
    free(q);
}

static int cpu_queue_new(rast_ctx *ctx, rast_queue **out, rast_error *err) {
    *out = NULL;
    rast_queue *q = calloc(1, sizeof *q);
    if (q) {
        q->ctx = ctx;
        q->scratch = calloc((size_t)ctx->n_threads, sizeof *q->scratch);
    }
    if (!q || !q->scratch) {
        cpu_queue_free(q);
        return rast_fail(err, RAST_ERR_MEMORY, "no memory for a queue");
    }
    *out = q;
    return RAST_OK;
}

static int cpu_begin(rast_queue *q, uint64_t graph_key) {
    (void)graph_key; /* recording costs next to nothing here */
    q->n_tasks = 0;
    q->scratch_bytes = q->shared_bytes = 0;
    q->memory.current = q->memory.used = 0;
    q->failed = 0;
    return 0;
}

void *cpu_temp(rast_queue *q, size_t bytes) {
    void *memory = arena_take(&q->memory, bytes);
    if (!memory) q->failed = 1;
    return memory;
}

void *const *cpu_shared(rast_queue *q, size_t bytes) {
    if (bytes > q->shared_bytes) q->shared_bytes = bytes;
    return &q->shared;
}

static void record(rast_queue *q, cpu_task task, size_t n_units, size_t args_bytes, size_t scratch_bytes) {
    if (n_units == 0) return;
    void *copy = cpu_temp(q, args_bytes);
    if (n_units > UINT32_MAX) q->failed = 1;
    if (!copy || q->failed) return;
    memcpy(copy, task.args, args_bytes);
    task.args = copy;
    task.n_units = (uint32_t)n_units;
    task.for_one |= n_units == 1;
    if (q->n_tasks == q->cap_tasks) {
        const size_t cap = q->cap_tasks ? 2 * q->cap_tasks : 64;
        cpu_task *tasks = realloc(q->tasks, cap * sizeof *tasks);
        if (!tasks) {
            q->failed = 1;
            return;
        }
        q->tasks = tasks;
        q->cap_tasks = cap;
    }
    q->tasks[q->n_tasks++] = task;
    if (scratch_bytes > q->scratch_bytes) q->scratch_bytes = scratch_bytes;
}

void cpu_record(rast_queue *q, cpu_task_fn fn, size_t n_units, const void *args, size_t args_bytes,
                size_t scratch_bytes) {
    record(q, (cpu_task){.fn = fn, .args = args, .pieces = CPU_PIECES}, n_units, args_bytes, scratch_bytes);
}

void cpu_record_small(rast_queue *q, cpu_task_fn fn, size_t n_units, size_t n_values, const void *args,
                      size_t args_bytes, size_t scratch_bytes) {
    const cpu_task task = {.fn = fn, .args = args, .pieces = CPU_PIECES, .for_one = n_values <= FEW_VALUES};
    record(q, task, n_units, args_bytes, scratch_bytes);
}

void cpu_record_pieces(rast_queue *q, cpu_piece_fn fn, size_t n_units, uint32_t pieces, const void *args,
                       size_t args_bytes, size_t scratch_bytes) {
    record(q, (cpu_task){.piece = fn, .args = args, .pieces = pieces}, n_units, args_bytes, scratch_bytes);
}

static size_t round_up(size_t bytes) { /* to whole lines; too much stays too much */
    if (!rast_add(bytes, ALIGN - 1, &bytes)) bytes = SIZE_MAX;
    return bytes / ALIGN * ALIGN;
}

static int cpu_submit(rast_queue *q, rast_event *event, rast_error *err) {
    *event = 0;
    if (q->failed) return rast_fail(err, RAST_ERR_MEMORY, "no memory to record a step");
    if (q->shared_bytes > q->shared_cap) {
        const size_t bytes = round_up(q->shared_bytes);
        q->shared_cap = 0;
        free(q->shared);
        q->shared = aligned_alloc(ALIGN, bytes);
        if (!q->shared) return rast_fail(err, RAST_ERR_MEMORY, "no memory for %zu bytes that tasks share", bytes);
        q->shared_cap = bytes;
    }
    if (q->scratch_bytes > q->scratch_cap) {
        const size_t bytes = round_up(q->scratch_bytes);
        q->scratch_cap = 0;
        for (int32_t i = 0; i < q->ctx->n_threads; i++) {
            free(q->scratch[i]);
            q->scratch[i] = aligned_alloc(ALIGN, bytes);
            if (!q->scratch[i]) return rast_fail(err, RAST_ERR_MEMORY, "no memory for %zu bytes of scratch", bytes);
        }
        q->scratch_cap = bytes;
    }
    return cpu_pool_run(q->ctx->pool, q->tasks, q->n_tasks, q->scratch, err);
}

/* submit has run everything before it returns */
static int cpu_wait(rast_ctx *ctx, rast_event event, rast_error *err) {
    (void)ctx, (void)event, (void)err;
    return RAST_OK;
}

static void cpu_depend(rast_queue *q, rast_event event) { (void)q, (void)event; }

const cpu_kernels *cpu_queue_kernels(const rast_queue *q) { return q->ctx->kernels; }
int32_t cpu_queue_threads(const rast_queue *q) { return q->ctx->n_threads; }

const rast_ops rast_cpu_ops = {
    .name = "cpu",
    .cache_percent = 50,
    .open = cpu_open,
    .close = cpu_close,
    .isa = cpu_isa,
    .n_threads = cpu_n_threads,
    .alloc = cpu_alloc,
    .release = cpu_release,
    .memory = cpu_memory,
    .bind = cpu_bind,
    .unbind = cpu_unbind,
    .queue_new = cpu_queue_new,
    .queue_free = cpu_queue_free,
    .begin = cpu_begin,
    .submit = cpu_submit,
    .wait = cpu_wait,
    .depend = cpu_depend,
    .copy = cpu_copy,
    .embed = cpu_embed,
    .norm = cpu_norm,
    .matmul = cpu_matmul,
    .rope_kv = cpu_rope_kv,
    .attention = cpu_attention,
    .glu = cpu_glu,
    .gather = cpu_gather,
    .combine = cpu_combine,
    .copy_blocks = cpu_copy_blocks,
};
