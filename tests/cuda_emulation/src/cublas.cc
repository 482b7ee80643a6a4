/* cublas.cc: cuBLAS's products as plain loops: column-major, transpositions, alpha and beta on the host, batches by stride or by
 * arrays of pointers on the device. Sums are float32. */
#include "cublas_v2.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "runtime.h"

#include <algorithm>
#include <string.h>

using namespace cuda_emulation;

struct cublasContext {
    cudaStream_t stream;
    void *workspace;
    size_t workspace_bytes;
    int device;
};

namespace {

std::vector<cublasHandle_t> &handles() {
    static auto *v = new std::vector<cublasHandle_t>();
    return *v;
}
bool alive_handle(cublasHandle_t h) {
    for (cublasHandle_t other : handles())
        if (other == h) return true;
    return false;
}

cublasStatus_t status_of(cudaError_t e) {
    return !e                                                         ? CUBLAS_STATUS_SUCCESS
           : e == cudaErrorMemoryAllocation && !settings().vague_blas ? CUBLAS_STATUS_ALLOC_FAILED
                                                                      : CUBLAS_STATUS_EXECUTION_FAILED;
}

size_t size_of(cudaDataType type) { return type == CUDA_R_32F ? 4 : 2; }

struct Matrix { /* as given: column-major, `ld` from column to column */
    const void *data;
    cudaDataType type;
    int ld;
    bool transposed;
};

float element(const void *p, size_t i, cudaDataType type) {
    if (type == CUDA_R_32F) return static_cast<const float *>(p)[i];
    const uint16_t bits = static_cast<const uint16_t *>(p)[i];
    return type == CUDA_R_16BF ? bf16_to_float(bits) : half_to_float(bits);
}

/* Bytes from the first to past the last element of rows x columns. */
size_t span(int rows, int columns, int ld, cudaDataType type) {
    return rows && columns ? ((size_t)ld * (size_t)(columns - 1) + (size_t)rows) * size_of(type) : 0;
}

/* lines [n, k] of float: element (i, p) of op(a) [n, k], or of op(b)' */
std::vector<float> pack(const Matrix &a, int n, int k, bool along_columns) {
    std::vector<float> lines((size_t)n * (size_t)k);
    for (int i = 0; i < n; i++)
        for (int p = 0; p < k; p++) {
            const size_t at =
                along_columns ? (size_t)i * (size_t)a.ld + (size_t)p : (size_t)p * (size_t)a.ld + (size_t)i;
            lines[(size_t)i * (size_t)k + (size_t)p] = element(a.data, at, a.type);
        }
    return lines;
}

float dot(const float *a, const float *b, int k) {
    float sum[16] = {0};
    int p = 0;
    for (; p + 16 <= k; p += 16)
        for (int e = 0; e < 16; e++) sum[e] += a[p + e] * b[p + e];
    for (; p < k; p++) sum[p % 16] += a[p] * b[p];
    for (int width = 8; width; width /= 2)
        for (int e = 0; e < width; e++) sum[e] += sum[e + width];
    return sum[0];
}

struct Gemm {
    int m, n, k;
    float alpha, beta;
    Matrix a, b;
    void *c;
    cudaDataType type_c;
    int ldc;
    const char *name;

    cudaError_t run() const {
        const bool scaled = alpha != 0.0f && k > 0;
        const int rows_a = a.transposed ? k : m, columns_a = a.transposed ? m : k;
        const int rows_b = b.transposed ? n : k, columns_b = b.transposed ? k : n;
        if (scaled && (!touch_columns(a.data, rows_a, columns_a, a.ld, a.type, false) ||
                       !touch_columns(b.data, rows_b, columns_b, b.ld, b.type, false)))
            return cudaErrorIllegalAddress;
        if ((beta != 0.0f && !touch_columns(c, m, n, ldc, type_c, false)) || !touch_columns(c, m, n, ldc, type_c, true))
            return cudaErrorIllegalAddress;
        std::vector<float> left, right;
        if (scaled) {
            left = pack(a, m, k, a.transposed);
            right = pack(b, n, k, !b.transposed);
        }
        for (int j = 0; j < n; j++)
            for (int i = 0; i < m; i++) {
                const size_t at = (size_t)j * (size_t)ldc + (size_t)i;
                float v = scaled ? alpha * dot(&left[(size_t)i * (size_t)k], &right[(size_t)j * (size_t)k], k) : 0.0f;
                if (beta != 0.0f)
                    v += beta * element(c, at, type_c); /* beta 0: c is not read, NaN there does not matter */
                if (type_c == CUDA_R_32F)
                    static_cast<float *>(c)[at] = v;
                else
                    static_cast<uint16_t *>(c)[at] = type_c == CUDA_R_16BF ? float_to_bf16(v) : float_to_half(v);
            }
        return cudaSuccess;
    }

    bool touch_columns(const void *p, int rows, int columns, int ld, cudaDataType type, bool write) const {
        if (rows == ld || columns == 1) return touch(p, span(rows, columns, ld, type), write, name);
        for (int j = 0; j < columns; j++)
            if (!touch(static_cast<const char *>(p) + (size_t)j * (size_t)ld * size_of(type),
                       (size_t)rows * size_of(type), write, name))
                return false;
        return true;
    }
};

struct Batch {
    long long a, b, c; /* elements from one to the next */
    const void *const *pointers_a, *const *pointers_b;
    void *const *pointers_c; /* on the device; NULL: by stride */
    int n;
};

cublasStatus_t fault(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, const Gemm &g, const void *alpha,
                     const void *beta, int batch, cublasComputeType_t compute) {
    if (!alive_handle(h)) return CUBLAS_STATUS_NOT_INITIALIZED;
    if ((unsigned)ta > CUBLAS_OP_C || (unsigned)tb > CUBLAS_OP_C || g.m < 0 || g.n < 0 || g.k < 0 || batch < 0 ||
        !alpha || !beta)
        return CUBLAS_STATUS_INVALID_VALUE;
    if (g.a.ld < std::max(1, g.a.transposed ? g.k : g.m) || g.b.ld < std::max(1, g.b.transposed ? g.n : g.k) ||
        g.ldc < std::max(1, g.m))
        return CUBLAS_STATUS_INVALID_VALUE;
    /* Of the products that cuBLAS has, those with float32 sums and scales. */
    const bool float_sums = compute == CUBLAS_COMPUTE_32F || compute == CUBLAS_COMPUTE_32F_PEDANTIC ||
                            compute == CUBLAS_COMPUTE_32F_FAST_16F || compute == CUBLAS_COMPUTE_32F_FAST_16BF ||
                            compute == CUBLAS_COMPUTE_32F_FAST_TF32;
    const cudaDataType ab = g.a.type;
    const bool known = ab == CUDA_R_32F || ab == CUDA_R_16F || ab == CUDA_R_16BF;
    if (!float_sums || !known || g.b.type != ab || (g.type_c != CUDA_R_32F && g.type_c != ab))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (compute >= CUBLAS_COMPUTE_32F_FAST_16F && ab != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
    for (const void *p : {g.a.data, g.b.data, static_cast<const void *>(g.c)})
        if (p && (uintptr_t)p % size_of(p == g.c ? g.type_c : ab)) return CUBLAS_STATUS_INVALID_VALUE;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t gemm(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, Gemm g, const void *alpha,
                    const void *beta, Batch batch, cublasComputeType_t compute, const void *site) {
    Call call(Call::USES_DEVICE);
    if (call.error) return status_of(call.error);
    g.a.transposed = ta != CUBLAS_OP_N;
    g.b.transposed = tb != CUBLAS_OP_N;
    if (cublasStatus_t s = fault(h, ta, tb, g, alpha, beta, batch.n, compute)) return s;
    g.alpha = *static_cast<const float *>(alpha);
    g.beta = *static_cast<const float *>(beta);
    if (!g.m || !g.n || !batch.n) return CUBLAS_STATUS_SUCCESS;
    if (h->device != current_device()) return CUBLAS_STATUS_EXECUTION_FAILED;
    return status_of(submit(
        h->stream,
        [g, batch](Context &, const void *, void *host) {
            void *const own = tsan_get_current_fiber();
            tsan_switch_to_fiber(host); /* counting has no part in the stream's order */
            count_product(g.name);
            tsan_switch_to_fiber(own);
            if (batch.pointers_a) {
                const size_t bytes = (size_t)batch.n * sizeof(void *);
                if (!touch(batch.pointers_a, bytes, false, g.name) || !touch(batch.pointers_b, bytes, false, g.name) ||
                    !touch(batch.pointers_c, bytes, false, g.name))
                    return cudaErrorIllegalAddress;
            }
            for (int i = 0; i < batch.n; i++) {
                Gemm one = g;
                if (batch.pointers_a) {
                    one.a.data = batch.pointers_a[i];
                    one.b.data = batch.pointers_b[i];
                    one.c = batch.pointers_c[i];
                    for (const void *p : {one.a.data, one.b.data, static_cast<const void *>(one.c)})
                        if ((uintptr_t)p % 16) return cudaErrorMisalignedAddress; /* cuBLAS may read 16 bytes at once */
                } else {
                    one.a.data = static_cast<const char *>(g.a.data) + (long long)size_of(g.a.type) * batch.a * i;
                    one.b.data = static_cast<const char *>(g.b.data) + (long long)size_of(g.b.type) * batch.b * i;
                    one.c = static_cast<char *>(g.c) + (long long)size_of(g.type_c) * batch.c * i;
                }
                if (cudaError_t e = one.run()) return e;
            }
            return cudaSuccess;
        },
        site));
}

} // namespace

void cuda_emulation::forget_handles() {
    for (cublasHandle_t h : handles()) delete h;
    handles().clear();
    alive().cublas_handles = 0;
}

#define SITE __builtin_return_address(0)

extern "C" {

cublasStatus_t cublasCreate_v2(cublasHandle_t *h) {
    Call call;
    if (h) *h = nullptr;
    if (call.error)
        return status_of(call.error) == CUBLAS_STATUS_ALLOC_FAILED ? CUBLAS_STATUS_ALLOC_FAILED
                                                                   : CUBLAS_STATUS_NOT_INITIALIZED;
    if (!h) return CUBLAS_STATUS_INVALID_VALUE;
    if (forbidden_in_capture()) return CUBLAS_STATUS_NOT_INITIALIZED; /* it allocates */
    *h = new cublasContext{nullptr, nullptr, 0, current_device()};
    handles().push_back(*h);
    alive().cublas_handles++;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy_v2(cublasHandle_t h) {
    Call call;
    if (!alive_handle(h)) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (lasting()) return status_of(lasting());
    drain_all();
    std::vector<cublasHandle_t> left;
    for (cublasHandle_t other : handles())
        if (other != h) left.push_back(other);
    handles() = left;
    delete h;
    alive().cublas_handles--;
    return status_of(call.error);
}
cublasStatus_t cublasGetVersion_v2(cublasHandle_t, int *version) {
    Call call(Call::ANYWHERE);
    if (!version) return CUBLAS_STATUS_INVALID_VALUE;
    *version = CUBLAS_VER_MAJOR * 10000;
    return status_of(call.error);
}
cublasStatus_t cublasSetStream_v2(cublasHandle_t h, cudaStream_t stream) {
    Call call;
    if (!alive_handle(h)) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (call.error) return status_of(call.error);
    if (!stream_exists(stream)) return CUBLAS_STATUS_MAPPING_ERROR;
    h->stream = stream;
    h->workspace = nullptr; /* as in cuBLAS: back to its own */
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetStream_v2(cublasHandle_t h, cudaStream_t *stream) {
    Call call(Call::ANYWHERE);
    if (!alive_handle(h)) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!stream) return CUBLAS_STATUS_INVALID_VALUE;
    *stream = h->stream;
    return status_of(call.error);
}
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t h, void *workspace, size_t bytes) {
    Call call;
    if (!alive_handle(h)) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (call.error) return status_of(call.error);
    if ((uintptr_t)workspace % 256 || (bytes && !device_fault(workspace, bytes).empty()))
        return CUBLAS_STATUS_INVALID_VALUE;
    h->workspace = workspace;
    h->workspace_bytes = bytes;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t h, cublasPointerMode_t mode) {
    Call call(Call::ANYWHERE);
    if (!alive_handle(h)) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (mode != CUBLAS_POINTER_MODE_HOST) return CUBLAS_STATUS_NOT_SUPPORTED;
    return status_of(call.error);
}
cublasStatus_t cublasSetMathMode(cublasHandle_t h, cublasMath_t) {
    Call call(Call::ANYWHERE);
    return alive_handle(h) ? status_of(call.error) : CUBLAS_STATUS_NOT_INITIALIZED;
}
cublasStatus_t cublasSetAtomicsMode(cublasHandle_t h, cublasAtomicsMode_t) {
    Call call(Call::ANYWHERE);
    return alive_handle(h) ? status_of(call.error) : CUBLAS_STATUS_NOT_INITIALIZED;
}

const char *cublasGetStatusName(cublasStatus_t status) {
    switch (status) {
    case CUBLAS_STATUS_SUCCESS:
        return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED:
        return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_ALLOC_FAILED:
        return "CUBLAS_STATUS_ALLOC_FAILED";
    case CUBLAS_STATUS_INVALID_VALUE:
        return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_ARCH_MISMATCH:
        return "CUBLAS_STATUS_ARCH_MISMATCH";
    case CUBLAS_STATUS_MAPPING_ERROR:
        return "CUBLAS_STATUS_MAPPING_ERROR";
    case CUBLAS_STATUS_EXECUTION_FAILED:
        return "CUBLAS_STATUS_EXECUTION_FAILED";
    case CUBLAS_STATUS_INTERNAL_ERROR:
        return "CUBLAS_STATUS_INTERNAL_ERROR";
    case CUBLAS_STATUS_NOT_SUPPORTED:
        return "CUBLAS_STATUS_NOT_SUPPORTED";
    }
    return "<unknown>";
}
const char *cublasGetStatusString(cublasStatus_t status) { return cublasGetStatusName(status); }

cublasStatus_t cublasSgemm_v2(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                              const float *alpha, const float *a, int lda, const float *b, int ldb, const float *beta,
                              float *c, int ldc) {
    return gemm(
        h, ta, tb,
        {m, n, k, 0, 0, {a, CUDA_R_32F, lda, false}, {b, CUDA_R_32F, ldb, false}, c, CUDA_R_32F, ldc, "cublasSgemm"},
        alpha, beta, {0, 0, 0, nullptr, nullptr, nullptr, 1}, CUBLAS_COMPUTE_32F, SITE);
}
cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n,
                                         int k, const float *alpha, const float *a, int lda, long long stride_a,
                                         const float *b, int ldb, long long stride_b, const float *beta, float *c,
                                         int ldc, long long stride_c, int batch) {
    return gemm(h, ta, tb,
                {m,
                 n,
                 k,
                 0,
                 0,
                 {a, CUDA_R_32F, lda, false},
                 {b, CUDA_R_32F, ldb, false},
                 c,
                 CUDA_R_32F,
                 ldc,
                 "cublasSgemmStridedBatched"},
                alpha, beta, {stride_a, stride_b, stride_c, nullptr, nullptr, nullptr, batch}, CUBLAS_COMPUTE_32F,
                SITE);
}
cublasStatus_t cublasGemmEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                            const void *alpha, const void *a, cudaDataType type_a, int lda, const void *b,
                            cudaDataType type_b, int ldb, const void *beta, void *c, cudaDataType type_c, int ldc,
                            cublasComputeType_t compute, cublasGemmAlgo_t) {
    return gemm(h, ta, tb,
                {m, n, k, 0, 0, {a, type_a, lda, false}, {b, type_b, ldb, false}, c, type_c, ldc, "cublasGemmEx"},
                alpha, beta, {0, 0, 0, nullptr, nullptr, nullptr, 1}, compute, SITE);
}
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n,
                                          int k, const void *alpha, const void *a, cudaDataType type_a, int lda,
                                          long long stride_a, const void *b, cudaDataType type_b, int ldb,
                                          long long stride_b, const void *beta, void *c, cudaDataType type_c, int ldc,
                                          long long stride_c, int batch, cublasComputeType_t compute,
                                          cublasGemmAlgo_t) {
    return gemm(
        h, ta, tb,
        {m, n, k, 0, 0, {a, type_a, lda, false}, {b, type_b, ldb, false}, c, type_c, ldc, "cublasGemmStridedBatchedEx"},
        alpha, beta, {stride_a, stride_b, stride_c, nullptr, nullptr, nullptr, batch}, compute, SITE);
}
cublasStatus_t cublasGemmBatchedEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                                   const void *alpha, const void *const a[], cudaDataType type_a, int lda,
                                   const void *const b[], cudaDataType type_b, int ldb, const void *beta,
                                   void *const c[], cudaDataType type_c, int ldc, int batch,
                                   cublasComputeType_t compute, cublasGemmAlgo_t) {
    if (batch > 0 && (!a || !b || !c)) return CUBLAS_STATUS_INVALID_VALUE;
    return gemm(h, ta, tb,
                {m,
                 n,
                 k,
                 0,
                 0,
                 {nullptr, type_a, lda, false},
                 {nullptr, type_b, ldb, false},
                 nullptr,
                 type_c,
                 ldc,
                 "cublasGemmBatchedEx"},
                alpha, beta, {0, 0, 0, a, b, c, batch}, compute, SITE);
}

} // extern "C"
