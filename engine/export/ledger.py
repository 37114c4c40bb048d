"""A note of which files are exports of a run.

``exports.json`` in the run's folder keeps the hash of what was exported where. So exporting again
replaces an export without asking, and a file that somebody else wrote, or changed, only on request.
The hash is noted before the file takes its place: a crash in between leaves several, of which the
file has one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.errors import DiskError, OutputError
from engine.files import is_stream, replace_file

__all__ = ["CHANGED", "FOREIGN", "expect", "exported", "remember", "touched"]

FOREIGN = "exists, and this run did not export it"
"""Why a file is not replaced without being asked to."""
CHANGED = "was changed since this run exported it"
"""The same of a file that was ours, and that somebody may have worked on."""


def touched(run: Path, path: Path) -> str | None:
    """Why ``path`` should not be replaced unasked; None where it is free or an untouched export.

    An export is known by its hash wherever it lies, so that a run's folder can be moved.
    """
    if not os.path.lexists(path) or is_stream(path):
        return None
    if path.is_symlink():
        return FOREIGN
    remembered = _remembered(run)
    fingerprint = _fingerprint(path)
    if any(fingerprint in hashes for hashes in remembered.values()):
        return None
    return CHANGED if str(path.absolute()) in remembered else FOREIGN


def expect(run: Path, path: Path, written: Path) -> None:
    """Note that what ``written`` holds is about to take the place of ``path``."""
    _note(run, path, lambda hashes: [*hashes[-3:], _fingerprint(written)])


def remember(run: Path, path: Path) -> None:
    """Note that ``path`` holds an export of ``run`` as it is now, where it holds anything."""
    if is_stream(path):
        return
    _note(run, path, lambda _: [_fingerprint(path)])


def _note(run: Path, path: Path, change: Callable[[list[str]], list[str]]) -> None:
    known = _remembered(run)
    # Where it fails, as in a read-only run, the next export asks for --overwrite.
    with suppress(OutputError, DiskError):
        noted = known | {str(path.absolute()): change(known.get(str(path.absolute()), []))}
        # Not orjson: a file's name may hold bytes that are not UTF-8, which this one escapes.
        body = json.dumps(noted, indent=2, sort_keys=True).encode()
        replace_file(run / "exports.json", lambda file: file.write(body))


def exported(run: Path) -> list[Path]:
    """Where exports of ``run`` were written, and still are."""
    return [path for path in map(Path, _remembered(run)) if os.path.lexists(path)]


def _remembered(run: Path) -> dict[str, list[str]]:
    """Hashes by path: one, or more where an export may not have taken its place."""
    try:
        known: Any = json.loads((run / "exports.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {
        name: [hashes] if isinstance(hashes, str) else [h for h in hashes if isinstance(h, str)]
        for name, hashes in known.items()
        if isinstance(hashes, str | list)
    }


def _fingerprint(path: Path) -> str:
    """SHA-256 of a file, or of a folder's names and files. Raises DiskError."""
    try:
        return _sha256(path)
    except OSError as exc:
        raise DiskError(f"{path}: cannot be read: {exc.strerror}; check the disk") from exc


def _sha256(path: Path) -> str:
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for below in sorted(path.rglob("*")):
        if below.is_file():
            digest.update(os.fsencode(below.relative_to(path)) + b"\0")
            digest.update(_sha256(below).encode())
    return digest.hexdigest()
