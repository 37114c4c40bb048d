"""A line for whoever waits for the first answers and does not know why."""

from __future__ import annotations

from engine.limits import Pool
from engine.run.progress import Display, Progress
from engine.settings import RunConfig

__all__ = ["SlowStart"]

LONG_S = 60.0
"""When waiting for a first answer begins to look like a fault."""


class SlowStart:
    """A display that says once what it may be where the first answers take longer than a minute: a
    model that cannot stop writes up to ``--max-tokens``, or a server took the requests and hangs.
    A person sees nothing of either.
    """

    def __init__(self, display: Display, config: RunConfig) -> None:
        self._display = display
        self._config = config
        self._said = False

    def refresh(self, progress: Progress, pool: Pool) -> None:
        if progress.session_answered:
            self._said = True
        if not self._said:
            oldest_s = max((endpoint.oldest_s for endpoint in pool.snapshot()), default=0.0)
            if oldest_s >= LONG_S:
                self._said = True
                tokens = self._config.sampling()["max_tokens"]
                self.note(
                    f"no answer in the first minute. One may take up to {tokens:,} tokens: with a "
                    "lower --max-tokens, in a new --out, answers come sooner and may be cut off. "
                    "Or the server hangs or still loads its model: its own log says so"
                )
        self._display.refresh(progress, pool)

    def note(self, message: str) -> None:
        self._display.note(message)
