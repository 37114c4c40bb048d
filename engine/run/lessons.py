"""What is learnt about hosts while they are asked: told to the person, kept with the run, and known
to the servers of the next session from its start.
"""

from __future__ import annotations

from functools import partial

from engine.backends.base import Backend, Tells
from engine.backends.openai.backend import HttpBackend
from engine.backends.openai.dialect import Dialect
from engine.run.progress import Display
from engine.store import RunStore

__all__ = ["Lessons"]


class Lessons:
    """Of one run.

    Args:
        store: keeps them.
        display: tells them.
        any_api: requests for completions may be asked by chat.
    """

    def __init__(self, store: RunStore, display: Display, *, any_api: bool) -> None:
        self._store = store
        self._display = display
        self._any_api = any_api
        self._dialects: dict[str, Dialect] = {}

    def teach(self, backend: Backend) -> None:
        """Let ``backend`` go on from what earlier sessions learnt about its host, and tell and keep
        what it learns.
        """
        if isinstance(backend, Tells):
            backend.on_lesson = partial(self._tell, backend)
        if isinstance(backend, HttpBackend):
            backend.dialect.any_api = self._any_api
            backend.dialect.restore(self._store.manifest.learnt.get(backend.name, {}))
            if words := str(backend.dialect):
                self._display.note(f"{backend.name}: as learnt earlier, {words}")
            self._dialects[backend.name] = backend.dialect
            backend.on_lesson = partial(self._keep, backend)

    def _tell(self, backend: Backend, lesson: str) -> None:
        self._display.note(f"{backend.name}: {lesson}")

    def _keep(self, backend: Backend, lesson: str) -> None:
        self._tell(backend, lesson)
        dialects = self._dialects.items()
        self._store.learnt({name: each.learnt for name, each in dialects if each.learnt})
