"""Preference pairs: of the samples of one input row the best and the worst, by a score.

A row is about the input row that it, or what it was made of in the stages before, is a sample of:
so a stage that judges the samples of the stage before gives pairs as well as one that scores its
own. Of a stage that makes one row of its samples, the samples are paired and not that row, where
no stage before it has samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

from engine.errors import ConfigError
from engine.export.best import group_of, score_of
from engine.export.chat import turns_of
from engine.export.layout import Layout
from engine.export.rows import Row, rows
from engine.records import Record
from engine.stages import Lineage
from engine.store import RunReader

__all__ = ["Pairs"]


class _Scored(NamedTuple):
    score: float
    row: Row


@dataclass(slots=True, kw_only=True)
class Pairs:
    """The pairs of a run, and what gave none.

    Args:
        by: the field with the score; more is better.
        reasoning: turns have the thoughts of their answers.
    """

    run: RunReader
    layout: Layout
    lineage: Lineage
    by: str
    ties: int = 0
    """Input rows whose best and worst sample have the same score, or say the same."""
    alone: int = 0
    """Input rows with fewer than two samples that have a score."""
    other_prompts: int = 0
    """Input rows whose best and worst sample do not answer the same turns."""
    chosen: list[int] = field(default_factory=list)
    """Number of each pair's best row among all accepted ones, of the pairs given so far."""
    _best: Record = field(default_factory=dict)
    """The best row of the latest pair."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """``prompt``, ``chosen``, ``rejected`` (lists of turns), the score and the id of both, the
        number of the input row that they are samples of, and the fields that both carry over from
        it, as ``carried_NAME`` where ours has their name; in plan order.

        Raises ConfigError where rows have no such field or number, where no stage has several
        samples, and where a row makes no chat.
        """
        reasoning = self.layout.reasoning
        samples = self.lineage.pairs_samples
        candidates = (
            row
            for row in rows(self.run, provenance=reasoning, all_samples=samples)
            if row.decision.accepted is not samples
        )
        for number, group in groupby(candidates, self._group):
            pair = self._pair([*self._scored(group)])
            if pair is not None:
                pair["row"] = number
                carried = self.run.manifest.decision.get("carry") or ()
                taken = {f"carried_{name}" if name in pair else name: name for name in carried}
                yield {**{new: self._best.get(name) for new, name in taken.items()}, **pair}

    def _group(self, row: Row) -> int:
        return group_of(self.lineage, row, "--format preference")

    def _scored(self, group: Iterable[Row]) -> Iterator[_Scored]:
        for row in group:
            if (score := score_of(row, self.by)) is not None:
                yield _Scored(score, row)

    def _pair(self, scored: list[_Scored]) -> dict[str, Any] | None:
        if len(scored) < 2:
            self.alone += 1
            return None
        # The first of those that are alike.
        best = max(scored, key=lambda each: each.score)
        worst = min(scored, key=lambda each: each.score)
        if best.score == worst.score:
            self.ties += 1
            return None
        asked, chosen = self._turns(best.row)
        asked_too, rejected = self._turns(worst.row)
        if asked != asked_too:
            self.other_prompts += 1
            return None
        if chosen == rejected:
            self.ties += 1
            return None
        self.chosen.append(best.row.number)
        self._best = best.row.record
        return {
            "prompt": asked,
            "chosen": chosen,
            "rejected": rejected,
            "score_chosen": best.score,
            "score_rejected": worst.score,
            "id_chosen": best.row.id,
            "id_rejected": worst.row.id,
        }

    def _turns(self, row: Row) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The turns that ask, and the one that answers."""
        turns = turns_of(self.layout.recipe, row, reasoning=self.layout.reasoning)
        if len(turns) < 2 or turns[-1]["role"] != "assistant":
            raise ConfigError(
                f"row {row.id}: its chat does not end with an answer to a question, as --format "
                "preference needs it"
            )
        return turns[:-1], turns[-1:]
