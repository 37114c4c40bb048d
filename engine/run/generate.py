"""From settings to a finished run: put the parts together, run the pipeline, say how it ended."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio

from engine import models
from engine.backends.base import Backend, Tells
from engine.backends.openai.address import read_address, read_headers
from engine.backends.openai.backend import HttpBackend, Timeouts
from engine.backends.openai.dialect import Dialect
from engine.backends.openai.wire import make_transport
from engine.backends.scripted import ScriptedBackend
from engine.decide.decider import fetch_encoder, uses_semantic
from engine.decide.process import Deciding
from engine.errors import ConfigError
from engine.kept import keep_recipe
from engine.limits import EndpointLimits, LimitSettings, Pool
from engine.money import Prices
from engine.processes.garbage import seldom_collected
from engine.prompts.fit import Prompts
from engine.prompts.tokens import tokenizer_counter
from engine.recipes.base import Recipe
from engine.recipes.guard import RecipeFault
from engine.recipes.seeds import keep
from engine.run.deliver import RetryPolicy
from engine.run.display import Guarded
from engine.run.manifest import make_manifest
from engine.run.pipeline import Pipeline
from engine.run.progress import Display, Owner, Pace, Progress, Stop
from engine.run.settle import Settled, about_language, settle
from engine.secrets import keep_from_children, read_key
from engine.settings import EMBEDDED_MODEL, EndpointConfig, RunConfig
from engine.store import RunStore

__all__ = ["Result", "generate", "make_backends", "make_prompts"]

LOCAL_IS_MISSING = (
    "to run a model in this process needs more packages: pip install 'woolmill[local]', or name a "
    "server with --base-url"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a run ended."""

    stop: Stop
    progress: Progress
    folder: Path
    seconds: float
    resent: int = 0
    """Requests that an earlier session had sent and got no answer to."""


async def generate(config: RunConfig, display: Display, owner: Owner | None = None) -> Result:
    """Run to the target, a stop or a fault; go on where an earlier run in the folder stopped.

    Raises:
        WoolmillError: a start is impossible. What ends a started run is in ``Result.stop``.
    """
    began = time.monotonic()
    display, owner = Guarded(display), owner or Owner()
    settled = settle(config)
    config, recipe, tasks = settled.config, settled.recipe, settled.tasks
    backends = make_backends(config)
    fetch_encoder(config)
    async with AsyncExitStack() as stack:
        pool = _pool(config, backends)
        stack.push_async_callback(_surely, pool.aclose)
        unnamed = not backends[0].model
        if unnamed:
            await pool.start()  # the server knows which model it serves, and asking is free
        manifest = make_manifest(config, recipe, tasks, backends[0].model)
        store = RunStore.open(config.out, manifest)
        stack.push_async_callback(_surely, store.aclose)
        with suppress(OSError):  # a disk in trouble stops the store, and says so there
            keep(tasks, config.out)
            keep_recipe(config.recipe, config.out)
        _learn_with(store, backends, display, any_api=settled.any_api)
        if settled.rows is not None and not settled.same_rows:
            settled.rows.check(store, config.samples or 1)
        owner.opened(config.target)
        resume = store.resume()
        if resume.counts.accepted >= config.target:
            done = Progress(target=config.target, accepted=resume.counts.accepted)
            seconds = time.monotonic() - began
            return Result(stop=Stop(), progress=done, folder=config.out, seconds=seconds)
        if resume.in_flight:
            keys = ", ".join(request.key[:12] for request in resume.in_flight[:8])
            display.note(
                f"{len(resume.in_flight)} requests were in flight when the last session ended and"
                f" may have been billed; sending them again: {keys}"
                f"{' …' if len(resume.in_flight) > 8 else ''}"
            )
        for line in about_language(config, tasks):
            display.note(line)
        prompts = make_prompts(settled)
        _try_out(prompts, recipe)
        deciding = Deciding(config, tasks, display.note)
        stack.push_async_callback(_surely, deciding.aclose)
        await deciding.start()
        if not unnamed:
            display.note(f"starting {config.chosen_backend} with {backends[0].model}")
            loading = time.monotonic()
            await pool.start()
            display.note(f"started after {time.monotonic() - loading:.1f} s")
        pool.spent(resume.counts)
        known = [b.context_length for b in backends if b.context_length is not None]
        prompts.context_length = config.context_length or min(known, default=None)
        counter = tokenizer_counter(config.tokenizer) if config.tokenizer else None
        await prompts.count(counter or backends[0].count_tokens)
        _try_out(prompts, recipe)
        await deciding.ready()
        paid = config.chosen_backend not in ("transformers", "vllm")
        pipeline = Pipeline(
            store=store,
            pool=pool,
            prompts=prompts,
            deciding=deciding,
            policy=RetryPolicy(max_attempts=config.max_attempts),
            pace=Pace(
                target=config.target,
                max_requests=config.max_requests,
                request_batch_size=config.request_batch_size,
                max_barren_requests=config.max_barren_requests,
                max_refusals_in_a_row=config.max_refusals_in_a_row,
                drain_timeout_s=config.drain_timeout_s,
                at_least=8 if paid else 16,
                by_meaning=uses_semantic(config),
                most_records=recipe.most,
                paid=paid,
            ),
            display=display,
            owner=owner,
        )
        owner.running(pipeline.stop)
        with seldom_collected():
            stop = await pipeline.run()
    return Result(
        stop=stop,
        progress=pipeline.progress,
        folder=config.out,
        seconds=time.monotonic() - began,
        resent=len(resume.in_flight),
    )


async def _surely(close: Callable[[], Awaitable[None]]) -> None:
    """Close to the end, also where the run is cancelled before it begins."""
    with anyio.CancelScope(shield=True):
        await close()


TRIED = 3
"""Requests that are made before anything is paid, to see whether the recipe can make one."""


def _try_out(prompts: Prompts, recipe: Recipe) -> None:
    """Raises ConfigError where none of the first requests can be made, or fits the context as far
    as it is known; an input without rows has none.
    """
    faults = []
    for index in range(TRIED):
        try:
            prompt = prompts.prompt(index)
        except RecipeFault as error:
            faults.append(f"recipe {recipe.name} makes no prompt: {error}")
            continue
        context, tokens = prompts.context_length, prompt.tokens if prompt is not None else None
        if context is None or tokens is None or tokens < context:
            return
        faults.append(
            f"the shortest prompt of recipe {recipe.name} takes some {tokens} of the {context}"
            " tokens of the context, which leaves none to answer; use a model with a longer one,"
            " or correct --context-length"
        )
    raise ConfigError(faults[0])


def _learn_with(
    store: RunStore, backends: Sequence[Backend], display: Display, *, any_api: bool
) -> None:
    """Let backends go on from what earlier sessions learnt about their hosts, and tell and keep
    what they learn. ``any_api``: requests for completions may be asked by chat.
    """
    servers = [backend for backend in backends if isinstance(backend, HttpBackend)]

    def tell(backend: Backend, lesson: str) -> None:
        display.note(f"{backend.name}: {lesson}")

    for backend in backends:
        if isinstance(backend, Tells):
            backend.on_lesson = partial(tell, backend)

    def keep_lesson(server: HttpBackend, lesson: str) -> None:
        tell(server, lesson)
        learnt = {each.name: each.dialect.learnt for each in servers if each.dialect.learnt}
        store.learnt(learnt)

    for server in servers:
        server.dialect.any_api = any_api
        server.dialect.restore(store.manifest.learnt.get(server.name, {}))
        if words := str(server.dialect):
            display.note(f"{server.name}: as learnt earlier, {words}")
        server.on_lesson = partial(keep_lesson, server)


def make_backends(config: RunConfig) -> Sequence[Backend]:
    """One backend for each place that answers; none is started yet."""
    keep_from_children(config.key_env)
    kind, model = config.chosen_backend, config.model or EMBEDDED_MODEL
    rows = None if config.max_in_flight == "auto" else config.max_in_flight
    if kind == "http":
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


def _http(config: RunConfig, endpoint: EndpointConfig) -> HttpBackend:
    address = read_address(endpoint.url, endpoint.query or config.query)
    ca_file = str(config.ca_file) if config.ca_file else None
    asked = {name for name in ("temperature", "top_p") if getattr(config, name) is not None}
    return HttpBackend(
        address,
        config.model,
        key=read_key(env=endpoint.key_env, file=endpoint.key_file),
        headers=read_headers(endpoint.header or config.header),
        dialect=Dialect(without=config.without, asked=asked | config.extra_body.keys()),
        transport=make_transport(
            address.url, ca_file=ca_file, proxy=config.proxy, kind=config.transport
        ),
        timeouts=Timeouts(
            first_token_s=config.first_token_s,
            idle_s=config.idle_s,
            total_s=config.attempt_s,
        ),
        insecure_http=config.insecure_http,
    )


def _pool(config: RunConfig, backends: Sequence[Backend]) -> Pool:
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
        for endpoint in config.endpoints()
    ]
    return Pool(backends, settings, own)


def make_prompts(settled: Settled) -> Prompts:
    """What makes the prompts of a run with these settings."""
    config = settled.config
    given = config.model_dump(include={"max_tokens", "temperature", "top_p"}, exclude_none=True)
    return Prompts(
        settled.recipe,
        seed=config.seed,
        api=config.asked_api,
        sampling=config.sampling(),
        given={**given, **config.extra_body},
        send_seed=config.send_seed,
        fit=config.fit,
        rows=settled.rows,
        samples=config.samples or 1,
    )
