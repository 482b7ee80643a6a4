/* request.c: see request.h. */
#include "request.h"

#include <stddef.h>
#include <string.h>

#include "convert.h"

typedef struct { /* what the dict gives, before its objects are taken apart */
    rast_request r;
    PyObject *ids, *coef, *suppress, *bad_words, *eos, *stop_strings;
} raw_request;

#define FIELD(name, kind, required, member) {name, kind, required, offsetof(raw_request, member)}

static const py_field fields[] = {
    FIELD("ids", PY_OBJECT, 1, ids),
    FIELD("coef", PY_OBJECT, 1, coef),
    FIELD("max_new", PY_I32, 1, r.stop.max_new),
    FIELD("tag", PY_U64, 0, r.tag),
    FIELD("seed", PY_U64, 0, r.seed),
    FIELD("first_copy", PY_U32, 0, r.first_copy),
    FIELD("n_samples", PY_U32, 0, r.n_samples),
    FIELD("transfer_start", PY_U32, 0, r.transfer_start),
    FIELD("do_sample", PY_BOOL, 0, r.sampling.do_sample),
    FIELD("temperature", PY_F32, 0, r.sampling.temperature),
    FIELD("top_k", PY_I32, 0, r.sampling.top_k),
    FIELD("top_p", PY_F32, 0, r.sampling.top_p),
    FIELD("min_p", PY_F32, 0, r.sampling.min_p),
    FIELD("repetition_penalty", PY_F32, 0, r.sampling.repetition_penalty),
    FIELD("min_new_tokens", PY_I32, 0, r.sampling.min_new_tokens),
    FIELD("suppress", PY_OBJECT, 0, suppress),
    FIELD("bad_words", PY_OBJECT, 0, bad_words),
    FIELD("eos", PY_OBJECT, 0, eos),
    FIELD("stop_strings", PY_OBJECT, 0, stop_strings),
    FIELD("max_time", PY_F64, 0, r.stop.max_time),
    FIELD("n_draft", PY_I32, 0, r.n_draft),
    FIELD("draft_net", PY_I32, 0, r.draft_net),
    FIELD("want", PY_U32, 0, r.want),
    FIELD("prompt_from", PY_U32, 0, r.prompt_from),
};

/* *data, *n = the elements of a vector, which self->arrays then owns. value NULL: none. */
static int read_vector(py_request *self, PyObject *value, int type, const char *name, const void **data, size_t *n) {
    if (!value) return 0;
    PyArrayObject *array = py_vector(value, type, "request", name);
    if (!array) return -1;
    int rc = PyList_Append(self->arrays, (PyObject *)array);
    *data = PyArray_DATA(array);
    *n = (size_t)PyArray_SIZE(array);
    Py_DECREF(array);
    return rc;
}

/* One element of stop_strings or bad_words as bytes. */
static int read_part(py_request *self, PyObject *part, const char *name, size_t element, const void **data, size_t *n) {
    if (element > 1) return read_vector(self, part, NPY_INT32, name, data, n);
    if (!PyBytes_Check(part)) {
        PyErr_Format(PyExc_TypeError, "request: %s must hold bytes, not %.200s", name, Py_TYPE(part)->tp_name);
        return -1;
    }
    *data = PyBytes_AS_STRING(part);
    *n = (size_t)PyBytes_GET_SIZE(part);
    return 0;
}

/* Lays the parts of a sequence end to end: *lengths [*n] and *data share the block *owner. Elements are int32 (element 4)
 * or bytes (element 1). */
static int join(py_request *self, PyObject *value, const char *name, size_t element, void **owner, const void **data,
                const size_t **lengths, size_t *n) {
    if (!value) return 0;
    PyObject *parts = PySequence_Tuple(value);
    if (!parts) {
        if (PyErr_ExceptionMatches(PyExc_TypeError))
            PyErr_Format(PyExc_TypeError, "request: %s must be a sequence, not %.200s", name, Py_TYPE(value)->tp_name);
        return -1;
    }
    int rc = -1;
    size_t count = (size_t)PyTuple_GET_SIZE(parts), total = count * sizeof(size_t), length = 0;
    const void *part = NULL;
    for (size_t i = 0; i < count; i++) {
        if (read_part(self, PyTuple_GET_ITEM(parts, (Py_ssize_t)i), name, element, &part, &length)) goto done;
        if (length > (PY_SSIZE_T_MAX - total) / element) { /* the same array may stand there many times */
            PyErr_NoMemory();
            goto done;
        }
        total += length * element;
    }
    size_t *block = PyMem_Malloc(total);
    if (!block) {
        PyErr_NoMemory();
        goto done;
    }
    char *at = (char *)(block + count);
    for (size_t i = 0; i < count; i++) {
        if (read_part(self, PyTuple_GET_ITEM(parts, (Py_ssize_t)i), name, element, &part, &block[i])) {
            PyMem_Free(block);
            goto done;
        }
        if (block[i]) memcpy(at, part, block[i] * element);
        at += block[i] * element;
    }
    *owner = block;
    *lengths = block;
    *data = block + count;
    *n = count;
    rc = 0;

done:
    Py_DECREF(parts);
    return rc;
}

int py_request_read(PyObject *dict, py_request *out) {
    *out = (py_request){0};
    raw_request raw = {.r = {.n_samples = 1, .sampling = {.temperature = 1, .top_p = 1, .repetition_penalty = 1}}};
    out->fields = py_read_fields(dict, "request", fields, sizeof fields / sizeof *fields, &raw);
    out->arrays = out->fields ? PyList_New(0) : NULL;
    if (!out->arrays) return -1;
    out->request = raw.r;

    rast_request *r = &out->request;
    rast_sampling *s = &r->sampling;
    rast_stop *stop = &r->stop;
    const void *ids = NULL, *coef = NULL, *suppress = NULL, *eos = NULL, *bad_words = NULL, *strings = NULL;
    if (read_vector(out, raw.ids, NPY_INT32, "ids", &ids, &r->n_ids) ||
        read_vector(out, raw.coef, NPY_FLOAT32, "coef", &coef, &r->n_coef) ||
        read_vector(out, raw.suppress, NPY_INT32, "suppress", &suppress, &s->n_suppress) ||
        read_vector(out, raw.eos, NPY_INT32, "eos", &eos, &stop->n_eos) ||
        join(out, raw.bad_words, "bad_words", sizeof(int32_t), &out->bad_words, &bad_words, &s->bad_word_len,
             &s->n_bad_words) ||
        join(out, raw.stop_strings, "stop_strings", 1, &out->stop_strings, &strings, &stop->string_len,
             &stop->n_strings))
        return -1;
    r->ids = ids;
    r->coef = coef;
    s->suppress = suppress;
    s->bad_words = bad_words;
    stop->eos = eos;
    stop->strings = strings;
    return 0;
}

void py_request_free(py_request *self) {
    Py_CLEAR(self->fields);
    Py_CLEAR(self->arrays);
    PyMem_Free(self->stop_strings);
    PyMem_Free(self->bad_words);
    self->stop_strings = self->bad_words = NULL;
}
