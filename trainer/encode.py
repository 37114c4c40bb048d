"""Text to token ids, once for a whole row, with the learned part found by its characters.

Pieces of a row that are tokenised apart give other tokens than the row: SentencePiece begins each
with a space of its own. So a rendered chat is tokenised as a server does it, in one piece, and a
token is learned if its characters are. Two things break a row up: a token that would lie across
the border of what is learned, which no model ever generates, and text of a record that spells a
special token, which must become ordinary characters. What follows such a break is tokenised without
the space.

The price: copies of the tokenizer, which for the largest vocabularies take a second to make.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from trainer.template import Piece

__all__ = ["RowEncoder"]

_Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Part:
    """A stretch of a row that is tokenised at once."""

    text: str
    learned: list[_Span]
    literal: bool
    first: bool
    """Nothing of the row stands before it."""


class RowEncoder:
    """Tokenises rows of pieces for one fast tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        plan = json.loads(tokenizer.backend_tokenizer.to_str())
        # The post-processor adds tokens, which a template does itself, and trims offsets.
        plan |= {"truncation": None, "padding": None, "post_processor": None}
        self._whole = Tokenizer.from_str(json.dumps(plan))
        plan["normalizer"] = _without_space(plan["normalizer"])
        plan["pre_tokenizer"] = _without_space(plan["pre_tokenizer"])
        self._inner = Tokenizer.from_str(json.dumps(plan))
        self._literal = Tokenizer.from_str(json.dumps(plan))
        self._literal.encode_special_tokens = True
        added = sorted((t["content"] for t in plan["added_tokens"]), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, added)) or "(?!)")

    def __call__(self, rows: Sequence[list[Piece]]) -> list[tuple[list[int], list[bool]]]:
        """(ids, whether each is learned) of every row."""
        parts = [_parts(row) for row in rows]
        simple = [p[0] for p in parts if len(p) == 1 and not p[0].literal]
        encoded = iter(self._whole.encode_batch([p.text for p in simple], add_special_tokens=False))
        out = []
        for row in parts:
            if len(row) == 1 and not row[0].literal:
                result = self._masked(row[0], next(encoded))
            else:
                result = [self._part(part) for part in row]
            ids, learned = zip(*result, strict=True) if result else ((), ())
            out.append(([*itertools.chain(*ids)], [*itertools.chain(*learned)]))
        return out

    def _part(self, part: _Part) -> tuple[list[int], list[bool]]:
        if part.literal:
            ids = self._literal.encode(part.text, add_special_tokens=False).ids
            return ids, [bool(part.learned)] * len(ids)
        out: tuple[list[int], list[bool]] = ([], [])
        for piece in self._continued(part):
            how = self._whole if piece.first else self._inner
            for ids, learned in self._masked(
                piece, how.encode(piece.text, add_special_tokens=False)
            ):
                out[0].extend(ids)
                out[1].extend(learned)
        return out

    def _continued(self, part: _Part) -> list[_Part]:
        """``part`` as what must not begin with a space, and the rest from its first added token,
        behind which the tokenizer itself says whether there is one.
        """
        match = None if part.first else self._added.search(part.text)
        if match is None or not match.start():
            return [part if match is None else _cut(part, 0, len(part.text), first=True)]
        return [
            _cut(part, 0, match.start(), first=False),
            _cut(part, match.start(), len(part.text), first=True),
        ]

    def _masked(self, part: _Part, encoding: Any) -> list[tuple[list[int], list[bool]]]:
        """The tokens of ``part``; cut first where a token lies across a border."""
        starts = {start for start, _ in part.learned}
        ends = {end for _, end in part.learned}
        across = sorted(
            {b for b in starts | ends for s, e in encoding.offsets if s < b < e
             # White space behind an answer's end is not generated: it may belong to what follows.
             and (b in starts or part.text[s:b].strip())}
        )  # fmt: skip
        if across:
            edges = [0, *across, len(part.text)]
            cuts = [
                _cut(part, a, b, first=part.first and not a) for a, b in itertools.pairwise(edges)
            ]
            return [self._part(cut) for cut in cuts if cut.text]
        learned = [
            any(start <= s and e <= end and s < end for start, end in part.learned)
            for s, e in encoding.offsets
        ]
        return [(encoding.ids, learned)]


def _parts(row: list[Piece]) -> list[_Part]:
    """``row`` joined, but for its literals."""
    out: list[_Part] = []
    for literal, pieces in itertools.groupby(row, key=lambda piece: piece.literal):
        if literal:
            out += [
                _Part(p.text, [(0, len(p.text))] if p.learned else [], True, not out)
                for p in pieces
            ]
            continue
        text, learned = "", []
        for piece in pieces:
            if piece.learned:
                learned.append((len(text), len(text) + len(piece.text)))
            text += piece.text
        out.append(_Part(text, learned, False, not out))
    return out


def _cut(part: _Part, start: int, end: int, *, first: bool) -> _Part:
    spans = [(max(a, start) - start, min(b, end) - start) for a, b in part.learned]
    kept = [(a, b) for a, b in spans if a < b]
    return _Part(part.text[start:end], kept, part.literal, first)


def _without_space(component: Any) -> Any:
    """A normalizer or pre-tokenizer that puts no space before a text."""
    if not isinstance(component, dict):
        return component
    kind = component.get("type")
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        return component | {"prepend_scheme": "never"}
    if kind == "ByteLevel":
        return component | {"add_prefix_space": False}
    if kind == "Sequence":
        key = "normalizers" if "normalizers" in component else "pretokenizers"
        inner = [_without_space(each) for each in component[key]]
        return component | {key: [each for each in inner if each is not None]}
    return component
