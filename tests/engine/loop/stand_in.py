"""A trainer that does as its flags say: ``python -m tests.engine.loop.stand_in --do WHAT …``."""

from __future__ import annotations

import signal
import sys
import time
from itertools import pairwise
from pathlib import Path

if __name__ == "__main__":
    given = sys.argv[1:]
    flags = {flag: value for flag, value in pairwise(given) if flag.startswith("--")}
    what, out = flags["--do"], Path(flags["--output_dir"])
    out.mkdir(exist_ok=True)
    if what == "fail":
        print("step 1", flush=True)  # noqa: T201
        sys.stderr.write("trainer: data.jsonl:3: field 'output' is missing\nTraceback\n")
        sys.exit(65)
    if what == "die":
        sys.exit(3)
    if what == "wait":

        def save(*_: object) -> None:
            (out / "saved").touch()
            sys.exit(143)

        signal.signal(signal.SIGTERM, save)
        (out / "waits").touch()
        time.sleep(100)
    (out / "flags").write_text("\n".join(sys.argv[1:]))
