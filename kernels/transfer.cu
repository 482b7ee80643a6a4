/* transfer.cu: the transfer step: from every term's logits to a token, with statistics and the rows that are asked for.
 *
 * One kernel, in two parts. The sweep reads each logit once: a warp takes UNIT ids of an output at a time, holds their
 * sum in registers, takes statistics and draws; what it has found goes to scratch, one record a unit, so that nothing
 * depends on how many warps there are. The block that is the last of its output to have swept then finishes: it merges
 * the records in a fixed order and adds the few ids that could not be decided before: uncommon ids, whose value is a
 * log-sum-exp over all others, and what top-k, top-p and min-p leave (select.h). Sums, processors and random numbers
 * have the CPU's roundings (never compile this with fast math), draws are decided in double.
 */
#include "kernels.h"

#include "../csrc/rng.h"
#include "block.h"
#include "select.h"

#include <limits.h>

enum {
    CHUNKS = 4,                  /* groups of four ids that a lane holds, one in each tile */
    UNIT = CHUNKS * SELECT_TILE, /* ids of a warp's turn */
    THREADS = 256,
    SWEEP_WARPS = 4096, /* about as many as large devices hold at once; more units than that take turns */
    COUNTER_BYTES = RAST_KERNEL_OUTPUTS * sizeof(unsigned),
    MEASURED = RAST_DRAW_LOGPROB | RAST_DRAW_STATS,
};

struct best_id { /* as draw_best of the CPU: equal keys go to the lowest id */
    double key;
    int id; /* -1: none, and key is -inf */
};

struct unit_record {
    double key;          /* of the draw, of all the ids that the warp has seen; in its last unit */
    int id;              /* likewise */
    int bad;             /* first term with NaN or Inf; n_terms: only the sum; INT_MAX: none */
    float max, sum, dif; /* combined: sum of exp(l - max), of exp(l - max) * (l - base) */
    float base_max, base_sum;
    float base_key; /* the base's first choice */
    int base_id;
    int pad;
};

struct transfer_job {
    rast_logits l;
    rast_transfer_term term[RAST_KERNEL_MODELS];
    int first_out, n_units, warps, blocks; /* of the sweep, an output */
    unsigned *n_swept;                     /* [n_out] blocks; 0 before and after */
    unit_record *record;                   /* [n_out, n_units] */
    float *row;                            /* [n_out, n_units * UNIT] processed logits of outputs with a filter */
    unsigned *tile_key;                    /* [n_out, n_units * CHUNKS] order_key of the tiles' maxima of that row */
    float2 *term_sum;                      /* [n_out, n_units, n_terms] max and sum of exp(l - max), over common ids */
};

template <class T> __host__ __device__ static inline T *pointer(rast_dev d) {
    return reinterpret_cast<T *>(static_cast<uintptr_t>(d));
}

/* ---- outputs ----------------------------------------------------------------------------------------------------- */

struct output { /* all threads that work on an output hold the same */
    rast_draw d;
    const float *coef; /* [n_terms] */
    int at;            /* among all outputs */
    int limit;         /* ids from here on cannot be drawn */
    int drafts_from;   /* drafts of outputs from here to this one have been seen, too; with a repetition penalty */
    bool has_uncommon, filtered;
    float *row; /* [n_vocab] where processed logits go; or nullptr: nowhere */
};

__device__ static int live_rows(const transfer_job &job, int m) { return smaller(job.term[m].n_rows, job.l.n_vocab); }

__device__ static const float *term_row(const transfer_job &job, int m, size_t i) {
    return pointer<const float>(job.term[m].logits) + i * job.term[m].stride;
}

__device__ static bool needs_term(const output &o, int m) {
    return o.coef[m] != 0 || (m == 0 && o.d.flags & (RAST_DRAW_STATS | RAST_DRAW_PARTS));
}

/* The output after the one whose drafts begin the chain that ends at `at`. A whole warp asks. */
__device__ static int chain_start(const rast_draw *draws, int at) {
    const int slot = draws[at].slot;
    for (int last = at; last >= 0; last -= 32) {
        const int p = last - (int)threadIdx.x % 32;
        const unsigned ends = __ballot_sync(ALL_LANES, p >= 0 && draws[p].slot == slot && draws[p].draft < 0);
        if (ends) return last - (__ffs((int)ends) - 1) + 1;
    }
    return 0;
}

__device__ static output load_output(const transfer_job &job, size_t i) {
    const rast_draw *draws = pointer<const rast_draw>(job.l.draw);
    output o;
    o.at = job.first_out + (int)i;
    o.d = draws[o.at];
    o.coef = pointer<const float>(job.l.coef) + (size_t)o.at * (size_t)job.l.n_terms;
    o.limit = smaller(job.l.n_valid, job.l.n_vocab);
    o.has_uncommon = false;
    for (int m = 0; m < job.l.n_terms; m++) {
        if (o.coef[m] == 0) continue;
        o.limit = smaller(o.limit, job.term[m].n_rows);
        o.has_uncommon |= m > 0 && job.term[m].n_uncommon > 0;
    }
    if (o.d.limit > 0) o.limit = smaller(o.limit, o.d.limit);
    o.drafts_from = o.d.repetition_penalty != 1.0f && o.d.slot >= 0 ? chain_start(draws, o.at) : INT_MAX;

    const bool scores = o.d.flags & RAST_DRAW_SCORES;
    o.filtered = o.d.flags & RAST_DRAW_SAMPLE && (o.d.top_k > 0 || o.d.top_p < 1.0f || o.d.min_p > 0.0f) &&
                 (scores || o.d.target == -1);
    o.row = scores       ? pointer<float>(job.l.scores) + (size_t)o.d.scores_row * (size_t)job.l.n_vocab
            : o.filtered ? job.row + i * (size_t)job.n_units * UNIT
                         : nullptr;
    return o;
}

/* ---- one id ------------------------------------------------------------------------------------------------------ */

/* The sum's one sequence of roundings: no fused multiply-add. */
__device__ __forceinline__ float add_term(float sum, float coef, float logit) {
    return __fadd_rn(sum, __fmul_rn(coef, logit));
}

__device__ __forceinline__ bool is_bad(float x) { return !(fabsf(x) <= FLT_MAX); }

/* The processed logit. */
__device__ __forceinline__ float process(const rast_draw &d, float x, bool seen, bool allowed) {
    if (seen) x = x > 0 ? x / d.repetition_penalty : x * d.repetition_penalty;
    if (!allowed) x = -INFINITY;
    return d.flags & RAST_DRAW_SAMPLE && d.temperature != 1.0f ? x / d.temperature : x;
}

__device__ __forceinline__ void merge(best_id &best, double key, int id) {
    if (key > best.key || (key == best.key && id < best.id)) best.key = key, best.id = id;
}

/* A bound on x + gumbel(r), above it by rounding at least. With n = ~r: u = 1 - (n + 1/2) / 2^32 and -log(u) >= 1 - u,
 * so gumbel(r) <= 32 log 2 - log(n + 1/2). */
__device__ __forceinline__ float key_bound(float x, uint32_t r) {
    return x + (22.18071f - __logf((float)~r + 0.5f)) + (5e-5f + 1e-6f * fabsf(x));
}

__device__ __forceinline__ double draw_key(const rast_draw &d, float x, int id) {
    uint32_t r[4];
    rast_philox(d.stream, (uint32_t)id / 4, d.position, r);
    const uint32_t low = id & 1 ? r[1] : r[0], high = id & 1 ? r[3] : r[2];
    return (double)x + rast_gumbel(id & 2 ? high : low);
}

/* Offers one id by itself. */
__device__ static void offer(const rast_draw &d, float x, int id, best_id &best) {
    if (!(x > -INFINITY)) return;
    merge(best, d.flags & RAST_DRAW_SAMPLE ? draw_key(d, x, id) : (double)x, id);
}

/* First of sorted ids[n] that is not below id. */
__device__ static int first_not_below(const int *ids, int n, int id) {
    int lo = 0;
    while (lo < n) {
        const int mid = lo + (n - lo) / 2;
        if (ids[mid] < id)
            lo = mid + 1;
        else
            n = mid;
    }
    return lo;
}

/* Whether the id is uncommon in an active term before `end`. */
__device__ static bool is_uncommon(const transfer_job &job, const output &o, int id, int end) {
    for (int m = 1; o.has_uncommon && m < end; m++) {
        const int *ids = pointer<const int>(job.term[m].uncommon), n = job.term[m].n_uncommon;
        if (o.coef[m] == 0 || n <= 0) continue;
        const int at = first_not_below(ids, n, id);
        if (at < n && ids[at] == id) return true;
    }
    return false;
}

__device__ static float one_logit(const transfer_job &job, int m, size_t i, int id) {
    return id < live_rows(job, m) ? term_row(job, m, i)[id] : -INFINITY;
}

/* The combined, unprocessed logit of one id, equal to what the sweep gives. lse: [n_terms], of uncommon ids. */
__device__ static float one_sum(const transfer_job &job, const output &o, size_t i, int id, const float *lse) {
    if (id >= o.limit) return -INFINITY;
    const bool uncommon = is_uncommon(job, o, id, job.l.n_terms);
    float sum = 0;
    for (int m = 0; m < job.l.n_terms; m++)
        if (o.coef[m] != 0) sum = add_term(sum, o.coef[m], m > 0 && uncommon ? lse[m] : one_logit(job, m, i, id));
    return sum;
}

__device__ static bool one_bit(rast_dev bits, int row, int words, int id) {
    return pointer<const uint32_t>(bits)[(size_t)row * (size_t)words + (size_t)(id / 32)] >> id % 32 & 1;
}

__device__ static float one_processed(const transfer_job &job, const output &o, int id, float x) {
    const rast_draw *draws = pointer<const rast_draw>(job.l.draw);
    const int words = job.l.history_words;
    bool seen = false;
    if (o.drafts_from != INT_MAX) {
        seen = job.l.history && one_bit(job.l.history, o.d.slot, words, id);
        for (int p = o.drafts_from; p <= o.at && !seen; p++) seen = draws[p].slot == o.d.slot && draws[p].draft == id;
    }
    return process(o.d, x, seen, o.d.mask < 0 || one_bit(job.l.allowed, o.d.mask, words, id));
}

/* ---- the sweep: four ids of a lane in each of a unit's tiles ----------------------------------------------------- */

/* x = logits v .. v + 3 of a row with `live` of them; -inf beyond. */
__device__ __forceinline__ void load_four(const float *row, int v, int live, bool aligned, float x[4]) {
    if (aligned && v + 4 <= live) {
        const float4 four = *reinterpret_cast<const float4 *>(row + v);
        x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
        return;
    }
#pragma unroll
    for (int j = 0; j < 4; j++) x[j] = v + j < live ? row[v + j] : -INFINITY;
}

__device__ __forceinline__ void store_four(float *row, int v, int n_vocab, const float x[4]) {
    if (v + 4 <= n_vocab && reinterpret_cast<uintptr_t>(row + v) % 16 == 0) {
        *reinterpret_cast<float4 *>(row + v) = make_float4(x[0], x[1], x[2], x[3]);
        return;
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (v + j < n_vocab) row[v + j] = x[j];
}

/* A lane's ids of the unit at `first` as bits 4 * chunk + j. */
__device__ __forceinline__ void mark(unsigned &bits, int first, int id) {
    const int i = id - first;
    if (i % SELECT_TILE / 4 == (int)threadIdx.x % 32) bits |= 1u << (i / SELECT_TILE * 4 + i % 4);
}

/* Marks in each lane its own ids among those that the lanes hold (-1: none). */
__device__ __forceinline__ void mark_all(unsigned &bits, int first, int id) {
    unsigned inside = __ballot_sync(ALL_LANES, id >= first && id - first < UNIT);
    for (; inside; inside &= inside - 1) mark(bits, first, __shfl_sync(ALL_LANES, id, __ffs((int)inside) - 1));
}

__device__ static unsigned uncommon_bits(const transfer_job &job, const output &o, int first) {
    unsigned bits = 0;
    for (int m = 1; o.has_uncommon && m < job.l.n_terms; m++) {
        const int *ids = pointer<const int>(job.term[m].uncommon), n = job.term[m].n_uncommon;
        if (o.coef[m] == 0 || n <= 0) continue;
        for (int at = first_not_below(ids, n, first); at < n && ids[at] - first < UNIT; at += 32) {
            const int k = at + (int)threadIdx.x % 32;
            mark_all(bits, first, k < n ? ids[k] : -1);
        }
    }
    return bits;
}

/* Bits of a lane's ids in a row of `words` words; 0 beyond its end. */
__device__ static unsigned row_bits(rast_dev rows, int row, int words, int first) {
    const uint32_t *bits = pointer<const uint32_t>(rows) + (size_t)row * (size_t)words;
    const int lane = (int)threadIdx.x % 32;
    unsigned mine = 0;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int w = (first + c * SELECT_TILE) / 32 + lane / 8;
        if (w < words) mine |= (bits[w] >> lane % 8 * 4 & 15u) << 4 * c;
    }
    return mine;
}

__device__ static unsigned seen_bits(const transfer_job &job, const output &o, int first) {
    const rast_draw *draws = pointer<const rast_draw>(job.l.draw);
    if (o.drafts_from == INT_MAX) return 0;
    unsigned bits = job.l.history ? row_bits(job.l.history, o.d.slot, job.l.history_words, first) : 0;
    for (int p = o.drafts_from; p <= o.at; p += 32) {
        const int q = p + (int)threadIdx.x % 32;
        mark_all(bits, first, q <= o.at && draws[q].slot == o.d.slot ? draws[q].draft : -1);
    }
    return bits;
}

/* Adds term m's logits to the sums; base gets term 0's. */
__device__ __forceinline__ void sweep_term(const transfer_job &job, const output &o, size_t i, int unit, int m,
                                           unsigned uncommon, float sum[CHUNKS][4], float base[CHUNKS][4], int &bad) {
    const int lane = (int)threadIdx.x % 32, first = unit * UNIT + lane * 4, live = live_rows(job, m);
    const bool needed = needs_term(o, m);
    const float *row = term_row(job, m, i), coef = o.coef[m];
    const bool aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0;
    float x[CHUNKS][4];
    bool has_bad = false;

#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        if (needed) {
            load_four(row, first + c * SELECT_TILE, live, aligned, x[c]);
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++) x[c][j] = NAN;
        }
    }
    if (o.d.flags & RAST_DRAW_PARTS) {
        const size_t at = (size_t)o.d.parts_row * (size_t)job.l.n_terms + (size_t)m;
        float *part = pointer<float>(job.l.parts) + at * (size_t)job.l.n_vocab;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) store_four(part, first + c * SELECT_TILE, job.l.n_vocab, x[c]);
    }
    if (m == 0 && needed) {
#pragma unroll
        for (int e = 0; e < CHUNKS * 4; e++) base[e / 4][e % 4] = x[e / 4][e % 4];
    }
    if (coef == 0) return;
#pragma unroll
    for (int e = 0; e < CHUNKS * 4; e++) {
        const int v = first + e / 4 * SELECT_TILE + e % 4;
        has_bad |= v < live && is_bad(x[e / 4][e % 4]);
        sum[e / 4][e % 4] = add_term(sum[e / 4][e % 4], coef, x[e / 4][e % 4]);
    }
    if (has_bad) bad = smaller(bad, m);
    if (m == 0 || !o.has_uncommon) return;

    float max = -INFINITY, total = 0;
#pragma unroll
    for (int e = 0; e < CHUNKS * 4; e++) {
        if (first + e / 4 * SELECT_TILE + e % 4 >= o.limit || uncommon >> e & 1) x[e / 4][e % 4] = -INFINITY;
        max = larger(max, x[e / 4][e % 4]);
    }
    max = warp_max(max);
    if (max > -INFINITY) {
#pragma unroll
        for (int e = 0; e < CHUNKS * 4; e++) total += expf(x[e / 4][e % 4] - max);
    }
    total = warp_sum(total);
    if (lane == 0)
        job.term_sum[(i * (size_t)job.n_units + (size_t)unit) * (size_t)job.l.n_terms + (size_t)m] =
            make_float2(max, total);
}

/* The log-sum-exp statistics of a unit whose sums are complete. */
__device__ __forceinline__ void sweep_stats(const transfer_job &job, const output &o, int first,
                                            const float sum[CHUNKS][4], const float base[CHUNKS][4], unit_record &r) {
    float max = -INFINITY, base_max = -INFINITY;
#pragma unroll
    for (int e = 0; e < CHUNKS * 4; e++) max = larger(max, sum[e / 4][e % 4]);
    r.max = warp_max(max);
    if (r.max > -INFINITY) {
#pragma unroll
        for (int e = 0; e < CHUNKS * 4; e++) {
            const float x = sum[e / 4][e % 4], weight = expf(x - r.max);
            r.sum += weight;
            if (o.d.flags & RAST_DRAW_STATS && x > -INFINITY && base[e / 4][e % 4] != -INFINITY)
                r.dif += weight * (x - base[e / 4][e % 4]);
        }
    }
    r.sum = warp_sum(r.sum);
    if (!(o.d.flags & RAST_DRAW_STATS)) return;
    r.dif = warp_sum(r.dif);
#pragma unroll
    for (int e = 0; e < CHUNKS * 4; e++) {
        const int v = first + e / 4 * SELECT_TILE + e % 4;
        if (v < job.l.n_valid) base_max = larger(base_max, base[e / 4][e % 4]);
    }
    r.base_max = warp_max(base_max);
    if (r.base_max > -INFINITY) {
#pragma unroll
        for (int e = 0; e < CHUNKS * 4; e++) {
            const int v = first + e / 4 * SELECT_TILE + e % 4;
            if (v < job.l.n_valid) r.base_sum += expf(base[e / 4][e % 4] - r.base_max);
        }
    }
    r.base_sum = warp_sum(r.base_sum);
}

/* Draws from a unit of processed logits. `floor`: what the warp's best has reached, the same in all lanes. */
__device__ __forceinline__ void sweep_draw(const rast_draw &d, int first, const float x[CHUNKS][4], best_id &best,
                                           float &floor) {
    if (!(d.flags & RAST_DRAW_SAMPLE)) {
#pragma unroll
        for (int e = 0; e < CHUNKS * 4; e++)
            if ((double)x[e / 4][e % 4] > best.key)
                best.key = (double)x[e / 4][e % 4], best.id = first + e / 4 * SELECT_TILE + e % 4;
        return;
    }
    float bound[CHUNKS * 4], top_bound = -INFINITY, top = 0;
    int top_id = -1;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int v = first + c * SELECT_TILE;
        uint32_t r[4];
        rast_philox(d.stream, (uint32_t)v / 4, d.position, r);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            bound[c * 4 + j] = x[c][j] > -INFINITY ? key_bound(x[c][j], r[j]) : -INFINITY;
            if (bound[c * 4 + j] > top_bound) top_bound = bound[c * 4 + j], top = x[c][j], top_id = v + j;
        }
    }
    /* Two logarithms in double are spent on each lane's likeliest id, then only on those that could still win. */
    if (!__any_sync(ALL_LANES, top_bound >= floor && top_id >= 0)) return;
    if (top_id >= 0) merge(best, draw_key(d, top, top_id), top_id);
    floor = larger(floor, warp_max((float)best.key));
    unsigned left = 0;
#pragma unroll
    for (int e = 0; e < CHUNKS * 4; e++) {
        const int v = first + e / 4 * SELECT_TILE + e % 4;
        left |= (x[e / 4][e % 4] > -INFINITY && bound[e] >= floor && v != top_id ? 1u : 0u) << e;
    }
    for (; left; left &= left - 1) {
        const int k = __ffs((int)left) - 1;
        float value = 0;
#pragma unroll
        for (int e = 0; e < CHUNKS * 4; e++) value = e == k ? x[e / 4][e % 4] : value;
        const int id = first + k / 4 * SELECT_TILE + k % 4;
        merge(best, draw_key(d, value, id), id);
    }
}

/* Writes the lanes' best to the record of the warp's last unit. */
__device__ static best_id warp_best(best_id best) {
    for (int i = 16; i > 0; i /= 2) {
        const double key = __shfl_xor_sync(ALL_LANES, best.key, i);
        merge(best, key, __shfl_xor_sync(ALL_LANES, best.id, i));
    }
    return best;
}

/* What a warp does of output i. */
static __device__ __forceinline__ void sweep(const transfer_job &job, const output &o, size_t i) {
    const int lane = (int)threadIdx.x % 32;
    const int warp = (int)blockIdx.x % job.blocks * (THREADS / 32) + (int)threadIdx.x / 32;
    if (warp >= job.warps) return;
    best_id best = {-INFINITY, -1};
    float floor = -INFINITY;

    for (int unit = warp; unit < job.n_units; unit += job.warps) {
        const int start = unit * UNIT, first = start + lane * 4;
        const unsigned uncommon = uncommon_bits(job, o, start);
        unit_record r = {-INFINITY, -1, INT_MAX, -INFINITY, 0, 0, -INFINITY, 0, -INFINITY, -1, 0};
        float sum[CHUNKS][4], base[CHUNKS][4];
        int bad = INT_MAX;

#pragma unroll
        for (int e = 0; e < CHUNKS * 4; e++) sum[e / 4][e % 4] = 0, base[e / 4][e % 4] = -INFINITY;
        for (int m = 0; m < job.l.n_terms; m++) {
            if (!needs_term(o, m) && !(o.d.flags & RAST_DRAW_PARTS)) continue;
            sweep_term(job, o, i, unit, m, uncommon, sum, base, bad);
        }
#pragma unroll
        for (int e = 0; e < CHUNKS * 4; e++) {
            const int v = first + e / 4 * SELECT_TILE + e % 4;
            float *x = &sum[e / 4][e % 4];
            if (v < o.limit) {
                if (is_bad(*x)) bad = smaller(bad, job.l.n_terms);
                if (base[e / 4][e % 4] > r.base_key) r.base_key = base[e / 4][e % 4], r.base_id = v;
            }
            if (v >= o.limit || uncommon >> e & 1) *x = -INFINITY;
        }
        r.bad = warp_min(bad);
        if (o.d.flags & RAST_DRAW_STATS) {
            const best_id choice = warp_best({(double)r.base_key, r.base_id});
            r.base_key = (float)choice.key, r.base_id = choice.id;
        }
        if (o.d.flags & MEASURED) sweep_stats(job, o, first, sum, base, r);
        if (o.d.flags & RAST_DRAW_LOGITS) {
            float *row = pointer<float>(job.l.logits) + (size_t)o.d.logits_row * (size_t)job.l.n_vocab;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) store_four(row, first + c * SELECT_TILE, job.l.n_vocab, sum[c]);
        }
        if (o.row || o.d.target == -1) {
            const unsigned seen = seen_bits(job, o, start);
            const unsigned allowed =
                o.d.mask < 0 ? 0xffffu : row_bits(job.l.allowed, o.d.mask, job.l.history_words, start);
#pragma unroll
            for (int e = 0; e < CHUNKS * 4; e++)
                sum[e / 4][e % 4] = process(o.d, sum[e / 4][e % 4], seen >> e & 1, allowed >> e & 1);
        }
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            if (o.row) store_four(o.row, first + c * SELECT_TILE, job.l.n_vocab, sum[c]);
            if (!o.filtered) continue;
            const float max = warp_max(larger(larger(sum[c][0], sum[c][1]), larger(sum[c][2], sum[c][3])));
            if (lane == 0) job.tile_key[(i * (size_t)job.n_units + (size_t)unit) * CHUNKS + (size_t)c] = order_key(max);
        }
        if (o.d.target == -1 && !o.filtered) {
            sweep_draw(o.d, first, sum, best, floor);
            if (unit + job.warps >= job.n_units) {
                const best_id all = warp_best(best);
                r.key = all.key, r.id = all.id;
            }
        }
        if (lane == 0) job.record[i * (size_t)job.n_units + (size_t)unit] = r;
    }
}

/* Whether the block is the last of its output to come here: then it sees what all have written. */
static __device__ __forceinline__ bool is_last_block(const transfer_job &job, size_t i) {
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) { /* for all of the block: the barriers pass on what the fences order */
        __threadfence();
        is_last = atomicAdd(&job.n_swept[i], 1u) == (unsigned)job.blocks - 1;
        if (is_last) atomicExch(&job.n_swept[i], 0u); /* for the next launch */
        __threadfence();
    }
    __syncthreads();
    return is_last;
}

/* ---- what the last block does ------------------------------------------------------------------------------------ */

struct block_memory {
    float *floats;   /* [warps] */
    double *doubles; /* [warps] */
    int *ints;       /* [warps] */
    float *lse;      /* [n_terms] */
};

/* The best of the block's threads, in all of them. */
__device__ static best_id block_best(best_id best, const block_memory &shared) {
    best = warp_best(best);
    share_by_warp(best.key, shared.doubles);
    share_by_warp(best.id, shared.ints);
    for (unsigned w = 0; w < THREADS / 32; w++) merge(best, shared.doubles[w], shared.ints[w]);
    return best;
}

/* lse[m] = log-sum-exp of each active term m > 0 over the common ids; 0 where there is none, as a constant then says
 * nothing. */
__device__ static void term_constants(const transfer_job &job, const output &o, size_t i, const block_memory &shared) {
    const float2 *sums = job.term_sum + i * (size_t)job.n_units * (size_t)job.l.n_terms;
    for (int m = 1; m < job.l.n_terms; m++) {
        if (o.coef[m] == 0) continue;
        float max = -INFINITY;
        double sum = 0;
        for (int u = (int)threadIdx.x; u < job.n_units; u += THREADS)
            max = larger(max, sums[(size_t)u * (size_t)job.l.n_terms + (size_t)m].x);
        max = block_max(max, shared.floats);
        for (int u = (int)threadIdx.x; u < job.n_units; u += THREADS) {
            const float2 part = sums[(size_t)u * (size_t)job.l.n_terms + (size_t)m];
            if (part.x > -INFINITY) sum += (double)part.y * exp((double)part.x - (double)max);
        }
        sum = block_sum(sum, shared.doubles);
        if (threadIdx.x == 0) shared.lse[m] = max > -INFINITY ? (float)((double)max + log(sum)) : 0;
    }
    __syncthreads();
}

/* Calls f(id) for every uncommon id that can be drawn, once. */
template <class F> __device__ __forceinline__ void visit_uncommon(const transfer_job &job, const output &o, F f) {
    for (int m = 1; o.has_uncommon && m < job.l.n_terms; m++) {
        const int *ids = pointer<const int>(job.term[m].uncommon);
        if (o.coef[m] == 0) continue;
        for (int k = (int)threadIdx.x; k < job.term[m].n_uncommon; k += THREADS)
            if (ids[k] < o.limit && !is_uncommon(job, o, ids[k], m)) f(ids[k]);
    }
}

/* Takes the uncommon ids to rows and draw. Returns the thread's greatest sum. */
__device__ static float finish_uncommon(const transfer_job &job, const output &o, size_t i, const float *lse,
                                        best_id &best) {
    float max = -INFINITY;
    visit_uncommon(job, o, [&](int id) {
        const float sum = one_sum(job, o, i, id, lse);
        max = larger(max, sum);
        if (o.d.flags & RAST_DRAW_LOGITS && sum > -INFINITY)
            pointer<float>(job.l.logits)[(size_t)o.d.logits_row * (size_t)job.l.n_vocab + (size_t)id] = sum;
        if (!o.row && o.d.target != -1) return;
        const float x = one_processed(job, o, id, sum);
        if (o.row) o.row[id] = x;
        if (o.filtered)
            atomicMax(&job.tile_key[i * (size_t)job.n_units * CHUNKS + (size_t)(id / SELECT_TILE)], order_key(x));
        else if (o.d.target == -1)
            offer(o.d, x, id, best);
    });
    return max;
}

struct sums { /* log-sum-exp of combined and base, and the combined mean of their difference */
    double combined, base, dif;
};

__device__ static sums merge_sums(const transfer_job &job, const output &o, size_t i, float uncommon_max,
                                  const block_memory &shared) {
    const unit_record *record = job.record + i * (size_t)job.n_units;
    float max = uncommon_max, base_max = -INFINITY;
    double sum = 0, dif = 0, base = 0;
    for (int u = (int)threadIdx.x; u < job.n_units; u += THREADS) {
        max = larger(max, record[u].max);
        base_max = larger(base_max, record[u].base_max);
    }
    max = block_max(max, shared.floats);
    base_max = block_max(base_max, shared.floats);
    for (int u = (int)threadIdx.x; u < job.n_units; u += THREADS) {
        const unit_record &r = record[u];
        const double scale = r.max > -INFINITY ? exp((double)r.max - (double)max) : 0;
        sum += scale * (double)r.sum;
        dif += scale * (double)r.dif;
        if (r.base_max > -INFINITY) base += exp((double)r.base_max - (double)base_max) * (double)r.base_sum;
    }
    visit_uncommon(job, o, [&](int id) {
        const float x = one_sum(job, o, i, id, shared.lse);
        if (!(x > -INFINITY)) return;
        const double weight = exp((double)x - (double)max);
        sum += weight;
        if (!(o.d.flags & RAST_DRAW_STATS)) return;
        const float b = one_logit(job, 0, i, id);
        if (b != -INFINITY) dif += weight * ((double)x - (double)b);
    });
    sum = block_sum(sum, shared.doubles);
    dif = block_sum(dif, shared.doubles);
    base = block_sum(base, shared.doubles);
    return {(double)max + log(sum), (double)base_max + log(base), dif / sum};
}

/* Filters the row of processed logits and draws from what stays. */
__device__ static void finish_filtered(const transfer_job &job, const output &o, selection &s,
                                       const block_memory &shared, best_id &best) {
    float max = -INFINITY;
    for (int t = (int)threadIdx.x; t < s.n_tiles; t += THREADS) max = larger(max, order_value(s.tile_key[t]));
    s.max = max = block_max(max, shared.floats);

    /* First the tiles' maxima (the k-th greatest logit is at least the k-th greatest of these: other tiles need not be
     * read), then top-k, then top-p. One loop, so that the search is compiled once. */
#pragma unroll 1
    for (int stage = 0; stage < 3; stage++) {
        if (stage == 2 ? o.d.top_p >= 1.0f : o.d.top_k <= 0 || (stage == 0 && o.d.top_k >= s.n_tiles)) continue;
        if (stage == 0)
            s.source = SELECT_MAXIMA;
        else if (s.source == SELECT_MAXIMA)
            s.source = SELECT_ROW;
        s.floor =
            larger(s.floor, select_threshold(s, stage == 2 ? 0 : (select_mass)o.d.top_k, 1.0 - (double)o.d.top_p));
    }
    const auto stays = [&](float x) {
        return x > -INFINITY &&
               (x == max || (x >= s.floor && (!(o.d.min_p > 0.0f) || select_weight(s, x) >= o.d.min_p)));
    };
    if (o.d.target == -1) {
        select_visit(s, [&](float x, int id, bool) {
            if (!stays(x)) return;
            uint32_t r[4];
            rast_philox(o.d.stream, (uint32_t)id / 4, o.d.position, r);
            const uint32_t low = id & 1 ? r[1] : r[0], high = id & 1 ? r[3] : r[2], mine = id & 2 ? high : low;
            if ((double)key_bound(x, mine) >= best.key) merge(best, (double)x + rast_gumbel(mine), id);
        });
    }
    if (o.d.flags & RAST_DRAW_SCORES) {
        __syncthreads(); /* the row has been read */
        for (int v = (int)threadIdx.x; v < job.l.n_vocab; v += THREADS)
            if (!stays(o.row[v])) o.row[v] = -INFINITY;
    }
}

/* Of several outputs of a slot (drafts to verify), the last one's token is the slot's. */
__device__ static bool is_last_of_slot(const transfer_job &job, const output &o) {
    const rast_draw *draws = pointer<const rast_draw>(job.l.draw);
    int later = 0;
    for (int p = o.at + 1 + (int)threadIdx.x; p < job.l.n_out; p += THREADS) later |= draws[p].slot == o.d.slot;
    return !__syncthreads_or(later) && o.d.slot >= 0;
}

static __device__ __forceinline__ void finish(const transfer_job &job, const output &o, size_t i) {
    __shared__ select_mass bucket[SELECT_BUCKETS], mass_by_warp[THREADS / 32], found[2];
    __shared__ float list_x[SELECT_LIST], floats[THREADS / 32], lse[RAST_KERNEL_MODELS];
    __shared__ int list_id[SELECT_LIST], n_listed, ints[THREADS / 32];
    __shared__ double doubles[THREADS / 32];
    const block_memory shared = {floats, doubles, ints, lse};
    const unit_record *record = job.record + i * (size_t)job.n_units;
    best_id best = {-INFINITY, -1}, base_choice = {-INFINITY, -1};
    float uncommon_max = -INFINITY;
    int bad = INT_MAX;

    for (int u = (int)threadIdx.x; u < job.n_units; u += THREADS) {
        merge(best, record[u].key, record[u].id);
        merge(base_choice, (double)record[u].base_key, record[u].base_id);
        bad = smaller(bad, record[u].bad);
    }
    bad = block_min(bad, shared.ints);
    rast_drawn *out = pointer<rast_drawn>(job.l.out) + o.at;
    rast_drawn result = {-1, NAN, {-1, NAN, NAN}, bad < INT_MAX ? bad : -1};
    if (bad < INT_MAX) {
        if (threadIdx.x == 0) *out = result;
        return;
    }
    if (o.has_uncommon) {
        term_constants(job, o, i, shared);
        uncommon_max = finish_uncommon(job, o, i, shared.lse, best);
        __syncthreads(); /* the row is complete */
    }
    if (o.filtered) {
        selection s;
        s.row = o.row;
        s.row_aligned = reinterpret_cast<uintptr_t>(o.row) % 16 == 0;
        s.n_vocab = job.l.n_vocab;
        s.n_tiles = (job.l.n_vocab + SELECT_TILE - 1) / SELECT_TILE;
        s.tile_key = job.tile_key + i * (size_t)job.n_units * CHUNKS;
        s.source = SELECT_ROW;
        s.floor = -INFINITY;
        s.unit = ldexpf(1, 30 + __clz(job.l.n_vocab));
        s.list_x = list_x, s.list_id = list_id, s.n_listed = &n_listed;
        s.bucket = bucket, s.by_warp = mass_by_warp, s.found = found;
        finish_filtered(job, o, s, shared, best);
    }
    best = block_best(best, shared);
    result.token = o.d.target >= 0 ? o.d.target : best.id;
    if (o.d.target == -1 && result.token < 0) result.bad = -2;
    const bool last = is_last_of_slot(job, o);

    if (o.d.flags & RAST_DRAW_STATS) base_choice = block_best(base_choice, shared);
    if (o.d.flags & MEASURED) {
        const sums all = merge_sums(job, o, i, uncommon_max, shared);
        if (threadIdx.x == 0) {
            if (o.d.flags & RAST_DRAW_STATS) {
                const double kl = all.dif - (all.combined - all.base);
                result.stats.base_token = base_choice.id;
                result.stats.kl = (float)(kl < 0 ? 0 : kl);
            }
            if (o.d.flags & RAST_DRAW_LOGPROB && result.token >= 0)
                result.logprob = (float)((double)one_sum(job, o, i, result.token, lse) - all.combined);
            if (o.d.flags & RAST_DRAW_STATS && result.token >= 0) {
                const float logit = result.token < job.l.n_valid ? one_logit(job, 0, i, result.token) : -INFINITY;
                result.stats.base_logprob = (float)((double)logit - all.base);
            }
        }
    }
    if (threadIdx.x) return;
    *out = result;
    if (job.l.drawn && last && result.token >= 0) pointer<int32_t>(job.l.drawn)[o.d.slot] = result.token;
}

/* Grid: blocks of the sweep, output by output. */
static __global__ void __launch_bounds__(THREADS, 2) transfer_kernel(const transfer_job job) {
    const size_t i = blockIdx.x / (unsigned)job.blocks;
    const output o = load_output(job, i);
    sweep(job, o, i);
    if (is_last_block(job, i)) finish(job, o, i);
}

/* ---- launch ------------------------------------------------------------------------------------------------------ */

static size_t n_units_of(const rast_logits *l) { return ((size_t)l->n_vocab + UNIT - 1) / UNIT; }

/* Bytes of scratch for one output. */
static size_t scratch_of_output(const rast_logits *l) {
    const size_t unit =
        sizeof(unit_record) + UNIT * sizeof(float) + CHUNKS * sizeof(unsigned) + (size_t)l->n_terms * sizeof(float2);
    return n_units_of(l) * unit;
}

size_t rast_kernel_transfer_scratch(const rast_logits *l, int32_t n_out) {
    const size_t one = scratch_of_output(l);
    if (n_out <= 0 || !one) return 0;
    return one <= (SIZE_MAX - COUNTER_BYTES) / (size_t)n_out ? COUNTER_BYTES + one * (size_t)n_out : SIZE_MAX;
}

void rast_kernel_transfer(cudaStream_t stream, const rast_logits *l, const rast_transfer_term *terms, int32_t first_out,
                          int32_t n_out, rast_dev scratch) {
    const size_t n_units = n_units_of(l), n = (size_t)n_out;
    if (n_out <= 0) return;
    transfer_job job = {};
    job.l = *l;
    for (int32_t m = 0; m < l->n_terms; m++) job.term[m] = terms[m];
    job.first_out = first_out;
    job.n_units = (int)n_units;
    job.n_swept = pointer<unsigned>(scratch);
    job.record = pointer<unit_record>(scratch + COUNTER_BYTES);
    job.row = reinterpret_cast<float *>(job.record + n * n_units);
    job.tile_key = reinterpret_cast<unsigned *>(job.row + n * n_units * UNIT);
    job.term_sum = reinterpret_cast<float2 *>(job.tile_key + n * n_units * CHUNKS);

    const size_t turns = (n * n_units + SWEEP_WARPS - 1) / SWEEP_WARPS; /* units of a warp */
    job.warps = (int)((n_units + turns - 1) / turns);
    job.blocks = (job.warps + THREADS / 32 - 1) / (THREADS / 32);
    RAST_LAUNCH(transfer_kernel, dim3((unsigned)job.blocks * (unsigned)n_out), dim3(THREADS), 0, stream, job);
}
