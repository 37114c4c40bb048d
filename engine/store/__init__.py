"""The run store: one SQLite database per run, the only source of truth.

rows, manifest ─▶ database ─▶ reader (RunReader) ─▶ run (RunStore)
lock, space, batches ─▶ inserts ─▶ writer ────────────┘
                              scan ─▶ engine.upkeep.verify, engine.upkeep.salvage
"""

from engine.store.batches import AWAITED, BatchRow, runs_of
from engine.store.manifest import Manifest
from engine.store.reader import InFlight, Resume, RunReader, Session
from engine.store.run import SNAPSHOT, RunStore
from engine.store.schema import Counts, DecisionRows, Vector, decode, encode

__all__ = [
    "AWAITED",
    "SNAPSHOT",
    "BatchRow",
    "Counts",
    "DecisionRows",
    "InFlight",
    "Manifest",
    "Resume",
    "RunReader",
    "RunStore",
    "Session",
    "Vector",
    "decode",
    "encode",
    "runs_of",
]
