"""``woolmill dedup``: near-duplicates out of a dataset that is there already."""

from __future__ import annotations

import heapq
import json
import random
import time
from array import array
from bisect import bisect_right
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import click

from engine.cli.types import FILE, PLACE, SHARE, Finite
from engine.datasets import BadRowError, BadRows, Compared, Dataset, OnBadRow, Row, Skip, writer
from engine.dedup.against import add_references, batches
from engine.dedup.beforehand import EMPTY, Checks, FirstPlaces, Refusal
from engine.dedup.by_script import ByScript
from engine.dedup.cascade import COMPARED_WITH_ALL, Candidate, Cascade, Judgement
from engine.dedup.encoder import MULTILINGUAL, Encoder, Precision, SentenceEncoder
from engine.dedup.explain import explain_bands, one_line
from engine.dedup.shared import SharedRuns
from engine.dedup.texts import Texts
from engine.errors import InputError, UsageError
from engine.files import check_output, is_stream
from engine.languages import ENGLISH, LOOKED_AT, MIXED, detect, has_tokens, language_of
from engine.surroundings import cores

__all__ = ["dedup"]

EXAMPLES = 3
"""Pairs nearest to a threshold, on either side of it, that the summary shows for a person to judge
it by."""
ID_SHOWN = 40
"""Characters of an id that are shown."""
TABLES = (".csv", ".tsv", ".parquet", ".arrow")
"""Endings of files in which all rows have the same fields."""
TOLD_EVERY_S = 10.0
"""How often a person who waits hears how far it is."""
"""An option that names a file to write; one for a folder would only fail at the end."""
"""A similarity in (0, 1]. At 0 any two texts with a word in common would be duplicates."""


OnEmpty: TypeAlias = Literal["keep", "drop"]
"""What becomes of a row with nothing to compare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measures:
    """What rows are compared by, and must pass beforehand; the options of the same names."""

    rouge_threshold: float | None
    no_rouge: bool
    semantic_threshold: float
    no_semantic: bool
    semantic_model: str | None
    semantic_url: str | None
    semantic_key_env: str | None
    insecure_http: bool
    semantic_precision: Precision
    borderline: float
    require: tuple[str, ...]
    unique_id: str | None
    against_words: int | None

    def encoder(self) -> Encoder:
        """What embeds: a model here, or a server's."""
        if self.semantic_url is None:
            return SentenceEncoder(self.semantic_model, precision=self.semantic_precision, gpu=True)
        if self.semantic_precision != "float32":
            raise UsageError("--semantic-precision goes with models on this machine")
        from engine.embeddings.served import encoder_at

        return encoder_at(
            self.semantic_url,
            model=self.semantic_model,
            key_env=self.semantic_key_env,
            insecure_http=self.insecure_http,
            note=lambda line: click.echo(line, err=True),
        )


@click.command()
@click.argument("datasets", type=PLACE, nargs=-1, required=True)
@click.option("-o", "--output", type=FILE, help="Where the accepted rows go.")
@click.option("--decisions", type=FILE, help="JSON Lines: what became of each row, and why.")
@click.option("--overwrite", is_flag=True, help="Replace outputs that are there.")
@click.option("--field", "fields", multiple=True,
              help="What is compared; may be given several times. Of a chat, the user's first turn "
              "is.  [default: instruction, messages, prompt or the like]")  # fmt: skip
@click.option("--against", type=PLACE, multiple=True,
              help="Rows to compare with, never written; may be given several times. Whole texts "
              "are compared: a question inside a longer prompt, or in a later turn of a chat, is "
              "found by --against-words alone.")  # fmt: skip
@click.option("--against-words", type=click.IntRange(min=2), metavar="N",
              help="Refuse also a row of which any text, of whatever field or turn, has a run of N "
              "words in common with a row of --against; characters count as words where a script "
              "sets no spaces. 13 is usual, 8 is strict.")  # fmt: skip
@click.option("--language", default="auto", show_default=True, metavar="CODE",
              help="What the texts are written in: en, zh, ja, …; mul: several. auto looks at rows "
              "from all over the dataset; those of a mixed one go by their script.")  # fmt: skip
@click.option("--rouge-threshold", type=SHARE,
              help="Refuse above this ROUGE-L F, in floats as Alpaca has it: a tie may fall either "
              "way.  [default: 0.7; 0.75 by characters]")  # fmt: skip
@click.option("--no-rouge", is_flag=True, help="Do not compare by ROUGE-L.")
@click.option("--semantic-threshold", type=SHARE, default=0.9, show_default=True,
              help="Refuse above this cosine of the embeddings.")  # fmt: skip
@click.option("--no-semantic", is_flag=True, help="Do not compare by meaning: needs no model.")
@click.option("--semantic-model", metavar="MODEL",
              help="A sentence-transformers model, or one that --semantic-url serves.  "
              "[default: all-MiniLM-L6-v2, or the one served]")  # fmt: skip
@click.option("--semantic-url", metavar="URL",
              help="Server that embeds: OpenAI's /v1/embeddings, as of vLLM.")  # fmt: skip
@click.option("--semantic-key-env", metavar="NAME",
              help="Environment variable with the key of --semantic-url.")  # fmt: skip
@click.option("--insecure-http", is_flag=True,
              help="Send a key over plain http to another machine.")  # fmt: skip
@click.option("--semantic-precision", type=click.Choice(get_args(Precision)), default="float32",
              show_default=True, help="bfloat16: twice as fast on CPUs with AMX.")  # fmt: skip
@click.option("--borderline", type=Finite(0, 0.5), default=0.05, show_default=True,
              help="Count and show decisions so close to a threshold.")  # fmt: skip
@click.option("--on-bad-row", type=click.Choice(get_args(OnBadRow)), default="stop",
              show_default=True, help="What a row that cannot be read does; skip leaves it out of "
              "the output, names it and counts it.")  # fmt: skip
@click.option("--on-empty", type=click.Choice(get_args(OnEmpty)), default="keep",
              show_default=True, help="What becomes of a row whose compared text is empty; drop "
              "leaves it out of the output and counts it.")  # fmt: skip
@click.option("--require", multiple=True, metavar="FIELD",
              help="Leave out rows with nothing in this field, before they are compared: a row "
              "without an output keeps none out. May be given several times.")  # fmt: skip
@click.option("--unique-id", metavar="FIELD",
              help="Leave out rows with the same value in this field as an earlier row, before "
              "they are compared.")  # fmt: skip
@click.option("--explain", is_flag=True,
              help="Decide nothing; show what pairs look like, by score.")  # fmt: skip
def dedup(
    datasets: tuple[Path, ...],
    output: Path | None,
    decisions: Path | None,
    overwrite: bool,
    fields: tuple[str, ...],
    against: tuple[Path, ...],
    language: str,
    on_bad_row: OnBadRow,
    on_empty: OnEmpty,
    explain: bool,
    **measures: Any,
) -> None:
    """Leave out the near-duplicates of a dataset, or of several put together in their order.

    It may be JSON Lines, JSON, CSV, Parquet, gzip of these, a run's folder or a folder of data
    files; its content tells. Several are all of one form, and have the same fields. Each row is
    compared with all rows kept before it: the same text, then ROUGE-L, then meaning. ROUGE-L
    compares words, and characters where a script sets no spaces between words.

    \b
    woolmill dedup data.jsonl -o unique.jsonl --decisions why.jsonl
    woolmill dedup one.jsonl two.jsonl -o both.jsonl
    woolmill dedup data.parquet -o clean.parquet --against benchmark.jsonl --no-semantic
    woolmill dedup data.jsonl --explain
    """
    if explain and (output or decisions or against):
        raise UsageError("--explain decides nothing: leave out -o, --decisions and --against")
    if output is None and decisions is None and not explain:
        raise UsageError("nothing to write: give -o, --decisions, or --explain")
    if decisions is not None and decisions.name.lower().removesuffix(".gz").endswith(TABLES):
        raise UsageError(
            f"{decisions}: decisions are JSON Lines, as they differ in their fields; give "
            "--decisions a name that ends in .jsonl"
        )
    how = _Measures(**measures)
    if how.against_words is not None and not against:
        raise UsageError("--against-words looks for runs of words of rows; name these by --against")
    written = [path for path in (output, decisions) if path is not None]
    for path in written:
        check_output(path, overwrite=overwrite, inputs=(*datasets, *against))
    if len(written) == 2 and written[0].absolute() == written[1].absolute():
        raise UsageError(f"{written[0]}: -o and --decisions are the same file; give two names")
    bad = BadRows(on_bad_row)
    if language == "auto":
        chosen = language_of_rows(Dataset(*datasets, skip=bad.beforehand), fields, bad.beforehand)
    else:
        chosen = _known(language)
    threshold = how.rouge_threshold or language_of(chosen).rouge_threshold
    cuts = ByScript.alike(chosen, threshold)
    if language == "auto" and chosen in (ENGLISH, MIXED):
        cuts = ByScript.each(chosen, how.rouge_threshold)
    encoder: Encoder | None = None
    if not how.no_semantic:
        encoder = how.encoder()
    rows = Dataset(*datasets, skip=bad)
    if explain:
        bad.tell(_say)
        explain_bands(rows, fields, None if how.no_rouge else cuts, encoder, skip=bad)
        return
    cascade = Cascade(
        rouge_threshold=None if how.no_rouge else threshold,
        semantic_threshold=None if how.no_semantic else how.semantic_threshold,
        encoder=encoder,
        neighbours=0 if how.no_rouge else 1,
        margin=how.borderline,
        language=chosen,
        threads=cores(),
        by_script=None if how.no_rouge else cuts,
    )
    summary = _Summary(cuts, how.semantic_threshold, how.borderline, _Ids(rows))
    summary.tells_cut = language == "auto" and not how.no_rouge
    summary.drops_empty = on_empty == "drop"
    shared = None if how.against_words is None else SharedRuns(how.against_words)
    for path in against:
        summary.against.append((path, add_references(cascade, path, fields, shared)))
    if shared is not None and not len(shared):
        raise InputError(
            f"--against: no row there has {shared.words} words; give --against-words a lower number"
        )
    summary.shared = shared
    checks = Checks(how.require, shared, how.unique_id)
    _decide(cascade, rows, fields, output, decisions, summary, bad, checks)
    summary.references_unreadable = cascade.unreadable
    summary.is_past_neighbours = cascade.is_past_neighbours
    summary.bad_rows = bad.count
    click.echo(summary, err=any(map(is_stream, written)))


def language_of_rows(dataset: Dataset, fields: tuple[str, ...], skip: Skip) -> str:
    """What a dataset is written in, by an even draw of its rows (Vitter's algorithm R): the first
    ones may be of another language than the rest.
    """
    rng, drawn = random.Random(0), list[str]()
    rows = batches(dataset, fields, skip=skip)
    for number, text in enumerate(chain.from_iterable(texts for _, texts, _ in rows)):
        if number < LOOKED_AT:
            drawn.append(text)
        elif (place := rng.randrange(number + 1)) < LOOKED_AT:
            drawn[place] = text
    return detect(drawn)


def _known(code: str) -> str:
    try:
        return language_of(code).code
    except ValueError as exc:
        raise UsageError(f"--language: {exc}") from exc


def _decide(
    cascade: Cascade,
    dataset: Dataset,
    fields: tuple[str, ...],
    output: Path | None,
    decisions: Path | None,
    summary: _Summary,
    bad: BadRows,
    checks: Checks,
) -> None:
    """Judge the rows in their order, and write those accepted, and what became of each."""
    index, told_at = 0, time.monotonic()
    places = _Places()
    with ExitStack() as stack:
        log = stack.enter_context(writer(decisions)) if decisions else None
        bad.tell(_say, log and (lambda wrong: log(Row(dataset.path, 0, _bad_row(wrong)))))
        keep = None
        for rows, texts, compared in batches(dataset, fields, skip=bad):
            summary.compared = compared
            if keep is None and output is not None:
                keep = stack.enter_context(writer(output, dataset))
            refusals = [checks(row) for row in rows]
            candidates = [
                Candidate(text=text, source=f"row:{index + i}")
                for i, (text, refusal) in enumerate(zip(texts, refusals, strict=True))
                if text and refusal is None
            ]
            judgements = iter(cascade.judge(candidates))
            for row, text, refusal in zip(rows, texts, refusals, strict=True):
                if refusal is None:
                    summary.ids.note(row, index + 1)
                judgement = next(judgements) if text and refusal is None else None
                reason = summary.add(text, judgement, refusal)
                if keep is not None and reason is None:
                    keep(row)
                if log is not None:
                    places.append(row)
                    resembled = _nearest(judgement, refusal, places)
                    told = {**_row(index, row, text, reason), **resembled}
                    log(Row(dataset.path, row.line, told))
                index += 1
            if time.monotonic() - told_at >= TOLD_EVERY_S:
                told_at = time.monotonic()
                _say(summary.so_far)
        if not index and bad.count:
            raise InputError(
                f"{dataset}: none of its {bad.count:,} rows can be compared, the first for "
                "the reasons above; check the file and --field"
            )
        if index and checks.unseen:
            name, option = min(checks.unseen.items())
            raise InputError(
                f"{dataset}: no row has the field {name!r} of {option}; the last row has "
                f"{', '.join(row.values) or 'none'}"
            )
        if keep is None and output is not None:  # no rows at all
            stack.enter_context(writer(output, dataset))


def _say(message: str) -> None:
    click.echo(f"woolmill: {message}", err=True)


def _bad_row(wrong: BadRowError) -> dict[str, Any]:
    values = wrong.values or {}
    text = {"file": str(wrong.path), "line": wrong.line, "id": values.get("id"), "text": wrong.raw}
    return {"index": None, **text, "accepted": False, "reason": "bad_row", "error": str(wrong)}


class _Ids:
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


class _Places:
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


def _row(index: int, row: Row, text: str, reason: str | None) -> dict[str, Any]:
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


def _nearest(
    judgement: Judgement | None, refusal: Refusal | None, places: _Places
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


class _Summary:
    """Counts, and the decisions that a slightly different threshold would have turned.

    What is turned is counted one decision at a time: a row that another threshold lets in, or keeps
    out, would go on to change the decisions after it.
    """

    def __init__(self, cuts: ByScript, semantic: float, band: float, ids: _Ids) -> None:
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
