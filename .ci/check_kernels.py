"""Compiles every kernel with nvcc to machine code and PTX, warnings being errors, and fails if one spills registers.

Usage: python .ci/check_kernels.py [ARCH...]     compute capabilities, such as 80 90; default 90
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def compiled(source: Path, arch: str) -> list[tuple[str, int, int]]:
    """(kernel, registers, bytes spilled) of each kernel of a file."""
    target = f"-gencode=arch=compute_{arch},code=[sm_{arch},compute_{arch}]"  # and PTX
    command = ["nvcc", target, "-O3", "-std=c++17", "-Werror", "all-warnings", "-Xptxas", "-v"]
    done = subprocess.run([*command, "-c", str(source), "-o", os.devnull], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{source.name}, sm_{arch}:\n{done.stderr}")
    found, kernel, spilled = [], "", 0
    for line in done.stderr.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            kernel, spilled = match[1], 0
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(match[1]) + int(match[2])
        elif match := re.search(r"Used (\d+) registers", line):
            found.append((kernel, int(match[1]), spilled))
    return found


def main() -> None:
    archs = sys.argv[1:] or ["90"]
    sources = sorted((ROOT / "kernels").glob("*.cu"))
    jobs = [(source, arch) for arch in archs for source in sources]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = list(pool.map(lambda job: compiled(*job), jobs))
    bad = 0
    for (source, arch), kernels in zip(jobs, results, strict=True):
        if not kernels and "__global__" not in source.read_text():
            continue
        if not kernels:
            raise SystemExit(f"{source.name}, sm_{arch}: ptxas names no kernel; did its output change?")
        most = max(registers for _, registers, _ in kernels)
        print(f"sm_{arch} {source.name}: {len(kernels)} kernels, at most {most} registers")
        for kernel, _, spilled in kernels:
            if spilled:
                bad += 1
                print(f"  {kernel} spills {spilled} bytes")
    if bad:
        raise SystemExit(f"{bad} kernels spill registers")


main()
