/* test_cpu_ops.c: kernels, ops and thread pool of the CPU backend against plain loops in double precision, on every ISA of
 * this machine; and the promise that a result's bits depend on neither tile, batch, chunk nor thread count.
 *
 * Inputs of kernels lie in memory of exactly their size at addresses aligned to no more than their element, so that a
 * sanitizer sees every read too far.
 */
#include "../../csrc/backends/cpu/cpu.h"
#include "check.h"

#include <fenv.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BLOCK = RAST_BLOCK_TOKENS, MAX_DIM = 512 };

static const char *const type_names[] = {"f32", "bf16", "f16"};

static size_t size_of(int32_t type) { return type == RAST_F32 ? 4 : 2; }

/* ---- arrays of any type, and their values in double -------------------------------------------------------------- */

static double value_of(const void *p, size_t i, int32_t type) {
    if (type == RAST_F32) {
        float f;
        memcpy(&f, (const char *)p + 4 * i, 4);
        return f;
    }
    uint16_t h;
    memcpy(&h, (const char *)p + 2 * i, 2);
    if (type == RAST_BF16) {
        const uint32_t bits = (uint32_t)h << 16;
        float f;
        memcpy(&f, &bits, 4);
        return f;
    }
    return half_value(h);
}

typedef struct { /* n elements that begin one element behind an allocation's begin and end where it ends */
    char *memory, *data;
    size_t n;
    int32_t type;
} array;

static array array_new(size_t n, int32_t type) {
    const size_t size = size_of(type);
    array a = {.memory = calloc(n + 1, size), .n = n, .type = type};
    CHECK(a.memory, "out of memory");
    a.data = a.memory + size;
    return a;
}

static array array_random(size_t n, int32_t type, const cpu_kernels *k) {
    array a = array_new(n, type);
    for (size_t i = 0; i < n; i++) {
        const float x = uniform();
        k->store(&x, a.data + i * size_of(type), 1, type);
    }
    return a;
}

static double at(const array *a, size_t i) { return value_of(a->data, i, a->type); }
static float *floats(const array *a) { return (float *)(void *)a->data; }
static void array_free(array *a) { free(a->memory); }

/* Half of the distance between a type's numbers near x, and a little. */
static double rounding(double x, int32_t type) {
    if (type == RAST_F32) return 0;
    return fabs(x) * (type == RAST_BF16 ? 0x1.01p-8 : 0x1.01p-11) + 0x1p-25;
}

static int close_to(double got, double want, double tolerance) { return fabs(got - want) <= tolerance; }

/* ---- kernels ----------------------------------------------------------------------------------------------------- */

static void test_store(const cpu_kernels *k) {
    for (int32_t type = RAST_BF16; type <= RAST_F16; type++) {
        uint16_t in[65536], back[65536];
        static float f[65536];
        for (uint32_t i = 0; i < 65536; i++) in[i] = (uint16_t)i;
        k->load(in, f, 65536, type);
        k->store(f, back, 65536, type);
        for (uint32_t i = 0; i < 65536; i++) {
            const double want = value_of(in, i, type);
            CHECK(isnan(want) ? isnan(f[i]) && isnan(value_of(back, i, type)) : f[i] == want && back[i] == in[i],
                  "%s bits %x", type_names[type], i);
        }
        for (int i = 0; i < 20000; i++) { /* to the nearest, ties to even */
            const uint32_t bits = (uint32_t)rng();
            float x;
            memcpy(&x, &bits, 4);
            if (i % 4 == 0) x = ldexpf(uniform(), (int)below(50) - 30);
            if (i % 8 == 1) { /* halfway */
                const uint16_t h = (uint16_t)below(0x7bff), next = (uint16_t)(h + 1);
                const double middle = (value_of(&h, 0, type) + value_of(&next, 0, type)) / 2;
                x = (float)middle;
            }
            uint16_t got;
            k->store(&x, &got, 1, type);
            const double y = value_of(&got, 0, type);
            if (isnan(x)) {
                CHECK(isnan(y), "NaN");
            } else if (isinf(y)) {
                CHECK(fabs(x) >= (type == RAST_F16 ? 65520.0 : 0x1.ffp127), "%g became infinite", x);
                CHECK((x > 0) == (y > 0), "sign of %g", x);
            } else {
                const uint16_t up = (uint16_t)(got + 1), down = (uint16_t)(got - 1);
                const double step_up = fabs(value_of(&up, 0, type) - x), step = fabs(y - x);
                const double step_down = (got & 0x7fff) ? fabs(value_of(&down, 0, type) - x) : INFINITY;
                CHECK(step <= step_up && step <= step_down, "%a became %a", x, y);
                CHECK((step != step_up && step != step_down) || got % 2 == 0, "tie of %a became %a", x, y);
                CHECK(!signbit(x) == !signbit(y), "sign of %a", x);
            }
        }
    }
}

static void test_dot(const cpu_kernels *k) {
    static const size_t depths[] = {1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 100, 576, 3100, 6500};
    for (int32_t wt = 0; wt < RAST_N_DTYPES; wt++)
        for (int32_t xt = 0; xt < RAST_N_DTYPES; xt++)
            for (size_t d = 0; d < sizeof depths / sizeof *depths; d++)
                for (int round = 0; round < (depths[d] < 1000 ? 4 : depths[d] < 4000 ? 2 : 1); round++) {
                    const size_t depth = depths[d];
                    size_t n_out = 1 + below(depth < 1000 ? 19 : 70),
                           n_rows = 1 + below(depth < 1000 && round ? 45 : 13);
                    if (depth > 1000 && round)
                        n_out = 65 + below(10), n_rows = 13 + below(16); /* several of all parts */
                    if (depth == 576 && round == 3)
                        n_out = 540 + below(10), n_rows = 22 + below(3); /* several strips and blocks of whole rows */
                    const size_t y_stride = n_out + below(3);
                    array w = array_random(n_out * depth, wt, k), x = array_random(n_rows * depth, xt, k);
                    array y = array_new(n_rows * y_stride, RAST_F32), one = array_new(1, RAST_F32);
                    const cpu_dot_fn dot = k->dot[wt][xt];
                    for (size_t i = 0; i < y.n; i++) floats(&y)[i] = 777;
                    dot(w.data, depth * size_of(wt), 0, n_out, x.data, depth * size_of(xt), n_rows, depth, floats(&y),
                        y_stride);
                    for (size_t r = 0; r < n_rows; r++)
                        for (size_t o = 0; o < y_stride && r * y_stride + o < y.n; o++) {
                            double want = 0, scale = 0;
                            const float got = floats(&y)[r * y_stride + o];
                            if (o >= n_out) {
                                CHECK(got == 777, "wrote beyond the output's %zu columns", n_out);
                                continue;
                            }
                            for (size_t i = 0; i < depth; i++) {
                                const double p = at(&w, o * depth + i) * at(&x, r * depth + i);
                                want += p;
                                scale += fabs(p);
                            }
                            CHECK(close_to(got, want, scale * 1e-6 + 1e-30), "%s x %s, k = %zu: %g, not %g",
                                  type_names[wt], type_names[xt], depth, got, want);
                            dot(w.data, depth * size_of(wt), o, 1, x.data + r * depth * size_of(xt),
                                depth * size_of(xt), 1, depth, floats(&one), 1);
                            CHECK(memcmp(&got, one.data, 4) == 0, "%s x %s, k = %zu, [%zu, %zu]: bits differ alone",
                                  type_names[wt], type_names[xt], depth, n_out, n_rows);
                        }
                    array_free(&w), array_free(&x), array_free(&y), array_free(&one);
                }
}

static void test_norm(const cpu_kernels *k) {
    static const size_t sizes[] = {1, 5, 16, 24, 64, 100, 576};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
        for (int32_t wt = 0; wt < RAST_N_DTYPES; wt++)
            for (int32_t yt = 0; yt < RAST_N_DTYPES; yt++)
                for (int add = 0; add < 2; add++) {
                    const size_t n = sizes[s];
                    array x = array_random(n, RAST_F32, k), more = array_random(n, RAST_F32, k);
                    array w = array_random(n, wt, k), y = array_new(n, yt), sum = array_new(n, RAST_F32);
                    double squares = 0;
                    for (size_t i = 0; i < n; i++) {
                        floats(&sum)[i] = add ? floats(&x)[i] + floats(&more)[i] : floats(&x)[i];
                        squares += at(&sum, i) * at(&sum, i);
                    }
                    k->norm(floats(&x), add ? floats(&more) : NULL, w.data, wt, n, 1e-6f, y.data, yt);
                    CHECK(memcmp(x.data, sum.data, 4 * n) == 0, "x is not x + add");
                    for (size_t i = 0; i < n; i++) {
                        const double want = at(&sum, i) / sqrt(squares / (double)n + 1e-6) * at(&w, i);
                        CHECK(close_to(at(&y, i), want, rounding(want, yt) + 1e-6 * fabs(want)), "%g, not %g",
                              at(&y, i), want);
                    }
                    if (yt == RAST_F32) { /* in place */
                        k->norm(floats(&x), NULL, w.data, wt, n, 1e-6f, x.data, yt);
                        CHECK(memcmp(x.data, y.data, 4 * n) == 0, "in place differs");
                    }
                    array_free(&x), array_free(&more), array_free(&w), array_free(&y), array_free(&sum);
                }
}

static void test_glu_and_rope(const cpu_kernels *k) {
    for (size_t n = 1; n < 70; n += 3)
        for (int32_t yt = 0; yt < RAST_N_DTYPES; yt++) {
            array g = array_random(n, RAST_F32, k), u = array_random(n, RAST_F32, k), y = array_new(n, yt);
            for (size_t i = 0; i < n; i++) floats(&g)[i] *= i % 5 ? 8 : 300;
            k->glu(floats(&g), floats(&u), n, y.data, yt);
            for (size_t i = 0; i < n; i++) {
                const double want = at(&g, i) / (1 + exp(-at(&g, i))) * at(&u, i);
                CHECK(close_to(at(&y, i), want, rounding(want, yt) + 1e-6 * fabs(want) + 1e-30), "%g, not %g",
                      at(&y, i), want);
            }
            array_free(&g), array_free(&u), array_free(&y);
        }
    for (size_t dim = 2; dim <= 130; dim += 2)
        for (int32_t interleaved = 0; interleaved < 2; interleaved++) {
            array x = array_random(dim, RAST_F32, k), t = array_random(dim, RAST_F32, k), y = array_new(dim, RAST_F32);
            memcpy(y.data, x.data, 4 * dim);
            k->rope(floats(&y), floats(&t), dim, interleaved);
            for (size_t i = 0; i < dim / 2; i++) {
                const size_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + dim / 2;
                const double c = at(&t, 2 * i), s = at(&t, 2 * i + 1);
                CHECK(close_to(at(&y, a), at(&x, a) * c - at(&x, b) * s, 3e-7), "rope of %zu", dim);
                CHECK(close_to(at(&y, b), at(&x, b) * c + at(&x, a) * s, 3e-7), "rope of %zu", dim);
            }
            array_free(&x), array_free(&t), array_free(&y);
        }
}

static void test_exp(const cpu_kernels *k) {
    enum { N = 1 << 16 };
    static float x[N], e[N], one[CPU_LANES], alone[CPU_LANES];
    for (size_t i = 0; i < N; i++) x[i] = -87.0f + 175.0f * (float)i / N;
    for (size_t i = 0; i < 1000; i++) x[i] = uniform() * 1e-3f;
    x[N - 1] = -INFINITY, x[N - 2] = -1e30f, x[N - 3] = 0;
    k->exp(x, e, N);
    for (size_t i = 0; i < N - 3; i++) {
        const double want = exp((double)x[i]);
        CHECK(close_to(e[i], want, 2e-7 * want), "exp(%g) = %g, not %g", x[i], e[i], want);
    }
    CHECK(e[N - 1] == 0 && e[N - 2] == 0 && e[N - 3] == 1, "%g %g %g", e[N - 1], e[N - 2], e[N - 3]);
    for (size_t i = 0; i < 500; i++) {
        const size_t from = below(N), lane = below(CPU_LANES);
        for (size_t j = 0; j < CPU_LANES; j++) one[j] = uniform();
        one[lane] = x[from];
        k->exp(one, alone, CPU_LANES);
        CHECK(memcmp(&alone[lane], &e[from], 4) == 0, "exp depends on the lane");
    }
    one[3] = NAN;
    k->exp(one, alone, CPU_LANES);
    CHECK(isnan(alone[3]), "NaN is lost");
}

static void stats_clear(cpu_stats *s) {
    memset(s, 0, sizeof *s);
    for (size_t i = 0; i < CPU_LANES; i++) s->max_t[i] = s->max_b[i] = -INFINITY;
}

static void test_stats(const cpu_kernels *k) {
    enum { N = 96 * CPU_LANES };
    static float t[N], b[N];
    for (int round = 0; round < 30; round++) {
        const double hidden = round % 3 * 0.45; /* share of ids that are -inf */
        for (size_t i = 0; i < N; i++) {
            t[i] = uniform() * 20, b[i] = uniform() * 20;
            if ((double)below(1000) < 1000 * hidden || (round % 3 && i < 40)) t[i] = -INFINITY;
            if ((double)below(1000) < 500 * hidden || (round % 3 == 2 && i % CPU_LANES == 5)) b[i] = -INFINITY;
        }
        cpu_stats whole, parts, alone;
        stats_clear(&whole), stats_clear(&parts), stats_clear(&alone);
        k->tile_stats(t, b, N, &whole);
        k->tile_stats(t, NULL, N, &alone);
        for (size_t i = 0, n; i < N; i += n) {
            n = CPU_LANES * (1 + below(5));
            if (n > N - i) n = N - i;
            k->tile_stats(t + i, b + i, n, &parts);
        }
        CHECK(memcmp(&whole, &parts, sizeof whole) == 0, "statistics depend on the tiles");
        CHECK(memcmp(whole.max_t, alone.max_t, sizeof whole.max_t) == 0, "max without base");
        CHECK(memcmp(whole.sum_t, alone.sum_t, sizeof whole.sum_t) == 0, "sum without base");
        for (size_t lane = 0; lane < CPU_LANES; lane++) {
            float max_t = -INFINITY, max_b = -INFINITY;
            double sum_t = 0, sum_b = 0, dif = 0, size = 0;
            for (size_t i = lane; i < N; i += CPU_LANES) max_t = fmaxf(max_t, t[i]), max_b = fmaxf(max_b, b[i]);
            for (size_t i = lane; i < N; i += CPU_LANES) {
                if (t[i] != -INFINITY) sum_t += exp((double)t[i] - max_t);
                if (b[i] != -INFINITY) sum_b += exp((double)b[i] - max_b);
                if (t[i] == -INFINITY || b[i] == -INFINITY) continue;
                const double term = exp((double)t[i] - max_t) * ((double)t[i] - b[i]);
                dif += term;
                size += fabs(term);
            }
            CHECK(whole.max_t[lane] == max_t && whole.max_b[lane] == max_b, "maxima");
            CHECK(close_to(whole.sum_t[lane], sum_t, 1e-5 * sum_t), "%g, not %g", whole.sum_t[lane], sum_t);
            CHECK(close_to(whole.sum_b[lane], sum_b, 1e-5 * sum_b), "%g, not %g", whole.sum_b[lane], sum_b);
            CHECK(close_to(whole.dif_t[lane], dif, 1e-5 * size), "%g, not %g", whole.dif_t[lane], dif);
        }
    }
}

static void test_random(const cpu_kernels *k) {
    for (size_t n = CPU_LANES; n <= 20 * CPU_LANES; n += CPU_LANES) {
        const uint64_t stream = rng();
        const uint32_t position = (uint32_t)rng(), first = (uint32_t)below(1u << 20) * 4;
        uint32_t got[20 * CPU_LANES], want[4];
        k->random(stream, position, first, n, got);
        for (size_t i = 0; i < n; i += 4) {
            rast_philox(stream, (first + (uint32_t)i) / 4, position, want);
            CHECK(memcmp(got + i, want, sizeof want) == 0, "bits of id %u + %zu", first, i);
        }
    }
}

static void test_attend(const cpu_kernels *k) {
    static const size_t dims[] = {2, 6, 16, 24, 64, 80, 96, 128, 256, 512};
    enum { KEYS = 256, MAX_Q = 9 };
    static float scores[MAX_Q * KEYS], out[MAX_Q * (MAX_DIM + 2)], alone[MAX_DIM + 2];
    for (size_t d = 0; d < sizeof dims / sizeof *dims; d++)
        for (int32_t type = 0; type < RAST_N_DTYPES; type++)
            for (int round = 0; round < 6; round++) {
                const size_t dim = dims[d], n_q = 1 + below(MAX_Q);
                const size_t lo = round % 2 ? below(KEYS - 1) : 0, hi = lo + 1 + below(KEYS - lo);
                const size_t first = lo / BLOCK, last = (hi - 1) / BLOCK;
                array q = array_random(n_q * dim, RAST_F32, k), ks[8], vs[8];
                cpu_keys keys = {.lo = lo, .hi = hi};
                const float bad = NAN, *m = out, *l = out + n_q, *acc = out + 2 * n_q;
                for (size_t b = first; b <= last; b++) {
                    ks[b] = array_random(BLOCK * dim, type, k), vs[b] = array_random(BLOCK * dim, type, k);
                    keys.k[b] = ks[b].data, keys.v[b] = vs[b].data;
                    for (size_t t = 0; t < BLOCK; t++) { /* what is not seen may hold anything */
                        if (b * BLOCK + t >= lo && b * BLOCK + t < hi) continue;
                        for (size_t i = 0; i < dim; i++) {
                            k->store(&bad, ks[b].data + (i * BLOCK + t) * size_of(type), 1, type);
                            k->store(&bad, vs[b].data + (t * dim + i) * size_of(type), 1, type);
                        }
                    }
                }
                k->attend(floats(&q), 1, n_q, dim, &keys, 8, type, scores, out, &(cpu_fetch){0});
                for (size_t h = 0; h < n_q; h++) {
                    double score[KEYS], max = -INFINITY, sum = 0;
                    for (size_t t = lo; t < hi; t++) {
                        score[t] = 0;
                        for (size_t i = 0; i < dim; i++)
                            score[t] += at(&q, h * dim + i) * at(&ks[t / BLOCK], i * BLOCK + t % BLOCK);
                        max = fmax(max, score[t]);
                    }
                    for (size_t t = lo; t < hi; t++) sum += exp(score[t] - max);
                    CHECK(close_to(m[h], max, 1e-6 * (double)dim), "max %g, not %g", m[h], max);
                    CHECK(close_to(l[h], sum, 1e-6 * (double)(dim + 50) * sum), "sum %g, not %g", l[h], sum);
                    for (size_t i = 0; i < dim; i++) {
                        double want = 0;
                        for (size_t t = lo; t < hi; t++)
                            want += exp(score[t] - max) * at(&vs[t / BLOCK], t % BLOCK * dim + i);
                        CHECK(close_to(acc[h * dim + i], want, 1e-6 * (double)(dim + 50) * sum),
                              "head_dim %zu, %s, keys %zu to %zu: %g, not %g", dim, type_names[type], lo, hi,
                              acc[h * dim + i], want);
                    }
                    k->attend(floats(&q) + h * dim, 1, 1, dim, &keys, 8, type, scores, alone, &(cpu_fetch){0});
                    CHECK(m[h] == alone[0] && l[h] == alone[1] && memcmp(acc + h * dim, alone + 2, 4 * dim) == 0,
                          "a head's bits differ alone");
                }
                for (size_t b = first; b <= last; b++) array_free(&ks[b]), array_free(&vs[b]);
                array_free(&q);
            }
}

/* Rows that have their first blocks in common, in one call: the bits of each alone. */
static void test_attend_shared(const cpu_kernels *k) {
    static const size_t dims[] = {6, 64, 80, 128};
    enum { KEYS = 256, BLOCKS = KEYS / BLOCK, MAX_ROWS = 6, MAX_Q = 8 };
    static float scores[MAX_ROWS * MAX_Q * KEYS], out[MAX_ROWS * MAX_Q * (MAX_DIM + 2)], alone[MAX_Q * (MAX_DIM + 2)];
    for (int round = 0; round < 60; round++) {
        const size_t dim = dims[below(4)], n_q = 1 + below(MAX_Q), n_rows = 1 + below(MAX_ROWS);
        const size_t shared = below(BLOCKS + 1), floats_of_row = cpu_partial_floats(n_q, dim);
        const int32_t type = (int32_t)below(RAST_N_DTYPES);
        array q = array_random(n_rows * n_q * dim, RAST_F32, k);
        array data = array_random((n_rows + 1) * BLOCKS * 2 * BLOCK * dim, type, k);
        cpu_keys keys[MAX_ROWS] = {0};
        for (size_t r = 0; r < n_rows; r++) {
            keys[r].lo = round % 2 ? below(KEYS) : 0;
            keys[r].hi = round % 3 ? keys[r].lo + 1 + below(KEYS - keys[r].lo) : KEYS;
            for (size_t b = keys[r].lo / BLOCK; b * BLOCK < keys[r].hi; b++) { /* others are not there */
                const size_t block = (b < shared ? 0 : r + 1) * BLOCKS + b;
                keys[r].k[b] = data.data + 2 * block * BLOCK * dim * size_of(type);
                keys[r].v[b] = data.data + (2 * block + 1) * BLOCK * dim * size_of(type);
            }
        }
        k->attend(floats(&q), n_rows, n_q, dim, keys, shared, type, scores, out, &(cpu_fetch){0});
        for (size_t r = 0; r < n_rows; r++) {
            k->attend(floats(&q) + r * n_q * dim, 1, n_q, dim, &keys[r], BLOCKS, type, scores, alone, &(cpu_fetch){0});
            CHECK(memcmp(out + r * floats_of_row, alone, 4 * floats_of_row) == 0,
                  "head_dim %zu, %s, row %zu of %zu, %zu heads, %zu blocks shared: its bits differ alone", dim,
                  type_names[type], r, n_rows, n_q, shared);
        }
        array_free(&q), array_free(&data);
    }
}

/* ---- ops --------------------------------------------------------------------------------------------------------- */

static const rast_ops *const ops = &rast_cpu_ops;

typedef struct {
    rast_ctx *ctx;
    rast_queue *q;
} device;

static device device_open(int32_t n_threads, const char *name) {
    const rast_device spec = {.n_threads = n_threads, .isa = name};
    rast_error err = {0};
    device d;
    CHECK(ops->open(&spec, &d.ctx, &err) == RAST_OK, "%s", err.message);
    CHECK(ops->queue_new(d.ctx, &d.q, &err) == RAST_OK, "%s", err.message);
    CHECK(strcmp(ops->isa(d.ctx), name) == 0 && ops->n_threads(d.ctx) == n_threads, "the device is another");
    return d;
}

static void device_close(device *d) {
    ops->queue_free(d->q);
    ops->close(d->ctx);
}

static void submit(device *d) {
    rast_event event;
    rast_error err = {0};
    CHECK(ops->submit(d->q, &event, &err) == RAST_OK, "%s", err.message);
    CHECK(ops->wait(d->ctx, event, &err) == RAST_OK, "%s", err.message);
}

static rast_dev dev(const void *p) { return (rast_dev)(uintptr_t)p; }

static rast_weight weight_of(const array *a, size_t out, size_t in) {
    return (rast_weight){
        .data = dev(a->data), .out = (int32_t)out, .in = (int32_t)in, .type = a->type, .stride = in * size_of(a->type)};
}

/* Two models, some rows: embed, matmul with and without bias, norm, glu, gather against loops; the same bits with any
 * number of threads. */
static void test_row_ops(const cpu_kernels *k, device *devices, size_t n_devices, int32_t wt, int32_t xt) {
    enum { MODELS = 2, CAP = 14, VOCAB = 40, CAP_OUT = 6, JOBS = 5 };
    const size_t rows = 1 + below(CAP), outs = 1 + below(CAP_OUT), in = 4 + below(200), dim = 12 * (1 + below(8));
    const size_t widths[JOBS] = {1 + below(300), 40, dim, 7, 1 + below(90)};
    int32_t count[3] = {(int32_t)rows, 1, (int32_t)outs}, token[CAP], drawn[3] = {5, 6, 7}, out_row[CAP_OUT];
    for (size_t r = 0; r < rows; r++) token[r] = r % 4 == 3 ? -1 - (int32_t)below(3) : (int32_t)below(VOCAB);
    for (size_t o = 0; o < outs; o++) out_row[o] = (int32_t)below(rows + 1) - 1;
    const rast_pass pass = {.n_models = MODELS,
                            .cap_rows = CAP,
                            .cap_out = CAP_OUT,
                            .act_type = xt,
                            .count = dev(count),
                            .token = dev(token),
                            .drawn = dev(drawn),
                            .out_row = dev(out_row)};
    array table[MODELS], w[JOBS][MODELS], b[JOBS][MODELS], x = array_random(MODELS * CAP * in, xt, k);
    array u = array_random(MODELS * CAP * dim, RAST_F32, k), add = array_random(MODELS * CAP * dim, RAST_F32, k);
    rast_weight tw[MODELS], ww[JOBS][MODELS], bw[JOBS][MODELS], nw[MODELS];
    const rast_weight *tp[MODELS], *wp[JOBS][MODELS], *bp[JOBS][MODELS], *np[MODELS];
    for (size_t m = 0; m < MODELS; m++) {
        table[m] = array_random(VOCAB * dim, wt, k);
        tp[m] = &tw[m], tw[m] = weight_of(&table[m], VOCAB, dim);
        np[m] = &nw[m], nw[m] = weight_of(&table[m], 1, 12);
        for (size_t j = 0; j < JOBS; j++) {
            w[j][m] = array_random(widths[j] * in, wt, k), b[j][m] = array_random(widths[j], wt, k);
            wp[j][m] = &ww[j][m], ww[j][m] = weight_of(&w[j][m], widths[j], in);
            bp[j][m] = &bw[j][m], bw[j][m] = weight_of(&b[j][m], 1, widths[j]);
        }
    }
    array first[JOBS + 5] = {0};
    for (size_t t = 0; t < n_devices; t++) {
        array y[JOBS + 5];
        rast_mm jobs[JOBS];
        for (size_t j = 0; j < JOBS; j++) {
            y[j] = array_new(MODELS * CAP * widths[j], RAST_F32);
            jobs[j] = (rast_mm){dev(x.data), dev(y[j].data), wp[j], j % 2 ? NULL : bp[j]};
        }
        for (size_t j = 0; j < 4; j++)
            y[JOBS + j] = array_new(MODELS * (j == 3 ? CAP_OUT : CAP) * dim, j == 1 || j == 2 ? xt : RAST_F32);
        y[JOBS + 4] = array_new(MODELS * CAP * dim, RAST_F32);
        rast_queue *q = devices[t].q;
        CHECK(ops->begin(q, 0) == 0, "begin");
        ops->embed(q, &pass, tp, dev(y[JOBS].data));
        ops->copy(q, dev(y[JOBS + 4].data), dev(y[JOBS].data), MODELS * CAP * dim * 4, RAST_COPY_ON_DEVICE);
        ops->matmul(q, &pass, jobs, JOBS);
        ops->norm(q, &pass, RAST_OF_ROWS, dev(y[JOBS + 4].data), dev(add.data), np, (int32_t)dim, 12, 1e-5f,
                  dev(y[JOBS + 1].data), xt);
        ops->glu(q, &pass, dev(y[JOBS + 4].data), dev(u.data), (int32_t)dim, dev(y[JOBS + 2].data));
        ops->gather(q, &pass, dev(u.data), dev(add.data), (int32_t)dim, dev(y[JOBS + 3].data));
        submit(&devices[t]);
        for (size_t j = 0; j < JOBS + 5; j++)
            if (t) {
                CHECK(memcmp(y[j].data, first[j].data, y[j].n * size_of(y[j].type)) == 0,
                      "output %zu depends on the number of threads", j);
                array_free(&y[j]);
            } else {
                first[j] = y[j];
            }
    }
    for (size_t m = 0; m < MODELS; m++)
        for (size_t r = 0; r < CAP; r++) {
            const size_t row = m * CAP + r;
            for (size_t j = 0; j < JOBS; j++)
                for (size_t o = 0; o < widths[j]; o++) {
                    double want = j % 2 ? 0 : at(&b[j][m], o);
                    for (size_t i = 0; i < in; i++) want += at(&w[j][m], o * in + i) * at(&x, row * in + i);
                    const double got = at(&first[j], row * widths[j] + o);
                    CHECK(r < rows ? close_to(got, want, 1e-4) : got == 0, "matmul: %g, not %g", got, want);
                }
            if (r >= rows) continue;
            const size_t id = (size_t)(token[r] < 0 ? drawn[-1 - token[r]] : token[r]);
            double squares = 0;
            for (size_t i = 0; i < dim; i++) {
                const double e = at(&table[m], id * dim + i), sum = (float)e + floats(&add)[row * dim + i];
                CHECK(at(&first[JOBS], row * dim + i) == e, "embed");
                if (i % 12 == 0) {
                    squares = 0;
                    for (size_t n = i; n < i + 12; n++) {
                        const double s = (float)at(&table[m], id * dim + n) + floats(&add)[row * dim + n];
                        squares += s * s;
                    }
                }
                const double normed = sum / sqrt(squares / 12 + 1e-5) * at(&table[m], i % 12);
                CHECK(close_to(at(&first[JOBS + 1], row * dim + i), normed, rounding(normed, xt) + 1e-6 * fabs(normed)),
                      "norm by groups");
                const double glu = sum / (1 + exp(-sum)) * at(&u, row * dim + i);
                CHECK(close_to(at(&first[JOBS + 2], row * dim + i), glu, rounding(glu, xt) + 1e-6), "glu");
            }
        }
    for (size_t m = 0; m < MODELS; m++)
        for (size_t o = 0; o < outs; o++)
            for (size_t i = 0; i < dim; i++) {
                const size_t row = m * CAP + (size_t)(out_row[o] < 0 ? 0 : out_row[o]);
                const float want = out_row[o] < 0 ? 0 : floats(&u)[row * dim + i] + floats(&add)[row * dim + i];
                CHECK(floats(&first[JOBS + 3])[(m * CAP_OUT + o) * dim + i] == want, "gather");
            }
    for (size_t j = 0; j < JOBS + 5; j++) array_free(&first[j]);
    for (size_t m = 0; m < MODELS; m++) {
        array_free(&table[m]);
        for (size_t j = 0; j < JOBS; j++) array_free(&w[j][m]), array_free(&b[j][m]);
    }
    array_free(&x), array_free(&u), array_free(&add);
}

/* Two models, three sequences in shuffled blocks: rope, cache and attention against loops. Each device has another number
 * of threads and takes the tokens in other chunks; all must give the same bits. */
static void test_attention(const cpu_kernels *k, device *devices, size_t n_devices, size_t dim, size_t n_kv,
                           size_t group, size_t window, int32_t kv_type, int32_t act) {
    enum { MODELS = 2, SEQS = 3, STRIDE = 24 };
    const size_t lengths[SEQS] = {1 + below(600), 1 + below(80), 1 + below(300)}, n_heads = n_kv * group;
    const int32_t interleaved = (int32_t)below(2);
    const float scale = 1 / sqrtf((float)dim);
    size_t total = 0, first_row[SEQS], longest = 0;
    int32_t table[SEQS * STRIDE], order[SEQS * STRIDE];
    for (size_t i = 0; i < SEQS * STRIDE; i++) {
        const size_t j = below(i + 1);
        order[i] = order[j], order[j] = (int32_t)i;
    }
    for (size_t s = 0; s < SEQS; s++) {
        first_row[s] = total, total += lengths[s];
        longest = lengths[s] > longest ? lengths[s] : longest;
    }
    memcpy(table, order, sizeof table);
    array q = array_random(MODELS * total * n_heads * dim, RAST_F32, k);
    array key = array_random(MODELS * total * n_kv * dim, RAST_F32, k), v = array_random(key.n, RAST_F32, k);
    array angles = array_new(longest * dim, RAST_F32), first = {0};
    for (size_t i = 0; i < longest * dim / 2; i++) {
        const double angle = (double)(i / (dim / 2)) * pow(100, -(double)(i % (dim / 2)) / (double)dim);
        floats(&angles)[2 * i] = (float)cos(angle), floats(&angles)[2 * i + 1] = (float)sin(angle);
    }
    for (size_t t = 0; t < n_devices; t++) {
        const size_t bytes = rast_kv_bytes((int32_t)n_kv, (int32_t)dim, kv_type), stride = 2 * bytes + 64;
        const size_t chunk = t == 0 ? 1000 : t == 1 ? 1 : 1 + below(90);
        rast_dev base[MODELS];
        rast_error err = {0};
        for (size_t m = 0; m < MODELS; m++) {
            CHECK(ops->alloc(devices[t].ctx, SEQS * STRIDE * stride, RAST_MEM_LAZY, &base[m], &err) == RAST_OK, "%s",
                  err.message);
            if (act == RAST_F32) memset((void *)(uintptr_t)base[m], 0xff, SEQS * STRIDE * stride); /* NaN */
        }
        const rast_kv kv = {base, stride, bytes + 64, kv_type, (int32_t)n_heads, (int32_t)n_kv, (int32_t)dim};
        array y = array_new(q.n, act);
        for (size_t done = 0; done < longest; done += chunk) {
            int32_t count[3] = {0}, pos[1200], row_seg[1200], seg_row[SEQS + 1] = {0}, seg_ctx[SEQS], n_segs = 0;
            int32_t blocks[SEQS * STRIDE];
            size_t from[1200], cap = 0;
            for (size_t s = 0; s < SEQS; s++) {
                if (done >= lengths[s]) continue;
                memcpy(blocks + n_segs * STRIDE, table + s * STRIDE, STRIDE * sizeof *table);
                for (size_t p = done; p < lengths[s] && p < done + chunk; p++) {
                    pos[cap] = (int32_t)p, row_seg[cap] = n_segs, from[cap] = first_row[s] + p;
                    seg_ctx[n_segs] = (int32_t)p + 1;
                    cap++;
                }
                seg_row[++n_segs] = (int32_t)cap;
            }
            count[0] = (int32_t)cap, count[1] = n_segs;
            cap += 3; /* room that is not used */
            array qc = array_new(MODELS * cap * n_heads * dim, RAST_F32), yc = array_new(qc.n, act);
            array kc = array_new(MODELS * cap * n_kv * dim, RAST_F32), vc = array_new(kc.n, RAST_F32);
            for (size_t m = 0; m < MODELS; m++)
                for (size_t r = 0; r < (size_t)count[0]; r++) {
                    const size_t to = m * cap + r, of = m * total + from[r], wide = n_heads * dim, slim = n_kv * dim;
                    memcpy(floats(&qc) + to * wide, floats(&q) + of * wide, 4 * wide);
                    memcpy(floats(&kc) + to * slim, floats(&key) + of * slim, 4 * slim);
                    memcpy(floats(&vc) + to * slim, floats(&v) + of * slim, 4 * slim);
                }
            const rast_pass pass = {.n_models = MODELS,
                                    .cap_rows = (int32_t)cap,
                                    .cap_segs = SEQS,
                                    .act_type = act,
                                    .count = dev(count),
                                    .pos = dev(pos),
                                    .row_seg = dev(row_seg),
                                    .seg_row = dev(seg_row),
                                    .seg_ctx = dev(seg_ctx),
                                    .block_table = dev(blocks),
                                    .table_stride = STRIDE};
            ops->begin(devices[t].q, 0);
            ops->rope_kv(devices[t].q, &pass, dev(qc.data), dev(kc.data), dev(vc.data), dev(angles.data), interleaved,
                         &kv);
            ops->attention(devices[t].q, &pass, dev(qc.data), &kv, (int32_t)window, scale, dev(yc.data));
            submit(&devices[t]);
            const size_t wide = n_heads * dim * size_of(act);
            for (size_t m = 0; m < MODELS; m++)
                for (size_t r = 0; r < (size_t)count[0]; r++)
                    memcpy(y.data + (m * total + from[r]) * wide, yc.data + (m * cap + r) * wide, wide);
            array_free(&qc), array_free(&yc), array_free(&kc), array_free(&vc);
        }
        for (size_t m = 0; m < MODELS; m++) ops->release(devices[t].ctx, base[m]);
        if (t) {
            CHECK(memcmp(y.data, first.data, y.n * size_of(act)) == 0,
                  "head_dim %zu, %zu x %zu heads, window %zu: bits depend on chunks or threads", dim, n_kv, group,
                  window);
            array_free(&y);
        } else {
            first = y;
        }
    }
    for (size_t m = 0; m < MODELS; m++) /* the reference rotates in float32 as the op does, then sums in double */
        for (size_t i = 0; i < total; i++) {
            size_t s = SEQS - 1;
            while (first_row[s] > i) s--;
            const float *turn = floats(&angles) + (i - first_row[s]) * dim;
            const size_t row = m * total + i;
            for (size_t h = 0; h < n_heads; h++)
                k->rope(floats(&q) + (row * n_heads + h) * dim, turn, dim, interleaved);
            for (size_t h = 0; h < n_kv; h++) k->rope(floats(&key) + (row * n_kv + h) * dim, turn, dim, interleaved);
        }
    if (kv_type != RAST_F32)
        for (array *a = &key;; a = &v) {
            uint16_t h;
            for (size_t i = 0; i < a->n; i++) {
                k->store(floats(a) + i, &h, 1, kv_type);
                k->load(&h, floats(a) + i, 1, kv_type);
            }
            if (a == &v) break;
        }
    for (size_t tries = 0; tries < 60; tries++) {
        const size_t m = below(MODELS), s = below(SEQS), p = tries % 3 ? below(lengths[s]) : lengths[s] - 1;
        const size_t h = below(n_heads), row = m * total + first_row[s], g = h / group;
        const size_t lo = window && p + 1 > window ? p + 1 - window : 0;
        double *score = calloc(p + 1, sizeof *score), max = -INFINITY, sum = 0;
        CHECK(score, "out of memory");
        for (size_t t = lo; t <= p; t++) {
            for (size_t i = 0; i < dim; i++)
                score[t] += at(&q, ((row + p) * n_heads + h) * dim + i) * at(&key, ((row + t) * n_kv + g) * dim + i);
            score[t] *= scale;
            max = fmax(max, score[t]);
        }
        for (size_t t = lo; t <= p; t++) sum += score[t] = exp(score[t] - max);
        for (size_t i = 0; i < dim; i++) {
            double want = 0;
            for (size_t t = lo; t <= p; t++) want += score[t] / sum * at(&v, ((row + t) * n_kv + g) * dim + i);
            const double got = at(&first, ((row + p) * n_heads + h) * dim + i);
            CHECK(close_to(got, want, 2e-5 + rounding(want, act)), "head_dim %zu, position %zu: %g, not %g", dim, p,
                  got, want);
        }
        free(score);
    }
    array_free(&q), array_free(&key), array_free(&v), array_free(&angles), array_free(&first);
}

/* A row each of sequences that have leading blocks in common with the one before: saying so changes no bits, whether these end
 * in front of a segment, within it or behind it. */
static void test_prefixes(const cpu_kernels *k, device *devices, size_t n_devices, size_t group, size_t window,
                          int32_t type) {
    enum { MODELS = 2, SEQS = 9, STRIDE = 24, DIM = 32, KV_HEADS = 2 };
    const size_t bytes = rast_kv_bytes(KV_HEADS, DIM, type), stride = 2 * bytes;
    array cache[MODELS], q = array_random(MODELS * SEQS * KV_HEADS * group * DIM, RAST_F32, k), first = {0};
    rast_dev base[MODELS];
    for (size_t m = 0; m < MODELS; m++) {
        cache[m] = array_random(SEQS * STRIDE * stride / size_of(type), type, k);
        base[m] = dev(cache[m].data);
    }
    int32_t count[3] = {SEQS, SEQS}, pos[SEQS], row_seg[SEQS], seg_row[SEQS + 1] = {0}, seg_ctx[SEQS];
    int32_t table[SEQS][STRIDE], common[SEQS] = {0};
    for (int32_t s = 0; s < SEQS; s++) {
        pos[s] = (int32_t)below(STRIDE * RAST_BLOCK_TOKENS), row_seg[s] = s, seg_row[s + 1] = s + 1;
        seg_ctx[s] = pos[s] + 1;
        if (s) common[s] = (int32_t)below((pos[s] < pos[s - 1] ? pos[s] : pos[s - 1]) / RAST_BLOCK_TOKENS + 1);
        for (int32_t b = 0; b < STRIDE; b++) table[s][b] = b < common[s] ? table[s - 1][b] : s * STRIDE + b;
    }
    const rast_kv kv = {base, stride, bytes, type, (int32_t)(KV_HEADS * group), KV_HEADS, DIM};
    for (size_t t = 0; t <= 2 * n_devices; t++) {
        const int none = t == 2 * n_devices; /* no rows at all */
        device *d = &devices[none ? 0 : t / 2];
        const rast_pass pass = {.n_models = MODELS,
                                .cap_rows = SEQS,
                                .cap_segs = SEQS,
                                .act_type = RAST_F32,
                                .count = dev(count),
                                .pos = dev(pos),
                                .row_seg = dev(row_seg),
                                .seg_row = dev(seg_row),
                                .seg_ctx = dev(seg_ctx),
                                .block_table = dev(table),
                                .table_stride = STRIDE,
                                .prefix_blocks = t % 2 ? dev(common) : 0};
        array y = array_new(q.n, RAST_F32);
        if (none) count[0] = count[1] = 0;
        ops->begin(d->q, 0);
        ops->attention(d->q, &pass, dev(q.data), &kv, (int32_t)window, 0.2f, dev(y.data));
        submit(d);
        if (none) {
            for (size_t i = 0; i < y.n; i++) CHECK(floats(&y)[i] == 0, "attention of no rows writes");
            array_free(&y);
        } else if (t) {
            CHECK(memcmp(y.data, first.data, y.n * sizeof(float)) == 0,
                  "%zu queries a head, window %zu: prefixes matter", group, window);
            array_free(&y);
        } else {
            first = y;
        }
    }
    for (size_t m = 0; m < MODELS; m++) array_free(&cache[m]);
    array_free(&q), array_free(&first);
}

static void test_copies(device *d) {
    enum { BYTES = 5 << 20, BLOCKS = 9, STRIDE = 1000 };
    rast_dev a, b, models[2];
    rast_error err = {0};
    CHECK(ops->alloc(d->ctx, BYTES, RAST_MEM_DATA, &a, &err) == RAST_OK, "%s", err.message);
    CHECK(ops->alloc(d->ctx, BYTES, RAST_MEM_LAZY, &b, &err) == RAST_OK, "%s", err.message);
    uint8_t *from = (uint8_t *)(uintptr_t)a, *to = (uint8_t *)(uintptr_t)b;
    CHECK(a % 64 == 0 && b % 64 == 0, "alignment");
    for (size_t i = 0; i < BYTES; i += 997) CHECK(from[i] == 0 && to[i] == 0, "memory is not zeroed");
    for (size_t i = 0; i < BYTES; i++) from[i] = (uint8_t)rng();
    ops->begin(d->q, 0);
    ops->copy(d->q, b, a, BYTES, RAST_COPY_TO_DEVICE);
    ops->copy(d->q, b, a, 0, RAST_COPY_TO_HOST);
    submit(d);
    CHECK(memcmp(from, to, BYTES) == 0, "copy");
    const int32_t pairs[] = {3, 8, 0, 7};
    models[0] = a, models[1] = a + BLOCKS * STRIDE;
    ops->begin(d->q, 0);
    ops->copy_blocks(d->q, models, 2, STRIDE, dev(pairs), 2);
    submit(d);
    for (size_t m = 0; m < 2; m++)
        for (size_t n = 0; n < BLOCKS; n++) {
            const size_t of = n == 8 ? 3 : n == 7 ? 0 : n, begin = m * BLOCKS * STRIDE;
            CHECK(memcmp(from + begin + n * STRIDE, to + begin + of * STRIDE, STRIDE) == 0, "block %zu", n);
        }
    ops->release(d->ctx, a);
    ops->release(d->ctx, b);
    ops->release(d->ctx, 0);
}

/* ---- the pool ---------------------------------------------------------------------------------------------------- */

typedef struct {
    uint32_t *done; /* [tasks, MAX_UNITS] how often a unit has run */
    size_t task, n_before, *units;
    int *early;       /* a unit ran before the task before it was done */
    int32_t *threads; /* [MAX_UNITS] who ran the units, if that is asked */
    size_t *pieces;
    size_t n_threads;
} pool_args;

enum { MAX_UNITS = 700, TASKS = 40 };

static void pool_unit(const void *args, size_t unit, const cpu_worker *worker) {
    const pool_args *a = args;
    memset(worker->scratch, (int)unit, 64 + a->task);
    if ((uintptr_t)worker->scratch % 64) *a->early = 1;
    if (a->task)
        for (size_t i = 0; i < a->units[a->task - 1]; i++)
            if (a->done[(a->task - 1) * MAX_UNITS + i] != a->n_before) *a->early = 1;
    a->done[a->task * MAX_UNITS + unit]++;
    if (a->threads) a->threads[unit] = worker->thread;
}

static void pool_piece(const void *args, size_t begin, size_t end, const cpu_worker *worker) {
    const pool_args *a = args;
    const size_t n = a->units[a->task], n_threads = a->n_threads, thread = (size_t)worker->thread;
    const size_t own = n * thread / n_threads, own_end = n * (thread + 1) / n_threads;
    if (begin >= end) *a->early = 1;
    /* a thread takes what is left of its own range in the end, of another's what it has in hand */
    if (worker->soon != (begin >= own && begin < own_end ? own_end : end)) *a->early = 1;
    for (size_t unit = begin; unit < end; unit++) pool_unit(args, unit, worker);
    if (a->pieces) ++*a->pieces;
}

/* One thread does all of a small task; a thread alone takes a task in as many pieces as it was told to. */
static void test_pieces(const char *name) {
    enum { UNITS = 64 };
    uint32_t done[2 * MAX_UNITS] = {0};
    size_t units[2] = {UNITS, UNITS}, n_pieces = 0;
    int32_t threads[MAX_UNITS];
    int early = 0;
    device d = device_open(3, name);
    for (int run = 0; run < 50; run++) {
        memset(done, 0, sizeof done);
        ops->begin(d.q, 0);
        const pool_args first = {done, 0, 1, units, &early, NULL, NULL, 3},
                        second = {done, 1, 1, units, &early, threads, NULL, 3};
        cpu_record(d.q, pool_unit, UNITS, &first, sizeof first, 64);
        cpu_record_small(d.q, pool_unit, UNITS, 1, &second, sizeof second, 65);
        submit(&d);
        for (size_t i = 0; i < UNITS; i++) CHECK(threads[i] == threads[0], "several threads do a small task");
        CHECK(!early, "a barrier does not hold");
    }
    device_close(&d);
    d = device_open(1, name);
    for (uint32_t pieces = 1; pieces <= 4; pieces *= 2) {
        const pool_args all = {done, 0, 1, units, &early, NULL, &n_pieces, 1};
        size_t want = 0;
        for (size_t left = UNITS; left; want++) left -= left < pieces ? 1 : left / pieces;
        n_pieces = 0;
        ops->begin(d.q, 0);
        cpu_record_pieces(d.q, pool_piece, UNITS, pieces, &all, sizeof all, 64);
        submit(&d);
        CHECK(n_pieces == want, "%zu pieces, not %zu", n_pieces, want);
    }
    device_close(&d);
}

static void test_pool(const char *name) {
    static uint32_t done[TASKS * MAX_UNITS];
    for (int32_t n_threads = 1; n_threads <= 9; n_threads += n_threads < 3 ? 1 : 3) {
        device d = device_open(n_threads, name);
        for (uint32_t run = 1; run <= 60; run++) {
            size_t units[TASKS];
            int early = 0;
            memset(done, 0, sizeof done);
            ops->begin(d.q, 0);
            for (size_t t = 0; t < TASKS; t++) {
                units[t] = run % 7 == 0 ? 1 : 1 + below(run % 5 ? 12 : MAX_UNITS);
                const pool_args a = {done, t, 1, units, &early, NULL, NULL, (size_t)n_threads};
                void *temp = cpu_temp(d.q, 100 * t);
                CHECK(temp && (uintptr_t)temp % 64 == 0, "cpu_temp");
                memset(temp, 1, 100 * t);
                switch (below(4)) {
                case 0:
                    cpu_record_pieces(d.q, pool_piece, units[t], 1 + (uint32_t)below(5), &a, sizeof a, 64 + t);
                    break;
                case 1: /* all by one thread */
                    cpu_record_small(d.q, pool_unit, units[t], units[t], &a, sizeof a, 64 + t);
                    break;
                case 2:
                    cpu_record_small(d.q, pool_unit, units[t], 1 << 20, &a, sizeof a, 64 + t);
                    break;
                default:
                    cpu_record(d.q, pool_unit, units[t], &a, sizeof a, 64 + t);
                }
                cpu_record(d.q, pool_unit, 0, &a, sizeof a, 0);
            }
            submit(&d);
            CHECK(!early, "a barrier does not hold");
            for (size_t t = 0; t < TASKS; t++)
                for (size_t i = 0; i < MAX_UNITS; i++)
                    CHECK(done[t * MAX_UNITS + i] == (i < units[t]), "task %zu, unit %zu ran %u times", t, i,
                          done[t * MAX_UNITS + i]);
            if (run % 20 == 0) usleep(3000); /* the threads go to sleep */
        }
        device_close(&d);
    }
}

typedef struct {
    const cpu_kernels *k;
    const float *x;
    float *y;
} rounding_args;

static void rounding_unit(const void *args, size_t unit, const cpu_worker *worker) {
    const rounding_args *a = args;
    (void)worker;
    a->k->dot[RAST_F32][RAST_F32](a->x, 0, 0, 1, a->x + unit, 0, 1, 40, a->y + unit, 1);
}

/* Results do not depend on the rounding mode that the caller's thread happens to be in. */
static void test_rounding_mode(const char *name) {
    enum { UNITS = 500 };
    float x[UNITS + 40], y[2][UNITS];
    device d = device_open(3, name);
    for (size_t i = 0; i < UNITS + 40; i++) x[i] = uniform();
    for (int i = 0; i < 2; i++) {
        const rounding_args a = {cpu_queue_kernels(d.q), x, y[i]};
        CHECK(fesetround(i ? FE_UPWARD : FE_TONEAREST) == 0, "fesetround");
        ops->begin(d.q, 0);
        cpu_record(d.q, rounding_unit, UNITS, &a, sizeof a, 0);
        submit(&d);
        CHECK(fegetround() == (i ? FE_UPWARD : FE_TONEAREST), "the caller's rounding mode is gone");
    }
    fesetround(FE_TONEAREST);
    CHECK(memcmp(y[0], y[1], sizeof y[0]) == 0, "the caller's rounding mode matters");
    device_close(&d);
}

/* A child of fork() has no threads: submit must say so. */
static void test_fork(const char *name) {
    device d = device_open(2, name);
    fflush(NULL);
    const pid_t child = fork();
    CHECK(child >= 0, "fork");
    if (child == 0) {
        int x = 1, y = 0;
        rast_event event;
        rast_error err = {0};
        ops->begin(d.q, 0);
        ops->copy(d.q, dev(&y), dev(&x), sizeof x, RAST_COPY_TO_DEVICE);
        const int status = ops->submit(d.q, &event, &err);
        device_close(&d);
        _exit(status == RAST_ERR_DEVICE && strstr(err.message, "fork") ? 0 : 1);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0, "child: %d", status);
    device_close(&d);
}

static void test_device_errors(void) {
    rast_ctx *ctx;
    rast_error err = {0};
    const char *names[8];
    const size_t n = rast_cpu_isas(names);
    CHECK(n >= 1 && n <= 8 && strcmp(names[0], "portable") == 0, "%zu ISAs", n);
    rast_device spec = {.isa = "sse9", .n_threads = 1};
    CHECK(ops->open(&spec, &ctx, &err) == RAST_ERR_UNSUPPORTED, "sse9");
    CHECK(strstr(err.message, "sse9") && strstr(err.message, "portable"), "%s", err.message);
    spec = (rast_device){.isa = "portable", .n_threads = -1};
    CHECK(ops->open(&spec, &ctx, &err) == RAST_ERR_VALUE, "n_threads = -1");
    spec = (rast_device){.n_threads = 1};
    setenv("RAST_CPU_ISA", "portable", 1);
    CHECK(ops->open(&spec, &ctx, &err) == RAST_OK, "%s", err.message);
    CHECK(strcmp(ops->isa(ctx), "portable") == 0, "%s", ops->isa(ctx));
    ops->close(ctx);
    unsetenv("RAST_CPU_ISA");
    CHECK(ops->open(&spec, &ctx, &err) == RAST_OK, "%s", err.message);
    CHECK(strcmp(ops->isa(ctx), names[n - 1]) == 0, "%s", ops->isa(ctx));
    rast_memory left;
    CHECK(ops->memory(ctx, &left, &err) == RAST_OK && rast_memory_left(&left) > 1 << 20, "%zu bytes are free",
          left.free);

    float data[6] = {0};
    rast_weight w;
    rast_dev memory;
    const rast_tensor good = {"w", data, RAST_F32, 2, {2, 3}};
    CHECK(ops->bind(ctx, &good, RAST_F32, &w, &err) == RAST_OK, "%s", err.message);
    CHECK(w.data == dev(data) && w.out == 2 && w.in == 3 && w.stride == 12 && w.type == RAST_F32, "bind");
    ops->unbind(ctx, &w);
    rast_tensor bad = good;
    bad.dtype = RAST_N_TYPES;
    CHECK(ops->bind(ctx, &bad, RAST_F32, &w, &err) == RAST_ERR_UNSUPPORTED, "a dtype that is none");
    bad = good, bad.n_dims = 3;
    CHECK(ops->bind(ctx, &bad, RAST_F32, &w, &err) != RAST_OK, "3 dimensions");
    bad = good, bad.shape[1] = (size_t)1 << 40;
    CHECK(ops->bind(ctx, &bad, RAST_F32, &w, &err) != RAST_OK, "2^40 columns");
    CHECK(ops->alloc(ctx, SIZE_MAX - 5, RAST_MEM_DATA, &memory, &err) == RAST_ERR_MEMORY, "SIZE_MAX bytes");
    CHECK(ops->alloc(ctx, SIZE_MAX / 4, RAST_MEM_LAZY, &memory, &err) == RAST_ERR_MEMORY, "too many bytes");
    CHECK(err.code == RAST_ERR_MEMORY && err.message[0], "no message");
    ops->close(ctx);
}

static void test_isa(const cpu_kernels *k) {
    static const int32_t threads[] = {1, 2, 5};
    device devices[3];
    checking = k->name;
    test_store(k);
    test_dot(k);
    test_norm(k);
    test_glu_and_rope(k);
    test_exp(k);
    test_stats(k);
    test_random(k);
    test_attend(k);
    test_attend_shared(k);
    for (size_t t = 0; t < 3; t++) devices[t] = device_open(threads[t], k->name);
    for (int32_t wt = 0; wt < RAST_N_DTYPES; wt++)
        for (int32_t xt = 0; xt < RAST_N_DTYPES; xt++)
            for (int i = 0; i < 3; i++) test_row_ops(k, devices, 3, wt, xt);
    test_attention(k, devices, 3, 64, 2, 3, 0, RAST_F32, RAST_F32);
    test_attention(k, devices, 3, 24, 1, 1, 0, RAST_BF16, RAST_BF16);
    test_attention(k, devices, 3, 80, 2, 2, 100, RAST_F16, RAST_F32);
    test_attention(k, devices, 3, 128, 1, 7, 300, RAST_BF16, RAST_F32);
    test_attention(k, devices, 3, 16, 3, 1, 1, RAST_F32, RAST_F16);
    for (size_t i = 0; i < 12; i++)
        test_prefixes(k, devices, 3, 1 + below(7), i % 3 ? 0 : 1 + below(500), i % 2 ? RAST_BF16 : RAST_F32);
    test_copies(&devices[2]);
    for (size_t t = 0; t < 3; t++) device_close(&devices[t]);
}

int main(void) {
    const cpu_kernels *kernels[8];
    const size_t n = cpu_kernels_available(kernels);
    test_device_errors();
    test_pool(kernels[0]->name);
    test_pieces(kernels[0]->name);
    test_rounding_mode(kernels[0]->name);
    test_fork(kernels[0]->name);
    for (size_t i = 0; i < n; i++) test_isa(kernels[i]);
    printf("test_cpu_ops: %zu instruction sets, %zu checks passed\n", n, n_checks);
    return 0;
}
