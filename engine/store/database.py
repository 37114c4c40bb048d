"""Open the database file of a run, and tell what is wrong with one that cannot be used.

Memory mapping stays off: a failed read of a mapped page would kill the process instead of raising.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from engine.errors import ConfigError, DiskError, InputError
from engine.store.manifest import Manifest
from engine.store.schema import APPLICATION_ID, FORMAT, PAGE_SIZE, Checksum, damaged, decode, encode

__all__ = [
    "check_header",
    "connect",
    "disk_errors",
    "mend_header",
    "meta",
    "put_meta",
    "read_manifest",
    "read_run_id",
    "sync_folder",
]


def connect(path: Path, *, write: bool, wreck: bool = False) -> sqlite3.Connection:
    """A connection without implicit transactions, that returns text as bytes.

    ``wreck``: a table that is gone is refused when it is read, and the others can be.
    """
    mode = "rwc" if write else "ro"
    if not write and not os.access(path.parent, os.W_OK) and not Path(f"{path}-wal").exists():
        mode += "&immutable=1"  # on a read-only disk SQLite cannot make its shared memory
    connection = sqlite3.connect(
        f"file:{quote(os.fsencode(path.absolute()))}?mode={mode}",
        uri=True,
        timeout=30.0,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=64,
    )
    # Damaged text must reach the checksum as it is, not fail to decode first.
    connection.text_factory = bytes
    if wreck:  # first: what follows reads the schema
        connection.execute("PRAGMA writable_schema = ON")
    connection.execute("PRAGMA mmap_size = 0")
    if write:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA wal_autocheckpoint = 2000")  # pages of 8 KiB: 16 MiB
        connection.execute("PRAGMA journal_size_limit = 33554432")
    return connection


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite or the system raises into an error of ours."""
    try:
        yield
    except OSError as exc:
        raise DiskError(f"{path}: {exc.strerror}; check the disk, then resume the run") from exc
    except (sqlite3.Error, UnicodeDecodeError) as exc:
        raise from_sqlite(exc, path) from exc


def from_sqlite(exc: sqlite3.Error | UnicodeDecodeError, path: Path) -> InputError | DiskError:
    """InputError (65) for a damaged or foreign file, DiskError (74) for what the disk refused.

    A UnicodeDecodeError is SQLite's own message quoting damaged text.
    """
    said = "".join(char if char.isprintable() else " " for char in str(exc))
    code = getattr(exc, "sqlite_errorcode", None)
    if code is not None and code & 0xFF in _DISK:
        return DiskError(f"{path}: {said}; check the disk, then resume the run")
    return InputError(
        f"{path}: not a whole run store ({said}); see: woolmill verify, woolmill salvage"
    )


_DISK = {
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_BUSY,
}
"""SQLite's codes for what the disk or another process refuses."""


def check_header(connection: sqlite3.Connection, path: Path) -> None:
    """Raises InputError for what is not a run store, ConfigError for one of a later format."""
    application_id = connection.execute("PRAGMA application_id").fetchone()[0]
    if application_id != APPLICATION_ID:
        raise InputError(f"{path}: is not a run store of Woolmill; choose another folder")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > FORMAT:
        raise ConfigError(
            f"{path}: has format {version}, this Woolmill reads up to format {FORMAT}; "
            "upgrade Woolmill"
        )


def read_run_id(connection: sqlite3.Connection, path: Path) -> str:
    """The run's id, which is the key of all checksums, its own included."""
    row = connection.execute("SELECT body, sum FROM meta WHERE name = 'run'").fetchone()
    if row is None:
        raise damaged("meta", "run", path)
    try:
        run_id = str(decode(row[0])["run_id"])
        intact = Checksum(run_id).holds("meta", (b"run",), *row)
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise damaged("meta", "run", path)
    return run_id


def meta(connection: sqlite3.Connection, checksum: Checksum, name: str, path: Path) -> bytes:
    """The checked body of one row of ``meta``."""
    row = connection.execute("SELECT body, sum FROM meta WHERE name = ?", (name,)).fetchone()
    if row is None or not checksum.holds("meta", (name.encode(),), *row):
        raise damaged("meta", name, path)
    body: bytes = row[0]
    return body


def put_meta(connection: sqlite3.Connection, checksum: Checksum, name: str, value: object) -> None:
    """Write one row of ``meta``."""
    body = encode(value)
    connection.execute(
        "INSERT OR REPLACE INTO meta VALUES (?, CAST(? AS TEXT), ?)",
        (name, body, checksum("meta", name.encode(), body)),
    )


def read_manifest(connection: sqlite3.Connection, checksum: Checksum, path: Path) -> Manifest:
    parts = {
        name: decode(meta(connection, checksum, name, path))
        for name in ("fixed", "decision", "free")
    }
    if connection.execute("SELECT 1 FROM meta WHERE name = 'learnt'").fetchone():
        parts["learnt"] = decode(meta(connection, checksum, "learnt", path))
    run = decode(meta(connection, checksum, "run", path))
    return Manifest(**parts, engine_version=run["engine_version"])


def mend_header(path: Path) -> None:
    """Write anew what follows from the file or never differs in the database's first 100 bytes, so
    that a wreck can be opened.

    https://www.sqlite.org/fileformat.html#the_database_header
    """
    pages = -(-path.stat().st_size // PAGE_SIZE)
    with path.open("r+b") as file:
        file.write(
            b"SQLite format 3\0" + PAGE_SIZE.to_bytes(2, "big") + bytes((2, 2, 0, 64, 32, 32))
        )
        # A file that is shorter than the header says is refused as a whole; one that is cut in a
        # page has that page, and what is missing reads as zeros.
        file.seek(28)
        file.write(pages.to_bytes(4, "big"))
        file.seek(44)
        file.write((4).to_bytes(4, "big"))  # schema format
        file.seek(56)
        file.write((1).to_bytes(4, "big") + FORMAT.to_bytes(4, "big"))  # UTF-8, user_version
        file.seek(68)
        file.write(APPLICATION_ID.to_bytes(4, "big"))


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
