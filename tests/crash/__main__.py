"""The proof: ``make crash``, or ``python -m tests.crash [PART…] [--kills N] …``.

Every part gives rows of one table, and every violation is a 1 that must be a 0. The last line is
one JSON object. Parts that this machine does not permit say so; they are never taken for passed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.crash import damage, hunt, inject, kills, power

NOTES = {
    "acknowledged": "acknowledged",
    "resent_in_flight": "in flight at a crash, sent again, each listed by key",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", help="kills failpoints stops power errors flips log mutants"
    )
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--stops", type=int, default=50)
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--every", type=int, default=1, help="try one in so many errors and bits")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep what fails here [a temporary folder]")
    args = parser.parse_args()
    folder: Path = args.folder or Path(tempfile.mkdtemp(prefix="woolmill-crash-"))
    seed, every = args.seed, args.every
    parts: dict[str, Callable[[Path], Counter[str]]] = {
        "kills": lambda f: kills.random_kills(args.kills, f, seed=seed),
        "failpoints": lambda f: kills.failpoint_kills(f, nths=(1, 4), twice=every == 1),
        "stops": lambda f: kills.stops(args.stops, f, seed=seed),
        "power": lambda f: power.power_cuts(args.cuts, f, seed=seed),
        "errors": lambda f: inject.injected_errors(f, every=every, seed=seed),
        "flips": lambda f: damage.flipped_bits(f, every=every, seed=seed),
        "log": lambda f: damage.cut_logs(f, every=every),
        "mutants": lambda f: hunt.mutants(f),
    }
    wanted = args.parts or list(parts)
    if unknown := set(wanted) - set(parts):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    results: dict[str, dict[str, int]] = {}
    skipped: dict[str, str] = {}
    failed = False
    for part in wanted:
        began = time.monotonic()
        try:
            total = parts[part](folder / part)
        except (power.CannotMount, inject.CannotTrace) as exc:
            skipped[part] = str(exc)
            print(f"{part:11}SKIPPED: {exc}", flush=True)  # noqa: T201
            continue
        wrong = {name: n for name, n in total.items() if name in damage.WRONG and n}
        failed |= bool(wrong)
        seen = ", ".join(f"{name} {n}" for name, n in total.items() if name not in damage.WRONG)
        state = "WRONG " + str(wrong) if wrong else "ok"
        print(f"{part:11}{state}: {seen}  ({time.monotonic() - began:.0f} s)", flush=True)  # noqa: T201
        results[part] = dict(total) | {name: total[name] for name in damage.WRONG}
    print(json.dumps({"results": results, "skipped": skipped, "folder": str(folder)}))  # noqa: T201
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
