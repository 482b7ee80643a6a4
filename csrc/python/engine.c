/* engine.c: _core.Engine: runs requests on a model, without the GIL while it steps. */
#include <string.h>
#include <time.h>

#include "binding.h"
#include "convert.h"
#include "gather.h"
#include "request.h"

#define SIGNAL_INTERVAL 0.05 /* seconds without the GIL before signals get their turn */

typedef struct {
    PyObject ob_base;
    py_model *model;
    py_handle *handle;
    PyObject *drafter; /* or NULL */
    py_gather gather;  /* what run() and submit() asked for */
} py_engine;

static const py_state *state_of(py_engine *self) { return PyType_GetModuleState(Py_TYPE(self)); }

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- requests whose samples are gathered --------------------------------------------------------------------------- */

enum { RUN_SESSION = 0 }; /* of run(); submit() has others */

/* Queues a request for a session. Returns its group, or NULL with an exception set. */
static py_group *submit(py_engine *self, PyObject *dict, uint64_t session) {
    rast_error err = {0};
    py_request from;
    py_group *group = NULL;
    uint64_t id;
    if (!py_request_read(dict, &from)) {
        if (rast_engine_add(self->handle->engine, &from.request, &id, &err)) {
            py_raise(state_of(self), &err);
        } else {
            group = py_gather_open(&self->gather, session, &from.request, rast_model_n_nets(self->model->model),
                                   (size_t)rast_model_n_vocab(self->model->model));
            if (group)
                group->id = id;
            else
                PyErr_NoMemory();
            if (!group) rast_engine_cancel(self->handle->engine, id); /* its chunks are nobody's */
        }
    }
    py_request_free(&from);
    return group;
}

/* One step, and its chunks to their samples; *n_ended counts the session's that end. Needs no GIL. */
static int step_once(py_engine *self, uint64_t session, const rast_chunk **chunks, size_t *n, size_t *n_ended,
                     rast_error *err) {
    int rc = rast_engine_step(self->handle->engine, chunks, n, err);
    for (size_t i = 0; i < *n && !rc; i++) {
        const py_group *group = py_gather_add(&self->gather, &(*chunks)[i]);
        if (group && group->session == session && (*chunks)[i].finish != RAST_RUNNING) ++*n_ended;
    }
    return rc;
}

/* Steps until `most` samples of the session have ended, nothing is left to do, `interval` seconds are over, or something
 * fails. Needs no GIL. *chunks, *n: of the last step. */
static int advance(py_engine *self, uint64_t session, size_t most, double interval, const rast_chunk **chunks,
                   size_t *n, size_t *n_ended, rast_error *err) {
    double until = seconds() + interval;
    int rc = RAST_OK;
    do {
        rc = step_once(self, session, chunks, n, n_ended, err);
    } while (!rc && *n_ended < most && rast_engine_busy(self->handle->engine) && seconds() < until);
    return rc;
}

/* Ends all that the session has; other sessions go on. */
static void abandon(py_engine *self, uint64_t session) {
    const rast_chunk *chunks;
    size_t n, n_ended = 0, n_left = 0;
    for (py_group *group = self->gather.first; group; group = group->next)
        if (group->session == session && group->n_ended < group->n) {
            n_left += group->n - group->n_ended;
            rast_engine_cancel(self->handle->engine, group->id);
        }
    Py_BEGIN_ALLOW_THREADS
    for (int failures = 0; n_ended < n_left && failures < 2;) /* an interrupt is reported once */
        failures += step_once(self, session, &chunks, &n, &n_ended, NULL) != RAST_OK;
    Py_END_ALLOW_THREADS
    py_gather_close(&self->gather, session);
}

/* ---- run --------------------------------------------------------------------------------------------------------- */

static int report(py_engine *self, PyObject *on_tokens, const rast_chunk *chunks, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const rast_chunk *c = &chunks[i];
        const py_group *group = py_gather_find(&self->gather, c->id);
        if (!group || group->session != RUN_SESSION || (c->prompt && c->finish == RAST_RUNNING)) continue;
        npy_intp length = c->prompt ? 0 : (npy_intp)c->n;
        PyObject *tokens = PyArray_SimpleNew(1, &length, NPY_INT32);
        if (!tokens) return -1;
        if (length) memcpy(PyArray_DATA((PyArrayObject *)tokens), c->token, c->n * sizeof(int32_t));
        const char *finish = c->finish == RAST_RUNNING ? NULL : py_finish_name(c->finish); /* z: NULL gives None */
        PyObject *answer = PyObject_CallFunction(on_tokens, "KkNz", (unsigned long long)c->tag,
                                                 (unsigned long)c->sample, tokens, finish);
        if (!answer) return -1;
        Py_DECREF(answer);
    }
    return 0;
}

/* Steps until all n samples are done; 0, or -1 with an exception set. */
static int run_steps(py_engine *self, size_t n_samples, PyObject *on_tokens) {
    size_t n_ended = 0;
    while (n_ended < n_samples) {
        const rast_chunk *chunks = NULL;
        size_t n = 0;
        rast_error err = {0};
        int rc;
        Py_BEGIN_ALLOW_THREADS
        rc = advance(self, RUN_SESSION, n_samples, on_tokens ? 0 : SIGNAL_INTERVAL, &chunks, &n, &n_ended, &err);
        Py_END_ALLOW_THREADS
        if (PyErr_Occurred()) return -1; /* the drafter's */
        if (rc) {
            py_raise(state_of(self), &err);
            return -1;
        }
        if (on_tokens && report(self, on_tokens, chunks, n)) return -1;
        if (PyErr_CheckSignals()) return -1;
    }
    return 0;
}

static PyObject *engine_run(PyObject *object, PyObject *positional, PyObject *named) {
    static char *keywords[] = {"requests", "on_tokens", NULL};
    py_engine *self = (py_engine *)object;
    PyObject *requests, *on_tokens = Py_None;
    if (!PyArg_ParseTupleAndKeywords(positional, named, "O|O:run", keywords, &requests, &on_tokens)) return NULL;
    if (on_tokens != Py_None && !PyCallable_Check(on_tokens)) {
        PyErr_SetString(PyExc_TypeError, "on_tokens must be callable or None");
        return NULL;
    }
    requests = PySequence_Tuple(requests); /* nobody can change it meanwhile */
    if (!requests) return NULL;
    PyObject *results = NULL;
    if (py_model_claim(self->model)) goto done;
    size_t n_samples = 0;
    int rc = 0;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(requests) && !rc; i++) {
        const py_group *group = submit(self, PyTuple_GET_ITEM(requests, i), RUN_SESSION);
        n_samples += group ? group->n : 0;
        rc = group ? 0 : -1;
    }
    if (!rc && !run_steps(self, n_samples, on_tokens == Py_None ? NULL : on_tokens)) {
        results = PyList_New(0);
        if (results && py_gather_take(&self->gather, RUN_SESSION, 0, results, state_of(self))) Py_CLEAR(results);
    }
    if (!results) abandon(self, RUN_SESSION);
    py_model_release(self->model);

done:
    Py_DECREF(requests);
    return results;
}

/* ---- sessions ---------------------------------------------------------------------------------------------------- */

static int read_session(PyObject *value, const char *call, uint64_t *session) {
    if (py_read(value, PY_U64, call, "session", session)) return -1;
    if (*session != RUN_SESSION) return 0;
    PyErr_Format(PyExc_ValueError, "%s: a session's number is not 0", call);
    return -1;
}

static PyObject *engine_submit(PyObject *object, PyObject *positional) {
    py_engine *self = (py_engine *)object;
    PyObject *dict, *number;
    uint64_t session;
    if (!PyArg_ParseTuple(positional, "OO:submit", &dict, &number) || read_session(number, "submit", &session) ||
        py_model_claim(self->model))
        return NULL;
    const py_group *group = submit(self, dict, session);
    PyObject *id = group ? PyLong_FromUnsignedLongLong(group->id) : NULL;
    py_model_release(self->model);
    return id;
}

static PyObject *engine_collect(PyObject *object, PyObject *positional) {
    py_engine *self = (py_engine *)object;
    PyObject *number;
    uint64_t session;
    double limit;
    if (!PyArg_ParseTuple(positional, "Od:collect", &number, &limit) || read_session(number, "collect", &session) ||
        py_model_claim(self->model))
        return NULL;
    size_t n_ready = py_gather_ready(&self->gather, session, 0), n_left = 0;
    for (const py_group *group = self->gather.first; group; group = group->next)
        if (group->session == session) n_left += group->n - group->n_ended;
    PyObject *list = PyList_New(0);
    const double until = seconds() + limit;
    int rc = 0;
    while (list && !rc && !n_ready && n_left && seconds() < until) {
        const rast_chunk *chunks;
        size_t n;
        rast_error err = {0};
        const double left = until - seconds(), interval = left < SIGNAL_INTERVAL ? left : SIGNAL_INTERVAL;
        Py_BEGIN_ALLOW_THREADS
        rc = advance(self, session, 1, interval, &chunks, &n, &n_ready, &err);
        Py_END_ALLOW_THREADS
        if (PyErr_Occurred())
            rc = -1; /* the drafter's */
        else if (rc)
            py_raise(state_of(self), &err);
        else
            rc = PyErr_CheckSignals();
    }
    if (list && (rc || py_gather_take(&self->gather, session, 0, list, state_of(self)))) Py_CLEAR(list);
    py_model_release(self->model);
    return list;
}

static PyObject *engine_abandon(PyObject *object, PyObject *number) {
    py_engine *self = (py_engine *)object;
    uint64_t session;
    if (read_session(number, "abandon", &session) || py_model_claim(self->model)) return NULL;
    abandon(self, session);
    py_model_release(self->model);
    Py_RETURN_NONE;
}

static PyObject *engine_cancel(PyObject *object, PyObject *value) {
    py_engine *self = (py_engine *)object;
    uint64_t id;
    if (py_read(value, PY_U64, "cancel", "id", &id) || py_model_claim(self->model)) return NULL;
    int rc = rast_engine_cancel(self->handle->engine, id);
    py_model_release(self->model);
    if (rc) {
        PyErr_Format(PyExc_ValueError, "cancel: no request has the id %llu", (unsigned long long)id);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *engine_step(PyObject *object, PyObject *number) {
    py_engine *self = (py_engine *)object;
    const rast_chunk *chunks = NULL;
    uint64_t session;
    size_t n = 0, n_ended = 0;
    rast_error err = {0};
    int rc = 0;
    if (read_session(number, "step", &session) || py_model_claim(self->model)) return NULL;
    if (!py_gather_ready(&self->gather, session, 1)) {
        Py_BEGIN_ALLOW_THREADS
        rc = step_once(self, session, &chunks, &n, &n_ended, &err);
        Py_END_ALLOW_THREADS
    }
    if (rc && !PyErr_Occurred()) py_raise(state_of(self), &err);
    PyObject *list = PyErr_Occurred() ? NULL : PyList_New(0);
    if (list && py_gather_take(&self->gather, session, 1, list, state_of(self))) Py_CLEAR(list);
    py_model_release(self->model);
    return list;
}

static PyObject *engine_busy(PyObject *object, void *unused) {
    (void)unused;
    py_engine *self = (py_engine *)object;
    if (py_model_claim(self->model)) return NULL;
    int busy = rast_engine_busy(self->handle->engine);
    py_model_release(self->model);
    return PyBool_FromLong(busy);
}

static PyObject *engine_info(PyObject *object, PyObject *unused) {
    (void)unused;
    py_engine *self = (py_engine *)object;
    rast_engine_info info;
    if (py_model_claim(self->model)) return NULL;
    rast_engine_get_info(self->handle->engine, &info);
    py_model_release(self->model);
    const struct {
        const char *name;
        unsigned long long value;
    } entries[] = {{"n_blocks", info.n_blocks},
                   {"n_free", info.n_free},
                   {"n_cached", info.n_cached},
                   {"kv_bytes", info.kv_bytes},
                   {"steps", info.steps},
                   {"block_tokens", info.block_tokens},
                   {"rows", info.rows},
                   {"reused", info.reused},
                   {"drafted", info.drafted},
                   {"accepted", info.accepted},
                   {"rejected", info.rejected},
                   {"draft_steps", info.draft_steps},
                   {"step_ns", (unsigned long long)(info.step_seconds * 1e9)},
                   {"draft_ns", (unsigned long long)(info.draft_seconds * 1e9)},
                   {"preempted", info.preempted},
                   {"evicted", info.evicted},
                   {"max_rows", (unsigned long long)info.max_rows},
                   {"max_seqs", (unsigned long long)info.max_seqs}};
    PyObject *dict = PyDict_New();
    for (size_t i = 0; dict && i < sizeof entries / sizeof *entries; i++) {
        PyObject *value = PyLong_FromUnsignedLongLong(entries[i].value);
        if (!value || PyDict_SetItemString(dict, entries[i].name, value)) Py_CLEAR(dict);
        Py_XDECREF(value);
    }
    return dict;
}

/* ---- drafts ------------------------------------------------------------------------------------------------------ */

static size_t call_drafter(PyObject *drafter, uint64_t tag, uint32_t sample, const int32_t *ids, size_t n, int32_t *out,
                           size_t k) {
    size_t written = 0;
    npy_intp length = (npy_intp)n;
    PyObject *array = PyArray_SimpleNew(1, &length, NPY_INT32);
    if (!array) return 0;
    memcpy(PyArray_DATA((PyArrayObject *)array), ids, n * sizeof *ids);
    PyObject *answer =
        PyObject_CallFunction(drafter, "KkNn", (unsigned long long)tag, (unsigned long)sample, array, (Py_ssize_t)k);
    PyObject *guesses = answer ? PySequence_Tuple(answer) : NULL;
    for (; guesses && written < k && written < (size_t)PyTuple_GET_SIZE(guesses); written++)
        if (py_read(PyTuple_GET_ITEM(guesses, (Py_ssize_t)written), PY_I32, "drafter", "a guess", &out[written])) break;
    Py_XDECREF(guesses);
    Py_XDECREF(answer);
    return PyErr_Occurred() ? 0 : written;
}

/* The core calls it in the thread that steps, so an exception waits in that thread's state until the step is over. */
static size_t draft(void *user, uint64_t tag, uint32_t sample, const int32_t *ids, size_t n, int32_t *out, size_t k) {
    PyGILState_STATE gil = PyGILState_Ensure();
    size_t written = PyErr_Occurred() ? 0 : call_drafter(user, tag, sample, ids, n, out, k);
    PyGILState_Release(gil);
    return written;
}

static PyObject *engine_set_drafter(PyObject *object, PyObject *drafter) {
    py_engine *self = (py_engine *)object;
    if (drafter != Py_None && !PyCallable_Check(drafter)) {
        PyErr_SetString(PyExc_TypeError, "the drafter must be callable or None");
        return NULL;
    }
    if (py_model_claim(self->model)) return NULL;
    PyObject *old = self->drafter;
    self->drafter = drafter == Py_None ? NULL : Py_NewRef(drafter);
    rast_engine_set_drafter(self->handle->engine, self->drafter ? draft : NULL, self->drafter);
    py_model_release(self->model);
    Py_XDECREF(old);
    Py_RETURN_NONE;
}

/* ---- the type ---------------------------------------------------------------------------------------------------- */

static PyObject *engine_new(PyTypeObject *type, PyObject *positional, PyObject *named) {
    static char *keywords[] = {"model", "kv_bytes", "max_rows", "max_seqs", NULL};
    py_state *state = PyType_GetModuleState(type);
    PyObject *model, *kv_bytes = NULL, *max_rows = NULL, *max_seqs = NULL;
    if (!PyArg_ParseTupleAndKeywords(positional, named, "O!|$OOO:Engine", keywords, state->model_type, &model,
                                     &kv_bytes, &max_rows, &max_seqs))
        return NULL;
    rast_budget budget = {0};
    if (kv_bytes && py_read(kv_bytes, PY_SIZE, "Engine", "kv_bytes", &budget.kv_bytes)) return NULL;
    if (max_rows && py_read(max_rows, PY_I32, "Engine", "max_rows", &budget.max_rows)) return NULL;
    if (max_seqs && py_read(max_seqs, PY_I32, "Engine", "max_seqs", &budget.max_seqs)) return NULL;

    py_engine *self = (py_engine *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->model = (py_model *)Py_NewRef(model);
    self->handle = PyMem_Calloc(1, sizeof *self->handle);
    if (!self->handle) {
        PyErr_NoMemory();
        goto fail;
    }
    rast_error err = {0};
    if (py_model_claim(self->model)) goto fail;
    int rc = rast_engine_new(self->model->model, &budget, &self->handle->engine, &err);
    py_model_release(self->model);
    if (rc) {
        py_raise(state, &err);
        goto fail;
    }
    return (PyObject *)self;

fail:
    Py_DECREF(self);
    return NULL;
}

static int engine_traverse(PyObject *object, visitproc visit, void *arg) {
    py_engine *self = (py_engine *)object;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->model);
    Py_VISIT(self->drafter);
    return 0;
}

static int engine_clear(PyObject *object) {
    py_engine *self = (py_engine *)object;
    if (self->handle && self->handle->engine) rast_engine_set_drafter(self->handle->engine, NULL, NULL);
    Py_CLEAR(self->drafter);
    return 0;
}

static void engine_dealloc(PyObject *object) {
    py_engine *self = (py_engine *)object;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    engine_clear(object);
    py_gather_free(&self->gather);
    if (self->handle) py_model_retire(self->model, self->handle);
    Py_DECREF(self->model);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyGetSetDef engine_getset[] = {
    {"busy", engine_busy, NULL, "Whether samples are queued or running.", NULL},
    {0},
};

static PyMethodDef engine_methods[] = {
    {"run", (PyCFunction)(void (*)(void))engine_run, METH_VARARGS | METH_KEYWORDS,
     "run(requests, on_tokens=None) -> results, in the order of requests and samples"},
    {"submit", engine_submit, METH_VARARGS, "submit(request, session) -> id"},
    {"collect", engine_collect, METH_VARARGS, "collect(session, seconds) -> results of samples that have ended"},
    {"abandon", engine_abandon, METH_O, "abandon(session): ends and forgets all that it has"},
    {"cancel", engine_cancel, METH_O, "cancel(id): ends all samples of a request"},
    {"step", engine_step, METH_O, "step(session) -> what each of its samples got"},
    {"info", engine_info, METH_NOARGS, "info() -> dict of the KV cache's size and of counters"},
    {"_set_drafter", engine_set_drafter, METH_O, "_set_drafter(drafter or None), for tests"},
    {0},
};

static PyType_Slot engine_slots[] = {
    {Py_tp_doc, "Engine(model, *, kv_bytes=0, max_rows=0, max_seqs=0)\n--\n\n"
                "Runs requests on a model, one call at a time."},
    {Py_tp_new, engine_new},
    {Py_tp_dealloc, engine_dealloc},
    {Py_tp_traverse, engine_traverse},
    {Py_tp_clear, engine_clear},
    {Py_tp_getset, engine_getset},
    {Py_tp_methods, engine_methods},
    {0, NULL},
};

PyType_Spec py_engine_spec = {
    .name = "rast._core.Engine",
    .basicsize = sizeof(py_engine),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = engine_slots,
};
