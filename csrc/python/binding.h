/* binding.h: what the files of the Python binding share: NumPy's set-up, the module's state and its types. */
#ifndef RAST_BINDING_H
#define RAST_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL rast_numpy_api
#ifndef RAST_IMPORTS_NUMPY /* module.c alone defines the table */
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "../rast.h"

typedef struct {
    PyTypeObject *model_type, *engine_type;
    PyObject *numeric_error;
} py_state;

typedef struct py_handle { /* an engine, apart from its Python object, which it may outlive (py_model_retire) */
    rast_engine *engine;
    struct py_handle *next;
} py_handle;

typedef struct {
    PyObject ob_base;
    rast_model *model;
    PyObject *keep;     /* list: the arrays that the core reads in place */
    PyObject *names;    /* tuple of str, one a net */
    int busy;           /* a call is using the model or one of its engines; guarded by the GIL */
    py_handle *retired; /* engines whose object died meanwhile */
} py_model;

extern PyType_Spec py_model_spec, py_engine_spec;

PyObject *py_cpu_isas(PyObject *module, PyObject *unused);
PyObject *py_check_device(PyObject *module, PyObject *args);
PyObject *py_memory_read(PyObject *module, PyObject *array);
PyObject *py_quantize(PyObject *module, PyObject *args);

/* A model and its engines belong to one call at a time. Claims the model, or sets RuntimeError and returns -1. */
int py_model_claim(py_model *self);
void py_model_release(py_model *self);

/* Frees an engine: at once, or when the call that is using the model ends. */
void py_model_retire(py_model *self, py_handle *handle);

#endif
