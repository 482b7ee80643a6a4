/* gather.h: the samples of requests while an engine runs them, kept until their session takes them. */
#ifndef RAST_PY_GATHER_H
#define RAST_PY_GATHER_H

#include "results.h"

typedef struct py_group { /* the samples of one request */
    uint64_t id, session;
    uint32_t n, n_ended, n_taken;
    py_sample *samples; /* [n] */
    struct py_group *next;
} py_group;

typedef struct { /* in order of submission; all zero: empty */
    py_group *first, *last;
    py_group *found; /* by the last lookup: chunks come in the same order */
} py_gather;

/* Room for a request's samples; NULL: out of memory. */
py_group *py_gather_open(py_gather *self, uint64_t session, const rast_request *request, size_t n_nets, size_t n_vocab);
/* The group of a request, or NULL. */
py_group *py_gather_find(py_gather *self, uint64_t id);
/* Adds a chunk to its sample, which out of memory becomes an error. Returns its group, or NULL. Needs no GIL. */
py_group *py_gather_add(py_gather *self, const rast_chunk *chunk);
/* How many of the session's samples have something to take: have ended; or, with partial = 1, also have new tokens. */
size_t py_gather_ready(const py_gather *self, uint64_t session, int partial);
/* Appends their results to the list, by request and sample, and forgets what these hold. */
int py_gather_take(py_gather *self, uint64_t session, int partial, PyObject *list, const py_state *state);
/* Samples of the session that have not ended. */
size_t py_gather_left(const py_gather *self, uint64_t session);
/* Forgets those, which nobody runs any more. */
void py_gather_stop(py_gather *self, uint64_t session);
/* Forgets the session, whatever it has. */
void py_gather_close(py_gather *self, uint64_t session);
void py_gather_free(py_gather *self);

#endif
