"""Vectors of a server elsewhere for the one thread that decides.

Requests are made in an event loop of their own thread, several at once, and ahead of the decisions
where these say what comes next (``foresee``). What has come is kept before it is used, so that a
text has one vector for the life of a run: decisions follow from what is kept, in plan order,
whatever order it came in, and are taken again without the server.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.dedup.encoder import Precision
from engine.embeddings.asker import PROBE, Asker, backend_of, told
from engine.embeddings.kept import Half, Kept, chunks, key_of
from engine.errors import ConfigError
from engine.secrets import Secret
from engine.settings import RunConfig

__all__ = ["RemoteEncoder"]

Result = TypeVar("Result")
SIGN_S = 10.0
"""How often whoever waits is told that this still waits."""
SAME = 0.99
"""The least cosine to the vector that the same model gave of ``PROBE`` before. Another machine or
number format moves it by less than 0.001, another model by far more."""


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """One request under way."""

    keys: Sequence[bytes]
    vectors: Future[list[NDArray[np.float32] | None]]


class RemoteEncoder:
    """An ``engine.dedup.encoder.Encoder`` over HTTP; it foresees.

    Args:
        config: settled: model and dimension are known.
        key: for the server.
        kept: where vectors are kept.
        note: shows a line to the person.
        waits: called every ``SIGN_S`` while the server is waited for.
    """

    precision: Precision = "float32"

    def __init__(
        self,
        config: RunConfig,
        key: Secret | None,
        kept: Kept,
        note: Callable[[str], None],
        waits: Callable[[], None] = lambda: None,
    ) -> None:
        assert config.semantic_model is not None
        assert config.semantic_dimension is not None
        self.model = config.semantic_model
        self.dimension = config.semantic_dimension
        self._config = config
        self._key = key
        self._kept = kept
        self._note = note
        self._waits = waits
        self._calls: dict[bytes, _Call] = {}
        """Of each text that is asked for now."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._asker: Asker | None = None
        self._is_the_same = False
        """The server gives the vector of ``PROBE`` that it gave before."""
        self._said: list[str] = []
        """Notes from the other thread."""
        self._said_trouble = False

    def foresee(self, texts: Iterable[str]) -> None:
        """Begin to ask for the texts of which nothing is known yet."""
        self._ask({self._key_of(text): text for text in texts})

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of unit length, (N, D); of zeros for what the server cannot embed. Raises
        WoolmillError where the server is away for too long, or is another one.
        """
        keys = [self._key_of(text) for text in texts]
        found = self._kept.get(keys)
        if len(found) < len(keys):
            self._ask(dict(zip(keys, texts, strict=True)))
            calls = {id(call): call for key in keys if (call := self._calls.get(key))}
            for call in calls.values():
                self._arrived(call)
            found = self._kept.get(keys)
        rows = np.array([found[key] for key in keys], np.float32).reshape(-1, self.dimension)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        return np.asarray(rows / np.where(norms > 0, norms, 1), np.float32)

    def close(self) -> None:
        """Hang up and end the thread, whatever is under way. Vectors that are kept stay."""
        if self._loop is None or self._thread is None:
            return
        self._start(self._ended()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._loop = self._asker = None

    async def _ended(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._asker is not None:
            await self._asker.aclose()

    def _key_of(self, text: str) -> bytes:
        return key_of(self.model, text)

    def _ask(self, texts: dict[bytes, str]) -> None:
        """Ask for those of ``texts`` that are neither kept nor asked for."""
        for call in {id(call): call for call in self._calls.values()}.values():
            if call.vectors.done():
                self._take_in(call)
        for key in (*self._kept.get(list(texts)), *self._calls):
            texts.pop(key, None)
        if not texts:
            return
        asker = self._connected()
        for keys in chunks(list(texts), asker.at_once):
            call = _Call(keys, self._start(asker.embed([texts[key] for key in keys])))
            self._calls |= dict.fromkeys(keys, call)

    def _arrived(self, call: _Call) -> None:
        """Wait for a request, and keep what it brought."""
        self._until(call.vectors)
        call.vectors.result()
        self._take_in(call)

    def _take_in(self, call: _Call) -> None:
        """Keep what has come; what failed is asked again where it is needed."""
        for key in call.keys:
            self._calls.pop(key, None)
        if call.vectors.exception() is None:
            self._keep(dict(zip(call.keys, call.vectors.result(), strict=True)))

    def _keep(self, vectors: dict[bytes, NDArray[np.float32] | None]) -> None:
        nothing = np.zeros(self.dimension, np.float16)
        self._kept.put({k: nothing if v is None else _half(v) for k, v in vectors.items()})

    def _connected(self) -> Asker:
        """The server, which is compared with what it was before. Starts the thread of the loop."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            run = self._loop.run_forever
            self._thread = threading.Thread(target=run, name="woolmill-embeddings", daemon=True)
            self._thread.start()
        if self._asker is None:
            self._asker = self._run(self._made())
        asker = self._asker
        if self._is_the_same:
            return asker
        probed = self._run(asker.probe())
        if len(probed) != self.dimension:
            raise told(
                ConfigError(
                    f"{asker.backend.name}: gives vectors of {len(probed)} numbers, and gave "
                    f"{self.dimension} before; serve the model again that the run began with, or "
                    "start a new run"
                )
            )
        key = self._key_of(PROBE)
        if (before := self._kept.get([key]).get(key)) is None:
            self._kept.put({key: _half(probed)})
        elif (cosine := _cosine(before, probed)) < SAME:
            raise told(
                ConfigError(
                    f"{asker.backend.name}: serves another model as {self.model} than before (the "
                    f"vectors of one sentence have a cosine of {cosine:.3f}); serve the one that "
                    "the run began with, or start a new run"
                )
            )
        self._is_the_same = True
        return asker

    async def _made(self) -> Asker:
        backend = backend_of(self._config, self._key)
        backend.dimension = self.dimension
        return Asker(backend, self._config.max_outage_s, self._said.append)

    def _start(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        future = self._start(work)
        self._until(future)
        return future.result()

    def _until(self, future: Future[Any]) -> None:
        """Wait until it is done, with a sign of life now and then."""
        while wait([future], SIGN_S, FIRST_EXCEPTION).not_done:
            self._waits()
            self._say_trouble()
        while self._said:
            self._note(self._said.pop(0))

    def _say_trouble(self) -> None:
        if self._said_trouble or self._asker is None:
            return
        if trouble := self._start(self._asker.trouble()).result():
            self._said_trouble = True
            self._note(f"waiting for embeddings of {self._asker.backend.name} ({trouble})")


def _half(vector: NDArray[np.float32]) -> Half:
    return np.asarray(vector, np.float16)


def _cosine(one: NDArray[Any], other: NDArray[Any]) -> float:
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths else 0.0
