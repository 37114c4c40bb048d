"""The parts of the engine in this process: shared prefixes, choosing tokens, growing texts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.backends.local.batching import common_prefix
from engine.backends.local.sampling import Draw, StopText, choose
from engine.records import Sampling


def test_the_prefix_that_spares_most() -> None:
    """A short one shared by many wins over a long one shared by one; one token is left over."""
    header = [1] * 50
    many = [[*header, number] for number in range(2, 12)]
    assert common_prefix([*header, 2, 3, 4], [*many, [*header, 2, 3, 9]]) == 50
    assert common_prefix([1, 2, 3, 4], [[1, 2, 3, 9]]) == 3
    assert common_prefix([1, 2, 3], [[1, 2, 3], [1, 2, 3]]) == 2
    assert common_prefix([1, 2], []) == 0
    assert common_prefix([1], [[1]]) == 0


def test_choose_follows_the_distribution() -> None:
    """Frequencies are those of the softmax; a nucleus is cut and scaled; silence is kept."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    rounds = 4000
    for top_p, forbid, expected in [
        (1.0, False, [0.5, 0.3, 0.15, 0.05]),
        (0.75, False, [0.625, 0.375, 0, 0]),
        (1.0, True, [0, 0.6, 0.3, 0.1]),
        (0.01, False, [1, 0, 0, 0]),
    ]:
        sampling = Sampling(max_tokens=1, top_p=top_p, forbid_eos=forbid, seed=1)
        draws = [Draw.of(sampling)] * rounds
        tokens = choose(logits.repeat(rounds, 1), draws, (0,))
        shares = [tokens.count(token) / rounds for token in range(4)]
        assert shares == pytest.approx(expected, abs=0.03)


def test_choose_mixes_greedy_and_sampled_rows() -> None:
    """A greedy row takes the best token whatever stands beside it."""
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    draws = [Draw.of(Sampling(max_tokens=1, temperature=t, seed=3)) for t in (0, 1, 0)]
    tokens = choose(logits.clone(), draws, ())
    best = logits.argmax(-1).tolist()
    assert [tokens[0], tokens[2]] == [best[0], best[2]]


def test_a_number_next_to_one_still_finds_a_token() -> None:
    """The uniform number stays below the sum of all weights in single precision."""

    class Last(random.Random):
        def random(self) -> float:
            return 1 - 2**-53

    logits = torch.zeros(1, 49_152)
    logits[0, -10:] = -torch.inf
    [token] = choose(logits, [Draw(Sampling(max_tokens=1), Last())], ())
    assert token < 49_152 - 10


class Characters:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return bytes(token_ids).decode(errors="replace")


@given(st.text(max_size=40))
def test_text_grows_to_the_whole(text: str) -> None:
    """Decoded token by token, characters of several bytes included, text is what it is at once."""
    grown = StopText(Characters(), ())
    for byte in text.encode(errors="replace"):
        assert grown.add(byte) is False
    assert grown.finish() == text.encode(errors="replace").decode()


@given(
    st.text(alphabet="ab20.\n", max_size=30), st.lists(st.text("ab20.\n", min_size=1), max_size=3)
)
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    """Wherever a stop string is completed, nothing of it stays, and no earlier one is missed."""
    grown = StopText(Characters(), stop)
    stopped = False
    taken = ""
    for character in text:
        taken += character
        stopped = grown.add(ord(character))
        assert stopped == any(s in taken for s in stop)
        if stopped:
            break
    found = [taken.find(s) for s in stop if s in taken]
    assert grown.text == (taken[: min(found)] if found else taken)


def drawn(logits: list[float], made: Sequence[int] = (), **extra: Any) -> int:
    """The likeliest token of one row that has made ``made`` already."""
    draw = Draw.of(Sampling(max_tokens=9, temperature=0, extra=extra), [0])
    for token in made:
        draw.took(token)
    return choose(torch.tensor([logits]), [draw], ())[0]


def test_penalties_lower_what_was_there_already() -> None:
    """Presence once, frequency each time, repetition also what the prompt has (token 0)."""
    assert drawn([1.0, 3.0, 2.5], made=[1]) == 1
    assert drawn([1.0, 3.0, 2.5], made=[1], presence_penalty=0.6) == 2
    assert drawn([1.0, 3.0, 2.5], made=[1], frequency_penalty=0.4) == 1
    assert drawn([1.0, 3.0, 2.5], made=[1, 1], frequency_penalty=0.4) == 2
    assert drawn([3.0, 2.0, 1.0], repetition_penalty=2.0) == 1
    assert drawn([-1.0, -1.5, -9.0], repetition_penalty=2.0) == 1
    assert drawn([3.0, 2.0, 1.0], presence_penalty=9.0) == 0


@pytest.mark.parametrize(
    ("extra", "top_p", "left"),
    [
        ({"top_k": 2}, 1.0, {0, 1}),
        ({"top_k": 1}, 1.0, {0}),
        ({"top_k": -1}, 1.0, {0, 1, 2, 3}),
        ({"min_p": 0.4}, 1.0, {0, 1}),
        ({"min_p": 0.25}, 1.0, {0, 1, 2}),
        ({}, 0.55, {0, 1}),
        ({"top_k": 3}, 0.55, {0}),
    ],
)
def test_only_the_likeliest_tokens_are_left(
    extra: dict[str, Any], top_p: float, left: set[int]
) -> None:
    """Shares 0.5, 0.25, 0.15 and 0.1; top_p counts shares of what top_k leaves."""
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().repeat(400, 1)
    sampling = [Sampling(max_tokens=9, seed=seed, top_p=top_p, extra=extra) for seed in range(400)]
    assert set(choose(logits, [Draw.of(each) for each in sampling], ())) == left
