"""How answers are read: each format finds the named fields of rows in a text, or says why not.

    text      the whole answer
    list      lines that begin with a number or a bullet; each is an item
    tags      <name>…</name>; where a name comes again, another row begins
    regex     named groups of a pattern; each match is a row
    numbered  ``n. Label: …``, where a label or number comes again, another row begins
    json      engine.recipes.json_answers

The text has its thoughts apart already. Each format takes time in proportion to the text, save for
a pattern, which is its author's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from engine.recipes.base import Refusal

__all__ = [
    "Fields",
    "Format",
    "ListAnswer",
    "NumberedAnswer",
    "RegexAnswer",
    "TagsAnswer",
    "TextAnswer",
]

Fields = dict[str, Any]
USUAL_MOST = 20
"""Rows that are expected of an answer that may hold several."""


class Format(Protocol):
    """One way to read an answer.

    Attributes:
        names: fields that each row of an answer has; None: whatever the answer says.
        most: rows that one answer is expected to hold at most.
    """

    names: tuple[str, ...] | None
    most: int

    def read(self, text: str, cut: str | None) -> Iterator[Fields | Refusal]:
        """Rows and refusals in the order of the text. ``cut``: why its end may be missing."""

    def sample(self) -> str:
        """An answer as it is meant, for trying a recipe out."""


class TextAnswer:
    """The answer as it is, without the blanks around it."""

    names: tuple[str, ...] | None = ()
    most = 1

    def __init__(self, *, keep_cut: bool = False) -> None:
        self._keep_cut = keep_cut

    def read(self, text: str, cut: str | None) -> Iterator[Fields | Refusal]:
        if cut and not self._keep_cut:
            yield "cut_off", cut
        elif text and not text.isspace():
            yield {}

    def sample(self) -> str:
        return "Water boils at 100 degrees at sea level.\n\nHigher up, it boils sooner."


# A number is at most six digits, and only a line feed ends a line: pieces of an item keep the rest.
_ITEM = re.compile(
    r"^([ \t]*+)(?:\*\*)?(?:(?:(\()?\d{1,6}+(?:[.)](?=\s|\*|$)|[、．）](?!\d)))|([-*•])(?=[ \t]|$))[ \t]*+"
)
_BLANK_LINES = re.compile(r"\n[ \t]*+\n")
"""A line of nothing but blanks. Possessive, so that a long one takes no square of its length."""


class ListAnswer:
    """Items of a list. The first line with a marker says of which kind and how far left they all
    are; what stands below or further right belongs to an item. Words before the list are not part
    of it, nor is a paragraph of their own after it.
    """

    names: tuple[str, ...] | None = ("item",)
    most = USUAL_MOST

    def read(self, text: str, cut: str | None) -> Iterator[Fields | Refusal]:
        items = _items(text)
        if not items:
            if text and not text.isspace():
                yield (
                    ("cut_off", cut)
                    if cut
                    else ("bad_format", "no line begins with a number, - or *")
                )
            return
        for place, lines in enumerate(items, 1):
            last = place == len(items)
            if last and cut:
                yield "cut_off", cut
                return
            item = "\n".join(lines).strip()
            if last:
                item = _without_closing_words(item)
            yield {"item": item} if item else ("bad_format", f"item {place} is empty")

    def sample(self) -> str:
        return "Here are three:\n\n1. Why is the sky blue?\n2. Who built the first lighthouse,\n   and where?\n3. Name two rivers of Asia.\n"


def _items(text: str) -> list[list[str]]:
    """The lines of each item, without its marker."""
    items: list[list[str]] = []
    bullets, left = False, 0
    for line in text.split("\n"):
        found = _ITEM.match(line)
        if found is not None:
            bullet, indent = found[3] is not None, len(found[1])
            if not items:
                bullets, left = bullet, indent
            if bullet == bullets and indent <= left + 1:
                items.append([line[found.end() :].rstrip()])
                continue
        if items:
            items[-1].append(line.rstrip())
    return items


def _without_closing_words(item: str) -> str:
    """The last item up to a paragraph that is not indented, as a list ends in Markdown."""
    for blank in _BLANK_LINES.finditer(item):
        after = item[blank.end() :]
        if after[:1].strip() and not after.startswith("```"):
            return item[: blank.start()].rstrip()
    return item


class TagsAnswer:
    """``<name>…</name>`` around each field.

    Args:
        tags: the names that a row has.
        optional: further ones, which are null where they are missing.
        closed_by_stop: tags whose closing half is a stop string, which hosts leave out.
    """

    most = USUAL_MOST

    def __init__(
        self, tags: Sequence[str], optional: Sequence[str] = (), closed_by_stop: Sequence[str] = ()
    ) -> None:
        self.names: tuple[str, ...] | None = (*tags, *optional)
        self._tags = tuple(tags)
        self._optional = tuple(optional)
        self._closed_by_stop = frozenset(closed_by_stop)
        self._opening = re.compile(f"<({'|'.join(map(re.escape, self.names))})>")

    def read(self, text: str, cut: str | None) -> Iterator[Fields | Refusal]:
        if not text or text.isspace():
            return
        found, open_tag = self._found(text, ended_by_stop=cut is None)
        groups = list(_groups(found))
        yield from self._rows(groups[:-1] if open_tag and groups else groups)
        if open_tag:
            yield ("cut_off", cut) if cut else ("bad_format", f"<{open_tag}> is not closed")
        elif not groups:
            wanted = f"there is no <{self._tags[0]}>"
            yield ("cut_off", cut) if cut else ("bad_format", wanted)

    def _found(self, text: str, *, ended_by_stop: bool) -> tuple[list[tuple[str, str]], str]:
        """Names and contents in order, and a tag that is open at the end; empty: none."""
        found: list[tuple[str, str]] = []
        place = 0
        while (opening := self._opening.search(text, place)) is not None:
            name = opening[1]
            end = text.find(f"</{name}>", opening.end())
            if end < 0:
                if not ended_by_stop or name not in self._closed_by_stop:
                    return [*found, (name, "")], name
                end = len(text)
            found.append((name, text[opening.end() : end].strip()))
            place = end + len(name) + 3
        return found, ""

    def _rows(self, groups: Iterable[Fields]) -> Iterator[Fields | Refusal]:
        for number, group in enumerate(groups, 1):
            missing = [name for name in self._tags if name not in group]
            if missing:
                yield "bad_format", f"row {number} has no <{missing[0]}>"
            else:
                yield dict.fromkeys(self._optional) | group

    def sample(self) -> str:
        names = self.names or ()
        return "\n".join(f"<{name}>\nSome words for {name}.\n</{name}>" for name in names)


def _groups(found: Iterable[tuple[str, str]]) -> Iterator[Fields]:
    """Fields row by row: where a name comes again, another row begins."""
    group: Fields = {}
    for name, content in found:
        if name in group:
            yield group
            group = {}
        group[name] = content
    if group:
        yield group


class RegexAnswer:
    """Named groups of a pattern; each match is a row, and a group that took no part is null."""

    most = USUAL_MOST

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self.names: tuple[str, ...] | None = tuple(pattern.groupindex)
        self._pattern = pattern

    def read(self, text: str, cut: str | None) -> Iterator[Fields | Refusal]:
        if not text or text.isspace():
            return
        none = True
        for match in self._pattern.finditer(text):
            none = False
            if cut and not text[match.end() :].strip():
                yield "cut_off", cut
                return
            yield {
                name: None if value is None else value.strip()
                for name, value in match.groupdict().items()
            }
        if none:
            yield ("cut_off", cut) if cut else ("bad_format", "the pattern matches nothing")

    def sample(self) -> str:
        return "Score: 4\nReason: It is clear and short.\n"


class NumberedAnswer:
    """Entries of labelled parts, each label after the entry's number, as in Alpaca's lists."""

    most = USUAL_MOST

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = {label.casefold(): name_of(label) for label in labels}
        self._written = tuple(labels)
        self.names: tuple[str, ...] | None = tuple(self._labels.values())
        parts = "|".join(map(re.escape, labels))
        self._label = re.compile(
            rf"^[#* \t]*+(\d{{1,6}}+)[.)][ \t*]*+({parts})[ \t*]*+[:：]",
            re.MULTILINE | re.IGNORECASE,
        )

    def read(self, text: str, cut: str | None) -> Iterator[Fields | Refusal]:
        if not text or text.isspace():
            return
        found = list(self._label.finditer(text))
        if not found:
            wanted = f"there is no label such as 1. {self._written[0]}:"
            yield ("cut_off", cut) if cut else ("bad_format", wanted)
            return
        ends = [*(match.start() for match in found[1:]), len(text)]
        entries: list[tuple[str, Fields]] = []
        for match, end in zip(found, ends, strict=True):
            number, name = match[1], self._labels[match[2].casefold()]
            if not entries or entries[-1][0] != number or name in entries[-1][1]:
                entries.append((number, {}))
            entries[-1][1][name] = text[match.end() : end].strip().strip("#").strip()
        for place, (number, entry) in enumerate(entries, 1):
            missing = [label for label in self._written if name_of(label) not in entry]
            if cut and place == len(entries):
                yield "cut_off", cut
            elif missing:
                yield "bad_format", f"entry {number} has no {missing[0]}"
            else:
                yield entry

    def sample(self) -> str:
        return "###\n".join(
            "".join(f"{number}. {label}: Some words for it.\n" for label in self._written)
            for number in (1, 2)
        )


def name_of(label: str) -> str:
    """A label as a field's name."""
    return re.sub(r"\W+", "_", label).strip("_").lower()
