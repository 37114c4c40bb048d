"""Read seed tasks, and refuse what is wrong with the place where it stands: ``path:line:column``.

The format is Self-Instruct's, JSON Lines with ``id``, ``name``, ``instruction``, ``instances``,
``is_classification`` (https://github.com/yizhongw/self-instruct); plain Alpaca records
(``instruction``, ``input``, ``output``) are read as well. A byte order mark and CRLF line ends are
harmless and accepted. A file is somebody's input: it is read in bounded pieces.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import orjson

from engine.errors import InputError
from engine.records import SeedTask

__all__ = ["KEPT", "bundled_seeds", "fingerprint", "keep", "read_seeds"]

KEPT = "seed_tasks.jsonl"
"""In a run's folder: the tasks that it was started with, so that its prompts can be shown later."""

MAX_LINE_BYTES = 4 * 2**20
MAX_TASKS = 1_000_000


def bundled_seeds() -> Path:
    """The seed tasks that ship with the package."""
    return Path(str(resources.files("engine") / "data" / "seed_tasks.jsonl"))


def fingerprint(tasks: Iterable[SeedTask]) -> str:
    """SHA-256 over what the tasks say, whatever the file's layout. 64 hex digits."""
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(orjson.dumps([task.id, task.instruction, task.input, task.output]) + b"\n")
    return digest.hexdigest()


def keep(tasks: Iterable[SeedTask], folder: Path) -> None:
    """Write the tasks to ``KEPT`` in a run's folder, unless they stand there. Raises OSError.

    Nothing but the page depends on it, and that looks at the fingerprint, so a half-written file
    does no harm; the next session mends it.
    """
    text = b"".join(
        orjson.dumps(
            {
                "id": task.id,
                "name": task.name,
                "instruction": task.instruction,
                "instances": [{"input": task.input, "output": task.output}],
                "is_classification": task.is_classification,
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )
        for task in tasks
    )
    path = folder / KEPT
    if not path.exists() or path.read_bytes() != text:
        path.write_bytes(text)


def read_seeds(path: Path, *, at_least: int = 1, skip_bad: bool = False) -> list[SeedTask]:
    """All tasks of a file, in its order.

    Args:
        path: a regular JSON Lines file.
        at_least: how many tasks the recipe needs.
        skip_bad: leave bad lines out instead of stopping at the first one.

    Raises:
        InputError: unreadable file, bad line, doubled id, or too few tasks.
    """
    tasks: list[SeedTask] = []
    line_of_id: dict[str, int] = {}
    for number, line in _lines(path):
        try:
            task = _task(line, number, path)
            if task.id in line_of_id:
                raise InputError(
                    f"{path}:{number}: id {task.id!r} stands already at line {line_of_id[task.id]};"
                    " give each task its own id"
                )
        except InputError:
            if skip_bad:
                continue
            raise
        line_of_id[task.id] = number
        tasks.append(task)
        if len(tasks) > MAX_TASKS:
            raise InputError(f"{path}:{number}: more than {MAX_TASKS:,} seed tasks")
    if len(tasks) < at_least:
        raise InputError(f"{path}: holds {len(tasks)} seed tasks, at least {at_least} are needed")
    return tasks


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without their ends; blank ones are left out."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path}: not a regular file; give a JSON Lines file of seed tasks")
        with path.open("rb") as file:
            if file.read(3) != b"\xef\xbb\xbf":
                file.seek(0)
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise InputError(f"{path}:{number}: the line is longer than 4 MiB")
                if number == 1 and line.startswith(
                    (b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd")
                ):
                    raise InputError(f"{path}: is compressed; unpack it first")
                if stripped := line.rstrip(b"\r\n"):
                    if stripped.strip():
                        yield number, stripped
    except OSError as exc:
        raise InputError(f"{path}: cannot be read: {exc.strerror}; check --seeds") from exc


def _task(line: bytes, number: int, path: Path) -> SeedTask:
    try:
        fields: Any = orjson.loads(line)
    except orjson.JSONDecodeError as exc:
        raise InputError(f"{path}:{number}:{exc.colno}: not JSON: {exc.msg}") from exc

    def text(where: dict[str, Any], name: str, default: str | None = None) -> str:
        value = where.get(name, default)
        if value is None:
            raise InputError(f"{path}:{number}: field {name!r} is missing")
        if not isinstance(value, str):
            raise InputError(f"{path}:{number}: field {name!r} is {type(value).__name__}, not text")
        return value

    if not isinstance(fields, dict):
        raise InputError(f"{path}:{number}: is {type(fields).__name__}, not a JSON object")
    instruction = text(fields, "instruction")
    if not instruction.strip():
        raise InputError(f"{path}:{number}: field 'instruction' is empty")
    instances = fields.get("instances", [fields])
    if not isinstance(instances, list) or not instances or not isinstance(instances[0], dict):
        raise InputError(f"{path}:{number}: field 'instances' must be a list of objects, not empty")
    identity = fields.get("id", f"line_{number}")
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise InputError(f"{path}:{number}: field 'id' is {type(identity).__name__}, not text")
    return SeedTask(
        id=str(identity),
        name=text(fields, "name", ""),
        instruction=instruction,
        input=text(instances[0], "input", ""),
        output=text(instances[0], "output"),
        is_classification=fields.get("is_classification") is True,
    )
