"""What the page shows of a run: its counts, its rows found by words, one row with all it came from.

Words are looked up in a full-text index (SQLite's FTS5) that is made from the store when the page
starts, lies in a temporary file, and takes in what was decided since at every question. The store
itself is opened anew for each question and never held, so the run that writes it is not hindered.
"""

from __future__ import annotations

import json
import re
import sqlite3
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, InputError
from engine.languages import spread
from engine.money import Prices
from engine.prompts.fit import join
from engine.recipes.base import Ask, Recipe
from engine.recipes.guard import RecipeFault, parts_of
from engine.recipes.load import ALPACA
from engine.records import Answer, Decision, Record
from engine.report.figures import figures
from engine.report.shape import Shape, beginning
from engine.stages import parent_of
from engine.store import RunReader
from engine.store.lock import is_held
from engine.thoughts import thoughts_apart

__all__ = ["NEWEST", "PAGE", "Rows"]

PAGE = 50
COUNTED = 10_000
"""Matches are counted up to here."""
MAX_WORDS = 20
NEWEST = 2**62
NUMBERED = re.compile(r"(\d{1,15})\.(\d{1,9})")
SHORT = 400
"""Characters of a text in a list."""
ONE_LINE = 80
"""Characters of JSON that stand on one line."""
LIMITS_SHOWN = 50
"""Of the latest changes of how many requests may be in flight."""
FEW = 6
"""Fields of a row in a list besides its text: what names it, numbers, lists and objects."""

_SCHEMA = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE row (id INTEGER PRIMARY KEY, request INTEGER, position INTEGER, reason TEXT);
CREATE INDEX row_by_reason ON row (reason, id);
CREATE VIRTUAL TABLE text USING fts5 (fields, detail, content = '');
"""


class Rows:
    """Answers questions about the run in ``folder``; methods may be called from any thread.

    Args:
        recipe: the run's, where it is known, to show what a prompt was.
        name: of the stage; empty where the run has one.
        before: the stage whose rows this one's requests are about.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe | None,
        *,
        name: str = "",
        before: Rows | None = None,
    ) -> None:
        self.folder = folder
        self.name = name
        self._before = before
        self._recipe = recipe
        self._lock = threading.Lock()
        with RunReader(folder) as run:
            alpaca = run.manifest.fixed.get("recipe", ALPACA) == ALPACA
            self._samples = int(run.manifest.fixed.get("samples") or 1)
            self._names = {"id", *run.manifest.decision.get("carry", ())}
            """Fields that tell which row it is, though they hold text."""
        self._shape = Shape(recipe=recipe, alpaca=alpaca)
        self._last = (-1, -1)
        self._decided_by: Mapping[str, Any] = {}
        """The settings that the decisions in the index follow from."""
        self._temporary = tempfile.TemporaryDirectory(prefix="woolmill-view-")
        path = Path(self._temporary.name) / "index.sqlite"
        self._index = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._index.executescript(_SCHEMA)
        self._take_in()

    def close(self) -> None:
        self._index.close()
        self._temporary.cleanup()

    def state(self) -> dict[str, Any]:
        """The run's figures as of its last commit."""
        with RunReader(self.folder) as run:
            told = figures(run, exact=False)
            counts, size = run.counts(), run.size()
            decided = counts.last_decided[0] + 1 if counts.last_decided else 0
            return {
                **told,
                "stage": self.name,
                "target": run.manifest.free.get("target"),
                # Of a run over all its input rows, as [decided, all], once they are counted.
                "input_rows": size and [decided // self._samples, size // self._samples],
                "last_at_s": counts.last_at_s,
                "limits": run.limits()[-LIMITS_SHOWN:],
                "running": is_held(self.folder / "run.lock"),
                # Another text where rows came, or were decided again.
                "decided_as": f"{told['pieces']} {told['rejected']} {run.manifest.decision}",
            }

    def cost(self) -> float | None:
        """Of this stage, as of its last commit; None where no price is known."""
        with RunReader(self.folder) as run:
            return Prices.of(run.manifest.free).cost_if_known(run.counts())

    def find(
        self, words: str, *, status: str = "all", reason: str = "", before: int = NEWEST
    ) -> dict[str, Any]:
        """A page of the decisions that hold all ``words``, the latest in plan order first.

        Args:
            words: each is a whole word, the last one may be the beginning of one; empty: all rows.
                A row's own number, as ``12.0``, finds that row.
            status: ``accepted``, ``refused`` or ``all``.
            reason: refused for this only.
            before: the ``next`` of the page before.
        """
        self._take_in()
        with self._lock:
            source, condition, values = self._sought(words, status, reason)
            found = self._index.execute(
                f"SELECT id, request, position FROM {source} WHERE {condition} AND id < ?"
                f" ORDER BY id DESC LIMIT {PAGE + 1}",
                [*values, before],
            ).fetchall()
            matches = self._count(source, condition, values)
        with RunReader(self.folder) as run:
            decisions = [_decision(run, request, position) for _, request, position in found[:PAGE]]
            briefs = [self._brief(run, decision) for decision in decisions]
        return {
            "rows": briefs,
            "matches": matches,
            "next": found[PAGE - 1][0] if len(found) > PAGE else None,
        }

    def matches(self, words: str, *, status: str = "all") -> int:
        """How many decisions hold all ``words``, up to one more than ``COUNTED``."""
        self._take_in()
        with self._lock:
            return self._count(*self._sought(words, status))

    def _sought(self, words: str, status: str, reason: str = "") -> tuple[str, str, list[Any]]:
        """A question for the index: what it is asked of, its condition, and the values in that."""
        parts: list[str] = []
        values: list[Any] = []
        source = "row"
        if number := self._number(words):
            parts.append("request = ? AND position = ?")
            values += number
        elif (match := _match(words)) is not None:
            parts.append("text MATCH ?")
            values.append(match)
            # CROSS: the words first, or SQLite tries them on one row after the other.
            source = "text CROSS JOIN row ON row.id = text.rowid"
        elif words.strip():
            parts.append("FALSE")
        where = {"accepted": "reason IS NULL", "refused": "reason IS NOT NULL"}.get(status)
        if where:
            parts.append(where)
        if reason:
            parts.append("reason = ?")
            values.append(reason)
        return source, " AND ".join(parts) or "TRUE", values

    def _count(self, source: str, condition: str, values: Sequence[Any]) -> int:
        found = self._index.execute(
            f"SELECT count(*) FROM (SELECT 1 FROM {source} WHERE {condition} LIMIT {COUNTED + 1})",
            values,
        )
        return int(found.fetchone()[0])

    def _number(self, words: str) -> list[Any]:
        """The request and position that words name, where there is such a row."""
        if (named := NUMBERED.fullmatch(words.strip())) is None:
            return []
        place = [int(named[1]), int(named[2])]
        found = self._index.execute(
            "SELECT 1 FROM row WHERE request = ? AND position = ?", place
        ).fetchone()
        return place if found else []

    def _brief(self, run: RunReader, decision: Decision) -> dict[str, Any]:
        alpaca = self._shape.alpaca
        record, nearest = decision.record, decision.nearest
        text = self._shape.told_by(record)
        named = record if record is not None else self._named(_input_of(run, decision))
        others = [
            [name, _json(value)[:SHORT]]
            for name, value in named.items()
            if name != "messages"  # they say the same again
            and (not isinstance(value, str) or name in self._names)
        ]
        return {
            "id": f"{decision.index}.{decision.position}",
            "reason": decision.reason,
            "detail": decision.detail[:SHORT],
            "text": text[:SHORT] if record else None,
            "begins": None
            if record
            else beginning(run, decision, alpaca=alpaca, most=SHORT) or None,
            "others": others[:FEW],
            "score": nearest.score if nearest else None,
        }

    def _named(self, row: Record | None) -> Record:
        """Of an input row, what tells which it is."""
        return {name: value for name, value in (row or {}).items() if name in self._names}

    def row(self, request: int, position: int) -> dict[str, Any]:
        """One decision and all that led to it. Raises InputError where there is none."""
        with RunReader(self.folder) as run:
            decision = _decision(run, request, position)
            answers = run.answers(request, 1)
            settings = run.manifest.fixed
            why = _why(decision, run.manifest.decision)
        answer = answers[0] if answers else None
        nearest = decision.nearest
        told: dict[str, Any] = {
            "id": f"{request}.{position}",
            "stage": self.name,
            "reason": decision.reason,
            "detail": why,
            "fields": _fields(decision.record),
            "nearest": nearest
            and {"text": nearest.text, "score": nearest.score, "source": nearest.source},
            "most_similar": [[text, score] for text, score in decision.most_similar.items()],
            "mean_similarity": decision.mean_similarity,
        }
        if answer is None:
            return told
        return told | self._provenance(answer, settings) | self._made_of(answer)

    def _made_of(self, answer: Answer) -> dict[str, Any]:
        """The row of the stage before that the answer is about, with what that was made of."""
        if self._before is None:
            return {"parent": None}
        rank = answer.index // self._samples
        with RunReader(self._before.folder) as run:
            try:
                decision = parent_of(run, rank, answer.row)
            except ConfigError as error:
                return {"parent": {"stage": self._before.name, "missing": str(error)}}
        return {"parent": self._before.row(decision.index, decision.position)}

    def _provenance(self, answer: Answer, settings: Mapping[str, Any]) -> dict[str, Any]:
        completion = answer.completion
        return {
            "answer": completion.text if completion else None,
            "reasoning": thoughts_apart(completion).reasoning if completion else "",
            "failure": answer.failure,
            "message": answer.message,
            "finish_reason": completion.finish_reason if completion else None,
            "model": completion.model if completion else settings.get("model"),
            "prompt_tokens": completion.usage.prompt_tokens if completion else None,
            "completion_tokens": completion.usage.completion_tokens if completion else None,
            "latency_s": completion.latency_s if completion else None,
            "attempts": answer.attempts,
            "backend": answer.backend,
            "truncated": answer.truncated,
            "demonstrations": list(answer.demonstrations),
            "input": _fields(answer.row),
            "place": self._place(answer),
            "prompt": None if answer.truncated else self._prompt(answer, settings),
        }

    def _place(self, answer: Answer) -> str | None:
        """Which input row was asked about, and which of its samples; from 0, as in exports."""
        if answer.row is None:
            return None
        number, sample = divmod(answer.index, self._samples)
        which = f", sample {sample} of 0 to {self._samples - 1}" if self._samples > 1 else ""
        return f"input row {number}{which}"

    def _prompt(self, answer: Answer, settings: Mapping[str, Any]) -> str | None:
        """The store keeps what a prompt was made of; the prompt follows from it."""
        if self._recipe is None:
            return None
        ask = Ask(
            index=answer.index,
            seed=int(settings.get("seed", 0)),
            row=answer.row,
            sample=answer.index % self._samples,
        )
        try:
            parts = parts_of(self._recipe, ask)
        except RecipeFault:
            return None
        if answer.demonstrations != tuple(part.source for part in parts if part.source):
            return None
        text, messages = join(parts)
        return text or "\n\n".join(f"{turn.role}: {turn.content}" for turn in messages)

    def _take_in(self) -> None:
        """Index what was decided since the last question; all of it where it was decided again."""
        with self._lock, RunReader(self.folder) as run:
            self._index.execute("BEGIN")
            last = run.counts().last_decided or (-1, -1)
            if last < self._last or run.manifest.decision != self._decided_by:
                self._index.execute("DELETE FROM row")
                self._index.execute("INSERT INTO text (text) VALUES ('delete-all')")
                self._last = (-1, -1)
                self._decided_by = run.manifest.decision
            for decision in run.decisions(after=self._last):
                # What gave no row is found by the words of what was asked about.
                record = decision.record or _input_of(run, decision)
                cursor = self._index.execute(
                    "INSERT INTO row (request, position, reason) VALUES (?, ?, ?)",
                    (decision.index, decision.position, decision.reason),
                )
                self._index.execute(
                    "INSERT INTO text (rowid, fields, detail) VALUES (?, ?, ?)",
                    (
                        cursor.lastrowid,
                        _searchable("\n".join(_texts(record))),
                        _searchable(decision.detail),
                    ),
                )
                self._last = (decision.index, decision.position)
            self._index.execute("COMMIT")


def _why(decision: Decision, settings: Mapping[str, Any]) -> str:
    """Why a piece was refused, in words: a recipe's own, or by how much it is like another."""
    measured = {
        "duplicate_rouge": ("ROUGE-L", "rouge_threshold"),
        "duplicate_semantic": ("cosine", "semantic_threshold"),
    }.get(decision.reason or "")
    if measured is None or decision.nearest is None:
        return decision.detail
    name, threshold = measured
    return f"{name} {decision.nearest.score:.3f}, above {settings.get(threshold)}"


def _input_of(run: RunReader, decision: Decision) -> Record | None:
    """The input row that a decision is about, where the run has some."""
    answers = run.answers(decision.index, 1)
    return answers[0].row if answers else None


def _decision(run: RunReader, request: int, position: int) -> Decision:
    decision = run.decision(request, position)
    if decision is None:
        raise InputError(f"no row {request}.{position}")
    return decision


def _fields(record: Record | None) -> list[list[str]] | None:
    """Each field's name and value, as a person reads it: text, or indented JSON."""
    if record is None:
        return None
    return [
        [name, value if isinstance(value, str) else _json(value)] for name, value in record.items()
    ]


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | dict) and len(text) > ONE_LINE:
        return json.dumps(value, ensure_ascii=False, indent=2)
    return text


def _texts(value: Any) -> Iterator[str]:
    """All that can be looked for in a value: its texts and numbers, however deep."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif value is not None:
        yield value if isinstance(value, str) else json.dumps(value)


def _match(words: str) -> str | None:
    """An FTS5 expression for rows with all words; what was typed is never syntax."""
    found = re.findall(r"\w+", words)[:MAX_WORDS]
    if not found:
        return None
    quoted = [f'"{spread(word).strip()}"' for word in found]
    return " ".join(quoted) + ("" if words[-1:].isspace() else "*")


def _searchable(text: str) -> str:
    """The text as it is indexed: nothing but Unicode, and each letter a word where none are
    apart.
    """
    return spread(text.encode(errors="replace").decode())
