/* attention_decode.cu: attention of segments of few rows, and of any rows where tensor cores cannot help.
 *
 * A block takes a chunk of absolute positions of one segment, one KV head and its query heads: rows times the heads of a group
 * are one list of queries, taken Q at a time, that share what is loaded of K and V. A warp works on 64 keys at a time. For
 * scores a lane is a key (two, 32 apart), for outputs some dimensions; probabilities go from one view to the other through shared
 * memory. Chunks leave partial results (maximum, sum, weighted values) that a second kernel merges in order.
 *
 * Keys that a row does not see take no part, whatever the cache holds there.
 */
#include "attention.h"

using namespace rast;

namespace {

constexpr int WARPS = 4, THREADS = WARPS * WARP;
constexpr int KEYS = 2 * BLOCK;          /* of a warp at a time */
constexpr int CHUNK = WARPS * KEYS;      /* positions of a block at least */
constexpr int MAX_CHUNKS = 64;           /* longer contexts have longer chunks, */
constexpr size_t MAX_SCRATCH = 64 << 20; /* as many rows have: the room for partial results is bounded */
constexpr int MERGE_THREADS = 64;

/* How a launch shares its work out; by capacities only. */
struct split {
    int32_t chunk, n_chunks; /* positions; of the longest context */
    int32_t n_tiles;         /* blocks that share the queries of a segment; 0: a block has one row of a long segment */
    int32_t longest;         /* rows of a short segment */
    int32_t slots, by_row; /* rows that partial results have room for, a model: slot = row, or longest * segment + i */
};

/* Partial result of a chunk: head_dim weighted values, maximum, sum. */
__host__ __device__ inline size_t partial_floats(int32_t head_dim) { return static_cast<size_t>(head_dim) + 2; }

/* Bytes of one chunk's partial results, all rows. */
size_t chunk_bytes(const rast_pass &pass, int32_t slots, int32_t n_heads, int32_t head_dim) {
    return static_cast<size_t>(pass.n_models) * static_cast<size_t>(slots) * static_cast<size_t>(n_heads) *
           partial_floats(head_dim) * sizeof(float);
}

split split_of(const rast_pass &pass, int32_t n_heads, int32_t head_dim) {
    split s = {};
    s.longest = SHORT_SEGMENT;
    const int64_t by_segment = static_cast<int64_t>(pass.cap_segs) * SHORT_SEGMENT;
    s.by_row = pass.cap_rows <= by_segment;
    s.slots = s.by_row ? pass.cap_rows : static_cast<int32_t>(by_segment);
    size_t most = MAX_SCRATCH / chunk_bytes(pass, s.slots, n_heads, head_dim);
    most = most < 1 ? 1 : most > MAX_CHUNKS ? MAX_CHUNKS : most;
    s.chunk = CHUNK;
    while (ceil_div(static_cast<size_t>(pass.cap_ctx), static_cast<size_t>(s.chunk)) > most) s.chunk *= 2;
    s.n_chunks = static_cast<int32_t>(ceil_div(static_cast<size_t>(pass.cap_ctx), static_cast<size_t>(s.chunk)));
    return s;
}

__device__ __forceinline__ float *partial_of(const attention_args &a, const split &s, size_t model, int32_t slot,
                                             int32_t head, int32_t chunk) {
    const size_t row = model * static_cast<size_t>(s.slots) + static_cast<size_t>(slot);
    const size_t at = row * static_cast<size_t>(a.n_heads) + static_cast<size_t>(head);
    return address<float>(a.scratch) +
           (at * static_cast<size_t>(s.n_chunks) + static_cast<size_t>(chunk)) * partial_floats(a.head_dim);
}

/* What the maximum of scores is worth as an exponent's base; a row that has seen no key yet has none. */
__device__ __forceinline__ float base_of(float max) { return max == -INFINITY ? 0.0f : max; }

/* One block's list of queries: rows first .. first + n_rows - 1 of a segment times the heads of a group. */
struct queries {
    int32_t seg, first, group, n;
    __device__ int32_t row(int32_t i) const { return first + i / group; }
};

/* Grid: chunks of (segments and tiles, or rows); KV heads; models. T: type of the cache; X: key_vector(); a lane has V
 * dimensions at a time, PASSES times. Shared: Q queries and probabilities, then the warps' results. */
template <class T, int X, int V, int PASSES, int Q>
__global__ void __launch_bounds__(THREADS, 2) short_kernel(attention_args a, split s) {
    RAST_DYNAMIC_SHARED(float, shared);
    __shared__ float max_of[WARPS][Q], sum_of[WARPS][Q];
    __shared__ int32_t lo_of[Q], hi_of[Q];
    const int32_t dim = a.head_dim, chunk = static_cast<int32_t>(blockIdx.x) % s.n_chunks;
    const int32_t at = static_cast<int32_t>(blockIdx.x) / s.n_chunks, kv_head = static_cast<int32_t>(blockIdx.y);
    const size_t model = blockIdx.z;
    const int warp = static_cast<int>(threadIdx.x) / WARP, lane = static_cast<int>(threadIdx.x) % WARP;
    const int32_t *count = ints(a.pass.count), *seg_row = ints(a.pass.seg_row);

    queries all = {};
    all.group = a.n_heads / a.n_kv_heads;
    int32_t tile = 0, n_tiles = 1;
    if (s.n_tiles) {
        all.seg = at / s.n_tiles;
        if (all.seg >= count[1]) return;
        all.first = seg_row[all.seg];
        const int32_t n_rows = seg_row[all.seg + 1] - all.first;
        if (n_rows > s.longest) return;
        all.n = n_rows * all.group;
        tile = at % s.n_tiles;
        n_tiles = s.n_tiles;
    } else {
        if (at >= count[0]) return;
        all.seg = ints(a.pass.row_seg)[at];
        if (seg_row[all.seg + 1] - seg_row[all.seg] <= s.longest) return;
        all.first = at;
        all.n = all.group;
    }
    float *const q = shared, *const p = shared + Q * dim + warp * KEYS * Q, *const results = shared;
    const int32_t begin = chunk * s.chunk, end = begin + s.chunk;

    for (; tile * Q < all.n; tile += n_tiles) {
        const int32_t n = all.n - tile * Q < Q ? all.n - tile * Q : Q;
        /* rows of a segment follow each other, so that the first and the last bound what the others see */
        const range early = seen_by(a, all.row(tile * Q)), late = seen_by(a, all.row(tile * Q + n - 1));
        const int32_t lo = early.lo > begin ? early.lo : begin, hi = late.hi < end ? late.hi : end;
        if (lo >= hi) continue;
        for (int32_t i = static_cast<int32_t>(threadIdx.x); i < Q * dim; i += THREADS) {
            const int32_t query = tile * Q + i / dim;
            float x = 0;
            if (query < all.n)
                x = address<const float>(
                        a.q)[head_at(a, model, all.row(query), kv_head * all.group + query % all.group) +
                             static_cast<size_t>(i % dim)] *
                    a.scale;
            q[i] = x;
        }
        if (threadIdx.x < Q) {
            const int32_t query = tile * Q + static_cast<int32_t>(threadIdx.x);
            const range seen = query < all.n ? seen_by(a, all.row(query)) : range{0, 0};
            lo_of[threadIdx.x] = seen.lo;
            hi_of[threadIdx.x] = seen.hi;
        }
        __syncthreads();

        float max[Q], sum[Q], acc[Q][PASSES][V]; /* sum: of the lane's own keys */
#pragma unroll
        for (int i = 0; i < Q; i++) {
            max[i] = -INFINITY;
            sum[i] = 0;
#pragma unroll
            for (int j = 0; j < PASSES * V; j++) acc[i][j / V][j % V] = 0;
        }
        for (int32_t first = begin + warp * KEYS; first < hi; first += CHUNK) {
            if (first + KEYS <= lo) continue;
            const T *k[2];
            bool in[2];
            float score[2][Q];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int32_t key = first + j * BLOCK + lane;
                in[j] = key >= lo && key < hi;
                k[j] = in[j] ? reinterpret_cast<const T *>(block_of(a, model, all.seg, kv_head, key)) : nullptr;
#pragma unroll
                for (int i = 0; i < Q; i++) score[j][i] = 0;
            }
#pragma unroll 4
            for (int32_t d = 0; d < dim; d += X) {
                float keys[2][X] = {};
#pragma unroll
                for (int j = 0; j < 2; j++)
                    if (in[j]) vector<T, X>::load(k[j] + key_at<X>(d, lane), keys[j]);
#pragma unroll
                for (int i = 0; i < Q; i++) {
                    float query[X];
#pragma unroll
                    for (int e = 0; e < X; e += X < 4 ? X : 4)
                        vector < float, X<4 ? X : 4>::load(q + i * dim + d + e, query + e);
#pragma unroll
                    for (int e = 0; e < X; e++)
#pragma unroll
                        for (int j = 0; j < 2; j++) score[j][i] = fmaf(query[e], keys[j][e], score[j][i]);
                }
            }
#pragma unroll
            for (int i = 0; i < Q; i++) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const int32_t key = first + j * BLOCK + lane;
                    if (!in[j] || key < lo_of[i] || key >= hi_of[i]) score[j][i] = -INFINITY;
                }
                const float before = max[i];
                max[i] = fmaxf(before, warp_max(fmaxf(score[0][i], score[1][i])));
                const float keep = expf(before - base_of(max[i]));
                sum[i] *= keep;
#pragma unroll
                for (int j = 0; j < PASSES * V; j++) acc[i][j / V][j % V] *= keep;
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const float e = expf(score[j][i] - base_of(max[i]));
                    sum[i] += e;
                    p[(j * BLOCK + lane) * Q + i] = e;
                }
            }
            __syncwarp();
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int32_t from = first + j * BLOCK > lo ? first + j * BLOCK : lo;
                const int32_t to = first + (j + 1) * BLOCK < hi ? first + (j + 1) * BLOCK : hi;
                if (from >= to) continue;
                const T *v = reinterpret_cast<const T *>(block_of(a, model, all.seg, kv_head, from) + a.v_offset);
#pragma unroll 4
                for (int32_t key = from; key < to; key++) {
                    float weight[Q], values[PASSES][V];
#pragma unroll
                    for (int w = 0; w < PASSES; w++) {
                        const int32_t d = (w * WARP + lane) * V;
                        if (d < dim)
                            vector<T, V>::load(v + static_cast<size_t>(key % BLOCK) * static_cast<size_t>(dim) + d,
                                               values[w]);
                        else
#pragma unroll
                            for (int e = 0; e < V; e++) values[w][e] = 0;
                    }
#pragma unroll
                    for (int i = 0; i < Q; i += Q < 4 ? Q : 4)
                        vector < float, Q<4 ? Q : 4>::load(p + (key - first) * Q + i, weight + i);
                    const bool everyone = key >= late.lo && key < early.hi;
#pragma unroll
                    for (int i = 0; i < Q; i++) {
                        if (!everyone && (key < lo_of[i] || key >= hi_of[i])) continue; /* 0 * NaN is not 0 */
#pragma unroll
                        for (int e = 0; e < PASSES * V; e++)
                            acc[i][e / V][e % V] = fmaf(weight[i], values[e / V][e % V], acc[i][e / V][e % V]);
                    }
                }
            }
            __syncwarp();
        }

        /* the warps' results, on the scale of the block's maximum */
#pragma unroll
        for (int i = 0; i < Q; i++) {
            const float total = warp_sum(sum[i]);
            if (lane == 0) max_of[warp][i] = max[i], sum_of[warp][i] = total;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < Q; i++) {
            float most = max_of[0][i];
#pragma unroll
            for (int w = 1; w < WARPS; w++) most = fmaxf(most, max_of[w][i]);
            const float scale = expf(max[i] - base_of(most));
#pragma unroll
            for (int w = 0; w < PASSES; w++) {
                const int32_t d = (w * WARP + lane) * V;
                if (d >= dim) continue;
#pragma unroll
                for (int e = 0; e < V; e++) acc[i][w][e] *= scale;
                vector < float, V<4 ? V : 4>::store(results + (warp * Q + i) * dim + d, acc[i][w]);
                if constexpr (V == 8) vector<float, 4>::store(results + (warp * Q + i) * dim + d + 4, acc[i][w] + 4);
            }
        }
        __syncthreads();
        for (int32_t x = 2 * static_cast<int32_t>(threadIdx.x); x < n * dim; x += 2 * THREADS) {
            const int32_t i = x / dim, d = x % dim, query = tile * Q + i;
            const int32_t row = all.row(query), head = kv_head * all.group + query % all.group;
            float most = max_of[0][i], total = 0, out[2] = {};
            for (int w = 1; w < WARPS; w++) most = fmaxf(most, max_of[w][i]);
            for (int w = 0; w < WARPS; w++) {
                float part[2];
                vector<float, 2>::load(results + (w * Q + i) * dim + d, part);
                total += sum_of[w][i] * expf(max_of[w][i] - base_of(most));
                out[0] += part[0];
                out[1] += part[1];
            }
            if (s.n_chunks == 1) {
                out[0] /= total;
                out[1] /= total;
                store<2>(address<void>(a.y), a.pass.act_type, head_at(a, model, row, head) + static_cast<size_t>(d),
                         out);
                continue;
            }
            const int32_t slot = s.by_row ? row : all.seg * s.longest + row - all.first;
            float *partial = partial_of(a, s, model, slot, head, chunk);
            vector<float, 2>::store(partial + d, out);
            if (d == 0) partial[dim] = most, partial[dim + 1] = total;
        }
        __syncthreads();
    }
}

/* Grid: slots, heads, models. A thread has pairs of dimensions. */
__global__ void __launch_bounds__(MERGE_THREADS, 8) merge_kernel(attention_args a, split s) {
    const int32_t *count = ints(a.pass.count), *seg_row = ints(a.pass.seg_row);
    const int32_t slot = static_cast<int32_t>(blockIdx.x), head = static_cast<int32_t>(blockIdx.y), dim = a.head_dim;
    int32_t row = slot, seg;
    if (s.by_row) {
        if (row >= count[0]) return;
        seg = ints(a.pass.row_seg)[row];
    } else {
        seg = slot / s.longest;
        if (seg >= count[1]) return;
        row = seg_row[seg] + slot % s.longest;
        if (row >= seg_row[seg + 1]) return;
    }
    if (seg_row[seg + 1] - seg_row[seg] > s.longest) return;
    const range seen = seen_by(a, row);
    const int32_t from = seen.lo / s.chunk, to = (seen.hi - 1) / s.chunk;
    const float *partial = partial_of(a, s, blockIdx.z, slot, head, 0);
    const size_t step = partial_floats(dim);

    float most = -INFINITY, total = 0;
    for (int32_t c = from; c <= to; c++)
        most = fmaxf(most, partial[static_cast<size_t>(c) * step + static_cast<size_t>(dim)]);
    for (int32_t c = from; c <= to; c++) {
        const float *tail = partial + static_cast<size_t>(c) * step + dim;
        total += tail[1] * expf(tail[0] - base_of(most));
    }
    for (int32_t d = 2 * static_cast<int32_t>(threadIdx.x); d < dim; d += 2 * MERGE_THREADS) {
        float out[2] = {};
        for (int32_t c = from; c <= to; c++) {
            const float *one = partial + static_cast<size_t>(c) * step;
            const float scale = expf(one[dim] - base_of(most));
            float values[2];
            vector<float, 2>::load(one + d, values);
            out[0] = fmaf(values[0], scale, out[0]);
            out[1] = fmaf(values[1], scale, out[1]);
        }
        out[0] /= total;
        out[1] /= total;
        store<2>(address<void>(a.y), a.pass.act_type, head_at(a, blockIdx.z, row, head) + static_cast<size_t>(d), out);
    }
}

template <class T, int X, int V, int PASSES, int Q>
void launch(cudaStream_t stream, const attention_args &a, split s, bool long_rows) {
    const int32_t group = a.n_heads / a.n_kv_heads;
    size_t blocks = static_cast<size_t>(a.pass.cap_rows);
    if (!long_rows) { /* as many blocks for a segment as it has queries, if all are equally long */
        const unsigned rows = ceil_div(static_cast<size_t>(a.pass.cap_rows), static_cast<size_t>(a.pass.cap_segs));
        const size_t tiles =
            static_cast<size_t>(rows < SHORT_SEGMENT ? rows : SHORT_SEGMENT) * static_cast<size_t>(group);
        s.n_tiles = static_cast<int32_t>(ceil_div(tiles, Q));
        blocks = static_cast<size_t>(a.pass.cap_segs) * static_cast<size_t>(s.n_tiles);
    }
    const size_t dim = static_cast<size_t>(a.head_dim), first = Q * (dim + WARPS * KEYS), results = WARPS * Q * dim;
    const size_t shared = (first > results ? first : results) * sizeof(float);
    const dim3 grid(static_cast<unsigned>(blocks * static_cast<size_t>(s.n_chunks)),
                    static_cast<unsigned>(a.n_kv_heads), static_cast<unsigned>(a.pass.n_models));
    RAST_LAUNCH((short_kernel<T, X, V, PASSES, Q>), grid, THREADS, shared, stream, a, s);
}

template <class T, int V> void launch_for_group(cudaStream_t stream, const attention_args &a, const split &s) {
    const unsigned rows = ceil_div(static_cast<size_t>(a.pass.cap_rows), static_cast<size_t>(a.pass.cap_segs));
    const size_t n = static_cast<size_t>(rows) * static_cast<size_t>(a.n_heads / a.n_kv_heads);
    if (n <= 2)
        launch<T, 8, V, 1, 2>(stream, a, s, false);
    else if (n <= 4)
        launch<T, 8, V, 1, 4>(stream, a, s, false);
    else
        launch<T, 8, V, 1, 8>(stream, a, s, false);
}

template <class T> void launch_for_size(cudaStream_t stream, const attention_args &a, const split &s, bool long_rows) {
    if (a.head_dim % 8)
        launch<T, 2, 2, 8, 4>(stream, a, s, long_rows);
    else if (a.head_dim > 256)
        launch<T, 8, 8, 2, 4>(stream, a, s, long_rows);
    else if (a.head_dim > 128)
        launch_for_group<T, 8>(stream, a, s);
    else if (a.head_dim > 64)
        launch_for_group<T, 4>(stream, a, s);
    else
        launch_for_group<T, 2>(stream, a, s);
}

void launch_for_type(cudaStream_t stream, const attention_args &a, const split &s, bool long_rows) {
    if (a.kv_type == RAST_BF16)
        launch_for_size<__nv_bfloat16>(stream, a, s, long_rows);
    else if (a.kv_type == RAST_F16)
        launch_for_size<__half>(stream, a, s, long_rows);
    else if (a.head_dim % 8)
        launch<float, 2, 2, 8, 4>(stream, a, s, long_rows);
    else
        launch<float, 4, 4, 4, 4>(stream, a, s, long_rows);
}

} // namespace

size_t rast::attend_short_scratch(const rast_pass &pass, int32_t n_heads, int32_t head_dim) {
    const split s = split_of(pass, n_heads, head_dim);
    return s.n_chunks == 1 ? 0 : static_cast<size_t>(s.n_chunks) * chunk_bytes(pass, s.slots, n_heads, head_dim);
}

size_t rast::attend_short_scratch_at_most(const rast_pass &pass, int32_t n_heads, int32_t head_dim) {
    const split s = split_of(pass, n_heads, head_dim);
    size_t chunks = ceil_div(static_cast<size_t>(pass.cap_ctx), static_cast<size_t>(CHUNK));
    if (chunks > MAX_CHUNKS) chunks = MAX_CHUNKS;
    const size_t bytes = chunks * chunk_bytes(pass, s.slots, n_heads, head_dim);
    return chunks == 1 ? 0 : bytes < MAX_SCRATCH ? bytes : MAX_SCRATCH;
}

void rast::attend_short(cudaStream_t stream, const attention_args &a) {
    const split s = split_of(a.pass, a.n_heads, a.head_dim);
    launch_for_type(stream, a, s, false);
    if (s.n_chunks == 1) return;
    const dim3 grid(static_cast<unsigned>(s.slots), static_cast<unsigned>(a.n_heads),
                    static_cast<unsigned>(a.pass.n_models));
    RAST_LAUNCH(merge_kernel, grid, MERGE_THREADS, 0, stream, a, s);
}

void rast::attend_long_plain(cudaStream_t stream, const attention_args &a) {
    split s = split_of(a.pass, a.n_heads, a.head_dim);
    s.chunk = a.pass.cap_ctx;
    s.n_chunks = 1;
    launch_for_type(stream, a, s, true);
}
