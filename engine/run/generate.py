"""From settings to a finished run: put the parts together, run the pipeline, say how it ended."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from engine import models
from engine.backends.base import Backend
from engine.backends.openai.address import read_address, read_headers
from engine.backends.openai.backend import HttpBackend, Timeouts
from engine.backends.openai.dialect import Dialect
from engine.backends.openai.wire import make_transport
from engine.backends.scripted import ScriptedBackend
from engine.decide.decider import fetch_encoder, uses_semantic
from engine.decide.process import Deciding
from engine.errors import ConfigError, WoolmillError
from engine.languages import ENGLISH, detect, language_of
from engine.limits import EndpointLimits, LimitSettings, Pool
from engine.money import Prices
from engine.processes.garbage import seldom_collected
from engine.prompts.fit import Budget, tokenizer_counter
from engine.recipes.filters import FilterSettings
from engine.recipes.seeds import bundled_seeds, fingerprint, keep, read_seeds
from engine.records import Record, SeedTask
from engine.run.deliver import RetryPolicy
from engine.run.display import Guarded
from engine.run.pipeline import Pipeline
from engine.run.progress import Display, Pace, Progress, Stop
from engine.secrets import keep_from_children, read_key
from engine.settings import AUTO, EMBEDDED_MODEL, FREE, LATER, EndpointConfig, RunConfig
from engine.store import Manifest, RunStore
from engine.surroundings import spelt_out

__all__ = ["Result", "generate", "make_backends", "make_manifest"]

LOCAL_IS_MISSING = (
    "to run a model in this process needs more packages: pip install 'woolmill[local]', or name a "
    "server with --base-url"
)
SEMANTIC = ("semantic_threshold", "semantic_model", "semantic_precision")
DECISION = ("rouge_threshold", *SEMANTIC, "scope", "against", "language", "filters")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a run ended."""

    stop: Stop
    progress: Progress
    folder: Path
    seconds: float
    resent: int = 0
    """Requests that an earlier session had sent and got no answer to."""


async def generate(config: RunConfig, display: Display) -> Result:
    """Run to the target, a stop or a fault; go on where an earlier run in the folder stopped.

    Raises:
        WoolmillError: a start is impossible. What ends a started run is in ``Result.stop``.
    """
    began = time.monotonic()
    display = Guarded(display)
    config, any_api = _with_api(config)
    config, tasks = _with_language(config)
    backends = make_backends(config)
    fetch_encoder(config)
    async with AsyncExitStack() as stack:
        pool = _pool(config, backends)
        stack.push_async_callback(pool.aclose)
        unnamed = not backends[0].model
        if unnamed:
            await pool.start()  # the server knows which model it serves, and asking is free
        store = RunStore.open(config.out, make_manifest(config, tasks, backends[0].model))
        stack.push_async_callback(store.aclose)
        with suppress(OSError):  # a disk in trouble stops the store, and says so there
            keep(tasks, config.out)
        _learn_with(store, backends, display, any_api=any_api)
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
        deciding = Deciding(config, tasks, display.note)
        stack.push_async_callback(deciding.aclose)
        await deciding.start()
        if not unnamed:
            display.note(f"starting {config.chosen_backend} with {backends[0].model}")
            loading = time.monotonic()
            await pool.start()
            display.note(f"started after {time.monotonic() - loading:.1f} s")
        pool.spent(resume.counts)
        budget = _budget(config, tasks, backends)
        counter = tokenizer_counter(config.tokenizer) if config.tokenizer else None
        await budget.count_parts(counter or backends[0].count_tokens)
        await deciding.ready()
        paid = config.chosen_backend not in ("transformers", "vllm")
        pipeline = Pipeline(
            store=store,
            pool=pool,
            budget=budget,
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
                paid=paid,
            ),
            display=display,
        )
        with seldom_collected():
            stop = await pipeline.run()
    return Result(
        stop=stop,
        progress=pipeline.progress,
        folder=config.out,
        seconds=time.monotonic() - began,
        resent=len(resume.in_flight),
    )


def _with_api(config: RunConfig) -> tuple[RunConfig, bool]:
    """The settings with an ``api`` in the place of ``auto``, and whether requests may use another:
    that of the run which goes on, else what the address tells.
    """
    if config.api != "auto":
        return config, False
    api: Any = "completions"
    if config.chosen_backend == "http":
        endpoints = config.endpoints()
        api = read_address(endpoints[0].url).api
    if os.path.isfile(config.out / "run.sqlite"):
        with suppress(WoolmillError), RunStore.read(config.out) as earlier:  # open says it
            api = earlier.manifest.fixed.get("api", api)
    return config.model_copy(update={"api": api}), True


def _with_language(config: RunConfig) -> tuple[RunConfig, list[SeedTask]]:
    """The settings with a language in the place of ``auto``: that of the run which goes on, else
    what the seed tasks are written in; and these.
    """
    language = config.language
    if language == AUTO and os.path.isfile(config.out / "run.sqlite"):
        with suppress(WoolmillError), RunStore.read(config.out) as earlier:  # open says it
            language = earlier.manifest.decision.get("language", ENGLISH)
    if config.seeds is None:
        path = bundled_seeds(ENGLISH if language == AUTO else language)
    else:
        path = config.seeds
    tasks = read_seeds(path, at_least=config.num_demonstrations)
    if language == AUTO:
        language = detect(f"{task.instruction}\n{task.input}" for task in tasks)
    settled: dict[str, Any] = {"language": language}
    if "rouge_threshold" not in config.model_fields_set:
        settled["rouge_threshold"] = language_of(language).rouge_threshold
    return config.model_copy(update=settled), tasks


MOST_REFUSED = 0.2
"""Of the seed tasks; where the filters refuse more, they hardly suit what will be written."""


def about_language(config: RunConfig, tasks: Sequence[SeedTask]) -> Iterator[str]:
    """What a person should know of language and filters before anything is paid; mostly nothing."""
    filters = config.checks()
    if config.spoken != ENGLISH or filters.settings != FilterSettings():
        yield f"language {config.spoken} ({language_of(config.spoken).name}); filters: {filters}"
    records = [Record(instruction=t.instruction, input=t.input, output=t.output) for t in tasks]
    refusals = [filters.refusal(record) for record in records]
    reasons = Counter(refusal[0] for refusal in refusals if refusal)
    if (refused := reasons.total()) > MOST_REFUSED * len(tasks):
        told = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common(3))
        yield (
            f"the filters refuse {refused:,} of the {len(tasks):,} seed tasks themselves ({told}),"
            " and will refuse such records too; see --language and the table [filters]"
        )


def _learn_with(
    store: RunStore, backends: Sequence[Backend], display: Display, *, any_api: bool
) -> None:
    """Let backends go on from what earlier sessions learnt about their hosts, and keep what they
    learn. ``any_api``: requests for completions may be asked by chat.
    """
    servers = [backend for backend in backends if isinstance(backend, HttpBackend)]

    def keep_lesson(server: HttpBackend, lesson: str) -> None:
        display.note(f"{server.name}: {lesson}")
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


def _budget(config: RunConfig, tasks: Sequence[SeedTask], backends: Sequence[Backend]) -> Budget:
    known = [b.context_length for b in backends if b.context_length is not None]
    return Budget(
        tasks,
        seed=config.seed,
        api=config.asked_api,
        demonstrations=config.num_demonstrations,
        **config.sampling(),
        send_seed=config.send_seed,
        extra=config.extra_body,
        fit=config.fit,
        context_length=config.context_length or (min(known) if known else None),
        language=config.spoken,
    )


def make_manifest(config: RunConfig, tasks: Sequence[SeedTask], model: str) -> Manifest:
    """What the run store remembers of the settings. No key is ever among them."""
    values: dict[str, Any] = spelt_out(config.model_dump(mode="json"))
    values |= {"model": model, "seeds": fingerprint(tasks), "semantic": uses_semantic(config)}
    values |= {"backend": config.chosen_backend, **config.sampling()}
    values["language"] = None if config.spoken == ENGLISH else config.spoken
    values["filters"] = config.filters.model_dump(mode="json", exclude_none=True)
    decision = {
        name: values[name] for name in (*DECISION, "semantic") if name not in LATER or values[name]
    }
    if not decision["semantic"]:
        decision |= dict.fromkeys(SEMANTIC)
    if decision["semantic_precision"] != "bfloat16":
        del decision["semantic_precision"]  # as in runs made before there was a choice
    return Manifest(
        fixed={
            name: value
            for name, value in values.items()
            if name not in FREE and name not in decision and (value or name not in LATER)
        },
        decision=decision,
        free={n: v for n, v in values.items() if n in FREE},
        engine_version=metadata.version("woolmill"),
    )
