/* request.h: a Python request dict as a rast_request. */
#ifndef RAST_PY_REQUEST_H
#define RAST_PY_REQUEST_H

#include "binding.h"

typedef struct {
    rast_request request;
    PyObject *fields; /* dict: owns the objects that request was read from */
    PyObject *arrays; /* list: owns the vectors that request points to */
    void *stop_strings, *bad_words;
} py_request;

/* Reads the dict described by `Request` in _core.pyi. 0, or -1 with an exception set. Free it either way. */
int py_request_read(PyObject *dict, py_request *out);
void py_request_free(py_request *self);

#endif
