"""Prompts fit the context, and a context that nobody states is learned once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine.backends.base import Verdict
from engine.prompts.fit import MAX_SHRINKS, Budget, FitStep, estimate
from engine.recipes import alpaca
from engine.records import Prompt, SeedTask

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
) -> Budget:
    budget = Budget(
        TASKS, seed=1, api="completions", demonstrations=3, max_tokens=max_tokens,
        temperature=1, top_p=1, fit=fit, context_length=context,
    )  # fmt: skip
    await budget.count_parts(words)
    return budget


def size(prompt: Prompt) -> int:
    return len(prompt.text.split()) + prompt.sampling.max_tokens


async def test_a_roomy_context_changes_nothing() -> None:
    budget = await made(100_000)
    for index in range(50):
        prompt = budget.prompt(index)
        assert len(prompt.demonstrations) == 3
        assert prompt.sampling.max_tokens == 300
        assert not prompt.truncated


@pytest.mark.parametrize("context", [280, 350, 450, 600])
async def test_every_prompt_fits_and_says_when_it_was_cut(context: int) -> None:
    budget, roomy = await made(context), await made(100_000)
    for index in range(100):
        prompt = budget.prompt(index)
        assert size(prompt) <= context
        assert prompt.truncated == (prompt.text != roomy.prompt(index).text) or (
            prompt.sampling.max_tokens < 300
        )


async def test_a_prompt_is_a_function_of_its_index() -> None:
    one, two = await made(500), await made(500)
    assert [one.prompt(i) for i in range(40)] == [two.prompt(i) for i in reversed(range(40))][::-1]


async def test_what_gives_way_first_is_a_choice() -> None:
    """At 520 words both ways fit; each takes from its own part."""
    demonstrations = await made(520, fit=("demonstrations",))
    completion = await made(520, fit=("completion",))
    index = next(i for i in range(99) if len(demonstrations.prompt(i).demonstrations) < 3)
    assert len(completion.prompt(index).demonstrations) == 3
    assert completion.prompt(index).sampling.max_tokens < 300


async def test_the_servers_numbers_teach_the_limit() -> None:
    budget = await made()
    prompt = budget.prompt(0)
    smaller = budget.refit(
        prompt,
        Verdict(kind="overflow", reason="context", context_length=400, prompt_tokens=prompt.tokens),
    )
    assert smaller is not None
    assert size(smaller) <= 400
    assert smaller.truncated
    assert all(size(budget.prompt(index)) <= 400 for index in range(50))


async def test_a_count_that_was_too_low_is_corrected_for_all_prompts() -> None:
    budget = await made()
    prompt = budget.prompt(0)
    assert prompt.tokens is not None
    verdict = Verdict(
        kind="overflow", reason="context", context_length=9000, prompt_tokens=2 * prompt.tokens
    )
    budget.refit(prompt, verdict)
    again = budget.prompt(0)
    assert again.tokens is not None
    assert again.text == prompt.text
    assert again.tokens >= 2 * prompt.tokens - 10


async def test_without_numbers_it_shrinks_to_four_fifths_and_ends() -> None:
    """fault_031: an overflow is never answered with the same request, and never for ever."""
    budget = await made()
    prompt: Prompt | None = budget.prompt(0)
    sizes = []
    while prompt is not None:
        sizes.append(size(prompt))
        prompt = budget.refit(prompt, Verdict(kind="overflow", reason="context"))
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[1] - len(budget.prompt(0).text.split()) == 240
    assert len(sizes) <= MAX_SHRINKS + 1


async def test_while_the_context_is_unknown_larger_prompts_go_alone() -> None:
    """Until one of its size was answered, a prompt may be the first that overflows."""
    budget = await made()
    prompts = sorted((budget.prompt(index) for index in range(50)), key=lambda p: p.tokens or 0)
    assert budget.goes_alone(prompts[:1])
    budget.fitted(prompts[25])
    assert not budget.goes_alone(prompts[:26])
    assert budget.goes_alone(prompts[-1:])
    budget.context_length = 4096
    assert not budget.goes_alone(prompts[-1:])


def test_an_estimate_is_on_the_safe_side() -> None:
    """English prose takes about four bytes a token; the estimate assumes three."""
    (tokens,) = estimate([alpaca.header()])
    assert tokens > len(alpaca.header().split()) * 1.3
