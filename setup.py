"""Builds the extension rast._core from csrc/; all other metadata is in pyproject.toml.

Environment: RAST_SANITIZE=1 builds with ASan and UBSan, RAST_WERROR=1 turns warnings into errors.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import numpy as np
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

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
if os.environ.get("RAST_WERROR"):
    COMPILE_FLAGS += ["-Wall", "-Wextra", "-Werror"]


class BuildExt(build_ext):
    """Compiles each source with the flags of its instruction set, in parallel, and only what changed."""

    def build_extension(self, ext: Extension) -> None:
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


setup(
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
        )
    ],
)
