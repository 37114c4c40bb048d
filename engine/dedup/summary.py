"""What ``woolmill dedup`` says at its end: how many rows came to what, and what to look at."""

from __future__ import annotations

import heapq
import json
from collections import Counter
from pathlib import Path

from engine.datasets import Compared, Dataset, Row
from engine.dedup.beforehand import EMPTY, FirstPlaces, Refusal
from engine.dedup.by_script import ByScript
from engine.dedup.cascade import COMPARED_WITH_ALL, Judgement
from engine.dedup.encoder import MULTILINGUAL
from engine.dedup.explain import one_line
from engine.dedup.shared import SharedRuns
from engine.languages import ENGLISH, has_tokens, language_of

__all__ = ["Ids", "Summary"]

EXAMPLES = 3
"""Pairs nearest to a threshold, on either side of it, that the summary shows for a person to judge
it by."""
ID_SHOWN = 40
"""Characters of an id that are shown."""


class Summary:
    """Counts, and the decisions that a slightly different threshold would have turned.

    What is turned is counted one decision at a time: a row that another threshold lets in, or keeps
    out, would go on to change the decisions after it.
    """

    def __init__(self, cuts: ByScript, semantic: float, band: float, ids: Ids) -> None:
        self.ids = ids
        self._cuts = cuts
        self._thresholds = {
            "ROUGE-L of characters": cuts.characters.threshold,
            "ROUGE-L": cuts.latin.threshold,
            "meaning": semantic,
        }
        self._band = band
        self.compared: Compared | None = None
        self.against: list[tuple[Path, Compared]] = []
        self.shared: SharedRuns | None = None
        """Their runs of words, where these are looked for."""
        self._reasons: Counter[str] = Counter()
        self.tells_cut = False
        """Whether to say what ``--language auto`` took, where that is not plain."""
        self.drops_empty = False
        """Rows with nothing to compare are left out."""
        self._alone = 0
        """Rows of scripts without spaces among those that are cut by script."""
        self.references_unreadable = 0
        self.is_past_neighbours = False
        """Rows were accepted of which the nearest is not known."""
        self._empty = self._wordless = self._unreadable = 0
        self._by_references: Counter[str] = Counter()
        """Rows refused for one of a file of ``--against``."""
        self.bad_rows = 0
        """Left out, as they could not be read."""
        self._near: dict[tuple[str, bool], list[tuple[float, float, str, str]]] = {}
        """The closest to the threshold, as a heap: (-distance, score, text, its nearest)."""
        self._turned: Counter[tuple[str, bool]] = Counter()

    def add(self, text: str, judgement: Judgement | None, refusal: Refusal | None) -> str | None:
        """Count a row, which was refused beforehand or else judged; returns why it is refused, None
        where it is kept.
        """
        reason = self._count(text, judgement) if refusal is None else refusal.reason
        self._reasons[reason or "accepted"] += 1
        nearest = refusal or (None if judgement is None else judgement.nearest)
        if reason is not None and nearest is not None:
            kind, _, place = nearest.source.partition(":")
            if kind == "against":
                self._by_references[place.rpartition(":")[0]] += 1
        return reason

    def _count(self, text: str, judgement: Judgement | None) -> str | None:
        if judgement is None:
            self._empty += 1
            return EMPTY if self.drops_empty else None
        cut = self._cuts.of(text)
        self._wordless += not has_tokens(text, cut.language)
        is_alone = cut != self._cuts.latin and cut == self._cuts.characters
        self._alone += is_alone
        self._unreadable += judgement.unreadable
        nearest = judgement.nearest
        rouge = "ROUGE-L of characters" if is_alone else "ROUGE-L"
        if judgement.accepted:
            measured = ((rouge, nearest), ("meaning", judgement.nearest_meaning))
        else:
            measured = (
                (rouge, nearest if judgement.reason == "duplicate_rouge" else None),
                ("meaning", nearest if judgement.reason == "duplicate_semantic" else None),
            )
        for name, neighbour in measured:
            if neighbour is None:
                continue
            distance = abs(neighbour.score - self._thresholds[name])
            if distance <= self._band:
                key = (name, judgement.accepted)
                self._turned[key] += 1
                closest = self._near.setdefault(key, [])
                pair = (-distance, neighbour.score, text, neighbour.text)
                if pair not in closest:  # the same two texts may come again
                    heapq.heappush(closest, pair)
                if len(closest) > EXAMPLES:
                    heapq.heappop(closest)
        return judgement.reason

    @property
    def so_far(self) -> str:
        rows = sum(self._reasons.values())
        return f"{rows:,} rows, {self._reasons['accepted']:,} accepted"

    def __str__(self) -> str:
        lines = [self.so_far]
        lines += [
            f"{count:>9,}  {reason}" + f": nothing stands in {self.compared}" * (reason == EMPTY)
            for reason, count in self._reasons.most_common()
            if reason != "accepted"
        ]
        lines += [
            f"{count:>9,}  of these for a row of {path}"
            for path, count in sorted(self._by_references.items())
        ]
        if self.bad_rows:
            lines.append(f"{self.bad_rows:>9,}  bad rows besides, left out; --decisions names all")
        if told := str(self.ids):
            lines.append(told)
        if self._empty and not self.drops_empty:
            lines.append(
                f"{self._empty:>9,}  kept without a comparison: nothing stands in {self.compared}; "
                "--on-empty drop leaves them out"
            )
        if self._wordless:
            what = "letter or digit: compared by the same text alone"
            if self._cuts.characters.language == ENGLISH:
                what = "word in English: no ROUGE-L; --language mul compares every script"
            lines.append(f"{self._wordless:>9,}  without any {what}")
        if unreadable := self._unreadable + self.references_unreadable:
            lines.append(
                f"{unreadable:>9,}  not compared by meaning: the embedding model cannot read them;"
                f" give --semantic-model one that can, for example {MULTILINGUAL}"
            )
        if self.is_past_neighbours:
            lines.append(
                f"of rows beyond the first {COMPARED_WITH_ALL:,} the nearest by ROUGE-L is not "
                "looked for where they are accepted; below they do not count"
            )
        if self.tells_cut and (cut := _how_cut(self._cuts, self._alone)):
            lines.append(cut)
        if self.compared is not None and self.compared.chosen:
            lines.append(f"compared by {self.compared}; name other fields with --field")
        lines += [
            f"against {path} by {compared}"
            for path, compared in self.against
            if self.compared is not None and compared.fields != self.compared.fields
        ]
        if self.against and self.shared is None:
            lines.append(
                "--against compares whole texts: a question inside a longer row, or a run of words "
                "in common, is not looked for; --against-words 13 does"
            )
        elif self.shared is not None and self.shared.short:
            lines.append(
                f"{self.shared.short:>9,}  of the rows of --against have fewer than "
                f"{self.shared.words} words: compared as whole texts alone"
            )
        for (name, accepted), count in sorted(self._turned.items()):
            threshold = self._thresholds[name]
            turned = max(0.0, threshold - self._band) if accepted else threshold + self._band
            verb = "refused" if accepted else "accepted"
            lines.append(
                f"at {name} {turned:.2f} instead of {threshold:.2f}, {count:,} more {verb}:"
            )
            for _, score, text, other in sorted(self._near[name, accepted], reverse=True):
                lines += [f"    {score:.3f}  {one_line(text)}", f"           {one_line(other)}"]
        return "\n".join(lines)


class Ids:
    """Rows with the id of an earlier one."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._places = FirstPlaces()
        """Lines; rows, where there are several files."""
        self._count = 0
        self._example = ""

    def note(self, row: Row, number: int) -> None:
        """Look at the next row; ``number`` is counted from 1."""
        value = row.values.get("id")
        place = number if self._dataset.has_several_files else row.line
        first = self._places.before(value, place)
        if first is None:
            return
        self._count += 1
        if not self._example:
            name = one_line(json.dumps(value, ensure_ascii=False, default=str), ID_SHOWN)
            self._example = f"{name} on {self._unit}s {first:,} and {place:,}"

    @property
    def _unit(self) -> str:
        """What a place counts."""
        form = self._dataset.form
        has_lines = form is not None and form.kind in ("lines", "csv")
        return "line" if has_lines and not self._dataset.has_several_files else "row"

    def __str__(self) -> str:
        """Empty where no id comes twice."""
        if not self._count:
            return ""
        return (
            f"{self._count:>9,}  with the id of an earlier row, as {self._example}; tell them "
            f"apart by their {self._unit}, or leave them out: --unique-id id"
        )


def _how_cut(cuts: ByScript, alone: int) -> str:
    """What ROUGE-L compares, where it is not what Alpaca compared; ``alone`` rows are of scripts
    without spaces.
    """
    spoken = language_of(cuts.latin.language)
    if cuts.latin == cuts.characters and spoken.code != ENGLISH:
        what = f"{cuts.latin.unit} above {cuts.latin.threshold}, as the rows are in {spoken.name}"
    elif alone:
        words, characters = cuts.words.threshold, cuts.characters.threshold
        what = (
            f"words above {words}, and in {alone:,} rows whose script sets no spaces of characters "
            f"above {characters}"
        )
    elif spoken.code != ENGLISH:
        what = f"words above {cuts.latin.threshold}, as the rows are in {spoken.name}"
    else:
        return ""
    return f"by ROUGE-L of {what}; else name a --language"
