"""When refusals that blame the settings are believed."""

from __future__ import annotations

import pytest

from engine.limits.doubts import OF_THE_PROMPT, Doubts


def believed(doubts: Doubts, *refusals: tuple[int, str]) -> list[bool]:
    return [doubts.believed(index, reason) for index, reason in refusals]


@pytest.mark.parametrize("reason", ["http_401", "http_404", "html", "model", "certificate"])
def test_before_any_answer_one_confirmation_is_enough(reason: str) -> None:
    """Also by the same request, since the fault cannot lie in its prompt."""
    assert believed(Doubts(20), (0, reason), (0, reason)) == [False, True]
    assert believed(Doubts(20), (0, reason), (1, reason)) == [False, True]


@pytest.mark.parametrize("reason", sorted(OF_THE_PROMPT))
def test_what_can_lie_in_a_prompt_is_confirmed_by_another(reason: str) -> None:
    assert believed(Doubts(20), (0, reason), (0, reason), (1, reason)) == [False, False, True]


@pytest.mark.parametrize("reason", ["http_401", "http_403", "html"])
def test_after_an_answer_it_takes_many_prompts(reason: str) -> None:
    """The 20th different one, and not the 20th refusal."""
    doubts = Doubts(20)
    doubts.answered()
    refusals = [(index // 2, reason) for index in range(39)]
    assert believed(doubts, *refusals) == [False] * 38 + [True]


def test_a_good_answer_between_clears_all() -> None:
    doubts = Doubts(3)
    doubts.answered()
    assert believed(doubts, (0, "html"), (1, "html")) == [False, False]
    doubts.answered()
    assert believed(doubts, (2, "html"), (3, "html"), (4, "html")) == [False, False, True]


def test_reasons_add_up() -> None:
    """A gateway on its way down refuses in several ways."""
    doubts = Doubts(3)
    doubts.answered()
    assert believed(doubts, (0, "html"), (1, "http_404"), (2, "http_401")) == [False, False, True]


def test_a_wrong_key_is_found_though_the_first_prompt_was_flagged() -> None:
    assert believed(Doubts(20), (0, "http_403"), (1, "http_401")) == [False, True]


def test_a_prompt_that_is_refused_again_is_no_news() -> None:
    """When the good ones are done, none but the refused are left to be posted again."""
    doubts = Doubts(3)
    doubts.answered()
    for index in range(9):
        assert not doubts.believed(index, "http_400")
        doubts.answered()
    assert believed(doubts, *((index, "http_400") for index in range(9))) == [False] * 9
    doubts.answered()
    assert believed(doubts, *((index, "http_400") for index in (10, 11, 12))) == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("reason", ["http_400", "http_401"])
def test_answers_of_an_earlier_session_speak_for_the_model_and_not_for_the_key(reason: str) -> None:
    doubts = Doubts(3)
    doubts.answered_before = True
    found = believed(doubts, (0, reason), (1, reason), (2, reason))
    assert found.index(True) == (2 if reason in OF_THE_PROMPT else 1)
