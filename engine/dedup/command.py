"""``woolmill dedup``: near-duplicates out of a dataset that is there already."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import click

from engine.cli.types import FILE, PLACE, SHARE, Finite
from engine.datasets import BadRows, Dataset, OnBadRow, Row, Skip, writer
from engine.dedup.against import add_references, batches
from engine.dedup.beforehand import Checks
from engine.dedup.by_script import ByScript
from engine.dedup.cascade import Candidate, Cascade
from engine.dedup.encoder import Encoder, Precision, SentenceEncoder
from engine.dedup.explain import explain_bands
from engine.dedup.shared import SharedRuns
from engine.dedup.summary import Ids, Summary
from engine.dedup.told import Places, bad_row, decided, resembled
from engine.errors import InputError, UsageError
from engine.files import check_output, is_stream
from engine.languages import ENGLISH, LOOKED_AT, MIXED, detect, language_of
from engine.surroundings import cores

__all__ = ["dedup"]

TABLES = (".csv", ".tsv", ".parquet", ".arrow")
"""Endings of files in which all rows have the same fields."""
TOLD_EVERY_S = 10.0
"""How often a person who waits hears how far it is."""


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
    summary = Summary(cuts, how.semantic_threshold, how.borderline, Ids(rows))
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
    summary: Summary,
    bad: BadRows,
    checks: Checks,
) -> None:
    """Judge the rows in their order, and write those accepted, and what became of each."""
    index, told_at = 0, time.monotonic()
    places = Places()
    with ExitStack() as stack:
        log = stack.enter_context(writer(decisions)) if decisions else None
        bad.tell(_say, log and (lambda wrong: log(Row(dataset.path, 0, bad_row(wrong)))))
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
                    nearest = resembled(judgement, refusal, places)
                    told = {**decided(index, row, text, reason), **nearest}
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
