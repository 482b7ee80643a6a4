/* count.cc: what kernels launched; in the flavour SANITIZE=count also each of their accesses to memory, checked and counted. There
 * the compiler has put ThreadSanitizer's calls into kernels and the backend, and this file answers them.
 *
 * Lanes of a warp do not run in step here. Their accesses belong to one request if they come from the same instruction, each
 * lane the k-th time. */
#include "runtime.h"

#include <algorithm>
#include <memory>
#include <string.h>
#ifdef EMULATION_COUNT
#include <dlfcn.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <unordered_map>
#include <unordered_set>
#endif

namespace cuda_emulation {
namespace {

struct Kernel {
    std::string name;
    cuda_emulation_counts counts;
};
std::vector<std::unique_ptr<Kernel>> &kernels() {
    static auto *v = new std::vector<std::unique_ptr<Kernel>>();
    return *v;
}

Kernel *kernel;

Kernel *kernel_named(const std::string &name) {
    for (auto &k : kernels())
        if (k->name == name) return k.get();
    kernels().emplace_back(new Kernel{name, {}});
    return kernels().back().get();
}

#ifdef EMULATION_COUNT

enum Kind { LOAD, STORE, ATOMIC };

struct Request {
    unsigned lanes = 0;
    size_t bytes = 0;
    std::vector<uintptr_t> sectors;
};
struct Key {
    const void *pc;
    unsigned warp, time;
    Kind kind;
    bool operator==(const Key &o) const { return pc == o.pc && warp == o.warp && time == o.time && kind == o.kind; }
};
struct Hash {
    size_t operator()(const Key &k) const {
        return ((uintptr_t)k.pc * 0x9e3779b97f4a7c15u) ^ (k.warp * 0xff51afd7u + k.time) * 0xc4ceb9fe1a85ec53u;
    }
};
std::unordered_map<Key, Request, Hash> requests;
std::unordered_map<const void *, unsigned> times[1024]; /* of each thread: how often it came by an instruction */
std::unordered_set<uintptr_t> distinct[2];
struct Range {
    const char *from, *to;
};
std::vector<Range> images; /* of the kernel's library and this one: constants, and the emulation's own variables */
unsigned n_threads;

void settle(Kind kind, Request &r) {
    std::sort(r.sectors.begin(), r.sectors.end());
    r.sectors.erase(std::unique(r.sectors.begin(), r.sectors.end()), r.sectors.end());
    cuda_emulation_counts &c = kernel->counts;
    (kind == LOAD ? c.load_requests : kind == STORE ? c.store_requests : c.atomic_requests) += 1;
    (kind == LOAD ? c.load_sectors : kind == STORE ? c.store_sectors : c.atomic_sectors) += r.sectors.size();
    (kind == LOAD ? c.load_bytes : kind == STORE ? c.store_bytes : c.atomic_bytes) += r.bytes;
    if (kind != ATOMIC) distinct[kind].insert(r.sectors.begin(), r.sectors.end());
}

void count(const Where &w, const void *p, size_t bytes, Kind kind, const void *pc) {
    const Key key{pc, w.linear / 32, times[w.linear][pc]++, kind};
    Request &r = requests[key];
    r.lanes |= 1u << w.linear % 32;
    r.bytes += bytes;
    for (uintptr_t at = (uintptr_t)p / 32; at <= ((uintptr_t)p + bytes - 1) / 32; at++) r.sectors.push_back(at);
    const unsigned lanes = std::min(32u, n_threads - key.warp * 32);
    if (r.lanes == (lanes == 32 ? 0xffffffffu : (1u << lanes) - 1)) {
        settle(kind, r);
        requests.erase(key);
    }
}

bool within(const void *p, size_t bytes, const void *from, const void *to) {
    return p >= from && static_cast<const char *>(p) + bytes <= to;
}

/* file:line of a return address, as addr2line says. */
std::string source_of(const void *pc) {
    Dl_info info;
    if (!dladdr(pc, &info) || !info.dli_fname) return "";
    char command[4200], text[4096] = "";
    snprintf(command, sizeof command, "addr2line -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
             (size_t)((const char *)pc - 1 - (const char *)info.dli_fbase));
    FILE *f = popen(command, "r");
    if (!f) return "";
    if (!fgets(text, sizeof text, f)) text[0] = 0;
    pclose(f);
    text[strcspn(text, "\n")] = 0;
    return text;
}

void access(const void *p, size_t bytes, Kind kind, const void *pc) {
    Where w;
    std::string fault;
    if (!where(w)) {
        if (!in_device_memory(p)) return;
        report(cudaErrorIllegalAddress, "host code touches device memory at " + source_of(pc));
        abort(); /* a host dies of it */
    }
    if (in_device_memory(p)) {
        fault = device_fault(p, bytes);
        if (fault.empty()) return count(w, p, bytes, kind, pc);
    } else if (within(p, bytes, w.stack, w.stack_end) || within(p, bytes, w.dynamic, w.dynamic_end) ||
               within(p, bytes, w.shared, w.shared_end) || within(p, bytes, w.arguments, w.arguments_end)) {
        return;
    } else {
        for (const Range &image : images)
            if (within(p, bytes, image.from, image.to)) return;
        if (is_pinned(p, bytes)) return;
        fault = w.dynamic_end - static_cast<const char *>(p) <= 256 * 1024 && p >= w.dynamic_end - 256 * 1024 &&
                        p < w.dynamic_end + 4096
                    ? "beyond its dynamic shared memory"
                    : "host memory";
    }
    const std::string source = source_of(pc);
    const size_t colon = source.rfind(':');
    fail(cudaErrorIllegalAddress,
         ((kind == LOAD    ? "reads "
           : kind == STORE ? "writes "
                           : "updates ") +
          fault)
             .c_str(),
         source.substr(0, colon).c_str(), colon == std::string::npos ? 0 : atoi(source.c_str() + colon + 1));
}

int add_image(dl_phdr_info *info, size_t, void *wanted) {
    bool mine = false;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) &h = info->dlpi_phdr[i];
        const char *from = reinterpret_cast<const char *>(info->dlpi_addr + h.p_vaddr);
        mine = mine || (h.p_type == PT_LOAD && within(*static_cast<const void **>(wanted), 1, from, from + h.p_memsz));
    }
    for (int i = 0; mine && i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) &h = info->dlpi_phdr[i];
        const char *from = reinterpret_cast<const char *>(info->dlpi_addr + h.p_vaddr);
        if (h.p_type == PT_LOAD) images.push_back({from, from + h.p_memsz});
    }
    return mine;
}

#endif

} // namespace

void count_launch(const Launch &l) {
    kernel = kernel_named(l.name);
    cuda_emulation_counts &c = kernel->counts;
    const uint64_t blocks = (uint64_t)l.grid.x * l.grid.y * l.grid.z;
    c.launches++;
    c.blocks += blocks;
    c.threads += blocks * l.block.x * l.block.y * l.block.z;
#ifdef EMULATION_COUNT
    n_threads = l.block.x * l.block.y * l.block.z;
    images.clear();
    const void *wanted = l.kernel;
    dl_iterate_phdr(add_image, &wanted);
    wanted = &images;
    dl_iterate_phdr(add_image, &wanted);
#endif
}
void count_product(const char *name) { kernel_named(name)->counts.launches++; }

#ifdef EMULATION_COUNT
void count_block_begin() {
    for (unsigned t = 0; t < n_threads; t++) times[t].clear();
}
void count_block_end() { /* what some lanes never came to */
    for (auto &entry : requests) settle(entry.first.kind, entry.second);
    requests.clear();
}
void count_launch_end() {
    kernel->counts.distinct_load_sectors += distinct[LOAD].size();
    kernel->counts.distinct_store_sectors += distinct[STORE].size();
    distinct[LOAD].clear();
    distinct[STORE].clear();
}
#else
void count_block_begin() {}
void count_block_end() {}
void count_launch_end() {}
#endif

} // namespace cuda_emulation

using namespace cuda_emulation;

extern "C" {

int cuda_emulation_counters(const char *kernel, cuda_emulation_counts *sum) {
    Call call(Call::ANYWHERE);
    memset(sum, 0, sizeof *sum);
    int n = 0;
    for (auto &k : kernels()) {
        if (kernel && k->name.find(kernel) == std::string::npos) continue;
        n++;
        uint64_t *to = reinterpret_cast<uint64_t *>(sum);
        const uint64_t *from = reinterpret_cast<const uint64_t *>(&k->counts);
        for (size_t i = 0; i < sizeof *sum / sizeof *to; i++) to[i] += from[i];
    }
    return n;
}
void cuda_emulation_counters_clear(void) {
    Call call(Call::ANYWHERE);
    kernels().clear();
}
const char *cuda_emulation_kernel(int i) {
    Call call(Call::ANYWHERE);
    return i >= 0 && (size_t)i < kernels().size() ? kernels()[(size_t)i]->name.c_str() : nullptr;
}

} // extern "C"

#ifdef EMULATION_COUNT

#define PC __builtin_return_address(0)

extern "C" {

void __tsan_init(void) {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit(void) {}
#define ACCESS(n)                                                                                                      \
    void __tsan_read##n(void *p) { access(p, n, LOAD, PC); }                                                           \
    void __tsan_write##n(void *p) { access(p, n, STORE, PC); }                                                         \
    void __tsan_unaligned_read##n(void *p) { access(p, n, LOAD, PC); }                                                 \
    void __tsan_unaligned_write##n(void *p) { access(p, n, STORE, PC); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void *p, size_t bytes) { access(p, bytes, LOAD, PC); }
void __tsan_write_range(void *p, size_t bytes) { access(p, bytes, STORE, PC); }
void __tsan_vptr_read(void **) {}
void __tsan_vptr_update(void **, void *) {}
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}

/* The order is the strongest: it costs nothing here. A compare-and-swap counts, the load before it does not. */
#define ATOMIC_ACCESS(bits, T)                                                                                         \
    T __tsan_atomic##bits##_load(const volatile T *p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }            \
    void __tsan_atomic##bits##_store(volatile T *p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }            \
    T __tsan_atomic##bits##_exchange(volatile T *p, T v, int) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }  \
    T __tsan_atomic##bits##_fetch_add(volatile T *p, T v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }  \
    T __tsan_atomic##bits##_fetch_sub(volatile T *p, T v, int) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); }  \
    T __tsan_atomic##bits##_fetch_or(volatile T *p, T v, int) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }    \
    T __tsan_atomic##bits##_fetch_and(volatile T *p, T v, int) { return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST); }  \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile T *p, T *old, T v, int, int) {                          \
        access(const_cast<const T *>(p), sizeof *p, ATOMIC, PC);                                                       \
        return __atomic_compare_exchange_n(p, old, v, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                          \
    }                                                                                                                  \
    int __tsan_atomic##bits##_compare_exchange_weak(volatile T *p, T *old, T v, int, int) {                            \
        access(const_cast<const T *>(p), sizeof *p, ATOMIC, PC);                                                       \
        return __atomic_compare_exchange_n(p, old, v, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                          \
    }
ATOMIC_ACCESS(8, uint8_t)
ATOMIC_ACCESS(32, uint32_t)
ATOMIC_ACCESS(64, uint64_t)

} // extern "C"

#endif
