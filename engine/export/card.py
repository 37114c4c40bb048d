"""The dataset card of a ``datasets`` export: what it is, made by what, under which thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.export.layout import ANY_ALPACA, Layout
from engine.export.split import COSINE_LINK, Split
from engine.languages import ENGLISH, MIXED
from engine.stages import open_stages, place_in_chain
from engine.store import Counts, Manifest, RunReader

__all__ = ["card", "plain"]

SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))
"""The Hugging Face Hub's categories of size (``size_categories`` of a dataset's card), each with
the number of rows that it stays below."""


def card(
    run: RunReader,
    sizes: Mapping[Any, int],
    split: Split | None,
    layout: Layout = ANY_ALPACA,
    *,
    digest: str = "",
    choosing: str = "",
) -> str:
    """Markdown with the metadata that the Hugging Face Hub reads.

    ``choosing``: the flags that chose these rows among the accepted ones, if any did.

    ``digest`` is that of the data. ``datasets.load_dataset`` keeps what it has read in a cache, by
    the folder's last name and this metadata alone: without it, another export to a folder of the
    same name would be read as the one before.
    """
    counts, manifest = run.counts(), run.manifest
    fixed, decision = manifest.fixed, manifest.decision
    rows = sum(sizes.values())
    category = next((name for limit, name in SIZES if rows < limit), "n>1M")
    files = "\n".join(
        f"      - split: {part}\n        path: data/{part}-*.parquet"
        for part, size in sizes.items()
        if size or part == "train"
    )
    refused = "\n".join(
        f"| {plain(reason)} | {count:,} |"
        for reason, count in sorted(counts.reasons.items(), key=lambda item: (-item[1], item[0]))
    )
    stages = _stages_of(run)
    named = dict.fromkeys(name for stage in stages for name in sorted(stage.counts.models))
    models = ", ".join(map(plain, named)) or "unknown"
    rouge = f"refused above F = {decision.get('rouge_threshold')}"
    if not layout.compared:
        rouge = "not compared"
    shown = "the seed tasks" if layout.alpaca else "what it was shown"
    semantic = (
        f"refused above a cosine of {decision.get('semantic_threshold')}"
        if decision.get("semantic")
        else "not compared"
    )
    if decision.get("semantic") and (unread := counts.accepted - counts.vectors):
        semantic += f"; {unread:,} records that the embedding model cannot read not compared"
    language = plain(decision.get("language", ENGLISH))
    return f"""\
---
license: other
license_name: terms-of-the-generating-model
language:
  - {"multilingual" if language == MIXED else language}
task_categories:
  - text-generation
tags:
  - synthetic
{"  - instruction-tuning" if layout.alpaca else "  - woolmill"}
size_categories:
  - {category}
configs:
  - config_name: default
    data_files:
{files}
dataset_info:
  config_name: default
  description: SHA-256 of the data {digest}
---

# {rows:,} {"instruction records" if layout.alpaca else "rows"}

{_made(layout, manifest)}

| | |
|---|---|
| Model | {models} |
| Recipe | {_recipe(layout, fixed)}, run seed {fixed.get("seed")} |
{_source(layout, fixed)}
| Near-duplicates by ROUGE-L | {rouge} |
| Near-duplicates by meaning | {semantic} |
{_asked(stages)}
| Accepted | {counts.accepted:,} of {counts.decided:,} pieces |
| Written | {f"{rows:,} of these, chosen by {plain(choosing)}" if choosing else "all of these"} |

{_splits(sizes, split)}

## Refused

| Reason | Pieces |
|---|---|
{refused or "| none | 0 |"}

## Licence

Whether these records may be used, and for what, follows from the terms of the model that wrote them
({models}) and from the licence of {shown}. Woolmill adds no terms of its own.

## Limits

Nobody has read all records. They may be wrong, biased or unsafe, and repeat what the model saw.
Text that looks like a special token is kept as text: have your tokenizer split special tokens.
"""


@dataclass(frozen=True, slots=True)
class _Stage:
    """Of those that the rows came through: its name, empty where there is one, and what it did."""

    name: str
    counts: Counts
    fixed: Mapping[str, Any]


def _stages_of(run: RunReader) -> list[_Stage]:
    stages, place = place_in_chain(run.folder)
    with open_stages(stages[:place]) as before:
        runs = [*before, run]
        return [
            _Stage(stage.name, each.counts(), each.manifest.fixed)
            for stage, each in zip(stages, runs, strict=False)
        ]


def _asked(stages: Sequence[_Stage]) -> str:
    """Who was asked how, and how often: a line for each stage."""
    lines = []
    for stage in stages:
        counts, fixed = stage.counts, stage.fixed
        models = ", ".join(plain(name) for name in sorted(counts.models)) or "nobody"
        lines.append(
            f"| {f'Stage {plain(stage.name)}' if len(stages) > 1 else 'Requests'} | "
            f"{f'{models}, ' if len(stages) > 1 else ''}"
            f"temperature {fixed.get('temperature')}, top-p {fixed.get('top_p')}; "
            f"{counts.answered:,} answered, {counts.failed:,} failed permanently; tokens: "
            f"{counts.prompt_tokens:,} prompt, {counts.completion_tokens:,} completion |"
        )
    return "\n".join(lines)


def _made(layout: Layout, manifest: Manifest) -> str:
    version = plain(manifest.engine_version)
    if layout.alpaca:
        return (
            "Written by a language model from seed tasks; filtered, and near-duplicates left out, "
            f"by Woolmill {version}."
        )
    of = " from input rows" if layout.samples is not None else ""
    freed = "filtered, and near-duplicates left out," if layout.compared else "filtered"
    return f"Written by a language model{of}; {freed} by Woolmill {version}."


def _recipe(layout: Layout, fixed: Mapping[str, Any]) -> str:
    name = plain(fixed.get("recipe"))
    return name if layout.alpaca else f"{name}, version {plain(fixed.get('recipe_version'))}"


def _source(layout: Layout, fixed: Mapping[str, Any]) -> str:
    if layout.alpaca:
        seeds = str(fixed.get("seeds", ""))[:16]
        return (
            f"| Seed tasks | SHA-256 {seeds}…, {fixed.get('num_demonstrations')} in each prompt |"
        )
    fields = ", ".join(
        f"{plain(name)} (JSON text)" if type_ == "json" else plain(name)
        for name, type_ in (layout.types or {}).items()
    )
    return f"| Fields | {fields or 'none'} |"


def _splits(sizes: Mapping[Any, int], split: Split | None) -> str:
    parts = ", ".join(f"{size:,} rows in {part}" for part, size in sizes.items() if size)
    if split is None:
        return f"{parts or 'No rows'}."
    meaning = f" or a cosine of {COSINE_LINK}" if split.by_meaning else ""
    alike = f"a ROUGE-L F of {split.threshold}{meaning} or more"
    return (
        f"{parts}. No row of validation is a near-duplicate ({alike}) of a row of\n"
        "train, nor asks the same; all rows of one input row are on the same side."
    )


def plain(value: object) -> str:
    """A value from outside as one table cell: no markup, no line break."""
    text = " ".join(str(value).split())
    for mark in "\\`*_{}[]<>()#|!":
        text = text.replace(mark, f"\\{mark}")
    return text
