"""What it costs to look at a run and to take it away: every export, the report, a search.

    python -m benchmarks.bench_export [--rows 20000] [--folder RUN]

The run is made through the real pipeline and store from varied texts (tests/engine/synthetic.py),
or is one that you name. Each export and the report is a process of its own, so time and memory
include the interpreter and its imports; a search is asked as the page asks it, from the index to
the rows. Time is the wall's beside the CPU's, because a busy machine shows in the first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engine.export.formats import FORMATS
from engine.view.rows import Rows

WORDS = ("letter", "letter about", "a", "the sea", "zzz")
ENGINE = (
    "import resource, sys, time; from engine.cli.main import cli; began = time.monotonic()\n"
    "cli(sys.argv[1:], standalone_mode=False)\n"
    "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
    "used = resource.getrusage(resource.RUSAGE_SELF)\n"
    "print(peak.split()[1], used.ru_utime + used.ru_stime, file=sys.stderr)"
)


def measured(*arguments: str) -> dict[str, float]:
    """Wall and CPU seconds and the peak of memory (MB) of one command."""
    began = time.monotonic()
    command = [sys.executable, "-c", ENGINE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.monotonic() - began
    peak_kib, cpu = done.stderr.split()[-2:]
    return {
        "s": round(seconds, 2),
        "cpu_s": round(float(cpu), 2),
        "peak_mb": round(int(peak_kib) * 1.024e-3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="a run that is there")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "run"
        if options.folder is None:
            from tests.engine.synthetic import synthetic_run

            synthetic_run(folder, options.rows)
        print(f"{'what':24} {'wall s':>8} {'CPU s':>8} {'peak MB':>8} {'MB written':>11}")
        jobs = {f"export {name}": ["export", str(folder), "--format", name] for name in FORMATS}
        jobs["export, split"] = [*jobs["export datasets"], "--validation", "0.02"]
        jobs["report"] = ["report", str(folder), "--format", "html"]
        for number, (name, arguments) in enumerate(jobs.items()):
            out = Path(scratch) / f"out-{number}"
            cost = measured(*arguments, "-o", str(out))
            files = [out] if out.is_file() else [p for p in out.rglob("*") if p.is_file()]
            cost["mb_written"] = round(sum(path.stat().st_size for path in files) / 1e6, 2)
            results[name] = cost
            print(f"{name:24} {cost['s']:8.2f} {cost['cpu_s']:8.2f} {cost['peak_mb']:8.0f}"
                  f" {cost['mb_written']:11.2f}")  # fmt: skip
        began = time.monotonic()
        rows = Rows(folder, {})
        results["index_s"] = round(time.monotonic() - began, 2)
        searches = []
        for words in WORDS:
            for _ in range(5):
                began = time.monotonic()
                rows.find(words)
                searches.append(1000 * (time.monotonic() - began))
        rows.close()
    results["search_ms"] = {"worst": round(max(searches), 1), "of": len(searches)}
    print(f"view: index {results['index_s']:.2f} s, slowest of {len(searches)} searches"
          f" {max(searches):.1f} ms")  # fmt: skip
    print(json.dumps(results))


if __name__ == "__main__":
    main()
