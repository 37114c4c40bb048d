"""``woolmill dedup``: near-duplicates out of a dataset that is there already."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import click

from engine.datasets import Row, read_rows, writer
from engine.dedup.cascade import Candidate, Cascade, Judgement
from engine.dedup.encoder import Encoder, Precision, SentenceEncoder
from engine.dedup.explain import explain_bands, one_line
from engine.errors import UsageError

__all__ = ["dedup"]

BATCH = 256
EXAMPLES = 3
FILE = click.Path(path_type=Path, dir_okay=False)
THRESHOLD = click.FloatRange(0, 1, min_open=True)


@click.command()
@click.argument("dataset", type=FILE)
@click.option("-o", "--output", type=FILE, help="Where the accepted rows go.")
@click.option("--decisions", type=FILE, help="JSON Lines: what became of each row, and why.")
@click.option("--field", "fields", multiple=True, default=("instruction",), show_default=True,
              help="What is compared; may be given several times.")  # fmt: skip
@click.option("--against", type=FILE, multiple=True,
              help="Rows to compare with, never written; may be given several times.")  # fmt: skip
@click.option("--rouge-threshold", type=THRESHOLD, default=0.7, show_default=True,
              help="Refuse above this ROUGE-L F.")  # fmt: skip
@click.option("--no-rouge", is_flag=True, help="Do not compare by ROUGE-L.")
@click.option("--semantic-threshold", type=THRESHOLD, default=0.9, show_default=True,
              help="Refuse above this cosine of the embeddings.")  # fmt: skip
@click.option("--no-semantic", is_flag=True, help="Do not compare by meaning: needs no model.")
@click.option("--semantic-model", metavar="MODEL",
              help="A sentence-transformers model.  [default: all-MiniLM-L6-v2]")  # fmt: skip
@click.option("--semantic-precision", type=click.Choice(get_args(Precision)), default="float32",
              show_default=True, help="bfloat16: twice as fast on CPUs with AMX.")  # fmt: skip
@click.option("--borderline", type=click.FloatRange(0, 0.5), default=0.05, show_default=True,
              help="Count and show decisions so close to a threshold.")  # fmt: skip
@click.option("--explain", is_flag=True,
              help="Decide nothing; show what pairs look like, by score.")  # fmt: skip
def dedup(
    dataset: Path,
    output: Path | None,
    decisions: Path | None,
    fields: tuple[str, ...],
    against: tuple[Path, ...],
    rouge_threshold: float,
    no_rouge: bool,
    semantic_threshold: float,
    no_semantic: bool,
    semantic_model: str | None,
    semantic_precision: Precision,
    borderline: float,
    explain: bool,
) -> None:
    """Leave out the near-duplicates of a dataset: JSON Lines, JSON or Parquet.

    Each row is compared with all rows kept before it: the same text, then ROUGE-L, then meaning.

    \b
    woolmill dedup data.jsonl -o unique.jsonl --decisions why.jsonl
    woolmill dedup data.parquet -o clean.parquet --against benchmark.jsonl --no-semantic
    woolmill dedup data.jsonl --explain
    """
    encoder: Encoder | None = None
    if not no_semantic:
        encoder = SentenceEncoder(semantic_model, precision=semantic_precision)
    if explain:
        explain_bands(dataset, fields, None if no_rouge else rouge_threshold, encoder)
        return
    if output is None and decisions is None:
        raise UsageError("nothing to write: give -o, --decisions, or --explain")
    cascade = Cascade(
        rouge_threshold=None if no_rouge else rouge_threshold,
        semantic_threshold=None if no_semantic else semantic_threshold,
        encoder=encoder,
        neighbours=0 if no_rouge else 1,
        margin=borderline,
    )
    for path in against:
        for rows in _batches(path):
            cascade.add_reference(
                [row.text(fields) for row in rows],
                [f"against:{row.path}:{row.line}" for row in rows],
            )
    summary = _Summary(rouge_threshold, semantic_threshold, borderline)
    index = 0
    with ExitStack() as stack:
        keep = stack.enter_context(writer(output, like=dataset)) if output else None
        log = stack.enter_context(writer(decisions)) if decisions else None
        for rows in _batches(dataset):
            texts = [row.text(fields) for row in rows]
            candidates = [
                Candidate(instruction=text, source=f"row:{index + i}")
                for i, text in enumerate(texts)
            ]
            for row, text, judgement in zip(rows, texts, cascade.judge(candidates), strict=True):
                summary.add(text, judgement)
                if keep is not None and judgement.accepted:
                    keep(row.values)
                if log is not None:
                    log(_decision(index, judgement))
                index += 1
    click.echo(summary)


def _batches(path: Path) -> Iterator[list[Row]]:
    rows = read_rows(path)
    while batch := list(islice(rows, BATCH)):
        yield batch


def _decision(index: int, judgement: Judgement) -> dict[str, Any]:
    nearest = judgement.nearest
    decision: dict[str, Any] = {
        "index": index,
        "accepted": judgement.accepted,
        "reason": judgement.reason,
        "nearest_index": None,
        "nearest_text": None if nearest is None else nearest.text,
        "score": None if nearest is None else nearest.score,
    }
    if nearest is not None:
        kind, _, place = nearest.source.partition(":")
        if kind == "row":
            decision["nearest_index"] = int(place)
        else:
            file, _, line = place.rpartition(":")
            decision |= {"nearest_file": file, "nearest_line": int(line)}
    return decision


class _Summary:
    """Counts, and the decisions that a slightly different threshold would have turned.

    What is turned is counted one decision at a time: a row that another threshold lets in, or keeps
    out, would go on to change the decisions after it.
    """

    def __init__(self, rouge: float, semantic: float, band: float) -> None:
        self._thresholds = {"ROUGE-L": rouge, "meaning": semantic}
        self._band = band
        self._reasons: Counter[str] = Counter()
        self._near: dict[tuple[str, bool], list[tuple[float, float, str, str]]] = {}
        """The closest to the threshold, as a heap: (-distance, score, text, its nearest)."""
        self._turned: Counter[tuple[str, bool]] = Counter()

    def add(self, text: str, judgement: Judgement) -> None:
        self._reasons[judgement.reason or "accepted"] += 1
        nearest = judgement.nearest
        if judgement.accepted:
            measured = (("ROUGE-L", nearest), ("meaning", judgement.nearest_meaning))
        else:
            measured = (
                ("ROUGE-L", nearest if judgement.reason == "duplicate_rouge" else None),
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
                heapq.heappush(closest, (-distance, neighbour.score, text, neighbour.text))
                if len(closest) > EXAMPLES:
                    heapq.heappop(closest)

    def __str__(self) -> str:
        rows = sum(self._reasons.values())
        lines = [f"{rows:,} rows, {self._reasons['accepted']:,} accepted"]
        lines += [
            f"{count:>9,}  {reason}"
            for reason, count in self._reasons.most_common()
            if reason != "accepted"
        ]
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
