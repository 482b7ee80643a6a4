/* pool.h: threads that run a list of tasks together. */
#ifndef RAST_POOL_H
#define RAST_POOL_H

#include "cpu.h"

typedef struct {
    cpu_task_fn fn;     /* this, */
    cpu_piece_fn piece; /* or this */
    const void *args;
    uint32_t n_units; /* at least 1 */
    uint32_t pieces;  /* at least 1: of what is left of a range, its thread takes one in so many; of 1, nearly all */
    int32_t for_one;  /* whoever finishes the task before does all of this one */
} cpu_task;

typedef struct cpu_pool cpu_pool;

/* n_threads counts the caller of cpu_pool_run: n_threads - 1 are started. */
int cpu_pool_new(int32_t n_threads, cpu_pool **out, rast_error *err);
void cpu_pool_free(cpu_pool *pool);

/* Runs the tasks in order, a barrier between them. scratch: [n_threads] memory of each thread. */
int cpu_pool_run(cpu_pool *pool, const cpu_task *tasks, size_t n_tasks, void *const *scratch, rast_error *err);

#endif
