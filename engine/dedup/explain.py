"""Thresholds by sight: what pairs of texts look like at each score."""

from __future__ import annotations

import click

from engine.datasets import Dataset, Skip
from engine.dedup.against import batches
from engine.dedup.by_script import ByScript, RougeByScript
from engine.dedup.encoder import Encoder, readable
from engine.dedup.long import LONG
from engine.dedup.rouge import tokenize
from engine.dedup.semantic import SemanticIndex

__all__ = ["explain_bands"]

ROWS = 10_000
"""Rows that are looked at: enough for examples, and a matter of a minute with the embedding."""
EXAMPLES = 2
"""Pairs that are shown of each band of scores."""
LOWEST = 0.5
"""Pairs below are not shown. They have little in common, and no threshold in use is as low."""

Pairs = list[tuple[float, str, str]]


def explain_bands(
    dataset: Dataset,
    fields: tuple[str, ...],
    cuts: ByScript | None,
    encoder: Encoder | None,
    skip: Skip | None = None,
) -> None:
    """Print, for each band of scores, how many rows have their nearest there, and examples."""
    compared, found = None, list[str]()
    for _, batch, compared in batches(dataset, fields, skip=skip):  # noqa: B007
        found += batch
        if len(found) >= ROWS:
            break
    count, texts = len(found[:ROWS]), list(filter(None, found[:ROWS]))
    click.echo(
        f"the first {count:,} rows of {dataset}, each with the nearest row before it by {compared}"
    )
    if cuts is not None:
        _show(f"ROUGE-L of {_units(cuts, texts)}", _by_rouge(texts, cuts))
    if encoder is not None:
        _show("meaning (cosine)", _by_meaning(texts, encoder))


def _units(cuts: ByScript, texts: list[str]) -> str:
    """What is compared, and above which F a row is refused."""
    found = sorted({cut[1:] for cut in map(cuts.of, texts or [""])}, reverse=True)
    return ", and of ".join(f"{unit}, refused above {threshold}" for unit, threshold in found)


def _by_rouge(texts: list[str], cuts: ByScript) -> Pairs:
    index = RougeByScript(cuts)
    index.extend(texts)
    sizes = [len(tokenize(text, cuts.of(text).language)) for text in texts]
    if longer := sum(size > LONG for size in sizes):
        click.echo(f"{longer:,} rows of more than {LONG:,} tokens have no ROUGE-L shown")
    if wordless := sizes.count(0):
        click.echo(f"{wordless:,} rows without any word have no ROUGE-L")
    nearest = index.neighbours(range(len(texts)), k=1)
    return [
        (hit.score, text, texts[hit.item])
        for text, near in zip(texts, nearest, strict=True)
        for hit in near.hits
    ]


def _by_meaning(texts: list[str], encoder: Encoder) -> Pairs:
    index = SemanticIndex(encoder.dimension)
    items: list[str] = []
    pairs: Pairs = []
    known = [text for text, can in zip(texts, readable(encoder, texts), strict=True) if can]
    if unreadable := len(texts) - len(known):
        click.echo(f"{unreadable:,} rows that the embedding model cannot read have no cosine")
    for text, vector in zip(known, encoder.encode(known), strict=True):
        if index.problem(vector) is None:
            above = index.above(vector, LOWEST)
            pairs += [(hit.score, text, items[hit.item]) for hit in above[:1]]
            index.add(vector)
            items.append(text)
    return pairs


def _show(name: str, pairs: Pairs) -> None:
    """Bands of a twentieth, with the examples in the middle of each."""
    bands: dict[int, Pairs] = {}
    for pair in pairs:
        if pair[0] >= LOWEST:
            bands.setdefault(min(int(pair[0] * 20 + 1e-9), 20), []).append(pair)
    click.echo(f"\n{name}")
    for band, inside in sorted(bands.items()):
        upper = "" if band == 20 else f" to {(band + 1) / 20:.2f}"
        click.echo(f"  {band / 20:.2f}{upper}: {len(inside):,} rows")
        inside.sort()
        step = max(1, len(inside) // EXAMPLES)
        for score, text, other in inside[step // 2 :: step][:EXAMPLES]:
            click.echo(f"    {score:.3f}  {one_line(text)}\n           {one_line(other)}")


def one_line(text: str, width: int = 88) -> str:
    """For the person: without control characters, shortened."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if len(line) <= width else line[: width - 1] + "…"
