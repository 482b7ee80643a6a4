/* ops.h: the CPU's ops; what they do is said in backend.h. */
#ifndef RAST_CPU_OPS_H
#define RAST_CPU_OPS_H

#include "cpu.h"

static inline size_t cpu_type_bytes(int32_t type) { return type == RAST_F32 ? 4 : 2; }
static inline void *cpu_ptr(rast_dev d) { return (void *)(uintptr_t)d; }
static inline const int32_t *cpu_ints(rast_dev d) { return (const int32_t *)(uintptr_t)d; }

void cpu_copy(rast_queue *q, rast_dev dst, rast_dev src, size_t bytes, int kind);
void cpu_embed(rast_queue *q, const rast_pass *pass, const rast_weight *const *w, rast_dev y);
void cpu_norm(rast_queue *q, const rast_pass *pass, int extent, rast_dev x, rast_dev add, const rast_weight *const *w,
              int32_t dim, int32_t group, float eps, rast_dev y, int32_t y_type);
void cpu_matmul(rast_queue *q, const rast_pass *pass, const rast_mm *jobs, int32_t n);
void cpu_rope_kv(rast_queue *q, const rast_pass *pass, rast_dev query, rast_dev k, rast_dev v, rast_dev table,
                 int32_t interleaved, const rast_kv *kv);
void cpu_attention(rast_queue *q, const rast_pass *pass, rast_dev query, const rast_kv *kv, int32_t window, float scale,
                   rast_dev y);
void cpu_glu(rast_queue *q, const rast_pass *pass, rast_dev gate, rast_dev up, int32_t dim, rast_dev y);
void cpu_gather(rast_queue *q, const rast_pass *pass, rast_dev x, rast_dev add, int32_t dim, rast_dev y);
void cpu_copy_blocks(rast_queue *q, const rast_dev *base, int32_t n_models, size_t block_stride, rast_dev pairs,
                     int32_t n);

#endif
