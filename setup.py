"""Builds the extension rast._core from csrc/; all other metadata is in pyproject.toml.

The CUDA backend, rast/_cuda.so, is a plugin: a shared object that rast/devices.py finds beside itself and no Python
module. It is built where nvcc and cuBLAS's headers are found.

Environment: RAST_SANITIZE=1 builds with ASan and UBSan, RAST_WERROR=1 turns warnings into errors. RAST_BUILD_CUDA=1
demands the CUDA backend, 0 leaves it out; RAST_CUDA_ARCHS="80 90" restricts it to these compute capabilities; CUDA_HOME
names the Toolkit; RAST_CUDA_RUNTIME=shared links libcudart.so, whose functions the tests call, instead of its archive.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import numpy as np
import setuptools
from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCE_FOLDERS = ("csrc", "csrc/engine", "csrc/model", "csrc/backends", "csrc/backends/cpu", "csrc/python")

# The same flags as in the Makefile, which builds the C library without Python. Contraction is off because results are
# defined as a fixed sequence of roundings.
COMPILE_FLAGS = ["-O3", "-std=c11", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden", "-pthread", "-g0"]
LINK_FLAGS = ["-pthread", "-lm", "-ldl"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
ISA_FLAGS = {  # what a file may use; which of them runs is decided at run time
    "isa_avx2.c": AVX2_FLAGS,
    "isa_avx512.c": AVX512_FLAGS,
    "isa_avx512vnni.c": [*AVX512_FLAGS, "-mavx512vnni"],
    "isa_avx512bf16.c": [*AVX512_FLAGS, "-mavx512vnni", "-mavx512bf16"],
}
X86_64 = platform.machine().lower() in ("x86_64", "amd64")

if os.environ.get("RAST_SANITIZE"):
    SANITIZE = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer"]
    COMPILE_FLAGS += [*SANITIZE, "-fno-sanitize-recover=undefined", "-O1", "-g"]
    LINK_FLAGS += SANITIZE
WERROR = bool(os.environ.get("RAST_WERROR"))
if WERROR:
    COMPILE_FLAGS += ["-Wall", "-Wextra", "-Werror"]


CUDA_ARCHS = os.environ.get("RAST_CUDA_ARCHS", "80 86 89 90 100 120").split()
CUDA_RUNTIME = os.environ.get("RAST_CUDA_RUNTIME", "static")
CUDA_PLUGIN = "rast._cuda"


def cuda_tools() -> tuple[str, str, list[str]] | None:
    """nvcc, the folder of cuBLAS's headers, and those of libraries, cuBLAS's first; from the Toolkit or NVIDIA's wheel.
    None: do without."""
    wanted = os.environ.get("RAST_BUILD_CUDA", "")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    toolkits = [Path(home)]
    if nvcc:  # which may be a script that calls another
        plan = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=False
        )
        toolkits += [Path(line[len("#$ TOP=") :]) for line in plan.stderr.splitlines() if line.startswith("#$ TOP=")]
    folders = [(root / "include", root / library) for root in toolkits for library in ("lib64", "lib")]
    for entry in map(Path, sys.path):
        folders.append((entry / "nvidia/cu13/include", entry / "nvidia/cu13/lib"))
    found = [pair for pair in folders if (pair[0] / "cublas_v2.h").exists() and any(pair[1].glob("libcublas.so*"))]
    if nvcc and found:
        others = [str(root / name) for root in toolkits for name in ("lib64", "lib") if (root / name).is_dir()]
        return nvcc, str(found[0][0]), [str(found[0][1]), *others]
    if wanted:
        missing = "cublas_v2.h and libcublas.so (CUDA Toolkit, or pip install nvidia-cublas)" if nvcc else "nvcc"
        raise CompileError(f"RAST_BUILD_CUDA=1, but there is no {missing}")
    return None


def newer_group(sources: list[str], target: str) -> bool:
    """Whether the target is missing or older than a source."""
    return not os.path.exists(target) or max(map(os.path.getmtime, sources)) > os.path.getmtime(target)


def run_nvcc(command: list[str]) -> None:
    """A failure is one that an optional extension may have: the package is built without it."""
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(f"nvcc failed (RAST_BUILD_CUDA=0 leaves the CUDA backend out): {error}") from error


class InPlace(Distribution):
    """Extensions alone, for a setuptools too old for pyproject.toml: a GPU machine has what it has (make test-gpu)."""

    def parse_config_files(self, *args: object, **options: object) -> None:
        """Reads nothing."""


class BuildExt(build_ext):
    """Compiles each source with the flags of its instruction set, in parallel, and only what changed."""

    def get_ext_filename(self, fullname: str) -> str:
        parts = fullname.split(".")  # with the package or without
        is_plugin = parts[-1] == CUDA_PLUGIN.split(".")[-1]
        return "/".join(parts) + ".so" if is_plugin else str(super().get_ext_filename(fullname))

    def build_extension(self, ext: Extension) -> None:
        if ext.name == CUDA_PLUGIN:
            self.build_plugin(ext)
            return
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(lambda source: self.compile(source, ext), sorted(ext.sources)))
        target = self.get_ext_fullpath(ext.name)
        if self.force or newer_group(objects, target):
            self.compiler.link_shared_object(
                objects,
                target,
                extra_postargs=ext.extra_link_args,
                export_symbols=self.get_export_symbols(ext),
                build_temp=self.build_temp,
                target_lang="c",
            )

    def compile(self, source: str, ext: Extension) -> str:
        (target,) = self.compiler.object_filenames([source], output_dir=self.build_temp)
        if not self.force and not newer_group([source, *ext.depends], target):
            return target
        isa_flags = ISA_FLAGS.get(Path(source).name, []) if X86_64 else []
        try:
            self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=ext.define_macros,
                include_dirs=ext.include_dirs,
                extra_postargs=[*ext.extra_compile_args, *isa_flags],
            )
        except CompileError as error:
            if not isa_flags:
                raise
            needs = f"{source} needs a compiler that knows {' '.join(isa_flags)} (GCC 10, clang 9 or newer)"
            raise CompileError(needs) from error
        return target

    def build_plugin(self, ext: Extension) -> None:
        tools = cuda_tools()
        if not tools:
            return
        nvcc, include, libraries = tools
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS]
        for arch in sorted({CUDA_ARCHS[0], CUDA_ARCHS[-1]}):  # PTX, for those between and for what comes after
            archs.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
        host = ["-fPIC", *(["-Wall", "-Wextra", "-Werror"] if WERROR else [])]
        common = [nvcc, "-O3", "-D_GNU_SOURCE", f"-I{include}", *(["-Werror", "all-warnings"] if WERROR else [])]

        def compile_one(source: str) -> str:
            target = str(folder / (source.replace("/", "_") + ".o"))
            if not self.force and not newer_group([source, *ext.depends], target):
                return target
            kind = ["-std=c++17", *archs] if source.endswith(".cu") else ["-Xcompiler", "-std=c11"]
            command = [*common, *kind, "-Xcompiler", ",".join(host), "-c", source, "-o", target]
            run_nvcc(command)
            return target

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(compile_one, sorted(ext.sources)))
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        cublas = next(
            path.name for name in ("libcublas.so", "libcublas.so.*") for path in Path(libraries[0]).glob(name)
        )
        rpath = ":".join(["$ORIGIN/../nvidia/cu13/lib", *libraries])
        linker = [f"-L{libraries[0]}", f"-l:{cublas}", f"-rpath,{rpath}"]
        flags = [part for flag in linker for part in ("-Xlinker", flag)]
        run_nvcc([nvcc, "-shared", f"-cudart={CUDA_RUNTIME}", *objects, *flags, "-o", target])


OLD = int(setuptools.__version__.split(".")[0]) < 77  # what pyproject.toml asks for
setup(
    distclass=InPlace if OLD and "--inplace" in sys.argv else Distribution,
    cmdclass={"build_ext": BuildExt},
    ext_modules=[
        Extension(
            "rast._core",
            sources=[source for folder in SOURCE_FOLDERS for source in glob(f"{folder}/*.c")],
            depends=[path for suffix in ("h", "inc") for path in glob(f"csrc/**/*.{suffix}", recursive=True)],
            include_dirs=[np.get_include()],
            define_macros=[("_GNU_SOURCE", None)],
            extra_compile_args=COMPILE_FLAGS,
            extra_link_args=LINK_FLAGS,
        ),
        Extension(
            CUDA_PLUGIN,
            sources=[*glob("kernels/*.cu"), *glob("csrc/backends/cuda/*.c"), "csrc/error.c", "csrc/model/quantize.c"],
            depends=[*glob("kernels/*.h"), *glob("csrc/**/*.h", recursive=True)],
            optional=os.environ.get("RAST_BUILD_CUDA") != "1",
        ),
    ],
)
