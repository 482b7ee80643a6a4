/* attention.cu: which kernels compute the rows of a pass. A pass's capacities say whether it can hold a long segment; which of its
 * segments are, only the device knows: both kernels look, and each leaves the other's rows alone. */
#include "attention.h"

using namespace rast;

size_t rast_kernel_attention_scratch(const rast_pass *pass, const rast_kv *kv) {
    return attend_short_scratch(*pass, kv->n_heads, kv->head_dim);
}

size_t rast_kernel_attention_scratch_at_most(const rast_pass *pass, const rast_kv *kv) {
    return attend_short_scratch_at_most(*pass, kv->n_heads, kv->head_dim);
}

void rast_kernel_attention(cudaStream_t stream, const rast_pass *pass, rast_dev q, const rast_kv *kv, int32_t window,
                           float scale, rast_dev y, rast_dev scratch) {
    const attention_args a = {*pass,
                              models_of(kv->base, pass->n_models),
                              q,
                              y,
                              scratch,
                              kv->block_stride,
                              kv->v_offset,
                              kv->n_heads,
                              kv->n_kv_heads,
                              kv->head_dim,
                              window,
                              kv->type,
                              scale};
    attend_short(stream, a);
    if (!has_long_segments(*pass)) return;
    if (attend_long_takes(kv->type, kv->head_dim))
        attend_long(stream, a);
    else
        attend_long_plain(stream, a);
}
