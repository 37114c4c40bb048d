"""JSON in answers: found, read strictly, validated; or refused with the place of the fault.

In this order: the last fenced block, else what begins at the first ``{`` or ``[``; read as it
stands; of an array that the token limit cut, the whole elements count and no bracket is ever
closed; repaired only where the recipe asks for it, and only into what stands in the answer word for
word; validated by the schema. What a server constrains is checked here all the same.

Rows are objects: one, those of an array, or several one after the other.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema_rs
import orjson

from engine.errors import ConfigError
from engine.recipes.answers import USUAL_MOST, Fields
from engine.recipes.base import Refusal
from engine.text import shorten

__all__ = ["JsonAnswer"]

MOST_WORDS = 300
"""Characters of what a validator says."""
MOST_BACKTRACKS = 100_000
"""Steps of a pattern in a schema."""

_FENCE = re.compile(r"^[ \t]*+```[ \t]*+(\w*+)[ \t]*+\r?$", re.MULTILINE)
"""A line that opens or closes a block in Markdown: three backticks, which a word may follow."""
_OPENING = re.compile(r"[\[{]")
"""Where JSON of any use begins: an object or an array."""
_BLANKS = re.compile(r"[ \t\r\n]*+")
"""JSON's white space, which is less than Python's."""


class _NotJsonError(Exception):
    """``str`` says what is wrong, and where."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise _NotJsonError(f"the key {shorten(twice, 60)!r} comes twice in one object")
    return value


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _NotJsonError(f"the number {shorten(digits, 40)} is too large")
    return value


def _integer(digits: str) -> int:
    if len(digits) > 20:
        raise _NotJsonError(f"the number {shorten(digits, 40)} has more than 64 bits")
    return int(digits)


def _no_number(name: str) -> Any:
    raise _NotJsonError(f"{name} is no number that JSON has")


# Not orjson: it takes the last of two keys that are the same, and rounds large integers, in silence.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_float, parse_int=_integer, parse_constant=_no_number
)


class JsonAnswer:
    """Objects as rows.

    Args:
        schema: what the answer must be; None: any object or array of objects. A schema of an object
            is also that of each element, where the answer is an array.
        repair: mend what is no JSON, where that adds nothing.

    Raises ConfigError where the schema is none, or repairing needs a package.
    """

    def __init__(self, schema: Mapping[str, Any] | None = None, *, repair: bool = False) -> None:
        self._schema = dict(schema) if schema is not None else None
        self._validator = _validator(self._schema)
        self._of_array = self._schema is not None and _is_of_array(self._schema)
        self.names: tuple[str, ...] | None = _properties(self._schema)
        one = self._schema is not None and not self._of_array
        self.most = 1 if one else USUAL_MOST
        self._repair = repair
        if repair:
            _repairer()

    def read(self, text: str, cut: str | None) -> Iterator[Fields | Refusal]:
        if not text or text.isspace():
            return
        start, end = _block(text)
        opening = _OPENING.search(text, start, end)
        if opening is None:
            yield ("cut_off", cut) if cut else ("bad_format", "there is no { or [")
            return
        place: int | None = opening.start()
        found = False
        while place is not None:
            try:
                value, after = _read(text, place)
            except _NotJsonError as error:
                yield from self._unread(text, place, end, str(error), cut)
                return
            yield from self._rows(value)
            found = found or value != []
            place = _next(text, after, end)
        if not found:
            yield "no_record", "the array is empty"

    def _unread(
        self, text: str, start: int, end: int, fault: str, cut: str | None
    ) -> Iterator[Fields | Refusal]:
        """What can be had of an answer that is no JSON from ``start`` on."""
        if cut:
            if text[start] == "[":
                yield from self._rows(_whole_elements(text, start), whole=False)
            yield "cut_off", cut
        elif self._repair and (value := _repaired(text[start:end])) is not None:
            yield from self._rows(value)
        else:
            yield "bad_format", fault

    def _rows(self, value: Any, *, whole: bool = True) -> Iterator[Fields | Refusal]:
        """The rows of one JSON value. ``whole``: nothing of it was cut off."""
        if not isinstance(value, list):
            fault = self._faults(value).get(None)
            yield ("invalid", fault) if fault else self._fields(value)
            return
        if self._of_array or self._schema is None:
            faults = self._faults(value)
        else:
            faults = {n: each[None] for n, item in enumerate(value) if (each := self._faults(item))}
        if whole and None in faults:
            yield "invalid", faults[None]
            return
        for number, item in enumerate(value):
            if number in faults:
                yield "invalid", faults[number]
            elif not isinstance(item, dict):
                yield "bad_format", f"element {number + 1} is {_kind(item)}, not an object"
            else:
                yield self._fields(item)

    def _fields(self, value: dict[str, Any]) -> Fields:
        """An object's fields by name: those of the schema, else all; ``item`` is the object."""
        if self.names is None:
            return {**value, "item": value}
        return {**{name: value.get(name) for name in self.names}, "item": value}

    def _faults(self, value: Any) -> dict[int | None, str]:
        """What is invalid, by the element of an array; None: the value as a whole."""
        if self._validator is None or self._validator.is_valid(value):
            return {}
        faults: dict[int | None, str] = {}
        for error in self._validator.iter_errors(value):
            path = list(error.instance_path)
            element = path.pop(0) if isinstance(value, list) and path else None
            where = f"{'.'.join(map(str, path))}: " if path else ""
            key = element if isinstance(element, int) else None
            faults.setdefault(key, shorten(f"{where}{error.message}", MOST_WORDS))
        return faults

    def sample(self) -> str:
        value = _example(self._schema) if self._schema is not None else {"answer": "Some words."}
        return f"```json\n{json.dumps(value, indent=1)}\n```"


def _validator(schema: dict[str, Any] | None) -> Any:
    if schema is None:
        return None
    try:
        return jsonschema_rs.validator_for(
            schema,
            offline=True,
            pattern_options=jsonschema_rs.FancyRegexOptions(backtrack_limit=MOST_BACKTRACKS),
        )
    except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError) as error:
        words = getattr(error, "message", str(error))
        raise ConfigError(f"schema: it is no JSON schema: {shorten(words, MOST_WORDS)}") from error


def _is_of_array(schema: Mapping[str, Any]) -> bool:
    kind = schema.get("type", "object" if "properties" in schema else None)
    return bool(kind != "object")


def _properties(schema: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """The names that a schema gives the fields of a row; None: it does not say."""
    if schema is None:
        return None
    items = schema.get("items")
    for place in (schema, items if isinstance(items, dict) else {}):
        if isinstance(named := place.get("properties"), dict):
            return tuple(named)
    return None


def _block(text: str) -> tuple[int, int]:
    """Where the JSON is: the last block fenced as JSON, else the last whose content looks like it,
    else all. A block that is not closed goes to the end.
    """
    labelled = plain = None
    fences = _FENCE.finditer(text) if "```" in text else iter(())
    for opening in fences:
        closing = next((fence for fence in fences if not fence[1]), None)
        block = (opening.end(), closing.start() if closing else len(text))
        if opening[1].lower().startswith("json"):
            labelled = block
        elif text[block[0] : block[0] + 200].lstrip()[:1] in ("{", "["):
            plain = block
    return labelled or plain or (0, len(text))


def _read(text: str, start: int) -> tuple[Any, int]:
    """The value at ``start`` and where it ends. Raises _NotJsonError."""
    try:
        value, end = _DECODER.raw_decode(text, start)
        orjson.dumps(value)  # what cannot be written is no row
    except json.JSONDecodeError as error:
        raise _NotJsonError(f"{error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise _NotJsonError("it is nested too deeply") from None
    except TypeError as error:
        if "surrogates" in str(error):
            raise _NotJsonError("it holds half of a surrogate pair") from None
        deep = "ecursion" in str(error)
        words = "it is nested too deeply" if deep else "a number has more than 64 bits"
        raise _NotJsonError(words) from None
    return value, end


def _next(text: str, after: int, end: int) -> int | None:
    """Where another value follows at once; None: nowhere."""
    blanks = _BLANKS.match(text, after, end)
    place = blanks.end() if blanks else after
    return place if place < end and text[place] in "{[" else None


def _whole_elements(text: str, start: int) -> list[Any]:
    """The objects of an array up to where it was cut."""
    elements: list[Any] = []
    place = start + 1
    while True:
        blanks = _BLANKS.match(text, place)
        place = blanks.end() if blanks else place
        if text[place : place + 1] not in ("{", "["):
            return elements
        try:
            element, place = _read(text, place)
        except _NotJsonError:
            return elements
        elements.append(element)
        blanks = _BLANKS.match(text, place)
        place = blanks.end() if blanks else place
        if text[place : place + 1] != ",":
            return elements
        place += 1


def _repairer() -> Any:
    try:
        import json_repair
    except ImportError as error:
        raise ConfigError(
            "repair: to mend JSON needs a package: pip install 'woolmill[repair]'"
        ) from error
    return json_repair


def _repaired(text: str) -> Any | None:
    """The text as an object or array, where all that it holds stands in the text; else None."""
    try:
        value = _repairer().loads(text, skip_json_loads=True)
        orjson.dumps(value)
    except (ValueError, TypeError, RecursionError):
        return None
    if not isinstance(value, dict if text[0] == "{" else list) or not value:
        return None
    return value if all(_stands_in(text, each) for each in _leaves(value)) else None


def _leaves(value: Any) -> Iterator[Any]:
    """Keys and single values, at any depth."""
    if isinstance(value, dict):
        yield from value
        for each in value.values():
            yield from _leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _stands_in(text: str, value: Any) -> bool:
    if not isinstance(value, str):
        word = re.escape(json.dumps(value))
        return re.search(rf"(?<![\w.]){word}(?![\w]|\.\d)", text, re.IGNORECASE) is not None
    if not value:
        return '""' in text or "''" in text
    return value in text or json.dumps(value, ensure_ascii=False)[1:-1] in text


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, str):
        return "a text"
    return "an array" if isinstance(value, list) else "a number"


def _example(schema: Any, depth: int = 0) -> Any:
    """A value that simple schemas take."""
    if not isinstance(schema, dict) or depth > 8:
        return "Some words."
    for word in ("const", "default"):
        if word in schema:
            return schema[word]
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return schema["enum"][0]
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "object":
        named = schema.get("properties", {})
        return {name: _example(each, depth + 1) for name, each in named.items()}
    if kind == "array":
        item = _example(schema.get("items"), depth + 1)
        return [item] * max(1, min(int(schema.get("minItems", 2)), 20))
    if kind in ("integer", "number"):
        return schema.get("minimum", schema.get("maximum", 4))
    return {"boolean": True, "null": None}.get(kind, "Some words.")
