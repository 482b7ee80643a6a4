/* rng.h: counter-based random numbers (Philox4x32-10, Salmon et al., SC'11): a draw depends only on
 * (stream, position, token id), never on the batch it happens in.
 *
 * Key = the 64-bit stream; counter = (token id / 4, position, 0, 0); the token's 32 bits are output word id % 4.
 */
#ifndef RAST_RNG_H
#define RAST_RNG_H

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define RAST_RNG_FUNCTION __host__ __device__ static inline
#else
#define RAST_RNG_FUNCTION static inline
#endif

RAST_RNG_FUNCTION void rast_philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t out[4]) {
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32), c2 = 0, c3 = 0;
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

/* Standard Gumbel from 32 bits: -log(-log(u)), u = (r + 0.5) / 2^32 in double, so that it is finite and exact at both ends. */
RAST_RNG_FUNCTION double rast_gumbel(uint32_t r) {
    double u = ((double)r + 0.5) * 0x1p-32;
    return -log(-log(u));
}

/* splitmix64's finaliser: turns any 64 bits into well-mixed ones. */
RAST_RNG_FUNCTION uint64_t rast_mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

#endif
