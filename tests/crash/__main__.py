"""The proof: ``make crash``, or ``python -m tests.crash [PART…] [--kills N] …``.

Each part is a row of the table. Under *lost*, *twice* (a row exported twice), *paid again* (a
completed request sent once more), *differs* (the export from that of a run nobody disturbed) and
*other* there must be nothing but 0; *resent* were in flight at a crash and are, each of them,
listed by key when the run goes on. Parts that this machine does not permit say so; they are never
taken for passed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.crash import damage, hunt, inject, kills, power, stages
from tests.crash.share import shared

TRIED = ("kills", "cuts", "stops", "errors", "bits", "mutants_caught")
"""What a part counts its tries by."""
COLUMNS = {
    "acknowledged": "acknowledged",
    "lost": "lost",
    "twice": "duplicates",
    "paid again": "paid_again",
    "resent": "resent_in_flight",
    "differs": "export_differs",
}
"""Heading: what is under it. *Other* has the rest of ``damage.WRONG``."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.crash",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = "kills failpoints stops power errors flips log mutants stages stage-points"
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{names} [all]")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--stage-kills", type=int, default=50, help="of each kind of stages")
    parser.add_argument("--stops", type=int, default=50)
    parser.add_argument("--cuts", type=int, default=200)
    fewer = "try one in so many calls, bits and bytes, and no second kill"
    parser.add_argument("--every", type=int, default=1, help=fewer)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep what fails here [a temporary folder]")
    args = parser.parse_args()
    folder: Path = args.folder or Path(tempfile.mkdtemp(prefix="woolmill-crash-"))
    seed, every = args.seed, args.every
    parts: dict[str, Callable[[Path], Counter[str]]] = {
        "kills": lambda f: shared(partial(kills.random_kills, args.kills, seed=seed), f),
        "failpoints": lambda f: shared(
            partial(kills.failpoint_kills, nths=(1, 4), twice=every == 1), f
        ),
        "stops": lambda f: shared(partial(kills.stops, args.stops, seed=seed), f),
        "power": lambda f: shared(partial(power.power_cuts, args.cuts, seed=seed), f),
        "errors": lambda f: shared(partial(inject.injected_errors, every=every), f),
        "flips": lambda f: shared(
            partial(damage.flipped_bits, damage.smallest_run(f / "original"), every=every), f
        ),
        "log": lambda f: shared(
            partial(damage.cut_logs, damage.unclosed_run(f / "original", 4), every=every), f
        ),
        "mutants": lambda f: shared(hunt.mutants, f),
        "stages": lambda f: shared(partial(stages.kills, args.stage_kills, seed=seed), f),
        "stage-points": lambda f: shared(partial(stages.points, nths=(1, 4, 25)), f),
    }
    wanted = args.parts or list(parts)
    if unknown := set(wanted) - set(parts):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    results: dict[str, dict[str, int]] = {}
    skipped: dict[str, str] = {}
    _say("part", "tried", *COLUMNS, "other", "seconds")
    for part in wanted:
        began = time.monotonic()
        try:
            total = parts[part](folder / part)
        except (power.CannotMount, inject.CannotTrace) as exc:
            skipped[part] = str(exc)
            print(f"{part:12}SKIPPED: {exc}", flush=True)  # noqa: T201
            continue
        results[part] = dict(total) | {name: total[name] for name in damage.WRONG}
        other = sum(total[name] for name in damage.WRONG if name not in COLUMNS.values())
        judged = "acknowledged" in total
        cells = [total[name] if judged or total[name] else "-" for name in COLUMNS.values()]
        tried = next((total[name] for name in TRIED if total[name]), 0)
        _say(part, tried, *cells, other, round(time.monotonic() - began))
        if part == "mutants":
            print(f"caught {tried}/{tried + total['mutants_missed']}", flush=True)  # noqa: T201
    print(json.dumps({"results": results, "skipped": skipped, "folder": str(folder)}))  # noqa: T201
    sys.exit(any(result[name] for result in results.values() for name in damage.WRONG))


def _say(part: str, *cells: object) -> None:
    print(f"{part:12}" + "".join(f"{cell!s:>13}" for cell in cells), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
