/* block.cc: runs a grid: blocks one after another, the threads of a block as fibers that switch at barriers, warp operations
 * and their end.
 *
 * ThreadSanitizer sees each CUDA thread as a fiber. A switch orders nothing. What does: the launch before the first
 * instruction, the end of all threads before the end of the launch, and a barrier or __syncwarp by an object that is made for
 * that one barrier (an object used again would carry orders from earlier ones). Shuffles and votes order nothing, as in CUDA.
 * Copies that run beside a thread (cuda_pipeline_primitives.h) are another thread still: it knows what the thread did before it began a
 * copy, and the thread knows of the copy from its wait on.
 * Fibers are dear to make, so blocks take turns with two sets of them: a block's threads may know what earlier blocks did, but
 * not what the block before it did.
 */
#include "cuda_pipeline_primitives.h"
#include "mma.h"
#include "runtime.h"

#include <set>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

extern "C" void cuda_emulation_switch(void **save, void *to);

namespace cuda_emulation {

Self *self;
uint3 block_index;
dim3 block_size, grid_size;

struct alignas(8) Ordering { /* what one barrier orders: an address for ThreadSanitizer */
    unsigned members;
    Ordering *next; /* among the free ones */
};

struct Group { /* lanes that wait at one warp operation */
    unsigned mask, arrived;
    Collective kind;
    const char *file;
    int line;
    Ordering *ordering;
};

struct Warp {
    unsigned alive; /* lanes that have not ended */
    int n_groups;
    Group groups[32];
    Fiber *lanes[32];
};

struct Copy { /* one that has begun */
    void *to;
    const void *from;
    size_t bytes, zeros;
    uint64_t group;
};
constexpr unsigned MOST_COPIES = 64; /* of a thread, under way at a time */
constexpr size_t MOST_GROUPS = 8;    /* that a wait can leave out, and one */

struct Fiber : Self {
    void *sp, *fake;
    char *bottom; /* of the stack */
    size_t size;
    void *tsan;
    Warp *warp;
    int lane;
    unsigned linear;
    bool waits_at_barrier, spoiled;
    uint64_t value;
    int source;
    Ordering *ordering;
    bool fenced;
    const void *atomics[4]; /* the last atomic accesses, for the next fence */
    unsigned n_atomics;
    Copy copies[MOST_COPIES];
    unsigned n_copies;
    uint64_t group;                      /* that the next copy belongs to; those before it are closed */
    void *copier;                        /* who makes the copies, for ThreadSanitizer */
    bool copied;                         /* in this block */
    uint64_t begun, closed[MOST_GROUPS]; /* addresses for ThreadSanitizer */
};

namespace {

constexpr size_t PAGE = 4096;
#if defined(EMULATION_ADDRESS) || defined(EMULATION_THREAD)
constexpr size_t STACK = 256 * 1024;
#else
constexpr size_t STACK = 128 * 1024;
#endif

Fiber scheduler;
Fiber *running;
constexpr size_t MOST_FIBERS = 6000; /* ThreadSanitizer cannot tell more than 8128 threads apart */
size_t n_fibers;
std::set<Context *> &contexts() {
    static auto *all = new std::set<Context *>();
    return *all;
}
Ordering orderings[1025], *free_orderings; /* a thread waits for at most one */
char *shared_memory;                       /* 256 KiB between pages without access */
constexpr size_t SHARED = 256 * 1024;
#ifdef EMULATION_ADDRESS
constexpr size_t BEHIND = PAGE; /* poisoned, so that AddressSanitizer reports more than a fault of the machine */
#else
constexpr size_t BEHIND = 0;
#endif

struct {
    const Launch *launch;
    const Context *context;
    const void *site;
    unsigned n_threads, ended, at_barrier;
    Collective barrier_kind;
    const char *barrier_file;
    int barrier_line, count, all, any;
    Ordering *ordering;
    std::vector<Fiber *> fibers, ready;
    std::vector<Warp> warps;
    char *dynamic;
    cudaError_t error;
    alignas(8) char start, end, failure; /* addresses for ThreadSanitizer */
} block;

[[noreturn]] void thread_main();

void prepare(Fiber *f) {
    __asan_unpoison_memory_region(f->bottom, f->size);
    void **top = reinterpret_cast<void **>(f->bottom + f->size);
#if defined(__x86_64__)
    top -= 8;
    memset(top, 0, 8 * sizeof *top);
    top[6] = reinterpret_cast<void *>(thread_main);
#else
    top -= 20;
    memset(top, 0, 20 * sizeof *top);
    top[11] = reinterpret_cast<void *>(thread_main);
#endif
    f->sp = top;
    f->fake = nullptr;
    f->waits_at_barrier = false;
    f->fenced = false;
    f->n_atomics = 0;
    f->ordering = nullptr;
    f->n_copies = 0;
    f->group = 0;
    f->copied = false;
}

char *map(size_t bytes) {
    const long at =
        syscall(SYS_mmap, nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at < 0 && at > -4096) abort();
    return reinterpret_cast<char *>(at);
}

/* A fiber's mapping: a page without access, the stack, and the fiber itself. Mapped by the bare system call, so that
 * ThreadSanitizer takes the fiber for memory that nobody has written. */
Fiber *new_fiber() {
    const size_t head = (sizeof(Fiber) + PAGE - 1) / PAGE * PAGE;
    char *p = map(PAGE + STACK + head);
    mprotect(p, PAGE, PROT_NONE);
    Fiber *f = new (p + PAGE + STACK) Fiber();
    f->bottom = p + PAGE;
    f->size = STACK;
    f->tsan = tsan_create_fiber();
    n_fibers++;
    return f;
}

void delete_fiber(Fiber *f) {
    const size_t head = (sizeof(Fiber) + PAGE - 1) / PAGE * PAGE;
    char *p = f->bottom - PAGE;
    __asan_unpoison_memory_region(f->bottom, f->size);
    tsan_destroy_fiber(f->tsan);
    n_fibers--;
    if (f->copier) {
        tsan_destroy_fiber(f->copier);
        n_fibers--;
    }
    munmap(p, PAGE + STACK + head); /* intercepted: accesses to the stack are forgotten */
}

/* Room for n more fibers, at the cost of contexts that do not run now. */
void make_room(size_t n, const Context *running_one) {
    for (Context *c : contexts()) {
        if (n_fibers + n <= MOST_FIBERS) return;
        if (c == running_one) continue;
        for (Fiber *f : c->fibers) delete_fiber(f);
        c->fibers.clear();
        c->next_fiber = 0;
    }
}

void switch_to(Fiber *to) {
    Fiber *from = running;
    if (to == from) return;
    running = to;
    self = to;
    tsan_switch_to_fiber(to->tsan);
    __sanitizer_start_switch_fiber(&from->fake, to->bottom, to->size);
    cuda_emulation_switch(&from->sp, to->sp);
    __sanitizer_finish_switch_fiber(from->fake, nullptr, nullptr);
}

Fiber *next() {
    if (block.ready.empty() || block.error) return &scheduler;
    size_t i = block.ready.size() - 1;
    if (settings().seed) i = random_below((uint32_t)block.ready.size());
    Fiber *f = block.ready[i];
    block.ready[i] = block.ready.back();
    block.ready.pop_back();
    return f;
}

/* After the running fiber let others go on: does it wait its turn among them? */
void take_turns() {
    if (!settings().seed) return;
    block.ready.push_back(running);
    switch_to(next());
}

void acquire(Fiber *f) {
    Ordering *o = f->ordering;
    f->ordering = nullptr;
    if (!o) return;
    tsan_acquire(o);
    if (--o->members) return;
    o->next = free_orderings;
    free_orderings = o;
}

/* Each as if it were the first: what was released to an earlier one at this address is forgotten. */
Ordering *new_ordering() {
#ifdef EMULATION_THREAD
    Ordering *o = free_orderings;
    if (!o) abort();
    free_orderings = o->next;
    forget_accesses(o, sizeof *o);
    o->members = 0;
    return o;
#else
    return nullptr;
#endif
}

void free_all_orderings() {
    free_orderings = nullptr;
    for (Ordering &o : orderings) {
        o.next = free_orderings;
        free_orderings = &o;
    }
}

void release(Fiber *f, Ordering *o) {
    f->ordering = o;
    if (!o) return;
    o->members++;
    tsan_release(o);
}

std::string named(unsigned mask) {
    char text[16];
    snprintf(text, sizeof text, "0x%08x", mask);
    return text;
}

const char *kind_name(Collective kind) {
    switch (kind) {
    case BARRIER:
        return "__syncthreads";
    case BARRIER_COUNT:
        return "__syncthreads_count";
    case BARRIER_AND:
        return "__syncthreads_and";
    case BARRIER_OR:
        return "__syncthreads_or";
    case SYNC:
        return "__syncwarp";
    case SHUFFLE:
        return "a shuffle";
    case VOTE:
        return "a vote";
    default:
        return "a warp matrix operation";
    }
}

std::string at(const char *file, int line) { return std::string(" at ") + file + ":" + std::to_string(line); }

std::string place(uint3 p) {
    return "(" + std::to_string(p.x) + ", " + std::to_string(p.y) + ", " + std::to_string(p.z) + ")";
}

std::string culprit(const Fiber *f) {
    std::string text = std::string("kernel ") + block.launch->name + ", block " + place(block_index);
    if (f && f != &scheduler) text += ", thread " + place(f->thread);
    return text + ": ";
}

[[noreturn]] void fail_thread(cudaError_t error, const std::string &what) {
    block.error = error;
    Fiber *culpable = running;
    tsan_release(&block.failure); /* the text was made here */
    tsan_switch_to_fiber(scheduler.tsan);
    tsan_acquire(&block.failure);
    report(error, culprit(culpable) + what);
    switch_to(&scheduler);
    abort();
}

void complete(Warp &w, int i) {
    Group g = w.groups[i];
    w.groups[i] = w.groups[--w.n_groups];
    uint64_t result[32] = {0};
    if (g.kind == VOTE) {
        uint64_t votes = 0;
        for (int l = 0; l < 32; l++)
            if (g.mask >> l & 1 && w.lanes[l]->value) votes |= 1ull << l;
        for (int l = 0; l < 32; l++) result[l] = votes;
    } else if (g.kind == SHUFFLE) {
        for (int l = 0; l < 32; l++) {
            if (!(g.mask >> l & 1)) continue;
            const int source = w.lanes[l]->source;
            if (source < 0 || source > 31 || !(g.mask >> source & 1))
                fail_thread(cudaErrorLaunchFailure, "a shuffle reads lane " + std::to_string(source) +
                                                        ", which its mask " + named(g.mask) + " does not name" +
                                                        at(g.file, g.line));
            result[l] = w.lanes[source]->value;
        }
    }
    for (int l = 31; l >= 0; l--) {
        if (!(g.arrived >> l & 1)) continue;
        w.lanes[l]->value = result[l];
        if (w.lanes[l] != running) block.ready.push_back(w.lanes[l]);
    }
}

/* The running thread has ended: others may have waited for it. */
void leave_warp(Fiber *f) {
    Warp &w = *f->warp;
    w.alive &= ~(1u << f->lane);
    for (int i = 0; i < w.n_groups; i++) {
        Group &g = w.groups[i];
        if (!(g.mask >> f->lane & 1)) continue;
        if (g.kind != SYNC) {
            fail_thread(cudaErrorLaunchFailure, "the thread has ended, but lanes wait for it in " +
                                                    std::string(kind_name(g.kind)) + at(g.file, g.line));
        } else if (g.arrived == (g.mask & w.alive)) {
            complete(w, i);
            i--;
        }
    }
}

/* The launch ends after copies that nobody waited for, too. */
void end_copies(const Fiber *f) {
    if (!f->copied) return;
    tsan_switch_to_fiber(f->copier);
    tsan_release(&block.end);
    tsan_switch_to_fiber(f->tsan);
}

[[noreturn]] void thread_main() {
    __sanitizer_finish_switch_fiber(nullptr, scheduler.bottom ? nullptr : (const void **)&scheduler.bottom,
                                    scheduler.bottom ? nullptr : &scheduler.size);
    tsan_func_entry(const_cast<void *>(block.site));
    tsan_acquire(&block.start);
    block.launch->run(block.launch->arguments);
    Fiber *f = running;
    end_copies(f);
    tsan_release(&block.end);
    tsan_func_exit();
    f->spoiled = false;
    block.ended++;
    leave_warp(f);
    switch_to(next());
    abort();
}

std::string stall() {
    std::string text;
    if (block.at_barrier)
        text = std::to_string(block.at_barrier) + " of " + std::to_string(block.n_threads) + " threads wait in " +
               kind_name(block.barrier_kind) + at(block.barrier_file, block.barrier_line);
    for (const Warp &w : block.warps)
        for (int i = 0; i < w.n_groups; i++) {
            const Group &g = w.groups[i];
            text += (text.empty() ? "" : "; ") + std::string("lanes ") + named(g.arrived) + " of warp " +
                    std::to_string(&w - block.warps.data()) + " wait for " + named(g.mask) + " in " +
                    kind_name(g.kind) + at(g.file, g.line);
        }
    if (block.ended) text += "; " + std::to_string(block.ended) + " threads have ended";
    return "divergent barrier: " + text;
}

/* Not a number, and no index. By words, since the sanitizers would check a memset(). */
void fill(char *p, size_t bytes) {
    volatile char *at = p;
    for (; bytes && (uintptr_t)at % 8; bytes--) *at++ = (char)0xff;
    for (; bytes >= 8; bytes -= 8, at += 8) *reinterpret_cast<volatile uint64_t *>(at) = ~(uint64_t)0;
    for (; bytes; bytes--) *at++ = (char)0xff;
}

/* One block; the Fibers of `context` that it takes start at next_fiber. */
void run_block(Context &context) {
    const Launch &l = *block.launch;
    const unsigned n = block.n_threads, n_warps = (n + 31) / 32;
    block.ended = block.at_barrier = 0;
    block.fibers.clear();
    block.ready.clear();
    block.warps.resize(n_warps);
    for (unsigned w = 0; w < n_warps; w++) {
        block.warps[w].alive = 0;
        block.warps[w].n_groups = 0;
    }
#ifdef EMULATION_THREAD
    const size_t sets = 2;
#else
    const size_t sets = 1;
#endif
    if (context.fibers.size() < n * sets) make_room(n * sets - context.fibers.size(), &context);
    while (context.fibers.size() < n * sets) context.fibers.push_back(new_fiber());
    if (context.next_fiber + n > context.fibers.size()) context.next_fiber = 0;
    for (unsigned i = 0; i < n; i++) {
        Fiber *&slot = context.fibers[context.next_fiber++];
        if (slot->spoiled) { /* left in the middle of a kernel */
            delete_fiber(slot);
            slot = new_fiber();
        }
        Fiber *f = slot;
        f->spoiled = true;
        f->thread = {i % l.block.x, i / l.block.x % l.block.y, i / (l.block.x * l.block.y)};
        f->linear = i;
        f->lane = (int)(i % 32);
        f->warp = &block.warps[i / 32];
        f->warp->alive |= 1u << f->lane;
        f->warp->lanes[f->lane] = f;
        prepare(f);
        block.fibers.push_back(f);
    }
    block.ready.assign(block.fibers.rbegin(), block.fibers.rend());

    const size_t room = (l.shared + 127) / 128 * 128;
    block.dynamic = shared_memory + PAGE + SHARED - BEHIND - room;
    if (l.shared) {
        __asan_unpoison_memory_region(block.dynamic, l.shared);
        fill(block.dynamic, l.shared);
        forget_accesses(block.dynamic, l.shared);
    }
    const size_t fixed = (size_t)(l.shared_stop - l.shared_start);
    if (fixed) {
        fill(l.shared_start, fixed);
        forget_accesses(l.shared_start, fixed);
    }
    free_all_orderings();
    block.ordering = nullptr;
    count_block_begin();
    switch_to(next());
    if (!block.error && block.ended < n) {
        block.error = cudaErrorLaunchFailure;
        report(block.error, culprit(nullptr) + stall());
    }
    count_block_end();
    for (Fiber *f : block.fibers) { /* threads left in the middle, after an error */
        if (!f->spoiled) continue;
        tsan_switch_to_fiber(f->tsan);
        end_copies(f);
        tsan_release(&block.end);
        tsan_switch_to_fiber(scheduler.tsan);
    }
    if (l.shared) __asan_poison_memory_region(block.dynamic, l.shared);
}

uint64_t gcd(uint64_t a, uint64_t b) { return b ? gcd(b, a % b) : a; }

} // namespace

Context::Context() : tsan(tsan_create_fiber()) { contexts().insert(this); }
Context::~Context() {
    contexts().erase(this);
    for (Fiber *f : fibers) delete_fiber(f);
    tsan_destroy_fiber(tsan);
}

cudaError_t run_grid(const Launch &l, Context &own, const void *site, void *host) {
#ifdef EMULATION_THREAD
    Context &context = own;
#else
    static Context shared; /* fibers have no history here */
    Context &context = shared;
#endif
    if (!shared_memory) {
        shared_memory = map(PAGE + SHARED + PAGE);
        mprotect(shared_memory, PAGE, PROT_NONE);
        mprotect(shared_memory + PAGE + SHARED, PAGE, PROT_NONE);
        __asan_poison_memory_region(shared_memory + PAGE, SHARED);
    }
    block.launch = &l;
    block.context = &context;
    block.site = site;
    block.error = cudaSuccess;
    block.n_threads = l.block.x * l.block.y * l.block.z;
    block_size = l.block;
    grid_size = l.grid;
    running = &scheduler;
    self = &scheduler;
    scheduler.bottom = nullptr;
    scheduler.tsan = host;
    forget_accesses(&block.start, 2); /* start and end are this launch's alone */
    tsan_release(&block.start);
    tsan_switch_to_fiber(host); /* the scheduler's own work has no part in the stream's order */
    count_launch(l);
    const uint64_t n = (uint64_t)l.grid.x * l.grid.y * l.grid.z;
    uint64_t step = 1, first = 0;
    if (settings().seed && n > 1) { /* an order of blocks: first, first + step, ... modulo n */
        first = random_below((uint32_t)(n < UINT32_MAX ? n : UINT32_MAX));
        do step = 1 + random_below((uint32_t)(n < UINT32_MAX ? n : UINT32_MAX));
        while (gcd(step, n) != 1);
    }
    for (uint64_t i = 0, at = first; i < n && !block.error; i++, at = (at + step) % n) {
        block_index = {(unsigned)(at % l.grid.x), (unsigned)(at / l.grid.x % l.grid.y),
                       (unsigned)(at / l.grid.x / l.grid.y)};
        run_block(context);
    }
    tsan_switch_to_fiber(own.tsan);
    tsan_acquire(&block.end);
    count_launch_end();
    block.launch = nullptr;
    running = nullptr;
    self = nullptr;
    return block.error;
}

void *dynamic_shared() { return block.dynamic; /* a launch without any gets the end, where nobody may touch */ }

int lane() { return running->lane; }

int barrier(Collective kind, int predicate, const char *file, int line) {
    Fiber *f = running;
    if (block.at_barrier == 0) {
        block.barrier_kind = kind;
        block.barrier_file = file;
        block.barrier_line = line;
        block.count = block.any = 0;
        block.all = 1;
        block.ordering = new_ordering();
    } else if (kind != block.barrier_kind || line != block.barrier_line || strcmp(file, block.barrier_file) != 0) {
        fail_thread(cudaErrorLaunchFailure, "divergent barrier: " + std::string(kind_name(kind)) + at(file, line) +
                                                ", while other threads wait in " + kind_name(block.barrier_kind) +
                                                at(block.barrier_file, block.barrier_line));
    }
    block.count += predicate != 0;
    block.any |= predicate != 0;
    block.all &= predicate != 0;
    block.at_barrier++;
    release(f, block.ordering);
    if (block.at_barrier == block.n_threads) {
        block.at_barrier = 0;
        block.ordering = nullptr;
        const uint64_t result = (uint64_t)(kind == BARRIER_COUNT ? block.count
                                           : kind == BARRIER_AND ? block.all
                                                                 : block.any);
        for (size_t i = block.fibers.size(); i-- > 0;) {
            block.fibers[i]->value = result;
            if (block.fibers[i] != f) block.ready.push_back(block.fibers[i]);
        }
        take_turns();
    } else {
        switch_to(next());
    }
    acquire(f);
    return (int)f->value;
}

namespace {

/* The running lane joins the operation; `work` runs when all have come. */
uint64_t meet(Collective kind, unsigned mask, uint64_t value, int source, void (*work)(void *const *), const char *file,
              int line) {
    Fiber *f = running;
    Warp &w = *f->warp;
    if (!(mask >> f->lane & 1))
        fail_thread(cudaErrorLaunchFailure, std::string(kind_name(kind)) + " whose mask " + named(mask) +
                                                " does not name the calling lane" + at(file, line));
    if (kind != SYNC && (mask & ~w.alive))
        fail_thread(cudaErrorLaunchFailure, std::string(kind_name(kind)) + " whose mask " + named(mask) +
                                                " names lanes that have ended" + at(file, line));
    int i = 0;
    while (i < w.n_groups && w.groups[i].mask != mask) i++;
    Group &g = w.groups[i];
    if (i == w.n_groups) {
        w.n_groups++;
        g = {mask, 0, kind, file, line, kind == SYNC ? new_ordering() : nullptr};
    } else if (g.kind != kind) {
        fail_thread(cudaErrorLaunchFailure, "lanes of a warp at different operations: " + std::string(kind_name(kind)) +
                                                at(file, line) + ", " + kind_name(g.kind) + at(g.file, g.line));
    }
    g.arrived |= 1u << f->lane;
    f->value = value;
    f->source = source;
    release(f, g.ordering);
    if (g.arrived == (mask & w.alive)) {
        if (work) {
            void *given[32];
            for (int l = 0; l < 32; l++) given[l] = reinterpret_cast<void *>(w.lanes[l]->value);
            work(given);
        }
        complete(w, i);
        take_turns();
    } else {
        switch_to(next());
    }
    acquire(f);
    return f->value;
}

} // namespace

uint64_t warp(Collective kind, unsigned mask, uint64_t value, int source, const char *file, int line) {
    return meet(kind, mask, value, source, nullptr, file, line);
}

void warp_collect(void *given, void (*work)(void *const[32]), const char *file, int line) {
    meet(COLLECT, 0xffffffffu, reinterpret_cast<uint64_t>(given), 0, work, file, line);
}

/* The model of C++: what precedes a fence is ordered before what follows one in another thread, if an atomic access after the
 * first was read by an atomic access before the second. */
void fence() {
#ifdef EMULATION_THREAD
    Fiber *f = running;
    f->fenced = true;
    for (unsigned i = 0; i < 4 && i < f->n_atomics; i++) tsan_acquire(const_cast<void *>(f->atomics[i]));
    f->n_atomics = 0;
#endif
}

void before_atomic(const void *p) {
#ifdef EMULATION_THREAD
    if (running && running->fenced) tsan_release(const_cast<void *>(p));
#else
    (void)p;
#endif
}

void after_atomic(const void *p) {
#ifdef EMULATION_THREAD
    if (running) running->atomics[running->n_atomics++ % 4] = p;
#else
    (void)p;
#endif
}

/* ---- copies beside the thread ---------------------------------------------------------------------------------------- */

void async_check(const void *to, const void *from, size_t bytes, size_t zeros, const char *file, int line) {
    const char *const p = static_cast<const char *>(to);
    const auto within = [&](const char *start, const char *stop) { return p >= start && p + bytes <= stop; };
    const char *what = nullptr;
    if (bytes != 4 && bytes != 8 && bytes != 16)
        what = "an asynchronous copy of other than 4, 8 or 16 bytes";
    else if (zeros != 0 && zeros != bytes)
        what = "an asynchronous copy that is zeros in part: the emulation has none";
    else if ((uintptr_t)to % bytes || (uintptr_t)from % bytes)
        what = "an asynchronous copy whose addresses are not aligned to its size";
    else if (!within(block.dynamic, block.dynamic + block.launch->shared) &&
             !within(block.launch->shared_start, block.launch->shared_stop))
        what = "an asynchronous copy to what is not shared memory";
    else if (zeros == 0 && !in_device_memory(from))
        what = "an asynchronous copy from what is not device memory";
    else if (running->n_copies == MOST_COPIES)
        what = "more asynchronous copies under way than the emulation keeps";
    if (what) fail(cudaErrorIllegalAddress, what, file, line);
}

void async_copy(void *to, const void *from, size_t bytes, size_t zeros) {
    Fiber *f = running;
    f->copies[f->n_copies++] = {to, from, bytes, zeros, f->group};
    f->copied = true;
#ifdef EMULATION_THREAD
    if (!f->copier) {
        make_room(1, block.context);
        f->copier = tsan_create_fiber();
        n_fibers++;
    }
#endif
    tsan_release(&f->begun);
    tsan_switch_to_fiber(f->copier);
    tsan_acquire(&f->begun);
    tsan_func_entry(__builtin_return_address(0));
    tsan_write_range(to, bytes);
    if (zeros == 0) tsan_read_range(const_cast<void *>(from), bytes);
    tsan_func_exit();
    tsan_switch_to_fiber(f->tsan);
}

void async_commit() {
    Fiber *f = running;
    if (f->copied) {
        tsan_switch_to_fiber(f->copier);
        tsan_release(&f->closed[f->group % MOST_GROUPS]);
        tsan_switch_to_fiber(f->tsan);
    }
    f->group++;
}

void async_wait(size_t prior, const char *file, int line) {
    Fiber *f = running;
    if (prior >= MOST_GROUPS) fail(cudaErrorInvalidValue, "a wait that leaves out more groups than 7", file, line);
    if (!f->copied || f->group <= prior) return;
    unsigned left = 0;
    for (unsigned i = 0; i < f->n_copies; i++) {
        const Copy c = f->copies[i];
        if (c.group + prior >= f->group) {
            f->copies[left++] = c;
            continue;
        }
        volatile uint32_t *to = static_cast<volatile uint32_t *>(c.to);
        const volatile uint32_t *from = static_cast<const volatile uint32_t *>(c.from);
        for (size_t word = 0; word < c.bytes / 4; word++) to[word] = c.zeros ? 0 : from[word];
    }
    f->n_copies = left;
    tsan_acquire(&f->closed[(f->group - 1 - prior) % MOST_GROUPS]);
}

void fail(cudaError_t error, const char *message, const char *file, int line) {
    fail_thread(error, message + at(file, line));
}

bool where(Where &w) {
    if (!running || running == &scheduler) return false;
    w.kernel = block.launch->name;
    w.block = block_index;
    w.thread = running->thread;
    w.linear = running->linear;
    w.stack = running->bottom;
    w.stack_end = reinterpret_cast<const char *>(running + 1); /* the thread's record lies behind its stack */
    w.dynamic = block.dynamic;
    w.dynamic_end = block.dynamic + block.launch->shared;
    w.shared = block.launch->shared_start;
    w.shared_end = block.launch->shared_stop;
    w.arguments = static_cast<const char *>(block.launch->arguments);
    w.arguments_end = w.arguments + block.launch->arguments_bytes;
    return true;
}

} // namespace cuda_emulation

namespace nvcuda {
namespace wmma {

void multiply(void *const given[32]) {
    float a[16][16], b[16][16];
    for (int l = 0; l < 32; l++) {
        const Product *p = static_cast<const Product *>(given[l]);
        for (int e = 0; e < 8; e++) {
            a[l / 2][l % 2 * 8 + e] = p->a[e];
            b[l / 2][l % 2 * 8 + e] = p->b[e];
        }
    }
    for (int l = 0; l < 32; l++) {
        Product *p = static_cast<Product *>(given[l]);
        float sum[8] = {0};
        for (int k = 0; k < 16; k++)
            for (int e = 0; e < 8; e++) sum[e] += a[l / 2][k] * b[k][l % 2 * 8 + e];
        for (int e = 0; e < 8; e++) p->c[e] += sum[e];
    }
}

} // namespace wmma
} // namespace nvcuda
