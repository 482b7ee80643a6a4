/* quantize.c: the types of stored weights, quantizing to them and back. */
#include "../error.h"
#include "../rast.h"

#include <math.h>
#include <string.h>

static const struct {
    uint8_t group, bytes; /* of a row's block */
    uint8_t scales, bits; /* f16 in it before the q; of a q */
} types[RAST_N_TYPES] = {
    [RAST_F32] = {1, 4, 0, 32},   [RAST_BF16] = {1, 2, 0, 16},  [RAST_F16] = {1, 2, 0, 16},
    [RAST_Q8_0] = {32, 34, 1, 8}, [RAST_Q4_0] = {32, 18, 1, 4}, [RAST_Q4_1] = {32, 20, 2, 4},
    [RAST_INT8] = {32, 34, 1, 8}, [RAST_INT4] = {32, 20, 2, 4}, [RAST_INT4_64] = {64, 36, 2, 4},
};
enum { TILE = RAST_TILE_ROWS, MAX_GROUP = 64, MAX_BLOCK = 36 };

static int has_tiles(int32_t type) { return type >= RAST_INT8 && type < RAST_N_TYPES; }

size_t rast_type_group(int32_t type) { return type < 0 || type >= RAST_N_TYPES ? 0 : types[type].group; }

size_t rast_row_bytes(int32_t type, size_t n) {
    const size_t group = rast_type_group(type);
    size_t bytes;
    return group && n % group == 0 && rast_mul(n / group, types[type].bytes, &bytes) ? bytes : 0;
}

size_t rast_stored_rows(int32_t type, size_t n) {
    return has_tiles(type) && n <= SIZE_MAX - TILE ? (n + TILE - 1) / TILE * TILE : n;
}

/* ---- floats --------------------------------------------------------------------------------------------------------- */

static float from_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static uint32_t to_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

static float from_half(uint16_t h) {
    const uint32_t inf = (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0;
    const float magnitude = from_bits((uint32_t)(h & 0x7fff) << 13) * 0x1p112f; /* subnormals too */
    return from_bits(to_bits(magnitude) | inf | (uint32_t)(h & 0x8000) << 16);
}

static uint16_t to_half(float f) { /* to nearest even */
    const uint32_t bits = to_bits(f) & 0x7fffffff;
    const uint16_t sign = (uint16_t)(to_bits(f) >> 16 & 0x8000);
    if (bits > 0x7f800000) return 0x7e00;
    if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and more */
    if (bits < 0x38800000)                                    /* subnormal: the sum's last bit is worth 2^-24 */
        return (uint16_t)(sign | (to_bits(from_bits(bits) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | (bits + 0xfff + (bits >> 13 & 1) - ((127u - 15u) << 23)) >> 13);
}

static void read_group(const void *row, size_t at, size_t n, int32_t dtype, float *x) {
    if (dtype == RAST_F32) {
        memcpy(x, (const float *)row + at, n * sizeof *x);
        return;
    }
    uint16_t h[MAX_GROUP];
    memcpy(h, (const uint16_t *)row + at, n * sizeof *h);
    if (dtype == RAST_BF16)
        for (size_t i = 0; i < n; i++) x[i] = from_bits((uint32_t)h[i] << 16);
    else
        for (size_t i = 0; i < n; i++) x[i] = from_half(h[i]);
}

/* ---- blocks --------------------------------------------------------------------------------------------------------- */

static int all_finite(const float *x, size_t n) {
    uint32_t top = 0;
    for (size_t i = 0; i < n; i++) {
        const uint32_t bits = to_bits(x[i]) & 0x7fffffff;
        top = bits > top ? bits : top;
    }
    return top < 0x7f800000;
}

/* q[i] = (x[i] - m) / d rounded to nearest, within lo .. hi; d as it is stored, so that its rounding is made up for. */
static void round_group(const float *x, size_t n, float d, float m, float lo, float hi, int8_t *q) {
    const float inverse = d > 0 ? 1 / d : 0;
    for (size_t i = 0; i < n; i++) {
        float v = (x[i] - m) * inverse;
        v = v < lo ? lo : v;
        v = v > hi ? hi : v;
        q[i] = (int8_t)(to_bits(v + 12582912.0f) - 0x4b400000); /* 1.5 * 2^23: rounds to an integer in the low bits */
    }
}

static void put_half(uint8_t *out, uint16_t h) {
    out[0] = (uint8_t)h;
    out[1] = (uint8_t)(h >> 8);
}

/* Returns 0 if f16 cannot hold the scale. */
static int quantize_8(const float *x, uint8_t *out) {
    float top = 0;
    for (int i = 0; i < 32; i++) top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
    const uint16_t d = to_half(top / 127);
    put_half(out, d);
    round_group(x, 32, from_half(d), 0, -127, 127, (int8_t *)out + 2);
    return d < 0x7c00;
}

static int quantize_4(const float *x, size_t n, uint8_t *out) {
    int8_t q[MAX_GROUP];
    float lo = x[0], hi = x[0];
    for (size_t i = 1; i < n; i++) {
        lo = x[i] < lo ? x[i] : lo;
        hi = x[i] > hi ? x[i] : hi;
    }
    const uint16_t d = to_half(hi / 15 - lo / 15), m = to_half(lo);
    put_half(out, d);
    put_half(out + 2, m);
    round_group(x, n, from_half(d), from_half(m), 0, 15, q);
    for (size_t i = 0; i < n; i += 32)
        for (size_t j = 0; j < 16; j++) out[4 + i / 2 + j] = (uint8_t)(q[i + j] | q[i + 16 + j] << 4);
    return d < 0x7c00 && (m & 0x7fff) < 0x7c00;
}

/* Where byte `at` of a row's block lies in the tile's, and how many bytes follow it there. */
static size_t place_in_tile(size_t at, size_t lane, int32_t type, size_t *n) {
    *n = at < 2u * types[type].scales ? 2 : 4;
    return at * TILE + lane * *n;
}

static void put_into_tile(uint8_t *tile, size_t lane, int32_t type, const uint8_t *block) {
    for (size_t at = 0, n; at < types[type].bytes; at += n) {
        uint8_t *to = tile + place_in_tile(at, lane, type, &n);
        memcpy(to, block + at, n);
    }
}

static void take_from_tile(const uint8_t *tile, size_t lane, int32_t type, uint8_t *block) {
    for (size_t at = 0, n; at < types[type].bytes; at += n) {
        const uint8_t *from = tile + place_in_tile(at, lane, type, &n);
        memcpy(block + at, from, n);
    }
}

int rast_quantize(const void *rows, int32_t dtype, size_t n_rows, size_t n, int32_t type, void *out, rast_error *err) {
    if (dtype < 0 || dtype >= RAST_N_DTYPES)
        return rast_fail(err, RAST_ERR_UNSUPPORTED, "dtype %d cannot be quantized", dtype);
    if (!has_tiles(type)) return rast_fail(err, RAST_ERR_UNSUPPORTED, "cannot quantize to type %d", type);
    const size_t group = types[type].group, bytes = types[type].bytes, size = types[dtype].bytes;
    if (n % group)
        return rast_fail(err, RAST_ERR_VALUE, "rows of %zu are not a multiple of the groups of %zu", n, group);
    const size_t row_bytes = n / group * bytes;
    float x[MAX_GROUP] = {0};
    uint8_t block[MAX_BLOCK];
    if (n_rows % TILE) memset((uint8_t *)out + n_rows / TILE * TILE * row_bytes, 0, TILE * row_bytes);
    for (size_t r = 0; r < n_rows; r++) {
        uint8_t *tile = (uint8_t *)out + r / TILE * TILE * row_bytes;
        for (size_t at = 0; at < n; at += group, tile += TILE * bytes) {
            read_group((const char *)rows + r * n * size, at, group, dtype, x);
            if (!all_finite(x, group)) {
                memset(block, 0, bytes);
                put_half(block, 0x7e00);
            } else if (!(types[type].bits == 8 ? quantize_8(x, block) : quantize_4(x, group, block))) {
                return rast_fail(err, RAST_ERR_VALUE, "it holds values too large for a scale in float16");
            }
            put_into_tile(tile, r % TILE, type, block);
        }
    }
    return RAST_OK;
}

/* q = x within a block: 8 bits, or 4 (pairs 16 apart). */
static void dequantize_block(const uint8_t *block, int32_t type, float *x) {
    const float d = from_half((uint16_t)(block[0] | block[1] << 8));
    if (types[type].bits == 8) {
        for (int i = 0; i < 32; i++) x[i] = d * (float)(int8_t)block[2 + i];
        return;
    }
    const int has_min = types[type].scales == 2;
    const float m = has_min ? from_half((uint16_t)(block[2] | block[3] << 8)) : -8 * d;
    const uint8_t *q = block + (has_min ? 4 : 2);
    for (size_t i = 0; i < types[type].group; i += 32)
        for (size_t j = 0; j < 16; j++) {
            x[i + j] = d * (float)(q[i / 2 + j] & 15) + m;
            x[i + 16 + j] = d * (float)(q[i / 2 + j] >> 4) + m;
        }
}

int rast_dequantize(const void *rows, int32_t type, size_t n_rows, size_t n, float *out, rast_error *err) {
    if (!rast_type_group(type)) return rast_fail(err, RAST_ERR_UNSUPPORTED, "there is no type %d", type);
    const size_t group = types[type].group, block = types[type].bytes;
    if (n % group)
        return rast_fail(err, RAST_ERR_VALUE, "rows of %zu are not a multiple of the groups of %zu", n, group);
    if (type < RAST_N_DTYPES) {
        for (size_t i = 0; i < n_rows * n; i++) read_group(rows, i, 1, type, out + i);
        return RAST_OK;
    }
    const size_t tile = has_tiles(type) ? TILE : 1, row_bytes = n / group * block;
    for (size_t r = 0; r < n_rows; r++) {
        const uint8_t *from = (const uint8_t *)rows + r / tile * tile * row_bytes;
        for (size_t at = 0; at < n; at += group, from += tile * block, out += group) {
            uint8_t own[MAX_BLOCK];
            if (tile > 1) take_from_tile(from, r % tile, type, own);
            dequantize_block(tile > 1 ? own : from, type, out);
        }
    }
    return RAST_OK;
}
