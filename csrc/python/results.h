/* results.h: gathers the chunks of a sample, without the GIL, and hands them over as a Result dict. */
#ifndef RAST_PY_RESULTS_H
#define RAST_PY_RESULTS_H

#include "binding.h"

/* What comes with tokens: each column has one entry (or row) a token. */
typedef enum {
    COLUMN_TOKENS,
    COLUMN_LOGPROB,
    COLUMN_BASE_TOKEN,
    COLUMN_BASE_LOGPROB,
    COLUMN_KL,
    COLUMN_LOGITS,
    COLUMN_SCORES,
    COLUMN_PARTS,
    N_COLUMNS
} py_column;

typedef struct {
    void *data; /* PyMem_Raw */
    size_t n, capacity;
} py_buffer; /* bytes that grow geometrically */

typedef struct {
    size_t n; /* tokens or prompt positions */
    py_buffer column[N_COLUMNS];
} py_rows;

typedef struct {
    uint64_t tag;
    uint32_t sample, want; /* want: which columns the result has; RAST_WANT_* */
    int32_t finish;
    int ended, taken, lost; /* lost: memory ran out for what it gave */
    rast_error *error;      /* a copy, PyMem_Raw; or NULL */
    py_rows fresh, prompt;
    size_t n_nets, n_vocab;                  /* shape of rows */
    uint64_t n_steps, n_drafted, n_accepted; /* steps that drew for it; drafts that they checked, and that stood */
} py_sample;

/* Adds a chunk; 0, or RAST_ERR_MEMORY. Needs no GIL. */
int py_sample_add(py_sample *self, const rast_chunk *chunk);
/* The Result dict; the arrays take over the buffers. NULL with an exception set. */
PyObject *py_sample_result(py_sample *self, const py_state *state);
void py_sample_free(py_sample *self);

/* "eos", "length", ..., or "" while the sample runs */
const char *py_finish_name(int32_t finish);

#endif
