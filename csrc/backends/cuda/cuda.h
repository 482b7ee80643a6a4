/* cuda.h: what the files of the CUDA backend share: the open device, queues as streams, and how errors are kept.
 *
 * Ops are noted in a list; submit sizes their buffers, then enqueues them on the queue's stream or captures them as a
 * graph. A graph holds addresses, so all graphs are dropped when any memory is released (rast_ctx.releases). Several
 * submissions of a queue may be under way; the stream keeps them in order, and so they share buffers on the device.
 */
#ifndef RAST_CUDA_H
#define RAST_CUDA_H

#include <sys/types.h>

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include "../../../kernels/kernels.h"
#include "../../error.h"

typedef enum { CUDA_USE_WEIGHTS = 0, CUDA_USE_CACHE = 1, CUDA_USE_WORK = 2, CUDA_N_USES = 3 } cuda_use;

typedef struct {
    rast_dev data;
    size_t bytes;
    cuda_use use;
} cuda_allocation;

typedef struct { /* ids that a term gave: a copy, and on the device */
    int32_t *host, n;
    rast_dev ids;
} cuda_id_list;

typedef struct cuda_loader cuda_loader; /* weights.c: staging buffers, while weights are on their way */

struct rast_ctx {
    int device;
    pid_t process; /* CUDA does not survive fork() */
    int graphs;    /* 0: every step is enqueued afresh */
    int major, minor;
    char isa[128];
    int broken;    /* an earlier call failed: */
    char why[400]; /* which */
    int lost;      /* and CUDA gives that error ever again, so that nothing can be released either */
    cuda_allocation *allocations;
    size_t n_allocations, cap_allocations;
    size_t used[CUDA_N_USES]; /* bytes */
    uint64_t releases;
    cuda_id_list *id_lists;
    size_t n_id_lists, cap_id_lists;
    cuda_loader *loader; /* NULL: nothing is on its way */
};

/* ---- device.c ------------------------------------------------------------------------------------------------------ */

/* Makes the device the calling thread's; an error if it has failed before, or belongs to another process. */
int cuda_enter(rast_ctx *ctx, rast_error *err);
/* The same for releasing: whether CUDA may be called at all. */
int cuda_may_release(rast_ctx *ctx);
/* RAST_OK for cudaSuccess; RAST_ERR_MEMORY where memory was missing, which leaves the device sound; else it counts as
 * failed. The message says what was being done. */
int cuda_check(rast_ctx *ctx, cudaError_t code, const char *doing, rast_error *err);
int cuda_check_blas(rast_ctx *ctx, cublasStatus_t code, const char *doing, rast_error *err);
/* Zeroed device memory; too little of it is RAST_ERR_MEMORY and leaves the device sound. */
int cuda_allocate(rast_ctx *ctx, size_t bytes, cuda_use use, rast_dev *out, rast_error *err);
void cuda_release(rast_ctx *ctx, rast_dev data); /* 0 is allowed */
int cuda_allocate_pinned(rast_ctx *ctx, size_t bytes, void **out, rast_error *err);
void cuda_release_pinned(rast_ctx *ctx, void *data); /* NULL is allowed */
/* The ids [n] on the device, uploaded when first asked for; the caller's array need not outlive the call. */
int cuda_ids(rast_ctx *ctx, const int32_t *host, int32_t n, rast_dev *out, rast_error *err);

/* ---- weights.c ----------------------------------------------------------------------------------------------------- */

int cuda_bind(rast_ctx *ctx, const rast_tensor *t, int32_t act_type, rast_weight *out, rast_error *err);
void cuda_unbind(rast_ctx *ctx, rast_weight *w);
/* Waits until all weights have arrived and frees the staging buffers. */
int cuda_finish_loading(rast_ctx *ctx, rast_error *err);
void cuda_abandon_loading(rast_ctx *ctx);

/* ---- queue.c ------------------------------------------------------------------------------------------------------- */

typedef enum {
    CUDA_COPY,
    CUDA_EMBED,
    CUDA_NORM,
    CUDA_MATMUL,
    CUDA_ROPE_KV,
    CUDA_ATTENTION,
    CUDA_GLU,
    CUDA_GATHER,
    CUDA_COMBINE,
    CUDA_COPY_BLOCKS
} cuda_op_kind;

enum { CUDA_MAX_JOBS = 3, CUDA_MAX_PRODUCTS = CUDA_MAX_JOBS * RAST_KERNEL_MODELS }; /* of one call of cuBLAS */

typedef struct { /* one op, with its arguments by the names of backend.h */
    cuda_op_kind kind;
    size_t table; /* several products at once: their pointers' place in the queue's table */
    rast_pass pass;
    const rast_weight *const *w;
    union {
        struct {
            rast_dev dst, src;
            size_t bytes;
            int kind;
            size_t at; /* in the queue's pinned buffer, when one end is host memory */
        } copy;
        struct {
            rast_dev x, add, y;
            int32_t extent, dim, group, y_type;
            float eps;
        } rows; /* embed, norm, glu (gate and up are x and add), gather */
        struct {
            rast_mm jobs[CUDA_MAX_JOBS]; /* of equal shapes */
            int32_t n_jobs;
        } matmul;
        struct {
            rast_kv kv;
            rast_dev q, k, v, table, y;
            int32_t interleaved, window;
            float scale;
        } attention; /* rope_kv too */
        rast_logits combine;
        struct {
            const rast_dev *base;
            size_t block_stride;
            rast_dev pairs;
            int32_t n_models, n;
        } blocks;
    } u;
} cuda_op;

typedef struct {
    rast_dev data;
    size_t bytes;
} cuda_scratch;

typedef struct { /* pinned memory on the way between the device and the caller's */
    uint8_t *data;
    size_t cap;
} cuda_pinned;

typedef struct {
    void *host;
    size_t at, bytes; /* in the pinned buffer */
} cuda_transfer;

typedef struct { /* bytes of one submission that cross, either way */
    cuda_transfer *items;
    size_t n, cap, bytes;
} cuda_transfers;

enum { CUDA_SUBMISSIONS = 4 }; /* of a queue: of a step two at most, and two steps may be under way */

typedef struct { /* what a submission needs for itself while it is under way; rast_event is its address */
    rast_queue *q;
    cudaEvent_t done;
    int pending; /* nobody has waited for it */
    uint64_t used_at;
    cuda_transfers up, down;
    cuda_pinned to_device, to_host;
} cuda_submission;

typedef struct {
    uint64_t key, used_at;
    cudaGraphExec_t exec; /* NULL: not captured yet */
    cuda_submission *at;  /* whose pinned memory it copies from and to */
    int hopeless;         /* it cannot be captured */
    cuda_transfers up, down;
} cuda_graph;

typedef struct {    /* arrays of pointers for batched products: entries that were used once stay */
    uint64_t *host; /* pinned, [CAP] */
    rast_dev data;  /* the same on the device */
    size_t n, n_sent;
    uint32_t *index; /* [N_INDEX] place + 1 of the entry with that hash, open addressing */
} cuda_tables;

struct rast_queue {
    rast_ctx *ctx;
    cudaStream_t stream;
    cublasHandle_t blas;
    cuda_scratch blas_workspace;
    cuda_submission submissions[CUDA_SUBMISSIONS], *now; /* now: the one that is being made */
    cuda_op *ops;
    size_t n_ops, cap_ops;
    int failed; /* recording ran out of memory */
    const cuda_submission **depends;
    size_t n_depends, cap_depends;
    cuda_scratch attention, transfer, logits;
    cuda_tables tables;
    cuda_graph *graphs;
    size_t n_graphs;
    cuda_graph *current; /* of the key given to begin */
    uint64_t releases, clock;
};

int cuda_queue_new(rast_ctx *ctx, rast_queue **out, rast_error *err);
void cuda_queue_free(rast_queue *q);
int cuda_begin(rast_queue *q, uint64_t key);
int cuda_submit(rast_queue *q, rast_event *event, rast_error *err);
int cuda_reserve(rast_queue *q, rast_error *err); /* see rast_ops.reserve */
int cuda_wait(rast_ctx *ctx, rast_event event, rast_error *err);
void cuda_depend(rast_queue *q, rast_event event);
/* The next op of the list, zeroed; NULL if there is no memory (submit will say so). */
cuda_op *cuda_record(rast_queue *q, cuda_op_kind kind, const rast_pass *pass);

/* ---- ops.c --------------------------------------------------------------------------------------------------------- */

/* What an op needs besides its arguments. */
typedef struct {
    size_t attention, transfer, logits; /* bytes of the queue's scratch buffers */
    int32_t n_pointers;                 /* of batched products, at most 3 * CUDA_MAX_PRODUCTS */
    int32_t products;                   /* 1: cuBLAS */
} cuda_needs;
cuda_needs cuda_op_needs(const cuda_op *op);
/* The most that this op needs, or one like it with smaller capacities. */
cuda_needs cuda_op_needs_at_most(const cuda_op *op);
/* The pointers of the op's batched products; for each call weights, inputs, outputs. */
void cuda_op_pointers(const rast_queue *q, const cuda_op *op, uint64_t *out);
/* Uploads what the op's kernels read besides the caller's arrays. */
int cuda_op_prepare(rast_ctx *ctx, const cuda_op *op, rast_error *err);
int cuda_op_enqueue(rast_queue *q, const cuda_op *op, rast_error *err);

void cuda_copy(rast_queue *q, rast_dev dst, rast_dev src, size_t bytes, int kind);
void cuda_embed(rast_queue *q, const rast_pass *pass, const rast_weight *const *w, rast_dev y);
void cuda_norm(rast_queue *q, const rast_pass *pass, int extent, rast_dev x, rast_dev add, const rast_weight *const *w,
               int32_t dim, int32_t group, float eps, rast_dev y, int32_t y_type);
void cuda_matmul(rast_queue *q, const rast_pass *pass, const rast_mm *jobs, int32_t n);
void cuda_rope_kv(rast_queue *q, const rast_pass *pass, rast_dev query, rast_dev k, rast_dev v, rast_dev table,
                  int32_t interleaved, const rast_kv *kv);
void cuda_attention(rast_queue *q, const rast_pass *pass, rast_dev query, const rast_kv *kv, int32_t window,
                    float scale, rast_dev y);
void cuda_glu(rast_queue *q, const rast_pass *pass, rast_dev gate, rast_dev up, int32_t dim, rast_dev y);
void cuda_gather(rast_queue *q, const rast_pass *pass, rast_dev x, rast_dev add, int32_t dim, rast_dev y);
void cuda_combine(rast_queue *q, const rast_logits *l);
void cuda_copy_blocks(rast_queue *q, const rast_dev *base, int32_t n_models, size_t block_stride, rast_dev pairs,
                      int32_t n);

static inline size_t cuda_type_bytes(int32_t type) { return type == RAST_F32 ? 4 : 2; }
/* An error that does not matter is not found behind the next launch. */
static inline void cuda_ignore(cudaError_t code) {
    if (code != cudaSuccess) cudaGetLastError();
}
static inline void *cuda_ptr(rast_dev d) { return (void *)(uintptr_t)d; }

#endif
