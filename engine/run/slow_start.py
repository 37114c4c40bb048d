"""A line for whoever waits for the first answers and does not know why."""

from __future__ import annotations

from engine.limits import Pool
from engine.run.progress import Display, Progress
from engine.settings import RunConfig
from engine.text import counted

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
                self.note(self._seen(progress, pool, oldest_s))
        self._display.refresh(progress, pool)

    def _seen(self, progress: Progress, pool: Pool, oldest_s: float) -> str:
        tokens = self._config.sampling()["max_tokens"]
        longer = (
            f"an answer may take up to {tokens:,} tokens: with a lower --max-tokens, in a new "
            "--out, answers come sooner and may be cut off"
        )
        if self._config.chosen_backend == "transformers":
            longer += (
                ". Where other programs keep the processors busy, it is faster with "
                "OMP_NUM_THREADS=1 before the command"
            )
        if progress.tokens_in_the_making:
            return (
                f"no answer is at its end yet, after {oldest_s:.0f} s; "
                f"{progress.tokens_in_the_making:,} tokens have come: {longer}"
            )
        return (
            f"nothing has come for {oldest_s:.0f} s of {counted(pool.in_flight, 'request')} that "
            "went out. The server may hang, or still load its model: its own log says so, and "
            f"--first-token-s ends the wait for each. Or it sends only whole answers, and {longer}"
        )

    def note(self, message: str) -> None:
        self._display.note(message)
