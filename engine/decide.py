"""Answers in, decisions out, in plan order: parse, filter, compare, and stop at exactly the target.

A pure function of the answers and of what was accepted before, so that deciding again (after a
crash, or with other thresholds) gives the same. It blocks for milliseconds: call it from a worker
thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.dedup.cascade import Candidate, Cascade
from engine.filters import Refusal, first_refusal
from engine.recipes import alpaca
from engine.records import Answer, Api, Decision, Record

__all__ = ["Decider", "row_source"]

Vector = NDArray[np.float32]


def row_source(index: int, position: int) -> str:
    """How ``Neighbour.source`` names an accepted row."""
    return f"row:{index}.{position}"


@dataclass(frozen=True, slots=True)
class _Piece:
    """One piece of an answer, parsed and filtered; a candidate where nothing refuses it yet."""

    index: int
    position: int
    record: Record | None
    refusal: Refusal | None


class Decider:
    """Decides answers in plan order; keeps the near-duplicate indexes.

    Args:
        cascade: holds the seeds, the sets to stay clear of, and the rows accepted so far.
        api: tells the parser how the answers were asked for.
        after: (index, position) of the last decision taken earlier; None at the start of a run.
        restore: fills the cascade with the rows accepted earlier. Called by the first ``decide``,
            in its thread, so that a run that goes on sends at once and not after seconds of
            indexing.
    """

    def __init__(
        self,
        cascade: Cascade,
        *,
        api: Api = "completions",
        after: tuple[int, int] | None = None,
        restore: Callable[[], None] | None = None,
    ) -> None:
        self._cascade = cascade
        self._api: Api = api
        self._after = after or (-1, 0)
        self._restore = restore

    def decide(
        self, answers: Sequence[Answer], *, limit: int
    ) -> tuple[list[Decision], list[Vector | None]]:
        """Decide consecutive answers, until ``limit`` more records are accepted.

        Returns:
            The decisions, and for each the embedding (D,) of an accepted record or None. After the
            ``limit``-th acceptance the rest is left undecided, for a run that goes on with a higher
            target.
        """
        if self._restore is not None:
            self._restore()
            self._restore = None
        pieces = [
            piece
            for answer in answers
            for piece in self._pieces(answer)
            if (piece.index, piece.position) > self._after
        ]
        candidates = [
            Candidate(
                instruction=piece.record.instruction,
                input=piece.record.input,
                source=row_source(piece.index, piece.position),
            )
            for piece in pieces
            if piece.refusal is None and piece.record is not None
        ]
        judgements = iter(self._cascade.judge(candidates, limit))
        decisions: list[Decision] = []
        vectors: list[Vector | None] = []
        vector: Vector | None
        for piece in pieces:
            if limit == 0:
                break
            if piece.refusal is not None:
                reason, detail = piece.refusal
                decision = Decision(
                    index=piece.index,
                    position=piece.position,
                    reason=reason,
                    record=piece.record,
                    detail=detail,
                )
                vector = None
            else:
                judgement = next(judgements)
                vector = None if judgement.vector is None else judgement.vector.astype(np.float32)
                decision = Decision(
                    index=piece.index,
                    position=piece.position,
                    reason=judgement.reason,
                    record=piece.record,
                    detail=judgement.detail,
                    nearest=judgement.nearest,
                    most_similar=judgement.most_similar,
                    mean_similarity=judgement.mean_similarity,
                )
                limit -= judgement.accepted
            decisions.append(decision)
            vectors.append(vector)
        if decisions:
            self._after = (decisions[-1].index, decisions[-1].position)
        return decisions, vectors

    def _pieces(self, answer: Answer) -> list[_Piece]:
        """At least one for every answer: that it failed, or holds no record, is a decision too."""
        if answer.completion is None:
            return [_Piece(answer.index, 0, None, (f"failed:{answer.failure}", answer.message))]
        if answer.completion.finish_reason not in ("stop", "length"):
            return [_Piece(answer.index, 0, None, (answer.completion.finish_reason, ""))]
        parsed = alpaca.parse(
            answer.completion, demonstrations=len(answer.demonstrations), api=self._api
        )
        return [
            _Piece(
                answer.index,
                piece.position,
                piece.record,
                piece.refusal if piece.record is None else first_refusal(piece.record),
            )
            for piece in parsed
        ] or [_Piece(answer.index, 0, None, ("no_record", "the answer is blank"))]
