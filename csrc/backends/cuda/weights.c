/* weights.c: weights on their way to the device: from the caller's memory, often a mapped file, through two pinned
 * buffers, so that reading the file and the copy overlap; converted on the way where products need another type. */
#include "cuda.h"

#include <stdlib.h>
#include <string.h>

enum { N_BUFFERS = 2, BUFFER_BYTES = 8 << 20 };

struct cuda_loader {
    cudaStream_t stream;
    struct {
        void *pinned;
        rast_dev raw; /* what arrives when it has to be converted; 0 until then */
        cudaEvent_t done;
    } buffers[N_BUFFERS];
    size_t next;
};

static void loader_free(rast_ctx *ctx) {
    cuda_loader *loader = ctx->loader;
    if (!loader) return;
    const int may = cuda_may_release(ctx);
    if (may && loader->stream) cuda_ignore(cudaStreamSynchronize(loader->stream));
    for (size_t i = 0; i < N_BUFFERS; i++) {
        cuda_release_pinned(ctx, loader->buffers[i].pinned);
        cuda_release(ctx, loader->buffers[i].raw);
        if (may && loader->buffers[i].done) cuda_ignore(cudaEventDestroy(loader->buffers[i].done));
    }
    if (may && loader->stream) cuda_ignore(cudaStreamDestroy(loader->stream));
    free(loader);
    ctx->loader = NULL;
}

void cuda_abandon_loading(rast_ctx *ctx) { loader_free(ctx); }

int cuda_finish_loading(rast_ctx *ctx, rast_error *err) {
    if (!ctx->loader) return RAST_OK;
    int status = cuda_check(ctx, cudaStreamSynchronize(ctx->loader->stream), "loading weights", err);
    loader_free(ctx);
    return status;
}

static int loader_ready(rast_ctx *ctx, rast_error *err) {
    if (ctx->loader) return RAST_OK;
    cuda_loader *loader = ctx->loader = calloc(1, sizeof *loader);
    if (!loader) return rast_fail(err, RAST_ERR_MEMORY, "no memory to load weights");
    int status =
        cuda_check(ctx, cudaStreamCreateWithFlags(&loader->stream, cudaStreamNonBlocking), "making a stream", err);
    for (size_t i = 0; i < N_BUFFERS && status == RAST_OK; i++) {
        status = cuda_allocate_pinned(ctx, BUFFER_BYTES, &loader->buffers[i].pinned, err);
        if (status == RAST_OK)
            status = cuda_check(ctx, cudaEventCreateWithFlags(&loader->buffers[i].done, cudaEventDisableTiming),
                                "making an event", err);
        if (status == RAST_OK)
            status =
                cuda_check(ctx, cudaEventRecord(loader->buffers[i].done, loader->stream), "recording an event", err);
    }
    if (status) loader_free(ctx);
    return status;
}

/* Sends `rows` rows of n_in elements, from `first` on, which begins a tile; type: what they are on the way (a float). */
static int send_rows(rast_ctx *ctx, const rast_tensor *t, size_t first, size_t rows, size_t n_in, int32_t type,
                     const rast_weight *to, rast_error *err) {
    cuda_loader *loader = ctx->loader;
    const size_t i = loader->next++ % N_BUFFERS, n = rows * n_in;
    const int quantized = t->dtype >= RAST_N_DTYPES, convert = type != to->type;
    const size_t stored = quantized ? rast_row_bytes(t->dtype, n_in) : n_in * cuda_type_bytes(type);
    const char *from = (const char *)t->data + first * stored;
    void *pinned = loader->buffers[i].pinned, *dst = cuda_ptr(to->data + first * to->stride);
    const size_t bytes = n * cuda_type_bytes(type);
    int status = cuda_check(ctx, cudaEventSynchronize(loader->buffers[i].done), "loading weights", err);
    if (status == RAST_OK && convert && !loader->buffers[i].raw)
        status = cuda_allocate(ctx, BUFFER_BYTES, CUDA_USE_WORK, &loader->buffers[i].raw, err);
    if (status) return status;
    if (quantized)
        status = rast_dequantize(from, t->dtype, rows, n_in, pinned, err);
    else
        memcpy(pinned, from, bytes);
    if (status) return status;
    if (convert) dst = cuda_ptr(loader->buffers[i].raw);
    status = cuda_check(ctx, cudaMemcpyAsync(dst, pinned, bytes, cudaMemcpyHostToDevice, loader->stream),
                        "copying weights", err);
    if (status == RAST_OK && convert) {
        rast_kernel_convert(loader->stream, loader->buffers[i].raw, type, to->data + first * to->stride, to->type, n);
        status = cuda_check(ctx, cudaGetLastError(), "converting weights", err);
    }
    if (status) return status;
    return cuda_check(ctx, cudaEventRecord(loader->buffers[i].done, loader->stream), "recording an event", err);
}

int cuda_bind(rast_ctx *ctx, const rast_tensor *t, int32_t act_type, rast_weight *out, rast_error *err) {
    const char *name = t->name ? t->name : "?";
    const int is_matrix = t->n_dims == 2, quantized = t->dtype >= RAST_N_DTYPES;
    *out = (rast_weight){0};
    if (t->n_dims != 1 && t->n_dims != 2)
        return rast_fail(err, RAST_ERR_VALUE, "tensor %s has %d dimensions, not 1 or 2", name, t->n_dims);
    if (!rast_type_group(t->dtype))
        return rast_fail(err, RAST_ERR_UNSUPPORTED, "tensor %s: unknown dtype %d", name, t->dtype);
    const size_t n_out = is_matrix ? t->shape[0] : 1, n_in = t->shape[is_matrix];
    /* cuBLAS multiplies equal types */
    const int32_t type = is_matrix ? act_type : t->dtype, moved = quantized ? RAST_F32 : t->dtype;
    size_t bytes;
    if (n_out > INT32_MAX || n_in > INT32_MAX || !rast_mul(n_out, n_in, &bytes) || !rast_mul(bytes, 4, &bytes))
        return rast_fail(err, RAST_ERR_VALUE, "tensor %s is too large", name);
    if (n_in && !rast_row_bytes(t->dtype, n_in))
        return rast_fail(err, RAST_ERR_VALUE, "tensor %s: rows of %zu are not whole groups, or too large", name, n_in);
    int status = cuda_enter(ctx, err);
    if (status == RAST_OK) status = loader_ready(ctx, err);
    rast_weight w = {.out = (int32_t)n_out, .in = (int32_t)n_in, .type = type, .stride = n_in * cuda_type_bytes(type)};
    if (status == RAST_OK) status = cuda_allocate(ctx, n_out * w.stride, CUDA_USE_WEIGHTS, &w.data, err);
    if (status) return status;
    /* whole rows where they fit a buffer; a longer row, of floats, counts as rows of one element */
    const size_t moved_row = n_in * cuda_type_bytes(moved), piece = moved_row && moved_row <= BUFFER_BYTES ? n_in : 1;
    const size_t tile = rast_stored_rows(t->dtype, 1);
    if (quantized && moved_row > BUFFER_BYTES / tile)
        status = rast_fail(err, RAST_ERR_UNSUPPORTED, "tensor %s: rows of %zu are too long", name, n_in);
    rast_weight target = w;
    target.stride = piece * cuda_type_bytes(type);
    const size_t n_rows = piece ? n_out * n_in / piece : 0;
    const size_t most = BUFFER_BYTES / (piece * cuda_type_bytes(moved)) / tile * tile;
    for (size_t row = 0; row < n_rows && status == RAST_OK; row += most)
        status = send_rows(ctx, t, row, n_rows - row < most ? n_rows - row : most, piece, moved, &target, err);
    if (status) {
        cuda_abandon_loading(ctx); /* waits for what is under way */
        cuda_release(ctx, w.data);
        return status;
    }
    *out = w;
    return RAST_OK;
}

void cuda_unbind(rast_ctx *ctx, rast_weight *w) {
    cuda_abandon_loading(ctx); /* nothing may arrive in what is freed */
    cuda_release(ctx, w->data);
    memset(w, 0, sizeof *w);
}
