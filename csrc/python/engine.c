/* engine.c: _core.Engine: runs requests on a model, without the GIL while it steps. */
#include <string.h>
#include <time.h>

#include "binding.h"
#include "convert.h"
#include "request.h"
#include "results.h"

#define SIGNAL_INTERVAL 0.05 /* seconds without the GIL before signals get their turn */

typedef struct {
    PyObject ob_base;
    py_model *model;
    py_handle *handle;
    PyObject *drafter; /* or NULL */
} py_engine;

static const py_state *state_of(py_engine *self) { return PyType_GetModuleState(Py_TYPE(self)); }

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- run --------------------------------------------------------------------------------------------------------- */

typedef struct {
    uint64_t id;
    size_t first, n; /* its samples */
} run_request;

typedef struct { /* the requests of one run() and what they gave so far */
    run_request *requests;
    size_t n_requests, last; /* last: where the last lookup ended */
    py_sample *samples;
    size_t n_samples;
} run_state;

static void run_free(run_state *run) {
    for (size_t i = 0; i < run->n_samples; i++) py_sample_free(&run->samples[i]);
    PyMem_Free(run->samples);
    PyMem_Free(run->requests);
}

/* Chunks come in the order of requests, so the search from the last one on is short. */
static py_sample *run_find(run_state *run, const rast_chunk *chunk) {
    for (size_t i = 0; i < run->n_requests; i++) {
        size_t at = (run->last + i) % run->n_requests;
        if (run->requests[at].id != chunk->id) continue;
        run->last = at;
        return chunk->sample < run->requests[at].n ? &run->samples[run->requests[at].first + chunk->sample] : NULL;
    }
    return NULL;
}

/* Steps until the engine is idle, `interval` seconds are over, or something fails. Needs no GIL. *chunks, *n: of the last
 * step, which *idle is 1 after if nothing is left to do. */
static int advance(rast_engine *engine, run_state *run, double interval, const rast_chunk **chunks, size_t *n,
                   int *idle, rast_error *err) {
    double until = seconds() + interval;
    do {
        *n = 0;
        int rc = rast_engine_step(engine, chunks, n, err);
        if (rc) return rc;
        for (size_t i = 0; i < *n; i++) {
            py_sample *sample = run_find(run, &(*chunks)[i]);
            if (sample && py_sample_add(sample, &(*chunks)[i])) {
                *err = (rast_error){RAST_ERR_MEMORY, "out of memory for the results"};
                return RAST_ERR_MEMORY;
            }
        }
        *idle = *n == 0 && !rast_engine_busy(engine);
    } while (!*idle && seconds() < until);
    return RAST_OK;
}

/* Ends everything that is queued or running, so that the engine can be used again. */
static void drain(rast_engine *engine) {
    const rast_chunk *chunks;
    size_t n;
    Py_BEGIN_ALLOW_THREADS
    rast_engine_cancel_all(engine);
    for (int failures = 0; rast_engine_busy(engine) && failures < 2;) /* an interrupt is reported once */
        failures += rast_engine_step(engine, &chunks, &n, NULL) != RAST_OK;
    Py_END_ALLOW_THREADS
}

static int report(PyObject *on_tokens, const rast_chunk *chunks, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const rast_chunk *c = &chunks[i];
        if (c->prompt && c->finish == RAST_RUNNING) continue;
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

/* Queues the requests and makes room for their samples. */
static int run_add(py_engine *self, PyObject *requests, run_state *run) {
    size_t n = (size_t)PyTuple_GET_SIZE(requests);
    size_t n_nets = rast_model_n_nets(self->model->model);
    size_t n_vocab = (size_t)rast_model_n_vocab(self->model->model);
    run->requests = PyMem_Calloc(n + 1, sizeof *run->requests);
    if (!run->requests) {
        PyErr_NoMemory();
        return -1;
    }
    for (size_t i = 0; i < n; i++) {
        rast_error err = {0};
        run_request *to = &run->requests[i];
        py_request from;
        int rc = py_request_read(PyTuple_GET_ITEM(requests, (Py_ssize_t)i), &from);
        if (!rc && (rc = rast_engine_add(self->handle->engine, &from.request, &to->id, &err)))
            py_raise(state_of(self), &err);
        py_request_free(&from);
        if (rc) return -1;

        to->first = run->n_samples;
        to->n = from.request.n_samples;
        py_sample *samples = NULL;
        if (to->n <= PY_SSIZE_T_MAX / sizeof *samples - to->first)
            samples = PyMem_Realloc(run->samples, (to->first + to->n) * sizeof *samples);
        if (!samples) {
            PyErr_NoMemory();
            return -1;
        }
        run->samples = samples;
        for (uint32_t j = 0; j < to->n; j++)
            samples[run->n_samples++] = (py_sample){
                .tag = from.request.tag, .sample = j, .want = from.request.want, .n_nets = n_nets, .n_vocab = n_vocab};
        run->n_requests = i + 1;
    }
    return 0;
}

/* Steps until all is done; 0, or -1 with an exception set. */
static int run_steps(py_engine *self, run_state *run, PyObject *on_tokens) {
    int idle = run->n_requests == 0;
    while (!idle) {
        const rast_chunk *chunks = NULL;
        size_t n = 0;
        rast_error err = {0};
        int rc;
        Py_BEGIN_ALLOW_THREADS
        rc = advance(self->handle->engine, run, on_tokens ? 0 : SIGNAL_INTERVAL, &chunks, &n, &idle, &err);
        Py_END_ALLOW_THREADS
        if (PyErr_Occurred()) return -1; /* the drafter's */
        if (rc) {
            py_raise(state_of(self), &err);
            return -1;
        }
        if (on_tokens && report(on_tokens, chunks, n)) return -1;
        if (PyErr_CheckSignals()) return -1;
    }
    return 0;
}

static PyObject *run_results(py_engine *self, run_state *run) {
    PyObject *list = PyList_New((Py_ssize_t)run->n_samples);
    for (size_t i = 0; list && i < run->n_samples; i++) {
        PyObject *result = py_sample_result(&run->samples[i], state_of(self));
        if (!result)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, result);
    }
    return list;
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
    if (rast_engine_busy(self->handle->engine)) {
        PyErr_SetString(PyExc_RuntimeError, "the engine has requests of add(); step() until it is not busy");
    } else {
        run_state run = {0};
        if (run_add(self, requests, &run) || run_steps(self, &run, on_tokens == Py_None ? NULL : on_tokens))
            drain(self->handle->engine);
        else
            results = run_results(self, &run);
        run_free(&run);
    }
    py_model_release(self->model);

done:
    Py_DECREF(requests);
    return results;
}

/* ---- step by step ------------------------------------------------------------------------------------------------ */

static PyObject *engine_add(PyObject *object, PyObject *dict) {
    py_engine *self = (py_engine *)object;
    uint64_t id;
    rast_error err = {0};
    py_request request;
    PyObject *result = NULL;
    if (py_model_claim(self->model)) return NULL;
    if (!py_request_read(dict, &request)) {
        if (rast_engine_add(self->handle->engine, &request.request, &id, &err))
            py_raise(state_of(self), &err);
        else
            result = PyLong_FromUnsignedLongLong(id);
    }
    py_request_free(&request);
    py_model_release(self->model);
    return result;
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

static PyObject *engine_step(PyObject *object, PyObject *unused) {
    (void)unused;
    py_engine *self = (py_engine *)object;
    const rast_chunk *chunks = NULL;
    size_t n = 0, n_nets = rast_model_n_nets(self->model->model);
    size_t n_vocab = (size_t)rast_model_n_vocab(self->model->model);
    rast_error err = {0};
    int rc;
    if (py_model_claim(self->model)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    rc = rast_engine_step(self->handle->engine, &chunks, &n, &err);
    Py_END_ALLOW_THREADS
    PyObject *list = NULL;
    if (rc && !PyErr_Occurred()) py_raise(state_of(self), &err);
    if (!PyErr_Occurred()) list = PyList_New(0);
    for (size_t i = 0; list && i < n; i++) {
        if (chunks[i].prompt && chunks[i].finish == RAST_RUNNING) continue;
        PyObject *result = py_chunk_result(&chunks[i], n_nets, n_vocab, state_of(self));
        if (!result || PyList_Append(list, result)) Py_CLEAR(list);
        Py_XDECREF(result);
    }
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
    } entries[] = {{"n_blocks", info.n_blocks}, {"n_free", info.n_free},       {"n_cached", info.n_cached},
                   {"kv_bytes", info.kv_bytes}, {"steps", info.steps},         {"block_tokens", info.block_tokens},
                   {"rows", info.rows},         {"reused", info.reused},       {"drafted", info.drafted},
                   {"accepted", info.accepted}, {"preempted", info.preempted}, {"evicted", info.evicted}};
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
    {"add", engine_add, METH_O, "add(request) -> id"},
    {"cancel", engine_cancel, METH_O, "cancel(id): ends all samples of a request"},
    {"step", engine_step, METH_NOARGS, "step() -> what each sample got in one step"},
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
