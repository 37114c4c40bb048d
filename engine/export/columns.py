"""The types of a table's columns, from all values of a run: a pass before the first row is written.

A column of one kind of value has that kind's type, null where a value is null; integers with
fractions among them are floats as long as no digit is lost; lists of one kind of value are lists of
its type. Whatever else (objects, lists of lists, values of several kinds, integers beyond 64 bits)
is written as JSON text, so that nothing is lost and every row fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.records import Record

__all__ = ["Column", "columns_of"]

Kind = Literal["bool", "int", "long", "float", "text", "json"]
Type = Literal["bool", "int", "float", "text", "json"]
EXACT = 2**53
"""Integers up to here are floats without a loss."""


@dataclass(slots=True)
class Column:
    """What the values of one field have been so far."""

    single: set[Kind] = field(default_factory=set)
    within: set[Kind] = field(default_factory=set)
    """Kinds of the items of lists."""
    lists: bool = False

    def add(self, value: Any) -> None:
        if isinstance(value, list):
            self.lists = True
            self.within.update(_kind(item) for item in value if item is not None)
        elif value is not None:
            self.single.add(_kind(value))

    def type(self) -> tuple[Type, bool]:
        """The type, and whether it is that of the items of lists."""
        if self.lists and not self.single and (items := _type(self.within)) != "json":
            return items, True
        return ("json" if self.lists else _type(self.single)), False


def columns_of(records: Iterable[Record], fields: Sequence[str]) -> dict[str, tuple[Type, bool]]:
    """The type of each field over all records, as ``Column.type`` gives it."""
    columns = {name: Column() for name in fields}
    for record in records:
        for name, column in columns.items():
            column.add(record.get(name))
    return {name: column.type() for name, column in columns.items()}


def _kind(value: Any) -> Kind:
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, float):
        return "float"
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return "int" if abs(value) <= EXACT else "long"
    return "json"


def _type(kinds: set[Kind]) -> Type:
    if not kinds:
        return "text"
    if kinds <= {"int", "long"}:
        return "int"
    if kinds <= {"int", "float"}:
        return "float"
    (kind, *others) = kinds
    return "json" if others or kind == "long" else kind
