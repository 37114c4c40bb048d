"""Whether a run could begin: its input is read, its servers are asked what they serve, and its
first prompts are made, as a start does it. Nothing is generated, and nothing is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from engine.backends.fleet import FileFleet
from engine.backends.openai.backend import HttpBackend
from engine.errors import UnavailableError
from engine.limits import Pool
from engine.run.generate import learn_lengths, make_prompts, try_out
from engine.run.servers import make_backends, make_pool
from engine.run.settle import LOOKED_AT, Settled, refuse_other_stages, settle, stages_of
from engine.settings import RunConfig

__all__ = ["Served", "ask_servers", "read_input", "settled_stages"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What one server said."""

    server: str
    model: str
    """The one that a run would ask."""
    listed: bool
    """Its list of models has it; some hosts list none."""
    context_length: int | None
    failure: str
    """Why it did not answer, where others did; else empty."""


def settled_stages(config: RunConfig) -> list[Settled]:
    """The run's stages, with seed tasks read. Raises WoolmillError as the start of the run does."""
    chain = stages_of(settle(config))
    refuse_other_stages(chain)
    return chain


def read_input(first: Settled) -> int | None:
    """How many of the first ``LOOKED_AT`` input rows there are; None where the run has no input.

    Raises InputError where one cannot be read, or there is none.
    """
    rows = None if first.rows is None else sum(1 for _ in first.rows.first(LOOKED_AT))
    try_out(make_prompts(first), first.recipe)
    return rows


async def ask_servers(chain: Sequence[Settled]) -> list[Served]:
    """What those servers say that the run does not start itself, each asked once for its models.

    Raises WoolmillError where none answers, or the first prompts do not fit their context.
    """
    pools: dict[str, Pool] = {}
    async with AsyncExitStack() as stack:
        for settled in chain:
            if settled.recipe.model not in pools:
                pool = make_pool(settled.config, _servers(settled.config))
                pools[settled.recipe.model] = pool
                stack.push_async_callback(pool.aclose)
                await _start(pool, settled.config.wait_for_server_s)
        first = chain[0]
        prompts = make_prompts(first)
        await learn_lengths(prompts, first.config, pools[first.recipe.model].backends)
        try_out(prompts, first.recipe)
        return [each for pool in pools.values() for each in _served(pool)]


def _servers(config: RunConfig) -> Sequence[HttpBackend]:
    if config.chosen_backend not in ("http", "batch"):
        return ()
    if config.endpoints_file is not None and not FileFleet(config.endpoints_file).urls:
        return ()  # they may come later
    return [each for each in make_backends(config) if isinstance(each, HttpBackend)]


async def _start(pool: Pool, wait_s: float) -> None:
    try:
        await pool.start()
    except UnavailableError as error:
        if not wait_s:
            raise
        raise UnavailableError(
            f"{error} A run would wait up to {wait_s:.0f} s for it (--wait-for-server)"
        ) from error


def _served(pool: Pool) -> list[Served]:
    return [
        Served(
            server=backend.name,
            model=backend.model,
            listed=isinstance(backend, HttpBackend) and backend.identity is not None,
            context_length=backend.context_length,
            failure=told.failure,
        )
        for backend, told in zip(pool.backends, pool.snapshot(), strict=True)
    ]
