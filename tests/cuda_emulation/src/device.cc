/* device.cc: settings, devices, errors, and what a call of the interface does first and last. */
#include "runtime.h"

#include <algorithm>
#include <mutex>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace cuda_emulation {
namespace {

uint64_t number(const char *name, uint64_t otherwise) {
    const char *text = getenv(name);
    return text && *text ? strtoull(text, nullptr, 0) : otherwise;
}

constexpr int MAX_DEVICES = 16;

struct State {
    Settings settings;
    uint64_t random, calls, fail_call, fail_work;
    int fail_call_error, fail_work_error;
    cudaError_t lasting[MAX_DEVICES];
    unsigned contexts; /* a bit for each device */
    cuda_emulation_alive_t alive;
    std::string report;
    std::recursive_mutex lock;

    State() : calls(0), lasting(), contexts(0), alive() {
        settings.seed = number("CUDA_EMULATION_SEED", 0);
        settings.devices = (int)number("CUDA_EMULATION_DEVICES", 1);
        settings.capability = (int)number("CUDA_EMULATION_CAPABILITY", 90);
        settings.images = (int)number("CUDA_EMULATION_IMAGES", 80);
        settings.driver = (int)number("CUDA_EMULATION_DRIVER", 13000);
        settings.memory = number("CUDA_EMULATION_MEMORY", (uint64_t)4 << 30);
        settings.quiet = number("CUDA_EMULATION_QUIET", 0) != 0;
        settings.vague_blas = number("CUDA_EMULATION_VAGUE_BLAS", 0) != 0;
        failure("CUDA_EMULATION_FAIL_CALL", fail_call, fail_call_error);
        failure("CUDA_EMULATION_FAIL_WORK", fail_work, fail_work_error);
        random = settings.seed;
    }
    static void failure(const char *name, uint64_t &n, int &error) { /* n:error */
        const char *text = getenv(name), *colon = text ? strchr(text, ':') : nullptr;
        n = text ? strtoull(text, nullptr, 0) : 0;
        error = colon ? atoi(colon + 1) : cudaErrorUnknown;
    }
};

State &state() {
    static State *s = new State(); /* never destroyed: calls may come until the process ends */
    return *s;
}

thread_local cudaError_t last_error;
thread_local int device;
thread_local int depth; /* calls of the interface inside calls */

} // namespace

Settings &settings() { return state().settings; }
cudaError_t lasting() { return state().lasting[device]; }
void set_lasting(cudaError_t e, int of) {
    if (!state().lasting[of]) state().lasting[of] = e;
}
/* Errors that corrupt a context: whatever comes later gives them again. */
static bool lasts(cudaError_t e) {
    return e == cudaErrorECCUncorrectable || e == cudaErrorIllegalAddress || e == cudaErrorLaunchTimeout ||
           e == cudaErrorIllegalInstruction || e == cudaErrorMisalignedAddress || e == cudaErrorLaunchFailure;
}
cuda_emulation_alive_t &alive() { return state().alive; }
int &current_device() { return device; }

uint32_t random_below(uint32_t n) {
    State &s = state();
    if (!s.settings.seed || n < 2) return 0;
    uint64_t z = s.random += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)(((z >> 32) * n) >> 32);
}

void report(cudaError_t error, const std::string &what) {
    State &s = state();
    s.report = "CUDA emulation: " + what + " (" + cudaGetErrorName(error) + ")";
    if (!s.settings.quiet) fprintf(stderr, "%s\n", s.report.c_str());
}

cudaError_t work_fault() { /* the error that was asked for this piece of work */
    State &s = state();
    if (s.fail_work && --s.fail_work == 0) return (cudaError_t)s.fail_work_error;
    return cudaSuccess;
}

Call::Call(Kind kind) : error(cudaSuccess) {
    State &s = state();
    s.lock.lock();
    if (depth++) return;
    s.calls++;
    if (s.fail_call && --s.fail_call == 0) {
        error = (cudaError_t)s.fail_call_error;
        if (lasts(error)) set_lasting(error, device);
        return;
    }
    if (kind == ANYWHERE) return;
    error = s.settings.driver < CUDART_VERSION ? cudaErrorInsufficientDriver
            : s.settings.devices == 0          ? cudaErrorNoDevice
            : kind == USES_DEVICE              ? s.lasting[device]
                                               : cudaSuccess;
    if (kind == USES_DEVICE && !error) s.contexts |= 1u << device;
}
Call::~Call() {
    depth--;
    state().lock.unlock();
}
cudaError_t Call::end(cudaError_t e) {
    if (e && e != cudaErrorNotReady) last_error = e;
    return e;
}

} // namespace cuda_emulation

using namespace cuda_emulation;

extern "C" {

/* ---- control --------------------------------------------------------------------------------------------------------- */

void cuda_emulation_seed(uint64_t seed) { state().settings.seed = state().random = seed; }
void cuda_emulation_devices(int n) { settings().devices = n; }
void cuda_emulation_capability(int capability) { settings().capability = capability; }
void cuda_emulation_images(int capability) { settings().images = capability; }
void cuda_emulation_vague_blas(int on) { settings().vague_blas = on != 0; }
unsigned cuda_emulation_contexts(void) { return state().contexts; }
void cuda_emulation_driver(int version) { settings().driver = version; }
void cuda_emulation_memory(size_t bytes) { settings().memory = bytes; }
void cuda_emulation_fail_call(uint64_t n, int error) {
    state().fail_call = n;
    state().fail_call_error = error;
}
void cuda_emulation_fail_work(uint64_t n, int error) {
    state().fail_work = n;
    state().fail_work_error = error;
}
uint64_t cuda_emulation_calls(void) { return state().calls; }
const char *cuda_emulation_report(void) { return state().report.c_str(); }
void cuda_emulation_alive(cuda_emulation_alive_t *to) { *to = state().alive; }
void cuda_emulation_reset(void) {
    Call call(Call::ANYWHERE);
    drop_all_work();
    bool failed = false;
    for (cudaError_t &e : state().lasting) {
        failed |= e != cudaSuccess;
        e = cudaSuccess;
    }
    last_error = cudaSuccess;
    if (failed) {
        forget_handles();
        forget_objects();
        forget_memory();
    }
    state().report.clear();
}

/* ---- errors ---------------------------------------------------------------------------------------------------------- */

cudaError_t cudaGetLastError(void) {
    Call call(Call::ANYWHERE);
    cudaError_t e = lasting() ? lasting() : last_error;
    last_error = cudaSuccess;
    return e;
}
cudaError_t cudaPeekAtLastError(void) {
    Call call(Call::ANYWHERE);
    return lasting() ? lasting() : last_error;
}

static const struct {
    cudaError_t error;
    const char *name, *text;
} errors[] = {
#define E(name, text) {name, #name, text}
    E(cudaSuccess, "no error"),
    E(cudaErrorInvalidValue, "invalid argument"),
    E(cudaErrorMemoryAllocation, "out of memory"),
    E(cudaErrorInitializationError, "initialization error"),
    E(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    E(cudaErrorInvalidHostPointer, "invalid host pointer"),
    E(cudaErrorInvalidDevicePointer, "invalid device pointer"),
    E(cudaErrorInvalidMemcpyDirection, "invalid copy direction for memcpy"),
    E(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version"),
    E(cudaErrorInvalidDeviceFunction, "invalid device function"),
    E(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    E(cudaErrorInvalidDevice, "invalid device ordinal"),
    E(cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device"),
    E(cudaErrorECCUncorrectable, "uncorrectable ECC error encountered"),
    E(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    E(cudaErrorIllegalState, "the operation cannot be performed in the present state"),
    E(cudaErrorNotReady, "device not ready"),
    E(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    E(cudaErrorLaunchOutOfResources, "too many resources requested for launch"),
    E(cudaErrorLaunchTimeout, "the launch timed out and was terminated"),
    E(cudaErrorHostMemoryAlreadyRegistered, "part or all of the requested memory range is already mapped"),
    E(cudaErrorHostMemoryNotRegistered, "pointer does not correspond to a registered memory region"),
    E(cudaErrorIllegalInstruction, "an illegal instruction was encountered"),
    E(cudaErrorMisalignedAddress, "misaligned address"),
    E(cudaErrorLaunchFailure, "unspecified launch failure"),
    E(cudaErrorNotSupported, "operation not supported"),
    E(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"),
    E(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"),
    E(cudaErrorStreamCaptureMerge, "operation would result in a merge of separate capture sequences"),
    E(cudaErrorStreamCaptureUnmatched, "capture was not ended in the same stream as it began"),
    E(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"),
    E(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream"),
    E(cudaErrorStreamCaptureImplicit, "operation would make the legacy stream depend on a capturing blocking stream"),
    E(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream"),
    E(cudaErrorStreamCaptureWrongThread, "attempt to terminate a thread-local capture sequence from another thread"),
    E(cudaErrorUnknown, "unknown error"),
#undef E
};

const char *cudaGetErrorName(cudaError_t e) {
    for (const auto &entry : errors)
        if (entry.error == e) return entry.name;
    return "unrecognized error code";
}
const char *cudaGetErrorString(cudaError_t e) {
    for (const auto &entry : errors)
        if (entry.error == e) return entry.text;
    return "unrecognized error code";
}

/* ---- devices --------------------------------------------------------------------------------------------------------- */

cudaError_t cudaDriverGetVersion(int *version) {
    Call call(Call::ANYWHERE);
    if (call.error) return call.end(call.error);
    if (!version) return call.end(cudaErrorInvalidValue);
    *version = settings().driver;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version) {
    Call call(Call::ANYWHERE);
    if (call.error) return call.end(call.error);
    if (!version) return call.end(cudaErrorInvalidValue);
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *n) {
    Call call(Call::NEEDS_DRIVER);
    if (n) *n = 0;
    if (call.error) return call.end(call.error);
    if (!n) return call.end(cudaErrorInvalidValue);
    *n = settings().devices;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *to) {
    Call call(Call::NEEDS_DRIVER);
    if (call.error) return call.end(call.error);
    if (!to) return call.end(cudaErrorInvalidValue);
    *to = device;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int to) {
    Call call(Call::NEEDS_DRIVER);
    if (call.error) return call.end(call.error);
    if (to < 0 || to >= settings().devices) return call.end(cudaErrorInvalidDevice);
    if (state().lasting[to]) return call.end(state().lasting[to]);
    device = to;
    state().contexts |= 1u << to; /* as from CUDA 12 on */
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *prop, int which) {
    Call call(Call::NEEDS_DRIVER);
    if (call.error) return call.end(call.error);
    if (!prop) return call.end(cudaErrorInvalidValue);
    if (which < 0 || which >= settings().devices) return call.end(cudaErrorInvalidDevice);
    memset(prop, 0, sizeof *prop);
    snprintf(prop->name, sizeof prop->name, "Emulated device %d", which);
    prop->totalGlobalMem = settings().memory;
    prop->sharedMemPerBlock = 48 * 1024;
    prop->sharedMemPerBlockOptin = 227 * 1024;
    prop->sharedMemPerMultiprocessor = 228 * 1024;
    prop->regsPerBlock = 65536;
    prop->warpSize = 32;
    prop->maxThreadsPerBlock = 1024;
    prop->maxThreadsDim[0] = prop->maxThreadsDim[1] = 1024;
    prop->maxThreadsDim[2] = 64;
    prop->maxGridSize[0] = 0x7fffffff;
    prop->maxGridSize[1] = prop->maxGridSize[2] = 65535;
    prop->major = settings().capability / 10;
    prop->minor = settings().capability % 10;
    prop->multiProcessorCount = 4;
    prop->maxThreadsPerMultiProcessor = 2048;
    prop->l2CacheSize = 4 << 20;
    prop->memoryBusWidth = 5120;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attr, int which) {
    Call call(Call::NEEDS_DRIVER);
    if (call.error) return call.end(call.error);
    if (!value) return call.end(cudaErrorInvalidValue);
    if (which < 0 || which >= settings().devices) return call.end(cudaErrorInvalidDevice);
    switch (attr) {
    case cudaDevAttrMaxThreadsPerBlock:
        *value = 1024;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
        *value = 48 * 1024;
        break;
    case cudaDevAttrWarpSize:
        *value = 32;
        break;
    case cudaDevAttrMaxRegistersPerBlock:
        *value = 65536;
        break;
    case cudaDevAttrMultiProcessorCount:
        *value = 4;
        break;
    case cudaDevAttrIntegrated:
        *value = 0;
        break;
    case cudaDevAttrL2CacheSize:
        *value = 4 << 20;
        break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
        *value = 2048;
        break;
    case cudaDevAttrUnifiedAddressing:
        *value = 1;
        break;
    case cudaDevAttrComputeCapabilityMajor:
        *value = settings().capability / 10;
        break;
    case cudaDevAttrComputeCapabilityMinor:
        *value = settings().capability % 10;
        break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        *value = 228 * 1024;
        break;
    case cudaDevAttrPageableMemoryAccess:
        *value = 0;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = 227 * 1024;
        break;
    case cudaDevAttrHostRegisterSupported:
        *value = 1;
        break;
    case cudaDevAttrHostRegisterReadOnlySupported:
        *value = 1;
        break;
    default:
        return call.end(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}

/* ---- the driver's interface ------------------------------------------------------------------------------------------ */

static int primary_context_state(int which, unsigned *flags, int *active) {
    if (flags) *flags = 0;
    *active = (int)(state().contexts >> which & 1);
    return 0;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned, unsigned long long,
                                             enum cudaDriverEntryPointQueryResult *found) {
    Call call(Call::NEEDS_DRIVER);
    if (call.error) return call.end(call.error);
    if (!symbol || !function) return call.end(cudaErrorInvalidValue);
    const bool known = !strcmp(symbol, "cuDevicePrimaryCtxGetState");
    *function = known ? reinterpret_cast<void *>(primary_context_state) : nullptr;
    if (found) *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

} // extern "C"
