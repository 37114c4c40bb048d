"""Answers in, decisions out, in plan order: parse, filter, compare, and stop at exactly the target.

A pure function of the answers and of what was accepted before, so that deciding again (after a
crash, or with other thresholds) gives the same. It blocks for milliseconds: call it from a worker
thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from typing import NamedTuple

import numpy as np

from engine.dedup.against import add_references
from engine.dedup.cascade import COMPARED_WITH_ALL, Candidate, Cascade, Judgement
from engine.dedup.encoder import Encoder
from engine.errors import ConfigError
from engine.recipes.base import CUT, NOT_ASKED, RECIPE_ERROR, Ask, Piece, Recipe, Refusal
from engine.recipes.guard import RecipeFault, compared_text, parsed, reduced_of, unchanged_of
from engine.records import SAMPLE, Answer, Api, Decision, Record
from engine.settings import RunConfig
from engine.store import RunReader, Vector
from engine.surroundings import cores
from engine.thoughts import THOUGHTS_ONLY, is_thoughts_only, thoughts_apart

__all__ = [
    "Decider",
    "Restored",
    "fetch_encoder",
    "make_cascade",
    "restore_cascade",
    "row_source",
    "unreadable_note",
    "uses_semantic",
    "without_neighbours_note",
]

ADD_BATCH = 1024
"""Rows of a resumed run that are read and put into the index together, so that memory holds few."""
BEHIND = 2**20
"""The position of what a recipe makes of an answer's pieces: behind all of them."""
HANGS = "the recipe's code hung at it, or ended the process that decides"
"""What is said of an answer at which the process that decides hung, or died twice. It is refused
and not tried again."""
FIELDS: dict[str, tuple[str, ...]] = {
    "instruction": (),
    "instruction+input": ("instruction", "input"),
}
"""What is compared of a dataset to stay clear of."""


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
    text: str | None = None
    """What is compared; None: nothing."""


class Decider:
    """Decides answers in plan order; keeps the near-duplicate indexes.

    Args:
        recipe: parses answers, filters rows, and says what of them is compared.
        cascade: holds the seeds, the sets to stay clear of, and the rows accepted so far.
        seed: the run's, for what a recipe draws.
        samples: requests for each input row.
        api: how the answers were asked for, where they do not say so themselves.
        carry: fields of the input row that its rows keep beside the recipe's own.
        after: (index, position) of the last decision taken earlier; None at the start of a run.
        skip: answers that the recipe's code hangs at; they are refused.
    """

    def __init__(
        self,
        recipe: Recipe,
        cascade: Cascade,
        *,
        seed: int = 0,
        samples: int = 1,
        api: Api = "completions",
        carry: Sequence[str] = (),
        after: tuple[int, int] | None = None,
        skip: Collection[int] = (),
    ) -> None:
        self._recipe = recipe
        self._skip = frozenset(skip)
        self._cascade = cascade
        self._seed = seed
        self._samples = samples
        self._api: Api = api
        self._carry = tuple(carry)
        self._after = after or (-1, 0)
        self._foreseen: deque[list[_Piece]] = deque()
        """What ``foresee`` has read, batch by batch."""
        self._votes: list[Record | None] = []
        """The rows of the samples of one input row, so far."""

    def foresee(self, answers: Sequence[Answer]) -> None:
        """Read the answers of a later call of ``decide``, so that their texts are embedded
        meanwhile. Of a cascade that foresees; all answers are foreseen, or none.
        """
        pieces = [piece for answer in answers for piece in self._made(answer)]
        self._foreseen.append(pieces)
        self._cascade.foresee([piece.text for piece in pieces if piece.text is not None])

    def decide(
        self, answers: Sequence[Answer], *, limit: int
    ) -> tuple[list[Decision], list[Vector | None]]:
        """Decide consecutive answers, until ``limit`` more records are accepted.

        Returns:
            The decisions, and for each the embedding (D,) of an accepted record or None. After the
            ``limit``-th acceptance the rest is left undecided, for a run that goes on with a higher
            target.
        """
        foreseen = bool(self._foreseen)
        made = (
            self._foreseen.popleft()
            if foreseen
            else [piece for answer in answers for piece in self._made(answer)]
        )
        pieces = [piece for piece in made if (piece.index, piece.position) > self._after]
        candidates = [
            Candidate(text=piece.text, source=row_source(piece.index, piece.position))
            for piece in pieces
            if piece.text is not None
        ]
        judgements = iter(self._cascade.judge(candidates, limit, foreseen=foreseen))
        decisions: list[Decision] = []
        vectors: list[Vector | None] = []
        fruitful, barren = -1, ""
        for piece in pieces:
            if limit == 0:
                break
            decision, vector = self._decision(piece, judgements)
            if piece.position == BEHIND and self._recipe.keeps_parent:
                if fruitful == piece.index or piece.index == self._after[0]:
                    continue  # the answer has a row of its own
                if decision.accepted:
                    decision = replace(decision, detail=f"unchanged: {barren}")
            elif decision.accepted:
                fruitful = piece.index
            else:
                barren = f"{decision.reason} {decision.detail}".rstrip()
            limit -= decision.accepted
            decisions.append(decision)
            vectors.append(vector)
        if decisions:
            self._after = (decisions[-1].index, decisions[-1].position)
        return decisions, vectors

    def _decision(
        self, piece: _Piece, judgements: Iterator[Judgement]
    ) -> tuple[Decision, Vector | None]:
        if piece.refusal is not None or piece.text is None:
            reason, detail = piece.refusal or (None, "")
            decision = Decision(
                index=piece.index,
                position=piece.position,
                reason=reason,
                record=piece.record,
                detail=detail,
            )
            return decision, None
        judgement = next(judgements)
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
        vector = judgement.vector
        return decision, None if vector is None else vector.astype(np.float32)

    def _made(self, answer: Answer) -> list[_Piece]:
        """The pieces of an answer, and what a recipe makes of them behind all of them."""
        pieces, recipe, index = self._pieces(answer), self._recipe, answer.index
        if recipe.keeps_parent and answer.row is not None:
            kept = unchanged_of(recipe, answer.row, BEHIND)
            pieces.append(_Piece(index, BEHIND, kept.record, kept.refusal))
        if recipe.reduces:
            sample = index % self._samples
            if sample == 0:
                self._votes = []
            self._votes.append(next((p.record for p in pieces if p.refusal is None), None))
            told = (SAMPLE, f"{sample + 1} of {self._samples}")
            pieces = [p if p.refusal else replace(p, refusal=told, text=None) for p in pieces]
            if sample == self._samples - 1:
                reduced = reduced_of(recipe, self._ask(answer), self._votes)
                pieces.append(self._piece(index, replace(reduced, position=BEHIND)))
        return [self._carried(piece, answer.row) for piece in pieces] if self._carry else pieces

    def _carried(self, piece: _Piece, row: Record | None) -> _Piece:
        """The piece with what it keeps of its input row; where the recipe has a field of that
        name, the recipe's value stays.
        """
        if piece.record is None or row is None:
            return piece
        kept = {name: row.get(name) for name in self._carry}
        return replace(piece, record={**kept, **piece.record})

    def _ask(self, answer: Answer) -> Ask:
        return Ask(
            index=answer.index,
            seed=self._seed,
            row=answer.row,
            sample=answer.index % self._samples,
            shown=answer.demonstrations,
        )

    def _pieces(self, answer: Answer) -> list[_Piece]:
        """At least one for every answer: that it failed, or holds no record, is a decision too."""
        index = answer.index
        if answer.completion is None:
            reason = answer.failure or ""
            if reason not in (NOT_ASKED, RECIPE_ERROR):
                reason = f"failed:{reason}"
            return [_Piece(index, 0, None, (reason, answer.message))]
        if index in self._skip:
            return [_Piece(index, 0, None, (RECIPE_ERROR, HANGS))]
        completion = thoughts_apart(answer.completion)
        if completion.finish_reason not in ("stop", *CUT):
            return [_Piece(index, 0, None, (completion.finish_reason, ""))]
        if is_thoughts_only(completion):
            spent = f"{completion.usage.completion_tokens} tokens of thoughts, and no answer"
            return [_Piece(index, 0, None, (THOUGHTS_ONLY, spent))]
        if completion.api is None and self._api == "chat":
            completion = replace(completion, api=self._api)
        found = parsed(self._recipe, self._ask(answer), completion)
        return [self._piece(index, piece) for piece in found]

    def _piece(self, index: int, piece: Piece) -> _Piece:
        refusal, text = piece.refusal, None
        if refusal is None and piece.record is not None:
            try:
                text = compared_text(self._recipe, piece.record)
            except RecipeFault as error:
                refusal = (RECIPE_ERROR, str(error))
        return _Piece(index, piece.position, piece.record, refusal, text)


def uses_semantic(config: RunConfig) -> bool:
    """Whether near-duplicates by meaning are refused: as set, else where the packages are there."""
    elsewhere = config.semantic_url is not None
    needed = ("faiss",) if elsewhere else ("sentence_transformers", "faiss")
    installed = all(find_spec(name) for name in needed)
    wanted = elsewhere if config.semantic is None else config.semantic
    if wanted and not installed:
        flag = "--semantic-url" if elsewhere else "--semantic"
        raise ConfigError(f"{flag} needs more packages: pip install 'woolmill[local]'")
    return installed if config.semantic is None else config.semantic


def fetch_encoder(config: RunConfig) -> None:
    """Have the default embedding model here before a run begins, where the run needs it.

    Raises as ``models.fetch`` does.
    """
    here = config.semantic_url is None and config.semantic_model is None
    if here and uses_semantic(config):
        from engine.dedup.encoder import default_model

        default_model()


def make_cascade(config: RunConfig, recipe: Recipe, remote: Encoder | None = None) -> Cascade:
    """The near-duplicate cascade with what the recipe compares with from the start. Loads the
    embedding model, which takes seconds, where none is ``remote``.
    """
    threshold, encoder = None, None
    if uses_semantic(config):
        from engine.dedup.semantic import SentenceEncoder

        threshold = config.semantic_threshold
        encoder = remote or SentenceEncoder(
            config.semantic_model,
            precision=config.semantic_precision,
            gpu=config.chosen_backend in ("http", "batch"),  # else the answers' model needs it
        )
    # One core is the run's own; answers that are made in this machine's cores need all of them.
    here = config.chosen_backend in ("transformers", "vllm")
    cascade = Cascade(
        config.rouge_threshold,
        threshold,
        encoder,
        language=config.spoken,
        threads=1 if here else max(1, cores() - 1),
    )
    references = list(recipe.references())
    cascade.add_reference([text for text, _ in references], [source for _, source in references])
    for path in config.against:
        add_references(cascade, path, FIELDS[config.scope])
    return cascade


def unreadable_note(unreadable: int, references: int) -> str:
    """For the person: what is not compared by meaning, and the remedy."""
    from engine.dedup.encoder import MULTILINGUAL

    return (
        f"the embedding model cannot read {unreadable:,} of the {references:,} texts to compare "
        "with: they, and records like them, are not compared by meaning; give --semantic-model "
        f"one that can, for example {MULTILINGUAL}"
    )


def without_neighbours_note() -> str:
    """For the person: what rows lack from now on."""
    return (
        f"rows beyond the first {COMPARED_WITH_ALL:,} do not name their nearest by ROUGE-L and the "
        "mean similarity, which take a look at all rows; what is accepted does not depend on them"
    )


class Restored(NamedTuple):
    """What was added from a store."""

    rows: int
    """Accepted ones, with those that are not compared."""
    embedded: int
    """Of them: those that had to be embedded again."""


def restore_cascade(
    cascade: Cascade,
    store: RunReader,
    recipe: Recipe,
    *,
    after: tuple[int, int] = (-1, -1),
    on_rows: Callable[[int], None] = lambda count: None,
) -> Restored:
    """Add the rows that the store holds as accepted.

    Args:
        after: only those with a later (index, position).
        on_rows: is told from time to time how many were added so far.
    """
    rows = store.accepted(vectors=True, after=after)
    added = missing = 0
    while batch := list(islice(rows, ADD_BATCH)):
        candidates, vectors = [], []
        for decision, vector in batch:
            text = None if decision.record is None else compared_text(recipe, decision.record)
            if text is not None:
                source = row_source(decision.index, decision.position)
                candidates.append(Candidate(text=text, source=source))
                vectors.append(vector)
        missing += cascade.restore(candidates, vectors)
        added += len(batch)
        on_rows(added)
    return Restored(added, missing)
