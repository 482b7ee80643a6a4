/* error.h: how C functions report an error: a status code, with a message written for the user. */
#ifndef RAST_ERROR_H
#define RAST_ERROR_H

#include "rast.h"

/* Writes the message (printf) and returns `code`; err may be NULL. */
int rast_fail(rast_error *err, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* *out = a * b (or a + b); 0 if it overflows size_t. */
static inline int rast_mul(size_t a, size_t b, size_t *out) { return !__builtin_mul_overflow(a, b, out); }
static inline int rast_add(size_t a, size_t b, size_t *out) { return !__builtin_add_overflow(a, b, out); }

#endif
