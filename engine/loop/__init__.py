"""A model that learns from rows which it wrote: rounds of generation and training, one after the
other.

>>> import engine
>>> for done in engine.loop.run("loop.toml", out="runs/mine"):
...     print(done.number, done.loss, done.kept)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.loop.ledger import Round

if TYPE_CHECKING:
    from engine.loop.settings import LoopConfig
    from engine.settings import RunConfig

__all__ = ["Round", "run"]

log = logging.getLogger(__name__)


def run(config: str | os.PathLike[str] | None = None, **settings: Any) -> Iterator[Round]:
    """Yield each round of a loop when it is finished; those of an earlier call come first, and cost
    nothing. The same call again goes on where the last one was left, or was cut.

    Args:
        config: a settings file, as ``woolmill loop --config`` takes it.
        settings: those of ``woolmill loop`` by their names, over the file's; ``generate`` and
            ``train`` are mappings.

    Raises:
        ConfigError: at once, for a setting that cannot be right.
        WoolmillError: what ends the loop before its last round.
    """
    from engine.loop.settings import load_loop

    return _rounds(load_loop(Path(config) if config is not None else None, settings))


def _rounds(config: LoopConfig) -> Iterator[Round]:
    from engine.loop.rounds import Loop

    with Loop(config, _generate, lambda line: log.info("%s", line)) as loop:
        yield from loop.rounds()


def _generate(config: RunConfig) -> None:
    """One run to its end, in a thread of its own."""
    from engine.run.background import BackgroundRun

    with BackgroundRun(config) as running:
        for _ in running.chunks(refused=False):
            pass
