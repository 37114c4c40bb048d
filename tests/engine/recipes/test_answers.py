"""Formats of answers other than JSON: what is found in a text, and why not."""

from __future__ import annotations

import re
from typing import Any

import pytest

from engine.recipes.answers import (
    Format,
    ListAnswer,
    NumberedAnswer,
    RegexAnswer,
    TagsAnswer,
    TextAnswer,
)
from tests.linear import in_linear_time

CUT = "the answer ended at its token limit"
OFF = ("cut_off", CUT)


def found(form: Format, text: str, cut: bool = False) -> list[Any]:
    return list(form.read(text, CUT if cut else None))


def items(text: str, cut: bool = False) -> list[Any]:
    """Items as texts."""
    came = found(ListAnswer(), text, cut)
    return [each if isinstance(each, tuple) else each["item"] for each in came]


def test_a_text_is_the_whole_answer_and_nothing_where_it_is_blank() -> None:
    assert found(TextAnswer(), " So. \n") == [{}]
    assert found(TextAnswer(), " \n") == []


def test_a_text_that_was_cut_is_refused_unless_it_is_wanted() -> None:
    assert found(TextAnswer(), "So it", cut=True) == [OFF]
    assert found(TextAnswer(keep_cut=True), "So it", cut=True) == [{}]


LISTS: dict[str, tuple[str, list[Any]]] = {
    "numbers": ("1. a\n2. b", ["a", "b"]),
    "brackets": ("1) a\n2) b", ["a", "b"]),
    "brackets around": ("(1) a\n(2) b", ["a", "b"]),
    "dashes": ("- a\n- b", ["a", "b"]),
    "stars": ("* a\n* b", ["a", "b"]),
    "numbers of other scripts": ("1、甲\n2．乙", ["甲", "乙"]),
    "words before and after": ("Here you are:\n\n1. a\n2. b\n\nShall I go on?", ["a", "b"]),
    "lines that go on": ("1. a\n   more of a\n2. b\nmore of b", ["a\n   more of a", "b\nmore of b"]),
    "bullets within a numbered item": ("1. a\n   - x\n   - y\n2. b", ["a\n   - x\n   - y", "b"]),
    "a block of code in the last item": ("1. a\n2. b\n\n```\nx = 1\n```", ["a", "b\n\n```\nx = 1\n```"]),
    "blank lines between": ("1. a\n\n2. b\n", ["a", "b"]),
    "a fraction is no marker": ("1. a\n1.5 of it\n2. b", ["a\n1.5 of it", "b"]),
    "an item of nothing": ("1. a\n2.\n3. c", ["a", ("bad_format", "item 2 is empty"), "c"]),
    "carriage returns": ("1. a\r\n2. b\r\n", ["a", "b"]),
    "no list": ("I would rather not.", [("bad_format", "no line begins with a number, - or *")]),
    "blank": ("\n", []),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_a_list_comes_to_its_items(name: str) -> None:
    text, expected = LISTS[name]
    assert items(text) == expected


def test_of_a_list_that_was_cut_the_last_item_is_dropped() -> None:
    assert items("1. a\n2. b", cut=True) == ["a", OFF]
    assert items("Here", cut=True) == [OFF]


def test_tags_make_rows_where_a_name_comes_again() -> None:
    tags = TagsAnswer(["q", "a"])
    row = {"q": "Why?", "a": "So."}
    assert found(tags, "<q>Why?</q>\n<a>\nSo.\n</a> done") == [row]
    assert found(tags, "<q>1</q><a>2</a><q>3</q><a>4</a>") == [
        {"q": "1", "a": "2"},
        {"q": "3", "a": "4"},
    ]
    assert found(tags, "<q>1</q><q>3</q><a>4</a>") == [
        ("bad_format", "row 1 has no <a>"),
        {"q": "3", "a": "4"},
    ]
    assert found(tags, "<q>a < b <b>bold</b></q><a>2</a>") == [{"q": "a < b <b>bold</b>", "a": "2"}]
    assert found(tags, "no tags") == [("bad_format", "there is no <q>")]


def test_a_tag_that_is_not_closed_is_no_field() -> None:
    tags = TagsAnswer(["q", "a"])
    assert found(tags, "<q>1</q><a>2</a><q>3</q><a>4") == [
        {"q": "1", "a": "2"},
        ("bad_format", "<a> is not closed"),
    ]
    assert found(tags, "<q>1</q><a>2</a><q>3</q><a>4", cut=True) == [{"q": "1", "a": "2"}, OFF]


def test_a_tag_may_be_optional_or_closed_by_a_stop_string() -> None:
    tags = TagsAnswer(["q"], optional=["note"], closed_by_stop=["q"])
    assert found(tags, "<q>1</q><note>x</note><q>2</q>") == [
        {"q": "1", "note": "x"},
        {"q": "2", "note": None},
    ]
    assert found(tags, "<q>1") == [{"q": "1", "note": None}]
    assert found(tags, "<q>1", cut=True) == [OFF]


def test_a_pattern_s_named_groups_are_fields() -> None:
    form = RegexAnswer(re.compile(r"(?P<n>\d)/5(?: because (?P<why>.*))?"))
    assert form.names == ("n", "why")
    assert found(form, "4/5 because so \n3/5") == [{"n": "4", "why": "so"}, {"n": "3", "why": None}]
    assert found(form, "no score") == [("bad_format", "the pattern matches nothing")]
    assert found(form, "4/5 because it is", cut=True) == [OFF]


def test_numbered_entries_have_all_labels_or_are_refused() -> None:
    form = NumberedAnswer(["Question", "Full answer"])
    assert form.names == ("question", "full_answer")
    text = "1. Question: Why?\n1. Full answer:\nSo.\n###\n2. Question: How?\n2. full answer: Thus."
    rows = [
        {"question": "Why?", "full_answer": "So."},
        {"question": "How?", "full_answer": "Thus."},
    ]
    assert found(form, text) == rows
    assert found(form, text, cut=True) == [rows[0], OFF]
    assert found(form, "1. Question: Why?\n2. Question: How?\n2. Full answer: So.") == [
        ("bad_format", "entry 1 has no Full answer"),
        {"question": "How?", "full_answer": "So."},
    ]
    assert found(form, "words") == [("bad_format", "there is no label such as 1. Question:")]


FORMS: dict[str, Format] = {
    "text": TextAnswer(),
    "list": ListAnswer(),
    "tags": TagsAnswer(["q", "a"]),
    "numbered": NumberedAnswer(["Question", "Answer"]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "unit",
    [
        "<q>",
        "<",
        "</q>",
        "1. ",
        "1",
        "-",
        "\n",
        "- a\n",
        " ",
        "1. Question: ",
        "###\n",
        "* ",
        "\n\n a",
    ],
)
def test_the_time_is_linear_in_the_answer(form: str, unit: str) -> None:
    """A model that has fallen into a loop must not hold up the process that decides."""
    text = unit * (400_000 // len(unit))
    with in_linear_time():
        for _ in FORMS[form].read(text, None):
            pass


@pytest.mark.parametrize("form", [*FORMS.values(), RegexAnswer(re.compile("Score: (?P<n>[0-9])"))])
def test_each_format_reads_its_own_sample(form: Format) -> None:
    came = list(form.read(form.sample(), None))
    assert came
    assert all(isinstance(each, dict) for each in came)
