"""A note of which files are exports of a run.

``exports.json`` in the run's folder keeps the hash of what was exported where. So exporting again
replaces an export without asking, and a file that somebody else wrote, or changed, only on request.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from engine.errors import DiskError, OutputError
from engine.files import replace_file

__all__ = ["CHANGED", "FOREIGN", "exported", "remember", "touched"]

FOREIGN = "exists, and this run did not export it"
CHANGED = "was changed since this run exported it"


def touched(run: Path, path: Path) -> str | None:
    """Why ``path`` should not be replaced unasked; None where it is free or an untouched export."""
    if not os.path.lexists(path):
        return None
    remembered = _remembered(run).get(str(path.absolute()))
    if remembered is None:
        return FOREIGN
    return None if remembered == _fingerprint(path) else CHANGED


def remember(run: Path, path: Path) -> None:
    """Note that ``path`` holds an export of ``run`` as it is now."""
    known = _remembered(run)
    # Where it fails, as in a read-only run, the next export asks for --overwrite.
    with suppress(OutputError, DiskError):
        known[str(path.absolute())] = _fingerprint(path)
        body = orjson.dumps(known, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
        replace_file(run / "exports.json", lambda file: file.write(body))


def exported(run: Path) -> list[Path]:
    """Where exports of ``run`` were written, and still are."""
    return [path for path in map(Path, _remembered(run)) if os.path.lexists(path)]


def _remembered(run: Path) -> dict[str, str]:
    try:
        known: Any = orjson.loads((run / "exports.json").read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return known if isinstance(known, dict) else {}


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
