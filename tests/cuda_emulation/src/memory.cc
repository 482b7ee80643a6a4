/* memory.cc: device memory, pinned memory, and who may touch what. A device's memory is a reserved range of addresses without
 * access; an allocation opens its own pages, ends at a page's end (to CUDA's alignment), and its addresses are never used
 * again. Under AddressSanitizer what surrounds it on its pages is poisoned, and it too when it is freed. */
#include "runtime.h"

#include <map>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace cuda_emulation {
namespace {

constexpr size_t PAGE = 4096, ALIGNMENT = 256, RESERVED = (size_t)512 << 30, FILLED = (size_t)64 << 20;
#ifdef EMULATION_ADDRESS
constexpr size_t BEHIND = PAGE; /* poisoned, so that AddressSanitizer reports more than a fault of the machine */
#else
constexpr size_t BEHIND = 0;
#endif

struct Block {
    size_t bytes;
    int device;
    bool freed;
};
std::map<uintptr_t, Block> &blocks() {
    static auto *m = new std::map<uintptr_t, Block>();
    return *m;
}
struct HostBlock {
    size_t bytes;
    bool registered;
};
std::map<uintptr_t, HostBlock> &host_blocks() {
    static auto *m = new std::map<uintptr_t, HostBlock>();
    return *m;
}
uintptr_t arena, used; /* used: bytes of addresses given out */
size_t taken[16];      /* of each device's memory */

bool reserve() {
    if (arena) return true;
    /* The bare system call: no sanitizer needs to know of so large a range. */
    const long at = syscall(SYS_mmap, nullptr, RESERVED, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at < 0 && at > -4096) return false;
    arena = (uintptr_t)at;
    used = PAGE;
    return true;
}

/* The block that holds p, or lies before it; NULL: none. */
const std::pair<const uintptr_t, Block> *block_at(uintptr_t p) {
    auto it = blocks().upper_bound(p);
    if (it == blocks().begin()) return nullptr;
    return &*--it;
}

size_t pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }
size_t padded(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

void poison(uintptr_t p, size_t bytes) { __asan_poison_memory_region(reinterpret_cast<void *>(p), bytes); }

void release(uintptr_t p, Block &b) {
    b.freed = true;
    poison(p, b.bytes < FILLED ? b.bytes : FILLED);
    const uintptr_t end = p + padded(b.bytes) + BEHIND, start = p / PAGE * PAGE;
    /* Gives the memory back and leaves the addresses without access. */
    syscall(SYS_mmap, start, end - start, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    taken[b.device] -= b.bytes;
    alive().device_allocations--;
    alive().device_bytes -= b.bytes;
}

} // namespace

bool in_device_memory(const void *p) { return arena && (uintptr_t)p - arena < RESERVED; }

std::string device_fault(const void *p, size_t bytes) {
    const uintptr_t at = (uintptr_t)p;
    if (!in_device_memory(p)) return "host memory";
    const auto *b = block_at(at);
    if (!b) return "device memory that was never allocated";
    const size_t offset = at - b->first, size = b->second.bytes;
    if (offset <= size && bytes <= size - offset)
        return b->second.freed ? "an allocation of " + std::to_string(size) + " bytes that was freed" : "";
    return "bytes " + std::to_string(offset) + " to " + std::to_string(offset + bytes) + " of an allocation of " +
           std::to_string(size) + " bytes" + (b->second.freed ? " that was freed" : "");
}

bool is_pinned(const void *p, size_t bytes) {
    auto it = host_blocks().upper_bound((uintptr_t)p);
    if (it == host_blocks().begin()) return false;
    --it;
    const size_t offset = (uintptr_t)p - it->first;
    return offset <= it->second.bytes && bytes <= it->second.bytes - offset;
}

bool touch(const void *p, size_t bytes, bool write, const char *who) {
    if (!bytes) return true;
    std::string fault = is_pinned(p, bytes) ? "" : device_fault(p, bytes);
    if (!fault.empty()) {
        report(cudaErrorIllegalAddress, std::string(who) + (write ? " writes " : " reads ") + fault);
        return false;
    }
    if (write)
        tsan_write_range(const_cast<void *>(p), bytes);
    else
        tsan_read_range(const_cast<void *>(p), bytes);
    return true;
}

void forget_memory() {
    for (auto &b : blocks())
        if (!b.second.freed) release(b.first, b.second);
    for (auto &b : host_blocks())
        if (!b.second.registered) free(reinterpret_cast<void *>(b.first));
    host_blocks().clear();
    alive().host_allocations = alive().host_registrations = 0;
}

} // namespace cuda_emulation

using namespace cuda_emulation;

extern "C" {

cudaError_t cudaMalloc(void **p, size_t bytes) {
    Call call;
    if (call.error) return call.end(call.error);
    if (!p) return call.end(cudaErrorInvalidValue);
    *p = nullptr;
    if (cudaError_t e = forbidden_in_capture()) return call.end(e);
    if (bytes == 0) return cudaSuccess;
    size_t &mine = taken[current_device()];
    if (bytes > settings().memory || mine > settings().memory - bytes) return call.end(cudaErrorMemoryAllocation);
    const size_t room = pages(padded(bytes)) + BEHIND;
    if (!reserve() || room > RESERVED - used - 2 * PAGE) return call.end(cudaErrorMemoryAllocation);
    const uintptr_t start = arena + used, at = start + room - BEHIND - padded(bytes);
    if (mprotect(reinterpret_cast<void *>(start), room, PROT_READ | PROT_WRITE))
        return call.end(cudaErrorMemoryAllocation);
    used += room + PAGE;
    memset(reinterpret_cast<void *>(at), 0xff, bytes < FILLED ? bytes : FILLED); /* not a number, and no index */
    poison(start, at - start);
    poison(at + bytes, start + room - at - bytes);
    blocks()[at] = {bytes, current_device(), false};
    mine += bytes;
    cuda_emulation_alive_t &a = alive();
    a.device_allocations++;
    a.device_bytes += bytes;
    if (a.device_bytes > a.device_bytes_peak) a.device_bytes_peak = a.device_bytes;
    *p = reinterpret_cast<void *>(at);
    return cudaSuccess;
}

cudaError_t cudaFree(void *p) {
    Call call;
    if (call.error) return call.end(call.error);
    if (!p) return cudaSuccess;
    if (cudaError_t e = forbidden_in_capture()) return call.end(e);
    auto it = blocks().find((uintptr_t)p);
    if (it == blocks().end() || it->second.freed) return call.end(cudaErrorInvalidValue);
    drain_all();
    release(it->first, it->second);
    return call.end(lasting());
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    Call call;
    if (call.error) return call.end(call.error);
    if (!available || !total) return call.end(cudaErrorInvalidValue);
    const size_t mine = taken[current_device()];
    *total = settings().memory;
    *available = *total > mine ? *total - mine : 0;
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned) {
    Call call;
    if (call.error) return call.end(call.error);
    if (!p) return call.end(cudaErrorInvalidValue);
    *p = nullptr;
    if (cudaError_t e = forbidden_in_capture()) return call.end(e);
    if (bytes == 0) return cudaSuccess;
    if (posix_memalign(p, PAGE, bytes)) return call.end(cudaErrorMemoryAllocation);
    memset(*p, 0xff, bytes);
    host_blocks()[(uintptr_t)*p] = {bytes, false};
    alive().host_allocations++;
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void **p, size_t bytes) { return cudaHostAlloc(p, bytes, cudaHostAllocDefault); }

cudaError_t cudaFreeHost(void *p) {
    Call call;
    if (call.error) return call.end(call.error);
    if (!p) return cudaSuccess;
    if (cudaError_t e = forbidden_in_capture()) return call.end(e);
    auto it = host_blocks().find((uintptr_t)p);
    if (it == host_blocks().end() || it->second.registered) return call.end(cudaErrorInvalidValue);
    drain_all();
    host_blocks().erase(it);
    free(p);
    alive().host_allocations--;
    return call.end(lasting());
}

cudaError_t cudaHostRegister(void *p, size_t bytes, unsigned) {
    Call call;
    if (call.error) return call.end(call.error);
    if (!p || !bytes || in_device_memory(p)) return call.end(cudaErrorInvalidValue);
    if (cudaError_t e = forbidden_in_capture()) return call.end(e);
    const uintptr_t at = (uintptr_t)p;
    auto it = host_blocks().lower_bound(at + bytes);
    if (it != host_blocks().begin() && (--it, it->first + it->second.bytes > at))
        return call.end(cudaErrorHostMemoryAlreadyRegistered);
    host_blocks()[at] = {bytes, true};
    alive().host_registrations++;
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *p) {
    Call call;
    if (call.error) return call.end(call.error);
    auto it = host_blocks().find((uintptr_t)p);
    if (it == host_blocks().end() || !it->second.registered) return call.end(cudaErrorHostMemoryNotRegistered);
    drain_all();
    host_blocks().erase(it);
    alive().host_registrations--;
    return call.end(lasting());
}

cudaError_t cudaHostGetDevicePointer(void **to, void *host, unsigned) {
    Call call;
    if (call.error) return call.end(call.error);
    if (!to || !is_pinned(host, 1)) return call.end(cudaErrorInvalidValue);
    *to = host;
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *a, const void *p) {
    Call call;
    if (call.error) return call.end(call.error);
    if (!a) return call.end(cudaErrorInvalidValue);
    memset(a, 0, sizeof *a);
    if (in_device_memory(p)) {
        if (!device_fault(p, 1).empty()) return call.end(cudaErrorInvalidValue);
        a->type = cudaMemoryTypeDevice;
        a->device = block_at((uintptr_t)p)->second.device;
        a->devicePointer = const_cast<void *>(p);
    } else {
        a->type = is_pinned(p, 1) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
        a->hostPointer = const_cast<void *>(p);
        a->devicePointer = a->type == cudaMemoryTypeHost ? const_cast<void *>(p) : nullptr;
    }
    return cudaSuccess;
}

} // extern "C"
