"""Fit each prompt into the context before it is sent, and learn the context where nobody states it.

Counting is done once for each part (header, demonstrations, tail), so that fitting a prompt is a
few additions: tokens of the parts add up to at least the tokens of the whole, save for a merge at a
seam, which ``SEAM_TOKENS`` allows for.

While the context length is unknown, a prompt larger than any that has fitted so far goes alone (a
scout, see ``goes_alone``): thus one overflow message, not one for each request in flight, teaches
the limit.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import anyio

from engine import models
from engine.backends.base import Verdict
from engine.errors import ConfigError
from engine.languages import ENGLISH, measure
from engine.pretrained import open_pretrained
from engine.recipes import alpaca
from engine.records import Api, Prompt, SeedTask

__all__ = ["Budget", "CountTokens", "FitStep", "tokenizer_counter"]

FitStep = Literal["demonstrations", "prompt", "completion"]
CountTokens = Callable[[Sequence[str]], Awaitable[list[int] | None]]

SEAM_TOKENS = 8
CHAT_TOKENS = 64
"""What a chat template may add around one message."""
BYTES_PER_TOKEN = 3.0
"""For an estimate where no tokenizer is at hand: English has about four bytes a token, code
three."""
SHRINK = 0.8
"""Alpaca's factor after each "reduce your prompt" (utils.py, openai_completion)."""
MAX_SHRINKS = 8
MIN_COMPLETION_TOKENS = 64
MIN_INPUT_CHARS = 80


def estimate(texts: Sequence[str]) -> list[int]:
    """Tokens of each text, guessed from its bytes."""
    return [math.ceil(len(text.encode(errors="replace")) / BYTES_PER_TOKEN) for text in texts]


class _Tokenizer(Protocol):
    def __call__(self, texts: list[str], *, add_special_tokens: bool) -> Any: ...


def tokenizer_counter(name: str) -> CountTokens:
    """Count with ``tiktoken:ENCODING_OR_MODEL``, or with a transformers tokenizer (folder or hub
    id).

    Raises:
        ConfigError: the package is not installed, or the tokenizer cannot be had.
    """
    if name.startswith("tiktoken:"):
        wanted = name.removeprefix("tiktoken:")
        try:
            import tiktoken

            try:
                encoding = tiktoken.get_encoding(wanted)
            except ValueError:
                encoding = tiktoken.encoding_for_model(wanted)
        except ImportError as exc:
            raise ConfigError(
                "tokenizer: tiktoken is missing; pip install 'woolmill[tiktoken]'"
            ) from exc
        except Exception as exc:  # tiktoken lets through whatever its download raised
            raise ConfigError(f"tokenizer {name!r} cannot be loaded: {exc}") from exc

        async def count_bpe(texts: Sequence[str]) -> list[int] | None:
            encoded = await anyio.to_thread.run_sync(
                lambda: encoding.encode_ordinary_batch(list(texts))
            )
            return [len(ids) for ids in encoded]

        return count_bpe

    try:
        from transformers import AutoTokenizer

        tokenizer: _Tokenizer = open_pretrained(AutoTokenizer, models.locate(name))
    except ImportError as exc:
        raise ConfigError(
            "tokenizer: transformers is missing; pip install 'woolmill[local]'"
        ) from exc
    except ConfigError:
        raise
    except Exception as exc:  # whatever transformers makes of a folder that is none of its own
        raise ConfigError(
            f"tokenizer {name!r} cannot be loaded; give a folder or a hub id"
        ) from exc

    async def count(texts: Sequence[str]) -> list[int] | None:
        encoded = await anyio.to_thread.run_sync(
            lambda: tokenizer(list(texts), add_special_tokens=False)
        )
        return [len(ids) for ids in encoded["input_ids"]]

    return count


@dataclass(frozen=True, slots=True)
class Parts:
    """Tokens of a prompt's parts, counted once."""

    header: int
    tail: int
    demonstrations: dict[str, int]
    estimated: bool


class Budget:
    """Makes prompt ``index`` of the plan, as large as the context allows.

    Args:
        tasks: the seed tasks.
        seed: the run's seed.
        demonstrations: how many tasks are shown where they fit.
        max_tokens: completion tokens asked for where they fit.
        extra: further fields of each request's body.
        fit: what gives way, first to last.
        context_length: tokens of prompt and completion together; None until known.
        language: what prompts are written in.
    """

    def __init__(
        self,
        tasks: Sequence[SeedTask],
        *,
        seed: int,
        api: Api,
        demonstrations: int,
        max_tokens: int,
        temperature: float,
        top_p: float,
        send_seed: bool = True,
        extra: Mapping[str, Any] | None = None,
        fit: Sequence[FitStep] = ("demonstrations", "prompt", "completion"),
        context_length: int | None = None,
        language: str = ENGLISH,
    ) -> None:
        self._language = language
        self._tasks = tasks
        self._by_id = {task.id: task for task in tasks}
        self._seed = seed
        self._api = api
        self._margin = SEAM_TOKENS + (CHAT_TOKENS if api == "chat" else 0)
        self._count = demonstrations
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._top_p = top_p
        self._send_seed = send_seed
        self._extra = extra or {}
        self._fit = tuple(fit)
        self._parts = Parts(0, 0, {}, estimated=True)
        self._scale = 1.0
        self._largest_fitted = 0
        self._shrinks: dict[int, int] = {}
        self.context_length = context_length

    @property
    def max_tokens(self) -> int:
        """Completion tokens asked for where they fit."""
        return self._max_tokens

    async def count_parts(self, count: CountTokens) -> None:
        """Count header, tail and each demonstration, or estimate them where ``count`` cannot."""
        texts = [alpaca.header(self._language), alpaca.tail(self._count, self._language)]
        texts += [alpaca.demonstration(1, task, self._language) for task in self._tasks]
        counted = await count(texts)
        sizes = counted or estimate(texts)
        ids = [task.id for task in self._tasks]
        self._parts = Parts(
            sizes[0], sizes[1], dict(zip(ids, sizes[2:], strict=True)), estimated=counted is None
        )

    def prompt(self, index: int) -> Prompt:
        """Request ``index``, fitted to the context as far as it is known."""
        shown = alpaca.sample(self._tasks, self._count, seed=self._seed, index=index)
        return self._fitted(index, shown, self._max_tokens)

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
        shown = [self._by_id[identity] for identity in prompt.demonstrations]
        limit = verdict.completion_limit
        if limit and limit < prompt.sampling.max_tokens:
            self._max_tokens = min(self._max_tokens, limit)
            sampling = replace(prompt.sampling, max_tokens=limit)
            return replace(prompt, sampling=sampling, truncated=True)
        if verdict.context_length and verdict.context_length != self.context_length:
            self.context_length = verdict.context_length
            again = alpaca.sample(self._tasks, self._count, seed=self._seed, index=prompt.index)
            fitted = self._fitted(prompt.index, again, self._max_tokens)
            return replace(fitted, truncated=True)
        completion = max(int(prompt.sampling.max_tokens * SHRINK), MIN_COMPLETION_TOKENS)
        if tries % 2 and completion < prompt.sampling.max_tokens:
            sampling = replace(prompt.sampling, max_tokens=completion)
            return replace(prompt, sampling=sampling, truncated=True)
        shown = shown[:-1] if len(shown) > 1 else [_shortened(shown[0], SHRINK)]
        smaller = self._fitted(prompt.index, shown, completion)
        if smaller.text == prompt.text and smaller.sampling == prompt.sampling:
            return None
        return replace(smaller, truncated=True)

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
        return self.prompt(prompt.index)

    def fitted(self, prompt: Prompt) -> None:
        """The server answered this prompt: prompts up to its size go freely from now on."""
        self._shrinks.pop(prompt.index, None)
        self._largest_fitted = max(self._largest_fitted, _total(prompt))

    def _tokens(self, shown: Sequence[SeedTask]) -> int:
        parts = self._parts
        demonstrations = sum(self._demonstration_tokens(task) for task in shown)
        return math.ceil(self._scale * (parts.header + parts.tail + demonstrations)) + self._margin

    def _demonstration_tokens(self, task: SeedTask) -> int:
        whole = self._parts.demonstrations.get(task.id)
        if whole is None:
            return estimate([alpaca.demonstration(1, task, self._language)])[0]
        full = self._by_id[task.id]
        if task is full or not full.input:
            return whole
        # A shortened input: its share of the tokens goes with its share of the text.
        text = len(alpaca.demonstration(1, full, self._language))
        return math.ceil(whole * len(alpaca.demonstration(1, task, self._language)) / text)

    def _fitted(self, index: int, shown: Sequence[SeedTask], max_tokens: int) -> Prompt:
        truncated = False
        tokens = self._tokens(shown)
        context = self.context_length
        if context is not None and tokens + max_tokens > context:
            truncated = True
            # A completion beyond half of the context is not worth a demonstration: down to there it
            # gives way first, whatever the order.
            wanted = min(max_tokens, context // 2)
            for step in self._fit:
                tokens = self._tokens(shown)
                if tokens + wanted <= context:
                    break
                if step == "demonstrations":
                    while len(shown) > 1 and self._tokens(shown) + wanted > context:
                        shown = shown[:-1]
                elif step == "prompt":
                    factor = SHRINK
                    while self._tokens(shown) + wanted > context and factor > 0.05:
                        shown = [_shortened(task, SHRINK) for task in shown]
                        factor *= SHRINK
                else:
                    wanted = max(MIN_COMPLETION_TOKENS, context - tokens)
            tokens = self._tokens(shown)
            max_tokens = min(max_tokens, max(MIN_COMPLETION_TOKENS, context - tokens))
        return Prompt(
            index=index,
            text=alpaca.render(shown, self._language),
            api=self._api,
            sampling=alpaca.sampling(
                seed=self._seed if self._send_seed else None,
                index=index,
                max_tokens=max_tokens,
                temperature=self._temperature,
                top_p=self._top_p,
                extra=self._extra,
            ),
            demonstrations=tuple(task.id for task in shown),
            tokens=tokens,
            truncated=truncated,
        )


def _total(prompt: Prompt) -> int:
    return (prompt.tokens or 0) + prompt.sampling.max_tokens


def _shortened(task: SeedTask, factor: float) -> SeedTask:
    """The task with its input cut to ``factor`` of its length, down to a floor; at a word's end
    where words stand apart.
    """
    if len(task.input) <= MIN_INPUT_CHARS:
        return task
    kept = task.input[: max(MIN_INPUT_CHARS, int(len(task.input) * factor))]
    if measure(kept)[1] == "words":
        kept = kept.rsplit(None, 1)[0]
    return replace(task, input=kept + " …")
