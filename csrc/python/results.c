/* results.c: see results.h. */
#include "results.h"

#include <string.h>

#include "convert.h"

static const struct {
    const char *name;
    int type;
    uint32_t want; /* flag that asks for it; 0: always there */
    int n_dims;    /* 1: [n]; 2: [n, n_vocab]; 3: [n, n_nets, n_vocab] */
    int of_prompt; /* PromptResult has it */
} columns[N_COLUMNS] = {
    [COLUMN_TOKENS] = {"tokens", NPY_INT32, 0, 1, 0},
    [COLUMN_LOGPROB] = {"logprob", NPY_FLOAT32, RAST_WANT_LOGPROBS, 1, 1},
    [COLUMN_BASE_TOKEN] = {"base_token", NPY_INT32, RAST_WANT_STATS, 1, 1},
    [COLUMN_BASE_LOGPROB] = {"base_logprob", NPY_FLOAT32, RAST_WANT_STATS, 1, 1},
    [COLUMN_KL] = {"kl", NPY_FLOAT32, RAST_WANT_STATS, 1, 1},
    [COLUMN_LOGITS] = {"logits", NPY_FLOAT32, RAST_WANT_LOGITS, 2, 1},
    [COLUMN_SCORES] = {"scores", NPY_FLOAT32, RAST_WANT_SCORES, 2, 0},
    [COLUMN_PARTS] = {"parts", NPY_FLOAT32, RAST_WANT_COMPONENTS, 3, 1},
};

/* ---- gathering --------------------------------------------------------------------------------------------------- */

/* Room for `bytes` more at the end; NULL: out of memory. */
static void *grow(py_buffer *b, size_t bytes) {
    if (bytes > SIZE_MAX / 2 - b->n) return NULL;
    size_t needed = b->n + bytes;
    if (needed > b->capacity) {
        size_t capacity = needed > 2 * b->capacity ? needed : 2 * b->capacity;
        void *data = PyMem_RawRealloc(b->data, capacity);
        if (!data) return NULL;
        b->data = data;
        b->capacity = capacity;
    }
    void *end = (char *)b->data + b->n;
    b->n = needed;
    return end;
}

/* The sizes cannot overflow: the source is an array of that many bytes in memory. */
static int append(py_buffer *b, const void *source, size_t bytes) {
    if (!source || !bytes) return RAST_OK;
    void *end = grow(b, bytes);
    if (!end) return RAST_ERR_MEMORY;
    memcpy(end, source, bytes);
    return RAST_OK;
}

static int append_stats(py_rows *rows, const rast_stats *stats, size_t n) {
    if (!stats || !n) return RAST_OK;
    int32_t *token = grow(&rows->column[COLUMN_BASE_TOKEN], n * sizeof *token);
    float *logprob = grow(&rows->column[COLUMN_BASE_LOGPROB], n * sizeof *logprob);
    float *kl = grow(&rows->column[COLUMN_KL], n * sizeof *kl);
    if (!token || !logprob || !kl) return RAST_ERR_MEMORY;
    for (size_t i = 0; i < n; i++) {
        token[i] = stats[i].base_token;
        logprob[i] = stats[i].base_logprob;
        kl[i] = stats[i].kl;
    }
    return RAST_OK;
}

int py_sample_add(py_sample *self, const rast_chunk *chunk) {
    py_rows *rows = chunk->prompt ? &self->prompt : &self->fresh;
    size_t n = chunk->n, row = n * self->n_vocab * sizeof(float);
    if (append(&rows->column[COLUMN_TOKENS], chunk->token, n * sizeof(int32_t)) ||
        append(&rows->column[COLUMN_LOGPROB], chunk->logprob, n * sizeof(float)) ||
        append_stats(rows, chunk->stats, n) || append(&rows->column[COLUMN_LOGITS], chunk->logits, row) ||
        append(&rows->column[COLUMN_SCORES], chunk->scores, row) ||
        append(&rows->column[COLUMN_PARTS], chunk->parts, row * self->n_nets))
        return RAST_ERR_MEMORY;
    rows->n += n;
    self->finish = chunk->finish;
    if (n && !chunk->prompt) {
        self->n_steps++;
        self->n_drafted += chunk->n_drafted;
        self->n_accepted += n - 1;
    }
    if (chunk->error && !self->error) {
        self->error = PyMem_RawMalloc(sizeof *self->error);
        if (!self->error) return RAST_ERR_MEMORY;
        *self->error = *chunk->error;
    }
    return RAST_OK;
}

static void rows_free(py_rows *rows) {
    rows->n = 0;
    for (int c = 0; c < N_COLUMNS; c++) {
        PyMem_RawFree(rows->column[c].data);
        rows->column[c] = (py_buffer){0};
    }
}

void py_sample_free(py_sample *self) {
    rows_free(&self->fresh);
    rows_free(&self->prompt);
    PyMem_RawFree(self->error);
    self->error = NULL;
}

/* ---- handing over ------------------------------------------------------------------------------------------------ */

static void free_capsule(PyObject *capsule) { PyMem_RawFree(PyCapsule_GetPointer(capsule, NULL)); }

/* An array over the buffer's memory, which it owns from then on. */
static PyObject *to_array(py_buffer *b, int n_dims, npy_intp *shape, int type) {
    if (!b->n) return PyArray_ZEROS(n_dims, shape, type, 0);
    void *data = PyMem_RawRealloc(b->data, b->n); /* gives back what it grew too far */
    if (data) b->data = data;
    PyObject *capsule = PyCapsule_New(b->data, NULL, free_capsule);
    if (!capsule) return NULL;
    data = b->data;
    *b = (py_buffer){0};
    PyObject *array = PyArray_SimpleNewFromData(n_dims, shape, type, data);
    if (!array) {
        Py_DECREF(capsule);
        return NULL;
    }
    if (PyArray_SetBaseObject((PyArrayObject *)array, capsule)) { /* takes the capsule even if it fails */
        Py_DECREF(array);
        return NULL;
    }
    return array;
}

/* dict[key] = value, taking over the value; NULL values pass the error on. */
static int set_item(PyObject *dict, const char *key, PyObject *value) {
    int rc = value ? PyDict_SetItemString(dict, key, value) : -1;
    Py_XDECREF(value);
    return rc;
}

static int set_columns(PyObject *dict, py_rows *rows, const py_sample *self, int of_prompt) {
    for (int c = 0; c < N_COLUMNS; c++) {
        if (of_prompt && !columns[c].of_prompt) continue;
        PyObject *value;
        if (columns[c].want && !(self->want & columns[c].want)) {
            value = Py_NewRef(Py_None);
        } else {
            int n_dims = columns[c].n_dims;
            npy_intp shape[3] = {(npy_intp)rows->n, (npy_intp)self->n_vocab, (npy_intp)self->n_vocab};
            if (n_dims == 3) shape[1] = (npy_intp)self->n_nets;
            value = to_array(&rows->column[c], n_dims, shape, columns[c].type);
        }
        if (set_item(dict, columns[c].name, value)) return -1;
    }
    return 0;
}

static PyObject *prompt_result(py_sample *self) {
    if (!(self->want & RAST_WANT_PROMPT) || self->sample) return Py_NewRef(Py_None);
    PyObject *dict = PyDict_New();
    if (dict && set_columns(dict, &self->prompt, self, 1)) Py_CLEAR(dict);
    return dict;
}

static PyObject *sample_error(const py_sample *self, const py_state *state) {
    if (self->lost) return PyObject_CallFunction(PyExc_MemoryError, "s", "out of memory for the results");
    return self->error ? py_exception(state, self->error) : Py_NewRef(Py_None);
}

PyObject *py_sample_result(py_sample *self, const py_state *state) {
    PyObject *dict = PyDict_New();
    if (self->lost) self->finish = RAST_FINISH_ERROR;
    if (dict && (set_item(dict, "tag", PyLong_FromUnsignedLongLong(self->tag)) ||
                 set_item(dict, "sample", PyLong_FromUnsignedLong(self->sample)) ||
                 set_item(dict, "finish", PyUnicode_FromString(py_finish_name(self->finish))) ||
                 set_item(dict, "error", sample_error(self, state)) ||
                 set_item(dict, "steps", PyLong_FromUnsignedLongLong(self->n_steps)) ||
                 set_item(dict, "drafted", PyLong_FromUnsignedLongLong(self->n_drafted)) ||
                 set_item(dict, "accepted", PyLong_FromUnsignedLongLong(self->n_accepted)) ||
                 set_columns(dict, &self->fresh, self, 0) || set_item(dict, "prompt", prompt_result(self))))
        Py_CLEAR(dict);
    return dict;
}

const char *py_finish_name(int32_t finish) {
    static const char *const names[] = {
        [RAST_RUNNING] = "",           [RAST_FINISH_EOS] = "eos",   [RAST_FINISH_LENGTH] = "length",
        [RAST_FINISH_STOP] = "stop",   [RAST_FINISH_TIME] = "time", [RAST_FINISH_CANCELLED] = "cancelled",
        [RAST_FINISH_ERROR] = "error",
    };
    return names[finish];
}
