"""What the formats need to know of a run's rows: their fields, and how each says where it is from.

A row's own fields keep their names. Ours beside them (``id``, ``model``, …) get another where a
field has that name already: ``woolmill_id``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.errors import ConfigError, InputError
from engine.export.columns import Type, columns_of
from engine.export.makers import Makers
from engine.export.rows import Row
from engine.kept import recipe_of
from engine.recipes.base import Recipe
from engine.recipes.load import ALPACA
from engine.records import Record
from engine.stages import Lineage, open_stages, place_in_chain, samples_of
from engine.store import RunReader

__all__ = [
    "ALPACA_FIELDS",
    "ANY_ALPACA",
    "Layout",
    "check_alpaca",
    "layout_of",
    "own_name",
    "typed",
]

ALPACA_FIELDS = ("instruction", "input", "output")
"""The fields of Stanford Alpaca's records, in the order of its published file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The rows of one run. The default is that of an Alpaca run."""

    fields: tuple[str, ...] = ALPACA_FIELDS
    alpaca: bool = True
    recipe: Recipe | None = None
    samples: int | None = None
    """Requests for each input row; None: the run has no input rows."""
    compared: bool = True
    """Rows were compared by ROUGE-L, so that there are neighbours to name."""
    similarity: bool = False
    """``alpaca`` only: with what its ``regen.json`` has besides."""
    reasoning: bool = False
    grouped: bool = False
    all_samples: bool = False
    """Samples too that a row was made of; each line says which it is."""
    lineage: Lineage | None = None
    """Each line says what its row was made of in the stages before."""
    makers: Makers | None = None
    """Of a run of several stages: each line says which model answered in which of them."""
    types: Mapping[str, Type] | None = None
    """Of a table's columns; None: all are text."""

    def own(self, name: str) -> str:
        """The name of a column of ours."""
        return own_name(name, self.fields)

    def record(self, row: Row) -> Record:
        """The row's fields, in the order of all. Raises InputError for a row of others."""
        record = row.record
        if record.keys() != set(self.fields):
            raise InputError(
                f"row {row.id} has the fields {', '.join(record)}, the rows before have "
                f"{', '.join(self.fields)}; see: woolmill verify"
            )
        return {name: record[name] for name in self.fields}

    def place(self, row: Row) -> tuple[int, int]:
        """The number of its input row, from 0, and which of the samples for that it is."""
        return divmod(row.decision.index, self.samples or 1)

    def parents(self, row: Row) -> list[str]:
        """What the row was made of, the nearest first: ``STAGE:REQUEST.POSITION``."""
        found = self.lineage.parents(row.decision.index) if self.lineage is not None else []
        return [f"{stage}:{request}.{position}" for stage, request, position in found]

    def line(self, row: Row) -> dict[str, Any]:
        """The row with where it comes from, as JSON has it."""
        own, decision = self.own, row.decision
        line = {own("id"): row.id, **self.record(row), own("model"): row.model}
        if self.makers is not None:
            line[own("models")] = self.makers.of(row)
        line[own("demonstrations")] = row.demonstrations
        if self.samples is not None:
            line[own("row")], line[own("sample")] = self.place(row)
        if self.all_samples:
            line[own("is_sample")] = not decision.accepted
        if self.lineage is not None:
            line[own("parents")] = self.parents(row)
        if self.compared:
            # A list, where Alpaca has an object: a key for each neighbour would give a table
            # thousands of columns.
            name, text = ("most_similar_instructions", "instruction")
            if not self.alpaca:
                name, text = own("most_similar"), "text"
            line[name] = [
                {text: near, "score": score} for near, score in decision.most_similar.items()
            ]
            line[own("avg_similarity_score")] = decision.mean_similarity
        if self.reasoning:
            line[own("reasoning")] = row.reasoning or None
        return line


def own_name(name: str, taken: Collection[str]) -> str:
    """The name of a column of ours beside fields of the names that are taken."""
    while name in taken:
        name = f"woolmill_{name}"
    return name


ANY_ALPACA = Layout()
"""The layout where no run says another."""


def layout_of(run: RunReader) -> Layout:
    """That of a run's rows. What a row's fields are, the first of them says; where there is none,
    the recipe.
    """
    stored, recipe = run.manifest, recipe_of(run)
    alpaca = stored.fixed.get("recipe", ALPACA) == ALPACA
    first = next(run.decisions(accepted=True), None)
    fields = tuple(first.record) if first is not None and first.record else None
    if fields is None:
        fields = ALPACA_FIELDS if alpaca else recipe.fields if recipe is not None else ()
    return Layout(
        fields=fields,
        alpaca=alpaca,
        recipe=recipe,
        samples=samples_of(run),
        makers=_makers_of(run),
        compared=alpaca
        or (
            stored.decision.get("rouge_threshold") is not None
            and (recipe is None or any(stage.compares for stage in recipe.stages))
        ),
    )


def _makers_of(run: RunReader) -> Makers | None:
    stages, place = place_in_chain(run.folder)
    if place == 0:
        return None
    with open_stages(stages[:place]) as before:
        return Makers(stages[: place + 1], [*before, run])


def typed(layout: Layout, run: RunReader) -> Layout:
    """The layout with the types of its columns: reads all rows, save where all are text anyway."""
    if layout.alpaca:
        return layout
    records = (decision.record or {} for decision in run.decisions(accepted=True))
    return replace(layout, types=columns_of(records, layout.fields))


def check_alpaca(layout: Layout) -> None:
    """Raises ConfigError where the rows lack what the format ``alpaca`` needs."""
    if missing := [name for name in ("instruction", "output") if name not in layout.fields]:
        fields = ", ".join(layout.fields) or "none"
        raise ConfigError(
            f"--format alpaca needs rows with instruction and output, and these have no "
            f"{' and no '.join(missing)} (fields: {fields}); choose "
            "--format jsonl, and a name that ends in .jsonl"
        )
