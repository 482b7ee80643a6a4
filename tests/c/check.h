/* check.h: what the C tests share: a check that ends the program and says where, random numbers, half precision. */
#ifndef RAST_TESTS_CHECK_H
#define RAST_TESTS_CHECK_H

#include "../../csrc/rng.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static const char *checking = ""; /* what is tested, an instruction set or a seed: printed with a check that fails */
static size_t n_checks;
static uint64_t rng_state = 1;

#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        n_checks++;                                                                                                    \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s: %s: ", __FILE__, __LINE__, checking, #condition);                              \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fputc('\n', stderr);                                                                                       \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static inline uint64_t rng(void) { return rast_mix(rng_state += 0x9E3779B97F4A7C15u); }
static inline size_t below(size_t n) { return (size_t)(rng() % n); }
static inline int chance(double p) { return (double)(rng() >> 11) * 0x1p-53 < p; }
static inline float uniform(void) { return (float)((double)(rng() >> 11) * 0x1p-52 - 1); } /* in [-1, 1) */

static inline void *zeroed(size_t n, size_t size) {
    void *p = calloc(n ? n : 1, size);
    CHECK(p, "out of memory");
    return p;
}

static inline double half_value(int h) {
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    const double size = exponent == 31  ? (fraction ? NAN : INFINITY)
                        : exponent == 0 ? ldexp(fraction, -24)
                                        : ldexp(1024 + fraction, exponent - 25);
    return h >> 15 ? -size : size;
}

#endif
