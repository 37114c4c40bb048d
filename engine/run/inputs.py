"""Input rows by number: read as a stream, in the order of the input, and checked on resume."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import orjson

from engine.datasets import BadRowError, BadRows, Dataset, OnBadRow
from engine.errors import ConfigError
from engine.records import Record
from engine.stages import BELOW
from engine.store import RunReader
from engine.text import as_word

__all__ = ["InputRows", "identity"]

KEPT = 8192
"""Rows that were read last and may be asked for again; earlier ones are read anew."""


STEP, PAUSE_S = 200, 0.02
"""Rows that are counted in one go, some 2 ms, and the pause behind them: a tenth of a core."""


class InputRows:
    """The rows of a file, a folder or another run, whatever their form.

    Rows that cannot be read have no number where they are left out. Raises InputError where the
    input cannot be read, naming path and line.
    """

    def __init__(self, path: Path, on_bad_row: OnBadRow = "stop") -> None:
        self.path = path
        self.bad = BadRows(on_bad_row)
        self._bad_passed = 0
        """Bad rows of this pass over the input."""
        self._rows: Iterator[Record] = iter(())
        self._next = 0
        self._binary: set[str] = set()
        """Columns of bytes that were told of."""
        self._kept: OrderedDict[int, Record] = OrderedDict()
        self.count: int | None = None
        """How many there are; None until the last one has been read."""
        self._restart()

    def _restart(self) -> None:
        self._rows = (self._plain(row.values) for row in Dataset(self.path, skip=self._skip))
        self._next = self._bad_passed = 0

    def _skip(self, wrong: BadRowError) -> None:
        self._bad_passed += 1
        known = self._bad_passed <= self.bad.count
        (self.bad.beforehand if known else self.bad)(wrong)

    def _plain(self, values: dict[str, Any]) -> Record:
        """The row with values that JSON has, as it reads when it comes back from the store. Bytes
        have no place in a prompt or a row.
        """
        if binary := [name for name, value in values.items() if _holds_bytes(value)]:
            for name in binary:
                if name not in self._binary:
                    self._binary.add(name)
                    self.bad.note(
                        f"{self.path}: column {name} holds bytes, and is left out; where it is "
                        "text, store it as text"
                    )
            values = {name: value for name, value in values.items() if name not in binary}
        try:
            return orjson.loads(orjson.dumps(values, default=str))  # type: ignore[no-any-return]
        except TypeError:  # half of a surrogate pair, or an integer of any size
            return json.loads(json.dumps(values, default=str))  # type: ignore[no-any-return]

    def row(self, number: int) -> Record | None:
        """Row ``number`` from 0; None: there are not so many."""
        if (row := self._kept.get(number)) is not None:
            return row
        if self.count is not None and number >= self.count:
            return None
        if number < self._next:
            self._restart()
        for row in self._rows:
            self._kept[self._next] = row
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            self._next += 1
            if self._next > number:
                return row
        self.count = self._next
        return None

    def first(self, most: int) -> Iterator[Record]:
        """The first rows, at most so many."""
        for number in range(most):
            if (row := self.row(number)) is None:
                return
            yield row

    async def counted(self) -> int:
        """How many there are, found out beside the run, in small steps. Raises InputError where the
        input cannot be read to its end.
        """
        count = 0
        for count, _ in enumerate(Dataset(self.path, skip=self.bad.beforehand), 1):
            if count % STEP == 0:
                await anyio.sleep(PAUSE_S)
        return count

    def name_bad_rows(self, say: Callable[[str], object], path: Path) -> None:
        """Say which rows are left out, the first of them, and keep all in a file of JSON Lines,
        anew in each session: what each says, where it stands, and why it is none.
        """
        mode = "w"

        def keep(wrong: BadRowError) -> None:
            nonlocal mode
            named = {"line": wrong.line, "error": str(wrong), "text": wrong.raw}
            with suppress(OSError), path.open(mode) as file:
                file.write(json.dumps(named) + "\n")  # ASCII: whatever the row holds
            mode = "a"

        self.bad.tell(say, keep)

    def check(self, store: RunReader, samples: int) -> None:
        """Compare with what the run asked about earlier. Raises ConfigError naming the first row
        that is another one now.
        """
        for answer, _ in store.all_answers():
            number = answer.index // samples
            row = self.row(number)
            if row != answer.row:
                what = "is not there any more" if row is None else "is another one now"
                asked_anew = ""
                if answer.failed and store.folder.parent.name != BELOW:  # the last stage's alone
                    asked_anew = (
                        ". It failed, and is asked about anew with: woolmill redecide "
                        f"{as_word(store.folder)} --drop-failed, and then the same command"
                    )
                raise ConfigError(
                    f"{self.path}: row {number} (the first is 0), which the run has asked about, "
                    f"{what}; resume with the same rows, or start a new run{asked_anew}"
                )


def identity(path: Path) -> list[int] | None:
    """What tells at a glance that a file is as it was; None where nothing does."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino] if path.is_file() else None


def _holds_bytes(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_bytes, value.values()))
    if isinstance(value, list):
        return any(map(_holds_bytes, value))
    return isinstance(value, bytes)
