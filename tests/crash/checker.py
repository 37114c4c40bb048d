"""The independent checker: reads what the server, the run and the export say, and imports nothing
of ours.

    python tests/crash/checker.py LEDGER ACKS EXPORT UNCUT_EXPORT

Ledger (by the server, one line an event):       NS asked|paid KEY
Acknowledgements (by the run, one line each):    NS start PID / NS again INDEX / NS sent INDEX KEY
                                                 NS answered INDEX / NS accepted ID DIGEST
Exports: JSON Lines with ``id``, ``instruction``, ``input``, ``output``; ``DIGEST`` is of the last
three.

NS is the monotonic clock of the machine, which all processes share. KEY is a request as the server
knows it, INDEX as the run does. A session is everything from one ``start`` to the next.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path


def events(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Whole lines only: the last may be cut by the kill."""
    for line in path.read_bytes().split(b"\n")[:-1]:
        at, name, *rest = line.decode().split(" ")
        yield int(at), name, rest


def digest(row: dict[str, str]) -> str:
    text = json.dumps([row["instruction"], row["input"], row["output"]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check(ledger: Path, acks: Path, export: Path, uncut: Path) -> dict[str, int]:
    """Violations of the promise (all zero when it is kept), and what was seen besides."""
    starts: list[int] = []
    key_of: dict[str, str] = {}
    sent: dict[str, list[int]] = defaultdict(list)
    answered: dict[str, int] = {}
    accepted: dict[str, str] = {}
    listed: list[set[str]] = []
    lost_decisions = 0
    for at, name, rest in events(acks):
        if name == "start":
            starts.append(at)
            listed.append(set())
        elif name == "again":
            listed[-1].add(rest[0])
        elif name == "sent":
            key_of[rest[0]] = rest[1]
            sent[rest[0]].append(at)
        elif name == "answered":
            answered.setdefault(rest[0], at)
        elif name == "accepted":
            # Said a second time, it must be the same: a decision is taken once.
            lost_decisions += rest[0] in accepted
            accepted[rest[0]] = rest[1]

    asked: dict[str, list[int]] = defaultdict(list)
    paid: dict[str, int] = defaultdict(int)
    for at, name, rest in events(ledger):
        if name == "asked":
            asked[rest[0]].append(at)
        else:
            paid[rest[0]] += 1

    rows = [json.loads(line) for line in export.read_text().split("\n") if line]
    ids = [row["id"] for row in rows]
    exported = {row["id"]: digest(row) for row in rows}
    lost = sum(exported.get(key) != value for key, value in accepted.items())

    paid_again = 0
    for index, at in answered.items():
        paid_again += any(when > at for when in asked[key_of[index]])

    # Requests that the server saw in more than one session: in flight at a crash.
    resent, unlisted, beyond = 0, 0, 0
    index_of = {key: index for index, key in key_of.items()}
    in_flight = [0] * len(starts)
    for index, times in sent.items():
        for at in times:
            session = bisect.bisect_right(starts, at) - 1
            after = starts[session + 1] if session + 1 < len(starts) else None
            if after is not None and answered.get(index, after) >= after:
                in_flight[session] += 1
    again_in = [0] * len(starts)
    for key, times in asked.items():
        sessions = sorted({bisect.bisect_right(starts, at) - 1 for at in times})
        for session in sessions[1:]:
            resent += 1
            again_in[session] += 1
            unlisted += index_of.get(key, "") not in listed[session]
    for session in range(1, len(starts)):
        beyond += max(0, again_in[session] - sum(in_flight[:session]))

    return {
        "lost": lost + lost_decisions,
        "duplicates": len(ids) - len(set(ids)),
        "paid_again": paid_again,
        "resent_unlisted": unlisted,
        "resent_beyond_in_flight": beyond,
        "export_differs": int(export.read_bytes() != uncut.read_bytes()),
        "acknowledged": len(answered) + len(accepted),
        "resent_in_flight": resent,
        "payments": sum(paid.values()),
    }


if __name__ == "__main__":
    print(json.dumps(check(*map(Path, sys.argv[1:5]))))  # noqa: T201
