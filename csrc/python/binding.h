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
    PyTypeObject *model_type, *engine_type, *session_type;
    PyObject *numeric_error;
} py_state;

typedef struct py_handle { /* an engine, apart from its Python object, which it may outlive (py_model_retire) */
    rast_engine *engine;
    struct py_handle *next;
} py_handle;

typedef struct py_leaving { /* a session whose requests have to end, as soon as no step is running */
    PyObject *engine;       /* a reference */
    uint64_t session;
    int queued, forget, dead; /* forget: what has ended goes too; dead: this goes, its object is gone */
    struct py_leaving *next;
} py_leaving;

typedef struct py_waiter { /* a thread that wants the model; on its stack */
    unsigned long thread;
    PyThread_type_lock gate; /* closed until it is this thread's turn */
    int granted;
    struct py_waiter *next;
} py_waiter;

typedef struct {
    PyObject ob_base;
    rast_model *model;
    PyObject *keep;       /* list: the arrays that the core reads in place */
    PyObject *names;      /* tuple of str, one a net */
    int held;             /* a call is using the model or one of its engines; this and all below: guarded by the GIL */
    unsigned long holder; /* its thread */
    py_waiter *waiting;   /* in order of arrival */
    py_leaving *leaving;  /* meanwhile */
    py_handle *retired;   /* engines whose object died meanwhile */
} py_model;

extern PyType_Spec py_model_spec, py_engine_spec, py_session_spec;

PyObject *py_cpu_isas(PyObject *module, PyObject *unused);
PyObject *py_check_device(PyObject *module, PyObject *args);
PyObject *py_memory_read(PyObject *module, PyObject *array);
PyObject *py_quantize(PyObject *module, PyObject *args);

/* A model and its engines belong to one call at a time, and calls come in order of arrival. py_model_claim waits without the
 * GIL; it returns -1 with an exception set if this thread has the model already (RuntimeError), or if a signal's handler
 * raised. What a call takes it gives back before it returns, so that no signal finds the model taken between two bytecodes. */
int py_model_claim(py_model *self);
void py_model_release(py_model *self);
/* Whether this thread has it: then a callback of a call is running. */
int py_model_is_mine(const py_model *self);
/* For a deallocator, which must not wait: claims the model if it is free. */
int py_model_try_claim(py_model *self);

/* Frees an engine: at once, or when the call that is using the model ends. */
void py_model_retire(py_model *self, py_handle *handle);
/* Ends a session between two steps: at once, or by py_model_settle in the call that is using the model. */
void py_model_leave(py_model *self, py_leaving *leaving);
void py_model_settle(py_model *self);

/* Ends all that a session has running; with forget = 1 also what has ended and was not taken (engine.c). */
void py_engine_leave(PyObject *engine, uint64_t session, int forget);

#endif
