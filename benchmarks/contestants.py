"""Who takes part in a benchmark, which files each reads, and what a report says about the run.

This module is imported in the contestants' processes too: what is large is imported where it is used.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from turns import Contestant, MissingError, OtherWork

KV_TOKENS = 4096  # of rast, where a benchmark needs no more
MOST_OTHER_WORK = 0.05  # share of the cores beyond which results are called not comparable
NAMES = ("rast", "llama.cpp", "HuggingFace")
OWN_TYPES = {16: (), 8: ("int8",), 4: ("int4", "int4-64")}  # bits of a weight -> what rast makes at load

_ISA_VARIABLES = {"avx2": {"RAST_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}}


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trio", choices=["qwen1.5b+0.5b", "smollm2", "tiny"], default="smollm2", help="shapes")
    parser.add_argument("--bits", type=int, choices=[16, 8, 4], default=16, help="of a weight: bf16, Q8_0 or Q4_0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="keep the models there (15 GB for qwen1.5b+0.5b in all types)")
    parser.add_argument("--contestants", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--isa", choices=list(_ISA_VARIABLES), help="use no more of the CPU than this")
    parser.add_argument("--llama-library", type=Path, help="folder with llama.cpp's libraries built for --isa")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    return parser


@contextlib.contextmanager
def model_folder(args: argparse.Namespace) -> Iterator[Path]:
    """--folder, or one that lasts as long as the run."""
    if args.folder:
        yield args.folder
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)


class Field:
    """The contestants that are there, open, by name; `missing` says why others are not."""

    def __init__(self, args: argparse.Namespace, folder: Path, kv_tokens: int = KV_TOKENS) -> None:
        from models import random_trio

        self._args, self._kv_tokens = args, kv_tokens
        self._folders = random_trio(folder, args.trio)
        self._open: dict[str, Contestant] = {}
        self.missing: dict[str, str] = {}
        config = [json.loads((part / "config.json").read_text()) for part in self._folders]
        self.vocab_size = min(part["vocab_size"] for part in config)

    def _files(self, bits: int | None) -> list[str]:
        """safetensors folders, or GGUF files with weights of so many bits."""
        if bits is None:
            return [str(folder) for folder in self._folders]
        from gguf_models import gguf_file

        return [str(gguf_file(folder, bits)) for folder in self._folders]

    def open(self, name: str, **more: Any) -> Contestant | None:
        """The contestant, in a process of its own; None if it cannot take part."""
        args = self._args
        kind = name.split()[0]
        variables = dict(_ISA_VARIABLES.get(args.isa, {}))
        options: dict[str, Any] = {"threads": args.threads} | more
        try:
            if kind == "llama.cpp":
                if importlib.util.find_spec("llama_cpp") is None:
                    raise MissingError("llama-cpp-python is not installed")
                if args.isa and not args.llama_library:
                    raise MissingError(f"--llama-library names no build for {args.isa}")
                if args.llama_library:
                    variables["LLAMA_CPP_LIB_PATH"] = str(args.llama_library)
            if kind == "rast":
                options["kv_tokens"] = self._kv_tokens
            if kind != "memory":
                own = kind == "rast" and (args.bits == 16 or "quantization" in options)
                options["files"] = self._files(None if own or kind == "HuggingFace" else args.bits)
            self._open[name] = Contestant(kind, variables, **options)
        except MissingError as reason:
            self.missing[name] = str(reason)
            print(f"{name} is left out: {reason}", file=sys.stderr)
            return None
        return self._open[name]

    def open_all(self) -> dict[str, Contestant]:
        """All that have weights of so many bits. HuggingFace's models have 16; rast also makes 8 and 4 at load."""
        bits = self._args.bits
        for name in self._args.contestants:
            if name != "HuggingFace" or bits == 16:
                self.open(name)
            if name == "rast":
                for quantization in OWN_TYPES[bits]:
                    self.open(f"rast {quantization}", quantization=quantization)
        return dict(self._open)

    def facts(self) -> dict[str, Any]:
        return {name: contestant.facts for name, contestant in self._open.items()}

    def peak_bytes(self, name: str) -> int:
        """The most memory that its process had resident, mapped files included."""
        peak: int = self._open[name].call("peak_bytes")
        return peak

    def other_work(self) -> OtherWork:
        return OtherWork(list(self._open.values()))

    def close(self, name: str | None = None) -> None:
        for key in [name] if name else list(self._open):
            self._open.pop(key).close()

    def __enter__(self) -> Field:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def report(benchmark: str, args: argparse.Namespace, field: Field, **results: Any) -> dict[str, Any]:
    """All of a run, as it goes to the JSON file."""
    return {
        "benchmark": benchmark,
        "trio": args.trio,
        "bits": args.bits,
        "forced_isa": args.isa,
        "cpu": cpu_name(),
        "threads": args.threads,
        "rounds": args.rounds,
        "contestants": field.facts(),
        "missing": field.missing,
        **results,
    }


def save(path: Path | None, result: dict[str, Any]) -> None:
    """Writes it whole or not at all, so that a file that is there is a benchmark that is done."""
    if path:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.rename(path)


def warn_of_other_work(share: float) -> None:
    if share > MOST_OTHER_WORK:
        print(f"NOT COMPARABLE: other processes took {share:.0%} of the cores. Run it alone.", file=sys.stderr)


def cpu_name() -> str:
    """The CPU as Linux calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
