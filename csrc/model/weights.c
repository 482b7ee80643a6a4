/* weights.c: the weight table: which tensors a decoder has, their shapes, and their binding to the device. */
#include "model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef enum { NEEDS_NOTHING, NEEDS_QKV_BIAS, NEEDS_O_BIAS, NEEDS_MLP_BIAS, NEEDS_QK_NORM, NEEDS_HEAD } need;
typedef enum { D_ONE, D_HIDDEN, D_Q, D_KV, D_INTER, D_HEAD_DIM, D_VOCAB } dim; /* D_ONE as `out`: a vector of `in` */

typedef struct {
    const char *name;
    dim out, in;
    need needs;
} weight_row;

static const weight_row top_table[N_TOP_WEIGHTS] = {
    [W_EMBED] = {"model.embed_tokens.weight", D_VOCAB, D_HIDDEN, NEEDS_NOTHING},
    [W_FINAL_NORM] = {"model.norm.weight", D_ONE, D_HIDDEN, NEEDS_NOTHING},
    [W_HEAD] = {"lm_head.weight", D_VOCAB, D_HIDDEN, NEEDS_HEAD},
};

static const weight_row layer_table[N_LAYER_WEIGHTS] = {
    [W_ATTN_NORM] = {"input_layernorm.weight", D_ONE, D_HIDDEN, NEEDS_NOTHING},
    [W_Q] = {"self_attn.q_proj.weight", D_Q, D_HIDDEN, NEEDS_NOTHING},
    [W_K] = {"self_attn.k_proj.weight", D_KV, D_HIDDEN, NEEDS_NOTHING},
    [W_V] = {"self_attn.v_proj.weight", D_KV, D_HIDDEN, NEEDS_NOTHING},
    [W_O] = {"self_attn.o_proj.weight", D_HIDDEN, D_Q, NEEDS_NOTHING},
    [W_MLP_NORM] = {"post_attention_layernorm.weight", D_ONE, D_HIDDEN, NEEDS_NOTHING},
    [W_GATE] = {"mlp.gate_proj.weight", D_INTER, D_HIDDEN, NEEDS_NOTHING},
    [W_UP] = {"mlp.up_proj.weight", D_INTER, D_HIDDEN, NEEDS_NOTHING},
    [W_DOWN] = {"mlp.down_proj.weight", D_HIDDEN, D_INTER, NEEDS_NOTHING},
    [W_Q_BIAS] = {"self_attn.q_proj.bias", D_ONE, D_Q, NEEDS_QKV_BIAS},
    [W_K_BIAS] = {"self_attn.k_proj.bias", D_ONE, D_KV, NEEDS_QKV_BIAS},
    [W_V_BIAS] = {"self_attn.v_proj.bias", D_ONE, D_KV, NEEDS_QKV_BIAS},
    [W_O_BIAS] = {"self_attn.o_proj.bias", D_ONE, D_HIDDEN, NEEDS_O_BIAS},
    [W_GATE_BIAS] = {"mlp.gate_proj.bias", D_ONE, D_INTER, NEEDS_MLP_BIAS},
    [W_UP_BIAS] = {"mlp.up_proj.bias", D_ONE, D_INTER, NEEDS_MLP_BIAS},
    [W_DOWN_BIAS] = {"mlp.down_proj.bias", D_ONE, D_HIDDEN, NEEDS_MLP_BIAS},
    [W_Q_NORM] = {"self_attn.q_norm.weight", D_ONE, D_HEAD_DIM, NEEDS_QK_NORM},
    [W_K_NORM] = {"self_attn.k_norm.weight", D_ONE, D_HEAD_DIM, NEEDS_QK_NORM},
};

static size_t dim_size(const rast_config *c, dim d) {
    switch (d) {
    case D_HIDDEN:
        return (size_t)c->hidden_size;
    case D_Q:
        return (size_t)c->n_heads * (size_t)c->head_dim;
    case D_KV:
        return (size_t)c->n_kv_heads * (size_t)c->head_dim;
    case D_INTER:
        return (size_t)c->intermediate_size;
    case D_HEAD_DIM:
        return (size_t)c->head_dim;
    case D_VOCAB:
        return (size_t)c->vocab_size;
    case D_ONE:
        break;
    }
    return 1;
}

static int is_needed(const rast_config *c, need n) {
    switch (n) {
    case NEEDS_QKV_BIAS:
        return c->qkv_bias;
    case NEEDS_O_BIAS:
        return c->o_bias;
    case NEEDS_MLP_BIAS:
        return c->mlp_bias;
    case NEEDS_QK_NORM:
        return c->qk_norm;
    case NEEDS_HEAD:
        return !c->tie_word_embeddings;
    case NEEDS_NOTHING:
        break;
    }
    return 1;
}

static int by_name(const void *a, const void *b) {
    return strcmp((*(const rast_tensor *const *)a)->name, (*(const rast_tensor *const *)b)->name);
}

typedef struct {
    const rast_tensor **sorted; /* [n] by name */
    size_t n;
} tensor_index;

static const rast_tensor *find(const tensor_index *index, const char *name) {
    size_t lo = 0, hi = index->n;
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        int order = strcmp(name, index->sorted[mid]->name);
        if (order == 0) return index->sorted[mid];
        if (order < 0)
            hi = mid;
        else
            lo = mid + 1;
    }
    return NULL;
}

static int bind_one(rast_model *m, rast_net_state *net, const tensor_index *index, const weight_row *row,
                    const char *name, rast_weight *out, rast_error *err) {
    if (!is_needed(&net->config, row->needs)) return RAST_OK;
    const rast_tensor *t = find(index, name);
    if (!t) return rast_fail(err, RAST_ERR_VALUE, "%s: tensor %s is missing", net->name, name);
    const size_t n_out = dim_size(&net->config, row->out), n_in = dim_size(&net->config, row->in);
    const size_t n_stored = rast_stored_rows(t->dtype, n_out);
    const int is_vector = row->out == D_ONE;
    if (is_vector ? t->n_dims != 1 || t->shape[0] != n_in
                  : t->n_dims != 2 || t->shape[0] != n_stored || t->shape[1] != n_in) {
        char expected[64], found[64];
        if (is_vector)
            snprintf(expected, sizeof expected, "[%zu]", n_in);
        else
            snprintf(expected, sizeof expected, "[%zu, %zu]", n_stored, n_in);
        if (t->n_dims == 1)
            snprintf(found, sizeof found, "[%zu]", t->shape[0]);
        else if (t->n_dims == 2)
            snprintf(found, sizeof found, "[%zu, %zu]", t->shape[0], t->shape[1]);
        else
            snprintf(found, sizeof found, "%d dimensions", t->n_dims);
        return rast_fail(err, RAST_ERR_VALUE, "%s: tensor %s has shape %s, the config asks for %s", net->name, name,
                         found, expected);
    }
    if (!rast_type_group(t->dtype) || (is_vector && t->dtype >= RAST_N_DTYPES))
        return rast_fail(err, RAST_ERR_UNSUPPORTED,
                         "%s: tensor %s has dtype %d; supported: F32, BF16, F16, and for matrices Q8_0, Q4_0, Q4_1, "
                         "int8, int4, int4-64",
                         net->name, name, t->dtype);
    const size_t row_bytes = rast_row_bytes(t->dtype, n_in);
    if (!row_bytes)
        return rast_fail(err, RAST_ERR_VALUE,
                         "%s: tensor %s has rows of %zu, which is not a multiple of its groups of %zu", net->name, name,
                         n_in, rast_type_group(t->dtype));
    if (!t->data) return rast_fail(err, RAST_ERR_VALUE, "%s: tensor %s has no data", net->name, name);
    net->n_parameters += n_out * n_in;
    net->weight_bytes += n_stored * row_bytes;
    rast_tensor bound = *t;
    if (!is_vector) bound.shape[0] = n_out; /* the rows that count */
    int status = m->ops->bind(m->ctx, &bound, net->dtype, out, err);
    if (status == RAST_OK && m->ops->copies_weights) net->device_bytes += (size_t)out->out * out->stride;
    return status;
}

static size_t row_bytes(const rast_net_state *net, const weight_row *row) {
    if (!is_needed(&net->config, row->needs)) return 0;
    const size_t element = row->out != D_ONE && net->dtype != RAST_F32 ? 2 : 4; /* vectors: at most */
    return dim_size(&net->config, row->out) * dim_size(&net->config, row->in) * element;
}

size_t rast_net_device_bytes(const rast_net_state *net) {
    size_t layer = 0, top = 0;
    for (int i = 0; i < N_LAYER_WEIGHTS; i++) layer += row_bytes(net, &layer_table[i]);
    for (int i = 0; i < N_TOP_WEIGHTS; i++) top += row_bytes(net, &top_table[i]);
    return top + layer * (size_t)net->config.n_layers;
}

int rast_net_bind(rast_model *m, rast_net_state *net, const rast_net *src, rast_error *err) {
    int status = RAST_OK;
    tensor_index index = {.n = src->n_tensors};
    index.sorted = malloc((src->n_tensors + 1) * sizeof *index.sorted);
    net->weights = calloc(rast_n_weights(&net->config), sizeof *net->weights);
    if (!index.sorted || !net->weights) {
        status = rast_fail(err, RAST_ERR_MEMORY, "%s: no memory for the weight table", net->name);
        goto done;
    }
    for (size_t i = 0; i < src->n_tensors; i++) {
        if (!src->tensors[i].name) {
            status = rast_fail(err, RAST_ERR_VALUE, "%s: tensor %zu has no name", net->name, i);
            goto done;
        }
        index.sorted[i] = &src->tensors[i];
    }
    if (src->n_tensors) qsort(index.sorted, src->n_tensors, sizeof *index.sorted, by_name);
    for (int i = 0; i < N_TOP_WEIGHTS; i++) {
        status = bind_one(m, net, &index, &top_table[i], top_table[i].name, &net->weights[i], err);
        if (status) goto done;
    }
    if (net->config.tie_word_embeddings) net->weights[W_HEAD] = net->weights[W_EMBED];
    for (int32_t layer = 0; layer < net->config.n_layers; layer++)
        for (int i = 0; i < N_LAYER_WEIGHTS; i++) {
            char name[128];
            snprintf(name, sizeof name, "model.layers.%d.%s", layer, layer_table[i].name);
            status = bind_one(m, net, &index, &layer_table[i], name, &net->weights[rast_layer_weight(layer, i)], err);
            if (status) goto done;
        }
done:
    free(index.sorted);
    return status;
}

void rast_net_unbind(rast_model *m, rast_net_state *net) {
    if (!net->weights) return;
    const size_t n = rast_n_weights(&net->config);
    for (size_t i = 0; i < n; i++) {
        const int is_alias = i == W_HEAD && net->config.tie_word_embeddings;
        if (net->weights[i].data && !is_alias) m->ops->unbind(m->ctx, &net->weights[i]);
    }
    free(net->weights);
    net->weights = NULL;
}
