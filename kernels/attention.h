/* attention.h: what rope_kv.cu and the attention kernels share: arguments, how K and V lie in a block, what a row sees.
 *
 * K of a block and head is [head_dim / X][32 tokens][X], X elements being 16 bytes (a pair where head_dim is not a multiple of
 * 8): 32 lanes that hold a key each read consecutive addresses. V is [32 tokens][head_dim].
 */
#ifndef RAST_ATTENTION_H
#define RAST_ATTENTION_H

#include "device.h"

#include <cmath>

namespace rast {

constexpr int BLOCK = RAST_BLOCK_TOKENS;
static_assert(BLOCK == WARP, "a lane is a token of a block");

/* Segments of more rows go to the prefill kernel, where a pass can hold one; the others split their context over blocks. */
constexpr int SHORT_SEGMENT = 8;

struct attention_args {
    rast_pass pass;
    models base; /* K of block 0, each model */
    rast_dev q, y, scratch;
    size_t block_stride, v_offset;
    int32_t n_heads, n_kv_heads, head_dim, window, kv_type;
    float scale;
};

/* attention_decode.cu: rows of short segments (all segments, if the pass cannot hold a longer one). */
void attend_short(cudaStream_t stream, const attention_args &a);
size_t attend_short_scratch(const rast_pass &pass, int32_t n_heads, int32_t head_dim);
size_t attend_short_scratch_at_most(const rast_pass &pass, int32_t n_heads, int32_t head_dim);
/* attention_decode.cu: rows of long segments, for types and head sizes that tensor cores do not take. */
void attend_long_plain(cudaStream_t stream, const attention_args &a);
/* attention_prefill.cu: rows of long segments. */
void attend_long(cudaStream_t stream, const attention_args &a);
bool attend_long_takes(int32_t kv_type, int32_t head_dim);

inline bool has_long_segments(const rast_pass &pass) { return pass.cap_rows > SHORT_SEGMENT; }

/* Elements of a key that lie together. */
__host__ __device__ inline int32_t key_vector(int32_t type, int32_t head_dim) {
    return head_dim % 8 ? 2 : static_cast<int32_t>(16 / type_bytes(type));
}

/* Where dimension d of a token is in K of a head: d from a multiple of X, X elements follow. */
template <int X> __device__ __forceinline__ size_t key_at(int32_t d, int32_t token) {
    return static_cast<size_t>((d / X * BLOCK + token) * X + d % X);
}

/* K of a KV head in the block of a segment that holds position `position`; V is v_offset bytes behind. */
__device__ __forceinline__ const char *block_of(const attention_args &a, size_t model, int32_t seg, int32_t kv_head,
                                                int32_t position) {
    const size_t entry = static_cast<size_t>(seg) * static_cast<size_t>(a.pass.table_stride);
    const int32_t block = ints(a.pass.block_table)[entry + static_cast<size_t>(position / BLOCK)];
    return address<const char>(a.base.data[model]) + static_cast<size_t>(block) * a.block_stride +
           static_cast<size_t>(kv_head) * BLOCK * static_cast<size_t>(a.head_dim) * type_bytes(a.kv_type);
}

struct range { /* keys lo .. hi - 1 */
    int32_t lo, hi;
};

__device__ __forceinline__ range seen_by(const attention_args &a, int32_t row) {
    const int32_t hi = ints(a.pass.pos)[row] + 1;
    return {a.window > 0 && hi > a.window ? hi - a.window : 0, hi};
}

/* Where the output (or query) of a row's head begins, in elements. */
__device__ __forceinline__ size_t head_at(const attention_args &a, size_t model, int32_t row, int32_t head) {
    const size_t at = model * static_cast<size_t>(a.pass.cap_rows) + static_cast<size_t>(row);
    return (at * static_cast<size_t>(a.n_heads) + static_cast<size_t>(head)) * static_cast<size_t>(a.head_dim);
}

} // namespace rast
#endif
