/* kernels.h: C launchers of the CUDA kernels, one operation a file.
 *
 * A launcher has the arguments of the op of its name in csrc/backends/backend.h, with a stream in place of the queue: it
 * enqueues and returns; a launch that fails shows in cudaGetLastError(). Arrays of n_models weights and bases are host
 * arrays and go into the launch by value. Grids depend on the pass's capacities only, never on live counts, which kernels
 * read from pass->count on the device: so a captured launch can be replayed.
 *
 * K and V of a block of a layer are [n_kv_heads, ...] each, of kv->type; how a head of them lies is said in attention.h.
 */
#ifndef RAST_KERNELS_H
#define RAST_KERNELS_H

#include "../csrc/backends/backend.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The most models of a pass (kernel arguments are small). */
enum { RAST_KERNEL_MODELS = 64 };

/* embed.cu. y [n_models, cap_rows, in] float32 */
void rast_kernel_embed(cudaStream_t, const rast_pass *, const rast_weight *const *w, rast_dev y);

/* norm.cu. See rast_ops.norm. */
void rast_kernel_norm(cudaStream_t, const rast_pass *, int extent, rast_dev x, rast_dev add,
                      const rast_weight *const *w, int32_t dim, int32_t group, float eps, rast_dev y, int32_t y_type);

/* bias.cu. y [n_models, cap_rows, out] float32 += bias[m] of `out` */
void rast_kernel_bias(cudaStream_t, const rast_pass *, const rast_weight *const *bias, rast_dev y);

/* rope_kv.cu. See rast_ops.rope_kv. */
void rast_kernel_rope_kv(cudaStream_t, const rast_pass *, rast_dev q, rast_dev k, rast_dev v, rast_dev table,
                         int32_t interleaved, const rast_kv *);

/* attention_*.cu. See rast_ops.attention. scratch: rast_kernel_attention_scratch() bytes (a function of capacities only;
 * may be 0), not shared with another launch that may run at the same time. */
size_t rast_kernel_attention_scratch(const rast_pass *, const rast_kv *);
/* The most for any pass whose capacities are not above these. */
size_t rast_kernel_attention_scratch_at_most(const rast_pass *, const rast_kv *);
void rast_kernel_attention(cudaStream_t, const rast_pass *, rast_dev q, const rast_kv *, int32_t window, float scale,
                           rast_dev y, rast_dev scratch);

/* glu.cu. See rast_ops.glu. */
void rast_kernel_glu(cudaStream_t, const rast_pass *, rast_dev gate, rast_dev up, int32_t dim, rast_dev y);

/* gather.cu. See rast_ops.gather. */
void rast_kernel_gather(cudaStream_t, const rast_pass *, rast_dev x, rast_dev add, int32_t dim, rast_dev y);

/* copy_blocks.cu. See rast_ops.copy_blocks. */
void rast_kernel_copy_blocks(cudaStream_t, const rast_dev *base, int32_t n_models, size_t block_stride, rast_dev pairs,
                             int32_t n);

/* convert.cu. out[i] = in[i] rounded to nearest even; n elements; float types. */
void rast_kernel_convert(cudaStream_t, rast_dev in, int32_t in_type, rast_dev out, int32_t out_type, size_t n);

/* Whether the device has a kernel to run: cudaErrorNoKernelImageForDevice if none was compiled for it. */
cudaError_t rast_kernel_available(void);

/* transfer.cu: the sum, statistics, processors and draw of rast_ops.combine, for outputs whose logits are there. */
typedef struct {
    rast_dev logits;   /* [n_out, stride] float32: the term's own logits, unscaled */
    size_t stride;     /* floats */
    int32_t n_rows;    /* ids below this have an embedding row */
    rast_dev uncommon; /* [n_uncommon] int32 on the device, sorted */
    int32_t n_uncommon;
} rast_transfer_term;
/* l->terms is not read: `terms` [l->n_terms] stands for it (host array, copied). Outputs first_out .. first_out + n_out - 1
 * of l, RAST_KERNEL_OUTPUTS at most; row i of each term's logits is output first_out + i. scratch:
 * rast_kernel_transfer_scratch(l, n_out) bytes, aligned to 16, of which the first RAST_KERNEL_OUTPUTS * 4 must be zero, and
 * are again afterwards; SIZE_MAX: too much to count. An output's numbers do not depend on the others. */
enum { RAST_KERNEL_OUTPUTS = 1024 };
size_t rast_kernel_transfer_scratch(const rast_logits *l, int32_t n_out);
void rast_kernel_transfer(cudaStream_t, const rast_logits *l, const rast_transfer_term *terms, int32_t first_out,
                          int32_t n_out, rast_dev scratch);

/* saved.cu: row i of logits [n_out, stride] = row row[i] of saved [rows, n_vocab], where row[i] >= 0; float32, int32. */
void rast_kernel_saved(cudaStream_t, rast_dev saved, rast_dev row, int32_t n_out, int32_t n_vocab, rast_dev logits,
                       size_t stride);

#ifdef __cplusplus
}
#endif
#endif
