"""Numbers of tokens, against a dict."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.dedup import tokenize
from engine.dedup.vocabulary import Vocabulary

TEXTS = st.lists(st.tuples(st.text() | st.text("ab0 -K\u212aİ", max_size=200), st.booleans()))


@settings(deadline=None)  # the first call compiles
@given(TEXTS)
def test_tokens_are_numbered_as_they_come(texts: list[tuple[str, bool]]) -> None:
    vocabulary = Vocabulary()
    known: dict[str, int] = {}
    for text, learn in texts:
        numbers = known if learn else dict(known)
        expected = [numbers.setdefault(token, len(numbers)) for token in tokenize(text)]
        assert vocabulary.ids(text, learn).tolist() == expected
        assert len(vocabulary) == len(known)


def test_many_words_are_told_apart_and_take_little() -> None:
    vocabulary = Vocabulary()
    words = [f"w{i}" for i in range(50_000)]
    assert vocabulary.ids(" ".join(words), learn=True).tolist() == list(range(50_000))
    assert vocabulary.ids(" ".join(words[::-1])).tolist() == list(range(50_000))[::-1]
    assert vocabulary.nbytes / len(vocabulary) < 20
