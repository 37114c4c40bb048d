"""JSON in answers: sixty damaged ones, each with the right outcome."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.recipes.json_answers import JsonAnswer
from tests.linear import in_linear_time

SCHEMA = {
    "type": "object",
    "properties": {
        "q": {"type": "string", "minLength": 1},
        "n": {"type": "integer", "minimum": 0, "maximum": 10},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["q", "n"],
    "additionalProperties": False,
}
LENGTH = "the answer ended at its token limit"
GOOD = '{"q": "Why?", "n": 3}'
ROW = {"q": "Why?", "n": 3, "tags": None}
ROW2 = {"q": "How?", "n": 4, "tags": None}
BOTH = '[{"q": "Why?", "n": 3}, {"q": "How?", "n": 4}]'
DEEP = '{"q": ' + "[" * 5_000 + "]" * 5_000 + ', "n": 1}'

# The answer, whether it was cut, and what comes of it: rows, and reasons with words of their detail.
TABLE: dict[str, tuple[str, bool, list[Any]]] = {
    "whole": (GOOD, False, [ROW]),
    "blanks around": (f"\n \t{GOOD}\r\n", False, [ROW]),
    "byte order mark": (f"\ufeff{GOOD}", False, [ROW]),
    "words before": (f"Sure, here it is: {GOOD}", False, [ROW]),
    "words after": (f"{GOOD}\nShall I go on?", False, [ROW]),
    "brackets in words after": (f"{GOOD}\nI chose [3] since {{so}}.", False, [ROW]),
    "fenced": (f"```json\n{GOOD}\n```", False, [ROW]),
    "fenced without a language": (f"```\n{GOOD}\n```", False, [ROW]),
    "fenced in capitals": (f"```JSON\n{GOOD}\n```", False, [ROW]),
    "fenced with carriage returns": (f"```json\r\n{GOOD}\r\n```\r\n", False, [ROW]),
    "fenced on one line": (f"```json {GOOD} ```", False, [ROW]),
    "a fence that is not closed": (f"```json\n{GOOD}", False, [ROW]),
    "a fence closed on the last line": (f"```json\n{GOOD}```", False, [ROW]),
    "the last of two fences": (f'```json\n{{"q": "no", "n": 1}}\n```\nBetter:\n```json\n{GOOD}\n```', False, [ROW]),
    "braces before the fence": (f"I fill {{q}} and {{n}}.\n```json\n{GOOD}\n```", False, [ROW]),
    "a fence of code after it": (f"```json\n{GOOD}\n```\n```python\nprint({{}})\n```", False, [ROW]),
    "a fence of code before it": (f"```python\nx = {{}}\n```\n\n```json\n{GOOD}\n```", False, [ROW]),
    "a fence within a text": ('```json\n{"q": "Mend ```x```?", "n": 3}\n```', False, [{"q": "Mend ```x```?", "n": 3, "tags": None}]),
    "brackets within a text": ('{"q": "]}{[ \\" }", "n": 3}', False, [{"q": ']}{[ " }', "n": 3, "tags": None}]),
    "an optional field": ('{"q": "Why?", "n": 3, "tags": ["a"]}', False, [{**ROW, "tags": ["a"]}]),
    "escapes": ('{"q": "\\u00e9\\n\\ud83d\\ude00", "n": 3}', False, [{"q": "é\n😀", "n": 3, "tags": None}]),
    "an array": (BOTH, False, [ROW, ROW2]),
    "one after the other": (f'{GOOD}\n{{"q": "How?", "n": 4}}', False, [ROW, ROW2]),
    "lines of JSON in a fence": (f'```jsonl\n{GOOD}\n{{"q": "How?", "n": 4}}\n```', False, [ROW, ROW2]),
    "an integer as a float": ('{"q": "Why?", "n": 3.0}', False, [{**ROW, "n": 3.0}]),
    "whole, then cut words": (f"{GOOD} And that is beca", True, [ROW]),
    "whole in a fence that was cut": (f"```json\n{GOOD}\n", True, [ROW]),
    # Cut: whole elements of an array count, and no bracket is ever closed.
    "an object cut in a text": ('{"q": "Wh', True, [("cut_off", LENGTH)]),
    "an object cut after a value": ('{"q": "Why?", "n": 3', True, [("cut_off", LENGTH)]),
    "an array cut in an element": ('[{"q": "Why?", "n": 3}, {"q": "Ho', True, [ROW, ("cut_off", LENGTH)]),
    "an array cut after an element": ('[{"q": "Why?", "n": 3}', True, [ROW, ("cut_off", LENGTH)]),
    "an array cut after a comma": ('[{"q": "Why?", "n": 3},', True, [ROW, ("cut_off", LENGTH)]),
    "an array cut in a fence": ('```json\n[\n {"q": "Why?", "n": 3},\n {"q"', True, [ROW, ("cut_off", LENGTH)]),
    "an array cut at once": ("[", True, [("cut_off", LENGTH)]),
    "a second object cut": (f'{GOOD}\n{{"q": "H', True, [ROW, ("cut_off", LENGTH)]),
    "cut before any bracket": ("Let me think about", True, [("cut_off", LENGTH)]),
    "a bad element before the cut": ('[{"q": "", "n": 3}, {"q": "How?", "n": 4}, {"q"', True, [("invalid", "q: "), ROW2, ("cut_off", LENGTH)]),
    # Not JSON: the place is named.
    "no bracket": ("I cannot do that.", False, [("bad_format", "there is no { or [")]),
    "not closed": ('{"q": "Why?", "n": 3', False, [("bad_format", "at character 21")]),
    "an array that is not closed": ('[{"q": "Why?", "n": 3}', False, [("bad_format", "at character 23")]),
    "a comma too many": ('{"q": "Why?", "n": 3,}', False, [("bad_format", "at character")]),
    "a comma too few": ('{"q": "Why?" "n": 3}', False, [("bad_format", "Expecting ',' delimiter at character 14")]),
    "single quotes": ("{'q': 'Why?', 'n': 3}", False, [("bad_format", "at character 2")]),
    "names without quotes": ('{q: "Why?", n: 3}', False, [("bad_format", "at character 2")]),
    "a comment": ('{"q": "Why?", // so\n "n": 3}', False, [("bad_format", "at character")]),
    "a line feed within a text": ('{"q": "Why\n?", "n": 3}', False, [("bad_format", "control character")]),
    "quotes within a text": ('{"q": "He said "no"", "n": 3}', False, [("bad_format", "at character 17")]),
    "a wrong escape": ('{"q": "\\q", "n": 3}', False, [("bad_format", "escape")]),
    "Python's words": ('{"q": "Why?", "n": None}', False, [("bad_format", "Expecting value")]),
    "NaN": ('{"q": "Why?", "n": NaN}', False, [("bad_format", "NaN is no number")]),
    "Infinity": ('{"q": "Why?", "n": -Infinity}', False, [("bad_format", "-Infinity is no number")]),
    "a number too large": ('{"q": "Why?", "n": 1e999}', False, [("bad_format", "1e999 is too large")]),
    "an integer beyond 64 bits": ('{"q": "Why?", "n": 18446744073709551616}', False, [("bad_format", "more than 64 bits")]),
    "an integer of 5,000 digits": (f'{{"q": "Why?", "n": {"9" * 5_000}}}', False, [("bad_format", "more than 64 bits")]),
    "a key twice": ('{"q": "Why?", "n": 3, "n": 4}', False, [("bad_format", "'n' comes twice")]),
    "half of a surrogate pair": ('{"q": "\\ud83d", "n": 3}', False, [("bad_format", "surrogate")]),
    "nested 5,000 deep": (DEEP, False, [("bad_format", "nested too deeply")]),
    "a second that is broken": (f"{GOOD} {{oops}}", False, [ROW, ("bad_format", "at character 24")]),
    "an array of texts": ('["Why?"]', False, [("invalid", "is not of type")]),
    "an empty array": ("[]", False, [("no_record", "the array is empty")]),
    "a bracket in words before": (f"As [1] says: {GOOD}", False, [("invalid", "not of type")]),
    # JSON, but not what the schema says.
    "a field that is missing": ('{"q": "Why?"}', False, [("invalid", '"n" is a required property')]),
    "a field too many": ('{"q": "Why?", "n": 3, "x": 1}', False, [("invalid", "x")]),
    "a text for a number": ('{"q": "Why?", "n": "3"}', False, [("invalid", 'n: "3" is not of type "integer"')]),
    "a number out of range": ('{"q": "Why?", "n": 11}', False, [("invalid", "n: 11 is greater than")]),
    "a fault deep within": ('{"q": "Why?", "n": 3, "tags": ["a", 1]}', False, [("invalid", "tags.1: ")]),
    "one bad element": ('[{"q": "Why?", "n": 3}, {"q": "How?"}, {"q": "How?", "n": 4}]', False, [ROW, ("invalid", "required"), ROW2]),
    "an empty object": ("{}", False, [("invalid", "required")]),
    "blank": (" \n ", False, []),
}  # fmt: skip


def found(reader: JsonAnswer, text: str, cut: bool) -> list[Any]:
    """What comes of an answer; rows without the object that they were made of."""
    came = list(reader.read(text, LENGTH if cut else None))
    return [
        each if isinstance(each, tuple) else {k: v for k, v in each.items() if k != "item"}
        for each in came
    ]


def check(came: list[Any], expected: list[Any]) -> None:
    assert len(came) == len(expected), came
    for one, other in zip(came, expected, strict=True):
        if isinstance(other, tuple):
            assert one[0] == other[0], one
            assert other[1].lower() in one[1].lower()
        else:
            assert one == other


@pytest.mark.parametrize("name", TABLE)
def test_a_damaged_answer_comes_to_what_it_should(name: str) -> None:
    text, cut, expected = TABLE[name]
    check(found(JsonAnswer(SCHEMA), text, cut), expected)


def test_the_table_has_sixty_and_most_are_damaged() -> None:
    assert len(TABLE) >= 60


def test_a_cut_at_any_place_never_makes_a_row_that_was_not_there() -> None:
    """Whatever the cut, the rows are the first ones of the whole answer, and the rest is told."""
    text = "Here:\n```json\n" + json.dumps([{"q": f"Why {n}?", "n": n} for n in range(6)]) + "\n```"
    whole = found(JsonAnswer(SCHEMA), text, cut=False)
    assert len(whole) == 6
    for length in range(1, len(text)):
        came = found(JsonAnswer(SCHEMA), text[:length], cut=True)
        rows = [each for each in came if isinstance(each, dict)]
        assert rows == whole[: len(rows)]
        assert len(rows) == 6 or came[-1] == ("cut_off", LENGTH)


def test_without_a_schema_any_object_is_a_row() -> None:
    reader = JsonAnswer()
    assert reader.names is None
    assert found(reader, '[{"a": 1}, 2, {"b": null}]', cut=False) == [
        {"a": 1},
        ("bad_format", "element 2 is a number, not an object"),
        {"b": None},
    ]


def test_a_schema_of_an_array_names_the_element_that_is_wrong() -> None:
    """Its own bounds count too, but not where the answer was cut."""
    items = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    reader = JsonAnswer({"type": "array", "items": items, "minItems": 3})
    assert reader.names == ("a",)
    check(
        found(reader, '[{"a": 1}, {"a": "x"}, {"a": 3}]', cut=False),
        [{"a": 1}, ("invalid", '"x"'), {"a": 3}],
    )
    check(found(reader, '[{"a": 1}]', cut=False), [("invalid", "less than 3 items")])
    check(found(reader, '[{"a": 1}, {"a"', cut=True), [{"a": 1}, ("cut_off", "token limit")])


REPAIRS: dict[str, tuple[str, list[Any]]] = {
    "a comma too many": ('{"q": "Why?", "n": 3,}', [ROW]),
    "single quotes": ("{'q': 'Why?', 'n': 3}", [ROW]),
    "names without quotes": ('{q: "Why?", n: 3}', [ROW]),
    "a bracket that is missing": ('{"q": "Why?", "n": 3', [ROW]),
    "a value that is missing": ('{"q": , "n": 3}', [("bad_format", "at character")]),
    "no JSON at all": ("{ I would rather not }", [("bad_format", "at character")]),
    "valid, but not the schema's": ('{"q": "Why?", "n": 33,}', [("invalid", "33")]),
}


@pytest.mark.parametrize("name", REPAIRS)
def test_repair_is_taken_only_where_it_adds_nothing(name: str) -> None:
    """Every text and number of what was mended stands in the answer; else it stays refused."""
    text, expected = REPAIRS[name]
    check(found(JsonAnswer(SCHEMA, repair=True), text, cut=False), expected)


def test_repair_never_closes_what_the_token_limit_cut() -> None:
    reader = JsonAnswer(SCHEMA, repair=True)
    assert found(reader, '{"q": "Why?", "n": 3', cut=True) == [("cut_off", LENGTH)]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integr"},
        {"$ref": "http://127.0.0.1:9/schema.json"},
        {"$ref": "file:///etc/hostname"},
        {"properties": {"a": {"pattern": "("}}},
    ],
)
def test_what_is_no_schema_or_lies_elsewhere_is_refused(schema: dict[str, Any]) -> None:
    """Nothing is fetched, from the network or from the disk."""
    with pytest.raises(ConfigError, match="it is no JSON schema"):
        JsonAnswer(schema)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 300_000,
        "{" * 300_000,
        '{"a":' * 60_000,
        "```json\n" * 40_000,
        '"' * 300_000,
        '{"q": "' + "\\" * 300_001,
        "[1," * 100_000,
    ],
)
@pytest.mark.parametrize("cut", [False, True])
def test_the_time_is_linear_in_the_answer(text: str, cut: bool) -> None:
    """A model that has fallen into a loop must not hold up the process that decides."""
    with in_linear_time():
        came = found(JsonAnswer(SCHEMA), text, cut)
    assert all(isinstance(each, tuple) for each in came)


def test_a_pattern_of_a_schema_cannot_backtrack_for_ever() -> None:
    schema = {"type": "object", "properties": {"q": {"type": "string", "pattern": "^(?=(a+)+$)x"}}}
    with in_linear_time():
        ((reason, detail),) = found(JsonAnswer(schema), json.dumps({"q": "a" * 5_000 + "b"}), False)
    assert reason == "invalid"
    assert re.search("q: ", detail)
