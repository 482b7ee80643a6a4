/* cuda_runtime.h: the runtime's interface, and in C++ the device surface with it. */
#ifndef CUDA_EMULATION_RUNTIME_H
#define CUDA_EMULATION_RUNTIME_H
#include "cuda_runtime_api.h"
#ifdef __cplusplus
#include "cuda_emulation.h"
#endif
#endif
