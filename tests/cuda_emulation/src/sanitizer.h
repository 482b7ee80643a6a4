/* sanitizer.h: the sanitizers' interfaces, empty where the flavour has none. The runtime itself is not instrumented: it tells
 * ThreadSanitizer what it reads, writes and orders. EMULATION_ADDRESS, EMULATION_THREAD, EMULATION_COUNT: the flavour. */
#ifndef CUDA_EMULATION_SANITIZER_H
#define CUDA_EMULATION_SANITIZER_H

#include <stddef.h>

#ifdef EMULATION_THREAD
extern "C" {
void *__tsan_get_current_fiber(void);
void *__tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void *);
void __tsan_switch_to_fiber(void *, unsigned flags); /* 1: orders nothing */
void __tsan_acquire(void *);
void __tsan_release(void *);
void __tsan_func_entry(void *);
void __tsan_func_exit(void);
void __tsan_read_range(void *, size_t);
void __tsan_write_range(void *, size_t);
void __tsan_java_init(size_t, size_t);
void __tsan_java_alloc(size_t, size_t);
void __tsan_java_free(size_t, size_t);
}
#else
static inline void *__tsan_get_current_fiber(void) { return nullptr; }
static inline void *__tsan_create_fiber(unsigned) { return nullptr; }
static inline void __tsan_destroy_fiber(void *) {}
static inline void __tsan_switch_to_fiber(void *, unsigned) {}
static inline void __tsan_acquire(void *) {}
static inline void __tsan_release(void *) {}
static inline void emulation_no_op(void) {}
#define __tsan_func_entry(p) ((void)(p))
#define __tsan_func_exit() emulation_no_op()
#define __tsan_read_range(p, n) ((void)(p), (void)(n))
#define __tsan_write_range(p, n) ((void)(p), (void)(n))
#endif

#ifdef EMULATION_ADDRESS
extern "C" {
void __sanitizer_start_switch_fiber(void **fake, const void *bottom, size_t size);
void __sanitizer_finish_switch_fiber(void *fake, const void **bottom, size_t *size);
void __asan_poison_memory_region(void const volatile *, size_t);
void __asan_unpoison_memory_region(void const volatile *, size_t);
}
#else
static inline void __sanitizer_start_switch_fiber(void **, const void *, size_t) {}
static inline void __sanitizer_finish_switch_fiber(void *, const void **, size_t *) {}
static inline void __asan_poison_memory_region(void const volatile *, size_t) {}
static inline void __asan_unpoison_memory_region(void const volatile *, size_t) {}
#endif

namespace cuda_emulation {

/* Memory at [p, p + bytes) is new: what ThreadSanitizer knows of accesses to it is forgotten. */
inline void forget_accesses(void *p, size_t bytes) {
#ifdef EMULATION_THREAD
    static bool ready;
    if (!ready) __tsan_java_init(8, 8); /* an empty heap: reports search it, new objects may lie anywhere */
    ready = true;
    size_t from = (size_t)p & ~(size_t)7, to = ((size_t)p + bytes + 7) & ~(size_t)7;
    __tsan_java_alloc(from, to - from);
    __tsan_java_free(from, to - from);
#else
    (void)p;
    (void)bytes;
#endif
}

} // namespace cuda_emulation
#endif
