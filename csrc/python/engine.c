/* engine.c: _core.Engine runs requests on a model, without the GIL while it steps; _core.Session is for those of one caller. */
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
    PyObject *drafter;   /* or NULL */
    py_gather gather;    /* what run() and sessions asked for */
    uint64_t n_sessions; /* opened so far: the number of the last */
} py_engine;

typedef struct {
    PyObject ob_base;
    py_engine *engine;
    uint64_t number;
    int entered;         /* a `with` block has it */
    py_leaving *leaving; /* how it ends, which may be later than this object */
} py_session;

static const py_state *state_of(py_engine *self) { return PyType_GetModuleState(Py_TYPE(self)); }

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- requests whose samples are gathered --------------------------------------------------------------------------- */

enum { RUN_SESSION = 0 }; /* of run(); others count from 1 */

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
            if (!group) rast_engine_discard(self->handle->engine, id);
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

void py_engine_leave(PyObject *object, uint64_t session, int forget) {
    py_engine *self = (py_engine *)object;
    for (py_group *group = self->gather.first; group; group = group->next)
        if (group->session == session && group->n_ended < group->n)
            rast_engine_discard(self->handle->engine, group->id);
    if (forget)
        py_gather_close(&self->gather, session);
    else
        py_gather_stop(&self->gather, session);
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
        py_model_settle(self->model);
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
    if (!results) py_engine_leave((PyObject *)self, RUN_SESSION, 1);
    py_model_release(self->model);

done:
    Py_DECREF(requests);
    return results;
}

/* ---- sessions ---------------------------------------------------------------------------------------------------- */

static const py_state *session_state(py_session *self) { return state_of(self->engine); }

static PyObject *session_submit(PyObject *object, PyObject *dict) {
    py_session *self = (py_session *)object;
    if (py_model_claim(self->engine->model)) return NULL;
    const py_group *group = submit(self->engine, dict, self->number);
    PyObject *id = group ? PyLong_FromUnsignedLongLong(group->id) : NULL;
    py_model_release(self->engine->model);
    return id;
}

/* Appends what has ended; the samples that have not, or -1 with an exception set. */
static Py_ssize_t hand_over(py_session *self, PyObject *append) {
    PyObject *list = PyList_New(0);
    int rc = list ? py_gather_take(&self->engine->gather, self->number, 0, list, session_state(self)) : -1;
    for (Py_ssize_t i = 0; !rc && i < PyList_GET_SIZE(list); i++) {
        PyObject *none = PyObject_CallOneArg(append, PyList_GET_ITEM(list, i));
        rc = none ? 0 : -1;
        Py_XDECREF(none);
    }
    Py_XDECREF(list);
    return rc ? -1 : (Py_ssize_t)py_gather_left(&self->engine->gather, self->number);
}

static PyObject *session_collect(PyObject *object, PyObject *positional) {
    py_session *self = (py_session *)object;
    py_engine *engine = self->engine;
    PyObject *append;
    double limit;
    if (!PyArg_ParseTuple(positional, "dO:collect", &limit, &append) || py_model_claim(engine->model)) return NULL;
    size_t n_ready = py_gather_ready(&engine->gather, self->number, 0);
    const size_t n_left = py_gather_left(&engine->gather, self->number);
    const double until = seconds() + limit;
    int rc = 0;
    while (!rc && !n_ready && n_left && seconds() < until) {
        const rast_chunk *chunks;
        size_t n;
        rast_error err = {0};
        const double left = until - seconds(), interval = left < SIGNAL_INTERVAL ? left : SIGNAL_INTERVAL;
        Py_BEGIN_ALLOW_THREADS
        rc = advance(engine, self->number, 1, interval, &chunks, &n, &n_ready, &err);
        Py_END_ALLOW_THREADS
        if (PyErr_Occurred())
            rc = -1; /* the drafter's */
        else if (rc)
            py_raise(session_state(self), &err);
        else
            rc = PyErr_CheckSignals();
        py_model_settle(engine->model);
    }
    const Py_ssize_t n_running = rc ? -1 : hand_over(self, append);
    py_model_release(engine->model);
    return n_running < 0 ? NULL : PyLong_FromSsize_t(n_running);
}

static PyObject *session_step(PyObject *object, PyObject *unused) {
    (void)unused;
    py_session *self = (py_session *)object;
    py_engine *engine = self->engine;
    const rast_chunk *chunks = NULL;
    size_t n = 0, n_ended = 0;
    rast_error err = {0};
    int rc = 0;
    if (py_model_claim(engine->model)) return NULL;
    if (!py_gather_ready(&engine->gather, self->number, 1)) {
        Py_BEGIN_ALLOW_THREADS
        rc = step_once(engine, self->number, &chunks, &n, &n_ended, &err);
        Py_END_ALLOW_THREADS
    }
    if (rc && !PyErr_Occurred()) py_raise(session_state(self), &err);
    PyObject *list = PyErr_Occurred() ? NULL : PyList_New(0);
    if (list && py_gather_take(&engine->gather, self->number, 1, list, session_state(self))) Py_CLEAR(list);
    py_model_release(engine->model);
    return list;
}

static PyObject *session_cancel(PyObject *object, PyObject *value) {
    py_session *self = (py_session *)object;
    uint64_t id;
    if (py_read(value, PY_U64, "cancel", "id", &id) || py_model_claim(self->engine->model)) return NULL;
    const py_group *group = py_gather_find(&self->engine->gather, id);
    const int rc = group && group->session == self->number ? rast_engine_cancel(self->engine->handle->engine, id) : -1;
    py_model_release(self->engine->model);
    if (rc) {
        PyErr_Format(PyExc_ValueError, "cancel: no request has the id %llu", (unsigned long long)id);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *session_stop(PyObject *object, PyObject *positional, PyObject *named) {
    static char *keywords[] = {"forget", NULL};
    py_session *self = (py_session *)object;
    int forget = 0;
    if (!PyArg_ParseTupleAndKeywords(positional, named, "|$p:stop", keywords, &forget)) return NULL;
    self->leaving->forget |= forget;
    py_model_leave(self->engine->model, self->leaving);
    Py_RETURN_NONE;
}

static PyObject *session_enter(PyObject *object, PyObject *unused) {
    (void)unused;
    py_session *self = (py_session *)object;
    if (self->entered) {
        PyErr_SetString(PyExc_RuntimeError,
                        "this iterator is being read already, by another thread or by its own source");
        return NULL;
    }
    self->entered = 1;
    return Py_NewRef(object);
}

static PyObject *session_exit(PyObject *object, PyObject *unused) {
    (void)unused;
    ((py_session *)object)->entered = 0;
    Py_RETURN_NONE;
}

static PyObject *session_new(PyTypeObject *type, PyObject *positional, PyObject *named) {
    static char *keywords[] = {"engine", NULL};
    const py_state *state = PyType_GetModuleState(type);
    PyObject *engine;
    if (!PyArg_ParseTupleAndKeywords(positional, named, "O!:Session", keywords, state->engine_type, &engine))
        return NULL;
    py_session *self = (py_session *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->leaving = PyMem_Calloc(1, sizeof *self->leaving);
    if (!self->leaving) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    self->engine = (py_engine *)Py_NewRef(engine);
    self->number = ++self->engine->n_sessions;
    *self->leaving = (py_leaving){.engine = Py_NewRef(engine), .session = self->number};
    return (PyObject *)self;
}

/* There is no tp_clear: a session needs its engine to the end, and a cycle can only go through the engine's drafter. */
static int session_traverse(PyObject *object, visitproc visit, void *arg) {
    py_session *self = (py_session *)object;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->engine);
    if (self->leaving) Py_VISIT(self->leaving->engine);
    return 0;
}

static void session_dealloc(PyObject *object) {
    py_session *self = (py_session *)object;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (self->engine) {
        self->leaving->forget = self->leaving->dead = 1;
        py_model_leave(self->engine->model, self->leaving);
    }
    Py_XDECREF(self->engine);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef session_methods[] = {
    {"submit", session_submit, METH_O, "submit(request) -> id"},
    {"collect", session_collect, METH_VARARGS, "collect(seconds, append) -> how many samples have not ended"},
    {"step", session_step, METH_NOARGS, "step() -> what each sample got"},
    {"cancel", session_cancel, METH_O, "cancel(id): ends all samples of a request"},
    {"stop", (PyCFunction)(void (*)(void))session_stop, METH_VARARGS | METH_KEYWORDS,
     "stop(*, forget=False): ends all that runs, without waiting"},
    {"__enter__", session_enter, METH_NOARGS, "Marks the session as in use; RuntimeError if it is"},
    {"__exit__", session_exit, METH_VARARGS, "The end of that"},
    {0},
};

static PyType_Slot session_slots[] = {
    {Py_tp_doc, "Session(engine)\n--\n\nThe requests of one caller, which end with it."},
    {Py_tp_new, session_new},
    {Py_tp_dealloc, session_dealloc},
    {Py_tp_traverse, session_traverse},
    {Py_tp_methods, session_methods},
    {0, NULL},
};

PyType_Spec py_session_spec = {
    .name = "rast._core.Session",
    .basicsize = sizeof(py_session),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = session_slots,
};

/* ---- what it is doing -------------------------------------------------------------------------------------------- */

static PyObject *engine_busy(PyObject *object, void *unused) {
    (void)unused;
    py_engine *self = (py_engine *)object;
    const int mine = py_model_is_mine(self->model); /* a callback may ask */
    if (!mine && py_model_claim(self->model)) return NULL;
    int busy = rast_engine_busy(self->handle->engine);
    if (!mine) py_model_release(self->model);
    return PyBool_FromLong(busy);
}

static PyObject *engine_info(PyObject *object, PyObject *unused) {
    (void)unused;
    py_engine *self = (py_engine *)object;
    rast_engine_info info;
    const int mine = py_model_is_mine(self->model); /* a callback may ask */
    if (!mine && py_model_claim(self->model)) return NULL;
    rast_engine_get_info(self->handle->engine, &info);
    if (!mine) py_model_release(self->model);
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
                   {"device_bytes", info.device_bytes},
                   {"device_free", info.device_free},
                   {"device_weights", info.device_weights},
                   {"device_work", info.device_work},
                   {"device_kept", info.device_kept},
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
