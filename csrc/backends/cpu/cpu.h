/* cpu.h: what the files of the CPU backend share: the queue that ops record tasks on, and the kernels of the chosen ISA.
 *
 * A task is a function over units 0 .. n_units-1 that are independent of each other; tasks run in the order recorded, with
 * a barrier between them. A thread takes units of its own range, and when these are gone, of others'.
 */
#ifndef RAST_CPU_H
#define RAST_CPU_H

#include "../backend.h"
#include "kernels.h"

typedef struct {
    int32_t thread; /* 0 .. n_threads-1 */
    size_t soon;    /* after these units, this thread is likely to go on with those up to here */
    void *scratch;  /* of this thread, at least scratch_bytes of the task, 64-byte aligned, contents undefined */
} cpu_worker;

typedef void (*cpu_task_fn)(const void *args, size_t unit, const cpu_worker *worker);
typedef void (*cpu_piece_fn)(const void *args, size_t begin, size_t end, const cpu_worker *worker);

enum { CPU_PIECES = 4 }; /* in which a thread takes its range, unless they are better long */

/* Records a task; args are copied (16-byte aligned). A failure to allocate is remembered and returned by submit. */
void cpu_record(rast_queue *q, cpu_task_fn fn, size_t n_units, const void *args, size_t args_bytes,
                size_t scratch_bytes);
/* The same for n_units that work on n_values altogether: where these are few, one thread does all, since it would take longer to
 * hand some to others. */
void cpu_record_small(rast_queue *q, cpu_task_fn fn, size_t n_units, size_t n_values, const void *args,
                      size_t args_bytes, size_t scratch_bytes);
/* The same for a function that takes the units [begin, end) at once: of what is left of a range, its thread takes one in so many; of 1,
 * nearly all. */
void cpu_record_pieces(rast_queue *q, cpu_piece_fn fn, size_t n_units, uint32_t pieces, const void *args,
                       size_t args_bytes, size_t scratch_bytes);

/* Memory (64-byte aligned, contents undefined) that lives until the work recorded so far has run; NULL: out of memory, which
 * submit will return (then record nothing that needs it). Capacity is kept from step to step. */
void *cpu_temp(rast_queue *q, size_t bytes);

/* The address of a pointer, set when tasks run, to at least so many bytes (64-byte aligned, contents undefined) that all
 * threads see; what an op's tasks leave there lasts until the next op that uses it. */
void *const *cpu_shared(rast_queue *q, size_t bytes);

const cpu_kernels *cpu_queue_kernels(const rast_queue *q);
int32_t cpu_queue_threads(const rast_queue *q);

/* rast_ops.combine; in combine.c */
void cpu_combine(rast_queue *q, const rast_logits *l);

#endif
