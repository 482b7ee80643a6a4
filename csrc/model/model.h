/* model.h: the nets of one transfer on one device: descriptions, weight table, and the one forward pass.
 *
 * Nets of equal shape form a class; any subset of a class can go through one pass together (a view). The engine decides
 * which nets run on which rows; this folder knows how a decoder works.
 */
#ifndef RAST_MODEL_H
#define RAST_MODEL_H

#include "../backends/backend.h"
#include "../error.h"

enum { RAST_MAX_NETS = 64 }; /* a set of nets is a 64-bit mask */

/* Weights of a layer, in the order of the table in weights.c. */
enum {
    W_ATTN_NORM,
    W_Q,
    W_K,
    W_V,
    W_O,
    W_MLP_NORM,
    W_GATE,
    W_UP,
    W_DOWN, /* always there */
    W_Q_BIAS,
    W_K_BIAS,
    W_V_BIAS,
    W_O_BIAS,
    W_GATE_BIAS,
    W_UP_BIAS,
    W_DOWN_BIAS,
    W_Q_NORM,
    W_K_NORM,
    N_LAYER_WEIGHTS
};
enum { W_EMBED, W_FINAL_NORM, W_HEAD, N_TOP_WEIGHTS };

typedef struct {
    char *name;
    rast_config config; /* owns rope_freq (never NULL here) and window (NULL or owned) */
    int32_t dtype;
    int32_t cls;          /* index of its class */
    rast_weight *weights; /* [N_TOP_WEIGHTS + n_layers * N_LAYER_WEIGHTS]; data 0: not there */
    int32_t *uncommon;    /* [n_uncommon] sorted */
    int32_t n_uncommon;
    size_t weight_bytes, n_parameters, device_bytes;
} rast_net_state;

typedef struct { /* what nets of equal shape share */
    int32_t first_net, n_nets;
    rast_dev rope; /* [max_context, head_dim/2, 2] cos and sin, float32; filled up to rope_len positions */
    size_t rope_len;
    int32_t max_context; /* greatest of its nets */
} rast_class;

struct rast_model {
    const rast_ops *ops;
    void *plugin; /* where ops are from; NULL: from here */
    rast_ctx *ctx;
    rast_queue *upload;
    rast_net_state *nets;
    int32_t n_nets;
    rast_class *classes;
    int32_t n_classes;
    int32_t n_vocab, n_valid;
    uint8_t *piece_bytes;
    uint32_t *piece_start; /* [n_pieces + 1] */
    size_t n_pieces;
};

static inline size_t rast_n_weights(const rast_config *c) {
    return N_TOP_WEIGHTS + (size_t)c->n_layers * N_LAYER_WEIGHTS;
}
static inline size_t rast_layer_weight(int32_t layer, int which) {
    return N_TOP_WEIGHTS + (size_t)layer * N_LAYER_WEIGHTS + (size_t)which;
}
static inline size_t rast_kv_block_bytes(const rast_net_state *n) { /* all layers, K and V */
    return (size_t)n->config.n_layers * 2 * rast_kv_bytes(n->config.n_kv_heads, n->config.head_dim, n->dtype);
}

/* weights.c: checks every tensor of the table (presence, shape, dtype) and binds it. */
int rast_net_bind(rast_model *m, rast_net_state *net, const rast_net *src, rast_error *err);
void rast_net_unbind(rast_model *m, rast_net_state *net);
/* What its weights will take, about, on a device that copies them. */
size_t rast_net_device_bytes(const rast_net_state *net);

/* rope.c: frequencies for rope_theta, [head_dim/2]; and the table, extended to at least n_positions. */
void rast_rope_default(float theta, int32_t head_dim, float *freq);
int rast_rope_extend(rast_model *m, rast_class *cls, size_t n_positions, rast_error *err);

/* ---- forward.c ---------------------------------------------------------------------------------------------------- */

typedef struct { /* activations of a class, enough for all its nets: [n_nets, cap_rows, ...] */
    rast_dev x, normed, q, k, v, att, out, gate, up, act; /* x, q, k, v, out, gate, up float32; the others act_type */
    rast_dev last, hidden;                                /* [n_nets, cap_out, hidden_size] float32; act_type */
} rast_workspace;

typedef struct rast_view rast_view; /* some nets of one class, with the arrays that ops want */

int rast_workspace_new(rast_model *m, const rast_class *cls, int32_t cap_rows, int32_t cap_out, rast_workspace *out,
                       rast_error *err);
void rast_workspace_free(rast_model *m, rast_workspace *w);

/* nets: [n] of one class; kv: [n] KV storage of each net, [n_blocks, n_layers, K and V]. */
int rast_view_new(rast_model *m, const int32_t *nets, int32_t n, const rast_dev *kv, rast_view **out, rast_error *err);
void rast_view_free(rast_view *v);
/* Records copies of blocks in every net of the view: pairs [n, 2] (from, to). */
void rast_view_copy_blocks(rast_view *v, rast_queue *q, rast_dev pairs, int32_t n);

/* Records one forward pass. Hidden rows of the outputs go to `hidden` [n_models, cap_out, hidden_size], final norm
 * applied, act_type; `last` likewise is scratch. */
void rast_forward(rast_view *v, rast_queue *q, const rast_pass *pass, const rast_workspace *w, rast_dev last,
                  rast_dev hidden);

#endif
