/* generate.c: greedy decoding from C, without Python: one base, or base + expert - antiexpert.
 *
 *     generate N base [expert antiexpert] -- id id id ...
 *
 * Each model is a HuggingFace folder with config.json and a single model.safetensors (Llama, Qwen2, Qwen3; neither rope
 * scaling nor sliding windows). Prints the N new token ids. Build it with `make build/generate`, or by hand:
 *
 *     make lib && cc -Icsrc examples/c/generate.c build/librast.a -o generate -lm -pthread
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "rast.h"

static void die(const char *what, const char *why) {
    fprintf(stderr, "generate: %s: %s\n", what, why);
    exit(1);
}

static void *allocate(size_t n, size_t size) {
    void *p = calloc(n ? n : 1, size);
    if (!p) die("memory", "exhausted");
    return p;
}

typedef struct {
    const char *data;
    size_t size;
} bytes;

static bytes map_file(const char *path) {
    struct stat info;
    int file = open(path, O_RDONLY);
    if (file < 0 || fstat(file, &info) || info.st_size == 0) die(path, "cannot be read, or is empty");
    void *data = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    if (data == MAP_FAILED) die(path, "cannot be mapped");
    close(file);
    return (bytes){data, (size_t)info.st_size};
}

/* ---- just enough JSON -------------------------------------------------------------------------------------------- */

/* A copy of the text with a NUL at its end, which stops every function below. */
static char *json_text(const char *data, size_t size) {
    char *text = allocate(size + 1, 1);
    memcpy(text, data, size);
    return text;
}

static const char *skip_to(const char *at, const char *any_of) { return at + strcspn(at, any_of); }

/* The number (or true = 1) that follows "key":, wherever it stands; `missing` if it does not. */
static double json_number(const char *text, const char *key, double missing) {
    char quoted[64];
    snprintf(quoted, sizeof quoted, "\"%s\"", key);
    const char *at = strstr(text, quoted);
    if (!at) return missing;
    at += strlen(quoted);
    at += strspn(at, " \t\r\n:");
    if (!strncmp(at, "true", 4)) return 1;
    char *end;
    double value = strtod(at, &end);
    return end == at ? missing : value; /* null */
}

/* ---- models ------------------------------------------------------------------------------------------------------ */

static int dtype_of(const char *name) {
    return !strncmp(name, "F32\"", 4)    ? RAST_F32
           : !strncmp(name, "BF16\"", 5) ? RAST_BF16
           : !strncmp(name, "F16\"", 4)  ? RAST_F16
                                         : -1;
}

/* Reads entry `"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}` at `at`, which starts with the
 * quote; returns where it ends. */
static const char *read_tensor(const char *at, bytes data, const char *path, rast_tensor *t) {
    const char *end = skip_to(at + 1, "\""), *close = skip_to(end, "}");
    const char *dtype = strstr(at, "\"dtype\""), *shape = strstr(at, "\"shape\""), *span = strstr(at, "data_offsets");
    if (!*close || !dtype || !shape || !span || dtype > close || shape > close || span > close)
        die(path, "not a safetensors header");
    char *name = allocate((size_t)(end - at), 1);
    memcpy(name, at + 1, (size_t)(end - at - 1));
    t->name = name;
    dtype = skip_to(dtype + strlen("\"dtype\""), "\"");
    t->dtype = *dtype ? dtype_of(dtype + 1) : -1;

    size_t elements = 1;
    char *number = (char *)skip_to(shape, "[");
    while (*number && *number != ']' && t->n_dims < 2) {
        t->shape[t->n_dims] = strtoull(number + 1, &number, 10);
        if (__builtin_mul_overflow(elements, t->shape[t->n_dims++], &elements)) die(name, "is too large");
    }
    if (t->dtype < 0 || t->n_dims == 0 || *number != ']') die(name, "has an unsupported dtype or shape");

    number = (char *)skip_to(span, "[");
    size_t from = *number ? strtoull(number + 1, &number, 10) : 0, to = *number ? strtoull(number + 1, NULL, 10) : 0;
    size_t size = t->dtype == RAST_F32 ? 4 : 2;
    if (from > to || to > data.size || (to - from) / size != elements || from % size)
        die(name, "does not lie inside the file");
    t->data = data.data + from;
    return close;
}

static int has_tensor(const rast_net *net, const char *name) {
    for (size_t i = 0; i < net->n_tensors; i++)
        if (!strcmp(net->tensors[i].name, name)) return 1;
    return 0;
}

static void read_tensors(const char *path, rast_net *net) {
    bytes file = map_file(path);
    uint64_t header = UINT64_MAX; /* little-endian, as this machine */
    if (file.size >= sizeof header) memcpy(&header, file.data, sizeof header);
    if (header > file.size - sizeof header) die(path, "truncated");
    bytes data = {file.data + sizeof header + header, file.size - sizeof header - header};
    if ((uintptr_t)data.data % 4) die(path, "the data is not aligned");
    char *text = json_text(file.data + sizeof header, header);

    size_t most = 0;
    for (const char *at = strstr(text, "data_offsets"); at; at = strstr(at + 1, "data_offsets")) most++;
    rast_tensor *tensors = allocate(most, sizeof *tensors);
    const char *at = skip_to(text, "\"");
    while (*at) {
        if (!strncmp(at, "\"__metadata__\"", 14))
            at = skip_to(at, "}");
        else if (net->n_tensors < most)
            at = read_tensor(at, data, path, &tensors[net->n_tensors++]);
        else
            die(path, "not a safetensors header");
        at = skip_to(at, "\"");
    }
    free(text);
    net->tensors = tensors;
}

static void read_net(const char *folder, rast_net *net) {
    char path[4096];
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    read_tensors(path, net);
    if (!net->n_tensors) die(path, "holds no tensor");
    net->name = folder;
    net->dtype = net->tensors[0].dtype;

    snprintf(path, sizeof path, "%s/config.json", folder);
    bytes file = map_file(path);
    char *text = json_text(file.data, file.size);
    munmap((void *)file.data, file.size);
    rast_config *c = &net->config;
    c->n_layers = (int32_t)json_number(text, "num_hidden_layers", 0);
    c->n_heads = (int32_t)json_number(text, "num_attention_heads", 0);
    c->n_kv_heads = (int32_t)json_number(text, "num_key_value_heads", c->n_heads);
    c->hidden_size = (int32_t)json_number(text, "hidden_size", 0);
    c->head_dim = (int32_t)json_number(text, "head_dim", c->n_heads > 0 ? c->hidden_size / c->n_heads : 0);
    c->intermediate_size = (int32_t)json_number(text, "intermediate_size", 0);
    c->vocab_size = (int32_t)json_number(text, "vocab_size", 0);
    c->max_context = (int32_t)json_number(text, "max_position_embeddings", 0);
    c->rms_norm_eps = (float)json_number(text, "rms_norm_eps", 1e-6);
    c->rope_theta = (float)json_number(text, "rope_theta", 10000);
    c->qkv_bias = has_tensor(net, "model.layers.0.self_attn.q_proj.bias");
    c->o_bias = has_tensor(net, "model.layers.0.self_attn.o_proj.bias");
    c->mlp_bias = has_tensor(net, "model.layers.0.mlp.up_proj.bias");
    c->qk_norm = has_tensor(net, "model.layers.0.self_attn.q_norm.weight");
    c->tie_word_embeddings = !has_tensor(net, "lm_head.weight");
    free(text);
}

/* ---- generation -------------------------------------------------------------------------------------------------- */

static int print_tokens(void *user, const rast_chunk *chunks, size_t n) {
    rast_error *failed = user;
    for (size_t i = 0; i < n; i++) {
        for (uint32_t t = 0; t < chunks[i].n; t++) printf("%d\n", (int)chunks[i].token[t]);
        if (chunks[i].error) *failed = *chunks[i].error;
    }
    fflush(stdout);
    return 0;
}

int main(int argc, char **argv) {
    int split = 1;
    while (split < argc && strcmp(argv[split], "--")) split++;
    size_t n_nets = split > 2 ? (size_t)split - 2 : 0, n_ids = split < argc ? (size_t)(argc - split - 1) : 0;
    if ((n_nets != 1 && n_nets != 3) || !n_ids) die("usage", "generate N base [expert antiexpert] -- id id id ...");

    rast_net nets[3] = {0};
    for (size_t m = 0; m < n_nets; m++) read_net(argv[2 + m], &nets[m]);
    int32_t *ids = allocate(n_ids, sizeof *ids);
    for (size_t i = 0; i < n_ids; i++) ids[i] = (int32_t)strtol(argv[split + 1 + (int)i], NULL, 10);

    rast_device cpu = {0};
    rast_vocab vocab = {0};
    rast_budget budget = {0};
    rast_model *model = NULL;
    rast_engine *engine = NULL;
    rast_error err = {0}, failed = {0};
    const float coef[] = {1, 1, -1};
    rast_request request = {
        .ids = ids,
        .n_ids = n_ids,
        .n_samples = 1,
        .coef = coef,
        .n_coef = n_nets,
        .sampling = {.temperature = 1, .top_p = 1, .repetition_penalty = 1},
        .stop = {.max_new = (int32_t)strtol(argv[1], NULL, 10)},
    };
    uint64_t id;
    int bad = rast_model_new(&cpu, nets, n_nets, &vocab, &model, &err) ||
              rast_engine_new(model, &budget, &engine, &err) || rast_engine_add(engine, &request, &id, &err) ||
              rast_engine_run(engine, print_tokens, &failed, &err);
    if (bad || failed.code) fprintf(stderr, "generate: %s\n", bad ? err.message : failed.message);

    rast_engine_free(engine);
    rast_model_free(model);
    for (size_t m = 0; m < n_nets; m++) {
        for (size_t t = 0; t < nets[m].n_tensors; t++) free((void *)nets[m].tensors[t].name);
        free((void *)nets[m].tensors);
    }
    free(ids);
    return bad || failed.code;
}
