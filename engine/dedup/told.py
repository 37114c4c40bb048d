"""What became of each row, as ``--decisions`` holds it."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from pathlib import Path
from typing import Any

from engine.datasets import BadRowError, Row
from engine.dedup.beforehand import Refusal
from engine.dedup.cascade import Judgement
from engine.dedup.texts import Texts

__all__ = ["Places", "bad_row", "decided", "resembled"]


class Places:
    """File, line and id of each row so far, for those that a later one resembles."""

    def __init__(self) -> None:
        self._files, self._firsts = list[Path](), array("q")
        """Files follow one another: each with the index of its first row."""
        self._lines, self._ids = array("q"), Texts()

    def append(self, row: Row) -> None:
        if not self._files or self._files[-1] != row.path:
            self._files.append(row.path)
            self._firsts.append(len(self._lines))
        self._lines.append(row.line)
        self._ids.append(json.dumps(row.values.get("id"), default=str))

    def of(self, index: int) -> dict[str, Any]:
        return {
            "nearest_file": str(self._files[bisect_right(self._firsts, index) - 1]),
            "nearest_line": self._lines[index],
            "nearest_id": json.loads(self._ids[index]),
        }


def decided(index: int, row: Row, text: str, reason: str | None) -> dict[str, Any]:
    """A row, and what became of it."""
    return {
        "index": index,
        "file": str(row.path),
        "line": row.line,
        "id": row.values.get("id"),
        "text": text,
        "accepted": reason is None,
        "reason": reason,
    }


def resembled(
    judgement: Judgement | None, refusal: Refusal | None, places: Places
) -> dict[str, Any]:
    """What a row resembles, or is refused for beforehand. None of both: there was nothing to
    compare.
    """
    compared = None if judgement is None else judgement.nearest
    nearest = compared or refusal
    decision: dict[str, Any] = {
        "nearest_index": None,
        "nearest_file": None,
        "nearest_line": None,
        "nearest_id": None,
        "nearest_text": None if nearest is None else nearest.text,
        "score": None if compared is None else compared.score,
        "nearest_cosine": None,
    }
    meaning = None if judgement is None else judgement.nearest_meaning
    if meaning is not None:
        decision["nearest_cosine"] = meaning.score
    if judgement is None:
        decision["compared"] = False
    if refusal is not None and refusal.shared is not None:
        decision["shared"] = refusal.shared
    if nearest is not None and nearest.source:
        kind, _, place = nearest.source.partition(":")
        if kind == "row":
            decision |= {"nearest_index": int(place), **places.of(int(place))}
        else:
            file, _, line = place.rpartition(":")
            decision |= {"nearest_file": file, "nearest_line": int(line)}
    return decision


def bad_row(wrong: BadRowError) -> dict[str, Any]:
    values = wrong.values or {}
    text = {"file": str(wrong.path), "line": wrong.line, "id": values.get("id"), "text": wrong.raw}
    return {"index": None, **text, "accepted": False, "reason": "bad_row", "error": str(wrong)}
