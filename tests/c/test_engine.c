/* test_engine.c: the engine on a device that fails: every call of a run that can fail (memory, submission) fails once, and the
 * step is tried again. Tokens stay as they were, and every block comes back. All this with steps submitted one by one, and
 * with each submitted before the one before it is collected. */
#include "check.h"
#include "engine/engine.h"

#include <string.h>
#include <time.h>

enum { VOCAB = 61, HIDDEN = 32, HEADS = 2, HEAD_DIM = 16, INNER = 48, LAYERS = 2, N_NETS = 3, N_REQUESTS = 5 };
enum { MAX_NEW = 48, MAX_SAMPLES = 3, MANY_NETS = 11 };

/* ---- a device whose n-th call fails ------------------------------------------------------------------------------------ */

static long calls, fails_at; /* fails_at -1: never */
static int alloc_failed;
static int runs_first; /* submissions run before they fail, as one of CUDA does that cannot record its event */
static long n_waiting, most_waiting; /* submissions that nobody has waited for */

static int fails(rast_error *err) {
    if (calls++ != fails_at) return 0;
    rast_fail(err, RAST_ERR_MEMORY, "injected");
    return 1;
}

static int failing_alloc(rast_ctx *ctx, size_t bytes, int kind, rast_dev *out, rast_error *err) {
    *out = 0;
    if (!fails(err)) return rast_cpu_ops.alloc(ctx, bytes, kind, out, err);
    alloc_failed = 1;
    return RAST_ERR_MEMORY;
}

static int failing_submit(rast_queue *q, rast_event *event, rast_error *err) {
    if (fails(err)) {
        rast_event late;
        if (runs_first && !rast_cpu_ops.submit(q, &late, NULL)) rast_cpu_ops.wait(NULL, late, NULL);
        return RAST_ERR_MEMORY;
    }
    if (++n_waiting > most_waiting) most_waiting = n_waiting;
    return rast_cpu_ops.submit(q, event, err);
}

/* Fails after the work is done: what it wrote must not count. */
static int failing_wait(rast_ctx *ctx, rast_event event, rast_error *err) {
    n_waiting--;
    return fails(err) ? RAST_ERR_DEVICE : rast_cpu_ops.wait(ctx, event, err);
}

/* ---- three small nets --------------------------------------------------------------------------------------------------- */

static float *random_floats(size_t n) {
    float *x = malloc(n * sizeof *x);
    CHECK(x, "memory");
    for (size_t i = 0; i < n; i++) x[i] = uniform() / 2;
    return x;
}

typedef struct {
    char names[3 + 9 * LAYERS][64];
    rast_tensor tensors[3 + 9 * LAYERS];
    size_t n;
} weights;

static void add(weights *w, const char *name, size_t rows, size_t cols) {
    rast_tensor *t = &w->tensors[w->n];
    snprintf(w->names[w->n], sizeof *w->names, "%s", name);
    *t = (rast_tensor){.name = w->names[w->n++], .data = random_floats(rows * cols), .dtype = RAST_F32};
    t->n_dims = cols > 1 ? 2 : 1;
    t->shape[0] = rows;
    t->shape[1] = cols > 1 ? cols : 0;
}

static void make_weights(weights *w) {
    static const struct {
        const char *name;
        size_t rows, cols;
    } parts[] = {{"input_layernorm", HIDDEN, 1},
                 {"post_attention_layernorm", HIDDEN, 1},
                 {"self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN},
                 {"self_attn.k_proj", HEAD_DIM, HIDDEN},
                 {"self_attn.v_proj", HEAD_DIM, HIDDEN},
                 {"self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM},
                 {"mlp.gate_proj", INNER, HIDDEN},
                 {"mlp.up_proj", INNER, HIDDEN},
                 {"mlp.down_proj", HIDDEN, INNER}};
    w->n = 0;
    add(w, "model.embed_tokens.weight", VOCAB, HIDDEN);
    add(w, "model.norm.weight", HIDDEN, 1);
    for (int layer = 0; layer < LAYERS; layer++)
        for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
            char name[64];
            snprintf(name, sizeof name, "model.layers.%d.%s.weight", layer, parts[i].name);
            add(w, name, parts[i].rows, parts[i].cols);
        }
}

/* n nets, which take turns in using the weights. */
static rast_model *make_model(const weights w[N_NETS], size_t n) {
    rast_net nets[MANY_NETS];
    const rast_device device = {.n_threads = 2};
    rast_error err;
    rast_model *m;
    for (size_t i = 0; i < n; i++) {
        const weights *of = &w[i % N_NETS];
        nets[i] = (rast_net){.name = "net", .tensors = of->tensors, .n_tensors = of->n, .dtype = RAST_F32};
        nets[i].config = (rast_config){.n_layers = LAYERS,
                                       .n_heads = HEADS,
                                       .n_kv_heads = 1,
                                       .head_dim = HEAD_DIM,
                                       .hidden_size = HIDDEN,
                                       .intermediate_size = INNER,
                                       .vocab_size = VOCAB,
                                       .max_context = 4096,
                                       .rms_norm_eps = 1e-6f,
                                       .rope_theta = 1e4f,
                                       .tie_word_embeddings = 1};
    }
    CHECK(!rast_model_new(&device, nets, n, NULL, &m, &err), "%s", err.message);
    return m;
}

/* ---- runs --------------------------------------------------------------------------------------------------------------- */

typedef struct {
    int32_t token[MAX_NEW];
    size_t n;
    float prompt_logprob[128];
    size_t n_prompt;
} sequence;

typedef struct {
    sequence s[N_REQUESTS][MAX_SAMPLES];
    long n_failures;
    rast_engine_info info;
} outcome;

static int32_t prompt[N_REQUESTS][120];
static const size_t n_prompt[N_REQUESTS] = {70, 64, 90, 1, 75};
static int32_t n_draft; /* of every request; one of them has no net that could draw them */
static int plain;       /* requests that can run ahead, and end when nobody expects it */

static void add_requests(rast_engine *e) {
    static const float coef[N_REQUESTS][N_NETS] = {{1, 1, -1}, {1, 1, -1}, {1, 0, 0}, {1, 1, 0}, {1, 1, -1}};
    rast_error err;
    for (size_t i = 0; i < N_REQUESTS; i++) {
        const int32_t suppressed = 3, eos = 2;
        const rast_request r = {
            .ids = prompt[i],
            .n_ids = n_prompt[i],
            .tag = i,
            .seed = i,
            .n_samples = 1 + (uint32_t)i % MAX_SAMPLES,
            .coef = coef[i],
            .n_coef = N_NETS,
            .transfer_start = i == 1 ? 3 : 0,
            .sampling = {.do_sample = 1,
                         .temperature = 1,
                         .top_p = 1,
                         .repetition_penalty = i == 0 && !plain ? 1.3f : 1,
                         .suppress = &suppressed,
                         .n_suppress = i == 3},
            .stop = {.eos = &eos, .n_eos = (size_t)plain, .max_new = i == 4 ? 1 : MAX_NEW - 6 * (int32_t)i},
            .n_draft = n_draft,
            .draft_net = 1,
            .want = i == 4 ? RAST_WANT_PROMPT | RAST_WANT_LOGPROBS | RAST_WANT_LOGITS : 0};
        CHECK(!rast_engine_add(e, &r, NULL, &err), "%s", err.message);
    }
}

static void take_chunks(outcome *out, const rast_chunk *chunks, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const rast_chunk *c = &chunks[i];
        sequence *s = &out->s[c->tag][c->sample];
        CHECK(c->finish != RAST_FINISH_ERROR, "%s", c->error->message);
        if (c->prompt) {
            CHECK(c->position == s->n_prompt, "prompt rows at %u, not %zu", c->position, s->n_prompt);
            memcpy(s->prompt_logprob + s->n_prompt, c->logprob, c->n * sizeof(float));
            s->n_prompt += c->n;
        } else {
            CHECK(c->position == s->n, "tokens at %u, not %zu", c->position, s->n);
            memcpy(s->token + s->n, c->token, c->n * sizeof(int32_t));
            s->n += c->n;
        }
    }
}

/* All requests on a new engine; the failing call is the n-th after the engine was made. */
static void run(rast_model *m, size_t n_blocks, long n, outcome *out) {
    const rast_budget budget = {.kv_bytes = n_blocks * N_NETS * rast_kv_block_bytes(&m->nets[0]), .max_rows = 48};
    rast_engine *e;
    rast_error err;
    memset(out, 0, sizeof *out);
    fails_at = -1;
    CHECK(!rast_engine_new(m, &budget, &e, &err), "%s", err.message);
    add_requests(e);
    calls = alloc_failed = 0;
    most_waiting = n_waiting = 0;
    fails_at = n;
    while (rast_engine_busy(e)) {
        const rast_chunk *chunks;
        size_t n_chunks;
        if (rast_engine_step(e, &chunks, &n_chunks, &err))
            CHECK(++out->n_failures <= 1, "%s", err.message);
        else
            take_chunks(out, chunks, n_chunks);
    }
    rast_engine_get_info(e, &out->info);
    CHECK(out->info.n_free == n_blocks, "%zu of %zu blocks came back", out->info.n_free, n_blocks);
    for (size_t b = 0; b < n_blocks; b++) CHECK(e->blocks.block[b].refs == 0, "block %zu is held", b);
    rast_engine_free(e);
    CHECK(!n_waiting, "%ld submissions were not waited for", n_waiting);
}

/* One request, and its tokens. */
static void run_alone(rast_engine *e, const rast_request *r, sequence *out) {
    rast_error err;
    out->n = 0;
    CHECK(!rast_engine_add(e, r, NULL, &err), "%s", err.message);
    while (rast_engine_busy(e)) {
        const rast_chunk *chunks;
        size_t n;
        CHECK(!rast_engine_step(e, &chunks, &n, &err), "%s", err.message);
        for (size_t i = 0; i < n; i++) {
            CHECK(chunks[i].finish != RAST_FINISH_ERROR, "%s", chunks[i].error->message);
            memcpy(out->token + out->n, chunks[i].token, chunks[i].n * sizeof(int32_t));
            out->n += chunks[i].n;
        }
        CHECK(e->n_views <= RAST_MAX_VIEWS + 2 * MANY_NETS, "%zu views are kept", e->n_views);
    }
}

/* Requests that each run another set of nets: what the engine keeps of a set is bounded, and nothing shows of that. */
static void test_many_sets_of_nets(const weights w[N_NETS]) {
    rast_model *m = make_model(w, MANY_NETS);
    rast_engine *old, *fresh;
    rast_error err;
    size_t n_dropped = 0, before = 0;
    CHECK(!rast_engine_new(m, NULL, &old, &err), "%s", err.message);
    for (unsigned set = 0; set < 1u << (MANY_NETS - 1); set++) {
        float coef[MANY_NETS] = {1};
        sequence got, want;
        for (unsigned net = 1; net < MANY_NETS; net++) coef[net] = set >> (net - 1) & 1 ? 0.1f * (float)net : 0;
        const rast_request r = {.ids = prompt[set % N_REQUESTS],
                                .n_ids = 1 + set % 5,
                                .n_samples = 1,
                                .coef = coef,
                                .n_coef = MANY_NETS,
                                .sampling = {.temperature = 1, .top_p = 1, .repetition_penalty = 1},
                                .stop = {.max_new = 3}};
        run_alone(old, &r, &got);
        n_dropped += old->n_views < before;
        before = old->n_views;
        if (set % 41) continue;
        CHECK(!rast_engine_new(m, NULL, &fresh, &err), "%s", err.message);
        run_alone(fresh, &r, &want);
        CHECK(got.n == 3 && want.n == 3 && !memcmp(got.token, want.token, 3 * sizeof *got.token), "set %u", set);
        rast_engine_free(fresh);
    }
    CHECK(n_dropped >= 2, "views were dropped %zu times", n_dropped);
    rast_engine_free(old);
    rast_model_free(m);
}

static int little_memory(rast_ctx *ctx, rast_memory *out, rast_error *err) {
    (void)ctx, (void)err;
    *out = (rast_memory){.free = 100000};
    return RAST_OK;
}

/* A budget that the machine cannot pay for, or that pays for nothing, is refused with what would do. */
static void test_budgets(rast_model *m) {
    const size_t block = N_NETS * rast_kv_block_bytes(&m->nets[0]), most = 100000 / block;
    const rast_ops *before = m->ops;
    rast_ops ops = *before;
    rast_engine *e;
    rast_error err;
    char room[64];
    ops.memory = little_memory;
    m->ops = &ops;
    for (size_t n = most - 1; n <= most + 1; n++) {
        const rast_budget budget = {.kv_bytes = n * block};
        CHECK((rast_engine_new(m, &budget, &e, &err) == RAST_ERR_MEMORY) == (n > most), "%zu blocks", n);
        if (n <= most) rast_engine_free(e);
    }
    snprintf(room, sizeof room, "room for %zu tokens", most * RAST_BLOCK_TOKENS);
    CHECK(strstr(err.message, room), "%s", err.message);
    const rast_budget nothing = {.kv_bytes = block - 1};
    CHECK(rast_engine_new(m, &nothing, &e, &err) == RAST_ERR_MEMORY, "less than a block");
    snprintf(room, sizeof room, "32 tokens of all models take %zu", block);
    CHECK(strstr(err.message, room), "%s", err.message);
    m->ops = before;
}

/* A run with room for all, and one in which samples give way to others: their tokens, whatever fails. */
static void test_failures(rast_model *m, const outcome *want, outcome *got) {
    run(m, 200, -1, got);
    const long n_roomy = calls;
    CHECK(!memcmp(got->s, want->s, sizeof got->s), "%d drafts give other tokens", n_draft);
    CHECK((got->info.accepted > 0 && got->info.rejected > 0 && got->info.draft_steps > 0) == (n_draft > 0), "drafts");
    run(m, 6, -1, got);
    const long n_tight = calls;
    long n_without = 0; /* memory for drafts failed: the step goes on without */
    CHECK(got->info.preempted > 0 && got->info.evicted > 0, "a tight run preempts and evicts");
    CHECK(!memcmp(got->s, want->s, sizeof got->s), "a tight run gives other tokens");
    for (long n = 0; n < n_tight; n++) {
        run(m, 6, n, got);
        n_without += alloc_failed && !got->n_failures;
        CHECK(got->n_failures == 1 || alloc_failed, "call %ld did not fail the step", n);
        CHECK(!memcmp(got->s, want->s, sizeof got->s), "other tokens after call %ld failed", n);
    }
    CHECK((n_without > 0) == (n_draft > 0), "%ld failures did not show, with %d drafts", n_without, n_draft);
    for (long n = 0; n < n_roomy; n += 9) {
        run(m, 200, n, got);
        CHECK(!memcmp(got->s, want->s, sizeof got->s), "other tokens after call %ld failed", n);
    }
}

/* The same, a step ahead: what fails of such a step is made up for by the next call. */
static void test_running_ahead(rast_model *m, rast_ops *ops, outcome *want, outcome *got) {
    plain = 1;
    ops->asynchronous = 0;
    run(m, 200, -1, want);
    CHECK(most_waiting == 2, "%ld submissions at once, one by one", most_waiting);
    ops->asynchronous = 1;
    long n_silent = 0, n_told = 0;
    for (size_t n_blocks = 200; n_blocks; n_blocks = n_blocks > 5 ? 5 : 0) {
        run(m, n_blocks, -1, got);
        const long n_calls = calls;
        CHECK(most_waiting == 4, "%ld submissions at once, a step ahead", most_waiting);
        CHECK(!memcmp(got->s, want->s, sizeof got->s), "other tokens a step ahead, %zu blocks", n_blocks);
        CHECK((got->info.preempted > 0) == (n_blocks == 5), "%d were preempted", (int)got->info.preempted);
        for (long n = 0; n < n_calls; n += n_blocks == 5 ? 1 : 5) {
            run(m, n_blocks, n, got);
            *(got->n_failures ? &n_told : &n_silent) += 1;
            CHECK(!memcmp(got->s, want->s, sizeof got->s), "other tokens a step ahead after call %ld failed", n);
        }
        runs_first = 1; /* what it drew, for the step behind the one that is collected, must not count */
        for (long n = 0; n < n_calls && n_blocks == 200; n += 3) {
            run(m, n_blocks, n, got);
            CHECK(!memcmp(got->s, want->s, sizeof got->s), "other tokens after call %ld ran and failed", n);
        }
        runs_first = 0;
    }
    CHECK(n_told > n_silent && n_silent > 0, "%ld failures were told, %ld not", n_told, n_silent);
    plain = 0;
}

/* Seconds of steps by what they did, the least of all widths that are known. */
static float least_seconds(const rast_costs *c, rast_pace_kind kind) {
    float least = 1e9f;
    for (size_t i = 0; i < RAST_PACE_WIDTHS; i++)
        if (c->step[kind][i].times > 1) least = fminf(least, c->step[kind][i].cost * c->slowness);
    return least;
}

/* The engine chooses how many drafts, on a device that has the next step while this one is collected, for a host that takes far
 * longer than the device. What a sample waits for from step to step is in the costs; drafts are tried as often as they would be
 * with steps one by one. */
static void test_pace(rast_model *m, rast_ops *ops) {
    enum { STEPS = 700, HOST_NS = 1000000 };
    static const float coef[N_NETS] = {1, 1, -1}, alone[N_NETS] = {1};
    const float host = HOST_NS * 1e-9f;
    const rast_request r = {.ids = prompt[0],
                            .n_ids = 9,
                            .n_samples = 1,
                            .coef = coef,
                            .n_coef = N_NETS,
                            .sampling = {.do_sample = 1, .temperature = 1, .top_p = 1, .repetition_penalty = 1},
                            .stop = {.max_new = 4000},
                            .n_draft = RAST_DRAFT_AUTO,
                            .draft_net = 1};
    rast_request other = r; /* of the base alone, which asks for no drafts: its steps say nothing about these */
    other.coef = alone;
    other.n_draft = 0;
    other.stop.max_new = MAX_NEW;
    for (int is_slow = 0; is_slow < 2; is_slow++) { /* the host */
        rast_engine *e;
        rast_error err;
        uint64_t id;
        size_t last = 0, longest = 0;
        fails_at = -1;
        ops->asynchronous = 1;
        CHECK(!rast_engine_new(m, NULL, &e, &err), "%s", err.message);
        CHECK(!rast_engine_add(e, &r, &id, &err), "%s", err.message);
        for (size_t step = 1; step <= STEPS && rast_engine_busy(e); step++) {
            const rast_chunk *chunks;
            size_t n;
            CHECK(!rast_engine_step(e, &chunks, &n, &err), "%s", err.message);
            CHECK(n == 1, "%zu chunks", n);
            CHECK(!chunks->n_drafted || last || step < 16, "the first draft in step %zu", step);
            if (chunks->n_drafted) last = step;
            if (step - last > longest) longest = step - last;
            if (is_slow) nanosleep(&(struct timespec){.tv_nsec = HOST_NS}, NULL);
        }
        CHECK(longest < 300, "no draft in %zu steps", longest);
        const rast_costs *c = &e->pace.costs[0];
        const float plain = least_seconds(c, RAST_PACE_PLAIN), check = least_seconds(c, RAST_PACE_CHECK);
        if (is_slow)
            CHECK(plain > 0.9f * host && check > 0.9f * host, "plain %g s, with drafts %g s, host %g s", plain, check,
                  host);
        const rast_costs before = *c;
        sequence got;
        rast_engine_discard(e, id);
        run_alone(e, &other, &got);
        CHECK(!memcmp(before.step, c->step, sizeof before.step), "steps of other nets count");
        rast_engine_free(e);
    }
}

/* Passes that drew drafts for a step that failed are not taken off the time of a later one. */
static void test_time_of_a_failed_step(rast_model *m) {
    static const float coef[N_NETS] = {1, 1, -1};
    const rast_request r = {.ids = prompt[0],
                            .n_ids = 9,
                            .n_samples = 1,
                            .coef = coef,
                            .n_coef = N_NETS,
                            .sampling = {.top_p = 1, .repetition_penalty = 1},
                            .stop = {.max_new = 200},
                            .n_draft = 3,
                            .draft_net = 1};
    rast_engine *e;
    rast_error err;
    uint64_t id;
    const rast_chunk *chunks;
    size_t n;
    fails_at = -1;
    CHECK(!rast_engine_new(m, NULL, &e, &err), "%s", err.message);
    CHECK(!rast_engine_add(e, &r, &id, &err), "%s", err.message);
    for (int i = 0; i < 8; i++) {
        calls = 0;
        CHECK(!rast_engine_step(e, &chunks, &n, &err), "%s", err.message);
    }
    fails_at = calls - 1; /* the wait for the check */
    calls = 0;
    CHECK(rast_engine_step(e, &chunks, &n, &err) && e->pace.drawing > 0, "a check that fails");
    fails_at = calls = 0;
    CHECK(rast_engine_step(e, &chunks, &n, &err) && e->pace.drawing == 0, "%g s of a step that failed",
          e->pace.drawing);
    fails_at = -1;
    rast_engine_free(e);
}

typedef struct {
    int32_t token[2 * N_REQUESTS][MAX_NEW];
    size_t n[2 * N_REQUESTS];
    int finish[2 * N_REQUESTS];
} mixed;

/* Requests come, are cancelled and discarded while steps are on their way. */
static void run_mixed(rast_model *m, unsigned seed, mixed *out) {
    static const float coef[N_NETS] = {1, 1, -1};
    const rast_budget budget = {.kv_bytes = 12 * N_NETS * rast_kv_block_bytes(&m->nets[0]), .max_seqs = 6};
    uint64_t id[2 * N_REQUESTS];
    size_t n_added = 0, step = 0;
    rast_engine *e;
    rast_error err;
    memset(out, 0, sizeof *out);
    fails_at = -1;
    n_waiting = 0;
    CHECK(!rast_engine_new(m, &budget, &e, &err), "%s", err.message);
    for (; n_added < 2 * N_REQUESTS || rast_engine_busy(e); step++) {
        const rast_chunk *chunks;
        size_t n;
        if (n_added < 2 * N_REQUESTS && step % 5 == seed % 5) {
            const rast_request r = {.ids = prompt[n_added % N_REQUESTS],
                                    .n_ids = 1 + (n_added * 13 + seed) % 60,
                                    .tag = n_added,
                                    .seed = seed,
                                    .n_samples = 1,
                                    .coef = coef,
                                    .n_coef = N_NETS,
                                    .transfer_start = n_added % 3 == 1 ? 4 : 0,
                                    .sampling = {.do_sample = 1, .temperature = 1, .top_p = 1, .repetition_penalty = 1},
                                    .stop = {.max_new = n_added % 4 == 3 ? 5 : MAX_NEW}};
            CHECK(!rast_engine_add(e, &r, &id[n_added++], &err), "%s", err.message);
        }
        if (step == 17 + seed % 7) rast_engine_cancel(e, id[1]);
        if (step == 12 + seed % 9) rast_engine_discard(e, id[0]);
        if (step == 20) rast_engine_interrupt(e);
        const int status = rast_engine_step(e, &chunks, &n, &err);
        CHECK(status == (step == 20 ? RAST_ERR_INTERRUPTED : RAST_OK), "%s", err.message);
        for (size_t i = 0; i < n; i++) {
            const rast_chunk *c = &chunks[i];
            CHECK(c->position == out->n[c->tag], "tokens at %u, not %zu", c->position, out->n[c->tag]);
            if (c->n) memcpy(out->token[c->tag] + out->n[c->tag], c->token, c->n * sizeof(int32_t));
            out->n[c->tag] += c->n;
            out->finish[c->tag] = c->finish;
        }
    }
    rast_engine_info info;
    rast_engine_get_info(e, &info);
    CHECK(info.n_free == info.n_blocks, "%zu of %zu blocks came back", info.n_free, info.n_blocks);
    rast_engine_free(e);
    CHECK(!n_waiting, "%ld submissions were not waited for", n_waiting);
}

static void test_mixed(rast_model *m, rast_ops *ops) {
    mixed *want = malloc(sizeof *want), *got = malloc(sizeof *got);
    CHECK(want && got, "memory");
    for (unsigned seed = 0; seed < 30; seed++) {
        ops->asynchronous = 0;
        run_mixed(m, seed, want);
        ops->asynchronous = 1;
        most_waiting = 0;
        run_mixed(m, seed, got);
        CHECK(most_waiting == 4, "%ld submissions at once", most_waiting);
        for (size_t i = 0; i < 2 * N_REQUESTS; i++) {
            const size_t n = want->n[i] < got->n[i] ? want->n[i] : got->n[i];
            CHECK(!memcmp(want->token[i], got->token[i], n * sizeof(int32_t)), "other tokens of request %zu", i);
            CHECK(want->finish[i] == got->finish[i], "request %zu ends by %d, not %d", i, got->finish[i],
                  want->finish[i]);
            CHECK(i < 2 || want->n[i] == got->n[i], "%zu tokens of request %zu, not %zu", got->n[i], i, want->n[i]);
        }
        CHECK(got->finish[1] == RAST_FINISH_CANCELLED && got->n[1] > 0 && got->n[0] > 0, "cancelled while it runs");
    }
    free(want);
    free(got);
}

int main(void) {
    weights w[N_NETS];
    for (int i = 0; i < N_NETS; i++) make_weights(&w[i]);
    rast_model *m = make_model(w, N_NETS);
    rast_ops ops = rast_cpu_ops;
    outcome *roomy = malloc(sizeof *roomy), *got = malloc(sizeof *got);
    CHECK(roomy && got, "memory");
    ops.alloc = failing_alloc;
    ops.submit = failing_submit;
    ops.wait = failing_wait;
    m->ops = &ops;
    for (size_t i = 0; i < N_REQUESTS; i++)
        for (size_t j = 0; j < n_prompt[i]; j++) /* a common header of 50 tokens */
            prompt[i][j] = (int32_t)((j < 50 ? j * j : j * j + i * 7) % VOCAB);

    run(m, 200, -1, roomy);
    CHECK(roomy->info.preempted == 0 && roomy->info.reused > 0, "a roomy run reuses and preempts nobody");
    for (n_draft = 0; n_draft <= 4; n_draft += 4) test_failures(m, roomy, got);
    n_draft = 0;
    test_running_ahead(m, &ops, roomy, got);
    test_mixed(m, &ops);
    test_pace(m, &ops);
    test_time_of_a_failed_step(m);
    test_budgets(m);
    test_many_sets_of_nets(w);
    free(roomy);
    free(got);
    rast_model_free(m);
    for (int i = 0; i < N_NETS; i++)
        for (size_t t = 0; t < w[i].n; t++) free((void *)w[i].tensors[t].data);
    return 0;
}
