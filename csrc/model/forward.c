/* forward.c: the one forward pass of a decoder (Llama, Mistral, Qwen2, Qwen3), written against the backend's ops. */
#include "model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct rast_view {
    rast_model *model;
    const rast_net_state *net; /* the first one: shapes of all */
    int32_t n;
    const rast_weight **weights; /* [n_weights][n] */
    rast_dev *kv;                /* [n_layers][n] a layer's K of block 0 */
    size_t block_bytes, layer_bytes;
};

static size_t type_bytes(int32_t type) { return type == RAST_F32 ? 4 : 2; }

int rast_workspace_new(rast_model *m, const rast_class *cls, int32_t cap_rows, int32_t cap_out, rast_workspace *w,
                       rast_error *err) {
    const rast_net_state *net = &m->nets[cls->first_net];
    const rast_config *c = &net->config;
    const size_t rows = (size_t)cap_rows * (size_t)cls->n_nets, outs = (size_t)cap_out * (size_t)cls->n_nets;
    const size_t act = type_bytes(net->dtype), hidden = (size_t)c->hidden_size;
    const size_t n_q = (size_t)c->n_heads * (size_t)c->head_dim, n_kv = (size_t)c->n_kv_heads * (size_t)c->head_dim;
    const size_t inter = (size_t)c->intermediate_size;
    memset(w, 0, sizeof *w);
    const struct {
        rast_dev *out;
        size_t rows, width, bytes;
    } buffers[] = {
        {&w->x, rows, hidden, 4},    {&w->normed, rows, hidden, act}, {&w->q, rows, n_q, 4},
        {&w->k, rows, n_kv, 4},      {&w->v, rows, n_kv, 4},          {&w->att, rows, n_q, act},
        {&w->out, rows, hidden, 4},  {&w->gate, rows, inter, 4},      {&w->up, rows, inter, 4},
        {&w->act, rows, inter, act}, {&w->last, outs, hidden, 4},     {&w->hidden, outs, hidden, act},
    };
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) {
        size_t bytes;
        int status = RAST_ERR_MEMORY;
        if (!rast_mul(buffers[i].rows, buffers[i].width * buffers[i].bytes, &bytes))
            rast_fail(err, status, "activations of %d rows are too large", cap_rows);
        else
            status = m->ops->alloc(m->ctx, bytes, RAST_MEM_DATA, buffers[i].out, err);
        if (status) {
            rast_workspace_free(m, w);
            return status;
        }
    }
    return RAST_OK;
}

void rast_workspace_free(rast_model *m, rast_workspace *w) {
    const rast_dev all[] = {w->x,   w->normed, w->q,  w->k,   w->v,    w->att,
                            w->out, w->gate,   w->up, w->act, w->last, w->hidden};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) m->ops->release(m->ctx, all[i]);
    memset(w, 0, sizeof *w);
}

int rast_view_new(rast_model *m, const int32_t *nets, int32_t n, const rast_dev *kv, rast_view **out, rast_error *err) {
    rast_view *v = calloc(1, sizeof *v);
    *out = NULL;
    if (!v) goto memory;
    v->model = m;
    v->net = &m->nets[nets[0]];
    v->n = n;
    v->block_bytes = rast_kv_block_bytes(v->net);
    v->layer_bytes = v->block_bytes / (size_t)v->net->config.n_layers;
    const size_t n_weights = rast_n_weights(&v->net->config), n_layers = (size_t)v->net->config.n_layers;
    v->weights = calloc(n_weights * (size_t)n, sizeof *v->weights);
    v->kv = calloc(n_layers * (size_t)n, sizeof *v->kv);
    if (!v->weights || !v->kv) goto memory;
    for (int32_t i = 0; i < n; i++) {
        for (size_t j = 0; j < n_weights; j++) v->weights[j * (size_t)n + (size_t)i] = &m->nets[nets[i]].weights[j];
        for (size_t l = 0; l < n_layers; l++) v->kv[l * (size_t)n + (size_t)i] = kv[i] + l * v->layer_bytes;
    }
    *out = v;
    return RAST_OK;
memory:
    rast_view_free(v);
    return rast_fail(err, RAST_ERR_MEMORY, "no memory for a view of %d nets", n);
}

void rast_view_free(rast_view *v) {
    if (!v) return;
    free(v->weights);
    free(v->kv);
    free(v);
}

void rast_view_copy_blocks(rast_view *v, rast_queue *q, rast_dev pairs, int32_t n) {
    v->model->ops->copy_blocks(q, v->kv, v->n, v->block_bytes, pairs, n);
}

/* [n_models] weights of a kind, or NULL where the architecture has none. */
static const rast_weight *const *weights_at(const rast_view *v, size_t index) {
    const rast_weight *const *w = &v->weights[index * (size_t)v->n];
    return w[0]->data ? w : NULL;
}

static const rast_weight *const *layer_weights(const rast_view *v, int32_t layer, int which) {
    return weights_at(v, rast_layer_weight(layer, which));
}

void rast_forward(rast_view *v, rast_queue *q, const rast_pass *pass, const rast_workspace *w, rast_dev last,
                  rast_dev hidden) {
    const rast_ops *ops = v->model->ops;
    const rast_config *c = &v->net->config;
    const rast_class *cls = &v->model->classes[v->net->cls];
    const int32_t n_q = c->n_heads * c->head_dim, n_kv = c->n_kv_heads * c->head_dim, act = v->net->dtype;
    const float scale = 1.0f / sqrtf((float)c->head_dim);

    ops->embed(q, pass, weights_at(v, W_EMBED), w->x);
    for (int32_t l = 0; l < c->n_layers; l++) {
        const rast_kv kv = {.base = &v->kv[(size_t)l * (size_t)v->n],
                            .block_stride = v->block_bytes,
                            .v_offset = v->layer_bytes / 2,
                            .type = act,
                            .n_heads = c->n_heads,
                            .n_kv_heads = c->n_kv_heads,
                            .head_dim = c->head_dim};
        /* the previous layer's MLP output joins the residual stream in the norm that reads it */
        ops->norm(q, pass, RAST_OF_ROWS, w->x, l ? w->out : 0, layer_weights(v, l, W_ATTN_NORM), c->hidden_size,
                  c->hidden_size, c->rms_norm_eps, w->normed, act);
        const rast_mm qkv[] = {
            {w->normed, w->q, layer_weights(v, l, W_Q), layer_weights(v, l, W_Q_BIAS)},
            {w->normed, w->k, layer_weights(v, l, W_K), layer_weights(v, l, W_K_BIAS)},
            {w->normed, w->v, layer_weights(v, l, W_V), layer_weights(v, l, W_V_BIAS)},
        };
        ops->matmul(q, pass, qkv, 3);
        if (c->qk_norm) {
            ops->norm(q, pass, RAST_OF_ROWS, w->q, 0, layer_weights(v, l, W_Q_NORM), n_q, c->head_dim, c->rms_norm_eps,
                      w->q, RAST_F32);
            ops->norm(q, pass, RAST_OF_ROWS, w->k, 0, layer_weights(v, l, W_K_NORM), n_kv, c->head_dim, c->rms_norm_eps,
                      w->k, RAST_F32);
        }
        ops->rope_kv(q, pass, w->q, w->k, w->v, cls->rope, c->rope_interleaved, &kv);
        ops->attention(q, pass, w->q, &kv, c->window ? c->window[l] : 0, scale, w->att);
        const rast_mm o = {w->att, w->out, layer_weights(v, l, W_O), layer_weights(v, l, W_O_BIAS)};
        ops->matmul(q, pass, &o, 1);
        ops->norm(q, pass, RAST_OF_ROWS, w->x, w->out, layer_weights(v, l, W_MLP_NORM), c->hidden_size, c->hidden_size,
                  c->rms_norm_eps, w->normed, act);
        const rast_mm mlp[] = {
            {w->normed, w->gate, layer_weights(v, l, W_GATE), layer_weights(v, l, W_GATE_BIAS)},
            {w->normed, w->up, layer_weights(v, l, W_UP), layer_weights(v, l, W_UP_BIAS)},
        };
        ops->matmul(q, pass, mlp, 2);
        ops->glu(q, pass, w->gate, w->up, c->intermediate_size, w->act);
        const rast_mm down = {w->act, w->out, layer_weights(v, l, W_DOWN), layer_weights(v, l, W_DOWN_BIAS)};
        ops->matmul(q, pass, &down, 1);
    }
    ops->gather(q, pass, w->x, w->out, c->hidden_size, last);
    ops->norm(q, pass, RAST_OF_OUTS, last, 0, weights_at(v, W_FINAL_NORM), c->hidden_size, c->hidden_size,
              c->rms_norm_eps, hidden, act);
}
