"""Decide the answers that a store holds, in the process that decides; nothing is asked."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from engine.decide.process import Deciding, DiedError, StuckError
from engine.errors import UnavailableError
from engine.records import SeedTask
from engine.settings import RunConfig
from engine.store import RunStore

__all__ = ["decide_stored"]

log = logging.getLogger(__name__)


async def decide_stored(store: RunStore, config: RunConfig, tasks: Sequence[SeedTask]) -> int:
    """Decide the stored answers from the first undecided one on, up to the target; how many rows
    are accepted then.

    ``config.out`` is the store's folder. Raises WoolmillError.
    """
    counts = store.counts()
    accepted, below = counts.accepted, counts.answered_below
    if not below or accepted >= config.target:
        return accepted
    deciding = Deciding(config, tasks, lambda line: log.info("%s", line))
    try:
        while True:
            await deciding.start()
            await deciding.ready()
            deciding.tell(below)
            try:
                async for batch in deciding.batches():
                    await store.decided_rows(batch.rows)
                    accepted += sum(reason is None for _, _, reason, _, _ in batch.rows.decisions)
                    if batch.end >= below or accepted >= config.target:
                        return accepted
            except StuckError as error:
                log.info("%s; starting another process", error)
    except DiedError as error:
        raise UnavailableError(f"{error}; the same command again goes on") from error
    finally:
        await deciding.aclose()
