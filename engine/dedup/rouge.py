"""Near-duplicates by ROUGE-L, exactly as Alpaca decides them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from rapidfuzz.distance import LCSseq

__all__ = ["Hit", "Nearest", "RougeIndex", "rouge_l", "tokenize"]

_TOKEN = re.compile("[a-z0-9]+")


@dataclass(frozen=True, slots=True)
class Hit:
    """An item of an index, and how closely it resembles the text or vector asked about."""

    item: int
    score: float


@dataclass(frozen=True, slots=True)
class Nearest:
    """The nearest items, best first (ties: the earlier item), and the mean score over all items."""

    hits: tuple[Hit, ...]
    mean: float


def tokenize(text: str) -> list[str]:
    """Lower-cased runs of ``[a-z0-9]``: ``rouge_score``'s default tokenizer, without stemming."""
    return _TOKEN.findall(text.lower())


def f_measure(lcs: int, m: int, n: int) -> float:
    """ROUGE-L F of texts of m and n tokens that share a subsequence of ``lcs`` tokens."""
    if lcs == 0:
        return 0.0
    precision, recall = lcs / m, lcs / n
    return 2 * precision * recall / (precision + recall)


def rouge_l(a: str, b: str) -> float:
    """ROUGE-L F-measure of two texts; 0 where one has no tokens."""
    x, y = tokenize(a), tokenize(b)
    return f_measure(LCSseq.similarity(x, y), len(x), len(y))


class RougeIndex:
    """Items so far, searched for the one whose ROUGE-L F to a text is highest and above ``threshold``."""

    def __init__(self, threshold: float = 0.7) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"ROUGE-L threshold must be in (0, 1], not {threshold}")
        self.threshold = threshold
        self._items: list[list[str]] = []

    def __len__(self) -> int:
        return len(self._items)

    def find(self, text: str) -> Hit | None:
        """The item with the highest F above the threshold (ties: the earliest), or None."""
        best = self.nearest(text, 1).hits
        return best[0] if best and best[0].score > self.threshold else None

    def add(self, text: str) -> int:
        """Add one text; returns its id, counted from 0."""
        self._items.append(tokenize(text))
        return len(self._items) - 1

    def nearest(self, text: str, k: int = 10) -> Nearest:
        """The k items with the highest F, and the mean F over all items (0 when there are none)."""
        x = tokenize(text)
        scores = [f_measure(LCSseq.similarity(x, y), len(x), len(y)) for y in self._items]
        best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
        mean = math.fsum(scores) / len(scores) if scores else 0.0
        return Nearest(tuple(Hit(i, scores[i]) for i in best), mean)
