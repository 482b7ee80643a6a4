/* kernels.h: the inner loops that exist once for each instruction set, as one table a set.
 *
 * Every result is a fixed sequence of roundings that depends on neither tile, batch, chunk nor thread: vector lanes run
 * along the reduction with one horizontal sum (of fixed order) at the end, or one lane holds one whole result.
 */
#ifndef RAST_CPU_KERNELS_H
#define RAST_CPU_KERNELS_H

#include "../backend.h"

/* y[r * y_stride + o] = sum_k w[first + o][k] * x[r][k] for o < n_out, r < n_rows. Strides of w and x in bytes, of y in floats.
 * w: [at least first + n_out, k] of the table's weight type, x: [n_rows, k] of its activation type; no alignment beyond the
 * element's. */
typedef void (*cpu_dot_fn)(const void *w, size_t w_stride, size_t first, size_t n_out, const void *x, size_t x_stride,
                           size_t n_rows, size_t k, float *y, size_t y_stride);

/* A group of 32 activations as products with quantized weights take them: q = x / scale rounded to nearest even,
 * scale = max |x| / 127. NaN or Inf among them makes the scale NaN. */
typedef struct {
    float scale, sum_scaled; /* sum_scaled = scale * sum */
    int32_t sum;             /* of q */
    int8_t q[32];
} cpu_group;
enum { CPU_GROUP = 32 };

enum { CPU_LANES = 16 }; /* lane count of statistics, the same for every ISA */

/* Running statistics of a row of logits, by lane, so that sums have one order. See cpu_kernels.tile_stats. */
typedef struct {
    float max_t[CPU_LANES], sum_t[CPU_LANES]; /* combined: max, sum exp(l - max) */
    float dif_t[CPU_LANES];                   /* sum exp(l - max) * (l - b) */
    float max_b[CPU_LANES], sum_b[CPU_LANES]; /* base */
} cpu_stats;

enum {
    CPU_SEGMENT = 256,   /* keys of a partial attention, at most */
    CPU_ATTEND_ROWS = 6, /* rows of one, at most */
};

typedef struct { /* the keys [lo, hi) of a segment that a row sees, lo < hi <= CPU_SEGMENT */
    size_t lo, hi;
    const void *k[CPU_SEGMENT / RAST_BLOCK_TOKENS]; /* a head's K and V by block, from block lo / 32 on */
    const void *v[CPU_SEGMENT / RAST_BLOCK_TOKENS];
} cpu_keys;

/* Memory that is wanted next and fetched while something else is computed: runs of so many bytes. */
typedef struct {
    size_t n_runs, run_bytes;
    const void *run[2 * CPU_ATTEND_ROWS * CPU_SEGMENT / RAST_BLOCK_TOKENS];
} cpu_fetch;

static inline size_t cpu_partial_floats(size_t n_q, size_t head_dim) { return n_q * (head_dim + 2); }

typedef struct {
    const char *name;
    cpu_dot_fn dot[RAST_N_DTYPES][RAST_N_DTYPES]; /* [weight type][activation type] */
    /* [weight type - RAST_Q8_0]: k a multiple of the type's group, x: [n_rows, k / 32] cpu_group. Sums of products within
     * 32 elements are integers and exact; a result is one float accumulator over them in order. */
    cpu_dot_fn dot_groups[RAST_N_TYPES - RAST_N_DTYPES];
    void (*quantize)(const void *x, int32_t type, size_t n, cpu_group *y); /* n a multiple of 32 */

    /* out[i] = in[i] rounded to type (float32 in; rast_dtype, a float, out) and back */
    void (*store)(const float *in, void *out, size_t n, int32_t type);
    void (*load)(const void *in, float *out, size_t n, int32_t type);
    /* A row of n elements of a matrix of any type; n a multiple of its group. */
    void (*load_row)(const void *w, size_t w_stride, size_t row, float *out, size_t n, int32_t type);

    /* y[n] = (x + add)[n] rms-normalised times w, see rast_ops.norm; x is updated if add is not NULL; w of w_type */
    void (*norm)(float *x, const float *add, const void *w, int32_t w_type, size_t n, float eps, void *y,
                 int32_t y_type);
    void (*glu)(const float *gate, const float *up, size_t n, void *y, int32_t y_type);
    void (*rope)(float *x, const float *cos_sin, size_t head_dim, int32_t interleaved); /* one head, in place */

    /* Partial attention of n_rows rows, each with n_q query heads that share one K/V head. q: [n_rows, n_q, head_dim]
     * float32, already scaled. The first `shared` blocks are the same for all rows and read once for several of them. scores:
     * scratch, [n_rows, n_q, CPU_SEGMENT]. out: [n_rows, cpu_partial_floats()], a row's as m, l [n_q] (max score, sum of
     * exp) and acc [n_q, head_dim] (unnormalised). next: fetched meanwhile, as far as there is time. */
    void (*attend)(const float *q, size_t n_rows, size_t n_q, size_t head_dim, const cpu_keys *keys, size_t shared,
                   int32_t type, float *scores, float *out, const cpu_fetch *next);

    /* e[i] = exp(x[i]) for x <= 88 (beyond: e^88), relative error below 2e-7, exp(-inf) = 0; n a multiple of CPU_LANES */
    void (*exp)(const float *x, float *e, size_t n);
    /* Adds n (a multiple of CPU_LANES) ids to the statistics; base NULL: combined only. -inf entries weigh nothing. */
    void (*tile_stats)(const float *combined, const float *base, size_t n, cpu_stats *s);
    /* r[i] = 32 random bits of token id first + i (n a multiple of CPU_LANES, first of 4) for (stream, position):
     * Philox4x32-10, see rng.h */
    void (*random)(uint64_t stream, uint32_t position, uint32_t first, size_t n, uint32_t *r);
} cpu_kernels;

/* Those that this machine can run, best last; returns how many. */
size_t cpu_kernels_available(const cpu_kernels *out[8]);

#endif
