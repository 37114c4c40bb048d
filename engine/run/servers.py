"""The backends that a run's settings name, the pool that stands before them, and its start."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
from httpx import AsyncBaseTransport

from engine import models
from engine.backends.base import Backend
from engine.backends.batch.nobody import Nobody
from engine.backends.fleet import FileFleet
from engine.backends.openai.access import Access
from engine.backends.openai.address import read_address, read_headers
from engine.backends.openai.backend import HttpBackend
from engine.backends.openai.dialect import Dialect
from engine.backends.openai.listening import Timeouts
from engine.backends.openai.wire import FastTransport, make_transport
from engine.backends.scripted import ScriptedBackend
from engine.errors import ConfigError, UnavailableError
from engine.limits import EndpointLimits, LimitSettings, Pool
from engine.money import Prices
from engine.run.progress import Display
from engine.secrets import Secret, keep_from_children, read_key
from engine.settings import EMBEDDED_MODEL, EndpointConfig, RunConfig

__all__ = [
    "LOCAL_IS_MISSING",
    "make_backends",
    "make_pool",
    "served_model",
    "server_at",
    "started",
]

LOCAL_IS_MISSING = (
    "to run a model in this process needs more packages: pip install 'woolmill[local]', or name a "
    "server with --base-url"
)

ASKED_EVERY_S = 2.0
"""How often a server that is waited for is asked whether it is there."""


async def started(pool: Pool, wait_s: float, display: Display) -> None:
    """Start the pool; where no server answers yet, as while it loads its model, ask again until
    ``wait_s`` seconds are over. Raises what ``Pool.start`` raises.
    """
    waiting_since_s = anyio.current_time()
    said = False
    while True:
        try:
            await pool.start()
            return
        except UnavailableError as error:
            left_s = waiting_since_s + wait_s - anyio.current_time()
            if left_s <= 0:
                raise
            if not said:
                display.note(f"{error} Waiting up to {wait_s:.0f} s (--wait-for-server)")
                said = True
        await anyio.sleep(min(ASKED_EVERY_S, left_s))


def make_backends(config: RunConfig) -> Sequence[Backend]:
    """One backend for each place that answers; none is started yet."""
    keep_from_children(config.key_env)
    kind, model = config.chosen_backend, config.model or EMBEDDED_MODEL
    rows = None if config.max_in_flight == "auto" else config.max_in_flight
    if kind == "batch" and not config.tail_is_live:
        return [Nobody(str(config.provider), model)]
    if config.endpoints_file is not None:
        urls = FileFleet(config.endpoints_file).urls
        if not urls:
            raise UnavailableError(f"{config.endpoints_file}: lists no server")
        return [server_at(config, url) for url in urls]
    if config.ray is not None:
        raise ConfigError("--ray: servers are placed for a run alone; name one with --base-url")
    if kind in ("http", "batch"):
        return [_http(config, endpoint) for endpoint in config.endpoints()]
    if kind == "scripted":
        return [ScriptedBackend(model=config.model or "scripted")]
    if config.model is None:
        models.fetch(EMBEDDED_MODEL)
    if config.serve:
        from engine.backends.vllm.servers import ServedBackend, plan

        servers = plan(
            model,
            python=config.vllm_python,
            replicas=config.replicas,
            args=config.vllm_arg,
            log_dir=config.out,
        )
        return [ServedBackend(server, servers, model) for server in servers]
    if kind == "vllm":
        from engine.backends.vllm.backend import VllmBackend

        return [
            VllmBackend(
                model,
                python=config.vllm_python,
                max_in_flight=rows,
                args=config.vllm_arg,
                log_file=config.out / "vllm.log",
            )
        ]
    try:
        from engine.backends.local.backend import TransformersBackend
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing: {LOCAL_IS_MISSING}") from error
    return [TransformersBackend(model, max_in_flight=rows, dtype=config.dtype)]


def served_model(config: RunConfig, pool: Pool) -> str:
    """The name of the model that answers; empty where only the servers know it and none has been
    asked.
    """
    known = (backend.model for backend in pool.backends)
    return next(known, config.model or ("" if config.chosen_backend == "http" else EMBEDDED_MODEL))


def server_at(
    config: RunConfig, url: str, model: str | None = None, *, key: Secret | None = None
) -> HttpBackend:
    """One server of a fleet.

    Args:
        model: its name, where the others of the fleet have told it.
        key: the fleet's own; None: that of the settings.
    """
    config = config.model_copy(update={"model": model}) if model else config
    return _http(config, config.endpoint_at(url), key)


def _http(config: RunConfig, endpoint: EndpointConfig, key: Secret | None = None) -> HttpBackend:
    address = read_address(endpoint.url, endpoint.query or config.query)
    ca_file = str(config.ca_file) if config.ca_file else None
    asked = {name for name in ("temperature", "top_p") if getattr(config, name) is not None}
    transport: AsyncBaseTransport = FastTransport()  # to our own servers no proxy leads
    if key is None:
        transport = make_transport(
            address.url, ca_file=ca_file, proxy=config.proxy, kind=config.transport
        )
    return HttpBackend(
        address,
        config.model,
        access=Access(
            key=key or read_key(env=endpoint.key_env, file=endpoint.key_file),
            headers=read_headers(endpoint.header or config.header),
            insecure_http=config.insecure_http or key is not None,
        ),
        dialect=Dialect(without=config.without, asked=asked | config.extra_body.keys()),
        transport=transport,
        timeouts=Timeouts(
            first_token_s=config.first_token_s,
            idle_s=config.idle_s,
            total_s=config.attempt_s,
        ),
    )


def make_pool(config: RunConfig, backends: Sequence[Backend]) -> Pool:
    settings = LimitSettings(
        max_in_flight=config.max_in_flight,
        requests_per_min=config.requests_per_min,
        tokens_per_min=config.tokens_per_min,
        max_tokens_total=config.max_tokens_total,
        max_cost=config.max_cost,
        prices=Prices(
            prompt=config.price_prompt,
            completion=config.price_completion,
            cached=config.price_cached,
        ),
        batch_price=config.price_of_batches,
        max_outage_s=config.max_outage_s,
        max_refusals_in_a_row=config.max_refusals_in_a_row,
    )
    own = [
        EndpointLimits(
            weight=endpoint.weight,
            max_in_flight=endpoint.max_in_flight,
            requests_per_min=endpoint.requests_per_min,
            tokens_per_min=endpoint.tokens_per_min,
        )
        for endpoint in (config.endpoints() if len(backends) == len(config.endpoints()) else ())
    ]
    return Pool(backends, settings, own)
