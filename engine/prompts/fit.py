"""Fit each prompt into the context before it is sent, and learn the context where nobody states it.

Texts that come in many prompts are counted once, so that fitting a prompt is a few additions:
tokens of the parts add up to at least the tokens of the whole, save for a merge at a seam, which
``SEAM_TOKENS`` allows for. Texts of input rows come once and are estimated.

While the context length is unknown, a prompt larger than any that has fitted so far goes alone (a
scout, see ``goes_alone``): thus one overflow message, not one for each request in flight, teaches
the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

from engine.backends.base import Verdict
from engine.languages import measure
from engine.prompts.tokens import CountTokens, estimate
from engine.recipes.base import Ask, Part, Recipe
from engine.recipes.guard import RecipeFault, parts_of
from engine.records import Api, Message, Prompt, Record, Sampling

__all__ = ["FitStep", "Prompts", "Rows", "join"]

FitStep = Literal["demonstrations", "prompt", "completion"]

SEAM_TOKENS = 8
"""Tokens that a prompt may have beyond the sum of its parts, since text is cut otherwise where they
meet. Too few would cost an overflow, each more a little room for the answer."""
CHAT_TOKENS = 64
"""What a chat template may add around one message."""
SHRINK = 0.8
"""Alpaca's factor after each "reduce your prompt" (utils.py, openai_completion)."""
MAX_SHRINKS = 8
"""Overflows after which a prompt is given up. Without numbers from the server, answer and prompt
shrink in turn, so by then each is below half of what it was."""
MOST_SHORTENED = 13
"""Times that a part is shortened to SHRINK of its length: down to a twentieth."""
MIN_COMPLETION_TOKENS = 64
"""No answer is made shorter than this to fit: it would be cut off, paid for and refused."""
MIN_CORE_CHARS = 80
"""No text is shortened below this: what is left should still say what it is about."""
OWN_FIELDS = frozenset(("max_tokens", "temperature", "top_p", "stop", "forbid_eos"))
"""Of what a recipe samples by: those that ``Sampling`` has fields for."""


class Rows(Protocol):
    """Input rows by number, from 0."""

    def row(self, number: int) -> Record | None:
        """None: there are not so many."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """How far a prompt gives way."""

    dropped: int = 0
    """Droppable parts that are left out."""
    shortened: int = 0
    """Times that others are shortened."""


WHOLE = _Cut()
"""Nothing gives way."""


class Prompts:
    """Makes prompt ``index`` of the plan, as large as the context allows.

    Args:
        recipe: what is asked.
        seed: the run's seed.
        sampling: ``max_tokens``, ``temperature`` and ``top_p``, where the recipe has none of its
            own.
        given: those of them that the person gave, and further fields of each request's body; they
            come before the recipe's.
        fit: what gives way, first to last.
        context_length: tokens of prompt and completion together; None until known.
        rows: the input; ``samples`` requests are made for each row.
        pool: the accepted rows that a request may show, for recipes that show some.
        reseeds: how often answers were dropped to be asked anew with other seeds.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        seed: int,
        api: Api,
        sampling: Mapping[str, Any],
        given: Mapping[str, Any] | None = None,
        send_seed: bool = True,
        fit: Sequence[FitStep] = get_args(FitStep),
        context_length: int | None = None,
        rows: Rows | None = None,
        samples: int = 1,
        pool: Callable[[int], Sequence[Record]] | None = None,
        reseeds: int = 0,
    ) -> None:
        self._recipe = recipe
        self._seed = seed
        self._api: Api = api
        self._margin = SEAM_TOKENS + (CHAT_TOKENS if api == "chat" else 0)
        self._sampling = dict(sampling)
        self._given = dict(given or {})
        self._send_seed = send_seed
        self._fit = tuple(fit)
        self._rows = rows
        self._samples = samples
        self._pool = pool
        self._seed_keys = (-1, reseeds) if reseeds else (-1,)
        self._counted: dict[str, int] = {}
        self._scale = 1.0
        self._largest_fitted = 0
        self._shrinks: dict[int, int] = {}
        self._most_completion: int | None = None
        """Completion tokens that the server allows at most, once it has said so."""
        self.context_length = context_length

    @property
    def max_tokens(self) -> int:
        """Completion tokens asked for where they fit."""
        wanted: int = {**self._sampling, **self._given}["max_tokens"]
        return min(wanted, self._most_completion or wanted)

    async def count(self, count: CountTokens) -> None:
        """Count the recipe's recurring texts, or estimate them where ``count`` cannot."""
        try:
            texts = list(dict.fromkeys(self._recipe.recurring()))
        except RecipeFault:  # which each prompt with such a text raises again
            return
        if texts:
            sizes = await count(texts) or estimate(texts)
            self._counted = dict(zip(texts, sizes, strict=True))

    def prompt(self, index: int) -> Prompt | None:
        """Request ``index``, fitted to the context as far as it is known; None: the input has not
        so many rows.

        Raises RecipeFault, which is this request's.
        """
        row = None
        if self._rows is not None:
            row = self._rows.row(index // self._samples)
            if row is None:
                return None
        return self._fitted(self._ask(index, row))

    def ask(self, index: int) -> Ask:
        """What request ``index`` is about. Its row must be there."""
        row = None if self._rows is None else self._rows.row(index // self._samples)
        return self._ask(index, row)

    def _ask(self, index: int, row: Record | None) -> Ask:
        pool = self._pool(index) if self._pool is not None else ()
        return Ask(index=index, seed=self._seed, row=row, sample=index % self._samples, pool=pool)

    def refit(self, prompt: Prompt, verdict: Verdict) -> Prompt | None:
        """The prompt again, smaller, after the server said that it overflows. None: nothing is left
        to give.

        Learns the context length, and how far the count was off, from the server's own numbers.
        Without numbers both budgets shrink to 0.8 of what they were, first the completion's, then
        the prompt's.
        """
        tries = self._shrinks[prompt.index] = self._shrinks.get(prompt.index, 0) + 1
        if tries > MAX_SHRINKS:
            return None
        if verdict.prompt_tokens and prompt.tokens:
            self._scale = max(self._scale, self._scale * verdict.prompt_tokens / prompt.tokens)
        ask = self._ask(prompt.index, prompt.row)
        limit = verdict.completion_limit
        if limit and limit < prompt.sampling.max_tokens:
            self._most_completion = min(self._most_completion or limit, limit)
            sampling = replace(prompt.sampling, max_tokens=limit)
            return replace(prompt, sampling=sampling, truncated=True)
        if verdict.context_length and verdict.context_length != self.context_length:
            self.context_length = verdict.context_length
            return replace(self._fitted(ask), truncated=True)
        completion = max(int(prompt.sampling.max_tokens * SHRINK), MIN_COMPLETION_TOKENS)
        if tries % 2 and completion < prompt.sampling.max_tokens:
            sampling = replace(prompt.sampling, max_tokens=completion)
            return replace(prompt, sampling=sampling, truncated=True)
        parts = parts_of(self._recipe, ask)
        sources = [part.source for part in parts if part.gives_way == "drop"]
        droppable, left = len(sources), len(set(sources).intersection(prompt.demonstrations))
        for cut in (
            _Cut(droppable - left + 1, 0) if left > 1 else None,
            *(_Cut(max(0, droppable - 1), times) for times in range(1, MOST_SHORTENED + 1)),
        ):
            if cut is None:
                continue
            smaller = self._fitted(ask, cut, completion)
            if (smaller.text, smaller.messages) != (prompt.text, prompt.messages) and (
                smaller.size_bytes < prompt.size_bytes
            ):
                return replace(smaller, truncated=True)
        return None

    def goes_alone(self, prompts: Sequence[Prompt]) -> bool:
        """Whether a call of ``prompts`` is larger than all that have fitted, of unknown context."""
        return self.context_length is None and self._largest_fitted < max(map(_total, prompts))

    def current(self, prompt: Prompt) -> Prompt:
        """The prompt as it is made by what is known now: the context may have been learned while
        it waited for its turn.
        """
        context = self.context_length
        if context is None or prompt.truncated or _total(prompt) <= context:
            return prompt
        return self._fitted(self._ask(prompt.index, prompt.row))

    def fitted(self, prompt: Prompt) -> None:
        """The server answered this prompt: prompts up to its size go freely from now on."""
        self._shrinks.pop(prompt.index, None)
        self._largest_fitted = max(self._largest_fitted, _total(prompt))

    def _tokens(self, parts: Sequence[Part]) -> int:
        left = sum(part.gives_way == "drop" for part in parts)
        counted, total = self._counted, 0
        for part in parts:
            text = part.render(left)
            known = counted.get(text)
            total += estimate([text])[0] if known is None else known
        return math.ceil(self._scale * total) + self._margin

    def _cut(self, parts: Sequence[Part], cut: _Cut) -> Sequence[Part]:
        """The parts without the last droppable ones, and with the others shortened."""
        if cut == WHOLE:
            return parts
        droppable = [place for place, part in enumerate(parts) if part.gives_way == "drop"]
        gone = set(droppable[len(droppable) - cut.dropped :])
        kept = [part for place, part in enumerate(parts) if place not in gone]
        return [self._shortened(part, cut.shortened) for part in kept]

    def _shortened(self, part: Part, times: int) -> Part:
        """The part shortened; its share of the tokens goes with its share of the text."""
        shorter = part
        for _ in range(times):
            shorter = _shortened(shorter)
        if shorter is not part and isinstance(part.text, str) and isinstance(shorter.text, str):
            whole = self._counted.get(part.text)
            if whole is not None:
                share = whole * len(shorter.text) / len(part.text)
                self._counted[shorter.text] = math.ceil(share)
        return shorter

    def _fitted(self, ask: Ask, cut: _Cut = WHOLE, most: int | None = None) -> Prompt:
        """The prompt, at least cut as told and with at most so many tokens of completion."""
        sampling = {**self._sampling, **self._recipe.sampling(ask), **self._given}
        max_tokens = min(sampling["max_tokens"], self._most_completion or sampling["max_tokens"])
        max_tokens = min(max_tokens, most or max_tokens)
        whole = parts_of(self._recipe, ask)
        parts = self._cut(whole, cut)
        tokens, context = self._tokens(parts), self.context_length
        truncated = context is not None and tokens + max_tokens > context
        if context is not None and truncated:
            # A completion beyond half of the context is not worth a demonstration: down to there it
            # gives way first, whatever the order.
            wanted = min(max_tokens, context // 2)
            for step in self._fit:
                if tokens + wanted <= context:
                    break
                if step == "completion":
                    wanted = max(MIN_COMPLETION_TOKENS, context - tokens)
                while tokens + wanted > context and (more := _more(whole, cut, step)) is not None:
                    cut = more
                    parts = self._cut(whole, cut)
                    tokens = self._tokens(parts)
            max_tokens = min(max_tokens, max(MIN_COMPLETION_TOKENS, context - tokens))
        return self._made(ask, parts, {**sampling, "max_tokens": max_tokens}, tokens, truncated)

    def _made(
        self, ask: Ask, parts: Sequence[Part], sampling: dict[str, Any], tokens: int, cut: bool
    ) -> Prompt:
        text, messages = join(parts)
        return Prompt(
            index=ask.index,
            text=text,
            messages=messages,
            api="chat" if messages else self._api,
            sampling=Sampling(
                max_tokens=sampling["max_tokens"],
                temperature=sampling["temperature"],
                top_p=sampling["top_p"],
                stop=tuple(sampling.get("stop", ())),
                # Each request its own, so that two prompts alike do not get the same answer.
                seed=ask.draw(*self._seed_keys) >> 33 if self._send_seed else None,
                forbid_eos=sampling.get("forbid_eos", False),
                extra={name: sampling[name] for name in sampling.keys() - OWN_FIELDS},
            ),
            row=ask.row,
            demonstrations=tuple(part.source for part in parts if part.source),
            tokens=tokens,
            truncated=cut,
        )


def join(parts: Sequence[Part]) -> tuple[str, tuple[Message, ...]]:
    """The text of a prompt, or its turns where not all parts are the user's; the other is empty."""
    left = sum(part.gives_way == "drop" for part in parts)
    if all(part.role == "user" for part in parts):
        return "".join([part.render(left) for part in parts]), ()
    turns: list[Message] = []
    for part in parts:
        content = part.render(left)
        if part.role == "system" and not content.strip():
            continue  # hosts refuse a system turn without a word
        if turns and turns[-1].role == part.role:
            turns[-1] = Message(role=part.role, content=turns[-1].content + content)
        else:
            turns.append(Message(role=part.role, content=content))
    return "", tuple(turns)


def _total(prompt: Prompt) -> int:
    return (prompt.tokens or 0) + prompt.sampling.max_tokens


def _more(parts: Sequence[Part], cut: _Cut, step: FitStep) -> _Cut | None:
    """One step further; None where there is none."""
    if step == "demonstrations":
        droppable = sum(part.gives_way == "drop" for part in parts)
        return replace(cut, dropped=cut.dropped + 1) if cut.dropped < droppable - 1 else None
    if step == "prompt" and cut.shortened < MOST_SHORTENED:
        return replace(cut, shortened=cut.shortened + 1)
    return None


def _shortened(part: Part) -> Part:
    """The part with its core cut to ``SHRINK`` of its length, down to a floor; at a word's end
    where words stand apart.
    """
    if not isinstance(part.text, str) or (part.gives_way != "shorten" and part.core is None):
        return part
    start, end = part.core or (0, len(part.text))
    core = part.text[start:end]
    if len(core) <= MIN_CORE_CHARS:
        return part
    kept = core[: max(MIN_CORE_CHARS, int(len(core) * SHRINK))]
    if measure(kept)[1] == "words":
        kept = kept.rsplit(None, 1)[0]
    kept += " …"
    text = f"{part.text[:start]}{kept}{part.text[end:]}"
    return replace(part, text=text, core=(start, start + len(kept)))
