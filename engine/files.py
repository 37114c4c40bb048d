"""Files and folders that are there whole or not at all, and what they may take the place of.

No command replaces a file that it did not write: ``check_output`` says no to one that exists, and
to a command's own inputs whatever is asked. Exports are known by a note of them
(``engine.export.ledger``) and may be renewed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from engine.errors import DiskError, OutputError

__all__ = [
    "cannot_write",
    "check_output",
    "is_stream",
    "new_file",
    "new_folder",
    "new_output",
    "open_log",
    "replace_file",
    "tail_lines",
]


STREAMS = ("/dev", "/dev/fd", "/proc/self/fd")
"""Where the standard streams have names."""


def check_output(path: Path, *, overwrite: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Raises OutputError where an output may not be written at ``path``.

    Args:
        overwrite: the person asked to replace what is there.
        inputs: files that the command reads, or folders of them. Never replaced, whatever the name,
            link or hard link they are reached by.
    """
    if not os.path.lexists(path) or is_stream(path):
        return
    for given in inputs:
        if _is_within(path, given):
            raise OutputError(f"{path}: is read by this command ({given}); choose another name")
    if not overwrite:
        raise OutputError(f"{path}: exists; replace it with --overwrite, or choose another name")


def is_stream(path: Path) -> bool:
    """Whether what is written to ``path`` goes on to somewhere else: a pipe, a device, a standard
    stream. There is nothing to put a file in the place of.
    """
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except OSError:
        return False
    # A shell may have opened any file as /dev/stdout.
    return kind not in (stat.S_IFREG, stat.S_IFDIR) or str(path.parent) in STREAMS


def _is_within(path: Path, given: Path) -> bool:
    """Whether ``path`` is the file or folder ``given``, or one of the two holds the other."""
    try:
        if path.samefile(given):
            return True
        one, other = path.resolve(), given.resolve()
    except OSError:  # a link to nothing is no input
        return False
    return one in other.parents or other in one.parents


@contextmanager
def open_log(path: Path) -> Iterator[BinaryIO]:
    """``path`` to append to, made with mode 0600. Raises OutputError, for a link in its place too:
    it could lead to any file of the person's.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with _cannot_create(path):
        descriptor = os.open(path, flags, 0o600)
    with os.fdopen(descriptor, "ab") as file:
        yield file


def tail_lines(path: Path, *, after: int = 0, most: int = 1 << 16) -> list[str]:
    """The lines at the end of a log: within its last ``most`` bytes, and what came after a byte.
    None where it cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(after, path.stat().st_size - most))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def write_private(path: Path, text: str) -> None:
    """A file of mode 0600 in the place of ``path``, for a secret. Raises OutputError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with _cannot_create(path):
        path.unlink(missing_ok=True)
        descriptor = os.open(path, flags, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)


def replace_file(path: Path, write: Callable[[BinaryIO], int]) -> int:
    """Let ``write`` fill a new file, and put it in the place of ``path``; what ``write`` returns.

    Raises as ``new_file`` does.
    """
    with new_file(path) as file:
        return write(file)


@contextmanager
def new_file(path: Path, placing: Callable[[Path], None] | None = None) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the context ends, synced; not on an error.

    A link at ``path`` is replaced, and what it points to is left alone.

    Args:
        placing: called with the whole file just before it takes its place.

    Raises:
        OutputError: the folder is missing or not writable, or ``path`` is a folder.
        DiskError: writing failed; an older file at ``path`` is untouched.
    """
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; choose another place")
    with _cannot_create(path):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with cannot_write(path):
            with os.fdopen(descriptor, "wb", buffering=1 << 20) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if placing is not None:
                placing(temporary)
            temporary.chmod(0o644)
            temporary.replace(path)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_output(path: Path, placing: Callable[[Path], None] | None = None) -> Iterator[BinaryIO]:
    """As ``new_file``, for a place that a person names: what is a stream there is written to.

    No file of a run is written so. In a folder from somebody else a pipe could hold it up for ever.
    """
    if not is_stream(path):
        with new_file(path, placing) as file:
            yield file
        return
    with _cannot_create(path):
        stream = path.open("wb", buffering=1 << 20)
    with cannot_write(path), stream:
        yield stream


@contextmanager
def new_folder(path: Path, placing: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """A folder that takes the place of ``path`` when the context ends, synced; not on an error.

    ``placing``, and what is raised, as in ``new_file``.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path}: is a file, where a folder is to be; choose another place")
    with _cannot_create(path):
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with cannot_write(path):
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    Path(folder, name).chmod(0o644)
                    _sync(Path(folder, name))
                Path(folder).chmod(0o755)
                _sync(Path(folder))
            if placing is not None:
                placing(temporary)
            if path.exists():
                _exchange(temporary, path)
            else:
                temporary.rename(path)
            _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders in one step (renameat2, Linux 3.15); in two where the system has no such.

    Raises OSError.
    """
    at_cwd, exchange = -100, 2
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        names = os.fsencode(one), os.fsencode(other)
        if libc.renameat2(at_cwd, names[0], at_cwd, names[1], exchange) == 0:
            return
        error = ctypes.get_errno()
        if error not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(error, os.strerror(error), str(other))
    aside = one.with_name(f"{one.name}.old")
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _cannot_create(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise OutputError(
            f"{path}: cannot be created: {exc.strerror}; choose another place"
        ) from exc


@contextmanager
def cannot_write(path: Path) -> Iterator[None]:
    """Turn what the system raises while ``path`` is written into DiskError."""
    try:
        yield
    except OSError as exc:
        what = exc.strerror or exc
        raise DiskError(f"{path}: cannot be written: {what}; what stood there stands") from exc
