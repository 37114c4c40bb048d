"""Vectors on their way into the store: there from the moment they came, and held no longer than
needed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.decide.embedded import StoredVectors
from engine.errors import InputError
from engine.store import Manifest, RunReader, RunStore

pytestmark = pytest.mark.anyio
VECTORS = {bytes([n]) * 16: np.arange(n, n + 8).astype(np.float16) for n in range(5)}


async def test_a_vector_is_there_before_and_after_its_commit(tmp_path: Path) -> None:
    run = RunStore.open(tmp_path / "run", Manifest(fixed={}))
    reader = RunReader(tmp_path / "run", snapshot=False)
    vectors = StoredVectors(reader)
    vectors.put(VECTORS)
    vectors.put({next(iter(VECTORS)): np.ones(8, np.float16)})  # the first one stays
    rows = run.rows_of((), (), vectors.handed_over(3))
    assert len(rows.embeddings) == 3
    assert vectors.get(list(VECTORS)).keys() == VECTORS.keys()
    await run.decided_rows(rows)
    await run.decided_rows(run.rows_of((), (), vectors.handed_over(3)))
    assert vectors.handed_over(3) == []
    assert not vectors._held
    found = vectors.get(list(VECTORS))
    assert all((found[key] == vector).all() for key, vector in VECTORS.items())
    assert run.counts().embeddings == 5
    assert dict(run.all_embeddings()) == {k: v.tobytes() for k, v in VECTORS.items()}
    reader.close()
    await run.aclose()


async def test_a_damaged_vector_is_never_used(tmp_path: Path) -> None:
    run = RunStore.open(tmp_path / "run", Manifest(fixed={}))
    key = next(iter(VECTORS))
    await run.decided_rows(run.rows_of((), (), [(key, b"1234")]))
    run._writing.execute("UPDATE embedding SET body = ?", (b"1235",))
    with pytest.raises(InputError, match="table embedding fails its checksum"):
        run.embeddings([key])
    await run.aclose()
