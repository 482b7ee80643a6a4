/* stream.cc: streams, events and graphs. Work is queued and runs when somebody waits for it (or asks whether it is done), in
 * any order that streams and events allow: drawn from the seed, or as it was issued where the seed is 0. */
#include "runtime.h"

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <string.h>
#include <thread>

namespace cuda_emulation {
namespace {

struct Op {
    Work work; /* empty: a marker */
    std::vector<std::shared_ptr<Op>> after;
    const void *site = nullptr;
    uint64_t number = 0; /* in order of issue */
    bool done = false;
    alignas(8) char issued = 0, finished = 0; /* addresses for ThreadSanitizer */
};
using OpPtr = std::shared_ptr<Op>;

struct Capture;

} // namespace
} // namespace cuda_emulation

using namespace cuda_emulation;

struct CUgraph_st {
    struct Node {
        Work work;
        std::vector<int> after;
        const void *site;
        int branch; /* the stream that recorded it: its order */
    };
    std::vector<Node> nodes;
    int branches = 0;
};

struct CUgraphExec_st {
    std::shared_ptr<CUgraph_st> graph; /* its own copy */
};

struct CUstream_st {
    unsigned flags = 0;
    int device = 0;
    Context context;
    std::deque<OpPtr> queue;
    OpPtr last;
    std::shared_ptr<Capture> capture;
    std::vector<int> tail; /* capturing: nodes that the next one follows */
    int branch = 0;
};

struct CUevent_st {
    unsigned flags = 0;
    int device = 0;
    OpPtr op; /* where it was last recorded */
    std::shared_ptr<Capture> capture;
    std::vector<int> nodes;
};

namespace cuda_emulation {
namespace {

struct Capture {
    cudaStream_t origin;
    cudaStreamCaptureMode mode;
    std::thread::id thread;
    cudaError_t invalid = cudaSuccess;
    bool over = false;
    std::unique_ptr<CUgraph_st> graph{new CUgraph_st()};
    std::vector<cudaStream_t> streams;
};

struct Queues {
    std::vector<cudaStream_t> streams; /* alive, and those destroyed with work left */
    std::vector<cudaStream_t> leaving;
    std::map<int, cudaStream_t> legacy; /* by device */
    std::vector<std::shared_ptr<Capture>> captures;
    std::vector<cudaEvent_t> events;
    std::vector<cudaGraph_t> graphs;
    std::vector<cudaGraphExec_t> execs;
    std::map<const void *, int> shared_limits;
    uint64_t issued = 0;
};
Queues &queues() {
    static auto *q = new Queues();
    return *q;
}

thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

template <class T> bool has(const std::vector<T> &v, T x) { return std::find(v.begin(), v.end(), x) != v.end(); }
template <class T> void drop(std::vector<T> &v, T x) { v.erase(std::remove(v.begin(), v.end(), x), v.end()); }

cudaStream_t legacy_stream(int device) {
    cudaStream_t &s = queues().legacy[device];
    if (!s) {
        s = new CUstream_st();
        s->device = device;
        queues().streams.push_back(s);
    }
    return s;
}

/* The stream behind a handle; NULL: there is none. */
cudaStream_t stream_of(cudaStream_t handle) {
    if (!handle || handle == cudaStreamLegacy) return legacy_stream(current_device());
    return has(queues().streams, handle) && !has(queues().leaving, handle) ? handle : nullptr;
}
bool is_legacy(cudaStream_t s) {
    for (auto &entry : queues().legacy)
        if (entry.second == s) return true;
    return false;
}

bool ready(const Op &op) {
    for (const OpPtr &a : op.after)
        if (!a->done) return false;
    return true;
}

void run(Op &op, Context &context, int device) {
    void *host = tsan_get_current_fiber();
    const int current = current_device();
    current_device() = device;
    cudaError_t error = lasting();
    if (op.work && !error) error = work_fault();
    tsan_switch_to_fiber(context.tsan);
    tsan_acquire(&op.issued);
    for (const OpPtr &a : op.after) tsan_acquire(&a->finished);
    tsan_func_entry(const_cast<void *>(op.site));
    if (op.work && !error) error = op.work(context, op.site, host);
    tsan_func_exit();
    op.work = nullptr; /* here, where what it holds was read */
    tsan_release(&op.finished);
    tsan_switch_to_fiber(host);
    if (error) set_lasting(error, device);
    current_device() = current;
    op.done = true;
    op.after.clear();
}

/* Runs one piece of work that may run; false: nothing is queued. */
bool step() {
    std::vector<cudaStream_t> able;
    for (cudaStream_t s : queues().streams)
        if (!s->queue.empty() && ready(*s->queue.front())) able.push_back(s);
    if (able.empty()) return false;
    cudaStream_t s = able[0];
    if (settings().seed)
        s = able[random_below((uint32_t)able.size())];
    else
        for (cudaStream_t other : able)
            if (other->queue.front()->number < s->queue.front()->number) s = other;
    OpPtr op = s->queue.front();
    run(*op, s->context, s->device);
    s->queue.pop_front();
    if (s->queue.empty() && has(queues().leaving, s)) {
        drop(queues().leaving, s);
        drop(queues().streams, s);
        delete s;
    }
    return true;
}

void wait(const OpPtr &op) {
    while (op && !op->done && step()) {}
    if (op) tsan_acquire(&op->finished);
}

OpPtr enqueue_op(cudaStream_t s, Work work, const void *site) {
    auto op = std::make_shared<Op>();
    op->work = std::move(work);
    op->site = site;
    op->number = queues().issued++;
    if (is_legacy(s)) { /* follows what blocking streams hold, and they what it holds */
        for (cudaStream_t other : queues().streams)
            if (other != s && !(other->flags & cudaStreamNonBlocking) && other->device == s->device && other->last)
                op->after.push_back(other->last);
    } else if (!(s->flags & cudaStreamNonBlocking)) {
        auto it = queues().legacy.find(s->device);
        if (it != queues().legacy.end() && it->second->last) op->after.push_back(it->second->last);
    }
    tsan_release(&op->issued);
    s->queue.push_back(op);
    s->last = op;
    return op;
}

cudaError_t invalidate(Capture &c, cudaError_t why) {
    if (!c.invalid) c.invalid = why;
    return why;
}

/* Work of the legacy stream would wait for blocking streams: not while one of these is captured. */
cudaError_t legacy_fault(cudaStream_t s) {
    if (!is_legacy(s)) return cudaSuccess;
    for (auto &c : queues().captures)
        for (cudaStream_t member : c->streams)
            if (!(member->flags & cudaStreamNonBlocking) && member->device == s->device)
                return invalidate(*c, cudaErrorStreamCaptureImplicit);
    return cudaSuccess;
}

int add_node(cudaStream_t s, Work work, const void *site) {
    CUgraph_st &g = *s->capture->graph;
    g.nodes.push_back({std::move(work), s->tail, site, s->branch});
    s->tail = {(int)g.nodes.size() - 1};
    return s->tail[0];
}

void join(cudaStream_t s, const std::shared_ptr<Capture> &c, const std::vector<int> &nodes) {
    if (!s->capture) {
        s->capture = c;
        s->branch = c->graph->branches++;
        s->tail.clear();
        c->streams.push_back(s);
    }
    for (int node : nodes)
        if (!has(s->tail, node)) s->tail.push_back(node);
}

void end_capture(const std::shared_ptr<Capture> &c) {
    c->over = true;
    for (cudaStream_t s : c->streams) {
        s->capture = nullptr;
        s->tail.clear();
    }
    drop(queues().captures, c);
}

} // namespace

bool capturing(cudaStream_t handle) {
    cudaStream_t s = stream_of(handle);
    return s && s->capture;
}
bool stream_exists(cudaStream_t handle) { return stream_of(handle) != nullptr; }

cudaError_t forbidden_in_capture() {
    if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
    for (auto &c : queues().captures)
        if (c->mode == cudaStreamCaptureModeGlobal ||
            (c->mode == cudaStreamCaptureModeThreadLocal && c->thread == std::this_thread::get_id()))
            return invalidate(*c, cudaErrorStreamCaptureUnsupported);
    return cudaSuccess;
}

cudaError_t submit(cudaStream_t handle, Work work, const void *site) {
    cudaStream_t s = stream_of(handle);
    if (!s || s->device != current_device()) return cudaErrorInvalidResourceHandle;
    if (s->capture) {
        if (s->capture->invalid) return cudaErrorStreamCaptureInvalidated;
        add_node(s, std::move(work), site);
        return cudaSuccess;
    }
    if (cudaError_t e = legacy_fault(s)) return e;
    enqueue_op(s, std::move(work), site);
    return cudaSuccess;
}

void drain_all() {
    while (step()) {}
    for (cudaStream_t s : queues().streams)
        if (s->last) tsan_acquire(&s->last->finished);
}

cudaError_t drain(cudaStream_t handle) {
    cudaStream_t s = stream_of(handle);
    if (!s) return cudaErrorInvalidResourceHandle;
    if (s->capture) return invalidate(*s->capture, cudaErrorStreamCaptureUnsupported);
    if (cudaError_t e = legacy_fault(s)) return e;
    if (is_legacy(s) && !s->queue.empty()) wait(s->last);
    if (is_legacy(s)) { /* waits for blocking streams too */
        std::vector<OpPtr> last;
        for (cudaStream_t other : queues().streams)
            if (!(other->flags & cudaStreamNonBlocking) && other->last) last.push_back(other->last);
        for (const OpPtr &op : last) wait(op);
    } else {
        wait(s->last);
    }
    return lasting();
}

void drop_all_work() {
    while (!queues().captures.empty()) end_capture(queues().captures.front());
    for (cudaStream_t s : queues().streams) {
        for (OpPtr &op : s->queue) {
            op->done = true;
            op->work = nullptr;
            op->after.clear();
        }
        s->queue.clear();
    }
}

void forget_objects() { /* drop_all_work() came before */
    Queues &q = queues();
    for (cudaStream_t s : q.streams) delete s;
    for (cudaEvent_t e : q.events) delete e;
    for (cudaGraph_t g : q.graphs) delete g;
    for (cudaGraphExec_t x : q.execs) delete x;
    q.streams.clear();
    q.leaving.clear();
    q.legacy.clear();
    q.events.clear();
    q.graphs.clear();
    q.execs.clear();
    alive().streams = alive().events = alive().graphs = alive().graph_execs = 0;
}

void enqueue(const Launch &launch, cudaStream_t stream) {
    const void *site = __builtin_return_address(0);
    Call call;
    cudaError_t e = call.error;
    const dim3 g = launch.grid, b = launch.block;
    if (!e && settings().capability < settings().images) e = cudaErrorNoKernelImageForDevice;
    if (!e && (!g.x || !g.y || !g.z || !b.x || !b.y || !b.z || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535 ||
               b.x > 1024 || b.y > 1024 || b.z > 64 || (uint64_t)b.x * b.y * b.z > 1024))
        e = cudaErrorInvalidConfiguration;
    if (!e) {
        auto it = queues().shared_limits.find(launch.kernel);
        const size_t limit = it == queues().shared_limits.end() ? 48 * 1024 : (size_t)it->second;
        if (launch.shared > limit) e = cudaErrorInvalidValue;
    }
    struct Held : Launch {
        explicit Held(const Launch &l) : Launch(l) {}
        Held(const Held &) = delete;
        ~Held() { free(arguments); }
    };
    auto held = std::make_shared<Held>(launch);
    if (e) {
        call.end(e);
        return;
    }
    call.end(submit(
        stream,
        [held](Context &context, const void *at, void *host) {
            for (int i = 0; i < held->n_pointers; i++) {
                const void *p = held->pointers[i];
                if (!p || is_pinned(p, 1)) continue;
                std::string fault = device_fault(p, 0);
                if (fault.empty()) continue;
                report(cudaErrorIllegalAddress,
                       std::string("kernel ") + held->name + ": an argument points to " + fault);
                return cudaErrorIllegalAddress;
            }
            return run_grid(*held, context, at, host);
        },
        site));
}

} // namespace cuda_emulation

#define SITE __builtin_return_address(0)

/* A copy of `kind` as it was asked for: do the addresses fit? */
static cudaError_t copy_fault(const void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    if ((unsigned)kind > cudaMemcpyDefault) return cudaErrorInvalidMemcpyDirection;
    const bool to_device = in_device_memory(to), from_device = in_device_memory(from);
    const bool want_to = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    const bool want_from = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    std::string fault;
    if (kind != cudaMemcpyDefault && (to_device != want_to || from_device != want_from))
        fault = "its kind does not fit the addresses";
    if (fault.empty() && to_device && !(fault = device_fault(to, bytes)).empty()) fault = "it writes " + fault;
    if (fault.empty() && from_device && !(fault = device_fault(from, bytes)).empty()) fault = "it reads " + fault;
    if (fault.empty()) return cudaSuccess;
    report(cudaErrorInvalidValue, "a copy of " + std::to_string(bytes) + " bytes: " + fault);
    return cudaErrorInvalidValue;
}

static Work copy_work(void *to, const void *from, size_t bytes) {
    return [=](Context &, const void *, void *) {
        std::string fault = in_device_memory(to) ? device_fault(to, bytes) : "";
        if (fault.empty() && in_device_memory(from)) fault = device_fault(from, bytes);
        if (!fault.empty()) { /* freed between call and work */
            report(cudaErrorIllegalAddress, "a copy touches " + fault);
            return cudaErrorIllegalAddress;
        }
        tsan_read_range(const_cast<void *>(from), bytes);
        tsan_write_range(to, bytes);
        memmove(to, from, bytes);
        return cudaSuccess;
    };
}

static cudaError_t copy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream,
                        const void *site) {
    if (!bytes) return stream_exists(stream) ? cudaSuccess : cudaErrorInvalidResourceHandle;
    if (!to || !from) return cudaErrorInvalidValue;
    if (cudaError_t e = copy_fault(to, from, bytes, kind)) return e;
    const bool pageable_from = !in_device_memory(from) && !is_pinned(from, bytes);
    const bool pageable_to = !in_device_memory(to) && !is_pinned(to, bytes);
    if ((pageable_from || pageable_to) && capturing(stream)) {
        cudaError_t e = drain(stream); /* invalidates the capture */
        return e ? e : cudaErrorStreamCaptureUnsupported;
    }
    if (pageable_from) { /* the source is read now; the copy to the device may still be under way on return */
        auto staged = std::make_shared<std::vector<char>>(static_cast<const char *>(from),
                                                          static_cast<const char *>(from) + bytes);
        Work work = copy_work(to, staged->data(), bytes);
        cudaError_t e =
            submit(stream, [staged, work](Context &c, const void *at, void *host) { return work(c, at, host); }, site);
        if (e || !pageable_to) return e;
        return drain(stream);
    }
    if (cudaError_t e = submit(stream, copy_work(to, from, bytes), site)) return e;
    return pageable_to ? drain(stream) : cudaSuccess;
}

static cudaError_t set(void *p, int value, size_t bytes, cudaStream_t stream, const void *site) {
    if (!bytes) return stream_exists(stream) ? cudaSuccess : cudaErrorInvalidResourceHandle;
    std::string fault = is_pinned(p, bytes) ? "" : device_fault(p, bytes);
    if (!fault.empty()) {
        report(cudaErrorInvalidValue, "a memset of " + fault);
        return cudaErrorInvalidValue;
    }
    return submit(
        stream,
        [=](Context &, const void *, void *) {
            if (!touch(p, bytes, true, "a memset")) return cudaErrorIllegalAddress;
            memset(p, value, bytes);
            return cudaSuccess;
        },
        site);
}

extern "C" {

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    Call call;
    return call.end(call.error ? call.error : copy(to, from, bytes, kind, stream, SITE));
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    Call call;
    if (call.error) return call.end(call.error);
    cudaError_t e = forbidden_in_capture();
    if (!e) e = copy(to, from, bytes, kind, nullptr, SITE);
    return call.end(e ? e : drain(nullptr));
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream) {
    Call call;
    return call.end(call.error ? call.error : set(p, value, bytes, stream, SITE));
}
cudaError_t cudaMemset(void *p, int value, size_t bytes) {
    Call call;
    if (call.error) return call.end(call.error);
    cudaError_t e = forbidden_in_capture();
    return call.end(e ? e : set(p, value, bytes, nullptr, SITE));
}

/* ---- streams --------------------------------------------------------------------------------------------------------- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    Call call;
    if (call.error) return call.end(call.error);
    if (!stream || flags & ~(unsigned)cudaStreamNonBlocking) return call.end(cudaErrorInvalidValue);
    cudaStream_t s = new CUstream_st();
    s->flags = flags;
    s->device = current_device();
    queues().streams.push_back(s);
    alive().streams++;
    *stream = s;
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int) {
    return cudaStreamCreateWithFlags(stream, flags);
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    Call call;
    if (call.error) return call.end(call.error);
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
    Call call;
    if (call.error) return call.end(call.error);
    cudaStream_t s = stream_of(handle);
    if (!s || is_legacy(s)) return call.end(cudaErrorInvalidResourceHandle);
    if (s->capture) {
        invalidate(*s->capture, cudaErrorStreamCaptureInvalidated);
        drop(s->capture->streams, s);
    }
    alive().streams--;
    if (s->queue.empty()) {
        drop(queues().streams, s);
        delete s;
    } else {
        queues().leaving.push_back(s); /* what is queued still runs */
    }
    return call.end(lasting());
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    Call call;
    return call.end(call.error ? call.error : drain(stream));
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
    Call call;
    if (call.error) return call.end(call.error);
    cudaStream_t s = stream_of(handle);
    if (!s) return call.end(cudaErrorInvalidResourceHandle);
    if (s->capture) return call.end(invalidate(*s->capture, cudaErrorStreamCaptureUnsupported));
    if (cudaError_t e = legacy_fault(s)) return call.end(e);
    step();
    if (lasting()) return call.end(lasting());
    if (!s->queue.empty()) return call.end(cudaErrorNotReady);
    wait(s->last);
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) {
    Call call;
    if (call.error) return call.end(call.error);
    if (cudaError_t e = forbidden_in_capture()) return call.end(e);
    drain_all();
    return call.end(lasting());
}

cudaError_t cudaDeviceReset(void) { return cudaDeviceSynchronize(); }

/* ---- events ---------------------------------------------------------------------------------------------------------- */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    Call call;
    if (call.error) return call.end(call.error);
    if (!event) return call.end(cudaErrorInvalidValue);
    *event = new CUevent_st();
    (*event)->flags = flags;
    (*event)->device = current_device();
    queues().events.push_back(*event);
    alive().events++;
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    Call call;
    if (call.error) return call.end(call.error);
    if (!has(queues().events, event)) return call.end(cudaErrorInvalidResourceHandle);
    drop(queues().events, event);
    delete event;
    alive().events--;
    return call.end(lasting());
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
    Call call;
    if (call.error) return call.end(call.error);
    cudaStream_t s = stream_of(handle);
    if (!s || !has(queues().events, event) || event->device != s->device)
        return call.end(cudaErrorInvalidResourceHandle);
    if (s->capture) {
        if (s->capture->invalid) return call.end(cudaErrorStreamCaptureInvalidated);
        event->capture = s->capture;
        event->nodes = s->tail;
        event->op = nullptr;
        return cudaSuccess;
    }
    if (cudaError_t e = legacy_fault(s)) return call.end(e);
    event->capture = nullptr;
    event->op = enqueue_op(s, nullptr, SITE);
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
    Call call;
    if (call.error) return call.end(call.error);
    cudaStream_t s = stream_of(handle);
    if (!s || !has(queues().events, event)) return call.end(cudaErrorInvalidResourceHandle);
    if (event->capture) {
        if (event->capture->over) return call.end(cudaErrorCapturedEvent);
        if (s->capture && s->capture != event->capture) {
            invalidate(*event->capture, cudaErrorStreamCaptureMerge);
            return call.end(invalidate(*s->capture, cudaErrorStreamCaptureMerge));
        }
        if (is_legacy(s)) return call.end(invalidate(*event->capture, cudaErrorStreamCaptureImplicit));
        if (event->capture->invalid) return call.end(cudaErrorStreamCaptureInvalidated);
        join(s, event->capture, event->nodes);
        return cudaSuccess;
    }
    if (s->capture) return call.end(invalidate(*s->capture, cudaErrorStreamCaptureIsolation));
    if (!event->op) return cudaSuccess; /* never recorded */
    if (cudaError_t e = legacy_fault(s)) return call.end(e);
    enqueue_op(s, nullptr, SITE)->after.push_back(event->op);
    return cudaSuccess;
}

static cudaError_t event_fault(cudaEvent_t event) {
    if (!has(queues().events, event)) return cudaErrorInvalidResourceHandle;
    if (!event->capture) return cudaSuccess;
    return event->capture->over ? cudaErrorCapturedEvent : invalidate(*event->capture, cudaErrorCapturedEvent);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    Call call;
    if (call.error) return call.end(call.error);
    if (cudaError_t e = event_fault(event)) return call.end(e);
    step();
    if (lasting()) return call.end(lasting());
    if (event->op && !event->op->done) return call.end(cudaErrorNotReady);
    wait(event->op);
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    Call call;
    if (call.error) return call.end(call.error);
    if (cudaError_t e = event_fault(event)) return call.end(e);
    wait(event->op);
    return call.end(lasting());
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
    Call call;
    if (call.error) return call.end(call.error);
    for (cudaEvent_t e : {start, end}) {
        if (cudaError_t fault = event_fault(e)) return call.end(fault);
        if (!e->op || e->flags & cudaEventDisableTiming) return call.end(cudaErrorInvalidResourceHandle);
        if (!e->op->done) return call.end(cudaErrorNotReady);
    }
    if (!ms) return call.end(cudaErrorInvalidValue);
    *ms = (float)(end->op->number - start->op->number); /* the emulation has no clock: pieces of work */
    return cudaSuccess;
}

/* ---- capture, graphs ------------------------------------------------------------------------------------------------- */

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
    Call call;
    if (call.error) return call.end(call.error);
    cudaStream_t s = stream_of(handle);
    if (!s) return call.end(cudaErrorInvalidResourceHandle);
    if ((unsigned)mode > cudaStreamCaptureModeRelaxed) return call.end(cudaErrorInvalidValue);
    if (is_legacy(s)) return call.end(cudaErrorStreamCaptureUnsupported);
    if (s->capture) return call.end(cudaErrorIllegalState);
    auto c = std::make_shared<Capture>();
    c->origin = s;
    c->mode = mode;
    c->thread = std::this_thread::get_id();
    queues().captures.push_back(c);
    join(s, c, {});
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph) {
    Call call;
    if (graph) *graph = nullptr;
    if (call.error) return call.end(call.error);
    cudaStream_t s = stream_of(handle);
    if (!s) return call.end(cudaErrorInvalidResourceHandle);
    if (!s->capture) return call.end(cudaErrorIllegalState);
    if (!graph) return call.end(cudaErrorInvalidValue);
    std::shared_ptr<Capture> c = s->capture;
    if (c->origin != s) return call.end(invalidate(*c, cudaErrorStreamCaptureUnmatched));
    if (c->mode != cudaStreamCaptureModeRelaxed && c->thread != std::this_thread::get_id())
        return call.end(cudaErrorStreamCaptureWrongThread);
    std::vector<char> reached(c->graph->nodes.size()); /* nodes that the origin's last ones follow */
    std::vector<int> left = s->tail;
    while (!left.empty()) {
        int node = left.back();
        left.pop_back();
        if (reached[(size_t)node]) continue;
        reached[(size_t)node] = 1;
        for (int before : c->graph->nodes[(size_t)node].after) left.push_back(before);
    }
    cudaError_t e = c->invalid ? cudaErrorStreamCaptureInvalidated : lasting();
    for (char r : reached)
        if (!e && !r) e = cudaErrorStreamCaptureUnjoined;
    end_capture(c);
    if (e) return call.end(e);
    *graph = c->graph.release();
    queues().graphs.push_back(*graph);
    alive().graphs++;
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus *status) {
    Call call;
    if (call.error) return call.end(call.error);
    cudaStream_t s = stream_of(handle);
    if (!s || !status) return call.end(s ? cudaErrorInvalidValue : cudaErrorInvalidResourceHandle);
    *status = !s->capture           ? cudaStreamCaptureStatusNone
              : s->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                    : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode) {
    Call call;
    if (call.error) return call.end(call.error);
    if (!mode || (unsigned)*mode > cudaStreamCaptureModeRelaxed) return call.end(cudaErrorInvalidValue);
    std::swap(*mode, thread_mode);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    Call call;
    if (call.error) return call.end(call.error);
    if (!has(queues().graphs, graph)) return call.end(cudaErrorInvalidValue);
    drop(queues().graphs, graph);
    delete graph;
    alive().graphs--;
    return call.end(lasting());
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, void **nodes, size_t *n) {
    Call call;
    if (call.error) return call.end(call.error);
    if (!has(queues().graphs, graph) || !n) return call.end(cudaErrorInvalidValue);
    if (!nodes) {
        *n = graph->nodes.size();
        return cudaSuccess;
    }
    for (size_t i = 0; i < *n; i++) nodes[i] = i < graph->nodes.size() ? &graph->nodes[i] : nullptr;
    *n = std::min(*n, graph->nodes.size());
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
    Call call;
    if (exec) *exec = nullptr;
    if (call.error) return call.end(call.error);
    if (!exec || !has(queues().graphs, graph)) return call.end(cudaErrorInvalidValue);
    cudaGraphExec_t x = new CUgraphExec_st();
    x->graph = std::make_shared<CUgraph_st>(*graph);
    queues().execs.push_back(x);
    alive().graph_execs++;
    *exec = x;
    return cudaSuccess;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t stream) {
    Call call;
    if (call.error) return call.end(call.error);
    if (!has(queues().execs, exec)) return call.end(cudaErrorInvalidValue);
    return call.end(stream_exists(stream) ? cudaSuccess : cudaErrorInvalidResourceHandle);
}

/* All nodes, in an order that their dependencies allow; ThreadSanitizer sees each branch on its own: the first as the stream. */
static cudaError_t replay(cudaGraphExec_t exec, Context &stream, void *host) {
    const std::vector<CUgraph_st::Node> &nodes = exec->graph->nodes;
    std::vector<std::unique_ptr<uint64_t>> finished; /* addresses for ThreadSanitizer */
    for (size_t i = 0; i <= nodes.size(); i++) finished.emplace_back(new uint64_t(0));
    std::vector<char> done(nodes.size());
    tsan_release(finished.back().get());
    while ((int)stream.branches.size() + 1 < exec->graph->branches) stream.branches.emplace_back(new Context());
    for (size_t left = nodes.size(); left; left--) {
        std::vector<size_t> able;
        for (size_t i = 0; i < nodes.size(); i++) {
            bool may = !done[i];
            for (int before : nodes[i].after) may = may && done[(size_t)before];
            if (may) able.push_back(i);
            if (may && !settings().seed) break;
        }
        const size_t i = able[random_below((uint32_t)able.size())];
        Context &branch = nodes[i].branch ? *stream.branches[(size_t)nodes[i].branch - 1] : stream;
        tsan_switch_to_fiber(branch.tsan);
        tsan_acquire(finished.back().get());
        for (int before : nodes[i].after) tsan_acquire(finished[(size_t)before].get());
        tsan_func_entry(const_cast<void *>(nodes[i].site));
        const cudaError_t e = nodes[i].work(branch, nodes[i].site, host);
        tsan_func_exit();
        tsan_release(finished[i].get());
        tsan_switch_to_fiber(stream.tsan);
        if (e) return e;
        done[i] = 1;
    }
    for (auto &f : finished) tsan_acquire(f.get());
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    Call call;
    if (call.error) return call.end(call.error);
    if (!has(queues().execs, exec)) return call.end(cudaErrorInvalidValue);
    if (capturing(stream)) return call.end(cudaErrorStreamCaptureUnsupported); /* child graphs are not emulated */
    return call.end(submit(
        stream, [exec](Context &context, const void *, void *host) { return replay(exec, context, host); }, SITE));
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    Call call;
    if (call.error) return call.end(call.error);
    if (!has(queues().execs, exec)) return call.end(cudaErrorInvalidValue);
    drain_all(); /* launches of it may be queued */
    drop(queues().execs, exec);
    delete exec;
    alive().graph_execs--;
    return call.end(lasting());
}

/* ---- kernels --------------------------------------------------------------------------------------------------------- */

cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attr, int value) {
    Call call;
    if (call.error) return call.end(call.error);
    if (!kernel) return call.end(cudaErrorInvalidDeviceFunction);
    if (attr == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
    if (attr != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > 227 * 1024)
        return call.end(cudaErrorInvalidValue);
    queues().shared_limits[kernel] = std::max(value, 0);
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, const void *kernel) {
    Call call;
    if (call.error) return call.end(call.error);
    if (!a || !kernel) return call.end(a ? cudaErrorInvalidDeviceFunction : cudaErrorInvalidValue);
    if (settings().capability < settings().images) return call.end(cudaErrorNoKernelImageForDevice);
    memset(a, 0, sizeof *a);
    auto it = queues().shared_limits.find(kernel);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->ptxVersion = a->binaryVersion = settings().capability;
    a->maxDynamicSharedSizeBytes = it == queues().shared_limits.end() ? 48 * 1024 : it->second;
    return cudaSuccess;
}

} // extern "C"
