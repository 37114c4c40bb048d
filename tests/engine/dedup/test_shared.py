"""Runs of words in common with references."""

from __future__ import annotations

import random

import pytest

from engine.dedup import shared
from engine.dedup.shared import Shared, SharedRuns
from engine.languages import MIXED, tokens_of

QUESTION = "Natalia sold clips to 48 of her friends in April, and then half as many in May."
WORDS = "natalia sold clips to 48 of her friends"
CHINESE = "小明有五个苹果,他给了小红两个,还剩几个?"


@pytest.mark.parametrize(
    ("text", "run"),
    [
        (f"Solve this: {QUESTION} Thank you!", WORDS),
        ("NATALIA sold “clips” —\nto 48 of her FRIENDS", WORDS),
        ("Natalia sold clips to 48 of her neighbours", None),
        ("xNatalia sold clips to 48 of her friends", None),
        ("natalia sold clips to 48 of her friendships", None),
        ("请解答:小明有五个苹果,他给了她", "小 明 有 五 个 苹 果 他"),
        (f"这道题是英文的:{QUESTION}", WORDS),
        ("小明有五个梨", None),
        ("", None),
        ("half a \ud800 pair", None),
    ],
)  # fmt: skip
def test_a_run_is_found_wherever_it_stands(text: str, run: str | None) -> None:
    runs = SharedRuns(8)
    for number, reference in enumerate((CHINESE, "Too short.", QUESTION, QUESTION)):
        runs.add(reference, f"against:b.jsonl:{number}")
    assert runs.short == 1
    found = runs.find(text)
    if run is None:
        assert found is None
    elif run == WORDS:
        assert found == Shared(run, QUESTION, "against:b.jsonl:2")
    else:
        assert found == Shared(run, CHINESE, "against:b.jsonl:0")


def test_references_may_come_after_a_search() -> None:
    runs = SharedRuns(2)
    assert runs.find("a b") is None
    runs.add("a b", "one")
    assert runs.find("b a b") == Shared("a b", "a b", "one")
    runs.add("c b a", "two")
    assert runs.find("b a b") == Shared("b a", "c b a", "two")


@pytest.mark.parametrize("bits", [64, 3])
def test_all_are_found_and_no_other(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by comparing every run with every run, also where hashes are the same by chance."""
    monkeypatch.setattr(shared, "hash", lambda run: hash(run) % (1 << bits - 1), raising=False)
    rng, runs = random.Random(0), SharedRuns(3)
    texts = [" ".join(rng.choices("abcdef", k=rng.randrange(9))) for _ in range(60)]
    known: dict[str, str] = {}
    for number, text in enumerate(texts[:15]):
        runs.add(text, str(number))
        for run in _runs(text, 3):
            known.setdefault(run, str(number))
    for text in texts[15:]:
        wanted = next(((run, known[run]) for run in _runs(text, 3) if run in known), None)
        found = runs.find(text)
        assert (found and (found.run, found.source)) == wanted


def _runs(text: str, words: int) -> list[str]:
    tokens = tokens_of(text, MIXED)
    return [" ".join(tokens[i : i + words]) for i in range(len(tokens) - words + 1)]
