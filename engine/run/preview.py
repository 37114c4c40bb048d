"""The first prompts of a run as they would be sent, and what becomes of their answers, before
anything large is paid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from engine.backends.base import Backend, Failure
from engine.decide.decider import Decider
from engine.dedup.cascade import Cascade
from engine.prompts.fit import Prompts
from engine.recipes.guard import RecipeFault
from engine.records import Answer, Completion, Decision, Prompt, Record, Usage
from engine.run import generate
from engine.run.settle import Settled, answered_by, settle, stages_of
from engine.settings import RunConfig

__all__ = ["Given", "Preview", "asks_somebody", "preview"]

CHOOSES = ("backend", "base_url", "endpoint", "endpoints_file", "model")
"""Settings that say who is to answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """One request of the plan, as far as it came."""

    index: int
    stage: str = ""
    """Of a recipe with several, the one that asks."""
    prompt: Prompt | None
    """None: the recipe could not make it; ``fault`` says why."""
    fault: str = ""
    answer: Completion | None = None
    """None: nobody was asked, or ``fault`` says why there is no answer."""
    decisions: tuple[Decision, ...] = ()
    """What the recipe makes of the answer. Near-duplicates are not looked for; what is exactly the
    same as in an earlier answer is refused.
    """


def asks_somebody(config: RunConfig) -> bool:
    """Whether the settings say who is to answer."""
    return not config.model_fields_set.isdisjoint(CHOOSES)


async def preview(
    config: RunConfig,
    n: int = 3,
    *,
    answer: Callable[[Prompt], str] | str | None = None,
) -> list[Preview]:
    """The first ``n`` requests of a run with these settings; fewer where the input has fewer.

    Each is asked once where the settings name a backend, a server or a model. ``answer`` is taken
    in the place of theirs: one text for all, or a function of the prompt. Nothing is kept.

    Of a recipe with several stages each further one asks about the rows that the requests before
    gave, all samples of the first ``n``; where nobody answers, there is the first stage alone.

    Raises WoolmillError where a run could not start either.
    """
    asks = answer is None and asks_somebody(config)
    chain = stages_of(settle(config, asks=asks), asks=asks)
    previews: list[Preview] = []
    async with AsyncExitStack() as stack:
        backends: dict[str, Backend] = {}
        rows: list[Record] | None = None
        for settled in chain if asks or answer is not None else chain[:1]:
            model = settled.recipe.model
            if asks and model not in backends:
                backends[model] = generate.make_backends(settled.config)[0]
                stack.push_async_callback(backends[model].aclose)
                await backends[model].start()
            came = await _stage(settled, rows, n, answer, backends.get(model))
            name = settled.config.stage.rpartition("/")[2]
            previews += [replace(each, stage=name) for each in came]
            accepted = (d.record for each in came for d in each.decisions if d.accepted)
            rows = [record for record in accepted if record is not None]
    return previews


class Given:
    """Rows that are all there, as ``Prompts`` takes them."""

    def __init__(self, rows: Sequence[Record]) -> None:
        self._rows = rows

    def row(self, number: int) -> Record | None:
        return self._rows[number] if number < len(self._rows) else None


async def _stage(
    settled: Settled,
    rows: list[Record] | None,
    n: int,
    answer: Callable[[Prompt], str] | str | None,
    backend: Backend | None,
) -> list[Preview]:
    """The first requests of one stage, over ``rows`` or the run's own input."""
    if backend is not None:
        settled = answered_by(settled, backend.model, backend)
    samples = settled.config.samples or 1
    if settled.recipe.reduces or rows is not None:
        n *= samples
    prompts = generate.make_prompts(settled, None if rows is None else Given(rows))
    known = backend.context_length if backend is not None else None
    prompts.context_length = settled.config.context_length or known
    await prompts.count(_cannot_count if backend is None else backend.count_tokens)
    previews = _prompts(prompts, n)
    for place, each in enumerate(previews):
        if each.prompt is None:
            continue
        if answer is not None:
            text = answer if isinstance(answer, str) else answer(each.prompt)
            usage = Usage(prompt_tokens=0, completion_tokens=0, estimated=True)
            completion = Completion(text=text, finish_reason="stop", usage=usage)
            previews[place] = replace(each, answer=completion)
        elif backend is not None:
            previews[place] = await _asked(backend, each, each.prompt)
    return _decided(previews, settled)


async def _asked(backend: Backend, each: Preview, prompt: Prompt) -> Preview:
    """The preview with its answer, or why there is none."""
    try:
        (came,) = await backend.complete([prompt])
    except Failure as failure:
        came = failure
    if isinstance(came, Completion):
        return replace(each, answer=came)
    if isinstance(came, Exception):
        return replace(each, fault=str(came))
    raise came


async def _cannot_count(_texts: Sequence[str]) -> list[int] | None:
    return None


def _prompts(prompts: Prompts, n: int) -> list[Preview]:
    previews = []
    for index in range(n):
        try:
            prompt = prompts.prompt(index)
        except RecipeFault as fault:
            previews.append(Preview(index=index, prompt=None, fault=str(fault)))
            continue
        if prompt is None:
            break
        previews.append(Preview(index=index, prompt=prompt))
    return previews


def _decided(previews: Sequence[Preview], settled: Settled) -> list[Preview]:
    """The previews with what a run would make of their answers."""
    config = settled.config
    decider = Decider(
        settled.recipe,
        Cascade(None),
        seed=config.seed,
        samples=config.samples or 1,
        api=config.asked_api,
        carry=config.carry,
    )
    answers = [
        Answer(
            index=each.index,
            demonstrations=each.prompt.demonstrations,
            completion=each.answer,
            row=each.prompt.row,
        )
        for each in previews
        if each.prompt is not None and each.answer is not None
    ]
    decisions, _ = decider.decide(answers, limit=config.target)
    return [
        replace(each, decisions=tuple(d for d in decisions if d.index == each.index))
        for each in previews
    ]
