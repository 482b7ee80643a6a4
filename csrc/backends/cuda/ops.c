/* ops.c: the ops: how each is recorded, what it needs, and how it is enqueued: products by cuBLAS, the rest by kernels. */
#include "cuda.h"

#include <string.h>

/* float32 logits of all terms that one call of the transfer step reads: more outputs go in pieces */
static const size_t LOGITS_BYTES = (size_t)128 << 20;

/* Products of equal shapes are one call of cuBLAS where each of them takes little longer than a launch, by its weights or
 * its operations: about 20 µs of 2 µs. For larger ones, cuBLAS has better kernels one by one than from lists of pointers. */
static const size_t SMALL_BYTES = (size_t)64 << 20, SMALL_OPERATIONS = (size_t)1 << 34;

/* ---- recording ----------------------------------------------------------------------------------------------------- */

void cuda_copy(rast_queue *q, rast_dev dst, rast_dev src, size_t bytes, int kind) {
    cuda_op *op = bytes ? cuda_record(q, CUDA_COPY, NULL) : NULL;
    if (!op) return;
    op->u.copy.dst = dst;
    op->u.copy.src = src;
    op->u.copy.bytes = bytes;
    op->u.copy.kind = kind;
}

void cuda_embed(rast_queue *q, const rast_pass *pass, const rast_weight *const *w, rast_dev y) {
    cuda_op *op = cuda_record(q, CUDA_EMBED, pass);
    if (!op) return;
    op->w = w;
    op->u.rows.y = y;
}

void cuda_norm(rast_queue *q, const rast_pass *pass, int extent, rast_dev x, rast_dev add, const rast_weight *const *w,
               int32_t dim, int32_t group, float eps, rast_dev y, int32_t y_type) {
    cuda_op *op = cuda_record(q, CUDA_NORM, pass);
    if (!op) return;
    op->w = w;
    op->u.rows.x = x;
    op->u.rows.add = add;
    op->u.rows.y = y;
    op->u.rows.extent = extent;
    op->u.rows.dim = dim;
    op->u.rows.group = group;
    op->u.rows.y_type = y_type;
    op->u.rows.eps = eps;
}

/* Jobs of equal shapes become one op: keys and values, gate and up. */
void cuda_matmul(rast_queue *q, const rast_pass *pass, const rast_mm *jobs, int32_t n) {
    cuda_op *op = NULL;
    for (int32_t j = 0; j < n; j++) {
        const rast_weight *w = jobs[j].w[0], *before = op ? op->u.matmul.jobs[0].w[0] : NULL;
        if (!op || op->u.matmul.n_jobs == CUDA_MAX_JOBS || w->out != before->out || w->in != before->in)
            op = cuda_record(q, CUDA_MATMUL, pass);
        if (!op) return;
        op->u.matmul.jobs[op->u.matmul.n_jobs++] = jobs[j];
    }
}

void cuda_rope_kv(rast_queue *q, const rast_pass *pass, rast_dev query, rast_dev k, rast_dev v, rast_dev table,
                  int32_t interleaved, const rast_kv *kv) {
    cuda_op *op = cuda_record(q, CUDA_ROPE_KV, pass);
    if (!op) return;
    op->u.attention.kv = *kv;
    op->u.attention.q = query;
    op->u.attention.k = k;
    op->u.attention.v = v;
    op->u.attention.table = table;
    op->u.attention.interleaved = interleaved;
}

void cuda_attention(rast_queue *q, const rast_pass *pass, rast_dev query, const rast_kv *kv, int32_t window,
                    float scale, rast_dev y) {
    cuda_op *op = cuda_record(q, CUDA_ATTENTION, pass);
    if (!op) return;
    op->u.attention.kv = *kv;
    op->u.attention.q = query;
    op->u.attention.window = window;
    op->u.attention.scale = scale;
    op->u.attention.y = y;
}

void cuda_glu(rast_queue *q, const rast_pass *pass, rast_dev gate, rast_dev up, int32_t dim, rast_dev y) {
    cuda_op *op = cuda_record(q, CUDA_GLU, pass);
    if (!op) return;
    op->u.rows.x = gate;
    op->u.rows.add = up;
    op->u.rows.dim = dim;
    op->u.rows.y = y;
}

void cuda_gather(rast_queue *q, const rast_pass *pass, rast_dev x, rast_dev add, int32_t dim, rast_dev y) {
    cuda_op *op = cuda_record(q, CUDA_GATHER, pass);
    if (!op) return;
    op->u.rows.x = x;
    op->u.rows.add = add;
    op->u.rows.dim = dim;
    op->u.rows.y = y;
}

void cuda_combine(rast_queue *q, const rast_logits *l) {
    cuda_op *op = l->n_out > 0 ? cuda_record(q, CUDA_COMBINE, NULL) : NULL;
    if (op) op->u.combine = *l;
}

void cuda_copy_blocks(rast_queue *q, const rast_dev *base, int32_t n_models, size_t block_stride, rast_dev pairs,
                      int32_t n) {
    cuda_op *op = n > 0 ? cuda_record(q, CUDA_COPY_BLOCKS, NULL) : NULL;
    if (!op) return;
    op->u.blocks.base = base;
    op->u.blocks.block_stride = block_stride;
    op->u.blocks.pairs = pairs;
    op->u.blocks.n_models = n_models;
    op->u.blocks.n = n;
}

/* ---- needs --------------------------------------------------------------------------------------------------------- */

/* cuBLAS cannot see pointers that are on the device, and takes what they point to as aligned. */
static int is_aligned(rast_dev address) { return address % 16 == 0; }

/* Of one product. rows: of its input */
static int is_small(int32_t out, int32_t in, int32_t rows, int32_t type) {
    const size_t elements = (size_t)out * (size_t)in;
    return elements <= SMALL_BYTES / cuda_type_bytes(type) && elements <= SMALL_OPERATIONS / 2 / (size_t)rows;
}

/* Floats from a row of logits to the next: rows begin at 16 bytes. */
static size_t logits_stride(const rast_logits *l) { return ((size_t)l->n_vocab + 3) / 4 * 4; }

/* Whether the term's logits are put together here, by a product or from rows that were saved for some of the outputs. */
static int is_gathered(const rast_term *t) { return t->saved_row != 0 || (t->hidden && !t->saved); }

static size_t n_gathered(const rast_logits *l) {
    size_t n = 0;
    for (int32_t m = 0; m < l->n_terms; m++) n += (size_t)is_gathered(&l->terms[m]);
    return n;
}

/* Outputs of one call of the transfer step, of which n_terms have logits to be put together. */
static int32_t piece_for(const rast_logits *l, size_t n_terms) {
    const size_t row = n_terms * logits_stride(l) * sizeof(float);
    size_t most = row ? LOGITS_BYTES / row : RAST_KERNEL_OUTPUTS;
    if (!most) most = 1;
    if (most > RAST_KERNEL_OUTPUTS) most = RAST_KERNEL_OUTPUTS;
    return most < (size_t)l->n_out ? (int32_t)most : l->n_out;
}

static int32_t piece_of(const rast_logits *l) { return piece_for(l, n_gathered(l)); }

static int has_product(const rast_term *t) { return is_gathered(t) && t->hidden; }

/* Rows of the term's head that the logits have ids for. */
static int32_t head_rows(const rast_logits *l, const rast_term *t) {
    return t->n_rows < l->n_vocab ? t->n_rows : l->n_vocab;
}

/* Terms from m on whose products with their heads have the shape of m's, m the first of them; 0: it has none, or is not. */
static int32_t same_heads(const rast_logits *l, int32_t m, int32_t members[RAST_KERNEL_MODELS]) {
    const rast_term *t = &l->terms[m];
    int32_t n = 0;
    for (int32_t j = 0; j < l->n_terms; j++) {
        const rast_term *other = &l->terms[j];
        if (!has_product(t) || !has_product(other) || head_rows(l, other) != head_rows(l, t) ||
            other->head->in != t->head->in || other->hidden_type != t->hidden_type)
            continue;
        if (j != m && (!is_aligned(t->hidden | t->head->data | other->hidden | other->head->data) ||
                       !is_small(head_rows(l, t), t->head->in, l->n_out, t->hidden_type)))
            continue;
        if (j < m) return 0;
        members[n++] = j;
    }
    return n;
}

cuda_needs cuda_op_needs(const cuda_op *op) {
    cuda_needs needs = {0};
    if (op->kind == CUDA_MATMUL) {
        const int32_t n = op->pass.n_models * op->u.matmul.n_jobs;
        const rast_weight *w = op->u.matmul.jobs[0].w[0];
        needs.products = 1;
        if (n > 1 && is_small(w->out, w->in, op->pass.cap_rows, op->pass.act_type)) needs.n_pointers = 3 * n;
    } else if (op->kind == CUDA_ATTENTION) {
        needs.attention = rast_kernel_attention_scratch(&op->pass, &op->u.attention.kv);
    } else if (op->kind == CUDA_COMBINE) {
        const rast_logits *l = &op->u.combine;
        const int32_t piece = piece_of(l);
        needs.products = n_gathered(l) > 0;
        for (int32_t m = 0; m < l->n_terms && piece == l->n_out; m++) {
            int32_t members[RAST_KERNEL_MODELS];
            const int32_t n = same_heads(l, m, members);
            if (n > 1) needs.n_pointers += 3 * n;
        }
        needs.logits = n_gathered(l) * (size_t)piece * logits_stride(l) * sizeof(float);
        needs.transfer = rast_kernel_transfer_scratch(l, piece);
    }
    return needs;
}

cuda_needs cuda_op_needs_at_most(const cuda_op *op) {
    cuda_needs needs = cuda_op_needs(op);
    if (op->kind == CUDA_ATTENTION)
        needs.attention = rast_kernel_attention_scratch_at_most(&op->pass, &op->u.attention.kv);
    /* fewer rows may be few enough for batches */
    if (op->kind == CUDA_MATMUL && op->pass.n_models * op->u.matmul.n_jobs > 1)
        needs.n_pointers = 3 * op->pass.n_models * op->u.matmul.n_jobs;
    if (op->kind == CUDA_COMBINE) { /* fewer terms go in larger pieces */
        const rast_logits *l = &op->u.combine;
        const size_t terms = n_gathered(l), row = terms * logits_stride(l) * sizeof(float);
        if (terms) needs.logits = row * (size_t)l->n_out < LOGITS_BYTES ? row * (size_t)l->n_out : LOGITS_BYTES;
        if (needs.logits < row) needs.logits = row;
        needs.transfer = rast_kernel_transfer_scratch(l, piece_for(l, terms ? 1 : 0));
    }
    return needs;
}

int cuda_op_prepare(rast_ctx *ctx, const cuda_op *op, rast_error *err) {
    const rast_logits *l = &op->u.combine;
    int status = RAST_OK;
    for (int32_t m = 0; op->kind == CUDA_COMBINE && m < l->n_terms && status == RAST_OK; m++) {
        rast_dev ids;
        status = cuda_ids(ctx, l->terms[m].uncommon, l->terms[m].n_uncommon, &ids, err);
    }
    return status;
}

/* ---- products ------------------------------------------------------------------------------------------------------ */

/* y[r, o] = sum_i w[o, i] x[r, i], row-major; to cuBLAS, which thinks in columns, that is y^T = w^T^T x^T. */
typedef struct {
    int32_t out, in, rows, type, y_stride; /* of y, in floats */
} product;

static cudaDataType data_type(int32_t type) {
    return type == RAST_F32 ? CUDA_R_32F : type == RAST_BF16 ? CUDA_R_16BF : CUDA_R_16F;
}

static int multiply(rast_queue *q, const product *p, rast_dev w, rast_dev x, rast_dev y, rast_error *err) {
    const float one = 1, zero = 0;
    const cublasStatus_t code =
        cublasGemmEx(q->blas, CUBLAS_OP_T, CUBLAS_OP_N, p->out, p->rows, p->in, &one, cuda_ptr(w), data_type(p->type),
                     p->in, cuda_ptr(x), data_type(p->type), p->in, &zero, cuda_ptr(y), CUDA_R_32F, p->y_stride,
                     CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    return cuda_check_blas(q->ctx, code, "multiplying by weights", err);
}

/* pointers: [3, n] on the device: weights, inputs, outputs */
static int multiply_batch(rast_queue *q, const product *p, rast_dev pointers, int32_t n, rast_error *err) {
    const float one = 1, zero = 0;
    const void *const *w = cuda_ptr(pointers), *const *x = w + n;
    void *const *y = (void *const *)cuda_ptr(pointers) + 2 * (ptrdiff_t)n;
    const cublasStatus_t code = cublasGemmBatchedEx(
        q->blas, CUBLAS_OP_T, CUBLAS_OP_N, p->out, p->rows, p->in, &one, w, data_type(p->type), p->in, x,
        data_type(p->type), p->in, &zero, y, CUDA_R_32F, p->y_stride, n, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    return cuda_check_blas(q->ctx, code, "multiplying by weights of equal-shaped models", err);
}

static rast_dev table_of(const rast_queue *q, const cuda_op *op) {
    return q->tables.data + op->table * sizeof *q->tables.host;
}

typedef struct {
    rast_dev w, x, y;
} operands;

/* Of the op's product i: jobs, and their models. */
static operands operands_of(const cuda_op *op, size_t i) {
    const size_t n_models = (size_t)op->pass.n_models, cap = (size_t)op->pass.cap_rows, m = i % n_models;
    const rast_mm *job = &op->u.matmul.jobs[i / n_models];
    const size_t in = (size_t)job->w[m]->in * cuda_type_bytes(op->pass.act_type);
    return (operands){job->w[m]->data, job->x + m * cap * in,
                      job->y + m * cap * (size_t)job->w[m]->out * sizeof(float)};
}

static size_t n_products(const cuda_op *op) { return (size_t)op->pass.n_models * (size_t)op->u.matmul.n_jobs; }

static void matmul_pointers(const cuda_op *op, uint64_t *out) {
    const size_t n = n_products(op);
    for (size_t i = 0; i < n; i++) {
        const operands o = operands_of(op, i);
        out[i] = o.w;
        out[n + i] = o.x;
        out[2 * n + i] = o.y;
    }
}

static int may_batch(const cuda_op *op) {
    rast_dev all = 0;
    for (size_t i = 0; i < n_products(op); i++) {
        const operands o = operands_of(op, i);
        all |= o.w | o.x | o.y;
    }
    const rast_weight *w = op->u.matmul.jobs[0].w[0];
    return n_products(op) > 1 && is_aligned(all) && is_small(w->out, w->in, op->pass.cap_rows, op->pass.act_type);
}

static int enqueue_matmul(rast_queue *q, const cuda_op *op, rast_error *err) {
    const rast_mm *jobs = op->u.matmul.jobs;
    const rast_weight *w = jobs[0].w[0];
    const product p = {w->out, w->in, op->pass.cap_rows, op->pass.act_type, w->out};
    const size_t n = n_products(op);
    const int batch = may_batch(op);
    int status = batch ? multiply_batch(q, &p, table_of(q, op), (int32_t)n, err) : RAST_OK;
    for (size_t i = 0; i < n && !batch && status == RAST_OK; i++) {
        const operands o = operands_of(op, i);
        status = multiply(q, &p, o.w, o.x, o.y, err);
    }
    for (int32_t j = 0; j < op->u.matmul.n_jobs && status == RAST_OK; j++)
        if (jobs[j].bias) rast_kernel_bias(q->stream, &op->pass, jobs[j].bias, jobs[j].y);
    return status;
}

/* ---- the transfer step --------------------------------------------------------------------------------------------- */

/* Where the term's logits are put together. */
static rast_dev gathered_logits(const rast_queue *q, const rast_logits *l, int32_t m) {
    size_t before = 0;
    for (int32_t j = 0; j < m; j++) before += (size_t)is_gathered(&l->terms[j]);
    return q->logits.data + before * (size_t)piece_of(l) * logits_stride(l) * sizeof(float);
}

static void head_pointers(const rast_queue *q, const rast_logits *l, uint64_t *out) {
    int32_t members[RAST_KERNEL_MODELS];
    for (int32_t m = 0; m < l->n_terms; m++) {
        const int32_t n = same_heads(l, m, members);
        for (int32_t i = 0; i < n && n > 1; i++) {
            out[i] = l->terms[members[i]].head->data;
            out[n + i] = l->terms[members[i]].hidden;
            out[2 * n + i] = gathered_logits(q, l, members[i]);
        }
        if (n > 1) out += 3 * (ptrdiff_t)n;
    }
}

void cuda_op_pointers(const rast_queue *q, const cuda_op *op, uint64_t *out) {
    if (op->kind == CUDA_COMBINE)
        head_pointers(q, &op->u.combine, out);
    else
        matmul_pointers(op, out);
}

/* Logits of n outputs from `first` on: where these are all, those of equal-shaped heads together. */
static int multiply_heads(rast_queue *q, const rast_logits *l, rast_dev table, int32_t first, int32_t n,
                          rast_error *err) {
    int status = RAST_OK;
    for (int32_t m = 0; m < l->n_terms && status == RAST_OK; m++) {
        const rast_term *t = &l->terms[m];
        int32_t members[RAST_KERNEL_MODELS];
        const int32_t n_same = n == l->n_out ? same_heads(l, m, members) : has_product(t);
        if (!n_same) continue;
        const product p = {head_rows(l, t), t->head->in, n, t->hidden_type, (int32_t)logits_stride(l)};
        const size_t row = (size_t)t->head->in * cuda_type_bytes(t->hidden_type);
        if (n_same > 1) {
            status = multiply_batch(q, &p, table, n_same, err);
            table += 3 * (size_t)n_same * sizeof(uint64_t);
        } else {
            status = multiply(q, &p, t->head->data, t->hidden + (size_t)first * row, gathered_logits(q, l, m), err);
        }
    }
    return status;
}

static int enqueue_combine(rast_queue *q, const cuda_op *op, rast_error *err) {
    const rast_logits *l = &op->u.combine;
    rast_transfer_term terms[RAST_KERNEL_MODELS];
    const size_t stride = logits_stride(l);
    const int32_t piece = piece_of(l);
    for (int32_t first = 0; first < l->n_out; first += piece) {
        const int32_t n = l->n_out - first < piece ? l->n_out - first : piece;
        int status = multiply_heads(q, l, table_of(q, op), first, n, err);
        if (status) return status;
        for (int32_t m = 0; m < l->n_terms; m++) {
            const rast_term *t = &l->terms[m];
            rast_dev uncommon;
            status = cuda_ids(q->ctx, t->uncommon, t->n_uncommon, &uncommon, err);
            if (status) return status;
            terms[m] = (rast_transfer_term){
                .stride = stride, .n_rows = head_rows(l, t), .uncommon = uncommon, .n_uncommon = t->n_uncommon};
            if (t->saved && !t->saved_row) {
                terms[m].logits = t->saved + (size_t)first * (size_t)l->n_vocab * sizeof(float);
                terms[m].stride = (size_t)l->n_vocab;
            } else if (is_gathered(t)) {
                terms[m].logits = gathered_logits(q, l, m);
                if (t->saved)
                    rast_kernel_saved(q->stream, t->saved, t->saved_row + (size_t)first * sizeof(int32_t), n,
                                      l->n_vocab, terms[m].logits, stride);
            }
        }
        rast_kernel_transfer(q->stream, l, terms, first, n, q->transfer.data);
    }
    return RAST_OK;
}

/* ---- the others ---------------------------------------------------------------------------------------------------- */

static int enqueue_copy(rast_queue *q, const cuda_op *op, rast_error *err) {
    const void *src = cuda_ptr(op->u.copy.src);
    void *dst = cuda_ptr(op->u.copy.dst);
    enum cudaMemcpyKind kind = cudaMemcpyDeviceToDevice;
    if (op->u.copy.kind == RAST_COPY_TO_DEVICE) {
        kind = cudaMemcpyHostToDevice;
        src = q->now->to_device.data + op->u.copy.at;
    } else if (op->u.copy.kind == RAST_COPY_TO_HOST) {
        kind = cudaMemcpyDeviceToHost;
        dst = q->now->to_host.data + op->u.copy.at;
    }
    return cuda_check(q->ctx, cudaMemcpyAsync(dst, src, op->u.copy.bytes, kind, q->stream), "copying", err);
}

int cuda_op_enqueue(rast_queue *q, const cuda_op *op, rast_error *err) {
    static const char *const doing[] = {[CUDA_COPY] = "copying",
                                        [CUDA_EMBED] = "reading embeddings",
                                        [CUDA_NORM] = "normalising",
                                        [CUDA_MATMUL] = "adding biases",
                                        [CUDA_ROPE_KV] = "rotating and caching keys",
                                        [CUDA_ATTENTION] = "attending",
                                        [CUDA_GLU] = "gating",
                                        [CUDA_GATHER] = "gathering rows",
                                        [CUDA_COMBINE] = "transferring and drawing",
                                        [CUDA_COPY_BLOCKS] = "copying KV blocks"};
    const rast_pass *pass = &op->pass;
    cudaStream_t stream = q->stream;
    int status = RAST_OK;
    switch (op->kind) {
    case CUDA_COPY:
        return enqueue_copy(q, op, err);
    case CUDA_EMBED:
        rast_kernel_embed(stream, pass, op->w, op->u.rows.y);
        break;
    case CUDA_NORM:
        rast_kernel_norm(stream, pass, op->u.rows.extent, op->u.rows.x, op->u.rows.add, op->w, op->u.rows.dim,
                         op->u.rows.group, op->u.rows.eps, op->u.rows.y, op->u.rows.y_type);
        break;
    case CUDA_MATMUL:
        status = enqueue_matmul(q, op, err);
        break;
    case CUDA_ROPE_KV:
        rast_kernel_rope_kv(stream, pass, op->u.attention.q, op->u.attention.k, op->u.attention.v,
                            op->u.attention.table, op->u.attention.interleaved, &op->u.attention.kv);
        break;
    case CUDA_ATTENTION:
        rast_kernel_attention(stream, pass, op->u.attention.q, &op->u.attention.kv, op->u.attention.window,
                              op->u.attention.scale, op->u.attention.y, q->attention.data);
        break;
    case CUDA_GLU:
        rast_kernel_glu(stream, pass, op->u.rows.x, op->u.rows.add, op->u.rows.dim, op->u.rows.y);
        break;
    case CUDA_GATHER:
        rast_kernel_gather(stream, pass, op->u.rows.x, op->u.rows.add, op->u.rows.dim, op->u.rows.y);
        break;
    case CUDA_COMBINE:
        status = enqueue_combine(q, op, err);
        break;
    case CUDA_COPY_BLOCKS:
        rast_kernel_copy_blocks(stream, op->u.blocks.base, op->u.blocks.n_models, op->u.blocks.block_stride,
                                op->u.blocks.pairs, op->u.blocks.n);
        break;
    }
    return status ? status : cuda_check(q->ctx, cudaGetLastError(), doing[op->kind], err);
}
