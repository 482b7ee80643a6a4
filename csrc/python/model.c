/* model.c: _core.Model: the distinct nets of a transfer, over NumPy arrays that are used in place. */
#include <stddef.h>
#include <string.h>

#include "binding.h"
#include "convert.h"

static const struct {
    const char *net;    /* Net["dtype"] */
    const char *tensor; /* the stored dtype of a tensor */
} dtypes[RAST_N_TYPES] = {
    [RAST_F32] = {"float32", "F32"}, [RAST_BF16] = {"bfloat16", "BF16"}, [RAST_F16] = {"float16", "F16"},
    [RAST_Q8_0] = {NULL, "Q8_0"},    [RAST_Q4_0] = {NULL, "Q4_0"},       [RAST_Q4_1] = {NULL, "Q4_1"},
    [RAST_INT8] = {NULL, "int8"},    [RAST_INT4] = {NULL, "int4"},       [RAST_INT4_64] = {NULL, "int4-64"},
};

/* ---- from Python objects to rast_net ----------------------------------------------------------------------------- */

typedef struct { /* a net's config as the dict gives it */
    rast_config c;
    PyObject *rope_freq, *window;
} raw_config;

#define CONFIG_FIELD(name, kind, required) {#name, kind, required, offsetof(raw_config, c.name)}

static const py_field config_fields[] = {
    CONFIG_FIELD(n_layers, PY_I32, 1),
    CONFIG_FIELD(n_heads, PY_I32, 1),
    CONFIG_FIELD(n_kv_heads, PY_I32, 1),
    CONFIG_FIELD(head_dim, PY_I32, 1),
    CONFIG_FIELD(hidden_size, PY_I32, 1),
    CONFIG_FIELD(intermediate_size, PY_I32, 1),
    CONFIG_FIELD(vocab_size, PY_I32, 1),
    CONFIG_FIELD(max_context, PY_I32, 1),
    CONFIG_FIELD(rms_norm_eps, PY_F32, 1),
    CONFIG_FIELD(rope_theta, PY_F32, 0),
    {"rope_freq", PY_OBJECT, 0, offsetof(raw_config, rope_freq)},
    CONFIG_FIELD(rope_attention, PY_F32, 0),
    CONFIG_FIELD(rope_interleaved, PY_BOOL, 0),
    {"window", PY_OBJECT, 0, offsetof(raw_config, window)},
    CONFIG_FIELD(qkv_bias, PY_BOOL, 0),
    CONFIG_FIELD(o_bias, PY_BOOL, 0),
    CONFIG_FIELD(mlp_bias, PY_BOOL, 0),
    CONFIG_FIELD(qk_norm, PY_BOOL, 0),
    CONFIG_FIELD(tie_word_embeddings, PY_BOOL, 0),
};

typedef struct {
    PyObject *name, *config, *tensors, *dtype, *uncommon;
} raw_net;

#define NET_FIELD(name, required) {#name, PY_OBJECT, required, offsetof(raw_net, name)}

static const py_field net_fields[] = {
    NET_FIELD(name, 1), NET_FIELD(config, 1), NET_FIELD(tensors, 1), NET_FIELD(dtype, 1), NET_FIELD(uncommon, 0),
};

typedef struct { /* what rast_model_new needs, and who owns it */
    size_t n_nets;
    rast_net *nets;        /* [n_nets] */
    rast_tensor **tensors; /* [n_nets] */
    PyObject *keep;        /* list: arrays used in place */
    PyObject *scratch;     /* list: objects needed until the model is made */
    PyObject *names;       /* tuple of str */
} model_args;

/* Appends an object to a list and drops the caller's reference; passes NULL on as an error. */
static int hold(PyObject *list, PyObject *object) {
    int rc = object ? PyList_Append(list, object) : -1;
    Py_XDECREF(object);
    return rc;
}

/* An optional vector of a fixed length (or any, if length < 0); None and NULL: none. */
static int read_vector(model_args *args, PyObject *value, int type, npy_intp length, const char *what, const char *name,
                       const void **data, size_t *n) {
    if (!value || value == Py_None) return 0;
    PyArrayObject *array = py_vector(value, type, what, name);
    if (hold(args->scratch, (PyObject *)array)) return -1;
    if (length >= 0 && PyArray_SIZE(array) != length) {
        PyErr_Format(PyExc_ValueError, "%s: %s must have %zd elements, not %zd", what, name, (Py_ssize_t)length,
                     (Py_ssize_t)PyArray_SIZE(array));
        return -1;
    }
    *data = PyArray_DATA(array);
    if (n) *n = (size_t)PyArray_SIZE(array);
    return 0;
}

static int read_config(model_args *args, PyObject *dict, const char *what, rast_config *out) {
    raw_config raw = {0};
    if (hold(args->scratch,
             py_read_fields(dict, what, config_fields, sizeof config_fields / sizeof *config_fields, &raw)))
        return -1;
    const void *freq = NULL, *window = NULL;
    if (read_vector(args, raw.rope_freq, NPY_FLOAT32, raw.c.head_dim / 2, what, "rope_freq", &freq, NULL) ||
        read_vector(args, raw.window, NPY_INT32, raw.c.n_layers, what, "window", &window, NULL))
        return -1;
    *out = raw.c;
    out->rope_freq = freq;
    out->window = window;
    return 0;
}

/* The index in `dtypes` whose name is `value`; or -1 with an exception set. */
static int read_dtype(PyObject *value, const char *what, const char *name, int of_tensor) {
    const char *text = py_utf8(value, what, name);
    if (!text) return -1;
    for (int t = 0; t < (of_tensor ? RAST_N_TYPES : RAST_N_DTYPES); t++)
        if (!strcmp(text, of_tensor ? dtypes[t].tensor : dtypes[t].net)) return t;
    const char *known =
        of_tensor ? "F32, BF16, F16, Q8_0, Q4_0, Q4_1, int8, int4, int4-64" : "float32, bfloat16, float16";
    PyErr_Format(PyExc_ValueError, "%s: %s: dtype %R is not one of %s", what, name, value, known);
    return -1;
}

static int dtype_fits(int array_type, int32_t dtype) {
    switch (dtype) {
    case RAST_F32:
        return array_type == NPY_FLOAT32;
    case RAST_BF16:
        return array_type == NPY_UINT16;
    case RAST_F16:
        return array_type == NPY_UINT16 || array_type == NPY_FLOAT16;
    default:
        return array_type == NPY_UINT8;
    }
}

/* item: (name, (array, dtype)) */
static int read_tensor(model_args *args, PyObject *item, const char *what, rast_tensor *out) {
    PyObject *name, *array, *dtype;
    if (!PyTuple_Check(item) || PyTuple_GET_SIZE(item) != 2) {
        PyErr_Format(PyExc_TypeError, "%s: tensors.items() must give pairs", what);
        return -1;
    }
    name = PyTuple_GET_ITEM(item, 0);
    if (!(out->name = py_utf8(name, what, "the name of a tensor"))) return -1;
    PyObject *pair = PyTuple_GET_ITEM(item, 1);
    if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2 || !PyArray_Check(PyTuple_GET_ITEM(pair, 0))) {
        PyErr_Format(PyExc_TypeError, "%s: %U must be a pair (array, dtype)", what, name);
        return -1;
    }
    array = PyTuple_GET_ITEM(pair, 0);
    dtype = PyTuple_GET_ITEM(pair, 1);
    if ((out->dtype = read_dtype(dtype, what, out->name, 1)) < 0) return -1;

    PyArrayObject *a = (PyArrayObject *)array;
    if (!dtype_fits(PyArray_TYPE(a), out->dtype)) {
        PyErr_Format(PyExc_TypeError, "%s: %U: an array of dtype %S cannot hold %s", what, name, PyArray_DESCR(a),
                     dtypes[out->dtype].tensor);
        return -1;
    }
    if (!PyArray_ISCARRAY_RO(a)) { /* contiguous, aligned, native byte order */
        PyErr_Format(PyExc_ValueError, "%s: %U must be C-contiguous, aligned and in native byte order", what, name);
        return -1;
    }
    out->n_dims = PyArray_NDIM(a);
    if (out->n_dims != 1 && out->n_dims != 2) {
        PyErr_Format(PyExc_ValueError, "%s: %U must have 1 or 2 dimensions, not %d", what, name, PyArray_NDIM(a));
        return -1;
    }
    for (int d = 0; d < out->n_dims; d++) out->shape[d] = (size_t)PyArray_DIM(a, d);
    if (out->dtype >= RAST_N_DTYPES) {
        const size_t group = rast_type_group(out->dtype), block = rast_row_bytes(out->dtype, group);
        if (out->n_dims != 2 || out->shape[1] % block) {
            PyErr_Format(PyExc_ValueError, "%s: %U must be a matrix whose rows are blocks of %zu bytes", what, name,
                         block);
            return -1;
        }
        out->shape[1] = out->shape[1] / block * group;
    }
    out->data = PyArray_DATA(a);
    return PyList_Append(args->keep, array);
}

static int read_tensors(model_args *args, PyObject *mapping, const char *what, rast_tensor **tensors, rast_net *net) {
    PyObject *items = PyMapping_Check(mapping) ? PyMapping_Items(mapping) : NULL;
    if (!items) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_TypeError, "%s: tensors must be a mapping, not %.200s", what, Py_TYPE(mapping)->tp_name);
        return -1;
    }
    if (hold(args->scratch, items)) return -1; /* also owns the names */
    size_t n = (size_t)PyList_GET_SIZE(items);
    *tensors = PyMem_Calloc(n ? n : 1, sizeof **tensors);
    if (!*tensors) {
        PyErr_NoMemory();
        return -1;
    }
    for (size_t i = 0; i < n; i++)
        if (read_tensor(args, PyList_GET_ITEM(items, (Py_ssize_t)i), what, &(*tensors)[i])) return -1;
    net->tensors = *tensors;
    net->n_tensors = n;
    return 0;
}

static int read_net(model_args *args, PyObject *dict, size_t index) {
    rast_net *net = &args->nets[index];
    char what[32];
    PyOS_snprintf(what, sizeof what, "nets[%zu]", index);
    raw_net raw = {0};
    if (hold(args->scratch, py_read_fields(dict, what, net_fields, sizeof net_fields / sizeof *net_fields, &raw)))
        return -1;
    if (!(net->name = py_utf8(raw.name, what, "name"))) return -1;
    PyTuple_SET_ITEM(args->names, (Py_ssize_t)index, Py_NewRef(raw.name));
    if ((net->dtype = read_dtype(raw.dtype, what, "dtype", 0)) < 0) return -1;
    const void *uncommon = NULL;
    if (read_vector(args, raw.uncommon, NPY_INT32, -1, what, "uncommon", &uncommon, &net->n_uncommon)) return -1;
    net->uncommon = uncommon;
    if (read_tensors(args, raw.tensors, what, &args->tensors[index], net)) return -1;
    PyOS_snprintf(what, sizeof what, "nets[%zu] config", index);
    return read_config(args, raw.config, what, &net->config);
}

static int read_nets(model_args *args, PyObject *nets) {
    PyObject *list = PySequence_Tuple(nets);
    if (!list) return -1;
    if (hold(args->scratch, list)) return -1;
    args->n_nets = (size_t)PyTuple_GET_SIZE(list);
    args->names = PyTuple_New((Py_ssize_t)args->n_nets);
    if (!args->names) return -1;
    args->nets = PyMem_Calloc(args->n_nets + 1, sizeof *args->nets);
    args->tensors = PyMem_Calloc(args->n_nets + 1, sizeof *args->tensors);
    if (!args->nets || !args->tensors) {
        PyErr_NoMemory();
        return -1;
    }
    for (size_t i = 0; i < args->n_nets; i++)
        if (read_net(args, PyTuple_GET_ITEM(list, (Py_ssize_t)i), i)) return -1;
    return 0;
}

/* pieces: None, or (bytes of all tokens end to end, n + 1 offsets) */
static int read_pieces(model_args *args, PyObject *pieces, rast_vocab *vocab) {
    if (pieces == Py_None) return 0;
    if (!PyTuple_Check(pieces) || PyTuple_GET_SIZE(pieces) != 2 || !PyBytes_Check(PyTuple_GET_ITEM(pieces, 0))) {
        PyErr_SetString(PyExc_TypeError, "Model: pieces must be a pair (bytes, uint32 offsets)");
        return -1;
    }
    PyObject *bytes = PyTuple_GET_ITEM(pieces, 0);
    PyArrayObject *offsets = py_vector(PyTuple_GET_ITEM(pieces, 1), NPY_UINT32, "Model", "pieces[1]");
    if (hold(args->keep, (PyObject *)offsets) || PyList_Append(args->keep, bytes)) return -1;
    const uint32_t *start = PyArray_DATA(offsets);
    npy_intp n = PyArray_SIZE(offsets);
    int sound = n > 0 && start[n - 1] <= (size_t)PyBytes_GET_SIZE(bytes);
    for (npy_intp i = 1; i < n && sound; i++) sound = start[i - 1] <= start[i];
    if (!sound) {
        PyErr_SetString(PyExc_ValueError, "Model: the offsets in pieces must ascend and stay within the bytes");
        return -1;
    }
    vocab->piece_bytes = (const uint8_t *)PyBytes_AS_STRING(bytes);
    vocab->piece_start = start;
    vocab->n_pieces = (size_t)n - 1;
    return 0;
}

static void model_args_free(model_args *args) {
    for (size_t i = 0; args->tensors && i < args->n_nets; i++) PyMem_Free(args->tensors[i]);
    PyMem_Free(args->tensors);
    PyMem_Free(args->nets);
    Py_XDECREF(args->keep);
    Py_XDECREF(args->scratch);
    Py_XDECREF(args->names);
}

/* ---- the type ---------------------------------------------------------------------------------------------------- */

/* Any of the three may be NULL: not given. */
static int read_device(PyObject *name, PyObject *index, PyObject *plugin, const char *what, rast_device *out) {
    if (name) {
        const char *text = py_utf8(name, what, "device");
        if (!text) return -1;
        if (strcmp(text, "cpu") != 0 && strcmp(text, "cuda") != 0) {
            PyErr_Format(PyExc_ValueError, "%s: device %R is not one of cpu, cuda", what, name);
            return -1;
        }
        out->kind = strcmp(text, "cuda") == 0 ? RAST_CUDA : RAST_CPU;
    }
    if (index && py_read(index, PY_I32, what, "index", &out->index)) return -1;
    if (plugin && plugin != Py_None && !(out->plugin = py_utf8(plugin, what, "plugin"))) return -1;
    return 0;
}

static PyObject *model_new(PyTypeObject *type, PyObject *positional, PyObject *named) {
    static char *keywords[] = {"nets", "device", "index", "plugin", "isa", "num_threads", "n_valid", "pieces", NULL};
    PyObject *nets, *name = NULL, *index = NULL, *plugin = NULL, *isa = Py_None, *num_threads = NULL, *n_valid = NULL;
    PyObject *pieces = Py_None;
    if (!PyArg_ParseTupleAndKeywords(positional, named, "O|$OOOOOOO:Model", keywords, &nets, &name, &index, &plugin,
                                     &isa, &num_threads, &n_valid, &pieces))
        return NULL;

    rast_device device = {0};
    rast_vocab vocab = {0};
    if (read_device(name, index, plugin, "Model", &device)) return NULL;
    if (isa != Py_None && !(device.isa = py_utf8(isa, "Model", "isa"))) return NULL;
    if (num_threads && py_read(num_threads, PY_I32, "Model", "num_threads", &device.n_threads)) return NULL;
    if (n_valid && py_read(n_valid, PY_I32, "Model", "n_valid", &vocab.n_valid)) return NULL;

    py_model *self = NULL;
    rast_model *model = NULL;
    rast_error err = {0};
    int rc;
    model_args args = {.keep = PyList_New(0), .scratch = PyList_New(0)};
    if (!args.keep || !args.scratch || read_nets(&args, nets) || read_pieces(&args, pieces, &vocab)) goto done;
    Py_BEGIN_ALLOW_THREADS
    rc = rast_model_new(&device, args.nets, args.n_nets, &vocab, &model, &err);
    Py_END_ALLOW_THREADS
    if (rc) {
        py_raise(PyType_GetModuleState(type), &err);
        goto done;
    }
    self = (py_model *)type->tp_alloc(type, 0);
    if (!self) {
        rast_model_free(model);
        goto done;
    }
    self->model = model;
    self->keep = Py_NewRef(args.keep);
    self->names = Py_NewRef(args.names);

done:
    model_args_free(&args);
    return (PyObject *)self;
}

static int model_traverse(PyObject *object, visitproc visit, void *arg) {
    py_model *self = (py_model *)object;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->keep);
    Py_VISIT(self->names);
    return 0;
}

/* There is no tp_clear: the core reads the arrays as long as the model lives, and nothing in them refers back to it. */
static void model_dealloc(PyObject *object) {
    py_model *self = (py_model *)object;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    rast_model_free(self->model);
    Py_XDECREF(self->keep);
    Py_XDECREF(self->names);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *model_n_nets(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromSize_t(rast_model_n_nets(((py_model *)self)->model));
}

static PyObject *model_n_vocab(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromLong(rast_model_n_vocab(((py_model *)self)->model));
}

static PyObject *model_isa(PyObject *self, void *unused) {
    (void)unused;
    return PyUnicode_FromString(rast_model_isa(((py_model *)self)->model));
}

static PyObject *model_num_threads(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromLong(rast_model_n_threads(((py_model *)self)->model));
}

static PyObject *model_net_info(PyObject *object, PyObject *unused) {
    (void)unused;
    py_model *self = (py_model *)object;
    size_t n = rast_model_n_nets(self->model);
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (size_t i = 0; list && i < n; i++) {
        rast_net_info info;
        rast_model_net_info(self->model, i, &info);
        PyObject *dict = Py_BuildValue(
            "{sOsnsnsnsnsssisi}", "name", PyTuple_GET_ITEM(self->names, (Py_ssize_t)i), "weight_bytes",
            (Py_ssize_t)info.weight_bytes, "n_parameters", (Py_ssize_t)info.n_parameters, "device_bytes",
            (Py_ssize_t)info.device_bytes, "kv_bytes_per_token", (Py_ssize_t)info.kv_bytes_per_token, "dtype",
            dtypes[info.dtype].net, "vocab_size", (int)info.vocab_size, "max_context", (int)info.max_context);
        if (!dict)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, dict);
    }
    return list;
}

static PyGetSetDef model_getset[] = {
    {"n_nets", model_n_nets, NULL, "Distinct nets.", NULL},
    {"n_vocab", model_n_vocab, NULL, "Width of logits: rows of the base's embedding.", NULL},
    {"isa", model_isa, NULL, "Instruction set in use.", NULL},
    {"num_threads", model_num_threads, NULL, "Threads in use.", NULL},
    {0},
};

static PyMethodDef model_methods[] = {
    {"net_info", model_net_info, METH_NOARGS, "net_info() -> list of a dict for each net"},
    {0},
};

static PyType_Slot model_slots[] = {
    {Py_tp_doc, "Model(nets, *, device='cpu', index=0, plugin=None, isa=None, num_threads=0, n_valid=0, pieces=None)\n"
                "--\n\n"
                "The distinct nets of a transfer on one device; net 0 is the base. The CPU uses the arrays in place."},
    {Py_tp_new, model_new},
    {Py_tp_dealloc, model_dealloc},
    {Py_tp_traverse, model_traverse},
    {Py_tp_getset, model_getset},
    {Py_tp_methods, model_methods},
    {0, NULL},
};

PyType_Spec py_model_spec = {
    .name = "rast._core.Model",
    .basicsize = sizeof(py_model),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = model_slots,
};

PyObject *py_memory_read(PyObject *module, PyObject *array) {
    (void)module;
    Py_buffer view;
    uint64_t sum;
    if (PyObject_GetBuffer(array, &view, PyBUF_SIMPLE)) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    sum = rast_memory_read(view.buf, (size_t)view.len);
    Py_END_ALLOW_THREADS;
    PyBuffer_Release(&view);
    return PyLong_FromUnsignedLongLong(sum);
}

PyObject *py_check_device(PyObject *module, PyObject *args) {
    PyObject *name, *index = NULL, *plugin = NULL;
    rast_device device = {0};
    rast_error err = {0};
    int rc;
    if (!PyArg_ParseTuple(args, "O|OO:check_device", &name, &index, &plugin)) return NULL;
    if (read_device(name, index, plugin, "check_device", &device)) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    rc = rast_device_check(&device, &err);
    Py_END_ALLOW_THREADS;
    if (rc) return py_raise(PyModule_GetState(module), &err);
    Py_RETURN_NONE;
}

PyObject *py_cpu_isas(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    const char *names[8];
    size_t n = rast_cpu_isas(names);
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (size_t i = 0; list && i < n; i++) {
        PyObject *name = PyUnicode_FromString(names[i]);
        if (!name)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, name);
    }
    return list;
}

/* quantize(array, dtype, type, out): rows of floats to tiles */
PyObject *py_quantize(PyObject *module, PyObject *args) {
    PyArrayObject *from, *to;
    PyObject *dtype_name, *type_name;
    if (!PyArg_ParseTuple(args, "O!UUO!:quantize", &PyArray_Type, &from, &dtype_name, &type_name, &PyArray_Type, &to))
        return NULL;
    const int dtype = read_dtype(dtype_name, "quantize", "dtype", 1),
              type = read_dtype(type_name, "quantize", "type", 1);
    if (dtype < 0 || type < 0) return NULL;
    if (dtype >= RAST_N_DTYPES || !dtype_fits(PyArray_TYPE(from), dtype) || !PyArray_ISCARRAY_RO(from) ||
        PyArray_NDIM(from) != 2 || PyArray_TYPE(to) != NPY_UINT8 || !PyArray_ISCARRAY(to) || PyArray_NDIM(to) != 2) {
        PyErr_SetString(PyExc_TypeError, "quantize: needs C-contiguous matrices of dtype and, writable, of uint8");
        return NULL;
    }
    const size_t n_rows = (size_t)PyArray_DIM(from, 0), n = (size_t)PyArray_DIM(from, 1);
    const size_t stored = rast_stored_rows(type, n_rows);
    if ((size_t)PyArray_DIM(to, 0) != stored || (size_t)PyArray_DIM(to, 1) != rast_row_bytes(type, n)) {
        PyErr_Format(PyExc_ValueError, "quantize: out must be [%zu, %zu]", stored, rast_row_bytes(type, n));
        return NULL;
    }
    rast_error err = {0};
    int rc;
    Py_BEGIN_ALLOW_THREADS
    rc = rast_quantize(PyArray_DATA(from), dtype, n_rows, n, type, PyArray_DATA(to), &err);
    Py_END_ALLOW_THREADS
    if (rc) return py_raise(PyModule_GetState(module), &err);
    Py_RETURN_NONE;
}

/* ---- one call at a time ------------------------------------------------------------------------------------------ */

int py_model_is_mine(const py_model *self) { return self->held && self->holder == PyThread_get_thread_ident(); }

int py_model_try_claim(py_model *self) {
    if (self->held) return 0;
    self->held = 1;
    self->holder = PyThread_get_thread_ident();
    return 1;
}

/* Takes the waiter out of the queue. */
static void forget_waiter(py_model *self, const py_waiter *waiter) {
    py_waiter **at = &self->waiting;
    while (*at != waiter) at = &(*at)->next;
    *at = waiter->next;
}

/* Waits for this thread's turn. */
static int wait_for_turn(py_model *self) {
    py_waiter me = {.thread = PyThread_get_thread_ident(), .gate = PyThread_allocate_lock()}, **last = &self->waiting;
    if (!me.gate) {
        PyErr_NoMemory();
        return -1;
    }
    PyThread_acquire_lock(me.gate, NOWAIT_LOCK);
    while (*last) last = &(*last)->next;
    *last = &me;
    int rc = 0;
    while (!me.granted && !rc) {
        Py_BEGIN_ALLOW_THREADS
        PyThread_acquire_lock_timed(me.gate, -1, 1); /* a signal ends it, too */
        Py_END_ALLOW_THREADS
        rc = PyErr_CheckSignals();
    }
    if (rc && me.granted)
        py_model_release(self);
    else if (rc)
        forget_waiter(self, &me);
    PyThread_free_lock(me.gate); /* release opened it with the GIL held, so nobody is using it any more */
    return rc;
}

int py_model_claim(py_model *self) {
    if (py_model_try_claim(self)) return 0;
    if (!py_model_is_mine(self)) return wait_for_turn(self);
    PyErr_SetString(PyExc_RuntimeError, "the model is in use by a call that this one was made from");
    return -1;
}

static void free_handle(py_handle *handle) {
    rast_engine_free(handle->engine);
    PyMem_Free(handle);
}

void py_model_release(py_model *self) {
    while (self->leaving || self->retired) {
        py_model_settle(self);
        py_handle *handle = self->retired;
        if (!handle) continue;
        self->retired = handle->next;
        free_handle(handle);
    }
    py_waiter *next = self->waiting;
    self->held = next != NULL;
    if (!next) return;
    self->waiting = next->next;
    self->holder = next->thread;
    next->granted = 1;
    PyThread_release_lock(next->gate);
}

void py_model_retire(py_model *self, py_handle *handle) {
    if (!self->held) {
        free_handle(handle);
        return;
    }
    handle->next = self->retired;
    self->retired = handle;
}

void py_model_settle(py_model *self) {
    while (self->leaving) {
        py_leaving *leaving = self->leaving;
        self->leaving = leaving->next;
        leaving->queued = 0;
        py_engine_leave(leaving->engine, leaving->session, leaving->forget);
        if (!leaving->dead) continue;
        Py_DECREF(leaving->engine);
        PyMem_Free(leaving);
    }
}

void py_model_leave(py_model *self, py_leaving *leaving) {
    if (!leaving->queued) {
        leaving->queued = 1;
        leaving->next = self->leaving;
        self->leaving = leaving;
    }
    if (py_model_try_claim(self)) py_model_release(self);
}
