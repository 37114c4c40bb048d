"""Read seed tasks, and refuse what is wrong with the place where it stands: ``path:line``.

The format is Self-Instruct's, with ``id``, ``name``, ``instruction``, ``instances``,
``is_classification`` (https://github.com/yizhongw/self-instruct); plain Alpaca records
(``instruction``, ``input``, ``output``) are read as well. The file is JSON Lines as a rule, and may
be whatever else ``engine.datasets`` reads: a JSON list, indented or not, CSV, gzip of these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import orjson

from engine.datasets import Dataset
from engine.errors import ConfigError, DiskError, InputError, OutputError
from engine.files import replace_file
from engine.languages import ENGLISH, language_of
from engine.records import SeedTask

__all__ = [
    "KEPT",
    "as_lines",
    "bundled_seeds",
    "fingerprint",
    "keep",
    "kept_seeds",
    "read_seeds",
    "references",
]

KEPT = "seed_tasks.jsonl"
"""In a run's folder: the tasks that it was started with, so that its prompts can be shown later."""

MAX_WHOLE_BYTES = 256 * 2**20
"""Of a JSON document of seed tasks."""
MAX_TASK_CHARACTERS = 4 * 2**20
MAX_TASKS = 1_000_000


BUNDLED = {ENGLISH: "seed_tasks.jsonl", "zh": "seed_tasks.zh.jsonl"}
"""By language."""


def bundled_seeds(language: str = ENGLISH) -> Path:
    """The seed tasks in a language that ship with the package. Raises ConfigError where there are
    none.
    """
    if language not in BUNDLED:
        raise ConfigError(
            f"no seed tasks in {language_of(language).name} ship with this package; name your own "
            "with --seeds"
        )
    return Path(str(resources.files("engine") / "data" / BUNDLED[language]))


def fingerprint(tasks: Iterable[SeedTask]) -> str:
    """SHA-256 over what the tasks say, whatever the file's layout. 64 hex digits."""
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(orjson.dumps([task.id, task.instruction, task.input, task.output]) + b"\n")
    return digest.hexdigest()


def references(tasks: Iterable[SeedTask]) -> Iterator[tuple[str, str]]:
    """The tasks' instructions, as a recipe's ``references`` names them."""
    for task in tasks:
        yield task.instruction, f"seed:{task.id}"


def keep(tasks: Iterable[SeedTask], folder: Path) -> None:
    """Write the tasks, if there are any, to ``KEPT`` in a run's folder, unless they stand there.

    A link in its place is replaced, and what it leads to is left alone. Where it cannot be written
    nothing is raised: prompts are then not shown, and the next session tries again.
    """
    text = as_lines(tasks)
    if not text:
        return
    path = folder / KEPT
    with suppress(OSError, OutputError, DiskError):
        if path.is_symlink() or not path.is_file() or path.read_bytes() != text:
            replace_file(path, lambda file: file.write(text))


def as_lines(tasks: Iterable[SeedTask]) -> bytes:
    """The tasks as ``read_seeds`` reads them."""
    return b"".join(
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


def kept_seeds(folder: Path, wanted: object, given: Path | None = None) -> list[SeedTask]:
    """The seed tasks of a run: those given, those that its folder keeps, or the bundled ones.

    Args:
        wanted: their fingerprint, as the run's manifest has it.

    Raises InputError where ``given`` cannot be read. Returns none where no fingerprint fits.
    """
    for path in [given] if given is not None else [folder / KEPT, *map(bundled_seeds, BUNDLED)]:
        try:
            tasks = read_seeds(path)
        except InputError:
            if path == given:
                raise
            continue
        if fingerprint(tasks) == wanted:
            return tasks
    return []


def read_seeds(path: Path, *, at_least: int = 1) -> list[SeedTask]:
    """All tasks of a file, in its order.

    Args:
        at_least: how many tasks the recipe needs.

    Raises:
        InputError: unreadable file, bad line, doubled id, or too few tasks.
    """
    if not path.exists():
        raise InputError(f"{path}: cannot be read: there is no such file; see --seeds")
    tasks: list[SeedTask] = []
    line_of_id: dict[str, int] = {}
    for row in Dataset(path, max_whole_bytes=MAX_WHOLE_BYTES):
        task = _task(row.values, row.line, path)
        if task.id in line_of_id:
            raise InputError(
                f"{path}:{row.line}: id {task.id!r} stands already at line {line_of_id[task.id]};"
                " give each task its own id"
            )
        line_of_id[task.id] = row.line
        tasks.append(task)
        if len(tasks) > MAX_TASKS:
            raise InputError(f"{path}:{row.line}: more than {MAX_TASKS:,} seed tasks")
    if len(tasks) < at_least:
        raise InputError(f"{path}: holds {len(tasks)} seed tasks, at least {at_least} are needed")
    return tasks


def _task(fields: dict[str, Any], number: int, path: Path) -> SeedTask:
    def text(where: dict[str, Any], name: str, default: str | None = None) -> str:
        value = where.get(name, default)
        if value is None:
            raise InputError(f"{path}:{number}: field {name!r} is missing")
        if not isinstance(value, str):
            raise InputError(f"{path}:{number}: field {name!r} is {type(value).__name__}, not text")
        if len(value) > MAX_TASK_CHARACTERS:
            raise InputError(f"{path}:{number}: field {name!r} is longer than 4 MiB")
        try:
            value.encode()
        except UnicodeEncodeError as exc:
            raise InputError(
                f"{path}:{number}: field {name!r} holds half a surrogate pair at {exc.start}"
            ) from exc
        return value

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
