"""The exact-text stage."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.dedup import ExactIndex, normalise


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Name a colour", "  name\tA\n COLOUR "),
        ("ﬁnd \uff12 x\u00b2", "FIND 2 X2"),
        ("Straße", "STRASSE"),
        ("写一首诗", "写一首诗 "),
        ("e\u0301t\u00e9", "\u00e9te\u0301"),
    ],
)
def test_same_text_in_another_form_is_found(a: str, b: str) -> None:
    """Case, whitespace, composition and compatible characters do not make another text."""
    index = ExactIndex()
    index.add("something else")
    item = index.add(a)
    assert index.find(b) == item


@pytest.mark.parametrize(("a", "b"), [("写一首诗", "写一首歌"), ("a b", "ab"), ("x!", "x?")])
def test_other_text_is_not_found(a: str, b: str) -> None:
    """What ROUGE-L cannot tell apart, having no tokens or the same, is told apart here."""
    index = ExactIndex()
    index.add(a)
    assert index.find(b) is None


def test_the_first_of_equal_texts_is_named() -> None:
    """Ids count every text added, and the earliest is the one found."""
    index = ExactIndex()
    assert [index.add(text) for text in ("a", "b", "A")] == [0, 1, 2]
    assert index.find("a") == 0
    assert len(index) == 3


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    """The key of a key is the key, so that no text can miss its own copy."""
    assert normalise(normalise(text)) == normalise(text)


def test_lone_surrogate_does_not_stop_a_run() -> None:
    """JSON may carry half of a surrogate pair."""
    index = ExactIndex()
    index.add("\ud83d")
    assert index.find("\ud83d") == 0
