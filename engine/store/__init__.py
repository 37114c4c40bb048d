"""The run store: one SQLite database per run, the only source of truth.

rows ─▶ database ─▶ reader ─▶ run (RunStore)
            writer, lock ────────┘
"""

from engine.store.manifest import Manifest
from engine.store.reader import InFlight, Resume, RunReader, Session
from engine.store.rows import Counts, Vector
from engine.store.run import RunStore

__all__ = [
    "Counts",
    "InFlight",
    "Manifest",
    "Resume",
    "RunReader",
    "RunStore",
    "Session",
    "Vector",
]
