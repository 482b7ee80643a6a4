/* model.c: creation, checking and release of a model: the distinct nets of one transfer. */
#include "model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static int check_field(const char *net, const char *field, int64_t value, int64_t lo, int64_t hi, rast_error *err) {
    if (value >= lo && value <= hi) return RAST_OK;
    return rast_fail(err, RAST_ERR_VALUE, "%s: %s = %lld is out of range (%lld to %lld)", net, field, (long long)value,
                     (long long)lo, (long long)hi);
}

static int check_config(const char *name, const rast_config *c, rast_error *err) {
    const struct {
        const char *field;
        int64_t value, lo, hi;
    } fields[] = {
        {"n_layers", c->n_layers, 1, 4096},
        {"n_heads", c->n_heads, 1, 65536},
        {"n_kv_heads", c->n_kv_heads, 1, c->n_heads},
        {"head_dim", c->head_dim, 2, 512},
        {"hidden_size", c->hidden_size, 1, 1 << 24},
        {"intermediate_size", c->intermediate_size, 1, 1 << 24},
        {"vocab_size", c->vocab_size, 1, 1 << 26},
        {"max_context", c->max_context, 1, 1 << 28},
        {"n_heads * head_dim", (int64_t)c->n_heads * c->head_dim, 2, 1 << 24},
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        int status = check_field(name, fields[i].field, fields[i].value, fields[i].lo, fields[i].hi, err);
        if (status) return status;
    }
    if (c->head_dim % 2) return rast_fail(err, RAST_ERR_VALUE, "%s: head_dim = %d must be even", name, c->head_dim);
    if (c->n_heads % c->n_kv_heads)
        return rast_fail(err, RAST_ERR_VALUE, "%s: n_heads = %d is not a multiple of n_kv_heads = %d", name, c->n_heads,
                         c->n_kv_heads);
    if (!(c->rms_norm_eps >= 0 && c->rms_norm_eps < 1))
        return rast_fail(err, RAST_ERR_VALUE, "%s: rms_norm_eps = %g is out of range", name, (double)c->rms_norm_eps);
    if (!c->rope_freq && !(c->rope_theta > 0 && isfinite(c->rope_theta)))
        return rast_fail(err, RAST_ERR_VALUE, "%s: rope_theta = %g must be positive", name, (double)c->rope_theta);
    for (int32_t i = 0; c->rope_freq && i < c->head_dim / 2; i++)
        if (!isfinite(c->rope_freq[i]))
            return rast_fail(err, RAST_ERR_VALUE, "%s: rope_freq[%d] is not finite", name, i);
    for (int32_t i = 0; c->window && i < c->n_layers; i++)
        if (c->window[i] < 0)
            return rast_fail(err, RAST_ERR_VALUE, "%s: window[%d] = %d is negative", name, i, c->window[i]);
    return RAST_OK;
}

static void *copy_of(const void *data, size_t bytes) {
    void *out = malloc(bytes ? bytes : 1);
    if (out && bytes) memcpy(out, data, bytes);
    return out;
}

static int by_value(const void *a, const void *b) {
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

/* Fills in everything of `net` that is not on the device; the caller frees it, also after an error. */
static int describe(rast_net_state *net, const rast_net *src, rast_error *err) {
    const char *name = src->name ? src->name : "net";
    net->name = copy_of(name, strlen(name) + 1);
    if (!net->name) goto memory;
    int status = check_config(net->name, &src->config, err);
    if (status) return status;
    if (src->dtype < 0 || src->dtype >= RAST_N_DTYPES)
        return rast_fail(err, RAST_ERR_UNSUPPORTED, "%s: dtype %d is not supported", net->name, src->dtype);
    net->dtype = src->dtype;

    rast_config config = src->config;
    const size_t half = (size_t)config.head_dim / 2;
    float *freq = malloc(half * sizeof *freq);
    if (!freq) goto memory;
    if (src->config.rope_freq)
        memcpy(freq, src->config.rope_freq, half * sizeof *freq);
    else
        rast_rope_default(config.rope_theta, config.head_dim, freq);
    config.rope_freq = freq;
    config.window = NULL;
    net->config = config;
    if (src->config.window) {
        net->config.window = copy_of(src->config.window, (size_t)config.n_layers * sizeof(int32_t));
        if (!net->config.window) goto memory;
    }

    if (src->n_uncommon > (size_t)config.vocab_size)
        return rast_fail(err, RAST_ERR_VALUE, "%s: more uncommon ids than embedding rows", net->name);
    net->uncommon = copy_of(src->uncommon, src->n_uncommon * sizeof(int32_t));
    if (!net->uncommon) goto memory;
    net->n_uncommon = (int32_t)src->n_uncommon;
    qsort(net->uncommon, src->n_uncommon, sizeof(int32_t), by_value);
    for (int32_t i = 0; i < net->n_uncommon; i++)
        if (net->uncommon[i] < 0 || net->uncommon[i] >= config.vocab_size)
            return rast_fail(err, RAST_ERR_VALUE, "%s: uncommon id %d has no embedding row", net->name,
                             net->uncommon[i]);
    return RAST_OK;
memory:
    return rast_fail(err, RAST_ERR_MEMORY, "%s: no memory for the description", name);
}

/* Equal in everything that one pass shares: shapes, types, rounding, rope, windows. Vocabularies may differ. */
static int same_class(const rast_net_state *a, const rast_net_state *b) {
    const rast_config *x = &a->config, *y = &b->config;
    if (a->dtype != b->dtype || x->n_layers != y->n_layers || x->n_heads != y->n_heads ||
        x->n_kv_heads != y->n_kv_heads || x->head_dim != y->head_dim || x->hidden_size != y->hidden_size ||
        x->intermediate_size != y->intermediate_size || x->rms_norm_eps != y->rms_norm_eps ||
        x->rope_attention != y->rope_attention || x->rope_interleaved != y->rope_interleaved)
        return 0;
    if (memcmp(x->rope_freq, y->rope_freq, (size_t)x->head_dim / 2 * sizeof(float)) != 0) return 0;
    for (int32_t i = 0; i < x->n_layers; i++)
        if ((x->window ? x->window[i] : 0) != (y->window ? y->window[i] : 0)) return 0;
    const size_t n = rast_n_weights(x);
    for (size_t i = 0; i < n; i++) {
        const rast_weight *u = &a->weights[i], *v = &b->weights[i];
        if (!u->data != !v->data || u->type != v->type) return 0;
    }
    return 1;
}

static int make_classes(rast_model *m, rast_error *err) {
    m->classes = calloc((size_t)m->n_nets, sizeof *m->classes);
    if (!m->classes) return rast_fail(err, RAST_ERR_MEMORY, "no memory for the model's classes");
    for (int32_t i = 0; i < m->n_nets; i++) {
        rast_net_state *net = &m->nets[i];
        int32_t c = 0;
        while (c < m->n_classes && !same_class(&m->nets[m->classes[c].first_net], net)) c++;
        if (c == m->n_classes) m->classes[m->n_classes++] = (rast_class){.first_net = i};
        rast_class *cls = &m->classes[c];
        net->cls = c;
        cls->n_nets++;
        if (net->config.max_context > cls->max_context) cls->max_context = net->config.max_context;
    }
    for (int32_t c = 0; c < m->n_classes; c++) {
        rast_class *cls = &m->classes[c];
        const size_t row = (size_t)m->nets[cls->first_net].config.head_dim * sizeof(float);
        int status = m->ops->alloc(m->ctx, (size_t)cls->max_context * row, RAST_MEM_LAZY, &cls->rope, err);
        if (status) return status;
    }
    return RAST_OK;
}

static int set_vocab(rast_model *m, const rast_vocab *vocab, rast_error *err) {
    m->n_vocab = m->n_valid = m->nets[0].config.vocab_size;
    if (!vocab) return RAST_OK;
    if (vocab->n_valid < 0) return rast_fail(err, RAST_ERR_VALUE, "n_valid = %d is negative", vocab->n_valid);
    if (vocab->n_valid > 0 && vocab->n_valid < m->n_valid) m->n_valid = vocab->n_valid;
    if (!vocab->piece_bytes) return RAST_OK;
    if (!vocab->piece_start || vocab->piece_start[0] != 0)
        return rast_fail(err, RAST_ERR_VALUE, "piece_start must begin with 0");
    for (size_t i = 0; i < vocab->n_pieces; i++)
        if (vocab->piece_start[i + 1] < vocab->piece_start[i])
            return rast_fail(err, RAST_ERR_VALUE, "piece_start decreases at token %zu", i);
    m->n_pieces = vocab->n_pieces;
    m->piece_start = copy_of(vocab->piece_start, (vocab->n_pieces + 1) * sizeof(uint32_t));
    m->piece_bytes = copy_of(vocab->piece_bytes, vocab->piece_start[vocab->n_pieces]);
    if (!m->piece_start || !m->piece_bytes) return rast_fail(err, RAST_ERR_MEMORY, "no memory for the token bytes");
    return RAST_OK;
}

static int open_device(const rast_device *device, void **plugin, const rast_ops **ops, rast_ctx **ctx,
                       rast_error *err) {
    *plugin = NULL;
    *ctx = NULL;
    if (device->kind == RAST_CPU) {
        *ops = &rast_cpu_ops;
    } else if (device->kind == RAST_CUDA) {
        if (!device->plugin)
            return rast_fail(err, RAST_ERR_DEVICE, "the CUDA backend is a plugin, and no path was given");
        int status = rast_plugin_open(device->plugin, plugin, ops, err);
        if (status) return status;
    } else {
        return rast_fail(err, RAST_ERR_UNSUPPORTED, "device kind %d: only CPU (%d) and CUDA (%d)", device->kind,
                         RAST_CPU, RAST_CUDA);
    }
    return (*ops)->open(device, ctx, err);
}

int rast_device_check(const rast_device *device, rast_error *err) {
    const rast_ops *ops;
    rast_ctx *ctx;
    void *plugin;
    int status = open_device(device, &plugin, &ops, &ctx, err);
    if (ctx) ops->close(ctx);
    rast_plugin_close(plugin);
    return status;
}

/* Said before gigabytes are on their way. */
static int check_memory(rast_model *m, rast_error *err) {
    size_t need = 0;
    if (!m->ops->copies_weights) return RAST_OK;
    for (int32_t i = 0; i < m->n_nets; i++) need += rast_net_device_bytes(&m->nets[i]);
    rast_memory memory;
    int status = m->ops->memory(m->ctx, &memory, err);
    if (status) return status;
    const size_t have = rast_memory_left(&memory);
    if (need <= have) return RAST_OK;
    return rast_fail(err, RAST_ERR_MEMORY,
                     "the weights of all models take %.1f MiB on the device, where %.1f MiB are free; KV cache and "
                     "workspace come on top",
                     (double)need / (1 << 20), (double)have / (1 << 20));
}

int rast_model_new(const rast_device *device, const rast_net *nets, size_t n_nets, const rast_vocab *vocab,
                   rast_model **out, rast_error *err) {
    const rast_device any = {0};
    *out = NULL;
    if (!device) device = &any;
    if (n_nets < 1 || n_nets > RAST_MAX_NETS)
        return rast_fail(err, RAST_ERR_VALUE, "a model has 1 to %d nets, not %zu", RAST_MAX_NETS, n_nets);
    rast_model *m = calloc(1, sizeof *m);
    if (!m) return rast_fail(err, RAST_ERR_MEMORY, "no memory for a model");
    int status = open_device(device, &m->plugin, &m->ops, &m->ctx, err);
    if (status) goto fail;
    status = m->ops->queue_new(m->ctx, &m->upload, err);
    if (status) goto fail;
    m->nets = calloc(n_nets, sizeof *m->nets);
    if (!m->nets) {
        status = rast_fail(err, RAST_ERR_MEMORY, "no memory for %zu nets", n_nets);
        goto fail;
    }
    for (size_t i = 0; i < n_nets; i++) {
        m->n_nets = (int32_t)i + 1;
        status = describe(&m->nets[i], &nets[i], err);
        if (status) goto fail;
    }
    status = check_memory(m, err);
    for (size_t i = 0; i < n_nets && status == RAST_OK; i++) status = rast_net_bind(m, &m->nets[i], &nets[i], err);
    if (status) goto fail;
    if (m->nets[0].n_uncommon) {
        status =
            rast_fail(err, RAST_ERR_VALUE, "%s: net 0 defines the tokens and has no uncommon ids", m->nets[0].name);
        goto fail;
    }
    status = set_vocab(m, vocab, err);
    if (status == RAST_OK) status = make_classes(m, err);
    if (status) goto fail;
    *out = m;
    return RAST_OK;
fail:
    rast_model_free(m);
    return status;
}

void rast_model_free(rast_model *m) {
    if (!m) return;
    for (int32_t c = 0; c < m->n_classes; c++) m->ops->release(m->ctx, m->classes[c].rope);
    for (int32_t i = 0; i < m->n_nets; i++) {
        rast_net_state *net = &m->nets[i];
        rast_net_unbind(m, net);
        free((void *)net->config.rope_freq);
        free((void *)net->config.window);
        free(net->uncommon);
        free(net->name);
    }
    free(m->nets);
    free(m->classes);
    free(m->piece_bytes);
    free(m->piece_start);
    if (m->upload) m->ops->queue_free(m->upload);
    if (m->ctx) m->ops->close(m->ctx);
    rast_plugin_close(m->plugin);
    free(m);
}

size_t rast_model_n_nets(const rast_model *m) { return (size_t)m->n_nets; }
int32_t rast_model_n_vocab(const rast_model *m) { return m->n_vocab; }
const char *rast_model_isa(const rast_model *m) { return m->ops->isa(m->ctx); }
int32_t rast_model_n_threads(const rast_model *m) { return m->ops->n_threads(m->ctx); }

void rast_model_net_info(const rast_model *m, size_t net, rast_net_info *out) {
    const rast_net_state *n = &m->nets[net];
    *out = (rast_net_info){.weight_bytes = n->weight_bytes,
                           .n_parameters = n->n_parameters,
                           .device_bytes = n->device_bytes,
                           .kv_bytes_per_token = rast_kv_block_bytes(n) / RAST_BLOCK_TOKENS,
                           .dtype = n->dtype,
                           .vocab_size = n->config.vocab_size,
                           .max_context = n->config.max_context};
}
