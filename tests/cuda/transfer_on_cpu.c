/* transfer_on_cpu.c: the CPU backend's transfer step as one call, for tests that compare another backend with it. */
#include "../../csrc/backends/backend.h"

/* Runs rast_ops.combine on n_threads threads; all of l's arrays are host arrays. */
RAST_API int transfer_on_cpu(const rast_logits *l, int32_t n_threads, rast_error *err) {
    const rast_ops *ops = &rast_cpu_ops;
    const rast_device device = {.n_threads = n_threads};
    rast_ctx *ctx;
    rast_queue *queue = NULL;
    rast_event event;
    int status = ops->open(&device, &ctx, err);
    if (status) return status;
    status = ops->queue_new(ctx, &queue, err);
    if (status) goto done;
    ops->begin(queue, 0);
    ops->combine(queue, l);
    status = ops->submit(queue, &event, err);
    if (status == RAST_OK) status = ops->wait(ctx, event, err);
    ops->queue_free(queue);
done:
    ops->close(ctx);
    return status;
}
