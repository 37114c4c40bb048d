"""Answers out of thin air for the scripted backend: plain sentences, and JSON that a schema allows.

All are pure functions of a number, drawn from the prompt by a hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

__all__ = ["made_up_json", "sentences"]

OPENINGS = (
    "In short, |Put simply, |To begin with, |In practice, |As a rule, |Seen from afar, |"
    "For most people, |On closer inspection, "
).split("|")
"""A sentence is one of each of five lists, of which this is the first: a quarter of a million in
all."""
SUBJECTS = (
    "a careful plan|the first attempt|a second opinion|the older method|a small experiment|"
    "an honest question|the usual answer|a clear example|the hardest part|a short walk|"
    "the written record|a patient teacher|the local custom|a fair comparison|the missing detail"
).split("|")
DEEDS = (
    "saves time|costs more than it seems|explains the difference|hides the real reason|"
    "works better in the morning|depends on the weather|deserves a closer look|"
    "changes the whole picture|surprises nobody|needs two people|rarely fails|"
    "is worth writing down|settles the matter|leads to a better question|calms everybody"
).split("|")
WHERE = (
    "in the library|at the harbour|between two meetings|under a grey sky|in a quiet village|"
    "behind the museum|during the harvest|on the last train|at the kitchen table|"
    "in the second chapter|near the old bridge|after a long winter|in front of the class"
).split("|")
ENDINGS = (
    "and nobody asks twice|but only for a while|so it pays to wait|which is easy to forget|"
    "as the figures show|and that is enough|though opinions differ|because habits are strong|"
    "if the tools are at hand|unless the door is locked|and the rest follows"
).split("|")
DEEPEST = 16
"""Levels of a schema that are filled in; what lies deeper is as short as it may be."""


def sentences(*keys: object, count: int | None = None) -> str:
    """Two to four plain sentences, chosen by the keys."""
    draw = _draws(*keys)
    many = count or 2 + next(draw) % 3
    return " ".join(_sentence(draw) for _ in range(many))


def made_up_json(schema: Mapping[str, Any], *keys: object) -> str:
    """JSON that ``schema`` allows, chosen by the keys: types, ``enum``, ``const``, ``required``,
    bounds, references and alternatives. Of what it cannot make (``pattern``) it makes a guess.
    """
    return orjson.dumps(_value(schema, schema, _draws(*keys), 0)).decode()


def _draws(*keys: object) -> Iterator[int]:
    """64 random bits at a time."""
    digest = hashlib.sha256("\n".join(map(str, keys)).encode("utf-8", "surrogatepass")).digest()
    while True:
        for start in range(0, 32, 8):
            yield int.from_bytes(digest[start : start + 8], "big")
        digest = hashlib.sha256(digest).digest()


def _sentence(draw: Iterator[int]) -> str:
    opening, subject, deed, where, ending = (
        words[next(draw) % len(words)] for words in (OPENINGS, SUBJECTS, DEEDS, WHERE, ENDINGS)
    )
    return f"{opening}{subject} {deed} {where}, {ending}."


def _value(schema: Any, root: Mapping[str, Any], draw: Iterator[int], depth: int) -> Any:
    if not isinstance(schema, Mapping):
        return "yes"
    schema = _resolved(schema, root, draw)
    if "const" in schema:
        return schema["const"]
    if isinstance(choices := schema.get("enum"), list) and choices:
        return choices[next(draw) % len(choices)]
    kind = schema.get("type")
    if isinstance(kind, list) and kind:
        kind = kind[next(draw) % len(kind)]
    if kind is None:
        kind = "object" if "properties" in schema else "array" if "items" in schema else "string"
    if kind == "object":
        return _object(schema, root, draw, depth)
    if kind == "array":
        least, most = int(schema.get("minItems", 1)), int(schema.get("maxItems", 3))
        count = least if depth > DEEPEST else least + next(draw) % (max(most - least, 0) + 1)
        items = schema.get("items", {"type": "string"})
        return [_value(items, root, draw, depth + 1) for _ in range(count)]
    if kind in ("integer", "number"):
        return _number(schema, kind, draw)
    if kind == "boolean":
        return next(draw) % 2 == 0
    return None if kind == "null" else _text(schema, draw)


def _resolved(
    schema: Mapping[str, Any], root: Mapping[str, Any], draw: Iterator[int]
) -> Mapping[str, Any]:
    """The schema without references and with one of its alternatives."""
    for _ in range(DEEPEST):
        target: Any = None
        if isinstance(where := schema.get("$ref"), str):
            target = root
            for name in where.removeprefix("#").strip("/").split("/"):
                target = target.get(name) if isinstance(target, Mapping) else None
        for word in ("anyOf", "oneOf"):
            if isinstance(ways := schema.get(word), list) and ways:
                target = ways[next(draw) % len(ways)]
        if isinstance(every := schema.get("allOf"), list):
            target = {}
            for part in every:
                if isinstance(part, Mapping):
                    target |= part
        if not isinstance(target, Mapping):
            return schema
        rest = {k: v for k, v in schema.items() if k not in ("$ref", "anyOf", "oneOf", "allOf")}
        schema = {**rest, **target}
    return schema


def _object(
    schema: Mapping[str, Any], root: Mapping[str, Any], draw: Iterator[int], depth: int
) -> dict[str, Any]:
    named = schema.get("properties")
    properties = named if isinstance(named, Mapping) else {}
    required = list(schema.get("required", ()))
    names = required if depth > DEEPEST else [*properties, *(set(required) - properties.keys())]
    return {name: _value(properties.get(name, {}), root, draw, depth + 1) for name in names}


def _number(schema: Mapping[str, Any], kind: str, draw: Iterator[int]) -> float | int:
    least, most = schema.get("minimum"), schema.get("maximum")
    if "exclusiveMinimum" in schema:
        least = schema["exclusiveMinimum"] + 1
    if "exclusiveMaximum" in schema:
        most = schema["exclusiveMaximum"] - 1
    if least is None:
        least = 0 if most is None or most >= 0 else most - 9
    if most is None:
        most = least + 9
    step = int(schema.get("multipleOf", 1)) or 1
    first = -(-int(least) // step) * step
    value = first + step * (next(draw) % (max(int(most) - first, 0) // step + 1))
    return value if kind == "integer" else min(max(float(value), least), most)


def _text(schema: Mapping[str, Any], draw: Iterator[int]) -> str:
    least, most = int(schema.get("minLength", 0)), schema.get("maxLength")
    text = _sentence(draw)
    while len(text) < least:
        text += " " + _sentence(draw)
    return text if most is None else text[: int(most)]
