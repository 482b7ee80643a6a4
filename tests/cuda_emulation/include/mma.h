/* mma.h: nvcuda::wmma for 16x16x16 tiles of bf16 or half with float accumulation. Lane l holds the 8 elements
 * [l / 2][8 * (l % 2) ..] of a tile, whatever its layout in memory; CUDA leaves this open, and so must kernels. */
#ifndef CUDA_EMULATION_MMA_H
#define CUDA_EMULATION_MMA_H

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace nvcuda {
namespace wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int m, int n, int k, class T, class Layout = void> struct fragment {
    static_assert(m == 16 && n == 16 && k == 16, "16x16x16 is what the emulation has");
    static constexpr int num_elements = 8;
    using element_type = T;
    T x[8];
};

template <class F, class T> void fill_fragment(F &f, const T &v) {
    for (auto &x : f.x) x = v;
}

/* Checks what CUDA demands: the same arguments in all lanes, 32-byte alignment, a stride of whole 16 bytes. */
template <class T> void meet(const T *p, unsigned stride, const char *file, int line) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p);
    const uint64_t first =
        ::cuda_emulation::warp(::cuda_emulation::SHUFFLE, 0xffffffffu, at ^ ((uint64_t)stride << 48), 0, file, line);
    if (first != (at ^ ((uint64_t)stride << 48)))
        ::cuda_emulation::fail(cudaErrorLaunchFailure, "lanes give a matrix fragment different addresses", file, line);
    if (at % 32 || stride * sizeof(T) % 16)
        ::cuda_emulation::fail(cudaErrorMisalignedAddress, "a matrix fragment's memory is not aligned", file, line);
}

template <class F, class T> void load_matrix(F &f, const T *p, unsigned stride, bool rows, const char *file, int line) {
    meet(p, stride, file, line);
    const int lane = ::cuda_emulation::lane(), i = lane / 2, j = lane % 2 * 8;
    for (int e = 0; e < 8; e++) f.x[e] = rows ? p[i * (size_t)stride + j + e] : p[(j + e) * (size_t)stride + i];
}

template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout> &f, const T *p, unsigned stride, CUDA_EMULATION_SITE) {
    load_matrix(f, p, stride, std::is_same_v<Layout, row_major>, file, line);
}
template <class T>
void load_matrix_sync(fragment<accumulator, 16, 16, 16, T> &f, const T *p, unsigned stride, layout_t layout,
                      CUDA_EMULATION_SITE) {
    load_matrix(f, p, stride, layout == mem_row_major, file, line);
}
template <class T>
void store_matrix_sync(T *p, const fragment<accumulator, 16, 16, 16, T> &f, unsigned stride, layout_t layout,
                       CUDA_EMULATION_SITE) {
    meet(p, stride, file, line);
    const int lane = ::cuda_emulation::lane(), i = lane / 2, j = lane % 2 * 8;
    for (int e = 0; e < 8; e++)
        (layout == mem_row_major ? p[i * (size_t)stride + j + e] : p[(j + e) * (size_t)stride + i]) = f.x[e];
}

/* d = a b + c, each lane's 8 elements as floats: [32] lanes of {a, b, c}; d in place of c. */
struct Product {
    float a[8], b[8], c[8];
};
void multiply(void *const given[32]);

template <class T, class LayoutA, class LayoutB>
void mma_sync(fragment<accumulator, 16, 16, 16, float> &d, const fragment<matrix_a, 16, 16, 16, T, LayoutA> &a,
              const fragment<matrix_b, 16, 16, 16, T, LayoutB> &b, const fragment<accumulator, 16, 16, 16, float> &c,
              CUDA_EMULATION_SITE) {
    Product p;
    for (int e = 0; e < 8; e++) {
        p.a[e] = (float)a.x[e];
        p.b[e] = (float)b.x[e];
        p.c[e] = c.x[e];
    }
    ::cuda_emulation::warp_collect(&p, multiply, file, line);
    for (int e = 0; e < 8; e++) d.x[e] = p.c[e];
}

} // namespace wmma
} // namespace nvcuda
#endif
