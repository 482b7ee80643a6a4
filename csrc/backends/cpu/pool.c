/* pool.c: threads that run a list of tasks together.
 *
 * A task's units are cut into as many ranges as there are threads, each with a ticket: which task it is, and how many units of
 * the range nobody has taken. A thread takes units by lowering a ticket, its own first: so it comes to the same rows and columns
 * task after task, and what it left in its cache is there. Then it helps others. Whoever finishes a task's last unit does what
 * follows for one thread and puts up the next task for all. So a thread that the system has put aside holds up no more than
 * the units it has in hand, and one that has none holds up nothing: it touches the tasks only while it owns units of them, or
 * has finished the last one and not yet put up what follows. Waiting is a bounded spin, then a futex.
 */
#include "pool.h"

#include <fenv.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../../error.h"

enum {
    SPINS = 4000,
    LAST_PART = 8, /* of its range that a thread leaves at first, where it takes nearly all: others may help then */
};

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
    /* what is handed around, on as few lines as can be */
    _Alignas(64) atomic_uint pieces; /* of the tickets' task, or of the next */
    atomic_uint done;                /* units of the task that are finished */
    atomic_uint number;              /* of the task, to sleep on */
    atomic_uint sleepers;
    atomic_int quit;
    atomic_ullong tickets[]; /* [n_threads] number of the task << 32 | units of the thread's range not yet taken */
};

static uint32_t number_of(unsigned long long ticket) { return (uint32_t)(ticket >> 32); }

static void pause_a_little(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Where the range of a thread begins. */
static uint32_t begin_of(const cpu_pool *pool, uint32_t n_units, int32_t thread) {
    return (uint32_t)((uint64_t)n_units * (uint32_t)thread / (uint32_t)pool->n_threads);
}

static void hand_out(cpu_pool *pool, uint32_t number, uint32_t n_units, int32_t thread) {
    const uint32_t n = begin_of(pool, n_units, thread + 1) - begin_of(pool, n_units, thread);
    atomic_store(&pool->tickets[thread], (unsigned long long)number << 32 | n);
}

/* The last ticket has units, if there are any: until it is there nobody can finish the task and put up another one. With none,
 * the caller of cpu_pool_run waits for the first ticket, which is then the last one. */
static void put_up(cpu_pool *pool, uint32_t number, const cpu_task *task) {
    const uint32_t n_units = task ? task->n_units : 0;
    if (task) atomic_store(&pool->pieces, task->pieces);
    atomic_store(&pool->number, number);
    for (int32_t i = 1; i < pool->n_threads; i++)
        hand_out(pool, number, n_units, n_units ? i - 1 : pool->n_threads - i);
    hand_out(pool, number, n_units, n_units ? pool->n_threads - 1 : 0);
    if (atomic_load(&pool->sleepers)) syscall(SYS_futex, &pool->number, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

/* Returns when the task is no longer `number`. */
static void wait_for_next(cpu_pool *pool, int32_t thread, uint32_t number) {
    for (int i = 0; i < SPINS; i++) {
        if (number_of(atomic_load_explicit(&pool->tickets[thread], memory_order_acquire)) != number) return;
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
        run_units(&pool->tasks[t], 0, pool->tasks[t].n_units,
                  &(cpu_worker){worker->thread, pool->tasks[t].n_units, worker->scratch});
    put_up(pool, pool->first + t, t < pool->n_tasks ? &pool->tasks[t] : NULL);
}

/* Runs n units that this thread has taken of a range with `left` units before. */
static void run_taken(cpu_pool *pool, int32_t thread, int32_t range, uint32_t number, uint32_t left, uint32_t n) {
    const uint32_t t = number - pool->first;
    const cpu_task task = pool->tasks[t]; /* not ours to read once our units count as done */
    const uint32_t end = begin_of(pool, task.n_units, range + 1), first = end - left;
    const cpu_worker worker = {thread, thread == range ? end : first + n, pool->scratch[thread]};
    run_units(&task, first, n, &worker);
    if (atomic_fetch_add(&pool->done, n) + n < task.n_units) return;
    atomic_store(&pool->done, 0);
    go_on(pool, t + 1, &worker);
}

/* Takes units of a range and runs them; 0 if there are none. */
static int take(cpu_pool *pool, int32_t thread, int32_t range) {
    unsigned long long ticket = atomic_load(&pool->tickets[range]);
    const uint32_t pieces = atomic_load(&pool->pieces); /* the ticket's, if it still stands when we take some */
    const uint32_t left = (uint32_t)ticket, cut = pieces > 1 ? pieces : 2;
    const uint32_t rest = pool->n_threads > 1 ? left / LAST_PART : 0;
    const uint32_t part = pieces == 1 && thread == range ? left - rest : left / cut, n = part ? part : 1;
    if (left == 0) return 0;
    if (atomic_compare_exchange_weak(&pool->tickets[range], &ticket, ticket - n))
        run_taken(pool, thread, range, number_of(ticket), left, n);
    return 1;
}

/* Works until the task is number `end`; a worker, which has no end, until the pool quits. It waits when all tickets are of one
 * task and have no units; while another thread is putting up tickets, which takes a moment unless it is put aside, it looks again. */
static void work(cpu_pool *pool, int32_t thread, uint32_t end) {
    for (uint32_t looks = 1;; looks++) {
        const uint32_t number = number_of(atomic_load(&pool->tickets[thread]));
        if (thread ? atomic_load(&pool->quit) : number == end) return;
        int found = 0, same = atomic_load(&pool->number) == number;
        for (int32_t i = 0; i < pool->n_threads && !found; i++) {
            const int32_t range = (thread + i) % pool->n_threads;
            same &= number_of(atomic_load(&pool->tickets[range])) == number;
            found = take(pool, thread, range);
        }
        if (found) continue;
        if (same)
            wait_for_next(pool, thread, number);
        else if (looks % SPINS)
            pause_a_little();
        else
            sched_yield();
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
    const size_t bytes = (sizeof(cpu_pool) + (size_t)n_threads * sizeof(atomic_ullong) + 63) / 64 * 64;
    cpu_pool *pool = aligned_alloc(64, bytes);
    if (!pool) return rast_fail(err, RAST_ERR_MEMORY, "no memory for %d threads", n_threads);
    memset(pool, 0, bytes);
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
        put_up(pool, atomic_load(&pool->number) + 1, NULL);
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
    pool->first = atomic_load(&pool->number) + 1;
    go_on(pool, 0, &(cpu_worker){.scratch = scratch[0]});
    work(pool, 0, pool->first + pool->n_tasks);
    fesetenv(&before);
    return RAST_OK;
}
