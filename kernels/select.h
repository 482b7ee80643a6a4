/* select.h: top-k, top-p and min-p without sorting: a block finds the threshold that the logits of a row must reach.
 *
 * A threshold is the least x such that what lies above it weighs less than a target: k entries (top-k), or a share of
 * the whole (top-p). One histogram over the distance to the maximum says in which bucket it lies; histograms of that
 * bucket's bits, ten at a time, say where. Weights are added up as integers, so that the order of the atomic additions
 * does not matter. Whatever can no longer stay is left behind: few candidates fit into a list in shared memory.
 */
#ifndef RAST_KERNELS_SELECT_H
#define RAST_KERNELS_SELECT_H

#include "block.h"

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>

enum { SELECT_BUCKETS = 1024, SELECT_LIST = 2048, SELECT_TILE = 128, SELECT_AHEAD = 4 };

typedef unsigned long long select_mass;

/* Maps floats to integers of the same order, and back. */
__device__ __forceinline__ unsigned order_key(float x) {
    const unsigned u = __float_as_uint(x);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}
__device__ __forceinline__ float order_value(unsigned key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

enum select_source { SELECT_ROW, SELECT_MAXIMA, SELECT_LISTED };

struct selection {
    select_source source;
    const float *row;         /* [n_tiles * SELECT_TILE], or [n_vocab] */
    const unsigned *tile_key; /* [n_tiles] order_key of the tiles' maxima */
    int n_vocab, n_tiles;
    int row_aligned; /* the row begins at a multiple of 16 bytes */
    float max;       /* the greatest logit of the row */
    float floor;     /* candidates are above -inf and not below this */
    float unit;      /* weight 1 as an integer; the sum of n_vocab of them fits */
    int n_list;

    float *list_x; /* shared memory from here on: [SELECT_LIST] */
    int *list_id;  /* [SELECT_LIST] */
    int *n_listed;
    select_mass *bucket;  /* [SELECT_BUCKETS] */
    select_mass *by_warp; /* [warps] */
    select_mass *found;   /* [2] bucket, and the mass before it */
};

__device__ __forceinline__ float select_weight(const selection &s, float x) {
    return x == s.max ? 1.0f : expf(x - s.max); /* the maximum may be infinite */
}

/* Bucket of x by its distance to the maximum: 1/32 wide, the last one open. */
__device__ __forceinline__ unsigned select_bucket(const selection &s, float x) {
    return (unsigned)fminf((s.max - x) * 32.0f, (float)(SELECT_BUCKETS - 1));
}

/* Calls f(x, id, whether x is a candidate) with all lanes of each warp together. */
template <class F> __device__ __forceinline__ void select_visit(const selection &s, F f) {
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, threads = (int)blockDim.x;
    if (s.source == SELECT_LISTED) {
        for (int i = (int)threadIdx.x; i - lane < s.n_list; i += threads) {
            const float x = i < s.n_list ? s.list_x[i] : -INFINITY;
            f(x, i < s.n_list ? s.list_id[i] : -1, x > -INFINITY && x >= s.floor);
        }
        return;
    }
    if (s.source == SELECT_MAXIMA) {
        for (int t = (int)threadIdx.x; t - lane < s.n_tiles; t += threads) {
            const float x = t < s.n_tiles ? order_value(s.tile_key[t]) : -INFINITY;
            f(x, t, x > -INFINITY && x >= s.floor);
        }
        return;
    }
    for (int first = warp * SELECT_AHEAD; first < s.n_tiles; first += threads / 32 * SELECT_AHEAD) {
        float x[SELECT_AHEAD][4];
        bool needed[SELECT_AHEAD];
#pragma unroll
        for (int k = 0; k < SELECT_AHEAD; k++) {
            const float tile_max = first + k < s.n_tiles ? order_value(s.tile_key[first + k]) : -INFINITY;
            const int v = (first + k) * SELECT_TILE + lane * 4;
            needed[k] = tile_max > -INFINITY && tile_max >= s.floor;
            if (needed[k] && s.row_aligned && v + 4 <= s.n_vocab) {
                const float4 four = *reinterpret_cast<const float4 *>(s.row + v);
                x[k][0] = four.x, x[k][1] = four.y, x[k][2] = four.z, x[k][3] = four.w;
            } else {
#pragma unroll
                for (int j = 0; j < 4; j++) x[k][j] = needed[k] && v + j < s.n_vocab ? s.row[v + j] : -INFINITY;
            }
        }
#pragma unroll
        for (int k = 0; k < SELECT_AHEAD; k++) {
            if (!needed[k]) continue; /* the same for all lanes */
#pragma unroll
            for (int j = 0; j < 4; j++)
                f(x[k][j], (first + k) * SELECT_TILE + lane * 4 + j, x[k][j] > -INFINITY && x[k][j] >= s.floor);
        }
    }
}

/* bucket[b] += mass. Lanes that share the first lane's bucket add up first: equal logits would queue for one word. */
__device__ __forceinline__ void select_add(const selection &s, unsigned b, select_mass mass) {
    const unsigned active = __ballot_sync(ALL_LANES, mass != 0);
    if (!active) return;
    const int leader = __ffs((int)active) - 1;
    const unsigned most = __shfl_sync(ALL_LANES, b, leader);
    const bool same = mass != 0 && b == most;
    if (__popc(__ballot_sync(ALL_LANES, same)) > 2) {
        const long long sum = warp_sum(same ? (long long)mass : 0);
        if ((int)threadIdx.x % 32 == leader) atomicAdd(&s.bucket[b], (select_mass)sum);
        if (same) return;
    }
    if (mass) atomicAdd(&s.bucket[b], mass);
}

__device__ __forceinline__ void select_clear(const selection &s) {
    __syncthreads();
    for (unsigned i = threadIdx.x; i < SELECT_BUCKETS; i += blockDim.x) s.bucket[i] = 0;
    __syncthreads();
}

/* The first bucket at which the running sum reaches the target, and the sum before it. target 0: all but `share` of the
 * whole, and *target says how much that was. Returns the whole; if it is less than the target, there is no such bucket. */
__device__ inline select_mass select_find(const selection &s, double share, select_mass *target, unsigned *b,
                                          select_mass *before) {
    const unsigned per_thread = SELECT_BUCKETS / blockDim.x, first = threadIdx.x * per_thread;
    const int lane = (int)threadIdx.x % 32;
    select_mass mine = 0, sum = 0, whole = 0;
    __syncthreads();
    for (unsigned i = 0; i < per_thread; i++) mine += s.bucket[first + i];
    long long scan = (long long)mine;
    for (int i = 1; i < 32; i *= 2) {
        const long long below = __shfl_up_sync(ALL_LANES, scan, (unsigned)i);
        if (lane >= i) scan += below;
    }
    if (lane == 31) s.by_warp[threadIdx.x / 32] = (select_mass)scan;
    __syncthreads();
    for (unsigned w = 0; w < blockDim.x / 32; w++) {
        if (w == threadIdx.x / 32) sum = whole;
        whole += s.by_warp[w];
    }
    sum += (select_mass)scan - mine;
    if (!*target) {
        const double kept = ceil((double)whole - share * (double)whole);
        *target = kept < 1 ? 1 : kept < (double)whole ? (select_mass)kept : whole;
    }
    if (sum < *target && *target <= sum + mine) {
        unsigned i = first;
        while (sum + s.bucket[i] < *target) sum += s.bucket[i++];
        s.found[0] = i;
        s.found[1] = sum;
    }
    __syncthreads();
    *b = (unsigned)s.found[0];
    *before = s.found[1];
    return whole;
}

/* If the candidates in buckets up to b are few, lists them; nothing else is a candidate any more then. */
__device__ inline void select_gather(selection &s, unsigned b) {
    __syncthreads();
    if (threadIdx.x == 0) *s.n_listed = 0;
    __syncthreads();
    select_visit(s, [&](float x, int id, bool here) {
        if (!here || select_bucket(s, x) > b) return;
        const int at = atomicAdd(s.n_listed, 1);
        if (at < SELECT_LIST) s.list_x[at] = x, s.list_id[at] = id;
    });
    __syncthreads();
    if (*s.n_listed > SELECT_LIST) return;
    s.n_list = *s.n_listed;
    s.source = SELECT_LISTED;
}

/* The least candidate above which there are fewer than `count` others; or, with count 0, others that weigh less than all
 * but `share` of the whole. -inf: all stay. */
__device__ inline float select_threshold(selection &s, select_mass count, double share) {
    const auto mass = [&](float x) { return count ? (select_mass)1 : (select_mass)(select_weight(s, x) * s.unit); };
    select_mass target = count, before;
    unsigned b, c;
    select_clear(s);
    select_visit(s,
                 [&](float x, int, bool here) { select_add(s, here ? select_bucket(s, x) : 0, here ? mass(x) : 0); });
    if (select_find(s, share, &target, &b, &before) < target) return -INFINITY;
    target -= before;
    if (s.source == SELECT_ROW) select_gather(s, b);

    /* The bucket's bounds with room for rounding; only its own entries count. */
    const float slack = 4e-7f * (fabsf(s.max) + SELECT_BUCKETS / 32);
    unsigned lo = b < SELECT_BUCKETS - 1 ? order_key(s.max - (float)(b + 1) / 32 - slack) : 0;
    unsigned hi = order_key(s.max - (float)b / 32 + slack);
    if (!(fabsf(s.max) <= FLT_MAX)) lo = 0, hi = 0xffffffffu;
    while (lo < hi) {
        unsigned shift = 0;
        while ((hi - lo) >> shift >= SELECT_BUCKETS) shift++;
        select_clear(s);
        select_visit(s, [&](float x, int, bool here) {
            const unsigned key = order_key(x);
            here = here && key >= lo && key <= hi && select_bucket(s, x) == b;
            select_add(s, here ? (hi - key) >> shift : 0, here ? mass(x) : 0);
        });
        if (select_find(s, 0, &target, &c, &before) < target) return order_value(lo); /* all that is left stays */
        target -= before;
        hi -= c << shift;
        if (hi - lo >= 1u << shift) lo = hi - ((1u << shift) - 1);
    }
    return order_value(hi);
}

#endif
