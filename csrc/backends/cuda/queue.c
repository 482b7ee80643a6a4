/* queue.c: queues as CUDA streams: the list of recorded ops, its submission, graphs, and copies to and from the host. */
#include "cuda.h"

#include <stdlib.h>
#include <string.h>

enum {
    MAX_GRAPHS = 96,        /* of a queue; the one that was used longest ago goes first */
    MAX_POINTERS = 1 << 16, /* in a queue's table */
    N_INDEX = 1 << 14,
    STAGE_ALIGN = 64,
};

/* ---- lists --------------------------------------------------------------------------------------------------------- */

cuda_op *cuda_record(rast_queue *q, cuda_op_kind kind, const rast_pass *pass) {
    if (q->n_ops == q->cap_ops) {
        const size_t cap = q->cap_ops ? 2 * q->cap_ops : 256;
        cuda_op *grown = realloc(q->ops, cap * sizeof *grown);
        if (!grown) {
            q->failed = 1;
            return NULL;
        }
        q->ops = grown;
        q->cap_ops = cap;
    }
    cuda_op *op = &q->ops[q->n_ops++];
    memset(op, 0, sizeof *op);
    op->kind = kind;
    if (pass) op->pass = *pass;
    return op;
}

void cuda_depend(rast_queue *q, rast_event event) {
    const cuda_submission *other = cuda_ptr(event);
    if (!other || other->q == q) return; /* a queue keeps its own order */
    if (q->n_depends == q->cap_depends) {
        const size_t cap = q->cap_depends ? 2 * q->cap_depends : 8;
        const cuda_submission **grown = realloc(q->depends, cap * sizeof *grown);
        if (!grown) {
            q->failed = 1;
            return;
        }
        q->depends = grown;
        q->cap_depends = cap;
    }
    q->depends[q->n_depends++] = other;
}

/* Where `bytes` of the host memory lie in the pinned buffer; 0 if there is no memory. */
static int add_transfer(cuda_transfers *t, void *host, size_t bytes, size_t *at) {
    if (t->n == t->cap) {
        const size_t cap = t->cap ? 2 * t->cap : 8;
        cuda_transfer *grown = realloc(t->items, cap * sizeof *grown);
        if (!grown) return 0;
        t->items = grown;
        t->cap = cap;
    }
    *at = t->bytes;
    t->items[t->n++] = (cuda_transfer){host, t->bytes, bytes};
    return rast_add(t->bytes, bytes, &t->bytes) && rast_add(t->bytes, STAGE_ALIGN - 1, &t->bytes) &&
           (t->bytes = t->bytes / STAGE_ALIGN * STAGE_ALIGN, 1);
}

static int copy_transfers(cuda_transfers *to, const cuda_transfers *from) {
    to->n = to->bytes = 0;
    for (size_t i = 0, at; i < from->n; i++)
        if (!add_transfer(to, from->items[i].host, from->items[i].bytes, &at)) return 0;
    return 1;
}

/* ---- what is under way --------------------------------------------------------------------------------------------- */

static int is_pending(const rast_queue *q) {
    int any = 0;
    for (size_t i = 0; i < CUDA_SUBMISSIONS; i++) any |= q->submissions[i].pending;
    return any;
}

/* Nothing of the queue runs any more: what it used may be released, or used again. */
static int settle(rast_queue *q, rast_error *err) {
    if (!is_pending(q)) return RAST_OK;
    return cuda_check(q->ctx, cudaStreamSynchronize(q->stream), "running a step", err);
}

/* Waits for the submission and brings the host what it copied. */
static int finish(cuda_submission *s, rast_error *err) {
    if (!s->pending) return RAST_OK;
    s->pending = 0;
    int status = cuda_check(s->q->ctx, cudaEventSynchronize(s->done), "running a step", err);
    for (size_t i = 0; i < s->down.n && status == RAST_OK; i++)
        memcpy(s->down.items[i].host, s->to_host.data + s->down.items[i].at, s->down.items[i].bytes);
    return status;
}

/* The one used longest ago. */
static cuda_submission *next_submission(rast_queue *q) {
    size_t oldest = 0;
    for (size_t i = 1; i < CUDA_SUBMISSIONS; i++)
        if (q->submissions[i].used_at < q->submissions[oldest].used_at) oldest = i;
    return &q->submissions[oldest];
}

/* ---- graphs -------------------------------------------------------------------------------------------------------- */

static void graph_clear(rast_queue *q, cuda_graph *g) {
    if (g->exec && cuda_may_release(q->ctx)) cuda_ignore(cudaGraphExecDestroy(g->exec));
    g->exec = NULL;
    free(g->up.items);
    free(g->down.items);
    memset(&g->up, 0, sizeof g->up);
    memset(&g->down, 0, sizeof g->down);
}

/* Addresses in them may be gone; their keys stay known. */
static void drop_graphs(rast_queue *q) {
    settle(q, NULL); /* should that fail, the device counts as failed */
    for (size_t i = 0; i < q->n_graphs; i++) graph_clear(q, &q->graphs[i]);
    q->releases = q->ctx->releases;
}

static void check_graphs(rast_queue *q) {
    if (q->releases != q->ctx->releases) drop_graphs(q);
}

/* A key is captured when it comes the second time: many come once, and the first run loads the kernels. */
int cuda_begin(rast_queue *q, uint64_t key) {
    q->n_ops = q->n_depends = 0;
    q->failed = 0;
    q->current = NULL;
    if (!key || !q->ctx->graphs) return 0;
    check_graphs(q);
    size_t at = 0, oldest = 0;
    while (at < q->n_graphs && q->graphs[at].key != key) {
        if (q->graphs[at].used_at < q->graphs[oldest].used_at) oldest = at;
        at++;
    }
    const int is_new = at == q->n_graphs;
    if (is_new) {
        if (q->n_graphs == MAX_GRAPHS)
            graph_clear(q, &q->graphs[at = oldest]);
        else
            q->n_graphs++;
        q->graphs[at] = (cuda_graph){.key = key};
    }
    cuda_graph *g = &q->graphs[at];
    g->used_at = ++q->clock;
    if (is_new || g->hopeless) return 0;
    q->current = g;
    return g->exec != NULL;
}

/* ---- buffers of a submission --------------------------------------------------------------------------------------- */

static int scratch_ready(rast_queue *q, cuda_scratch *s, size_t bytes, rast_error *err) {
    if (bytes <= s->bytes) return RAST_OK;
    int status = settle(q, err);
    if (status) return status;
    cuda_release(q->ctx, s->data);
    *s = (cuda_scratch){0};
    status = cuda_allocate(q->ctx, bytes, CUDA_USE_WORK, &s->data, err);
    if (status == RAST_OK) s->bytes = bytes;
    return status;
}

static int pinned_ready(rast_ctx *ctx, cuda_pinned *p, size_t bytes, rast_error *err) {
    void *data;
    if (bytes <= p->cap) return RAST_OK;
    size_t cap = 4096;
    while (cap < bytes)
        if (!rast_mul(cap, 2, &cap)) return rast_fail(err, RAST_ERR_MEMORY, "%zu bytes to copy are too many", bytes);
    cuda_release_pinned(ctx, p->data);
    *p = (cuda_pinned){0};
    int status = cuda_allocate_pinned(ctx, cap, &data, err);
    if (status == RAST_OK) *p = (cuda_pinned){data, cap};
    return status;
}

/* One handle a stream, with a workspace of its own, so that results repeat and graphs can be captured. */
static int blas_ready(rast_queue *q, rast_error *err) {
    rast_ctx *ctx = q->ctx;
    /* as cuBLAS advises */
    const size_t bytes = (size_t)(ctx->major >= 9 ? 32 : 8) << 20;
    if (q->blas) return RAST_OK;
    int status = scratch_ready(q, &q->blas_workspace, bytes, err);
    if (status) return status;
    cublasStatus_t code = cublasCreate(&q->blas);
    if (code != CUBLAS_STATUS_SUCCESS) q->blas = NULL;
    if (code == CUBLAS_STATUS_SUCCESS) code = cublasSetStream(q->blas, q->stream);
    if (code == CUBLAS_STATUS_SUCCESS) code = cublasSetWorkspace(q->blas, cuda_ptr(q->blas_workspace.data), bytes);
    if (code == CUBLAS_STATUS_SUCCESS) code = cublasSetMathMode(q->blas, CUBLAS_DEFAULT_MATH); /* no TF32 */
    if (code != CUBLAS_STATUS_SUCCESS && q->blas) cublasDestroy(q->blas), q->blas = NULL;
    return cuda_check_blas(ctx, code, "starting cuBLAS", err);
}

static int tables_ready(rast_queue *q, rast_error *err) {
    cuda_tables *t = &q->tables;
    if (t->index) return RAST_OK;
    void *host = NULL;
    int status = cuda_allocate(q->ctx, MAX_POINTERS * sizeof *t->host, CUDA_USE_WORK, &t->data, err);
    if (status == RAST_OK) status = cuda_allocate_pinned(q->ctx, MAX_POINTERS * sizeof *t->host, &host, err);
    t->host = host;
    if (status == RAST_OK && !(t->index = calloc(N_INDEX, sizeof *t->index)))
        status = rast_fail(err, RAST_ERR_MEMORY, "no memory for the index of pointers");
    if (status) {
        cuda_release(q->ctx, t->data);
        cuda_release_pinned(q->ctx, host);
        *t = (cuda_tables){0};
    }
    return status;
}

/* The place of these n pointers in the table, found or added. Returns 0 if it is full. */
static int table_find(cuda_tables *t, const uint64_t *pointers, size_t n, size_t *place) {
    uint64_t hash = n;
    for (size_t i = 0; i < n; i++) hash = (hash ^ pointers[i]) * 0x9E3779B97F4A7C15u, hash ^= hash >> 29;
    size_t slot = hash % N_INDEX, probes = 0;
    for (; t->index[slot]; slot = (slot + 1) % N_INDEX) {
        const size_t at = t->index[slot] - 1;
        if (at + n <= t->n && memcmp(t->host + at, pointers, n * sizeof *pointers) == 0) {
            *place = at;
            return 1;
        }
        if (++probes == N_INDEX / 2) return 0;
    }
    if (t->n + n > MAX_POINTERS) return 0;
    memcpy(t->host + t->n, pointers, n * sizeof *pointers);
    *place = t->n;
    t->index[slot] = (uint32_t)t->n + 1;
    t->n += n;
    return 1;
}

/* Gives every batched product its pointers. A full table begins anew, and graphs that use the old one go. */
static int place_tables(rast_queue *q, rast_error *err) {
    uint64_t pointers[3 * CUDA_MAX_PRODUCTS];
    for (int round = 0; round < 2; round++) {
        size_t i = 0;
        for (; i < q->n_ops; i++) {
            const size_t n = (size_t)cuda_op_needs(&q->ops[i]).n_pointers;
            if (!n) continue;
            int status = tables_ready(q, err);
            if (status) return status;
            cuda_op_pointers(q, &q->ops[i], pointers);
            if (!table_find(&q->tables, pointers, n, &q->ops[i].table)) break;
        }
        if (i == q->n_ops) return RAST_OK;
        int status = settle(q, err);
        if (status) return status;
        q->tables.n = q->tables.n_sent = 0;
        memset(q->tables.index, 0, N_INDEX * sizeof *q->tables.index);
        drop_graphs(q);
    }
    return rast_fail(err, RAST_ERR_MEMORY, "a step has more products than the table of pointers holds");
}

static void add_needs(cuda_needs *most, cuda_needs needs) {
    if (needs.attention > most->attention) most->attention = needs.attention;
    if (needs.transfer > most->transfer) most->transfer = needs.transfer;
    if (needs.logits > most->logits) most->logits = needs.logits;
    if (needs.n_pointers > most->n_pointers) most->n_pointers = needs.n_pointers;
    most->products |= needs.products;
}

static int buffers_ready(rast_queue *q, const cuda_needs *needs, rast_error *err) {
    int status = needs->products ? blas_ready(q, err) : RAST_OK;
    if (status == RAST_OK) status = scratch_ready(q, &q->attention, needs->attention, err);
    if (status == RAST_OK) status = scratch_ready(q, &q->transfer, needs->transfer, err);
    if (status == RAST_OK) status = scratch_ready(q, &q->logits, needs->logits, err);
    if (status == RAST_OK && needs->n_pointers) status = tables_ready(q, err);
    return status;
}

int cuda_reserve(rast_queue *q, rast_error *err) {
    cuda_needs most = {0};
    if (q->failed) return rast_fail(err, RAST_ERR_MEMORY, "no memory to record a step");
    int status = cuda_enter(q->ctx, err);
    if (status == RAST_OK) status = cuda_finish_loading(q->ctx, err);
    for (size_t i = 0; i < q->n_ops && status == RAST_OK; i++) {
        add_needs(&most, cuda_op_needs_at_most(&q->ops[i]));
        status = cuda_op_prepare(q->ctx, &q->ops[i], err);
    }
    return status ? status : buffers_ready(q, &most, err);
}

/* Everything that may need memory, and the host's data; nothing runs on the stream but this meanwhile. */
static int prepare(rast_queue *q, rast_error *err) {
    cuda_submission *s = q->now;
    cuda_needs most = {0};
    int status = RAST_OK;
    s->up.n = s->up.bytes = s->down.n = s->down.bytes = 0;
    for (size_t i = 0; i < q->n_ops && status == RAST_OK; i++) {
        cuda_op *op = &q->ops[i];
        add_needs(&most, cuda_op_needs(op));
        status = cuda_op_prepare(q->ctx, op, err);
        if (op->kind != CUDA_COPY || op->u.copy.kind == RAST_COPY_ON_DEVICE) continue;
        const int is_up = op->u.copy.kind == RAST_COPY_TO_DEVICE;
        void *host = cuda_ptr(is_up ? op->u.copy.src : op->u.copy.dst);
        if (!add_transfer(is_up ? &s->up : &s->down, host, op->u.copy.bytes, &op->u.copy.at))
            return rast_fail(err, RAST_ERR_MEMORY, "no memory for a list of copies");
    }
    if (status == RAST_OK) status = buffers_ready(q, &most, err);
    if (status == RAST_OK) status = pinned_ready(q->ctx, &s->to_device, s->up.bytes, err);
    if (status == RAST_OK) status = pinned_ready(q->ctx, &s->to_host, s->down.bytes, err);
    if (status == RAST_OK) status = place_tables(q, err);
    cuda_tables *t = &q->tables;
    if (status == RAST_OK && t->n_sent < t->n) {
        status = cuda_check(q->ctx,
                            cudaMemcpyAsync(cuda_ptr(t->data + t->n_sent * sizeof *t->host), t->host + t->n_sent,
                                            (t->n - t->n_sent) * sizeof *t->host, cudaMemcpyHostToDevice, q->stream),
                            "copying pointers", err);
        if (status == RAST_OK) t->n_sent = t->n;
    }
    return status;
}

/* ---- submission ---------------------------------------------------------------------------------------------------- */

static int enqueue(rast_queue *q, rast_error *err) {
    int status = RAST_OK;
    for (size_t i = 0; i < q->n_ops && status == RAST_OK; i++) status = cuda_op_enqueue(q, &q->ops[i], err);
    return status;
}

/* Makes the list a graph. What cannot become one for want of memory stays a list: RAST_OK without g->exec. */
static int capture(rast_queue *q, cuda_graph *g, rast_error *err) {
    cudaGraph_t graph = NULL;
    int status = cuda_check(q->ctx, cudaStreamBeginCapture(q->stream, cudaStreamCaptureModeThreadLocal),
                            "beginning a graph", err);
    if (status) return status;
    status = enqueue(q, err);
    const cudaError_t ended = cudaStreamEndCapture(q->stream, &graph); /* also after an error, or the stream stays so */
    if (ended != cudaSuccess && cudaStreamEndCapture(q->stream, &graph) != cudaSuccess) cudaGetLastError();
    if (status == RAST_OK) status = cuda_check(q->ctx, ended, "ending a graph", err);
    if (status == RAST_OK) {
        const cudaError_t made = cudaGraphInstantiate(&g->exec, graph, 0);
        if (made != cudaSuccess) g->exec = NULL;
        if (made == cudaErrorMemoryAllocation)
            cudaGetLastError();
        else
            status = cuda_check(q->ctx, made, "instantiating a graph", err);
    }
    if (graph) cuda_ignore(cudaGraphDestroy(graph));
    if (status) return status;
    g->at = q->now;
    if (g->exec && copy_transfers(&g->up, &q->now->up) && copy_transfers(&g->down, &q->now->down)) return RAST_OK;
    graph_clear(q, g);
    g->hopeless = 1;
    return RAST_OK;
}

static int run(rast_queue *q, rast_error *err) {
    rast_ctx *ctx = q->ctx;
    cuda_graph *g = q->current;
    const int replay = g && g->exec;
    cuda_submission *s = q->now = replay ? g->at : next_submission(q);
    int status = finish(s, err); /* its buffers are used again */
    if (status) return status;
    if (replay) {
        if (!copy_transfers(&s->up, &g->up) || !copy_transfers(&s->down, &g->down))
            return rast_fail(err, RAST_ERR_MEMORY, "no memory for a list of copies");
    } else {
        status = prepare(q, err);
        check_graphs(q); /* a buffer may have moved */
    }
    for (size_t i = 0; i < q->n_depends && status == RAST_OK; i++)
        status = cuda_check(ctx, cudaStreamWaitEvent(q->stream, q->depends[i]->done, 0), "waiting for a queue", err);
    if (status) return status;
    for (size_t i = 0; i < s->up.n; i++)
        memcpy(s->to_device.data + s->up.items[i].at, s->up.items[i].host, s->up.items[i].bytes);
    if (g && !replay) status = capture(q, g, err);
    if (status) return status;
    if (g && g->exec) {
        const cudaError_t code = cudaGraphLaunch(g->exec, q->stream);
        if (code == cudaErrorMemoryAllocation) { /* its first launch takes some; the step is submitted without it */
            cudaGetLastError();
            graph_clear(q, g);
            g->hopeless = 1;
        }
        if (code != cudaErrorMemoryAllocation || replay) /* what is replayed was not recorded */
            status = cuda_check(ctx, code, "launching a graph", err);
    }
    if (status == RAST_OK && !(g && g->exec)) status = enqueue(q, err);
    if (status == RAST_OK) status = cuda_check(ctx, cudaEventRecord(s->done, q->stream), "recording an event", err);
    s->pending = status == RAST_OK;
    s->used_at = ++q->clock;
    return status;
}

int cuda_submit(rast_queue *q, rast_event *event, rast_error *err) {
    *event = 0;
    if (q->failed) return rast_fail(err, RAST_ERR_MEMORY, "no memory to record a step");
    int status = cuda_enter(q->ctx, err);
    if (status == RAST_OK) status = cuda_finish_loading(q->ctx, err);
    if (status == RAST_OK) status = run(q, err);
    if (status && !q->ctx->broken) /* a part of it may run, and reads buffers that the next submission fills */
        cuda_check(q->ctx, cudaStreamSynchronize(q->stream), "running a step", NULL);
    if (status == RAST_OK) *event = (rast_event)(uintptr_t)q->now;
    return status;
}

int cuda_wait(rast_ctx *ctx, rast_event event, rast_error *err) {
    cuda_submission *s = cuda_ptr(event);
    if (!s) return RAST_OK;
    int status = cuda_enter(ctx, err);
    return status ? status : finish(s, err);
}

/* ---- life ---------------------------------------------------------------------------------------------------------- */

void cuda_queue_free(rast_queue *q) {
    if (!q) return;
    rast_ctx *ctx = q->ctx;
    const int may = cuda_may_release(ctx);
    if (may && q->stream) cuda_ignore(cudaStreamSynchronize(q->stream));
    for (size_t i = 0; i < q->n_graphs; i++) graph_clear(q, &q->graphs[i]);
    if (may && q->blas) cublasDestroy(q->blas);
    for (size_t i = 0; i < CUDA_SUBMISSIONS; i++) {
        cuda_submission *s = &q->submissions[i];
        if (may && s->done) cuda_ignore(cudaEventDestroy(s->done));
        cuda_release_pinned(ctx, s->to_device.data);
        cuda_release_pinned(ctx, s->to_host.data);
        free(s->up.items);
        free(s->down.items);
    }
    if (may && q->stream) cuda_ignore(cudaStreamDestroy(q->stream));
    const rast_dev device[] = {q->blas_workspace.data, q->attention.data, q->transfer.data, q->logits.data,
                               q->tables.data};
    for (size_t i = 0; i < sizeof device / sizeof *device; i++) cuda_release(ctx, device[i]);
    cuda_release_pinned(ctx, q->tables.host);
    void *plain[] = {q->ops, q->depends, q->tables.index, q->graphs, q};
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++) free(plain[i]);
}

int cuda_queue_new(rast_ctx *ctx, rast_queue **out, rast_error *err) {
    *out = NULL;
    int status = cuda_enter(ctx, err);
    if (status) return status;
    rast_queue *q = calloc(1, sizeof *q);
    if (!q) return rast_fail(err, RAST_ERR_MEMORY, "no memory for a queue");
    q->ctx = ctx;
    q->releases = ctx->releases;
    q->graphs = calloc(MAX_GRAPHS, sizeof *q->graphs);
    if (!q->graphs) {
        status = rast_fail(err, RAST_ERR_MEMORY, "no memory for a queue");
        goto fail;
    }
    status = cuda_check(ctx, cudaStreamCreateWithFlags(&q->stream, cudaStreamNonBlocking), "making a stream", err);
    for (size_t i = 0; i < CUDA_SUBMISSIONS && status == RAST_OK; i++) {
        q->submissions[i].q = q;
        status = cuda_check(ctx, cudaEventCreateWithFlags(&q->submissions[i].done, cudaEventDisableTiming),
                            "making an event", err);
    }
    if (status) goto fail;
    *out = q;
    return RAST_OK;
fail:
    cuda_queue_free(q);
    return status;
}
