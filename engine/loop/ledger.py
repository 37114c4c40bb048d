"""What a loop has come to: ``ledger.jsonl`` in its folder, one line for the start and one a round.

A round that stands here is finished and is never done again. The file is replaced as a whole, so
that it has every line or the one less; nothing in it depends on when, where or how often the loop
was started, so that a loop that was killed ends with the bytes of one that was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import orjson

from engine.errors import ConfigError, InputError
from engine.files import replace_file

__all__ = ["LEDGER", "Ledger", "Round", "Start", "is_loop"]

LEDGER = "ledger.jsonl"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a loop began with."""

    settings: dict[str, Any]
    """Those that may not change."""
    shown: int
    """Seed tasks that may be shown and trained on."""
    held_out: int
    """Seed tasks that are measured by."""
    loss: float
    """Of the first model on those, in nats a token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What a round came to."""

    number: int
    started_from: int
    """The round whose model it trained; 0: the first model."""
    accepted: int
    trained: int
    """Of ``accepted``: rows that were trained on, the others validate."""
    completion_tokens: int
    """Of every answer that the rows were decided from, in all stages."""
    per_1000_tokens: float | None
    """Accepted rows."""
    refused: dict[str, int]
    """Pieces by reason, the most frequent first."""
    distinct_verbs: int | None
    """Root verbs of the accepted rows; None where no parser is installed, or none for them."""
    nearest_rouge_l: float | None
    """Mean over the rows: ROUGE-L F to the most similar text before it."""
    nearest_cosine: float | None
    """Mean over the rows: cosine to the nearest other row. None where none was compared so."""
    loss_before: float
    """The least held-out loss that was kept so far."""
    loss: float
    """Of the round's model on the held-out seeds, in nats a token."""
    own_loss: float | None
    """On the validation part of its own rows; None where there is none."""
    kept: bool
    """Its model is what the next round goes on from."""


class Ledger:
    """The ledger of the loop in ``folder``. Raises InputError where the file is damaged."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER
        self.start: Start | None = None
        self.rounds: list[Round] = []
        if self.path.is_file():
            self._read()

    @property
    def kept(self) -> Round | None:
        """The last round that was kept."""
        return next((each for each in reversed(self.rounds) if each.kept), None)

    @property
    def loss(self) -> float:
        """What a round's loss must not rise above."""
        assert self.start is not None
        return min([self.start.loss, *(each.loss for each in self.rounds if each.kept)])

    def begin(self, start: Start) -> None:
        """Write the first line."""
        self.start = start
        self._write()

    def add(self, done: Round) -> None:
        """Write the line of a round; what follows may rely on it."""
        self.rounds.append(done)
        self._write()

    def refuse_other(self, settings: dict[str, Any]) -> None:
        """Raises ConfigError where the loop began with other ``settings``."""
        assert self.start is not None
        known = self.start.settings
        for name in sorted({*known, *settings}):
            was, now = known.get(name), settings.get(name)
            if was != now and isinstance(was, dict) and isinstance(now, dict):
                table, name = name, min(n for n in {*was, *now} if was.get(n) != now.get(n))
                was, now, name = was.get(name), now.get(name), f"[{table}] {name}"
            if was != now:
                raise ConfigError(
                    f"{self.path.parent}: the loop there began with {name} = {_shown(was)}, not "
                    f"{_shown(now)}; go on with that, or choose another --out"
                )

    def _write(self) -> None:
        assert self.start is not None
        lines = [{"format": FORMAT, **asdict(self.start)}, *map(asdict, self.rounds)]
        text = b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines)
        replace_file(self.path, lambda file: file.write(text))

    def _read(self) -> None:
        try:
            first, *rounds = map(orjson.loads, self.path.read_bytes().splitlines())
            if first.pop("format") != FORMAT:
                raise InputError(f"{self.path}: was written by another version of woolmill")
            self.start = _made(Start, first)
            self.rounds = [_made(Round, each) for each in rounds]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{self.path}: is damaged ({error}); put back a copy, or choose another --out"
            ) from error
        if [each.number for each in self.rounds] != list(range(1, len(self.rounds) + 1)):
            raise InputError(f"{self.path}: is damaged: rounds are missing; choose another --out")


def is_loop(folder: Path) -> bool:
    """Whether ``folder`` is a loop's."""
    return (folder / LEDGER).is_file()


def _made(kind: Any, values: dict[str, Any]) -> Any:
    names: Sequence[str] = [each.name for each in fields(kind)]
    if unknown := values.keys() - set(names):
        raise ValueError(f"unknown field {min(unknown)}")
    return kind(**values)


def _shown(value: Any) -> str:
    return "nothing" if value is None else orjson.dumps(value).decode()
