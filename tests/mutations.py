"""Plants errors of speculative decoding in a copy of the sources, one at a time, and shows that a test fails for each.

    python tests/mutations.py [NAME ...]

Not a test itself: every error takes a build. Exits with 1 if one is not found.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["tests/test_speculation.py", "-k", "not demonstration"]
ERRORS = {  # name: (file of csrc/engine, text, text in its place)
    "a draft is accepted without comparison": (
        "step.c",
        "s->draft[n - 1] == s->ids[s->n_ids - 1]",
        "s->draft[n - 1] >= 0",
    ),
    "a draft is taken for the draw": (
        "step.c",
        "rast_sample_append(e->model, s, e->token[s->first_out + output])",
        "rast_sample_append(e->model, s, n < s->n_draft ? s->draft[n] : e->token[s->first_out + output])",
    ),
    "history keeps rejected drafts": (
        "draft.c",
        "e->running[i]->fresh = 0, e->running[i]->history_stale = 1;",
        "e->running[i]->fresh = 0;",
    ),
    "history lacks the drafts before": ("plan.c", "if (j) s->history_stale = 1;", ""),
    "rejected drafts stay in the cache": (
        "admit.c",
        "s->end[m] < s->n_ids ? s->end[m] : s->n_ids - 1;",
        "s->end[m];",
    ),
    "the bonus token is left out": ("step.c", "!finish && n < s->n_draw_out &&", "!finish && n < s->n_draft &&"),
    "a token more than the bonus": ("step.c", "!finish && n < s->n_draw_out &&", "!finish && n <= s->n_draw_out &&"),
    "the bonus token from the expert's row before": (
        "plan.c",
        "s->first_saved + (int32_t)o;",
        "s->first_saved + (int32_t)(o < s->n_draft ? o : o - 1);",
    ),
    "the expert's row behind the last draft is not computed": (
        "plan.c",
        "drew(s, net) && s->n_draft >= j;",
        "drew(s, net) && s->n_draft > j;",
    ),
    "noise keyed by the row of the batch": (
        "plan.c",
        ".stream = s->stream,",
        ".stream = s->stream + (uint64_t)s->slot,",
    ),
    "noise of drafts keyed by the first position": (
        "plan.c",
        ".position = (uint32_t)(s->n_ids + i),",
        ".position = (uint32_t)s->n_ids,",
    ),
    "masks of drafts without the drafts before": (
        "run.c",
        "rast_sample_mask(s, s->first_draw + o,",
        "rast_sample_mask(s, s->first_draw,",
    ),
    "positions of drafts one too far": (
        "plan.c",
        "pos[row] = (int32_t)t;",
        "pos[row] = (int32_t)(t < s->n_ids ? t : t + 1);",
    ),
    "history of draws without the draft before": ("plan.c", "draw->draft = i ? s->draft[i - 1] : -1;", ""),
}


def first_failure(folder: Path) -> str:
    """The first test that fails, or an empty string."""
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=folder, check=True, capture_output=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode == 0:
        return ""
    lines = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0].split(" - ")[0] if lines else f"pytest ended with {result.returncode}"


def failure_with(folder: Path, name: str) -> str:
    """The first test that fails with the error, or an empty string."""
    file, old, new = ERRORS[name]
    source = folder / "csrc" / "engine" / file
    text = source.read_text()
    if text.count(old) != 1:
        raise SystemExit(f"{file}: {old!r} occurs {text.count(old)} times: bring this script up to date")
    try:
        source.write_text(text.replace(old, new))
        return first_failure(folder)
    finally:
        source.write_text(text)


def main() -> int:
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "rast"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "*.o"))
        if failure := first_failure(folder):
            raise SystemExit(f"without any error: {failure}")
        for error in sys.argv[1:] or ERRORS:
            found = failure_with(folder, error)
            missed += not found
            print(f"{error:56} {found or 'NOT FOUND'}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
