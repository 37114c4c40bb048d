"""A stage's ``Bulk`` from its settings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from engine.backends.batch.jobs import Jobs
from engine.backends.batch.providers import LOCAL, make_jobs
from engine.backends.masking import Masking
from engine.backends.openai.address import read_headers
from engine.backends.openai.backend import HttpBackend
from engine.backends.openai.dialect import Dialect
from engine.errors import ConfigError
from engine.limits import Pool
from engine.run.batches.bulk import Bulk
from engine.run.batches.desk import Desk
from engine.run.settle import Settled
from engine.secrets import Secret, read_key
from engine.settings import RunConfig
from engine.store import RunReader, RunStore
from engine.text import as_word

__all__ = ["BATCHES", "jobs_of", "key_of", "make_bulk", "refuse_open_batches"]

BATCHES = "batches"
"""The folder, below the run's, for files of requests and answers while they are needed."""


def jobs_of(config: RunConfig, folder: Path, key: Secret | None) -> Jobs:
    """The provider of a run in ``folder``. Raises ConfigError."""
    assert config.provider is not None
    endpoints = config.endpoints()
    first = endpoints[0] if endpoints else None
    return make_jobs(
        config.provider,
        folder=folder / BATCHES,
        model=config.model or "",
        base_url=first.url if first is not None else None,
        query=(first.query if first is not None else ()) or config.query,
        key=key,
        headers=read_headers((first.header if first is not None else ()) or config.header),
        ca_file=str(config.ca_file) if config.ca_file else None,
        proxy=config.proxy,
        insecure_http=config.insecure_http,
        vllm_python=config.vllm_python,
        vllm_args=config.vllm_arg,
    )


def key_of(config: RunConfig) -> Secret | None:
    """The provider's key; None for those that want none."""
    if config.provider in LOCAL:
        return None
    endpoints = config.endpoints()
    env = endpoints[0].key_env if endpoints else config.key_env
    file = endpoints[0].key_file if endpoints else config.key_file
    return read_key(env=env, file=file)


def make_bulk(settled: Settled, store: RunStore, pool: Pool, note: Callable[[str], None]) -> Bulk:
    """The batches of an opened stage. Raises ConfigError."""
    config = settled.config
    key = key_of(config)
    jobs = jobs_of(config, store.folder, key)
    api = config.asked_api
    if not settled.any_api and api not in jobs.apis:
        raise ConfigError(
            f"recipe {settled.recipe.name} asks by {api}, which {jobs.name} has no batches for; "
            "use another provider, or --backend http"
        )
    desk = Desk(
        jobs=jobs,
        store=store,
        pool=pool,
        dialect=Dialect(),
        folder=store.folder / BATCHES,
        model=pool.backends[0].model,
        any_api=settled.any_api,
        lines_api=api,
        max_attempts=config.max_attempts,
        prices=pool.settings.prices,
        batch_price=config.price_of_batches,
        poll_s=config.poll_s,
        wait_s=config.wait,
        most_lines=config.batch_lines or sys.maxsize,
        most_tokens=config.batch_tokens,
        keep_files=config.keep_files,
        masking=Masking([key] if key is not None else []),
        note=note,
        learnt=note,
    )
    _learn(desk, config)
    return Bulk(desk, live=config.tail_is_live)


def _learn(desk: Desk, config: RunConfig) -> None:
    """Let lines be written as the host takes them: as the live one has learnt, where there is one,
    else as earlier batches have.
    """
    host = desk.pool.backends[0]
    if config.tail_is_live and isinstance(host, HttpBackend):
        desk.dialect = host.dialect
        desk.learnt = lambda lesson: host.on_lesson(lesson)
        return
    asked = {name for name in ("temperature", "top_p") if getattr(config, name) is not None}
    dialect = Dialect(without=config.without, asked=asked | config.extra_body.keys())
    dialect.any_api = desk.any_api
    name = f"batches of {desk.jobs.name}"
    dialect.restore(desk.store.manifest.learnt.get(name, {}))
    desk.dialect = dialect
    desk.learnt = partial(_keep_lesson, desk, name)


def _keep_lesson(desk: Desk, name: str, lesson: str) -> None:
    desk.note(f"{desk.jobs.name}: {lesson}")
    desk.store.learnt({**desk.store.manifest.learnt, name: desk.dialect.learnt})


def refuse_open_batches(store: RunReader) -> None:
    """Raises ConfigError where a run that goes on without batches has some that are not over: what
    is in them would be paid twice.
    """
    if rows := [row for row in store.batches() if row.awaited]:
        raise ConfigError(
            f"{store.folder}: {len(rows)} of its batches are open at {rows[0].provider}; go on with"
            f" --backend batch --provider {rows[0].provider} until they are collected, or give them"
            f" up: woolmill batches {as_word(store.folder)} --forget"
        )
