/* device.c: the CUDA device: opening it, its memory and errors, and the table of ops that the plugin exports. */
#include "cuda.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- errors -------------------------------------------------------------------------------------------------------- */

#define NEW_PROCESS "nothing in this process can use the device any more: start a new one"

static double mib(size_t bytes) { return (double)bytes / (1 << 20); }

int cuda_enter(rast_ctx *ctx, rast_error *err) {
    if (ctx->process != getpid())
        return rast_fail(err, RAST_ERR_DEVICE,
                         "cuda:%d was opened before fork(), which CUDA does not survive: load the model in the child",
                         ctx->device);
    if (ctx->broken)
        return rast_fail(err, RAST_ERR_DEVICE, "cuda:%d has failed and is not used any more: %s%s", ctx->device,
                         ctx->why, ctx->lost ? "; " NEW_PROCESS : "; a new model can use it");
    return cuda_check(ctx, cudaSetDevice(ctx->device), "selecting the device", err);
}

int cuda_may_release(rast_ctx *ctx) {
    if (ctx->lost || ctx->process != getpid()) return 0;
    if (cudaSetDevice(ctx->device) == cudaSuccess) return 1;
    cudaGetLastError();
    return 0;
}

/* What an earlier failure has left of the device: an error that corrupts the context comes again with every call. */
static cudaError_t state_of_device(size_t *free_bytes, size_t *total) {
    cudaGetLastError();
    const cudaError_t code = cudaMemGetInfo(free_bytes, total);
    if (code != cudaSuccess) cudaGetLastError();
    return code;
}

static int fail(rast_ctx *ctx, const char *doing, const char *why, rast_error *err) {
    size_t free_bytes, total;
    if (!ctx->broken) snprintf(ctx->why, sizeof ctx->why, "%s: %s", doing, why);
    ctx->broken = 1;
    ctx->lost |= state_of_device(&free_bytes, &total) != cudaSuccess;
    return rast_fail(err, RAST_ERR_DEVICE, "cuda:%d failed while %s: %s%s", ctx->device, doing, why,
                     ctx->lost ? "; " NEW_PROCESS : "");
}

/* want: "for 3 MiB of ...", "while ...". The device stays sound. */
static int no_memory(rast_ctx *ctx, const char *want, rast_error *err) {
    size_t free_bytes = 0, total = 0;
    state_of_device(&free_bytes, &total);
    return rast_fail(err, RAST_ERR_MEMORY,
                     "cuda:%d: no memory %s: %.1f of %.1f MiB are free, and this model holds %.1f MiB of weights, %.1f "
                     "MiB of KV cache and %.1f MiB of workspace",
                     ctx->device, want, mib(free_bytes), mib(total), mib(ctx->used[CUDA_USE_WEIGHTS]),
                     mib(ctx->used[CUDA_USE_CACHE]), mib(ctx->used[CUDA_USE_WORK]));
}

static int no_memory_while(rast_ctx *ctx, const char *doing, rast_error *err) {
    char want[120];
    snprintf(want, sizeof want, "while %s", doing);
    return no_memory(ctx, want, err);
}

int cuda_check(rast_ctx *ctx, cudaError_t code, const char *doing, rast_error *err) {
    if (code == cudaSuccess) return RAST_OK;
    /* kernels are loaded when they are first launched, graphs take memory as they are: any call may need some */
    if (code == cudaErrorMemoryAllocation) return no_memory_while(ctx, doing, err);
    return fail(ctx, doing, cudaGetErrorString(code), err);
}

/* cuBLAS loads kernels too, and seldom says that it was memory it lacked: that is taken from what is free. */
int cuda_check_blas(rast_ctx *ctx, cublasStatus_t code, const char *doing, rast_error *err) {
    const size_t little = (size_t)64 << 20;
    size_t free_bytes = 0, total = 0;
    if (code == CUBLAS_STATUS_SUCCESS) return RAST_OK;
    const int vague = code == CUBLAS_STATUS_NOT_INITIALIZED || code == CUBLAS_STATUS_EXECUTION_FAILED ||
                      code == CUBLAS_STATUS_INTERNAL_ERROR;
    if (state_of_device(&free_bytes, &total) == cudaSuccess &&
        (code == CUBLAS_STATUS_ALLOC_FAILED || (vague && free_bytes < little)))
        return no_memory_while(ctx, doing, err);
    return fail(ctx, doing, cublasGetStatusString(code), err);
}

/* ---- memory -------------------------------------------------------------------------------------------------------- */

int cuda_allocate(rast_ctx *ctx, size_t bytes, cuda_use use, rast_dev *out, rast_error *err) {
    void *data = NULL;
    *out = 0;
    if (ctx->n_allocations == ctx->cap_allocations) {
        const size_t cap = ctx->cap_allocations ? 2 * ctx->cap_allocations : 256;
        cuda_allocation *grown = realloc(ctx->allocations, cap * sizeof *grown);
        if (!grown) return rast_fail(err, RAST_ERR_MEMORY, "no memory for the list of allocations");
        ctx->allocations = grown;
        ctx->cap_allocations = cap;
    }
    if (!bytes) bytes = 1;
    cudaError_t code = cudaMalloc(&data, bytes);
    if (code == cudaErrorMemoryAllocation) {
        static const char *const what[CUDA_N_USES] = {"weights", "the KV cache", "the workspace"};
        char want[80];
        snprintf(want, sizeof want, "for %.1f MiB of %s", mib(bytes), what[use]);
        return no_memory(ctx, want, err);
    }
    int status = cuda_check(ctx, code, "allocating memory", err);
    if (status) return status;
    ctx->allocations[ctx->n_allocations++] = (cuda_allocation){(rast_dev)(uintptr_t)data, bytes, use};
    ctx->used[use] += bytes;
    *out = (rast_dev)(uintptr_t)data;
    /* on the legacy stream, which the others do not wait for */
    status = cuda_check(ctx, cudaMemsetAsync(data, 0, bytes, NULL), "clearing memory", err);
    if (status == RAST_OK) status = cuda_check(ctx, cudaStreamSynchronize(NULL), "clearing memory", err);
    if (status) {
        cuda_release(ctx, *out);
        *out = 0;
    }
    return status;
}

void cuda_release(rast_ctx *ctx, rast_dev data) {
    if (!data) return;
    size_t i = ctx->n_allocations; /* the last ones usually go first */
    while (i > 0 && ctx->allocations[i - 1].data != data) i--;
    if (!i) return;
    ctx->used[ctx->allocations[i - 1].use] -= ctx->allocations[i - 1].bytes;
    ctx->allocations[i - 1] = ctx->allocations[--ctx->n_allocations];
    ctx->releases++;
    if (cuda_may_release(ctx)) cuda_ignore(cudaFree(cuda_ptr(data)));
}

int cuda_allocate_pinned(rast_ctx *ctx, size_t bytes, void **out, rast_error *err) {
    *out = NULL;
    cudaError_t code = cudaMallocHost(out, bytes);
    if (code == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        return rast_fail(err, RAST_ERR_MEMORY, "no memory for %.1f MiB of page-locked buffers", mib(bytes));
    }
    return cuda_check(ctx, code, "allocating page-locked memory", err);
}

void cuda_release_pinned(rast_ctx *ctx, void *data) {
    if (!data) return;
    ctx->releases++;
    if (cuda_may_release(ctx)) cuda_ignore(cudaFreeHost(data));
}

int cuda_ids(rast_ctx *ctx, const int32_t *host, int32_t n, rast_dev *out, rast_error *err) {
    *out = 0;
    if (!n) return RAST_OK;
    const size_t bytes = (size_t)n * sizeof *host;
    for (size_t i = 0; i < ctx->n_id_lists; i++)
        if (ctx->id_lists[i].n == n && !memcmp(ctx->id_lists[i].host, host, bytes)) {
            *out = ctx->id_lists[i].ids;
            return RAST_OK;
        }
    if (ctx->n_id_lists == ctx->cap_id_lists) {
        const size_t cap = ctx->cap_id_lists ? 2 * ctx->cap_id_lists : 8;
        cuda_id_list *grown = realloc(ctx->id_lists, cap * sizeof *grown);
        if (!grown) return rast_fail(err, RAST_ERR_MEMORY, "no memory for the list of ids that differ");
        ctx->id_lists = grown;
        ctx->cap_id_lists = cap;
    }
    int32_t *copy = malloc(bytes);
    if (!copy) return rast_fail(err, RAST_ERR_MEMORY, "no memory for the list of ids that differ");
    int status = cuda_allocate(ctx, bytes, CUDA_USE_WORK, out, err);
    if (status) {
        free(copy);
        return status;
    }
    memcpy(copy, host, bytes);
    status = cuda_check(ctx, cudaMemcpy(cuda_ptr(*out), host, bytes, cudaMemcpyHostToDevice), "copying ids", err);
    /* from pageable memory it may return before the numbers are there, and streams do not wait for the legacy one */
    if (status == RAST_OK) status = cuda_check(ctx, cudaStreamSynchronize(NULL), "copying ids", err);
    if (status) {
        free(copy);
        cuda_release(ctx, *out);
        return status;
    }
    ctx->id_lists[ctx->n_id_lists++] = (cuda_id_list){copy, n, *out};
    return RAST_OK;
}

/* ---- the device ---------------------------------------------------------------------------------------------------- */

/* No driver, an old one, no device, the wrong number, an old device: said in words that tell what to do. */
static int check_machine(rast_ctx *ctx, rast_error *err) {
    int driver = 0, runtime = 0, n = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
        return rast_fail(err, RAST_ERR_DEVICE, "cuda:%d: this machine has no NVIDIA driver", ctx->device);
    if (cudaRuntimeGetVersion(&runtime) != cudaSuccess) runtime = CUDART_VERSION;
    if (driver / 1000 < runtime / 1000)
        return rast_fail(err, RAST_ERR_DEVICE,
                         "cuda:%d: the NVIDIA driver is too old: it supports CUDA %d.%d, and this backend needs %d.0",
                         ctx->device, driver / 1000, driver % 1000 / 10, runtime / 1000);
    cudaError_t code = cudaGetDeviceCount(&n);
    if (code == cudaErrorNoDevice || (code == cudaSuccess && n == 0))
        return rast_fail(err, RAST_ERR_DEVICE,
                         "cuda:%d: no CUDA device is visible to this process (CUDA_VISIBLE_DEVICES may hide them)",
                         ctx->device);
    if (code != cudaSuccess)
        return rast_fail(err, RAST_ERR_DEVICE, "cuda:%d: CUDA cannot be used: %s", ctx->device,
                         cudaGetErrorString(code));
    if (ctx->device < 0 || ctx->device >= n)
        return rast_fail(err, RAST_ERR_DEVICE, "cuda:%d: there is no such device, the machine shows %d (cuda:0%s)",
                         ctx->device, n, n > 1 ? ", ..." : "");
    code = cudaDeviceGetAttribute(&ctx->major, cudaDevAttrComputeCapabilityMajor, ctx->device);
    if (code == cudaSuccess) code = cudaDeviceGetAttribute(&ctx->minor, cudaDevAttrComputeCapabilityMinor, ctx->device);
    if (code == cudaSuccess && ctx->major < 8)
        return rast_fail(
            err, RAST_ERR_DEVICE,
            "cuda:%d: the device has compute capability %d.%d, and this backend needs 8.0 (Ampere) or newer",
            ctx->device, ctx->major, ctx->minor);
    return cuda_check(ctx, code, "asking for the compute capability", err);
}

/* The first calls that make a context, and load a kernel. */
static int check_use(rast_ctx *ctx, rast_error *err) {
    size_t free_bytes, total;
    cudaError_t code = cudaSetDevice(ctx->device);
    if (code == cudaSuccess) code = cudaMemGetInfo(&free_bytes, &total);
    if (code == cudaSuccess) {
        code = rast_kernel_available();
        if (code == cudaErrorNoKernelImageForDevice || code == cudaErrorInvalidDeviceFunction) {
            cudaGetLastError();
            return rast_fail(err, RAST_ERR_DEVICE,
                             "cuda:%d: this build of the backend has no kernels for compute capability %d.%d "
                             "(RAST_CUDA_ARCHS chose others)",
                             ctx->device, ctx->major, ctx->minor);
        }
    }
    if (code == cudaSuccess || code == cudaErrorMemoryAllocation) return cuda_check(ctx, code, "starting", err);
    const char *why = cudaGetErrorString(code);
    if (state_of_device(&free_bytes, &total) == cudaSuccess) return fail(ctx, "starting", why, err);
    return rast_fail(err, RAST_ERR_DEVICE, "cuda:%d cannot be used: %s; if it has failed before, " NEW_PROCESS,
                     ctx->device, why);
}

static void device_close(rast_ctx *ctx) {
    if (!ctx) return;
    cuda_abandon_loading(ctx);
    for (size_t i = 0; i < ctx->n_id_lists; i++) {
        cuda_release(ctx, ctx->id_lists[i].ids);
        free(ctx->id_lists[i].host);
    }
    free(ctx->id_lists);
    free(ctx->allocations);
    free(ctx);
}

static int device_open(const rast_device *device, rast_ctx **out, rast_error *err) {
    struct cudaDeviceProp properties;
    *out = NULL;
    rast_ctx *ctx = calloc(1, sizeof *ctx);
    if (!ctx) return rast_fail(err, RAST_ERR_MEMORY, "no memory for a device");
    const char *graphs = getenv("RAST_CUDA_GRAPHS");
    ctx->device = device->index;
    ctx->process = getpid();
    ctx->graphs = !graphs || strcmp(graphs, "0") != 0;
    int status = check_machine(ctx, err);
    if (status == RAST_OK)
        status = cuda_check(ctx, cudaGetDeviceProperties(&properties, ctx->device), "asking for its properties", err);
    if (status == RAST_OK) status = check_use(ctx, err);
    if (status) {
        device_close(ctx);
        return status;
    }
    snprintf(ctx->isa, sizeof ctx->isa, "%.90s, sm_%d%d", properties.name, ctx->major, ctx->minor);
    *out = ctx;
    return RAST_OK;
}

static const char *device_isa(const rast_ctx *ctx) { return ctx->isa; }

static int32_t device_n_threads(const rast_ctx *ctx) {
    (void)ctx;
    return 1; /* the one that enqueues */
}

/* ---- the table: each function leaves the calling thread's device as it was, if that is another and in use ---------- */

static int current_device(const rast_ctx *ctx) {
    int device = -1;
    if (ctx->process != getpid()) return -1;
    const cudaError_t code = cudaGetDevice(&device);
    cuda_ignore(code);
    return code == cudaSuccess ? device : -1;
}

/* Whether somebody uses the device: selecting it would make a context there, of hundreds of MiB. Only the driver knows. */
static int has_context(int device) {
    enum cudaDriverEntryPointQueryResult found;
    int (*state)(int, unsigned *, int *);
    void *function = NULL;
    unsigned flags;
    int active = 1;
    const cudaError_t code =
        cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &function, 12000, cudaEnableDefault, &found);
    if (code != cudaSuccess || !function) {
        cudaGetLastError();
        return 1;
    }
    memcpy(&state, &function, sizeof state); /* C has no cast from an object's to a function's address */
    return state(device, &flags, &active) != 0 || active;
}

/* That it cannot be used is no error of ours, and must not be found as one behind a later launch. */
static void set_device_again(int device) {
    if (has_context(device)) cuda_ignore(cudaSetDevice(device));
}

static void restore_device(const rast_ctx *ctx, int device) {
    if (device >= 0 && device != ctx->device) set_device_again(device);
}

static int op_open(const rast_device *device, rast_ctx **out, rast_error *err) {
    int before = -1;
    const int known = cudaGetDevice(&before) == cudaSuccess;
    if (!known) cudaGetLastError(); /* device_open says why */
    int status = device_open(device, out, err);
    if (known && before != device->index) set_device_again(before);
    return status;
}

static void op_close(rast_ctx *ctx) {
    const rast_ctx copy = *ctx;
    const int before = current_device(ctx);
    device_close(ctx);
    restore_device(&copy, before);
}

static int op_alloc(rast_ctx *ctx, size_t bytes, int kind, rast_dev *out, rast_error *err) {
    const int before = current_device(ctx);
    int status = cuda_enter(ctx, err);
    *out = 0;
    if (status == RAST_OK)
        status = cuda_allocate(ctx, bytes, kind == RAST_MEM_CACHE ? CUDA_USE_CACHE : CUDA_USE_WORK, out, err);
    restore_device(ctx, before);
    return status;
}

static void op_release(rast_ctx *ctx, rast_dev data) {
    const int before = current_device(ctx);
    cuda_release(ctx, data);
    restore_device(ctx, before);
}

static int op_memory(rast_ctx *ctx, rast_memory *out, rast_error *err) {
    /* code of kernels, cuBLAS's among them, which is loaded as they are first launched; graphs; room that allocations waste */
    const size_t kept = (size_t)256 << 20;
    const int before = current_device(ctx);
    *out = (rast_memory){
        .weights = ctx->used[CUDA_USE_WEIGHTS], .cache = ctx->used[CUDA_USE_CACHE], .work = ctx->used[CUDA_USE_WORK]};
    int status = cuda_enter(ctx, err);
    if (status == RAST_OK)
        status = cuda_check(ctx, cudaMemGetInfo(&out->free, &out->total), "asking for free memory", err);
    restore_device(ctx, before);
    out->kept = out->free / 2 < kept ? out->free / 2 : kept;
    return status;
}

static int op_bind(rast_ctx *ctx, const rast_tensor *t, int32_t act_type, rast_weight *out, rast_error *err) {
    const int before = current_device(ctx);
    int status = cuda_bind(ctx, t, act_type, out, err);
    restore_device(ctx, before);
    return status;
}

static void op_unbind(rast_ctx *ctx, rast_weight *w) {
    const int before = current_device(ctx);
    cuda_unbind(ctx, w);
    restore_device(ctx, before);
}

static int op_queue_new(rast_ctx *ctx, rast_queue **out, rast_error *err) {
    const int before = current_device(ctx);
    int status = cuda_queue_new(ctx, out, err);
    restore_device(ctx, before);
    return status;
}

static void op_queue_free(rast_queue *q) {
    if (!q) return;
    const rast_ctx *ctx = q->ctx;
    const int before = current_device(ctx);
    cuda_queue_free(q);
    restore_device(ctx, before);
}

static int op_begin(rast_queue *q, uint64_t key) {
    const rast_ctx *ctx = q->ctx;
    const int before = current_device(ctx);
    const int is_kept = cuda_begin(q, key);
    restore_device(ctx, before);
    return is_kept;
}

static int op_submit(rast_queue *q, rast_event *event, rast_error *err) {
    const int before = current_device(q->ctx);
    int status = cuda_submit(q, event, err);
    restore_device(q->ctx, before);
    return status;
}

static int op_reserve(rast_queue *q, rast_error *err) {
    const int before = current_device(q->ctx);
    int status = cuda_reserve(q, err);
    restore_device(q->ctx, before);
    return status;
}

static int op_wait(rast_ctx *ctx, rast_event event, rast_error *err) {
    const int before = current_device(ctx);
    int status = cuda_wait(ctx, event, err);
    restore_device(ctx, before);
    return status;
}

static const rast_ops ops = {
    .name = "cuda",
    .replays = 1,
    .overlaps = 1,
    .asynchronous = 1,
    .copies_weights = 1,
    .cache_percent = 100,
    .open = op_open,
    .close = op_close,
    .isa = device_isa,
    .n_threads = device_n_threads,
    .alloc = op_alloc,
    .release = op_release,
    .memory = op_memory,
    .bind = op_bind,
    .unbind = op_unbind,
    .queue_new = op_queue_new,
    .queue_free = op_queue_free,
    .begin = op_begin,
    .submit = op_submit,
    .reserve = op_reserve,
    .wait = op_wait,
    .depend = cuda_depend,
    .copy = cuda_copy,
    .embed = cuda_embed,
    .norm = cuda_norm,
    .matmul = cuda_matmul,
    .rope_kv = cuda_rope_kv,
    .attention = cuda_attention,
    .glu = cuda_glu,
    .gather = cuda_gather,
    .combine = cuda_combine,
    .copy_blocks = cuda_copy_blocks,
};

RAST_API const rast_plugin rast_backend_plugin = {RAST_PLUGIN_ABI, sizeof(rast_ops), &ops};
