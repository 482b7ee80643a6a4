/* rast.h: the public C API.
 *
 * Decoding with logits = sum_m c_m * logits_m over distinct models (RAST, arXiv 2506.15710: base + lambda * (expert -
 * antiexpert)). Usable without Python. Handles are opaque, there is no global state, nothing is printed. Every function
 * that can fail returns RAST_OK (0) or a rast_status and fills in `rast_error` (which may be NULL).
 *
 * Order of use: describe the nets (config + tensors in memory) -> rast_model_new -> rast_engine_new -> rast_engine_add
 * requests -> rast_engine_step (or _run) until it is idle. A model and its engines belong to one thread at a time;
 * rast_engine_interrupt may be called from anywhere, signal handlers included.
 */
#ifndef RAST_H
#define RAST_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define RAST_API __attribute__((visibility("default")))
#else
#define RAST_API
#endif

/* ---- errors ------------------------------------------------------------------------------------------------------ */

typedef enum {
    RAST_OK = 0,
    RAST_ERR_VALUE = 1,       /* an argument is out of range or does not fit the others */
    RAST_ERR_MEMORY = 2,      /* an allocation failed, or a budget is too small */
    RAST_ERR_UNSUPPORTED = 3, /* device, ISA, architecture or dtype that this build or machine lacks */
    RAST_ERR_NUMERIC = 4,     /* NaN or Inf in a model's logits; the message names the model */
    RAST_ERR_INTERRUPTED = 5, /* rast_engine_interrupt was called */
    RAST_ERR_DEVICE = 6,      /* the operating system or a device failed */
} rast_status;

typedef struct {
    int32_t code;      /* a rast_status */
    char message[500]; /* NUL-terminated UTF-8 */
} rast_error;

/* ---- models ------------------------------------------------------------------------------------------------------ */

typedef enum {
    RAST_F32 = 0,
    RAST_BF16 = 1,
    RAST_F16 = 2,
    /* Matrices only. A row is blocks of a group of elements, little-endian and without padding; d and m are f16. GGUF's types
     * of that name. */
    RAST_Q8_0 = 3, /* group 32: d, 32 int8 q; d * q */
    RAST_Q4_0 = 4, /* group 32: d, 16 bytes; d * (q - 8) */
    RAST_Q4_1 =
        5, /* group 32: d, m, 16 bytes; d * q + m; byte i holds q[i] in its low half and q[i + 16] in its high */
    /* Matrices only; what rast_quantize makes. Rows lie in tiles of RAST_TILE_ROWS, the last one padded with zeros: a tile is blocks
     * of a group of each row, and a block all rows' d, all rows' m, then their q in words of 4 bytes: word 0 of all rows, word 1 of
     * all rows, ... */
    RAST_INT8 = 6,    /* group 32: as Q8_0 */
    RAST_INT4 = 7,    /* group 32: as Q4_1 */
    RAST_INT4_64 = 8, /* group 64: d, m, 32 bytes; as Q4_1, bytes 0 to 15 for q[0 .. 31], the others for q[32 .. 63] */
} rast_dtype;
#define RAST_N_DTYPES 3 /* of activations, vectors and rounding: the floats */
#define RAST_N_TYPES 9
#define RAST_TILE_ROWS 16

typedef struct {
    const char *name; /* HuggingFace name, e.g. "model.layers.0.self_attn.q_proj.weight" */
    const void *data; /* row-major; aligned to its element; on the CPU it must stay valid and unchanged while the model
                         lives; other devices have their own copy when rast_model_new returns */
    int32_t dtype;    /* rast_dtype as stored; from RAST_Q8_0 on: blocks, shape[1] a multiple of the group */
    int32_t n_dims;   /* 1 or 2 */
    size_t shape[2];  /* [out, in] for a matrix, where `out` counts all rows of tiles; [n] for a vector */
} rast_tensor;

typedef struct {
    int32_t n_layers, n_heads, n_kv_heads, head_dim, hidden_size, intermediate_size;
    int32_t vocab_size;  /* rows of the embedding */
    int32_t max_context; /* positions the model was made for */
    float rms_norm_eps;
    float rope_theta;         /* used when rope_freq is NULL */
    const float *rope_freq;   /* [head_dim / 2] inverse frequencies, scaling already applied; or NULL */
    float rope_attention;     /* factor on cos and sin (HF's attention_scaling); 0 means 1 */
    int32_t rope_interleaved; /* 1: pairs are (2i, 2i+1), as in llama-type GGUF files; 0: (i, i + head_dim/2) */
    const int32_t *window;    /* [n_layers] sliding window in keys, 0 = all; or NULL: all layers see all keys */
    int32_t qkv_bias, o_bias, mlp_bias; /* 1: the bias vectors exist */
    int32_t qk_norm;                    /* 1: RMSNorm over each head of q and k (Qwen3) */
    int32_t tie_word_embeddings;        /* 1: lm_head is the embedding */
} rast_config;

typedef struct {
    const char *name;           /* how messages call it, e.g. "expert (Qwen/Qwen2.5-0.5B)"; copied */
    rast_config config;         /* copied, arrays included */
    const rast_tensor *tensors; /* the array is copied as needed, the data is used in place, or copied to the device */
    size_t n_tensors;
    int32_t dtype;           /* rounding: RAST_BF16/F16 round the inputs of weight products and K/V; F32 nothing */
    const int32_t *uncommon; /* [n_uncommon] ids that this net has a row for but that mean another token in net 0 */
    size_t n_uncommon;
} rast_net;

enum { RAST_CPU = 0, RAST_CUDA = 1 };

typedef struct {
    int32_t kind;       /* RAST_CPU or RAST_CUDA */
    int32_t index;      /* CUDA: device number */
    int32_t n_threads;  /* CPU: 0 = one for each core this process may use */
    const char *isa;    /* CPU: "portable", "avx2", "avx512", "avx512bf16"; NULL = $RAST_CPU_ISA, else the best here */
    const char *plugin; /* CUDA: path of the shared object that holds the backend */
} rast_device;

/* Whether models can be made on the device: opens and closes it. The error says what is missing. */
RAST_API int rast_device_check(const rast_device *device, rast_error *err);

typedef struct {
    int32_t n_valid;             /* ids >= this are never drawn (size of the tokenizer); 0 = no limit */
    const uint8_t *piece_bytes;  /* bytes of all tokens, end to end; NULL: stop strings are refused */
    const uint32_t *piece_start; /* [n_pieces + 1] offsets into piece_bytes */
    size_t n_pieces;
} rast_vocab;

typedef struct {
    size_t weight_bytes;       /* as stored, tied tensors once */
    size_t n_parameters;       /* likewise */
    size_t device_bytes;       /* of the copy on the device; 0 on the CPU, which uses the weights in place */
    size_t kv_bytes_per_token; /* all layers, K and V */
    int32_t dtype, vocab_size, max_context;
} rast_net_info;

typedef struct rast_model rast_model; /* the distinct nets of one transfer, on one device; net 0 is the base */

RAST_API int rast_model_new(const rast_device *device, const rast_net *nets, size_t n_nets, const rast_vocab *vocab,
                            rast_model **out, rast_error *err);
RAST_API void rast_model_free(rast_model *model); /* NULL is allowed; free its engines first */
RAST_API size_t rast_model_n_nets(const rast_model *model);
RAST_API int32_t rast_model_n_vocab(const rast_model *model); /* width of logits: rows of the base's embedding */
RAST_API const char *rast_model_isa(const rast_model *model); /* e.g. "avx512bf16"; on CUDA the device; the model's */
RAST_API int32_t rast_model_n_threads(const rast_model *model);
RAST_API void rast_model_net_info(const rast_model *model, size_t net, rast_net_info *out);

/* Elements of a group of the type, 1 for floats; 0 if there is no such type. */
RAST_API size_t rast_type_group(int32_t type);
/* Bytes of a row of n elements; 0: n is not a multiple of the group, or too large. */
RAST_API size_t rast_row_bytes(int32_t type, size_t n);
/* How many rows are stored for n: those of whole tiles, where a type has tiles. */
RAST_API size_t rast_stored_rows(int32_t type, size_t n);
/* Quantizes n_rows rows of n elements of a float type to out, rast_stored_rows(type, n_rows) of rast_row_bytes(type, n): to
 * nearest, for type RAST_INT8 (q within -127 .. 127), RAST_INT4 or RAST_INT4_64. A group with NaN or Inf becomes NaN. All parts of
 * a matrix but the last must be whole tiles. */
RAST_API int rast_quantize(const void *rows, int32_t dtype, size_t n_rows, size_t n, int32_t type, void *out,
                           rast_error *err);

/* The elements of n_rows rows of n elements of any type, from the first row of a tile on, as float32. */
RAST_API int rast_dequantize(const void *rows, int32_t type, size_t n_rows, size_t n, float *out, rast_error *err);

/* Writes the names of the ISAs that this machine can run, best last, into out[]; returns how many. */
RAST_API size_t rast_cpu_isas(const char *out[8]);
/* Reads every byte once, at the memory's speed for one thread; returns the exclusive or of all little-endian 64-bit words
 * (the last one filled up with zeros). For measuring. */
RAST_API uint64_t rast_memory_read(const void *data, size_t bytes);

/* ---- the engine -------------------------------------------------------------------------------------------------- */

typedef struct {
    size_t kv_bytes;  /* KV cache of all nets together, no more than is free now; 0 = half of that */
    int32_t max_rows; /* rows (tokens) of one net in one step; 0 = 512 */
    int32_t max_seqs; /* samples that run at once; 0 = 64 */
} rast_budget;

typedef struct {
    int32_t do_sample;        /* 0: argmax of the processed logits, ties to the lowest id */
    float temperature;        /* > 0 */
    int32_t top_k;            /* 0 = off; ties at the k-th value are kept */
    float top_p;              /* (0, 1]; 1 = off */
    float min_p;              /* [0, 1]; 0 = off */
    float repetition_penalty; /* > 0; 1 = off; prompt and new tokens count */
    int32_t min_new_tokens;   /* eos ids are forbidden before */
    const int32_t *suppress;  /* [n_suppress] ids never drawn */
    size_t n_suppress;
    const int32_t *bad_words;   /* forbidden sequences end to end */
    const size_t *bad_word_len; /* [n_bad_words] */
    size_t n_bad_words;
} rast_sampling;

typedef struct {
    const int32_t *eos; /* [n_eos] */
    size_t n_eos;
    const uint8_t *strings;   /* stop strings end to end, bytes */
    const size_t *string_len; /* [n_strings] */
    size_t n_strings;
    int32_t max_new; /* new tokens; 0 with RAST_WANT_PROMPT only evaluates the prompt */
    double max_time; /* seconds from rast_engine_add; 0 = none */
} rast_stop;

enum {
    RAST_WANT_LOGPROBS = 1,    /* chunk.logprob */
    RAST_WANT_STATS = 2,       /* chunk.stats */
    RAST_WANT_LOGITS = 4,      /* chunk.logits: combined, unprocessed */
    RAST_WANT_SCORES = 8,      /* chunk.scores: processed, -inf where a processor or filter forbids */
    RAST_WANT_COMPONENTS = 16, /* chunk.parts: each net's own logits */
    RAST_WANT_PROMPT = 32,     /* also for the prompt's positions from prompt_from on (see rast_chunk) */
};

enum { RAST_DRAFT_AUTO = -1, RAST_DRAFT_MAX = 64 }; /* of rast_request.n_draft */

typedef struct {
    const int32_t *ids; /* [n_ids] prompt, at least one */
    size_t n_ids;
    uint64_t tag; /* yours; comes back in chunks */
    uint64_t seed;
    uint32_t first_copy, n_samples; /* sample j draws from the stream (seed, hash of ids, first_copy + j) */
    const float *coef;              /* [n_coef = n_nets] c_m; a net with 0 is not run and contributes nothing */
    size_t n_coef;
    uint32_t transfer_start; /* new tokens drawn from net 0 alone (coefficient 1) before the others join */
    rast_sampling sampling;
    rast_stop stop;
    int32_t n_draft;   /* drafts checked per step; 0 none; RAST_DRAFT_AUTO: as many as give the most tokens a second */
    int32_t draft_net; /* net whose draws are the drafts, with a coefficient other than 0; 0: only n-grams of the ids */
    uint32_t want;     /* RAST_WANT_* */
    uint32_t prompt_from; /* first prompt position reported with RAST_WANT_PROMPT */
} rast_request;           /* everything is copied */

typedef struct {
    int32_t base_token; /* net 0's first choice, over the ids that can be drawn */
    float base_logprob; /* net 0's log-probability of the chunk's token (NaN where there is none) */
    float kl;           /* KL(softmax(combined) || softmax(net 0)), nats, both unprocessed */
} rast_stats;

typedef enum {
    RAST_RUNNING = 0,
    RAST_FINISH_EOS = 1,
    RAST_FINISH_LENGTH = 2,
    RAST_FINISH_STOP = 3, /* a stop string */
    RAST_FINISH_TIME = 4,
    RAST_FINISH_CANCELLED = 5,
    RAST_FINISH_ERROR = 6,
} rast_finish;

/* n new tokens of one sample; or (prompt = 1, with RAST_WANT_PROMPT) n prompt positions: token[i] is then the prompt's
 * own next token, -1 after the last, and logprob/stats are about it. Valid until the next step. */
typedef struct {
    uint64_t id, tag;
    uint32_t sample, n;
    int32_t prompt;
    uint32_t position;       /* index of the first of them: among new tokens, or of the prompt position */
    uint32_t n_drafted;      /* drafts checked for these tokens; n - 1 of them stood, unless the sample ended before */
    const int32_t *token;    /* [n] */
    const float *logprob;    /* [n] log-softmax of the combined, unprocessed logits at token; or NULL */
    const rast_stats *stats; /* [n] or NULL */
    const float *logits;     /* [n, n_vocab] or NULL */
    const float *scores;     /* [n, n_vocab] or NULL */
    const float *parts; /* [n, n_nets, n_vocab] or NULL; NaN for a net that was not run, -inf where it has no row */
    int32_t finish;     /* a rast_finish; anything but RAST_RUNNING: the sample's last chunk (n may be 0) */
    const rast_error *error; /* with RAST_FINISH_ERROR */
} rast_chunk;

typedef struct rast_engine rast_engine;

RAST_API int rast_engine_new(rast_model *model, const rast_budget *budget, rast_engine **out, rast_error *err);
RAST_API void rast_engine_free(rast_engine *engine); /* NULL is allowed */

/* Checks and queues a request; a bad one fails here, alone. */
RAST_API int rast_engine_add(rast_engine *engine, const rast_request *request, uint64_t *id, rast_error *err);
/* Ends all samples of a request; their last chunks (RAST_FINISH_CANCELLED) come with the next step. */
RAST_API int rast_engine_cancel(rast_engine *engine, uint64_t id);
RAST_API void rast_engine_cancel_all(rast_engine *engine);
/* Ends all samples of a request at once: no chunks come, and its blocks are free. An id that is not there is allowed. */
RAST_API void rast_engine_discard(rast_engine *engine, uint64_t id);

/* One step of every running sample. n = 0 and RAST_OK: nothing is left to do... unless rast_engine_busy says otherwise
 * (a prefill chunk yields no token). RAST_ERR_INTERRUPTED: stopped before the step; requests stay queued. */
RAST_API int rast_engine_step(rast_engine *engine, const rast_chunk **chunks, size_t *n, rast_error *err);
RAST_API int rast_engine_busy(const rast_engine *engine);
/* Steps until idle; `on` sees every batch of chunks, a non-zero return stops the run (RAST_ERR_INTERRUPTED). */
RAST_API int rast_engine_run(rast_engine *engine, int (*on)(void *user, const rast_chunk *chunks, size_t n), void *user,
                             rast_error *err);
RAST_API void rast_engine_interrupt(rast_engine *engine); /* async-signal-safe; the flag clears when it is reported */

typedef struct {
    int32_t max_rows, max_seqs;    /* of the budget, defaults filled in */
    size_t n_blocks, block_tokens; /* logical KV blocks */
    size_t n_free;                 /* of them, those that no sample holds */
    size_t n_cached;               /* of the free ones, those that keep a prefix until their room is wanted */
    size_t kv_bytes;               /* storage of all blocks, all nets */
    uint64_t steps, rows;          /* rows: tokens computed, each net counted */
    uint64_t drafted, accepted;
    uint64_t rejected;    /* drafts that did not stand, the first of each run; what lay behind was not looked at */
    uint64_t draft_steps; /* passes of nets that drew drafts, beside `steps` */
    double step_seconds, draft_seconds; /* what they took on the device */
    uint64_t reused;                    /* tokens that a sample did not compute with net 0, since a block had them */
    uint64_t preempted;                 /* times that a sample gave its blocks up */
    uint64_t evicted;                   /* blocks of kept prefixes that were used for something else */
    /* Of a device with memory of its own (else 0), in bytes: all, free now; the model's weights, and buffers of steps, which
     * this engine shares with others of the model; what was left free beside the KV cache, for the device's own needs and
     * for what requests may ask for. */
    size_t device_bytes, device_free, device_weights, device_work, device_kept;
} rast_engine_info;
RAST_API void rast_engine_get_info(const rast_engine *engine, rast_engine_info *out);

/* Drafts from outside, in place of the engine's own: called for each decoding sample whose request has n_draft > 0. ids: prompt and new tokens so far [n]. Writes up
 * to k guesses of what follows, returns how many. Output never depends on the guesses. */
typedef size_t (*rast_drafter)(void *user, uint64_t tag, uint32_t sample, const int32_t *ids, size_t n, int32_t *out,
                               size_t k);
RAST_API void rast_engine_set_drafter(rast_engine *engine, rast_drafter drafter, void *user);

#ifdef __cplusplus
}
#endif
#endif
