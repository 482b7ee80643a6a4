/* rope_kv.cu: rotates queries and keys, and writes keys and values to the cache. */
#include "attention.h"

using namespace rast;

namespace {

constexpr int THREADS = 128;

struct rope_args {
    rast_pass pass;
    models base;
    rast_dev q, k, v, table;
    size_t block_stride, v_offset;
    int32_t n_heads, n_kv_heads, head_dim, interleaved;
};

/* P pairs of a head, from pair i on: a and b are what is rotated together. */
template <int P>
__device__ __forceinline__ void load_pairs(const float *x, int32_t i, int32_t half, int32_t interleaved, float *a,
                                           float *b) {
    if (interleaved) {
        float both[2 * P];
#pragma unroll
        for (int j = 0; j < 2; j++) vector<float, P>::load(x + 2 * i + j * P, both + j * P);
#pragma unroll
        for (int j = 0; j < P; j++) a[j] = both[2 * j], b[j] = both[2 * j + 1];
    } else {
        vector<float, P>::load(x + i, a);
        vector<float, P>::load(x + half + i, b);
    }
}

/* angles: (cos, sin) of pair 0 */
template <int P> __device__ __forceinline__ void rotate(const float *angles, int32_t i, float *a, float *b) {
    float both[2 * P];
#pragma unroll
    for (int j = 0; j < 2; j++) vector<float, P>::load(angles + 2 * i + j * P, both + j * P);
#pragma unroll
    for (int j = 0; j < P; j++) {
        const float c = both[2 * j], s = both[2 * j + 1], x = a[j], y = b[j];
        a[j] = x * c - y * s;
        b[j] = y * c + x * s;
    }
}

/* Rotated keys to K of their head and block, in order of dimensions. X: key_vector() */
template <class T, int P, int X>
__device__ __forceinline__ void store_key(T *k, int32_t token, int32_t i, int32_t half, int32_t interleaved,
                                          const float *a, const float *b) {
    constexpr int N = P < X ? P : X; /* that can be stored together */
    if (interleaved) {
        float both[2 * P];
#pragma unroll
        for (int j = 0; j < P; j++) both[2 * j] = a[j], both[2 * j + 1] = b[j];
#pragma unroll
        for (int j = 0; j < 2 * P; j += N) vector<T, N>::store(k + key_at<X>(2 * i + j, token), both + j);
    } else {
#pragma unroll
        for (int j = 0; j < P; j += N) {
            vector<T, N>::store(k + key_at<X>(i + j, token), a + j);
            vector<T, N>::store(k + key_at<X>(half + i + j, token), b + j);
        }
    }
}

/* Grid: rows, parts of a row, models. A thread takes P pairs of a head of q or k, or as many values of v. table [positions,
 * head_dim / 2, 2] */
template <class T, int P, int X> __global__ void rope_kv_kernel(rope_args a) {
    const int32_t row = static_cast<int32_t>(blockIdx.x), half = a.head_dim / 2, per_head = half / P;
    if (row >= ints(a.pass.count)[RAST_OF_ROWS]) return;
    const int32_t item = static_cast<int32_t>(blockIdx.y * THREADS + threadIdx.x), head = item / per_head;
    const int32_t i = item % per_head * P, n_q = a.n_heads, n_kv = a.n_kv_heads;
    const size_t m = blockIdx.z, at = m * static_cast<size_t>(a.pass.cap_rows) + static_cast<size_t>(row);
    const size_t dim = static_cast<size_t>(a.head_dim);
    const int32_t position = ints(a.pass.pos)[row], token = position % BLOCK;
    const float *angles = address<const float>(a.table) + static_cast<size_t>(position) * dim;
    float x[P], y[P];
    if (head < n_q) {
        float *q = address<float>(a.q) + (at * static_cast<size_t>(n_q) + static_cast<size_t>(head)) * dim;
        load_pairs<P>(q, i, half, a.interleaved, x, y);
        rotate<P>(angles, i, x, y);
        if (a.interleaved) {
            float both[2 * P];
#pragma unroll
            for (int j = 0; j < P; j++) both[2 * j] = x[j], both[2 * j + 1] = y[j];
#pragma unroll
            for (int j = 0; j < 2; j++) vector<float, P>::store(q + 2 * i + j * P, both + j * P);
        } else {
            vector<float, P>::store(q + i, x);
            vector<float, P>::store(q + half + i, y);
        }
        return;
    }
    if (head >= n_q + 2 * n_kv) return;
    const size_t kv_head = static_cast<size_t>((head - n_q) % n_kv);
    const size_t from = (at * static_cast<size_t>(n_kv) + kv_head) * dim;
    const size_t entry = static_cast<size_t>(ints(a.pass.row_seg)[row]) * static_cast<size_t>(a.pass.table_stride);
    const int32_t block = ints(a.pass.block_table)[entry + static_cast<size_t>(position / BLOCK)];
    T *k = address<T>(a.base.data[m] + static_cast<size_t>(block) * a.block_stride) + kv_head * BLOCK * dim;
    if (head < n_q + n_kv) {
        load_pairs<P>(address<const float>(a.k) + from, i, half, a.interleaved, x, y);
        rotate<P>(angles, i, x, y);
        store_key<T, P, X>(k, token, i, half, a.interleaved, x, y);
    } else {
        T *v = reinterpret_cast<T *>(reinterpret_cast<char *>(k) + a.v_offset) + static_cast<size_t>(token) * dim;
        load_pairs<P>(address<const float>(a.v) + from, i, half, 0, x, y);
        vector<T, P>::store(v + i, x);
        vector<T, P>::store(v + half + i, y);
    }
}

template <class T, int P, int X> void launch(cudaStream_t stream, const rope_args &a) {
    const size_t heads = static_cast<size_t>(a.n_heads) + 2 * static_cast<size_t>(a.n_kv_heads);
    const dim3 grid(static_cast<unsigned>(a.pass.cap_rows),
                    ceil_div(heads * static_cast<size_t>(a.head_dim / 2 / P), THREADS),
                    static_cast<unsigned>(a.pass.n_models));
    RAST_LAUNCH((rope_kv_kernel<T, P, X>), grid, THREADS, 0, stream, a);
}

} // namespace

void rast_kernel_rope_kv(cudaStream_t stream, const rast_pass *pass, rast_dev q, rast_dev k, rast_dev v, rast_dev table,
                         int32_t interleaved, const rast_kv *kv) {
    const rope_args a = {*pass,
                         models_of(kv->base, pass->n_models),
                         q,
                         k,
                         v,
                         table,
                         kv->block_stride,
                         kv->v_offset,
                         kv->n_heads,
                         kv->n_kv_heads,
                         kv->head_dim,
                         interleaved};
    const bool vectors = kv->head_dim % 8 == 0;
    if (kv->type == RAST_F32) {
        if (vectors)
            launch<float, 4, 4>(stream, a);
        else
            launch<float, 1, 2>(stream, a);
    } else if (kv->type == RAST_BF16) {
        if (vectors)
            launch<__nv_bfloat16, 4, 8>(stream, a);
        else
            launch<__nv_bfloat16, 1, 2>(stream, a);
    } else {
        if (vectors)
            launch<__half, 4, 8>(stream, a);
        else
            launch<__half, 1, 2>(stream, a);
    }
}
