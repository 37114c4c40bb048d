"""The types of a table's columns, from all values of a run: a pass before the first row is written.

A column of one kind of value has that kind's type, null where a value is null; integers with
fractions among them are floats as long as no digit is lost. Lists are lists of their items' type,
and objects that all have the same fields are structs, so that a chat's turns are what trainers take
them for. Whatever else (objects of several shapes, values of several kinds, integers beyond 64
bits) is written as JSON text, so that nothing is lost and every row fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from engine.records import Record

__all__ = ["Column", "ListOf", "Scalar", "StructOf", "Type", "columns_of"]

Kind = Literal["bool", "int", "long", "float", "text", "json"]
Scalar = Literal["bool", "int", "float", "text", "json"]
EXACT = 2**53
"""Integers up to here are floats without a loss."""
MAX_DEPTH = 8
"""Of lists and objects within each other that get a type: readers of tables go little deeper."""


@dataclass(frozen=True, slots=True)
class ListOf:
    """Lists of one type."""

    items: Type


@dataclass(frozen=True, slots=True)
class StructOf:
    """Objects with the same fields."""

    fields: dict[str, Type]


Type: TypeAlias = Scalar | ListOf | StructOf


@dataclass(slots=True)
class Column:
    """What the values of one field have been so far."""

    kinds: set[Kind] = field(default_factory=set)
    """Of values that are neither lists nor objects."""
    items: Column | None = None
    fields: dict[str, Column] | None = None
    depth: int = 0

    def add(self, value: Any) -> None:
        if value is None:
            return
        if isinstance(value, list | tuple) and self.depth < MAX_DEPTH:
            self.items = self.items or Column(depth=self.depth + 1)
            for item in value:
                self.items.add(item)
        elif isinstance(value, dict) and self.depth < MAX_DEPTH and _are_names(value):
            if self.fields is None:
                self.fields = {name: Column(depth=self.depth + 1) for name in value}
            if self.fields.keys() != value.keys():
                self.kinds.add("json")
                return
            for name, column in self.fields.items():
                column.add(value[name])
        else:
            self.kinds.add(_kind(value))

    def type(self) -> Type:
        """The type that every value so far fits."""
        if self.items is None and self.fields is None:
            return _type(self.kinds)
        if self.kinds or (self.items is not None and self.fields is not None):
            return "json"
        if self.items is not None:
            items = self.items.type()
            return items if items == "json" else ListOf(items)
        types = {name: column.type() for name, column in (self.fields or {}).items()}
        return "json" if "json" in types.values() else StructOf(types)


def columns_of(records: Iterable[Record], fields: Sequence[str]) -> dict[str, Type]:
    """The type of each field over all records, as ``Column.type`` gives it."""
    columns = {name: Column() for name in fields}
    for record in records:
        for name, column in columns.items():
            column.add(record.get(name))
    return {name: column.type() for name, column in columns.items()}


def _are_names(value: dict[str, Any]) -> bool:
    """Whether the fields of an object can be those of a struct, which has one and in clean text."""
    return bool(value) and all(name and name.isprintable() for name in value)


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


def _type(kinds: set[Kind]) -> Scalar:
    if not kinds:
        return "text"
    if kinds <= {"int", "long"}:
        return "int"
    if kinds <= {"int", "float"}:
        return "float"
    (kind, *others) = kinds
    return "json" if others or kind == "long" else kind
