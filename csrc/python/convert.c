/* convert.c: see convert.h. */
#include "convert.h"

#include <math.h>
#include <string.h>

static int read_signed(PyObject *integer, long long min, long long max, long long *out) {
    int overflow;
    *out = PyLong_AsLongLongAndOverflow(integer, &overflow);
    return !overflow && *out >= min && *out <= max;
}

static int read_unsigned(PyObject *integer, unsigned long long max, unsigned long long *out) {
    *out = PyLong_AsUnsignedLongLong(integer);
    if (*out == (unsigned long long)-1 && PyErr_Occurred()) {
        PyErr_Clear(); /* OverflowError: negative or too large */
        return 0;
    }
    return *out <= max;
}

static int read_integer(PyObject *value, py_kind kind, const char *what, const char *name, void *out) {
    if (!PyIndex_Check(value)) {
        PyErr_Format(PyExc_TypeError, "%s: %s must be an integer, not %.200s", what, name, Py_TYPE(value)->tp_name);
        return -1;
    }
    PyObject *integer = PyNumber_Index(value);
    if (!integer) return -1;
    long long s = 0;
    unsigned long long u = 0;
    int fits = 0;
    switch (kind) {
    case PY_I32:
        if ((fits = read_signed(integer, INT32_MIN, INT32_MAX, &s))) *(int32_t *)out = (int32_t)s;
        break;
    case PY_U32:
        if ((fits = read_unsigned(integer, UINT32_MAX, &u))) *(uint32_t *)out = (uint32_t)u;
        break;
    case PY_U64:
        if ((fits = read_unsigned(integer, UINT64_MAX, &u))) *(uint64_t *)out = u;
        break;
    default:
        if ((fits = read_unsigned(integer, SIZE_MAX, &u))) *(size_t *)out = (size_t)u;
        break;
    }
    if (!fits) PyErr_Format(PyExc_ValueError, "%s: %s = %S is out of range", what, name, integer);
    Py_DECREF(integer);
    return fits ? 0 : -1;
}

static int read_float(PyObject *value, py_kind kind, const char *what, const char *name, void *out) {
    double x = PyFloat_AsDouble(value);
    if (x == -1 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_TypeError))
            PyErr_Format(PyExc_TypeError, "%s: %s must be a number, not %.200s", what, name, Py_TYPE(value)->tp_name);
        else if (PyErr_ExceptionMatches(PyExc_OverflowError))
            PyErr_Format(PyExc_ValueError, "%s: %s is out of range", what, name);
        return -1;
    }
    if (kind == PY_F64) {
        *(double *)out = x;
        return 0;
    }
    if (isfinite(x) && !isfinite((float)x)) {
        PyErr_Format(PyExc_ValueError, "%s: %s = %S is out of range", what, name, value);
        return -1;
    }
    *(float *)out = (float)x;
    return 0;
}

static int read_bool(PyObject *value, const char *what, const char *name, int32_t *out) {
    if (!PyBool_Check(value) && !PyArray_IsScalar(value, Bool)) {
        PyErr_Format(PyExc_TypeError, "%s: %s must be a bool, not %.200s", what, name, Py_TYPE(value)->tp_name);
        return -1;
    }
    int truth = PyObject_IsTrue(value);
    *out = truth > 0;
    return truth < 0 ? -1 : 0;
}

int py_read(PyObject *value, py_kind kind, const char *what, const char *name, void *out) {
    switch (kind) {
    case PY_F32:
    case PY_F64:
        return read_float(value, kind, what, name, out);
    case PY_BOOL:
        return read_bool(value, what, name, out);
    case PY_OBJECT:
        *(PyObject **)out = value;
        return 0;
    default:
        return read_integer(value, kind, what, name, out);
    }
}

/* Names a key of `dict` that is not in the table. */
static void raise_unknown_key(PyObject *dict, const char *what, const py_field *fields, size_t n_fields) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);) {
        int known = 0;
        for (size_t i = 0; i < n_fields && PyUnicode_Check(key) && !known; i++)
            known = PyUnicode_CompareWithASCIIString(key, fields[i].name) == 0;
        if (known) continue;
        PyErr_Format(PyExc_TypeError, "%s: unknown key %R", what, key);
        return;
    }
}

PyObject *py_read_fields(PyObject *dict, const char *what, const py_field *fields, size_t n_fields, void *out) {
    if (!PyDict_Check(dict)) {
        PyErr_Format(PyExc_TypeError, "%s must be a dict, not %.200s", what, Py_TYPE(dict)->tp_name);
        return NULL;
    }
    PyObject *copy = PyDict_Copy(dict);
    if (!copy) return NULL;
    Py_ssize_t found = 0;
    for (size_t i = 0; i < n_fields; i++) {
        PyObject *name = PyUnicode_FromString(fields[i].name);
        if (!name) goto fail;
        PyObject *value = PyDict_GetItemWithError(copy, name);
        Py_DECREF(name);
        if (value) {
            found++;
            if (py_read(value, fields[i].kind, what, fields[i].name, (char *)out + fields[i].offset)) goto fail;
        } else if (PyErr_Occurred()) {
            goto fail;
        } else if (fields[i].required) {
            PyErr_Format(PyExc_TypeError, "%s: key '%s' is missing", what, fields[i].name);
            goto fail;
        }
    }
    if (found == PyDict_GET_SIZE(copy)) return copy;
    raise_unknown_key(copy, what, fields, n_fields);

fail:
    Py_DECREF(copy);
    return NULL;
}

const char *py_utf8(PyObject *value, const char *what, const char *name) {
    if (!PyUnicode_Check(value)) {
        PyErr_Format(PyExc_TypeError, "%s: %s must be a str, not %.200s", what, name, Py_TYPE(value)->tp_name);
        return NULL;
    }
    Py_ssize_t n;
    const char *text = PyUnicode_AsUTF8AndSize(value, &n);
    if (text && strlen(text) != (size_t)n) {
        PyErr_Format(PyExc_ValueError, "%s: %s contains a NUL character", what, name);
        return NULL;
    }
    return text;
}

PyArrayObject *py_vector(PyObject *value, int type, const char *what, const char *name) {
    PyArray_Descr *wanted = PyArray_DescrFromType(type);
    if (!wanted) return NULL;
    PyArrayObject *array = NULL;
    if (!PyArray_Check(value))
        PyErr_Format(PyExc_TypeError, "%s: %s must be a 1-D %S array, not %.200s", what, name, wanted,
                     Py_TYPE(value)->tp_name);
    else if (!PyArray_EquivTypes(PyArray_DESCR((PyArrayObject *)value), wanted))
        PyErr_Format(PyExc_TypeError, "%s: %s must have dtype %S, not %S", what, name, wanted,
                     PyArray_DESCR((PyArrayObject *)value));
    else if (PyArray_NDIM((PyArrayObject *)value) != 1)
        PyErr_Format(PyExc_ValueError, "%s: %s must have 1 dimension, not %d", what, name,
                     PyArray_NDIM((PyArrayObject *)value));
    else
        array = (PyArrayObject *)PyArray_FROM_OTF(value, type, NPY_ARRAY_IN_ARRAY);
    Py_DECREF(wanted);
    return array;
}

static PyObject *exception_class(const py_state *state, int32_t code) {
    switch (code) {
    case RAST_ERR_VALUE:
        return PyExc_ValueError;
    case RAST_ERR_MEMORY:
        return PyExc_MemoryError;
    case RAST_ERR_UNSUPPORTED:
        return PyExc_NotImplementedError;
    case RAST_ERR_NUMERIC:
        return state->numeric_error;
    case RAST_ERR_INTERRUPTED:
        return PyExc_KeyboardInterrupt;
    default:
        return PyExc_RuntimeError;
    }
}

PyObject *py_exception(const py_state *state, const rast_error *err) {
    /* the message may have been cut inside a character */
    PyObject *message = PyUnicode_DecodeUTF8(err->message, (Py_ssize_t)strlen(err->message), "replace");
    if (!message) return NULL;
    PyObject *exception = PyObject_CallFunctionObjArgs(exception_class(state, err->code), message, NULL);
    Py_DECREF(message);
    return exception;
}

void *py_raise(const py_state *state, const rast_error *err) {
    PyObject *exception = py_exception(state, err);
    if (exception) {
        PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
        Py_DECREF(exception);
    }
    return NULL;
}
