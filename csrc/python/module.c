/* module.c: the extension module rast._core (multi-phase initialisation, state in the module). */
#define RAST_IMPORTS_NUMPY
#include "binding.h"

static PyTypeObject *add_type(PyObject *module, PyType_Spec *spec) {
    PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    if (type && PyModule_AddType(module, type)) Py_CLEAR(type);
    return type;
}

static int module_exec(PyObject *module) {
    static const struct {
        const char *name;
        int value;
    } constants[] = {
        {"WANT_LOGPROBS", RAST_WANT_LOGPROBS},
        {"WANT_STATS", RAST_WANT_STATS},
        {"WANT_LOGITS", RAST_WANT_LOGITS},
        {"WANT_SCORES", RAST_WANT_SCORES},
        {"WANT_COMPONENTS", RAST_WANT_COMPONENTS},
        {"WANT_PROMPT", RAST_WANT_PROMPT},
        {"TILE_ROWS", RAST_TILE_ROWS},
    };
    if (PyArray_ImportNumPyAPI() < 0) return -1;
    py_state *state = PyModule_GetState(module);
    state->numeric_error = PyErr_NewExceptionWithDoc("rast._core.NumericError",
                                                     "NaN or Inf in a model's logits; the message names the model.",
                                                     PyExc_RuntimeError, NULL);
    if (!state->numeric_error || PyModule_AddObjectRef(module, "NumericError", state->numeric_error)) return -1;
    if (!(state->model_type = add_type(module, &py_model_spec))) return -1;
    if (!(state->engine_type = add_type(module, &py_engine_spec))) return -1;
    if (!(state->session_type = add_type(module, &py_session_spec))) return -1;
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++)
        if (PyModule_AddIntConstant(module, constants[i].name, constants[i].value)) return -1;
    return 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    py_state *state = PyModule_GetState(module);
    Py_VISIT(state->model_type);
    Py_VISIT(state->engine_type);
    Py_VISIT(state->session_type);
    Py_VISIT(state->numeric_error);
    return 0;
}

static int module_clear(PyObject *module) {
    py_state *state = PyModule_GetState(module);
    Py_CLEAR(state->model_type);
    Py_CLEAR(state->engine_type);
    Py_CLEAR(state->session_type);
    Py_CLEAR(state->numeric_error);
    return 0;
}

static PyMethodDef module_methods[] = {
    {"cpu_isas", py_cpu_isas, METH_NOARGS, "cpu_isas() -> the instruction sets this machine can run, best last"},
    {"check_device", py_check_device, METH_VARARGS,
     "check_device(device, index=0, plugin=None): opens and closes it; RuntimeError says what is missing"},
    {"memory_read", py_memory_read, METH_O,
     "memory_read(array) -> int: reads a contiguous array once, at the memory's speed for one thread, without the GIL"},
    {"quantize", py_quantize, METH_VARARGS, "quantize(array, dtype, type, out): rows of floats to rows of blocks"},
    {0},
};

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
    {0, NULL},
};

static PyModuleDef module_def = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "rast._core",
    .m_doc = "The C core of rast. Private: use rast.RastForCausalLM.",
    .m_size = sizeof(py_state),
    .m_methods = module_methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&module_def); }
