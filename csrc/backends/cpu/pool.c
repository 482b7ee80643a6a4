/* pool.c: threads that run a list of tasks together.
 *
 * One word, the ticket, says which task runs and how many of its units nobody has taken. A thread takes units by
 * lowering it; whoever finishes a task's last unit does what follows for one thread and puts up the next task for all.
 * So a thread that the system has put aside holds up no more than the units it has in hand, and one that has none holds up
 * nothing: it touches the tasks only while it owns units of them, or has finished the last one and not yet put up what
 * follows. Waiting is a bounded spin, then a futex.
 */
#include "pool.h"

#include <fenv.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../../error.h"

enum { SPINS = 4000 };

struct cpu_pool {
    int32_t n_threads, n_started;
    pthread_t *threads;
    struct start {
        cpu_pool *pool;
        int32_t thread;
    } *starts;
    pid_t owner;
    /* of the run; read only by who owns units, or has finished the last one */
    const cpu_task *tasks;
    void *const *scratch;
    uint32_t first, n_tasks; /* number of the first task; tasks have numbers that go on from run to run */
    /* on one line, which is handed around */
    _Alignas(64) atomic_ullong ticket; /* number of the task << 32 | units not yet taken; 0 units: wait */
    atomic_uint share;                 /* of that task, or of the next: what is left is cut by this */
    atomic_uint done;                  /* units of the task that are finished */
    atomic_uint number;                /* the ticket's number again, to sleep on */
    atomic_uint sleepers;
    atomic_int quit;
};

static uint32_t number_of(unsigned long long ticket) { return (uint32_t)(ticket >> 32); }

static void pause_a_little(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void put_up(cpu_pool *pool, uint32_t number, const cpu_task *task) {
    const uint32_t n_units = task ? task->n_units : 0;
    atomic_store(&pool->share, (uint32_t)pool->n_threads * (task ? task->pieces : 1));
    atomic_store(&pool->number, number); /* first: nobody can put up another task before this ticket is there */
    atomic_store(&pool->ticket, (unsigned long long)number << 32 | n_units);
    if (atomic_load(&pool->sleepers)) syscall(SYS_futex, &pool->number, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

/* Returns when the task is no longer `number`. */
static void wait_for_next(cpu_pool *pool, uint32_t number) {
    for (int i = 0; i < SPINS; i++) {
        if (number_of(atomic_load_explicit(&pool->ticket, memory_order_acquire)) != number) return;
        pause_a_little();
    }
    atomic_fetch_add(&pool->sleepers, 1);
    while (atomic_load(&pool->number) == number)
        syscall(SYS_futex, &pool->number, FUTEX_WAIT_PRIVATE, number, NULL, NULL, 0);
    atomic_fetch_sub(&pool->sleepers, 1);
}

static void run_units(const cpu_task *task, uint32_t first, uint32_t n, const cpu_worker *worker) {
    if (task->piece) task->piece(task->args, first, first + n, worker);
    for (uint32_t u = first; task->fn && u < first + n; u++) task->fn(task->args, u, worker);
}

/* Goes on with task t, now that all before have run: alone, as far as it and those that follow are for one thread. */
static void go_on(cpu_pool *pool, uint32_t t, const cpu_worker *worker) {
    for (; t < pool->n_tasks && pool->tasks[t].for_one; t++)
        run_units(&pool->tasks[t], 0, pool->tasks[t].n_units, worker);
    put_up(pool, pool->first + t, t < pool->n_tasks ? &pool->tasks[t] : NULL);
}

/* Runs n units that this thread owns. */
static void run_own(cpu_pool *pool, int32_t thread, uint32_t number, uint32_t left, uint32_t n) {
    const uint32_t t = number - pool->first;
    const cpu_task task = pool->tasks[t]; /* not ours to read once our units count as done */
    const cpu_worker worker = {thread, pool->scratch[thread]};
    run_units(&task, task.n_units - left, n, &worker);
    if (atomic_fetch_add(&pool->done, n) + n < task.n_units) return;
    atomic_store(&pool->done, 0);
    go_on(pool, t + 1, &worker);
}

/* Works until the task is number `end`; a worker, which has no end, until the pool quits. */
static void work(cpu_pool *pool, int32_t thread, uint32_t end) {
    for (;;) {
        unsigned long long ticket = atomic_load(&pool->ticket);
        const uint32_t share = atomic_load(&pool->share); /* the ticket's, if it still stands when we take some */
        const uint32_t number = number_of(ticket), left = (uint32_t)ticket, n = left < share ? 1 : left / share;
        if (thread ? atomic_load(&pool->quit) : number == end) return;
        if (left == 0)
            wait_for_next(pool, number);
        else if (atomic_compare_exchange_weak(&pool->ticket, &ticket, ticket - n))
            run_own(pool, thread, number, left, n);
    }
}

static void *worker_main(void *arg) {
    const struct start *start = arg;
    fesetenv(FE_DFL_ENV);
    work(start->pool, start->thread, 0);
    return NULL;
}

int cpu_pool_new(int32_t n_threads, cpu_pool **out, rast_error *err) {
    *out = NULL;
    cpu_pool *pool = aligned_alloc(64, sizeof *pool);
    if (!pool) return rast_fail(err, RAST_ERR_MEMORY, "no memory for %d threads", n_threads);
    memset(pool, 0, sizeof *pool);
    pool->n_threads = n_threads;
    pool->owner = getpid();
    pool->share = 1;
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
        put_up(pool, number_of(atomic_load(&pool->ticket)) + 1, NULL);
        for (int32_t i = 1; i <= pool->n_started; i++) pthread_join(pool->threads[i], NULL);
    }
    free(pool->threads);
    free(pool->starts);
    free(pool);
}

int cpu_pool_run(cpu_pool *pool, const cpu_task *tasks, size_t n_tasks, void *const *scratch, rast_error *err) {
    fenv_t before;
    if (pool->owner != getpid())
        return rast_fail(err, RAST_ERR_DEVICE, "a model made before fork() has no threads in the child: load it there");
    if (n_tasks == 0) return RAST_OK;
    fegetenv(&before);
    fesetenv(FE_DFL_ENV); /* all threads round alike, whatever the caller has set */
    pool->tasks = tasks;
    pool->n_tasks = (uint32_t)n_tasks;
    pool->scratch = scratch;
    pool->first = number_of(atomic_load(&pool->ticket)) + 1;
    go_on(pool, 0, &(cpu_worker){0, scratch[0]});
    work(pool, 0, pool->first + pool->n_tasks);
    fesetenv(&before);
    return RAST_OK;
}
