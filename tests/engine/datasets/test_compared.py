"""What of a row is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.datasets import Row, choose
from engine.errors import InputError


def row(**values: Any) -> Row:
    return Row(Path("d.jsonl"), 3, values)


def turns(*pairs: tuple[str, Any], keys: tuple[str, str] = ("role", "content")) -> list[Any]:
    return [dict(zip(keys, pair, strict=True)) for pair in pairs]


TEXTS = [
    (row(instruction="a", messages=[], text="b"), "a"),
    (row(messages=turns(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))), "a"),
    (row(conversations=turns(("human", "a"), ("gpt", "b"), keys=("from", "value"))), "a"),
    (row(conversations=turns(("user", "a"), ("assistant", "b"))), "a"),
    (row(prompt="a", completion="b"), "a"),
    (row(prompt=turns(("user", "a")), chosen=turns(("assistant", "b"))), "a"),
    (row(question="a", answer="b"), "a"),
    (row(text="a"), "a"),
    (row(messages=turns(("user", [{"type": "text", "text": "a"}, {"type": "image"}]))), "a"),
    (row(messages=turns(("user", None))), ""),
    (row(messages=turns(("system", "s"))), ""),
    (row(messages=[]), ""),
    (row(instruction=None, input="b"), ""),
    (row(instruction="a", input="b", output="c"), "a\nb"),
    (row(instruction="a", input=float("nan")), "a"),
    (row(instruction=" \n\u3000"), ""),
]


@pytest.mark.parametrize(("given", "text"), TEXTS)
def test_the_first_row_suggests_what_is_compared(given: Row, text: str) -> None:
    compared = choose(given)
    assert compared.chosen
    assert compared.text(given) == text


def test_named_fields_go_first_and_stand_on_a_line_each() -> None:
    given = row(instruction="a", q="b", chat=turns(("user", "c")), none=None)
    compared = choose(given, ("q", "none", "chat"))
    assert (compared.chosen, compared.text(given)) == (False, "b\nc")


REFUSED = [
    ({"instruction": 3}, "field 'instruction' is not text but a number"),
    ({"instruction": True}, "not text but true or false"),
    ({"instruction": ["a", ["b"]]}, "not text but a list"),
    ({"instruction": {"a": 1}}, "not text but an object"),
    ({"messages": "a", "x": 1}, None),
    ({"messages": [{"text": "a"}]}, "turn 0 says neither role nor from"),
    ({"messages": turns(("user", 3))}, "turn 0 is not text but a number"),
    ({"a": "x", "b": "y"}, r"no field 'instruction' or the like; there are: 'a', 'b'\)"),
    ({}, "there are: none"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_what_cannot_be_compared_is_named_with_a_way_out(
    values: dict[str, Any], message: str | None
) -> None:
    given = row(**values)
    if message is None:
        assert choose(given).text(given) == "a"
        return
    with pytest.raises(InputError, match=message) as caught:
        choose(given).text(given)
    assert str(caught.value).startswith("d.jsonl:3: ")
    assert "--field" in str(caught.value)
