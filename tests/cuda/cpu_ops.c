/* cpu_ops.c: the CPU backend's op table, for tests that compare another backend with it. */
#include "../../csrc/backends/backend.h"

RAST_API const rast_ops *cpu_ops(void) { return &rast_cpu_ops; }
