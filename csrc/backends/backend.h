/* backend.h: what a device must be able to do: one table of operations on device buffers.
 *
 * Ops only RECORD work on a queue; submit() runs it (CPU: a task list; CUDA: a stream or a graph). A pass is a list of
 * segments of any length: a prefill chunk, one decode row and k+1 rows to verify are one case. Equal-shaped models go
 * through one pass: activations are [n_models, cap_rows, dim] and weights are arrays with one entry a model.
 * Descriptors lie at fixed device addresses and are padded to buckets, so that a recorded graph can be replayed.
 *
 * Lifetimes: an op copies the struct it is given (rast_pass, rast_mm, rast_kv, rast_logits); the host arrays these point
 * to (weights, bases, terms) and the sources of copies to the device must stay valid until submit has returned, and the
 * caller fills descriptor arrays (token, pos, count, draw, ...) before it records the first op that reads them.
 *
 * Graphs: a device that `replays` may keep what was recorded under a key, and do the same again when the key comes back.
 * So a key stands for every argument of every op, addresses included; what the device reads at those addresses may
 * change. Between begin and submit of a queue no memory is released.
 */
#ifndef RAST_BACKEND_H
#define RAST_BACKEND_H

#include "../rast.h"

enum { RAST_BLOCK_TOKENS = 32 }; /* tokens of a logical KV block */

typedef uint64_t rast_dev; /* device address; a host pointer on the CPU; 0 = none */
typedef uint64_t rast_event;
typedef struct rast_ctx rast_ctx;     /* an open device */
typedef struct rast_queue rast_queue; /* ops in order; several queues may overlap where the device can */

typedef enum {
    RAST_MEM_DATA = 0,  /* activations, descriptors: zeroed */
    RAST_MEM_LAZY = 1,  /* tables: reserved at once, backed as it is touched where the device can */
    RAST_MEM_CACHE = 2, /* KV storage: likewise */
} rast_mem_kind;

typedef enum { RAST_COPY_TO_DEVICE = 0, RAST_COPY_TO_HOST = 1, RAST_COPY_ON_DEVICE = 2 } rast_copy_kind;

typedef struct {
    rast_dev data;
    int32_t out, in; /* y[out] = W[out, in] x[in]; a vector has out = 1 */
    int32_t type;    /* rast_dtype as stored */
    size_t stride; /* bytes of a row: from one to the next, or where a type has tiles, those rows' share of a tile's */
} rast_weight;

typedef struct {                    /* y[m, r, :] = W_m x[m, r, :] + bias_m */
    rast_dev x;                     /* [n_models, cap_rows, in] of pass->act_type */
    rast_dev y;                     /* [n_models, cap_rows, out] float32 */
    const rast_weight *const *w;    /* [n_models] equal shapes and types */
    const rast_weight *const *bias; /* [n_models], or NULL: none */
} rast_mm;

typedef struct { /* one pass of one group of equal-shaped models; all integer arrays are int32 on the device */
    int32_t n_models, cap_rows, cap_segs, cap_out, cap_ctx; /* bucket = graph key */
    int32_t act_type;     /* rast_dtype of matmul inputs: F32, or what dtype rounds to */
    rast_dev count;       /* [3] live rows, segments, outputs */
    rast_dev token;       /* [rows] id, or -1-slot: the token last drawn in that slot */
    rast_dev drawn;       /* [slots] written by combine */
    rast_dev pos;         /* [rows] absolute position */
    rast_dev row_seg;     /* [rows] the row's segment */
    rast_dev seg_row;     /* [segs + 1] first row of each segment */
    rast_dev seg_ctx;     /* [segs] keys after this pass: the position of the segment's last row + 1 */
    rast_dev block_table; /* [segs, table_stride] logical block ids, the same for every model */
    int32_t table_stride;
    rast_dev
        prefix_blocks; /* [segs] leading blocks that a segment has in common with the one before it; or 0: unknown */
    rast_dev out_row;  /* [outs] row that needs logits, or -1: this group has no part in that output */
} rast_pass;

typedef struct {          /* KV storage of one layer of a group, by logical block */
    const rast_dev *base; /* [n_models] storage of block 0, this layer */
    size_t block_stride;  /* bytes from one block to the next */
    size_t v_offset;      /* bytes from a block's K to its V in this layer; each rast_kv_bytes() long */
    int32_t type;         /* rast_dtype */
    int32_t n_heads, n_kv_heads, head_dim;
} rast_kv; /* how K and V lie inside a block is the backend's own affair */

typedef struct {     /* where one distinct net's logits come from: hidden rows and a head, or saved rows, by output */
    rast_dev hidden; /* [cap_out, head->in] of type hidden_type */
    rast_dev saved;  /* [rows, n_vocab] float32, as `parts` of an earlier combine */
    rast_dev saved_row;      /* [n_out] int32 row of `saved`, -1: hidden and head; 0: row o for output o */
    const rast_weight *head; /* [vocab_size of the net, hidden] */
    int32_t hidden_type;
    int32_t n_rows;          /* ids below this have an embedding row */
    const int32_t *uncommon; /* host, sorted: ids that mean another token in term 0 */
    int32_t n_uncommon;
} rast_term;

enum {
    RAST_DRAW_SAMPLE = 1,  /* Gumbel-max draw; else argmax */
    RAST_DRAW_LOGPROB = 2, /* log-probability of the token */
    RAST_DRAW_STATS = 4,
    RAST_DRAW_LOGITS = 8, /* write logits / scores / parts rows */
    RAST_DRAW_SCORES = 16,
    RAST_DRAW_PARTS = 32,
};

typedef struct { /* one output row of the transfer step */
    float temperature, top_p, min_p, repetition_penalty;
    int32_t top_k;
    uint32_t flags;    /* RAST_DRAW_* */
    uint64_t stream;   /* random stream of the sample */
    uint32_t position; /* absolute position of the token to draw */
    int32_t target;    /* >= 0: no draw, this token is measured; -1: draw; -2: only rows and statistics */
    int32_t slot;      /* row of history and of drawn; -1: none */
    int32_t draft;     /* token that preceding drafts add to the slot's history since the last output, or -1 */
    int32_t limit;     /* > 0: ids from here on are not drawn, whatever the terms of this output have rows for */
    int32_t mask;      /* row of `allowed`, or -1: everything */
    int32_t logits_row, scores_row, parts_row; /* where the rows go that flags ask for */
} rast_draw;

typedef struct {
    int32_t token;
    float logprob; /* of the combined, unprocessed logits */
    rast_stats stats;
    int32_t bad; /* -1; the first term whose logits hold NaN or Inf; n_terms: only the sum does; -2: nothing to draw */
} rast_drawn;

typedef struct {                              /* the transfer step: heads + sum + processors + draw */
    int32_t n_terms, n_out, n_vocab, n_valid; /* n_valid <= n_vocab: ids from n_valid on are never drawn */
    const rast_term *terms;                   /* distinct nets; 0 = base */
    rast_dev coef;         /* [n_out, n_terms] float32; 0: the term is skipped for this output, whatever it holds */
    rast_dev draw;         /* [n_out] rast_draw */
    rast_dev history;      /* [slots, history_words] uint32: tokens seen (repetition penalty) */
    rast_dev allowed;      /* [masks, history_words] uint32: tokens that may be drawn; or 0 */
    int32_t history_words; /* ceil(n_vocab / 32) */
    rast_dev out;          /* [n_out] rast_drawn */
    rast_dev drawn;        /* [slots] int32, read by embed as -1-slot */
    rast_dev logits, scores, parts; /* [rows, n_vocab] x2, [rows, n_terms, n_vocab]; 0 where no output asks */
} rast_logits;

typedef enum { RAST_OF_ROWS = 0, RAST_OF_OUTS = 2 } rast_extent; /* index into pass->count; capacity goes with it */

typedef struct {        /* bytes; of an estimate */
    size_t total, free; /* the device's; total 0: it is the process's own memory */
    size_t kept;        /* of those free: left alone, for what the device takes unasked (code of kernels, graphs) */
    size_t weights, cache, work; /* allocated from this context, where it counts them */
} rast_memory;
static inline size_t rast_memory_left(const rast_memory *m) { return m->free > m->kept ? m->free - m->kept : 0; }

typedef struct rast_ops { /* recorded ops cannot fail; submit and wait return the first error */
    const char *name;
    int32_t replays;        /* 1: begin() keeps graphs, so keys and padded outputs are worth while */
    int32_t overlaps;       /* 1: queues run beside each other */
    int32_t asynchronous;   /* 1: submit returns before the work has run */
    int32_t copies_weights; /* 1: bind() copies, so that weights take device memory */
    int32_t cache_percent;  /* of the memory left that the KV cache takes if nobody says how much */
    int (*open)(const rast_device *, rast_ctx **, rast_error *);
    void (*close)(rast_ctx *);
    const char *(*isa)(const rast_ctx *);
    int32_t (*n_threads)(const rast_ctx *);
    int (*alloc)(rast_ctx *, size_t bytes, int kind, rast_dev *, rast_error *);
    void (*release)(rast_ctx *, rast_dev); /* 0 is allowed */
    int (*memory)(rast_ctx *, rast_memory *, rast_error *);
    /* Makes a tensor usable by ops; CPU: an alias of the tensor's own memory. Its shape counts the matrix's rows, without those
     * that fill up its last tile. act_type: of the activations that a matrix
     * will be multiplied with, which a device may turn the matrix into. unbind undoes it. */
    int (*bind)(rast_ctx *, const rast_tensor *, int32_t act_type, rast_weight *, rast_error *);
    void (*unbind)(rast_ctx *, rast_weight *);

    int (*queue_new)(rast_ctx *, rast_queue **, rast_error *);
    void (*queue_free)(rast_queue *);
    /* Starts recording; 1: a graph for the key exists, record nothing. Key 0: no graph. */
    int (*begin)(rast_queue *, uint64_t graph_key);
    int (*submit)(rast_queue *, rast_event *, rast_error *); /* RAST_ERR_MEMORY if recording ran out of memory */
    /* In place of submit: runs nothing, but makes ready all buffers that what was recorded needs, or the same ops with fewer
     * rows, segments, outputs or terms, or shorter contexts. NULL: the device has no such buffers. */
    int (*reserve)(rast_queue *, rast_error *);
    /* Copies to the host have arrived when it returns, and perhaps earlier. To be called once for every submission. */
    int (*wait)(rast_ctx *, rast_event, rast_error *);
    void (*depend)(rast_queue *, rast_event); /* the submission runs after the event; not a part of its graph */

    void (*copy)(rast_queue *, rast_dev dst, rast_dev src, size_t bytes, int kind);
    /* y [n_models, cap_rows, dim] float32 */
    void (*embed)(rast_queue *, const rast_pass *, const rast_weight *const *w, rast_dev y);
    /* x += add (if add); y = rms_norm over each `group` of x's `dim` values * w. x, add: [n_models, cap, dim] float32;
     * y: [n_models, cap, dim] of y_type, may be x itself if float32. w: [n_models] vectors of `group`. */
    void (*norm)(rast_queue *, const rast_pass *, int extent, rast_dev x, rast_dev add, const rast_weight *const *w,
                 int32_t dim, int32_t group, float eps, rast_dev y, int32_t y_type);
    void (*matmul)(rast_queue *, const rast_pass *, const rast_mm *jobs, int32_t n); /* independent: QKV; gate and up */
    /* Rotates q [n_models, cap_rows, n_heads * head_dim] and k [.., n_kv_heads * head_dim] (float32, q in place) by
     * table[pos] = head_dim/2 pairs (cos, sin) float32, and writes k and v of every row to the cache, as kv->type. */
    void (*rope_kv)(rast_queue *, const rast_pass *, rast_dev q, rast_dev k, rast_dev v, rast_dev table,
                    int32_t interleaved, const rast_kv *);
    /* y [n_models, cap_rows, n_heads * head_dim] of pass->act_type; row at position p sees keys p-window+1 .. p (window 0:
     * from 0), read from the cache. */
    void (*attention)(rast_queue *, const rast_pass *, rast_dev q, const rast_kv *, int32_t window, float scale,
                      rast_dev y);
    /* y = silu(gate) * up; gate, up: [n_models, cap_rows, dim] float32; y of pass->act_type */
    void (*glu)(rast_queue *, const rast_pass *, rast_dev gate, rast_dev up, int32_t dim, rast_dev y);
    /* y[m, o] = x[m, out_row[o]] + add[m, out_row[o]] float32, y [n_models, cap_out, dim]; out_row -1: zeros */
    void (*gather)(rast_queue *, const rast_pass *, rast_dev x, rast_dev add, int32_t dim, rast_dev y);
    void (*combine)(rast_queue *, const rast_logits *);
    /* pairs: [n, 2] int32 (from, to) logical blocks; copies bytes [0, block_stride) at base[m] + block * block_stride */
    void (*copy_blocks)(rast_queue *, const rast_dev *base, int32_t n_models, size_t block_stride, rast_dev pairs,
                        int32_t n);
} rast_ops;

/* Bytes of K (or of V) of one block of one layer. */
static inline size_t rast_kv_bytes(int32_t n_kv_heads, int32_t head_dim, int32_t type) {
    return (size_t)RAST_BLOCK_TOKENS * (size_t)n_kv_heads * (size_t)head_dim * (type == RAST_F32 ? 4u : 2u);
}

extern const rast_ops rast_cpu_ops;

/* A backend in a shared object of its own exports one of these as `rast_backend_plugin`. */
enum { RAST_PLUGIN_ABI = 4 }; /* changes with anything in this file or rast.h that a backend sees */
typedef struct {
    uint32_t abi;
    size_t ops_bytes; /* sizeof(rast_ops) */
    const rast_ops *ops;
} rast_plugin;

/* plugin.c: loads one. The handle is for rast_plugin_close, after the last use of ops. */
int rast_plugin_open(const char *path, void **handle, const rast_ops **ops, rast_error *err);
void rast_plugin_close(void *handle); /* NULL is allowed */

#endif
