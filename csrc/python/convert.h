/* convert.h: checked conversions from Python objects to C values, and from rast_error to exceptions.
 *
 * Messages read "<what>: <name> must be ...". On failure an exception is set: TypeError for a wrong type or dtype and for
 * unknown or missing keys, ValueError for a value out of range or a wrong shape.
 */
#ifndef RAST_CONVERT_H
#define RAST_CONVERT_H

#include "binding.h"

typedef enum { PY_I32, PY_U32, PY_U64, PY_SIZE, PY_F32, PY_F64, PY_BOOL, PY_OBJECT } py_kind;

typedef struct {
    const char *name;
    py_kind kind;
    int required;
    size_t offset; /* into the struct that is filled in; PY_BOOL: int32_t; PY_OBJECT: PyObject *, borrowed */
} py_field;

/* Fills in the fields that `dict` has; others keep their value. Returns a copy of the dict, which owns the PY_OBJECTs (a
 * conversion may run Python code that changes the original), or NULL. */
PyObject *py_read_fields(PyObject *dict, const char *what, const py_field *fields, size_t n_fields, void *out);

/* Writes the value as `kind`; 0 or -1. */
int py_read(PyObject *value, py_kind kind, const char *what, const char *name, void *out);

/* UTF-8 of a str without NUL characters, owned by the str; or NULL. */
const char *py_utf8(PyObject *value, const char *what, const char *name);

/* A C-contiguous, aligned 1-D array of exactly this NumPy type: a new reference to `value`, or to a copy of a strided
 * one. */
PyArrayObject *py_vector(PyObject *value, int type, const char *what, const char *name);

/* A new exception object of the class that fits the error; or NULL. */
PyObject *py_exception(const py_state *state, const rast_error *err);
/* Sets the exception and returns NULL. */
void *py_raise(const py_state *state, const rast_error *err);

#endif
