/* runtime.h: what the files of the emulated runtime share. Everything runs under one lock (Call). */
#ifndef CUDA_EMULATION_SRC_RUNTIME_H
#define CUDA_EMULATION_SRC_RUNTIME_H

#include "cuda_emulation.h"
#include "sanitizer.h"

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace cuda_emulation {

/* ---- settings and state (device.cc) ---------------------------------------------------------------------------------- */

struct Settings {
    uint64_t seed;
    int devices, capability, images, driver;
    size_t memory;
    bool quiet, vague_blas;
};
Settings &settings();
uint32_t random_below(uint32_t n); /* from the seed's generator; 0 where the seed is 0 */

int &current_device(); /* of this host thread */
cudaError_t lasting(); /* the error that stays, of the current device */
void set_lasting(cudaError_t, int device);
cuda_emulation_alive_t &alive();

/* Keeps and prints a report; `what` names the culprit. */
void report(cudaError_t, const std::string &what);

/* One call of the interface: holds the lock, counts, and knows whether the call must fail. */
class Call {
  public:
    enum Kind { USES_DEVICE, NEEDS_DRIVER, ANYWHERE }; /* the first makes the device's context, and needs a sound one */
    explicit Call(Kind = USES_DEVICE);
    ~Call();
    Call(const Call &) = delete;
    cudaError_t error;            /* cudaSuccess: go on */
    cudaError_t end(cudaError_t); /* the call's result; remembers errors for cudaGetLastError */
};

/* ---- memory (memory.cc) ---------------------------------------------------------------------------------------------- */

bool in_device_memory(const void *p); /* the address range of devices, allocated or not */
/* "" if [p, p + bytes) lies in one device allocation, else what is wrong. */
std::string device_fault(const void *p, size_t bytes);
bool is_pinned(const void *p, size_t bytes);
void forget_memory(); /* all of it, as when the process ends; likewise: */
void forget_objects();
void forget_handles();
/* A read or write by a copy or a cuBLAS routine: checks the range (device or pinned), tells ThreadSanitizer; false: reported. */
bool touch(const void *p, size_t bytes, bool write, const char *who);

/* ---- fibers and blocks (block.cc) ------------------------------------------------------------------------------------ */

struct Fiber;
struct Context {          /* one order of execution: a stream, or a branch of a graph */
    void *tsan = nullptr; /* in order, as a ThreadSanitizer fiber */
    std::vector<Fiber *> fibers;
    size_t next_fiber = 0;
    std::vector<std::unique_ptr<Context>> branches; /* of a stream: where graphs fork */
    Context();
    ~Context();
    Context(const Context &) = delete;
};
/* Runs a grid now; cudaSuccess or the error that it ended with (reported). `site`: who launched; `host`: the host thread as
 * a ThreadSanitizer fiber. */
cudaError_t run_grid(const Launch &, Context &, const void *site, void *host);

/* ---- streams (stream.cc) --------------------------------------------------------------------------------------------- */

/* Runs in a context's order: ThreadSanitizer is on its fiber; `host` as in run_grid. */
using Work = std::function<cudaError_t(Context &, const void *site, void *host)>;
/* Queues work, or captures it. */
cudaError_t submit(cudaStream_t, Work, const void *site);
bool capturing(cudaStream_t);
cudaError_t forbidden_in_capture(); /* a call that no capture may see, by its mode: cudaSuccess or the error */
void drain_all();
cudaError_t drain(cudaStream_t);
void drop_all_work();
bool stream_exists(cudaStream_t);
cudaError_t work_fault(); /* the error that a test asked for this piece of work (device.cc) */

/* ---- counting (count.cc) --------------------------------------------------------------------------------------------- */

void count_launch(const Launch &);
void count_product(const char *name); /* of cuBLAS */
void count_block_begin();
void count_block_end();
void count_launch_end();
struct Where { /* of the running thread; null names: host code runs */
    const char *kernel;
    uint3 block, thread;
    unsigned linear;                   /* index in the block */
    const char *stack, *stack_end;     /* the fiber's, and its record behind it */
    const char *dynamic, *dynamic_end; /* shared memory */
    const char *shared, *shared_end;
    const char *arguments, *arguments_end;
};
bool where(Where &);

} // namespace cuda_emulation
#endif
