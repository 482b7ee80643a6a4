/* pool.c: threads that run a list of tasks together.
 *
 * Whoever is free takes the next units of the current task from its counter, so a thread that the system has put aside
 * holds up no more than the units it has in hand. Waiting is a bounded spin, then a futex.
 */
#include "pool.h"

#include <fenv.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../../error.h"

enum { SPINS = 4000 };

typedef struct { /* a number that threads wait to change */
    atomic_uint value, sleepers;
} signal_word;

struct cpu_pool {
    int32_t n_threads, n_started;
    pthread_t *threads;
    struct start {
        cpu_pool *pool;
        int32_t thread;
    } *starts;
    pid_t owner;
    cpu_task *tasks;
    size_t n_tasks;
    void *const *scratch;
    atomic_int open, inside, quit;  /* tasks may be worked on; threads that do; the end */
    _Alignas(64) signal_word begun; /* counts runs */
    _Alignas(64) signal_word ended; /* counts tasks, over all runs */
};

static void pause_a_little(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void signal_change(signal_word *w) {
    atomic_fetch_add(&w->value, 1);
    if (atomic_load(&w->sleepers)) syscall(SYS_futex, &w->value, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

/* Returns when the value is no longer `seen`. */
static void wait_for_change(signal_word *w, unsigned seen) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&w->value, memory_order_acquire) != seen) return;
        pause_a_little();
    }
    atomic_fetch_add(&w->sleepers, 1);
    while (atomic_load(&w->value) == seen) syscall(SYS_futex, &w->value, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub(&w->sleepers, 1);
}

static void work(cpu_pool *pool, int32_t thread) {
    const cpu_worker worker = {thread, pool->scratch[thread]};
    for (size_t t = 0; t < pool->n_tasks; t++) {
        cpu_task *task = &pool->tasks[t];
        const size_t n = task->n_units;
        for (;;) {
            const size_t first = atomic_fetch_add(&task->next, task->grain);
            if (first >= n) break;
            const size_t end = first + task->grain < n ? first + task->grain : n;
            for (size_t u = first; u < end; u++) task->fn(task->args, u, &worker);
            if (atomic_fetch_add(&task->done, end - first) + (end - first) == n) signal_change(&pool->ended);
        }
        for (;;) {
            const unsigned seen = atomic_load(&pool->ended.value);
            if (atomic_load(&task->done) >= n) break;
            wait_for_change(&pool->ended, seen);
        }
    }
}

static void *worker_main(void *arg) {
    const struct start *start = arg;
    cpu_pool *pool = start->pool;
    unsigned seen = 0;
    fesetenv(FE_DFL_ENV);
    for (;;) {
        wait_for_change(&pool->begun, seen);
        seen = atomic_load(&pool->begun.value);
        if (atomic_load(&pool->quit)) return NULL;
        /* one who comes late finds the run closed and leaves its memory alone */
        atomic_fetch_add(&pool->inside, 1);
        if (atomic_load(&pool->open)) work(pool, start->thread);
        atomic_fetch_sub(&pool->inside, 1);
    }
}

int cpu_pool_new(int32_t n_threads, cpu_pool **out, rast_error *err) {
    *out = NULL;
    cpu_pool *pool = aligned_alloc(64, sizeof *pool);
    if (!pool) return rast_fail(err, RAST_ERR_MEMORY, "no memory for %d threads", n_threads);
    memset(pool, 0, sizeof *pool);
    pool->n_threads = n_threads;
    pool->owner = getpid();
    pool->threads = calloc((size_t)n_threads, sizeof *pool->threads);
    pool->starts = calloc((size_t)n_threads, sizeof *pool->starts);
    if (!pool->threads || !pool->starts) {
        cpu_pool_free(pool);
        return rast_fail(err, RAST_ERR_MEMORY, "no memory for %d threads", n_threads);
    }
    sigset_t all, before; /* signals are for the caller's threads */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = 0;
    for (int32_t i = 1; i < n_threads && !rc; i++) {
        pool->starts[i] = (struct start){pool, i};
        rc = pthread_create(&pool->threads[i], NULL, worker_main, &pool->starts[i]);
        if (!rc) pool->n_started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc) {
        cpu_pool_free(pool);
        return rast_fail(err, RAST_ERR_DEVICE, "cannot start %d threads: %s", n_threads - 1, strerror(rc));
    }
    *out = pool;
    return RAST_OK;
}

void cpu_pool_free(cpu_pool *pool) {
    if (!pool) return;
    if (pool->owner == getpid()) { /* after fork() the threads are not ours */
        atomic_store(&pool->quit, 1);
        signal_change(&pool->begun);
        for (int32_t i = 1; i <= pool->n_started; i++) pthread_join(pool->threads[i], NULL);
    }
    free(pool->threads);
    free(pool->starts);
    free(pool);
}

int cpu_pool_run(cpu_pool *pool, cpu_task *tasks, size_t n_tasks, void *const *scratch, rast_error *err) {
    if (pool->owner != getpid())
        return rast_fail(err, RAST_ERR_DEVICE, "a model made before fork() has no threads in the child: load it there");
    fenv_t before;
    int shared = 0;
    for (size_t t = 0; t < n_tasks; t++) shared |= tasks[t].n_units > 1;
    pool->tasks = tasks;
    pool->n_tasks = n_tasks;
    pool->scratch = scratch;
    if (shared && pool->n_started) {
        atomic_store(&pool->open, 1);
        signal_change(&pool->begun);
    }
    fegetenv(&before);
    fesetenv(FE_DFL_ENV); /* all threads round alike, whatever the caller has set */
    work(pool, 0);
    fesetenv(&before);
    atomic_store(&pool->open, 0);
    for (int i = 0; atomic_load(&pool->inside); i++) { /* the tasks are theirs until they have left */
        if (i < SPINS)
            pause_a_little();
        else
            sched_yield();
    }
    return RAST_OK;
}
