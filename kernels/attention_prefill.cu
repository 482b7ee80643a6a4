/* attention_prefill.cu: attention of segments of many rows on tensor cores (16-bit caches).
 *
 * A block takes 64 queries of one KV head: rows times the heads of a group are one list, so that a group shares K and V here as
 * well. It goes over the keys by KV blocks of 32, the next one under way while this one is worked on. A warp has 16 queries:
 * scores go through shared memory once, where two lanes have a query's softmax; outputs stay in accumulators. How an accumulator's
 * elements lie is unspecified, so a warp finds out which query each belongs to by loading a matrix of row numbers.
 *
 * A key that some of the queries do not see must not reach them as 0 * NaN: where a block of keys is not seen by all, values that
 * are not finite become 0, and queries that do see such a key become NaN.
 */
#include "async.h"
#include "attention.h"

#include <mma.h>
#include <type_traits>

using namespace rast;

namespace {

namespace wmma = nvcuda::wmma;

constexpr int TILE = 16, WARPS = 4, THREADS = WARPS * WARP, QUERIES = WARPS * TILE;
constexpr int SCORE_STRIDE = BLOCK + 8; /* elements of a row of scores or probabilities: rows on different banks */
constexpr size_t ALIGN = 32;            /* of a tile's address */

/* Shared memory: queries [QUERIES][SIZE + 8], STAGES of K and V [BLOCK][SIZE + 8] each, scores, probabilities. */
template <int SIZE> struct layout {
    static constexpr int STAGES = SIZE > 128 ? 1 : 2; /* 100 KB are the most that some devices have */
    static constexpr int STRIDE = SIZE + 8;
    static constexpr size_t query_bytes = QUERIES * STRIDE * 2, kv_bytes = BLOCK * STRIDE * 2;
    static constexpr size_t score_bytes = QUERIES * SCORE_STRIDE * 4, weight_bytes = QUERIES * SCORE_STRIDE * 2;
    static constexpr size_t bytes = query_bytes + 2 * STAGES * kv_bytes + score_bytes + weight_bytes + ALIGN;
};

/* The tile that a block works on: tiles of long segments, in order. Returns its segment, or -1; *tile is its number there.
 * Every warp finds it for itself. */
__device__ int32_t find_tile(const attention_args &a, int32_t group, int32_t number, int32_t *tile) {
    const int lane = static_cast<int>(threadIdx.x) % WARP;
    const int32_t n_segs = ints(a.pass.count)[1], *seg_row = ints(a.pass.seg_row);
    int32_t before = 0;
    for (int32_t first = 0; first < n_segs; first += WARP) {
        const int32_t seg = first + lane, rows = seg < n_segs ? seg_row[seg + 1] - seg_row[seg] : 0;
        const int32_t mine = rows > SHORT_SEGMENT ? (rows * group + QUERIES - 1) / QUERIES : 0;
        int32_t end = mine;
#pragma unroll
        for (int o = 1; o < WARP; o *= 2) {
            const int32_t other = __shfl_up_sync(ALL_LANES, end, static_cast<unsigned>(o));
            if (lane >= o) end += other;
        }
        const bool here = number >= before + end - mine && number < before + end;
        const unsigned who = __ballot_sync(ALL_LANES, here);
        if (who) {
            const int found = __ffs(static_cast<int>(who)) - 1;
            *tile = number - before - __shfl_sync(ALL_LANES, end - mine, found);
            return first + found;
        }
        before += __shfl_sync(ALL_LANES, end, WARP - 1);
    }
    return -1;
}

/* Begins the copies of K and V of a KV block; tokens from n on become zeros. k: the head's K in the cache. */
template <class T, int STRIDE>
__device__ __forceinline__ void begin_block(T *keys, T *values, const char *k, size_t v_offset, int32_t dim,
                                            int32_t n) {
    const T *from_k = reinterpret_cast<const T *>(k), *from_v = reinterpret_cast<const T *>(k + v_offset);
    const int32_t per_token = dim / 8;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < BLOCK * per_token; i += THREADS) {
        const int32_t key_token = i % BLOCK, value_token = i / per_token;
        async_copy16(keys + key_token * STRIDE + i / BLOCK * 8, from_k + i * 8, key_token < n);
        async_copy16(values + value_token * STRIDE + i % per_token * 8, from_v + i * 8, value_token < n);
    }
    async_commit();
}

/* Values that are not finite become 0; bad[token]: it had one. Returns whether any had, to all threads. */
template <class T, int SIZE, int STRIDE> __device__ bool remove_bad(T *values, int32_t *bad) {
    constexpr int PER_TOKEN = THREADS / BLOCK, WORDS = SIZE / 2 / PER_TOKEN;
    constexpr uint32_t exponent = std::is_same<T, __half>::value ? 0x7c00u : 0x7f80u;
    const int thread = static_cast<int>(threadIdx.x), token = thread / PER_TOKEN;
    uint32_t *words = reinterpret_cast<uint32_t *>(values + token * STRIDE) + thread % PER_TOKEN;
    bool found = false;
    for (int i = 0; i < WORDS; i++) {
        const uint32_t word = words[i * PER_TOKEN];
        if ((word & exponent) != exponent && (word >> 16 & exponent) != exponent) continue;
        words[i * PER_TOKEN] = 0;
        found = true;
    }
    const unsigned lanes = __ballot_sync(ALL_LANES, found);
    if (thread % PER_TOKEN == 0) bad[token] = (lanes >> thread % WARP & ((1u << PER_TOKEN) - 1)) != 0;
    return __syncthreads_or(found) != 0;
}

/* Grid: tiles of queries, the last first; KV heads; models. T: type of the cache; SIZE: head_dim or more, the rest is zeros. */
template <class T, int SIZE>
__global__ void __launch_bounds__(THREADS, SIZE > 128 ? 1 : 2) long_kernel(attention_args a) {
    using L = layout<SIZE>;
    constexpr int STRIDE = L::STRIDE, N = SIZE / TILE;
    /* large heads' accumulators leave no registers for more */
    [[maybe_unused]] constexpr int STEPS = SIZE > 128 ? 1 : 4;
    RAST_DYNAMIC_SHARED(unsigned char, shared);
    __shared__ float scale_of[QUERIES];
    __shared__ int32_t bad[BLOCK];
    const int thread = static_cast<int>(threadIdx.x), warp = thread / WARP, lane = thread % WARP;
    const int32_t dim = a.head_dim, group = a.n_heads / a.n_kv_heads, kv_head = static_cast<int32_t>(blockIdx.y);
    const size_t model = blockIdx.z;
    int32_t tile = 0;
    const int32_t seg = find_tile(a, group, static_cast<int32_t>(gridDim.x - 1 - blockIdx.x), &tile);
    if (seg < 0) return;

    unsigned char *room = shared + (ALIGN - reinterpret_cast<uintptr_t>(shared) % ALIGN) % ALIGN;
    T *const queries = reinterpret_cast<T *>(room), *const stages = queries + QUERIES * STRIDE;
    float *const scores =
        reinterpret_cast<float *>(stages + 2 * L::STAGES * BLOCK * STRIDE) + warp * TILE * SCORE_STRIDE;
    T *const weights = reinterpret_cast<T *>(room + L::query_bytes + 2 * L::STAGES * L::kv_bytes + L::score_bytes) +
                       warp * TILE * SCORE_STRIDE;

    const int32_t first = ints(a.pass.seg_row)[seg], begin = tile * QUERIES;
    const int32_t all = (ints(a.pass.seg_row)[seg + 1] - first) * group;
    const int32_t n = all - begin < QUERIES ? all - begin : QUERIES;
    const range early = seen_by(a, first + begin / group), late = seen_by(a, first + (begin + n - 1) / group);
    const int32_t first_block = early.lo / BLOCK, end_block = (late.hi + BLOCK - 1) / BLOCK;

    begin_block<T, STRIDE>(stages, stages + BLOCK * STRIDE, block_of(a, model, seg, kv_head, first_block * BLOCK),
                           a.v_offset, dim, late.hi - first_block * BLOCK);
    for (int32_t i = thread; i < QUERIES * (STRIDE / 2); i += THREADS) { /* queries, in pairs; zeros around them */
        const int32_t query = begin + i / (STRIDE / 2), d = i % (STRIDE / 2) * 2;
        float x[2] = {};
        if (query < all && d < dim)
            vector<float, 2>::load(address<const float>(a.q) +
                                       head_at(a, model, first + query / group, kv_head * group + query % group) + d,
                                   x);
        reinterpret_cast<uint32_t *>(queries)[i] = pack<T>(x[0] * a.scale, x[1] * a.scale);
    }
    if (dim < SIZE) /* what no copy writes */
        for (int32_t i = thread; i < 2 * L::STAGES * BLOCK * (SIZE - dim); i += THREADS)
            stages[i / (SIZE - dim) * STRIDE + dim + i % (SIZE - dim)] = rounded<T>(0.0f);

    /* two lanes have a query: its keys in turns of four */
    const int mine = lane / 2, half = lane % 2;
    const int32_t query = begin + warp * TILE + mine;
    const range seen = query < all ? seen_by(a, first + query / group) : range{0, 0};
    float max = -INFINITY, sum = 0;

    wmma::fragment<wmma::accumulator, TILE, TILE, TILE, float> acc[N];
#pragma unroll
    for (int f = 0; f < N; f++) wmma::fill_fragment(acc[f], 0.0f);
    int row_of[acc[0].num_elements];
    {
        wmma::fragment<wmma::accumulator, TILE, TILE, TILE, float> rows;
        for (int i = lane; i < TILE * TILE; i += WARP)
            scores[i / TILE * SCORE_STRIDE + i % TILE] = static_cast<float>(i / TILE);
        __syncwarp();
        wmma::load_matrix_sync(rows, scores, SCORE_STRIDE, wmma::mem_row_major);
        for (int i = 0; i < rows.num_elements; i++) row_of[i] = static_cast<int>(rows.x[i]);
        __syncwarp();
    }

    for (int32_t block = first_block; block < end_block; block++) {
        T *const keys = stages + (block - first_block) % L::STAGES * 2 * BLOCK * STRIDE, *const values =
                                                                                             keys + BLOCK * STRIDE;
        const int32_t base = block * BLOCK, next = base + BLOCK;
        if (L::STAGES == 2 && block + 1 < end_block) {
            T *const to = stages + (block + 1 - first_block) % L::STAGES * 2 * BLOCK * STRIDE;
            begin_block<T, STRIDE>(to, to + BLOCK * STRIDE, block_of(a, model, seg, kv_head, next), a.v_offset, dim,
                                   late.hi - next);
            async_wait<1>();
        } else {
            async_wait<0>();
        }
        __syncthreads();
        const bool everyone = base >= late.lo && next <= early.hi;
        const bool any_bad = !everyone && remove_bad<T, SIZE, STRIDE>(values, bad);

        wmma::fragment<wmma::matrix_a, TILE, TILE, TILE, T, wmma::row_major> left;
#pragma unroll
        for (int j = 0; j < BLOCK / TILE; j++) {
            wmma::fragment<wmma::accumulator, TILE, TILE, TILE, float> score;
            wmma::fragment<wmma::matrix_b, TILE, TILE, TILE, T, wmma::col_major> right;
            wmma::fill_fragment(score, 0.0f);
#pragma unroll(STEPS)
            for (int d = 0; d < SIZE; d += TILE) {
                wmma::load_matrix_sync(left, queries + warp * TILE * STRIDE + d, STRIDE);
                wmma::load_matrix_sync(right, keys + j * TILE * STRIDE + d, STRIDE);
                wmma::mma_sync(score, left, right, score);
            }
            wmma::store_matrix_sync(scores + j * TILE, score, SCORE_STRIDE, wmma::mem_row_major);
        }
        __syncwarp();

        float x[BLOCK / 2], most = -INFINITY;
#pragma unroll
        for (int i = 0; i < BLOCK / 8; i++)
            vector<float, 4>::load(scores + mine * SCORE_STRIDE + (2 * i + half) * 4, x + 4 * i);
        if (!everyone)
#pragma unroll
            for (int i = 0; i < BLOCK / 2; i++) {
                const int32_t token = (2 * (i / 4) + half) * 4 + i % 4;
                const bool visible = base + token >= seen.lo && base + token < seen.hi;
                if (!visible)
                    x[i] = -INFINITY;
                else if (any_bad && bad[token])
                    x[i] = NAN;
            }
#pragma unroll
        for (int i = 0; i < BLOCK / 2; i++) most = fmaxf(most, x[i]);
        most = fmaxf(max, fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1)));
        const float zero = most == -INFINITY ? 0.0f : most, keep = __expf(max - zero);
        float part = 0;
#pragma unroll
        for (int i = 0; i < BLOCK / 2; i++) {
            x[i] = __expf(x[i] - zero);
            part += x[i];
        }
#pragma unroll
        for (int i = 0; i < BLOCK / 8; i++)
            vector<T, 4>::store(weights + mine * SCORE_STRIDE + (2 * i + half) * 4, x + 4 * i);
        max = most;
        sum = sum * keep + (part + __shfl_xor_sync(ALL_LANES, part, 1));
        if (half == 0) scale_of[warp * TILE + mine] = keep;
        __syncwarp();

        float scale[acc[0].num_elements];
#pragma unroll
        for (int i = 0; i < acc[0].num_elements; i++) scale[i] = scale_of[warp * TILE + row_of[i]];
#pragma unroll
        for (int f = 0; f < N; f++)
#pragma unroll
            for (int i = 0; i < acc[f].num_elements; i++) acc[f].x[i] *= scale[i];
#pragma unroll 1
        for (int j = 0; j < BLOCK; j += TILE) {
            wmma::load_matrix_sync(left, weights + j, SCORE_STRIDE);
#pragma unroll
            for (int f = 0; f < N; f++) {
                wmma::fragment<wmma::matrix_b, TILE, TILE, TILE, T, wmma::row_major> right;
                wmma::load_matrix_sync(right, values + j * STRIDE + f * TILE, STRIDE);
                wmma::mma_sync(acc[f], left, right, acc[f]);
            }
        }
        __syncthreads(); /* the next copies overwrite what has been read here */
        if (L::STAGES == 1 && block + 1 < end_block)
            begin_block<T, STRIDE>(stages, stages + BLOCK * STRIDE, block_of(a, model, seg, kv_head, next), a.v_offset,
                                   dim, late.hi - next);
    }

    const size_t out = query < all ? head_at(a, model, first + query / group, kv_head * group + query % group) : 0;
#pragma unroll
    for (int f = 0; f < N; f++) {
        wmma::store_matrix_sync(scores, acc[f], SCORE_STRIDE, wmma::mem_row_major);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int32_t in_tile = (2 * i + half) * 4, d = f * TILE + in_tile;
            float y[4];
            vector<float, 4>::load(scores + mine * SCORE_STRIDE + in_tile, y);
#pragma unroll
            for (int e = 0; e < 4; e++) y[e] /= sum;
            if (query < all && d < dim) store<4>(address<void>(a.y), a.pass.act_type, out + static_cast<size_t>(d), y);
        }
        __syncwarp();
    }
}

template <class T, int SIZE> void launch(cudaStream_t stream, const attention_args &a) {
    constexpr size_t bytes = layout<SIZE>::bytes;
    const size_t group = static_cast<size_t>(a.n_heads / a.n_kv_heads), rows = static_cast<size_t>(a.pass.cap_rows);
    const size_t long_segments = rows / (SHORT_SEGMENT + 1), segments = static_cast<size_t>(a.pass.cap_segs);
    /* every long segment may end in a tile that is not full */
    const size_t tiles = rows * group / QUERIES + (long_segments < segments ? long_segments : segments);
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(a.n_kv_heads),
                    static_cast<unsigned>(a.pass.n_models));
    cudaFuncSetAttribute(reinterpret_cast<const void *>(long_kernel<T, SIZE>),
                         cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    RAST_LAUNCH((long_kernel<T, SIZE>), grid, THREADS, bytes, stream, a);
}

template <class T> void launch_for_size(cudaStream_t stream, const attention_args &a) {
    if (a.head_dim <= 64)
        launch<T, 64>(stream, a);
    else if (a.head_dim <= 80)
        launch<T, 80>(stream, a);
    else if (a.head_dim <= 96)
        launch<T, 96>(stream, a);
    else if (a.head_dim <= 128)
        launch<T, 128>(stream, a);
    else
        launch<T, 256>(stream, a);
}

} // namespace

bool rast::attend_long_takes(int32_t kv_type, int32_t head_dim) {
    return kv_type != RAST_F32 && head_dim % 8 == 0 && head_dim <= 256;
}

void rast::attend_long(cudaStream_t stream, const attention_args &a) {
    if (a.kv_type == RAST_BF16)
        launch_for_size<__nv_bfloat16>(stream, a);
    else
        launch_for_size<__half>(stream, a);
}
