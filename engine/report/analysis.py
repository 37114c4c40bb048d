"""What the rows of a run are like: one pass over its answers and one over its decisions.

Everything is a plain JSON value and of bounded size, whatever the run's; texts are shortened and
made visible. What needs more than this pass (the map, the verbs) is in ``pictures``.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.languages import ENGLISH, Language, has_tokens, language_of, opening
from engine.records import Decision, Record
from engine.report.bursts import Bursts
from engine.report.figures import figures
from engine.report.shape import Shape, beginning, shape_of, shown, texts_of
from engine.report.stages import stage_figures
from engine.store import RunReader
from engine.text import shorten, visible

__all__ = ["analyse", "nearest_cosines"]

ALPACA_S = frozenset(("scope", "num_demonstrations", "seeds", "filters"))
"""Settings that say nothing of runs of other recipes."""
SHOWN = 10
"""Accepted rows, at random."""
SHOWN_CHARACTERS = 1500
"""Of each field of these."""
EXAMPLES = 6
"""Refused pieces shown for each reason, spread over the run."""
TIME_BINS = 60
PAUSE_S = 60.0
"""Longer without any answer, the run stood still; such times are cut to this."""
SCORE_BINS = 50
SPECIAL_TOKEN = re.compile(r"<\|[\w-]{1,40}\|>|</?s>|\[/?INST\]|<(?:bos|eos|pad|unk)>", re.I)
DECLINED = re.compile(
    r"\bas an ai\b|\bi(?:'m| am) (?:sorry|unable|not able)\b|\bi can(?:no|')t\b"
    r"|作为(?:一[个名款])?(?:AI|人工智能|语言模型)|(?:很?抱歉|对不起)[，,]我|我(?:无法|不能|没有办法)",
    re.I,
)
OPENINGS = 20
MIN_DUPLICATE_CHARS = 40
"""Shorter outputs ("Yes.", a class label) are alike for good reason."""


def analyse(run: RunReader) -> dict[str, Any]:
    """Distributions, examples and checks of ``run``, beside its ``figures``."""
    times = _Times(run)
    language = language_of(run.manifest.decision.get("language", ENGLISH))
    shape = shape_of(run)
    rows = _Rows(run.manifest.decision, language, shape)
    for decision in run.decisions():
        rows.add(decision)
        if decision.accepted:
            times.accepted(decision.index)
    told = rows.result()
    for refused in told["rejected"].values():
        for example in refused["examples"]:
            _add_beginning(run, example, shape)
    return {
        "figures": {**figures(run, exact=False), "parsed": rows.parsed},
        **stage_figures(run),
        "told_by": shape.noun,
        "settings": {
            part: {
                name: value
                for name, value in getattr(run.manifest, part).items()
                if shape.alpaca or name not in ALPACA_S
            }
            for part in ("fixed", "decision", "free")
        },
        "over_time": times.bins(),
        "latency_s": times.latency(),
        **told,
        "cosine": _cosines(run, rows.refused_cosines),
    }


class _Times:
    """When answers came, and what they brought."""

    def __init__(self, run: RunReader) -> None:
        at, tokens, latency, index = [], [], [], []
        for answer, committed_s in run.all_answers():
            completion = answer.completion
            index.append(answer.index)
            at.append(committed_s)
            tokens.append(completion.usage.completion_tokens if completion else 0)
            if completion and completion.latency_s > 0:
                latency.append(completion.latency_s)
        self._index = np.array(index, np.int64)
        self._at = np.array(at)
        self._tokens = np.array(tokens)
        self._latency = np.array(latency)
        self._accepted = np.zeros(len(at), np.int64)

    def accepted(self, index: int) -> None:
        place = int(np.searchsorted(self._index, index))
        if place < len(self._accepted):
            self._accepted[place] += 1

    def bins(self) -> list[dict[str, float]]:
        """The time from first to last answer, without long pauses, in equal steps with what came in
        each.
        """
        if not len(self._at):
            return []
        order = np.argsort(self._at, kind="stable")
        worked = np.empty(len(order))
        worked[order] = np.cumsum(
            np.minimum(np.diff(self._at[order], prepend=self._at[order[0]]), PAUSE_S)
        )
        width = max(worked.max() / TIME_BINS, 1e-3)
        step = np.minimum((worked / width).astype(int), TIME_BINS - 1)
        sums = {
            name: np.bincount(step, weights, TIME_BINS)
            for name, weights in (
                ("answers", np.ones(len(step))),
                ("accepted", self._accepted),
                ("completion_tokens", self._tokens),
            )
        }
        accepted = np.cumsum(sums["accepted"])
        return [
            {
                "at_s": round(float((i + 1) * width), 3),
                "answers_per_s": round(float(sums["answers"][i] / width), 3),
                "accepted": int(accepted[i]),
                "tokens_per_s": round(float(sums["completion_tokens"][i] / width), 3),
            }
            for i in range(TIME_BINS)
        ]

    def latency(self) -> dict[str, float] | None:
        if not len(self._latency):
            return None
        levels = np.percentile(self._latency, (50, 90, 99))
        return {f"p{p}": round(float(v), 4) for p, v in zip((50, 90, 99), levels, strict=True)}


class _Rows:
    """What one pass over all decisions tells."""

    def __init__(self, decision_settings: Any, language: Language, shape: Shape) -> None:
        self._language = language
        self._shape = shape
        self._first: Counter[str] = Counter()
        self._rouge_threshold = decision_settings.get("rouge_threshold")
        self._words: dict[str, list[int]] = {}
        """Lengths of each field that holds text."""
        self._answer = "output" if shape.alpaca else "answer"
        """The field that answers, as of the latest row."""
        self._with_input = 0
        self.parsed = 0
        """Pieces that became a row, accepted or refused."""
        self._accepted = 0
        self._accepted_f: list[float] = []
        self._refused_f: list[float] = []
        self.refused_cosines: list[float] = []
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[tuple[int, int, dict[str, Any]]]] = defaultdict(list)
        self._shown: list[tuple[int, tuple[int, int], dict[str, Any]]] = []
        self._outputs: Counter[bytes] = Counter()
        self._output_example: dict[bytes, tuple[str, str]] = {}
        self._checks: Counter[str] = Counter()
        self._bursts = Bursts(language.code, shape)

    def add(self, decision: Decision) -> None:
        self.parsed += decision.record is not None
        if decision.accepted:
            self._add_accepted(decision)
            return
        reason = decision.reason or ""
        self._counts[reason] += 1
        self._keep_example(reason, decision)
        if decision.nearest is not None and reason == "duplicate_semantic":
            self.refused_cosines.append(decision.nearest.score)
        elif decision.nearest is not None:
            self._refused_f.append(decision.nearest.score)

    def _keep_example(self, reason: str, decision: Decision) -> None:
        """An even draw from all of them: those with the lowest hash of their place stay."""
        rank = _rank(decision)
        kept = self._examples[reason]
        if len(kept) < EXAMPLES:
            heapq.heappush(kept, (rank, self._counts[reason], _example(decision, self._shape)))
        elif rank > kept[0][0]:
            heapq.heapreplace(kept, (rank, self._counts[reason], _example(decision, self._shape)))

    def _add_accepted(self, decision: Decision) -> None:
        record = decision.record
        if record is None:
            return
        self._accepted += 1
        self._show(decision, record)
        text = self._shape.told_by(record)
        for name, value in texts_of(record).items():
            self._words.setdefault(name, []).append(self._length(value))
        if self._language.code != ENGLISH:
            self._first[opening(text, 2)] += 1
            if self._shape.alpaca or decision.most_similar:
                self._checks["no word to compare by ROUGE-L"] += not has_tokens(
                    text, self._language.code
                )
        self._with_input += bool(self._shape.alpaca and record["input"])
        if decision.mean_similarity is None:
            self._checks["not compared with every row: without its nearest rows by ROUGE-L"] += 1
        elif self._shape.alpaca or self._rouge_threshold is not None:
            self._accepted_f.append(max(decision.most_similar.values(), default=0.0))
        self._bursts.add(record)
        self._check(decision, record, text)

    def _show(self, decision: Decision, record: Record) -> None:
        """The same draw, of accepted rows with all their fields."""
        rank = _rank(decision)
        if len(self._shown) == SHOWN and rank <= self._shown[0][0]:
            return
        fields = {name: _whole(shown(value)) for name, value in record.items()}
        entry = rank, (decision.index, decision.position), {"id": _id(decision), "fields": fields}
        (heapq.heappush if len(self._shown) < SHOWN else heapq.heapreplace)(self._shown, entry)

    def _check(self, decision: Decision, record: Record, text: str) -> None:
        checks = self._checks
        answer = self._shape.answer(record)
        if self._shape.alpaca:
            checks["without an output"] += not record["output"].strip()
        else:
            for name, value in record.items():
                blank = value.isspace() if isinstance(value, str) else False
                checks[f"{name} is empty"] += blank or value in (None, "", [], {})
        said = record[answer] if answer is not None else text
        if answer is not None:
            self._answer = answer
            noun = self._shape.noun
            # A recipe may tell its rows by the answer itself, which repeats nothing then.
            others = [shown(value).strip() for name, value in record.items() if name != answer]
            checks[f"{answer} repeats the {noun}"] += text.strip() == said.strip() in others
            checks[f"{answer} declines the task"] += DECLINED.search(said[:200]) is not None
            checks[f"{answer} may be cut off: ends in a letter or comma"] += bool(
                self._length(said) > 20 and (said[-1].isalpha() or said[-1] in ",，、")
            )
        whole = "\n".join(map(shown, record.values()))
        checks["text that looks like a special token"] += SPECIAL_TOKEN.search(whole) is not None
        checks["invisible or control characters"] += visible(whole) != whole
        if answer is not None and len(said) >= MIN_DUPLICATE_CHARS:
            key = hashlib.sha256(said.encode(errors="surrogatepass")).digest()[:12]
            self._outputs[key] += 1
            if self._outputs[key] == 2:
                self._output_example[key] = (_id(decision), shorten(said, 200))

    def _length(self, text: str) -> int:
        """In ``unit``."""
        if self._language.spaced:
            return len(text.split())
        return sum(not letter.isspace() for letter in text)

    def _texts(self) -> Iterable[str]:
        return ("instruction", "input", "output") if self._shape.alpaca else self._words

    def result(self) -> dict[str, Any]:
        accepted = self._accepted
        again = {key: n for key, n in self._outputs.items() if n > 1}
        return {
            "accepted_examples": [
                row for _, _, row in sorted(self._shown, key=lambda kept: kept[1])
            ],
            "unit": "words" if self._language.spaced else "characters",
            "openings": [[shorten(text, 60), n] for text, n in self._first.most_common(OPENINGS)],
            "words": {name: _lengths(self._words.get(name, [])) for name in self._texts()},
            "share_with_input": round(self._with_input / accepted, 4)
            if accepted and self._shape.alpaca
            else None,
            "rouge_l": {
                "threshold": self._rouge_threshold,
                "accepted": _scores(self._accepted_f),
                "refused": _scores(self._refused_f),
            },
            "rejected": {
                reason: {
                    "count": count,
                    "examples": [
                        e for _, _, e in sorted(self._examples[reason], key=lambda kept: kept[1])
                    ],
                }
                for reason, count in sorted(
                    self._counts.items(), key=lambda item: (-item[1], item[0])
                )
            },
            "answer": self._answer,
            "output_duplicates": {
                "rows": sum(n - 1 for n in again.values()),
                "most": [
                    {
                        "rows": n,
                        "id": self._output_example[key][0],
                        "output": self._output_example[key][1],
                    }
                    for key, n in heapq.nlargest(8, again.items(), key=lambda item: item[1])
                ],
            },
            "checks": dict(self._checks),
            "bursts": self._bursts.found(),
        }


def _rank(decision: Decision) -> int:
    """A number that follows from a row's place and is as good as drawn."""
    digest = hashlib.sha256(b"%d %d" % (decision.index, decision.position)).digest()
    return -int.from_bytes(digest[:8], "big")


def _whole(text: str) -> str:
    """A field as it is, with its lines, up to a length that nobody reads at a glance."""
    return visible(text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…")


def _add_beginning(run: RunReader, example: dict[str, Any], shape: Shape) -> None:
    """Where no row was read: what stands in the answer there."""
    if example[shape.noun]:
        return
    index, _, position = example["id"].partition(".")
    decision = run.decision(int(index), int(position))
    if decision is not None:
        text = beginning(run, decision, alpaca=shape.alpaca, most=200)
        example[shape.noun] = shorten(text, 200) or None


def _id(decision: Decision) -> str:
    return f"{decision.index}.{decision.position}"


def _example(decision: Decision, shape: Shape) -> dict[str, Any]:
    record, nearest = decision.record, decision.nearest
    return {
        "id": _id(decision),
        shape.noun: shorten(shape.told_by(record), 200) if record else None,
        "detail": shorten(decision.detail, 120),
        "nearest": None
        if nearest is None
        else {
            "text": shorten(nearest.text, 200),
            "score": round(nearest.score, 4),
            "source": shorten(nearest.source, 60),
        },
    }


def _lengths(words: Sequence[int]) -> dict[str, Any]:
    """Histogram of word counts: thirty bins up to the 99th percentile, the rest in the last."""
    if not words:
        return {"mean": None, "median": None, "max": None, "bins": []}
    values = np.array(words)
    most = max(int(np.percentile(values, 99)), 1)
    width = max(1, -(-(most + 1) // 30))
    counts = np.bincount(np.minimum(values // width, most // width))
    return {
        "mean": round(float(values.mean()), 1),
        "median": float(np.median(values)),
        "max": int(values.max()),
        "bins": [
            {"from": i * width, "to": (i + 1) * width, "rows": int(n)} for i, n in enumerate(counts)
        ],
    }


def _scores(scores: Iterable[float]) -> list[int]:
    """Histogram over [0, 1] in ``SCORE_BINS`` equal bins."""
    values = np.clip(np.fromiter(scores, np.float64), 0, 1 - 1e-9)
    return np.bincount((values * SCORE_BINS).astype(int), minlength=SCORE_BINS).tolist()  # type: ignore[no-any-return]


QUERIES = 2000
"""Rows whose nearest neighbour by meaning is looked for, among all rows."""


def _cosines(run: RunReader, refused: Sequence[float]) -> dict[str, Any] | None:
    """Cosine to the nearest other row, of a sample; None where the run has no vectors."""
    best = nearest_cosines(run)
    if best is None:
        return None
    return {
        "threshold": run.manifest.decision.get("semantic_threshold"),
        "compared": len(best),
        "accepted": _scores(best.tolist()),
        "refused": _scores(refused),
    }


def nearest_cosines(run: RunReader) -> NDArray[np.float32] | None:
    """The cosine to its nearest other row of each of a sample of the rows; None where the run has
    no vectors.
    """
    total = run.counts().vectors
    if not total:
        return None
    step = max(1, total // QUERIES)
    numbers, sample = [], []
    for number, vector in enumerate(v for _, v in run.accepted(vectors=True) if v is not None):
        if number % step == 0:
            numbers.append(number)
            sample.append(vector)
    queries = _unit(np.stack(sample))
    best = np.full(len(queries), -1.0, np.float32)
    vectors = enumerate(v for _, v in run.accepted(vectors=True) if v is not None)
    while block := list(islice(vectors, 4096)):
        cosines = queries @ _unit(np.stack([v for _, v in block])).T
        first, last = block[0][0], block[-1][0]
        for place, number in enumerate(numbers):
            if first <= number <= last:
                cosines[place, number - first] = -1.0  # itself
        best = np.maximum(best, cosines.max(axis=1))
    return best


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), np.float32)
