"""Prompts fit the context, and a context that nobody states is learned once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine.backends.base import Verdict
from engine.prompts.fit import MAX_SHRINKS, FitStep, Prompts
from engine.prompts.tokens import estimate
from engine.recipes import alpaca
from engine.records import Prompt, SeedTask
from tests.engine.asked import alpaca_prompts

pytestmark = pytest.mark.anyio

TASKS = [
    SeedTask(id=f"t{n}", instruction=f"Do task {n}", input="word " * 40 * (n % 3), output="ok")
    for n in range(12)
]


async def words(texts: Sequence[str]) -> list[int] | None:
    """A tokenizer that counts words: exact and additive, as tests want it."""
    return [len(text.split()) for text in texts]


async def made(
    context: int | None = None,
    *,
    max_tokens: int = 300,
    fit: tuple[FitStep, ...] = ("demonstrations", "prompt", "completion"),
) -> Prompts:
    prompts = alpaca_prompts(TASKS, seed=1, max_tokens=max_tokens, fit=fit, context_length=context)
    await prompts.count(words)
    return prompts


def nth(prompts: Prompts, index: int) -> Prompt:
    prompt = prompts.prompt(index)
    assert prompt is not None
    return prompt


def size(prompt: Prompt) -> int:
    return len(prompt.text.split()) + prompt.sampling.max_tokens


async def test_a_roomy_context_changes_nothing() -> None:
    prompts = await made(100_000)
    for index in range(50):
        prompt = nth(prompts, index)
        assert len(prompt.demonstrations) == 3
        assert prompt.sampling.max_tokens == 300
        assert not prompt.truncated


@pytest.mark.parametrize("context", [280, 350, 450, 600])
async def test_every_prompt_fits_and_says_when_it_was_cut(context: int) -> None:
    prompts, roomy = await made(context), await made(100_000)
    for index in range(100):
        prompt = nth(prompts, index)
        assert size(prompt) <= context
        assert prompt.truncated == (prompt.text != nth(roomy, index).text) or (
            prompt.sampling.max_tokens < 300
        )


async def test_a_prompt_is_a_function_of_its_index() -> None:
    one, two = await made(500), await made(500)
    assert [nth(one, i) for i in range(40)] == [nth(two, i) for i in reversed(range(40))][::-1]


async def test_what_gives_way_first_is_a_choice() -> None:
    """At 520 words both ways fit; each takes from its own part."""
    demonstrations = await made(520, fit=("demonstrations",))
    completion = await made(520, fit=("completion",))
    index = next(i for i in range(99) if len(nth(demonstrations, i).demonstrations) < 3)
    assert len(nth(completion, index).demonstrations) == 3
    assert nth(completion, index).sampling.max_tokens < 300


async def test_the_servers_numbers_teach_the_limit() -> None:
    prompts = await made()
    prompt = nth(prompts, 0)
    smaller = prompts.refit(
        prompt,
        Verdict(kind="overflow", reason="context", context_length=400, prompt_tokens=prompt.tokens),
    )
    assert smaller is not None
    assert size(smaller) <= 400
    assert smaller.truncated
    assert all(size(nth(prompts, index)) <= 400 for index in range(50))


async def test_a_count_that_was_too_low_is_corrected_for_all_prompts() -> None:
    prompts = await made()
    prompt = nth(prompts, 0)
    assert prompt.tokens is not None
    verdict = Verdict(
        kind="overflow", reason="context", context_length=9000, prompt_tokens=2 * prompt.tokens
    )
    prompts.refit(prompt, verdict)
    again = nth(prompts, 0)
    assert again.tokens is not None
    assert again.text == prompt.text
    assert again.tokens >= 2 * prompt.tokens - 10


async def test_without_numbers_it_shrinks_to_four_fifths_and_ends() -> None:
    """fault_031: an overflow is never answered with the same request, and never for ever."""
    prompts = await made()
    prompt: Prompt | None = nth(prompts, 0)
    sizes = []
    while prompt is not None:
        sizes.append(size(prompt))
        prompt = prompts.refit(prompt, Verdict(kind="overflow", reason="context"))
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[1] - len(nth(prompts, 0).text.split()) == 240
    assert len(sizes) <= MAX_SHRINKS + 1


async def test_while_the_context_is_unknown_larger_prompts_go_alone() -> None:
    """Until one of its size was answered, a prompt may be the first that overflows."""
    prompts = await made()
    few = sorted((nth(prompts, index) for index in range(50)), key=lambda p: p.tokens or 0)
    assert prompts.goes_alone(few[:1])
    prompts.fitted(few[25])
    assert not prompts.goes_alone(few[:26])
    assert prompts.goes_alone(few[-1:])
    prompts.context_length = 4096
    assert not prompts.goes_alone(few[-1:])


def test_an_estimate_is_on_the_safe_side() -> None:
    """English prose takes about four bytes a token; the estimate assumes three."""
    (tokens,) = estimate([alpaca.header()])
    assert tokens > len(alpaca.header().split()) * 1.3
