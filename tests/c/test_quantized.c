/* test_quantized.c: quantized weights: rast_quantize, and the kernels and ops of the CPU backend that take them, against plain
 * loops in double precision on every ISA; a result's bits depend on neither tile, batch nor thread count.
 *
 * Inputs of kernels lie in memory of exactly their size, so that a sanitizer sees every read too far.
 */
#include "../../csrc/backends/cpu/cpu.h"
#include "check.h"

#include <string.h>

static const char *const type_names[] = {"f32", "bf16", "f16", "q8_0", "q4_0", "q4_1", "int8", "int4", "int4_64"};

static void *allocate(size_t bytes) {
    void *p = malloc(bytes);
    CHECK(p, "out of memory");
    return p;
}

/* ---- the types, element by element ------------------------------------------------------------------------------- */

static double stored_half(const uint8_t *p) { return half_value(p[0] | p[1] << 8); }

static void put_half(uint8_t *p, int h) { p[0] = (uint8_t)h, p[1] = (uint8_t)(h >> 8); }

static int is_i8(int32_t type) { return type == RAST_Q8_0 || type == RAST_INT8; }
static size_t head_of(int32_t type) { return is_i8(type) || type == RAST_Q4_0 ? 2 : 4; }
static size_t tile_of(int32_t type) { return rast_stored_rows(type, 1); }

/* Byte `at` of block b of a row. */
static uint8_t *byte_of(uint8_t *w, int32_t type, size_t stride, size_t row, size_t b, size_t at) {
    const size_t tile = tile_of(type), lane = row % tile, bytes = rast_row_bytes(type, rast_type_group(type));
    const size_t word = at < head_of(type) ? 2 : 4, first = at < head_of(type) ? 0 : head_of(type);
    uint8_t *block = w + (row - lane) * stride + b * bytes * tile + first * tile;
    return block + (at - first) / word * word * tile + word * lane + (at - first) % word;
}

/* Element i of a row: scale * q + min. */
static double element(uint8_t *w, int32_t type, size_t stride, size_t row, size_t i, double *scale, int *q,
                      double *min) {
    const size_t group = rast_type_group(type), b = i / group, j = i % group, bytes = rast_row_bytes(type, group);
    uint8_t block[64];
    for (size_t at = 0; at < bytes; at++) block[at] = *byte_of(w, type, stride, row, b, at);
    *scale = stored_half(block);
    *min = 0;
    if (is_i8(type)) {
        *q = (int8_t)block[2 + j];
    } else {
        const uint8_t *half = block + head_of(type) + j / 32 * 16;
        *q = j % 32 < 16 ? half[j % 16] & 15 : half[j % 16] >> 4;
        if (type == RAST_Q4_0)
            *q -= 8;
        else
            *min = stored_half(block + 2);
    }
    return *scale * *q + *min;
}

enum { RANDOM, ZEROS, EQUAL, EXTREME, OUTLIER, N_KINDS };

/* n_rows rows of blocks, each of some kind; what fills the last tile is NaN. */
static void fill_rows(uint8_t *w, int32_t type, size_t n_rows, size_t n) {
    const size_t bytes = rast_row_bytes(type, rast_type_group(type)), stride = rast_row_bytes(type, n);
    const size_t head = head_of(type);
    memset(w, 0xff, rast_stored_rows(type, n_rows) * stride);
    for (size_t r = 0; r < n_rows; r++)
        for (size_t b = 0; b < stride / bytes; b++) {
            const size_t kind = below(N_KINDS);
            const uint8_t byte = (uint8_t)rng();
            uint8_t block[64];
            put_half(block, kind == ZEROS ? 0 : kind == OUTLIER ? 0x7800 : (int)(0x2000 + below(0x1000)));
            if (head == 4) put_half(block + 2, kind == ZEROS ? 0 : (int)(below(2) << 15 | (0x2000 + below(0x1800))));
            for (size_t i = head; i < bytes; i++)
                block[i] = kind == RANDOM    ? (uint8_t)rng()
                           : kind == EXTREME ? (uint8_t)(is_i8(type) ? 127 + below(2) : below(2) * 255)
                           : kind == OUTLIER ? (uint8_t)(i == head + 5 ? 0x7f : 0)
                                             : byte;
            for (size_t at = 0; at < bytes; at++) *byte_of(w, type, stride, r, b, at) = block[at];
        }
}

static void fill_activations(float *x, size_t n) {
    for (size_t g = 0; g < n; g += 32) {
        const size_t kind = below(N_KINDS + 1);
        const float value = uniform();
        for (size_t i = g; i < g + 32; i++)
            x[i] = kind == RANDOM    ? uniform()
                   : kind == ZEROS   ? 0
                   : kind == EQUAL   ? value
                   : kind == EXTREME ? (below(2) ? value : -value)
                   : kind == OUTLIER ? (i == g + 7 ? 1e4f : uniform())
                                     : 1e-38f * uniform();
    }
}

/* ---- quantizing -------------------------------------------------------------------------------------------------- */

static void test_activations(const cpu_kernels *k) {
    enum { N = 320 };
    for (int round = 0; round < 50; round++)
        for (int32_t type = 0; type < RAST_N_DTYPES; type++) {
            float *x = allocate(N * sizeof *x);
            void *stored = allocate(N * (type == RAST_F32 ? 4 : 2));
            cpu_group *y = allocate(N / 32 * sizeof *y);
            fill_activations(x, N);
            k->store(x, stored, N, type);
            k->load(stored, x, N, type);
            k->quantize(stored, type, N, y);
            for (size_t g = 0; g < N / 32; g++) {
                float max = 0;
                int32_t sum = 0;
                for (size_t i = 0; i < 32; i++) max = fmaxf(max, fabsf(x[32 * g + i]));
                const float scale = max < 1e-30f ? 0 : max / 127;
                CHECK(y[g].scale == scale, "scale %g of max %g", y[g].scale, max);
                for (size_t i = 0; i < 32; i++) {
                    sum += y[g].q[i];
                    CHECK(abs(y[g].q[i]) <= 127, "q = %d", y[g].q[i]);
                    CHECK(fabs((double)x[32 * g + i] - (double)scale * y[g].q[i]) <= 0.50001 * scale + 1e-30,
                          "%g became %g", x[32 * g + i], scale * (float)y[g].q[i]);
                }
                CHECK(y[g].sum == sum && y[g].sum_scaled == scale * (float)sum, "sum %d", y[g].sum);
            }
            const float bad[] = {NAN, INFINITY, -INFINITY, -NAN};
            for (size_t b = 0; b < 4; b++) {
                x[37] = bad[b];
                k->store(x, stored, N, type);
                k->quantize(stored, type, N, y);
                CHECK(isnan(y[1].scale) && isnan(y[1].sum_scaled) && !isnan(y[0].scale), "%g is lost", bad[b]);
            }
            free(x), free(stored), free(y);
        }
}

static void test_weights(const cpu_kernels *k) {
    enum { ROWS = 19, N = 384 };
    static const int32_t targets[] = {RAST_INT8, RAST_INT4, RAST_INT4_64};
    static float x[ROWS * N], back[N], all[ROWS * N];
    rast_error err = {0};
    for (int round = 0; round < 20; round++)
        for (size_t t = 0; t < 3; t++)
            for (int32_t dtype = 0; dtype < RAST_N_DTYPES; dtype++) {
                const int32_t type = targets[t];
                const size_t bytes = rast_row_bytes(type, N), group = rast_type_group(type);
                const size_t block = rast_row_bytes(type, group);
                void *stored = allocate(sizeof x);
                uint8_t *out = allocate(rast_stored_rows(type, ROWS) * bytes);
                fill_activations(x, ROWS * N);
                k->store(x, stored, ROWS * N, dtype);
                k->load(stored, x, ROWS * N, dtype);
                memset(out, 0xff, rast_stored_rows(type, ROWS) * bytes);
                CHECK(rast_quantize(stored, dtype, ROWS, N, type, out, &err) == RAST_OK, "%s", err.message);
                CHECK(rast_dequantize(out, type, ROWS, N, all, &err) == RAST_OK, "%s", err.message);
                for (size_t r = ROWS; r < rast_stored_rows(type, ROWS); r++)
                    for (size_t i = 0; i < bytes; i++)
                        CHECK(*byte_of(out, type, bytes, r, i / block, i % block) == 0, "row %zu holds something", r);
                for (size_t r = 0; r < ROWS; r++) {
                    const float *row = x + r * N;
                    k->load_row(out, bytes, r, back, N, type);
                    for (size_t i = 0; i < N; i++) {
                        double scale, min, lo = INFINITY, hi = -INFINITY;
                        int q;
                        const double value = element(out, type, bytes, r, i, &scale, &q, &min);
                        for (size_t n = i / group * group; n < i / group * group + group; n++) {
                            lo = fmin(lo, (double)row[n]);
                            hi = fmax(hi, (double)row[n]);
                        }
                        const double top = fmax(fabs(lo), fabs(hi)), ideal = is_i8(type) ? top / 127 : (hi - lo) / 15;
                        CHECK(fabs(scale - ideal) <= ideal * 0x1p-11 + 0x1p-25, "scale %g, not %g", scale, ideal);
                        /* half a step, and what f16 takes from scale and minimum */
                        const double error = 0.5001 * scale + top * 0x1p-10 + 127 * 0x1p-25;
                        CHECK(fabs(value - (double)row[i]) <= error, "%s: %g became %g, scale %g", type_names[type],
                              row[i], value, scale);
                        CHECK(fabs(value - (double)back[i]) <= fabs(value) * 0x1p-22 + top * 0x1p-22,
                              "load: %g, not %g", back[i], value);
                        CHECK(all[r * N + i] == back[i], "dequantized: %g, not %g", all[r * N + i], back[i]);
                        CHECK(!is_i8(type) || abs(q) <= 127, "q = %d", q);
                    }
                }
                free(stored), free(out);
            }
    uint8_t tile[RAST_TILE_ROWS * 36];
    double scale, min;
    int q;
    fill_activations(x, 64);
    for (size_t t = 0; t < 3; t++) {
        x[3] = NAN;
        CHECK(rast_quantize(x, RAST_F32, 1, rast_type_group(targets[t]), targets[t], tile, &err) == RAST_OK, "NaN");
        CHECK(isnan(element(tile, targets[t], rast_row_bytes(targets[t], rast_type_group(targets[t])), 0, 0, &scale, &q,
                            &min)),
              "NaN is lost");
        x[3] = 1e9f;
        CHECK(rast_quantize(x, RAST_F32, 1, rast_type_group(targets[t]), targets[t], tile, &err) == RAST_ERR_VALUE,
              "1e9");
        CHECK(strstr(err.message, "too large"), "%s", err.message);
        CHECK(rast_quantize(x, RAST_F32, 1, 48, targets[t], tile, &err) == RAST_ERR_VALUE, "rows of 48");
    }
    CHECK(rast_quantize(x, RAST_F32, 1, 32, RAST_Q8_0, tile, &err) == RAST_ERR_UNSUPPORTED, "to Q8_0");
    CHECK(rast_quantize(x, RAST_F32, 1, 32, RAST_N_TYPES, tile, &err) == RAST_ERR_UNSUPPORTED, "to what is no type");
    CHECK(rast_quantize(x, RAST_Q8_0, 1, 32, RAST_INT8, tile, &err) == RAST_ERR_UNSUPPORTED, "from Q8_0");
    CHECK(rast_stored_rows(RAST_INT4, 17) == 32 && rast_stored_rows(RAST_INT4, 32) == 32, "whole tiles");
    CHECK(rast_stored_rows(RAST_Q4_1, 17) == 17, "no tiles");
    CHECK(rast_type_group(-1) == 0 && rast_type_group(RAST_N_TYPES) == 0, "types that are none");
    CHECK(rast_row_bytes(RAST_Q8_0, 33) == 0 && rast_row_bytes(RAST_F32, SIZE_MAX) == 0, "rows that are none");
}

/* ---- products ---------------------------------------------------------------------------------------------------- */

typedef struct { /* n_out weight rows, n_rows activation rows */
    int32_t type;
    size_t depth, n_out, n_rows, stride;
    uint8_t *w;
    cpu_group *x;
} product;

static product product_new(int32_t type, size_t depth, size_t n_out, size_t n_rows, const cpu_kernels *k) {
    product p = {type, depth, n_out, n_rows, rast_row_bytes(type, depth), NULL, NULL};
    float *x = allocate(n_rows * depth * sizeof *x);
    p.w = allocate(rast_stored_rows(type, n_out) * p.stride);
    p.x = allocate(n_rows * (depth / 32) * sizeof *p.x);
    fill_rows(p.w, type, n_out, depth);
    fill_activations(x, n_rows * depth);
    k->quantize(x, RAST_F32, n_rows * depth, p.x);
    free(x);
    return p;
}

static void product_free(product *p) { free(p->w), free(p->x); }

/* y [n_rows, y_stride] of weight rows o .. o + n - 1 and activation rows r .. r + n_rows - 1 */
static void multiply(const cpu_kernels *k, const product *p, size_t o, size_t n, size_t r, size_t n_rows, float *y,
                     size_t y_stride) {
    const size_t x_stride = p->depth / 32 * sizeof *p->x;
    k->dot_groups[p->type - RAST_Q8_0](p->w, p->stride, o, n, (const char *)p->x + r * x_stride, x_stride, n_rows,
                                       p->depth, y, y_stride);
}

static double naive(const product *p, size_t o, size_t r, double *size) {
    const cpu_group *x = p->x + r * (p->depth / 32);
    double want = 0, scale, min;
    int q;
    *size = 0;
    for (size_t i = 0; i < p->depth; i++) {
        const double xi = (double)x[i / 32].scale * x[i / 32].q[i % 32];
        want += element(p->w, p->type, p->stride, o, i, &scale, &q, &min) * xi;
        *size += fabs(scale * q * xi) + fabs(min * xi);
    }
    return want;
}

static void test_product(const cpu_kernels *k, const cpu_kernels *twin, const product *p) {
    const size_t y_stride = p->n_out + below(3);
    float *y = allocate(p->n_rows * y_stride * sizeof *y), *again = allocate(p->n_rows * y_stride * sizeof *y), one;
    for (size_t i = 0; i < p->n_rows * y_stride; i++) y[i] = again[i] = 777;
    multiply(k, p, 0, p->n_out, 0, p->n_rows, y, y_stride);
    for (size_t r = 0; r < p->n_rows; r++)
        for (size_t o = 0; o < y_stride; o++) {
            const float got = y[r * y_stride + o];
            if (o >= p->n_out) {
                CHECK(got == 777, "wrote beyond the output's %zu columns", p->n_out);
                continue;
            }
            double size;
            const double want = naive(p, o, r, &size);
            CHECK(fabs(got - want) <= size * 2e-6 + 1e-30, "%s, k = %zu, %zu x %zu: %g, not %g", type_names[p->type],
                  p->depth, p->n_out, p->n_rows, got, want);
        }
    for (int i = 0; i < 40; i++) {
        const size_t o = below(p->n_out), r = below(p->n_rows);
        multiply(k, p, o, 1, r, 1, &one, 1);
        CHECK(memcmp(&one, &y[r * y_stride + o], 4) == 0, "%s: bits of [%zu, %zu] differ alone", type_names[p->type], o,
              r);
    }
    for (size_t r = 0; r < p->n_rows;) { /* in parts, and by the twin */
        const size_t n = 1 + below(p->n_rows - r);
        for (size_t o = 0; o < p->n_out;) {
            const size_t n_out = 1 + below(p->n_out - o);
            multiply(twin, p, o, n_out, r, n, again + r * y_stride + o, y_stride);
            o += n_out;
        }
        r += n;
    }
    CHECK(memcmp(y, again, p->n_rows * y_stride * sizeof *y) == 0, "%s: bits differ in parts", type_names[p->type]);
    free(y), free(again);
}

static void test_products(const cpu_kernels *k, const cpu_kernels *twin) {
    static const size_t depths[] = {32, 64, 96, 160, 256, 288, 576};
    checking = k->name;
    for (int32_t type = RAST_Q8_0; type < RAST_N_TYPES; type++)
        for (size_t d = 0; d < sizeof depths / sizeof *depths; d++)
            for (int round = 0; round < 6 && depths[d] % rast_type_group(type) == 0; round++) {
                product p =
                    product_new(type, depths[d], 1 + below(round % 2 ? 150 : 20), 1 + below(round < 3 ? 5 : 40), k);
                test_product(k, twin, &p);
                product_free(&p);
            }
}

/* NaN in an activation or in a scale reaches the results of its row, and no others. */
static void test_not_finite(const cpu_kernels *k) {
    enum { N_OUT = 37, ROWS = 11 };
    for (int32_t type = RAST_Q8_0; type < RAST_N_TYPES; type++) {
        product p = product_new(type, 128, N_OUT, ROWS, k);
        float y[N_OUT * ROWS], x[32] = {[5] = INFINITY};
        k->quantize(x, RAST_F32, 32, &p.x[3 * 4 + 1]);
        put_half(byte_of(p.w, type, p.stride, 20, 0, 0), 0x7e00);
        multiply(k, &p, 0, N_OUT, 0, ROWS, y, N_OUT);
        for (size_t r = 0; r < ROWS; r++)
            for (size_t o = 0; o < N_OUT; o++)
                CHECK(isnan(y[r * N_OUT + o]) == (r == 3 || o == 20), "[%zu, %zu] = %g", r, o, y[r * N_OUT + o]);
        product_free(&p);
    }
}

/* ---- ops --------------------------------------------------------------------------------------------------------- */

static const rast_ops *const ops = &rast_cpu_ops;

/* A matrix product of jobs with types of their own, two of them on one input, and embedding: what the kernels give row by
 * row, with any number of threads, step after step of other sizes. */
static void test_ops(const cpu_kernels *k, int32_t n_threads) {
    enum { MODELS = 2, CAP = 70, JOBS = 7, MAX_OUT = 1300 };
    static const int32_t types[JOBS] = {RAST_Q8_0, RAST_INT4_64, RAST_BF16, RAST_Q4_1, RAST_Q4_0, RAST_INT8, RAST_INT4};
    static const size_t depth[JOBS] = {128, 128, 128, 320, 96, 320, 96}, input[JOBS] = {0, 0, 0, 1, 2, 1, 2};
    static const size_t out[JOBS] = {MAX_OUT, 5, 33, 64, 48, 100, 200};
    const rast_device spec = {.n_threads = n_threads, .isa = k->name};
    rast_ctx *ctx;
    rast_queue *q;
    rast_event event;
    rast_error err = {0};
    CHECK(ops->open(&spec, &ctx, &err) == RAST_OK, "%s", err.message);
    CHECK(ops->queue_new(ctx, &q, &err) == RAST_OK, "%s", err.message);

    float *x[3], *y[JOBS], bias_data[MAX_OUT];
    uint8_t *w[JOBS][MODELS];
    rast_weight weights[JOBS][MODELS], bias;
    const rast_weight *ww[JOBS][MODELS], *biases[MODELS] = {&bias, &bias};
    for (size_t i = 0; i < MAX_OUT; i++) bias_data[i] = uniform();
    const rast_tensor bias_tensor = {"bias", bias_data, RAST_F32, 1, {MAX_OUT, 0}};
    CHECK(ops->bind(ctx, &bias_tensor, RAST_F32, &bias, &err) == RAST_OK, "%s", err.message);
    for (size_t i = 0; i < 3; i++) {
        x[i] = allocate(MODELS * CAP * 320 * sizeof **x);
        fill_activations(x[i], MODELS * CAP * 320);
    }
    for (size_t j = 0; j < JOBS; j++) {
        y[j] = allocate(MODELS * CAP * out[j] * sizeof **y);
        for (size_t m = 0; m < MODELS; m++) {
            const size_t stride = rast_row_bytes(types[j], depth[j]);
            w[j][m] = allocate(rast_stored_rows(types[j], out[j]) * stride);
            if (types[j] == RAST_BF16)
                memset(w[j][m], 0x3e, out[j] * stride);
            else
                fill_rows(w[j][m], types[j], out[j], depth[j]);
            const rast_tensor t = {"w", w[j][m], types[j], 2, {out[j], depth[j]}};
            CHECK(ops->bind(ctx, &t, RAST_F32, &weights[j][m], &err) == RAST_OK, "%s", err.message);
            CHECK(weights[j][m].data == (rast_dev)(uintptr_t)w[j][m], "bind is no alias");
            ww[j][m] = &weights[j][m];
        }
    }
    for (int step = 0; step < 4; step++) {
        const size_t rows = step == 0 ? 1 : 1 + below(step == 1 ? 7 : CAP);
        int32_t count[3] = {(int32_t)rows, 1, 1}, token[CAP];
        for (size_t r = 0; r < rows; r++) token[r] = (int32_t)below(5);
        const rast_pass pass = {.n_models = MODELS,
                                .cap_rows = CAP,
                                .act_type = RAST_F32,
                                .count = (rast_dev)(uintptr_t)count,
                                .token = (rast_dev)(uintptr_t)token};
        rast_mm jobs[JOBS];
        for (size_t j = 0; j < JOBS; j++)
            jobs[j] = (rast_mm){(rast_dev)(uintptr_t)x[input[j]], (rast_dev)(uintptr_t)y[j], ww[j], j ? NULL : biases};
        float *rows_of[2] = {allocate(MODELS * CAP * 128 * sizeof(float)), allocate(128 * sizeof(float))};
        CHECK(ops->begin(q, 0) == 0, "begin");
        ops->matmul(q, &pass, jobs, JOBS);
        ops->embed(q, &pass, ww[1], (rast_dev)(uintptr_t)rows_of[0]);
        CHECK(ops->submit(q, &event, &err) == RAST_OK, "%s", err.message);
        for (size_t m = 0; m < MODELS; m++)
            for (size_t r = 0; r < rows; r++) {
                for (size_t j = 0; j < JOBS; j++) {
                    float want[MAX_OUT];
                    const float *row = x[input[j]] + (m * CAP + r) * depth[j];
                    if (types[j] == RAST_BF16) {
                        k->dot[RAST_BF16][RAST_F32](w[j][m], 2 * depth[j], 0, out[j], row, 0, 1, depth[j], want, 0);
                    } else {
                        cpu_group groups[10];
                        k->quantize(row, RAST_F32, depth[j], groups);
                        const product p = {types[j], depth[j], out[j], 1, rast_row_bytes(types[j], depth[j]),
                                           w[j][m],  groups};
                        multiply(k, &p, 0, out[j], 0, 1, want, out[j]);
                    }
                    for (size_t o = 0; j == 0 && o < out[j]; o++) want[o] += bias_data[o];
                    CHECK(memcmp(want, y[j] + (m * CAP + r) * out[j], out[j] * sizeof *want) == 0,
                          "step %d, job %zu, model %zu, row %zu of %zu", step, j, m, r, rows);
                }
                k->load_row(w[1][m], weights[1][m].stride, (size_t)token[r], rows_of[1], 128, types[1]);
                CHECK(memcmp(rows_of[0] + (m * CAP + r) * 128, rows_of[1], 128 * sizeof(float)) == 0, "embed");
            }
        free(rows_of[0]), free(rows_of[1]);
    }
    rast_weight none;
    const rast_tensor odd = {"odd", w[0][0], RAST_Q8_0, 2, {2, 40}};
    CHECK(ops->bind(ctx, &odd, RAST_F32, &none, &err) == RAST_ERR_VALUE && strstr(err.message, "odd"), "rows of 40");
    for (size_t j = 0; j < JOBS; j++) {
        for (size_t m = 0; m < MODELS; m++) free(w[j][m]);
        free(y[j]);
    }
    for (size_t i = 0; i < 3; i++) free(x[i]);
    ops->queue_free(q);
    ops->close(ctx);
}

#if defined(__x86_64__)
extern const cpu_kernels cpu_kernels_avx512;
#endif

int main(void) {
    const cpu_kernels *kernels[8];
    const size_t n = cpu_kernels_available(kernels);
    test_weights(kernels[0]);
    for (size_t i = 0; i < n; i++) {
        const cpu_kernels *twin = kernels[i];
        checking = kernels[i]->name;
#if defined(__x86_64__)
        /* A machine with VNNI runs its variant under the same name; the other one must give the same bits. */
        if (strncmp(checking, "avx512", 6) == 0) twin = &cpu_kernels_avx512;
#endif
        test_activations(kernels[i]);
        test_products(kernels[i], twin);
        if (twin != kernels[i]) test_products(twin, kernels[i]);
        test_not_finite(kernels[i]);
        for (int32_t threads = 1; threads <= 3; threads++) test_ops(kernels[i], threads);
    }
    printf("test_quantized: %zu instruction sets, %zu checks passed\n", n, n_checks);
    return 0;
}
