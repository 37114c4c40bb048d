"""Read records from whatever files they came in: the trainer's one door for data.

The file is the interface to the engine, or to any other tool: nothing is imported from there.
``trainer/files.py`` turns files into rows, ``trainer/formats.py`` turns rows into records. A row
that is no record is an error that names it, or is skipped by name where the person asked for that:
silently training on fewer records than were given is worse than stopping.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError, DataError
from trainer.examples import Conversation, Example, Instruction, Message, Role, Text
from trainer.files import digest, find_files, rows_of
from trainer.formats import Rules, examples_of

__all__ = [
    "BadRow",
    "Conversation",
    "Example",
    "Instruction",
    "Message",
    "Records",
    "Role",
    "Rules",
    "Text",
    "read_examples",
]

FORMAT = 1
"""Part of the cache's key; counts changes of the readers that change records."""

Source = str | Path | Sequence[str | Path]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is no record, where the person wants such rows skipped."""

    name: str
    why: str


class Records:
    """The records of files, folders, patterns or hub datasets: iterated as often as wanted, each
    time read anew, so that no more than a batch of them need be in memory.

    Args:
        source: one or several of them.
        rules: what the person said about their columns and bad rows.

    Raises:
        ConfigError: there is no such file.
        UnavailableError: a dataset of the hub, which cannot be reached.
    """

    def __init__(self, source: Source, rules: Rules | None = None) -> None:
        sources = [source] if isinstance(source, str | Path) else list(source)
        self.notes: list[str] = []
        """What lies beside the files and is not read, a line each."""
        self.title = ", ".join(map(str, sources))
        self._rules = rules or Rules()
        self._files = [file for one in sources for file in find_files(one, self.notes)]

    def __iter__(self) -> Iterator[Example | BadRow]:
        """All records, in order.

        Raises:
            ConfigError: a file of an unknown kind, or a renamed column that no row has.
            DataError: a row that is no record, or a file that is damaged. Names it.
        """
        unseen = set(self._rules.columns)
        names = Counter(file.name for file in self._files)
        for file in self._files:
            folder = f"{file.parent}/" if names[file.name] > 1 else ""
            for name, row in rows_of(file):
                if unseen:
                    unseen -= set(_names(row))
                yield from self._examples(f"{folder}{name}", row)
        if unseen:
            raise ConfigError(
                f"{self.title}: no row has the column {min(unseen)!r}; check --column_mapping"
            )

    def digest(self) -> str:
        """SHA-256 of everything that the records follow from."""
        facts = [FORMAT, asdict(self._rules), [(f.name, digest(f).hex()) for f in self._files]]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _examples(self, name: str, row: object) -> Iterator[Example | BadRow]:
        try:
            if isinstance(row, DataError):
                raise row
            # All records of the row or none: half a seed task would be a silent loss.
            yield from list(examples_of(name, row, self._rules))
        except DataError as exc:
            if self._rules.on_bad_row == "refuse":
                raise
            yield BadRow(name, str(exc))


def _names(row: Any) -> Iterator[str]:
    """The columns of a row, and those of the objects in its lists: turns have columns too."""
    for item in row.items() if isinstance(row, dict) else [("", row)]:
        yield item[0]
        if isinstance(item[1], list):
            for inner in item[1]:
                yield from inner if isinstance(inner, dict) else ()


def read_examples(source: Source, rules: Rules | None = None) -> list[Example]:
    """All records of ``source`` at once, in order, without bad rows that ``rules`` skip.

    Raises:
        ConfigError, DataError, UnavailableError: as :class:`Records`; DataError too when there are
            none.
    """
    examples = [row for row in Records(source, rules) if not isinstance(row, BadRow)]
    if not examples:
        raise DataError(f"{source}: holds no records")
    return examples
