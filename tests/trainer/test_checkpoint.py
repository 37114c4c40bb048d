"""Checkpoints: what a manifest may list."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from trainer import checkpoint
from trainer.errors import DiskError


def test_a_manifest_waits_for_files_of_other_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that shows late, or half, is waited for; one that never shows is an error that names
    it and what must be shared.
    """
    file = tmp_path / "shard-00002-model-00001-of-00001.safetensors"
    file.write_bytes(b"half")
    late = threading.Timer(0.2, lambda: file.write_bytes(b"the whole file"))
    late.start()
    checkpoint._wait_for(tmp_path, {file.name: 14})
    assert file.stat().st_size == 14
    late.join()
    monkeypatch.setattr(checkpoint, "PATIENCE_S", 0.1)
    with pytest.raises(DiskError, match=f"{file.name}, which another process has written, is not"):
        checkpoint._wait_for(tmp_path, {file.name: 15})
