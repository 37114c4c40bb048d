"""Asking a server for embeddings until they are there: one rule for what is tried again.

Limits, pauses, breaker and retries are those of answers (``engine.limits``,
``engine.run.deliver``). What is said here is what becomes of a batch that the server fails at: it
is halved until the text is found that cannot be embedded. Texts are only blamed where the server
has embedded a plain sentence right before and fails again: an outage must never look like a text's
fault.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Failure, Verdict
from engine.backends.openai.access import Access
from engine.backends.openai.address import read_address
from engine.backends.openai.embeddings import EmbeddingBackend, Texts, Vectors, texts_of
from engine.backends.openai.listening import Timeouts
from engine.backends.openai.wire import make_transport
from engine.errors import ConfigError, UnavailableError, WoolmillError
from engine.limits import OF_THE_PROMPT, LimitSettings, Pool
from engine.records import Completion, Prompt
from engine.run.deliver import RetryPolicy, deliver, most_tokens
from engine.secrets import Secret
from engine.settings import RunConfig

__all__ = ["PROBE", "Asker", "backend_of", "told"]

PROBE = "Explain, in simple words, why the sky is blue and why it turns red in the evening."
"""What any model can embed: it tells whether the server works, and whether the model is the same as
the last time."""
IN_FLIGHT = 16
"""Requests at once. With ``BATCH`` texts each that is more than a GPU takes in at a time."""
BATCH = 32
"""Texts in one request; text-embeddings-inference takes no more, if nobody tells it to."""
MOST_S = 120.0
"""The longest time of one request: a slow CPU needs seconds, and a text waits behind others."""
FIRST = RetryPolicy(last_wait_s=2.0)
"""At the first contact the person waits."""
BRIEF = RetryPolicy(max_attempts=2, last_wait_s=0.5)
"""For texts: a fault that goes on may be theirs."""
PATIENT = RetryPolicy(max_attempts=10**9, max_backoff_s=2.0)
"""Until the server answers, or the pool gives up."""
OF_THE_TEXTS = ("dead", "overflow")
"""Kinds of failures that name these texts as their cause: the same would come of them again."""
FLAGS = {
    r"--base-url": "--semantic-url",
    r"--model\b": "--semantic-model",
    r"(?:set --requests-per-min or )": "",
    r", --api and the sampling settings, or leave a field out with --without NAME": "",
    r", which usually ends in /v1, and --api \(chat or completions: a host may have one alone\)": (
        ", which usually ends in /v1; does it serve embeddings?"
    ),
}
"""Words about answers, and in their place those about embeddings."""


def backend_of(config: RunConfig, key: Secret | None) -> EmbeddingBackend:
    """The server that the settings name. Raises ConfigError."""
    assert config.semantic_url is not None
    try:
        address = read_address(config.semantic_url.rstrip("/").removesuffix("/embeddings"))
        return EmbeddingBackend(
            address,
            config.semantic_model,
            access=Access(key=key, insecure_http=config.insecure_http),
            transport=make_transport(
                address.url,
                ca_file=config.ca_file,
                proxy=config.proxy,
                kind=config.transport,
            ),
            timeouts=Timeouts(total_s=min(MOST_S, config.attempt_s)),
        )
    except ConfigError as error:
        raise told(error) from error


def told(error: WoolmillError) -> WoolmillError:
    """``error``, which the parts that ask for answers raised, in words about embeddings."""
    message = str(error)
    for words, ours in FLAGS.items():
        message = re.sub(words, ours, message)
    if "key was refused" in message:
        message += "; name the variable that holds it with --semantic-key-env"
    return type(error)(message if "embedding" in message else f"embeddings: {message}")


class Asker:
    """Embeds texts by one server; lives in one event loop.

    Args:
        backend: the server; not started, where the run was begun with it already.
        max_outage_s: how long it may be away.
        on_note: told what the person should know, in words.
    """

    def __init__(
        self,
        backend: EmbeddingBackend,
        max_outage_s: float,
        on_note: Callable[[str], None] = lambda _note: None,
    ) -> None:
        self.backend = backend
        limits = LimitSettings(max_in_flight=IN_FLIGHT, max_outage_s=max_outage_s)
        self.pool = Pool([backend], limits)
        self._numbers = itertools.count()
        self._note = on_note
        self._said_cut = self._said_refused = False

    @property
    def at_once(self) -> int:
        """Texts in one request."""
        return min(BATCH, self.backend.most_texts)

    async def trouble(self) -> str:
        """Why nothing comes, where the server is away; empty while it answers."""
        return next((each.failure for each in self.pool.snapshot() if each.failure), "")

    async def begin(self) -> None:
        """Raises WoolmillError where the server is not there, or is none for embeddings."""
        try:
            await self.pool.start()
        except WoolmillError as error:
            raise told(error) from error
        await self.probe(FIRST)

    async def probe(self, policy: RetryPolicy = PATIENT) -> NDArray[np.float32]:
        """The vector (D,) of ``PROBE``. Raises WoolmillError where not even that comes."""
        outcome = await self._asked([PROBE], policy)
        if isinstance(outcome, Vectors):
            return np.asarray(outcome.rows[0])
        verdict = outcome.verdict
        raise told(
            verdict.error
            or UnavailableError(
                f"{self.backend.name} cannot embed even a plain sentence ({outcome}); bring the "
                "server back, then resume"
            )
        )

    async def embed(self, texts: Sequence[str]) -> list[NDArray[np.float32] | None]:
        """The vectors (D,) of ``texts`` in their order; None for one that the server cannot embed.

        Raises WoolmillError where it is the server that fails, as a run ends for it.
        """
        outcome = await self._asked(texts, BRIEF)
        if isinstance(outcome, Failure) and (
            len(texts) == 1 or outcome.verdict.kind not in OF_THE_TEXTS
        ):
            await self.probe()
            outcome = await self._asked(texts, BRIEF)
        if isinstance(outcome, Vectors):
            return list(outcome.rows)
        if len(texts) == 1:
            self._blame(outcome)
            return [None]
        middle = len(texts) // 2
        halves = await asyncio.gather(self.embed(texts[:middle]), self.embed(texts[middle:]))
        return [vector for half in halves for vector in half]

    async def aclose(self) -> None:
        await self.pool.aclose()

    def _blame(self, failure: Failure) -> None:
        """Tell the person, once."""
        if not self._said_refused:
            self._said_refused = True
            self._note(
                f"{self.backend.name} cannot embed some texts, which are refused as embed_invalid; "
                f"the first: {failure}"
            )

    async def _asked(self, texts: Sequence[str], policy: RetryPolicy) -> Vectors | Failure:
        prompt = texts_of(next(self._numbers), texts)
        try:
            lease = await self.pool.acquire(tokens=most_tokens(prompt))
            (delivery,) = await deliver([prompt], self.pool, policy, lease, self._shorter)
        except WoolmillError as error:
            raise told(error) from error
        outcome = delivery.outcome
        if isinstance(outcome, Completion):
            assert isinstance(outcome, Vectors)
            return outcome
        verdict = outcome.verdict
        if verdict.error is not None and verdict.reason not in OF_THE_PROMPT:
            raise told(verdict.error)
        return outcome

    def _shorter(self, prompt: Prompt, verdict: Verdict) -> Prompt | None:
        """A text beyond the model's context, cut as sentence-transformers would; of several it is
        not known which.
        """
        assert isinstance(prompt, Texts)
        if len(prompt.texts) > 1 or len(prompt.texts[0]) < 2:
            return None
        share = 0.5
        if verdict.context_length and verdict.prompt_tokens:
            share = min(0.9, 0.95 * verdict.context_length / verdict.prompt_tokens)
        if not self._said_cut:
            self._said_cut = True
            self._note(
                f"{self.backend.name}: texts longer than the embedding model's context are cut to "
                f"it ({verdict.message})"
            )
        text = prompt.texts[0]
        return replace(prompt, texts=(text[: max(1, int(len(text) * share))],), truncated=True)
