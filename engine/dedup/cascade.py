"""The decision on near-duplicates: exact text, then ROUGE-L, then meaning, until one refuses.

Every candidate is compared with all references and all candidates accepted before it, so decisions
must be taken in one order, by one thread. They do not depend on how the candidates are cut into
batches:

* Where meaning counts, a batch is first sifted without being added to anything, to find the texts
  worth embedding; then it is decided one by one. A candidate that falls to its meaning was
  therefore never compared against. Where it does not, one compiled call decides them all in turn.
* Embeddings move by some 1e-7 with the shape of the batch they were computed in, and by up to 1e-4
  where they were kept as half floats. What a search proposes depends on the signs of the components
  alone, so a text with a component close to zero is embedded again by itself. What it proposes is
  decided, and scored, on embeddings of the two texts made each by itself: those are the canonical
  values. It costs some milliseconds for each text refused by its meaning, or close to it.
* In bfloat16 they move by up to 1e-2, and many signs with them. While the search compares with
  every vector, that changes nothing; beyond (``semantic.LISTS`` vectors), a neighbour that is just
  above the threshold may be proposed with one batch size and not with another.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.dedup.by_script import ByScript, RougeByScript
from engine.dedup.encoder import Encoder, Foresees, readable
from engine.dedup.exact import ExactIndex, digest
from engine.dedup.memory import Part, full
from engine.dedup.rouge import Hit, Nearest, RougeIndex, rouge_l_of_tokens, tokenize
from engine.dedup.semantic import SemanticIndex
from engine.dedup.texts import Texts
from engine.languages import ENGLISH, MIXED, has_tokens
from engine.records import Neighbour

__all__ = ["Candidate", "Cascade", "Judgement", "Reason"]

Reason = Literal["duplicate_exact", "duplicate_rouge", "duplicate_semantic", "embed_invalid"]

MOST_ITEMS = (1 << 32) - 2
"""Each index keeps 32 bits of an item's number, or of one more. Words come to their end before
(``kernels.MOST``)."""
COMPARED_WITH_ALL = 1_000_000
"""Items that are told which others are nearest, and how near all are in the mean. Both need every
pair: some 2 ms for the millionth item, 40 times what its decision takes, and twice that for the two
millionth."""
NOISE = {"float32": 1e-3, "bfloat16": 1e-2}
"""More than a cosine of kept or batched embeddings can be off. Two vectors with a cosine of 0.99997
to what they should be (seen) can move each other's by 0.007 at 0.9."""
VECTORS_AT_ONCE = 1_024
"""That are taken from a store together."""
MOST_CHARACTERS = 2_000
"""Of texts that are compared with all others of their batch before one of them is embedded."""
SIGN_NOISE = 1e-6
"""More than a component can differ between batches (seen: 3e-8)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One text to judge."""

    text: str
    source: str
    """Where it comes from, as ``Neighbour.source`` names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What became of one candidate."""

    reason: Reason | None
    """None: accepted."""
    nearest: Neighbour | None = None
    """Refused: what it duplicates. Accepted: the nearest by ROUGE-L, if neighbours are wanted."""
    detail: str = ""
    """For the person: what is wrong with the embedding."""
    most_similar: dict[str, float] = field(default_factory=dict)
    """Accepted: the nearest texts by ROUGE-L with their F."""
    mean_similarity: float | None = 0.0
    """Accepted: the mean F over all references and earlier accepted candidates. None: it is beyond
    the first ``COMPARED_WITH_ALL``, so that neither this nor the nearest by ROUGE-L were looked
    for.
    """
    nearest_meaning: Neighbour | None = None
    """Accepted: the nearest by meaning, where it is within ``margin`` of the threshold."""
    vector: NDArray[np.float16] | None = None
    """Accepted: the embedding (D,), as ``Cascade.restore`` takes it."""
    unreadable: bool = False
    """Accepted without a look at its meaning: the embedding model cannot read the text."""

    @property
    def accepted(self) -> bool:
        return self.reason is None


class Cascade:
    """References and accepted candidates, and the decision on the next ones.

    Args:
        rouge_threshold: refuse above this F; None leaves ROUGE-L out.
        semantic_threshold: refuse above this cosine; None leaves meaning out and needs no encoder.
        encoder: turns texts into vectors.
        neighbours: how many nearest texts an accepted candidate is given; 0 saves the time.
        margin: how far below the threshold the nearest by meaning is told; costs an embedding or
            two each.
        directory: where ``SemanticIndex`` keeps its file.
        language: how texts are cut for ROUGE-L, as for ``RougeIndex``.
        threads: that compare by ROUGE-L at once; decisions do not depend on them.
        by_script: how each text is cut by itself, in the place of ``language`` and
            ``rouge_threshold``; such a cascade has no ``arrays``.

    Attributes:
        unreadable: references that the embedding model cannot read; like such candidates, they are
            not compared by meaning.
    """

    def __init__(
        self,
        rouge_threshold: float | None = 0.7,
        semantic_threshold: float | None = None,
        encoder: Encoder | None = None,
        neighbours: int = 10,
        margin: float = 0.0,
        directory: Path | None = None,
        language: str = ENGLISH,
        threads: int = 1,
        by_script: ByScript | None = None,
    ) -> None:
        if semantic_threshold is not None and encoder is None:
            raise ValueError("a semantic threshold needs an encoder")
        self.neighbours = neighbours
        self._margin = margin
        self._exact = ExactIndex()
        self._cuts = by_script or ByScript.alike(language, rouge_threshold or 1.0)
        self._rouge: RougeIndex | RougeByScript | None = None
        if by_script is not None:
            self._rouge = RougeByScript(by_script, threads=threads)
        elif rouge_threshold is not None:
            self._rouge = RougeIndex(rouge_threshold, language, threads=threads)
        self.unreadable = 0
        self._encoder = encoder
        self._semantic: SemanticIndex | None = None
        if semantic_threshold is not None and encoder is not None:
            self._semantic = SemanticIndex(encoder.dimension, semantic_threshold, directory)
        self._texts, self._sources = Texts(), Texts()
        self._vector_items = array("I")
        """Item of each vector in the semantic index; items whose embedding is invalid have none."""

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def is_past_neighbours(self) -> bool:
        """Whether there are so many items that those accepted are no longer told their nearest by
        ROUGE-L.
        """
        return self._rouge is not None and self.neighbours > 0 and len(self) > COMPARED_WITH_ALL

    @property
    def nbytes(self) -> int:
        """Bytes of memory in use beside what the indexes of ROUGE-L and meaning say of
        themselves.
        """
        beside = self._texts.nbytes + self._sources.nbytes + self._exact.nbytes
        return beside + len(self._vector_items) * self._vector_items.itemsize

    def add_reference(self, texts: Sequence[str], sources: Sequence[str]) -> None:
        """Add texts to compare against, unjudged."""
        vectors: dict[int, NDArray[np.float32]] = {}
        if self._semantic is not None:
            vectors = self._embed_readable(texts, range(len(texts)))
            self.unreadable += len(texts) - len(vectors)
        self._add(texts, sources, vectors)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All that it holds as flat arrays, but for the vectors. They stay as they are while others
        are added.
        """
        arrays: dict[str, NDArray[Any]] = {
            "digests": self._exact.digests(),
            "vector_items": np.array(self._vector_items, np.uint32),
        }
        for name, texts in ("text", self._texts), ("source", self._sources):
            arrays |= {f"{name}_{part}": array for part, array in texts.arrays().items()}
        if self._rouge is not None:
            assert isinstance(self._rouge, RougeIndex)
            arrays |= self._rouge.arrays()
        return arrays

    def take(
        self, arrays: Mapping[str, Part], vectors: Iterable[tuple[str, NDArray[np.generic]]]
    ) -> None:
        """Hold what one of the same settings and references held, where this one holds those alone.

        Raises ValueError where that cannot be; this one is then of no use any more.

        Args:
            arrays: as ``arrays`` gave them.
            vectors: those of the accepted texts, as they were added, each with its text's source.
                Read only where meaning counts.
        """
        types = {name: array.dtype for name, array in self.arrays().items()}
        if {name: part.array.dtype for name, part in arrays.items()} != types:
            raise ValueError("its arrays are others")
        texts, sources = Texts(), Texts()
        texts.take(arrays["text_letters"], arrays["text_ends"])
        sources.take(arrays["source_letters"], arrays["source_ends"])
        if not texts.begins_with(self._texts) or not sources.begins_with(self._sources):
            raise ValueError("it compares with other texts from the start")
        self._exact.take(arrays["digests"])
        if not len(texts) == len(sources) == len(self._exact):
            raise ValueError("its arrays are not of one size")
        if self._rouge is not None:
            assert isinstance(self._rouge, RougeIndex)
            self._rouge = self._rouge.like()
            self._rouge.take(arrays)
            if len(self._rouge) != len(texts):
                raise ValueError("its arrays are not of one size")
        self._texts, self._sources = texts, sources
        if self._semantic is not None:
            self._take_vectors(self._semantic, arrays["vector_items"].used, iter(vectors))

    def _take_vectors(
        self,
        semantic: SemanticIndex,
        items: NDArray[np.uint32],
        vectors: Iterator[tuple[str, NDArray[np.generic]]],
    ) -> None:
        held = len(self._vector_items)
        if not np.array_equal(items[:held], self._vector_items):
            raise ValueError("other vectors come first")
        for start in range(held, len(items), VECTORS_AT_ONCE):
            some = items[start : start + VECTORS_AT_ONCE].tolist()
            given = list(islice(vectors, len(some)))
            if [source for source, _ in given] != [self._sources[item] for item in some]:
                raise ValueError("it has other vectors than the store")
            semantic.extend(np.stack([vector for _, vector in given]))
            self._vector_items.extend(some)

    def restore(
        self, accepted: Sequence[Candidate], vectors: Sequence[NDArray[np.generic] | None]
    ) -> int:
        """Add candidates that were accepted earlier, with their vectors.

        A vector that is missing or cannot be compared is made anew; returns how many were. That of
        a text which the embedding model cannot read is not used.
        """
        texts = [candidate.text for candidate in accepted]
        kept: dict[int, NDArray[np.generic]] = {}
        fresh: dict[int, NDArray[np.float32]] = {}
        if self._semantic is not None:
            kept = {
                i: vector
                for i, vector in enumerate(vectors)
                if vector is not None and self._semantic.problem(vector) is None
            }
            fresh = self._embed_readable(texts, [i for i in range(len(texts)) if i not in kept])
            can_read = self._readable(texts, list(kept))
            kept = {i: kept[i] for i, can in zip(kept, can_read, strict=True) if can}
        self._add(texts, [candidate.source for candidate in accepted], {**fresh, **kept})
        return len(fresh)

    @property
    def foresees(self) -> bool:
        """Whether it gains by being told of texts before they are judged."""
        return self._semantic is not None and isinstance(self._encoder, Foresees)

    def foresee(self, texts: Sequence[str]) -> None:
        """Let the encoder begin with those of the next texts that exact text and ROUGE-L let pass
        as far as is known now.
        """
        assert isinstance(self._encoder, Foresees)
        self._encoder.foresee([texts[i] for i in self._survivors(texts)])

    def judge(
        self, candidates: Sequence[Candidate], limit: int | None = None, *, foreseen: bool = False
    ) -> list[Judgement]:
        """Decide on candidates in their order, and add those accepted.

        After ``limit`` acceptances the rest is not judged: the list returned is then shorter.
        ``foreseen``: the encoder knows the texts already.
        """
        if limit is not None and limit <= 0:
            return []
        texts = [candidate.text for candidate in candidates]
        sources = [candidate.source for candidate in candidates]
        first = len(self)
        if self._rouge is not None and self._semantic is None:
            judgements = self._judge_words(self._rouge, texts, sources, limit)
        else:
            vectors = {} if foreseen else self._embed_readable(texts, self._survivors(texts))
            judgements = self._judge_meanings(texts, sources, limit, vectors)
        accepted = [i for i, judgement in enumerate(judgements) if judgement.accepted]
        if self._rouge is not None and self.neighbours:
            # By its number alone, or it would depend on how candidates are cut into batches.
            near = self._rouge.neighbours(
                range(first, max(first, min(len(self), COMPARED_WITH_ALL))), self.neighbours
            )
            for i, nearest in zip(accepted, near, strict=False):
                judgements[i] = self._with_neighbours(judgements[i], nearest)
            for i in accepted[len(near) :]:
                judgements[i] = replace(judgements[i], mean_similarity=None)
        return judgements

    def _judge_words(
        self,
        rouge: RougeIndex | RougeByScript,
        texts: Sequence[str],
        sources: Sequence[str],
        limit: int | None,
    ) -> list[Judgement]:
        """By exact text and ROUGE-L; as many as can be known to differ go through it together."""
        judgements: list[Judgement] = []
        goal = len(self) + (len(texts) if limit is None else limit)
        while len(judgements) < len(texts) and len(self) < goal:
            start = len(judgements)
            same: list[int | None] = []
            different: dict[bytes, str] = {}
            for text in texts[start:]:
                found = self._exact.find(text)
                if found is None:
                    if digest(text) in different:
                        break  # a duplicate, if the first one is accepted
                    different[digest(text)] = text
                same.append(found)
            hits = iter(rouge.admit(list(different.values()), goal - len(self)))
            for i, found in enumerate(same, start):
                if len(self) == goal:
                    break
                if found is not None:
                    judgements.append(self._duplicate("duplicate_exact", Hit(found, 1.0)))
                elif (hit := next(hits)) is not None:
                    judgements.append(self._duplicate("duplicate_rouge", hit))
                else:
                    judgements.append(Judgement(reason=None))
                    self._note(texts[i], sources[i])
        return judgements

    def _judge_meanings(
        self,
        texts: Sequence[str],
        sources: Sequence[str],
        limit: int | None,
        vectors: Mapping[int, NDArray[np.float32]],
    ) -> list[Judgement]:
        """By all stages, one by one; what has no vector yet gets one where it needs it."""
        judgements: list[Judgement] = []
        for i, (text, source) in enumerate(zip(texts, sources, strict=True)):
            judgement = self._judge_one(text, vectors.get(i))
            judgements.append(judgement)
            if judgement.accepted:
                made = {} if judgement.vector is None else {0: judgement.vector}
                self._add([text], [source], made)
                limit = None if limit is None else limit - 1
                if limit == 0:
                    break
        return judgements

    def _embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors (N, D); in float32 their signs do not depend on what else is in the batch."""
        assert self._encoder is not None
        vectors = self._encoder.encode(texts)
        if len(texts) > 1 and self._encoder.precision == "float32":
            for i in np.flatnonzero((np.abs(vectors) < SIGN_NOISE).any(axis=1)).tolist():
                vectors[i] = self._encoder.encode([texts[i]])[0]
        return vectors

    def _readable(self, texts: Sequence[str], chosen: Sequence[int]) -> Sequence[bool]:
        """Whether each of the chosen texts has a meaning that the embedding model can read. One
        without any letter or digit has none that could be compared.
        """
        assert self._encoder is not None
        can_read = readable(self._encoder, [texts[i] for i in chosen])
        return [
            can and has_tokens(texts[i], MIXED) for i, can in zip(chosen, can_read, strict=True)
        ]

    def _embed_readable(
        self, texts: Sequence[str], chosen: Sequence[int]
    ) -> dict[int, NDArray[np.float32]]:
        """Vectors of the chosen texts that the model can read, by position."""
        if not chosen:  # and where nothing is compared by meaning, there is no model
            return {}
        can_read = self._readable(texts, chosen)
        chosen = [i for i, can in zip(chosen, can_read, strict=True) if can]
        if not chosen:
            return {}
        return dict(zip(chosen, self._embed([texts[i] for i in chosen]), strict=True))

    def _survivors(self, texts: Sequence[str]) -> list[int]:
        """Positions in the batch of the texts that exact text and ROUGE-L let pass.

        Texts of the batch are compared with each other as if all of them passed the semantic stage;
        the few that are needed although this said otherwise are embedded when they are.
        """
        if self._semantic is None:
            return []
        passed: list[list[str]] = []
        seen: set[bytes] = set()
        survivors: list[int] = []
        for i, text in enumerate(texts):
            key = digest(text)
            if key in seen or self._exact.find(text) is not None:
                continue
            # Longer ones cost more here than to embed one in vain.
            cut = self._cuts.of(text)
            tokens = tokenize(text, cut.language) if len(text) <= MOST_CHARACTERS else []
            if tokens and any(rouge_l_of_tokens(tokens, other) > cut.threshold for other in passed):
                continue
            if self._rouge is not None and self._rouge.find(text) is not None:
                continue
            seen.add(key)
            passed.append(tokens)
            survivors.append(i)
        return survivors

    def _judge_one(self, text: str, vector: NDArray[np.float32] | None) -> Judgement:
        same = self._exact.find(text)
        if same is not None:
            return self._duplicate("duplicate_exact", Hit(same, 1.0))
        if self._rouge is not None:
            hit = self._rouge.find(text)
            if hit is not None:
                return self._duplicate("duplicate_rouge", hit)
        if self._semantic is None:
            return Judgement(reason=None)
        if vector is None:
            if not self._readable([text], [0])[0]:
                return Judgement(reason=None, unreadable=True)
            vector = self._embed([text])[0]
        problem = self._semantic.problem(vector)
        if problem is not None:
            return Judgement(reason="embed_invalid", detail=problem)
        hit = self._nearest_meaning(text, vector)
        if hit is not None and hit.score > self._semantic.threshold:
            return self._duplicate("duplicate_semantic", hit)
        nearest = None if hit is None else self._neighbour(hit)
        half = np.asarray(vector, np.float16)
        return Judgement(reason=None, nearest_meaning=nearest, vector=half)

    def _with_neighbours(self, judgement: Judgement, near: Nearest) -> Judgement:
        return replace(
            judgement,
            nearest=next((self._neighbour(hit) for hit in near.hits if hit.score > 0), None),
            most_similar={self._texts[hit.item]: hit.score for hit in near.hits},
            mean_similarity=near.mean,
        )

    def _nearest_meaning(self, text: str, vector: NDArray[np.float32]) -> Hit | None:
        """The item with the highest canonical cosine (ties: the earliest), if above the margin."""
        assert self._semantic is not None
        assert self._encoder is not None
        noise = NOISE[self._encoder.precision]
        floor = self._semantic.threshold - self._margin
        contenders = self._semantic.above(vector, floor - noise)
        if not contenders:
            return None
        items = [
            self._vector_items[hit.item]
            for hit in contenders
            if hit.score >= contenders[0].score - 2 * noise
        ]
        alone = self._alone(text)
        cosines = [(float(np.dot(alone, self._alone(self._texts[item]))), item) for item in items]
        best, item = max(cosines, key=lambda found: (found[0], -found[1]))
        return Hit(item, best) if best > floor else None

    def _alone(self, text: str) -> NDArray[np.float64]:
        """The text's embedding (D,) computed in a batch of its own."""
        vector = np.asarray(self._embed([text])[0], np.float64)
        return np.asarray(vector / np.linalg.norm(vector), np.float64)

    def _duplicate(self, reason: Reason, hit: Hit) -> Judgement:
        return Judgement(reason=reason, nearest=self._neighbour(hit))

    def _neighbour(self, hit: Hit) -> Neighbour:
        return Neighbour(
            text=self._texts[hit.item], score=hit.score, source=self._sources[hit.item]
        )

    def _add(
        self,
        texts: Sequence[str],
        sources: Sequence[str],
        vectors: Mapping[int, NDArray[np.generic]],
    ) -> None:
        """Add items, and the vectors of those that have one, by their positions."""
        if self._rouge is not None:
            self._rouge.extend(texts)
        if self._semantic is not None:
            good = [i for i in sorted(vectors) if self._semantic.problem(vectors[i]) is None]
            if good:
                self._semantic.extend(np.stack([vectors[i] for i in good]))
                self._vector_items.extend(len(self) + i for i in good)
        for text, source in zip(texts, sources, strict=True):
            self._note(text, source)

    def _note(self, text: str, source: str) -> None:
        """Remember an item that the other indexes hold. Raises ConfigError where it is one more
        than they can number.
        """
        if len(self) >= MOST_ITEMS:
            raise full(f"{len(self):,} texts")
        self._texts.append(text)
        self._sources.append(source)
        self._exact.add(text)
