/* cuda_emulation.h: what device code may use, on the host. Each CUDA thread is a fiber; threads of a block switch only at
 * barriers, warp operations and their end, and one block runs at a time (src/block.cc).
 *
 * __shared__ arrays are static variables, which the Makefile gathers in a section and the emulation refills for every block.
 * Kernels that have any are in unnamed namespaces (the Makefile checks).
 */
#ifndef CUDA_EMULATION_H
#define CUDA_EMULATION_H

#include "cuda_emulation_api.h"
#include "cuda_runtime_api.h"

#include <math.h>
#include <string.h>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))

/* ---- vectors --------------------------------------------------------------------------------------------------------- */

#define CUDA_EMULATION_VECTORS(T, name, a1, a2, a4)                                                                    \
    struct name##1 { T x; };                                                                                           \
    struct alignas(a2) name##2 { T x, y; };                                                                            \
    struct name##3 { T x, y, z; };                                                                                     \
    struct alignas(a4) name##4 { T x, y, z, w; };                                                                      \
    static inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                                  \
    static inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                          \
    static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_EMULATION_VECTORS(signed char, char, 1, 2, 4)
CUDA_EMULATION_VECTORS(unsigned char, uchar, 1, 2, 4)
CUDA_EMULATION_VECTORS(short, short, 2, 4, 8)
CUDA_EMULATION_VECTORS(unsigned short, ushort, 2, 4, 8)
CUDA_EMULATION_VECTORS(int, int, 4, 8, 16)
CUDA_EMULATION_VECTORS(unsigned, uint, 4, 8, 16)
CUDA_EMULATION_VECTORS(float, float, 4, 8, 16)
CUDA_EMULATION_VECTORS(long long, longlong, 8, 16, 16)
CUDA_EMULATION_VECTORS(unsigned long long, ulonglong, 8, 16, 16)
CUDA_EMULATION_VECTORS(double, double, 8, 16, 16)
#undef CUDA_EMULATION_VECTORS

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

/* ---- launches -------------------------------------------------------------------------------------------------------- */

extern "C" { /* bounds of this library's shared arrays; none: null */
extern char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));
}

namespace cuda_emulation {

struct Self { /* the thread that runs */
    uint3 thread;
};
extern Self *self;
extern uint3 block_index;
extern dim3 block_size, grid_size;

struct Launch {
    const char *name;   /* as written */
    const void *kernel; /* its address: the key of cudaFuncSetAttribute */
    dim3 grid, block;
    size_t shared;
    void *arguments;
    size_t arguments_bytes;
    void (*run)(void *arguments);  /* calls the kernel for one thread */
    void (*free)(void *arguments); /* the runtime owns them */
    char *shared_start, *shared_stop;
    const void *pointers[32]; /* arguments that are pointers */
    int n_pointers;
};
void enqueue(const Launch &, cudaStream_t);

template <class T> static void note_pointer(Launch &l, const T &argument) {
    if constexpr (std::is_pointer_v<T> && !std::is_function_v<std::remove_pointer_t<T>>)
        if (l.n_pointers < 32) l.pointers[l.n_pointers++] = reinterpret_cast<const void *>(argument);
}

template <class T> struct Same {
    using type = T;
};

template <class... P> struct Held { /* a kernel with its arguments */
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> arguments;
    template <size_t... i> void run(std::index_sequence<i...>) { kernel(std::get<i>(arguments)...); }
};

template <class... P>
void launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
            typename Same<P>::type... arguments) {
    using Call = Held<P...>;
    Launch l{};
    l.name = name;
    l.kernel = reinterpret_cast<const void *>(kernel);
    l.grid = grid;
    l.block = block;
    l.shared = shared;
    l.arguments = new Call{kernel, {arguments...}};
    l.arguments_bytes = sizeof(Call);
    l.run = [](void *call) { static_cast<Call *>(call)->run(std::index_sequence_for<P...>()); };
    l.free = [](void *call) { delete static_cast<Call *>(call); };
    l.shared_start = __start_cuda_shared;
    l.shared_stop = __stop_cuda_shared;
    (note_pointer(l, arguments), ...);
    enqueue(l, stream);
}

void *dynamic_shared();

enum Collective : int { BARRIER, BARRIER_COUNT, BARRIER_AND, BARRIER_OR, SYNC, SHUFFLE, VOTE, COLLECT };

/* All threads of a block; for BARRIER_*: of the predicates. */
int barrier(Collective, int predicate, const char *file, int line);

/* All lanes named by mask. SHUFFLE: the value of lane `source` (any lane of the warp, in mask). VOTE: the mask of lanes with
 * value != 0. */
uint64_t warp(Collective, unsigned mask, uint64_t value, int source, const char *file, int line);

/* COLLECT: `work` is called once, with what the 32 lanes of a full warp gave. */
void warp_collect(void *given, void (*work)(void *const given[32]), const char *file, int line);

int lane();
void fence();                      /* __threadfence */
void before_atomic(const void *p); /* gives an atomic access the order that fences around it ask for */
void after_atomic(const void *p);
[[noreturn]] void fail(cudaError_t, const char *message, const char *file,
                       int line); /* ends the launch with an error */

} // namespace cuda_emulation

#define threadIdx (::cuda_emulation::self->thread)
#define blockIdx (::cuda_emulation::block_index)
#define blockDim (::cuda_emulation::block_size)
#define gridDim (::cuda_emulation::grid_size)
static constexpr int warpSize = 32;

#define RAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                                    \
    ::cuda_emulation::launch(#kernel, kernel, (grid), (block), (shared_bytes), (stream), ##__VA_ARGS__)
#define RAST_DYNAMIC_SHARED(type, name) type *name = static_cast<type *>(::cuda_emulation::dynamic_shared())

template <class T> cudaError_t cudaFuncSetAttribute(T *kernel, cudaFuncAttribute attr, int value) {
    return ::cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel), attr, value);
}
template <class T> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, T *kernel) {
    return ::cudaFuncGetAttributes(a, reinterpret_cast<const void *>(kernel));
}
template <class T> cudaError_t cudaMalloc(T **p, size_t bytes) {
    return ::cudaMalloc(reinterpret_cast<void **>(p), bytes);
}
template <class T> cudaError_t cudaMallocHost(T **p, size_t bytes) {
    return ::cudaMallocHost(reinterpret_cast<void **>(p), bytes);
}

/* ---- barriers, warps ------------------------------------------------------------------------------------------------- */

#define CUDA_EMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

static inline void __syncthreads(CUDA_EMULATION_SITE) {
    ::cuda_emulation::barrier(::cuda_emulation::BARRIER, 0, file, line);
}
static inline int __syncthreads_count(int p, CUDA_EMULATION_SITE) {
    return ::cuda_emulation::barrier(::cuda_emulation::BARRIER_COUNT, p, file, line);
}
static inline int __syncthreads_and(int p, CUDA_EMULATION_SITE) {
    return ::cuda_emulation::barrier(::cuda_emulation::BARRIER_AND, p, file, line);
}
static inline int __syncthreads_or(int p, CUDA_EMULATION_SITE) {
    return ::cuda_emulation::barrier(::cuda_emulation::BARRIER_OR, p, file, line);
}
static inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_EMULATION_SITE) {
    ::cuda_emulation::warp(::cuda_emulation::SYNC, mask, 0, 0, file, line);
}
static inline unsigned __ballot_sync(unsigned mask, int p, CUDA_EMULATION_SITE) {
    return (unsigned)::cuda_emulation::warp(::cuda_emulation::VOTE, mask, p != 0, 0, file, line);
}
static inline int __any_sync(unsigned mask, int p, CUDA_EMULATION_SITE) {
    return __ballot_sync(mask, p, file, line) != 0;
}
static inline int __all_sync(unsigned mask, int p, CUDA_EMULATION_SITE) {
    return __ballot_sync(mask, p, file, line) == mask;
}

namespace cuda_emulation {
template <class T> T shuffle(unsigned mask, T value, int source, const char *file, int line) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "a shuffle moves at most 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = warp(SHUFFLE, mask, bits, source, file, line);
    memcpy(&value, &bits, sizeof value);
    return value;
}
} // namespace cuda_emulation

template <class T> T __shfl_sync(unsigned mask, T v, int source, int width = 32, CUDA_EMULATION_SITE) {
    int lane = ::cuda_emulation::lane();
    return ::cuda_emulation::shuffle(mask, v, (lane & ~(width - 1)) | (source & (width - 1)), file, line);
}
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, CUDA_EMULATION_SITE) {
    int lane = ::cuda_emulation::lane(), source = lane - (int)delta;
    return ::cuda_emulation::shuffle(mask, v, source < (lane & ~(width - 1)) ? lane : source, file, line);
}
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, CUDA_EMULATION_SITE) {
    int lane = ::cuda_emulation::lane(), source = lane + (int)delta;
    return ::cuda_emulation::shuffle(mask, v, source > (lane | (width - 1)) ? lane : source, file, line);
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, CUDA_EMULATION_SITE) {
    int lane = ::cuda_emulation::lane(), source = lane ^ bits;
    return ::cuda_emulation::shuffle(mask, v, source > (lane | (width - 1)) ? lane : source, file, line);
}

/* ---- atomics, fences ------------------------------------------------------------------------------------------------- */

static inline void __threadfence() { ::cuda_emulation::fence(); }
static inline void __threadfence_block() { ::cuda_emulation::fence(); }
static inline void __threadfence_system() { ::cuda_emulation::fence(); }
#define __trap() ::cuda_emulation::fail(cudaErrorLaunchFailure, "__trap", __FILE__, __LINE__)

namespace cuda_emulation {
template <class T, class F> T atomic_update(T *p, F f) { /* relaxed, as CUDA's */
    using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
    static_assert(sizeof(T) == sizeof(Bits), "atomics have 4 or 8 bytes");
    Bits *at = reinterpret_cast<Bits *>(p), old, bits;
    before_atomic(p);
    __atomic_load(at, &old, __ATOMIC_RELAXED);
    T before, after;
    do {
        memcpy(&before, &old, sizeof old);
        after = f(before);
        memcpy(&bits, &after, sizeof bits);
    } while (!__atomic_compare_exchange(at, &old, &bits, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    after_atomic(p);
    return before;
}
} // namespace cuda_emulation

#define CUDA_EMULATION_ATOMIC(name, T, expression)                                                                     \
    static inline T name(T *p, T b) {                                                                                  \
        return ::cuda_emulation::atomic_update(p, [b](T a) -> T { return expression; });                               \
    }
#define CUDA_EMULATION_ATOMICS(T)                                                                                      \
    CUDA_EMULATION_ATOMIC(atomicAdd, T, a + b)                                                                         \
    CUDA_EMULATION_ATOMIC(atomicMax, T, a > b ? a : b)                                                                 \
    CUDA_EMULATION_ATOMIC(atomicMin, T, a < b ? a : b)                                                                 \
    CUDA_EMULATION_ATOMIC(atomicOr, T, a | b)                                                                          \
    CUDA_EMULATION_ATOMIC(atomicAnd, T, a &b)                                                                          \
    CUDA_EMULATION_ATOMIC(atomicXor, T, a ^ b)                                                                         \
    CUDA_EMULATION_ATOMIC(atomicExch, T, ((void)a, b))                                                                 \
    static inline T atomicCAS(T *p, T expected, T b) {                                                                 \
        return ::cuda_emulation::atomic_update(p, [=](T a) -> T { return a == expected ? b : a; });                    \
    }
CUDA_EMULATION_ATOMICS(unsigned)
CUDA_EMULATION_ATOMICS(unsigned long long)
CUDA_EMULATION_ATOMIC(atomicSub, unsigned, a - b)
CUDA_EMULATION_ATOMIC(atomicSub, int, (int)((unsigned)a - (unsigned)b))
CUDA_EMULATION_ATOMIC(atomicAdd, int, (int)((unsigned)a + (unsigned)b))
CUDA_EMULATION_ATOMIC(atomicMax, int, a > b ? a : b)
CUDA_EMULATION_ATOMIC(atomicMin, int, a < b ? a : b)
CUDA_EMULATION_ATOMIC(atomicOr, int, a | b)
CUDA_EMULATION_ATOMIC(atomicAnd, int, a &b)
CUDA_EMULATION_ATOMIC(atomicXor, int, a ^ b)
CUDA_EMULATION_ATOMIC(atomicExch, int, ((void)a, b))
CUDA_EMULATION_ATOMIC(atomicAdd, float, a + b)
CUDA_EMULATION_ATOMIC(atomicAdd, double, a + b)
CUDA_EMULATION_ATOMIC(atomicExch, float, ((void)a, b))
static inline int atomicCAS(int *p, int expected, int b) {
    return ::cuda_emulation::atomic_update(p, [=](int a) { return a == expected ? b : a; });
}
#undef CUDA_EMULATION_ATOMICS
#undef CUDA_EMULATION_ATOMIC

/* ---- arithmetic, loads ----------------------------------------------------------------------------------------------- */

template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldcs(const T *p) { return *p; }
template <class T> T __ldcg(const T *p) { return *p; }
template <class T> T __ldca(const T *p) { return *p; }
template <class T> void __stcs(T *p, T v) { *p = v; }
template <class T> void __stcg(T *p, T v) { *p = v; }

static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
static inline int __ffs(int v) { return __builtin_ffs(v); }
static inline int __ffsll(long long v) { return __builtin_ffsll(v); }
static inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
static inline int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
static inline unsigned __brev(unsigned v) {
    v = (v >> 16) | (v << 16);
    v = ((v >> 8) & 0x00ff00ffu) | ((v & 0x00ff00ffu) << 8);
    v = ((v >> 4) & 0x0f0f0f0fu) | ((v & 0x0f0f0f0fu) << 4);
    v = ((v >> 2) & 0x33333333u) | ((v & 0x33333333u) << 2);
    return ((v >> 1) & 0x55555555u) | ((v & 0x55555555u) << 1);
}
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((uint64_t)a * b) >> 32); }
static inline int __mulhi(int a, int b) { return (int)(((int64_t)a * b) >> 32); }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)(((unsigned __int128)a * b) >> 64);
}

template <class To, class From> static inline To cuda_emulation_bits(From v) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &v, sizeof to);
    return to;
}
static inline float __int_as_float(int v) { return cuda_emulation_bits<float>(v); }
static inline int __float_as_int(float v) { return cuda_emulation_bits<int>(v); }
static inline float __uint_as_float(unsigned v) { return cuda_emulation_bits<float>(v); }
static inline unsigned __float_as_uint(float v) { return cuda_emulation_bits<unsigned>(v); }
static inline double __longlong_as_double(long long v) { return cuda_emulation_bits<double>(v); }
static inline long long __double_as_longlong(double v) { return cuda_emulation_bits<long long>(v); }

static inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
static inline double rsqrt(double v) { return 1.0 / sqrt(v); }
/* glibc has these names. */
#define __expf(v) expf(v)
#define __logf(v) logf(v)
#define __log2f(v) log2f(v)
#define __sinf(v) sinf(v)
#define __cosf(v) cosf(v)
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __saturatef(float v) { return v > 0.0f ? (v < 1.0f ? v : 1.0f) : 0.0f; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __frcp_rn(float v) { return 1.0f / v; }
static inline float __fsqrt_rn(float v) { return sqrtf(v); }
static inline float __frsqrt_rn(float v) { return (float)(1.0 / sqrt((double)v)); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
static inline float __int2float_rn(int v) { return (float)v; }
static inline float __uint2float_rn(unsigned v) { return (float)v; }
static inline int __float2int_rn(float v) { return (int)rintf(v); }
static inline int __float2int_rz(float v) { return (int)v; }
static inline unsigned __float2uint_rn(float v) { return (unsigned)rintf(v); }
static inline float __double2float_rn(double v) { return (float)v; }

#define CUDA_EMULATION_MINMAX(T)                                                                                       \
    static inline T min(T a, T b) { return b < a ? b : a; }                                                            \
    static inline T max(T a, T b) { return a < b ? b : a; }
CUDA_EMULATION_MINMAX(int)
CUDA_EMULATION_MINMAX(unsigned)
CUDA_EMULATION_MINMAX(long)
CUDA_EMULATION_MINMAX(unsigned long)
CUDA_EMULATION_MINMAX(long long)
CUDA_EMULATION_MINMAX(unsigned long long)
#undef CUDA_EMULATION_MINMAX
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }

#endif
