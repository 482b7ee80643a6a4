"""Puts results into the documentation: JSON files and plots into a folder, tables between marks in Markdown files.

    python benchmarks/report.py build/bench --folder docs/benchmarks docs/benchmarks.md README.md

A mark is `<!-- table: decode -->` or `<!-- table: decode smollm2 16 -->`, with the models and the bits of a weight that
it wants; what stands between it and `<!-- end -->` is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

from plots import PLOTS
from tables import MODELS, TABLES, Report

MARK = re.compile(r"(<!-- table: ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(folder: Path) -> list[Report]:
    """All results, in the order of models and bits."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    order = list(MODELS)
    return sorted(reports, key=lambda r: (r["forced_isa"] or "", order.index(r["trio"]), -r["bits"]))


def wanted(reports: list[Report], words: list[str]) -> list[Report]:
    """Those of a benchmark, the first word, with any of the models and any of the bits that the others name."""
    benchmark, *rest = words
    trios = [word for word in rest if not word.isdigit()]
    bits = [int(word) for word in rest if word.isdigit()]
    return [
        report
        for report in reports
        if report["benchmark"] == benchmark
        and (not trios or report["trio"] in trios)
        and (not bits or report["bits"] in bits)
    ]


def filled(text: str, reports: list[Report]) -> str:
    """The text with its tables renewed. A table that no result belongs to stays as it is."""

    def renewed(match: re.Match[str]) -> str:
        words = match[2].split()
        chosen = wanted(reports, words)
        return f"{match[1]}{TABLES[words[0]](chosen)}\n{match[3]}" if chosen else match[0]

    return MARK.sub(renewed, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder with the JSON files of a run")
    parser.add_argument("--folder", type=Path, required=True, help="where JSON files and plots go")
    parser.add_argument("texts", type=Path, nargs="+", help="Markdown files whose tables are renewed")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.results.resolve() != args.folder.resolve():
        for path in args.results.glob("*.json"):
            shutil.copy(path, args.folder)
    reports = read(args.folder)
    for name, draw in PLOTS.items():
        if chosen := wanted(reports, [name]):
            draw(chosen, args.folder / f"{name}.svg")
    for path in args.texts:
        path.write_text(filled(path.read_text(), reports))


if __name__ == "__main__":
    main()
