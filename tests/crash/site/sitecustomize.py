"""Has snapshots of an index written after few rows, and breaks what ``WOOLMILL_MUTANT`` names in a
process that a broken one starts.
"""

import os

from engine.decide import snapshot

snapshot.EVERY = 20

if mutant := os.environ.get("WOOLMILL_MUTANT"):
    from tests.crash import mutants

    mutants.apply(mutant)
