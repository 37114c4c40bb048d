"""Settings of who answers: the model, the hosts that serve it, or this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from engine.records import RESERVED
from engine.secrets import DEFAULT_VARIABLE, secret_field, variable_name
from engine.sections import (
    FREE,
    LATER,
    Flag,
    Fraction,
    Positive,
    Seconds,
    Section,
    Strict,
    apart_at_commas,
)

__all__ = [
    "AddressSection",
    "EndpointConfig",
    "HostSection",
    "LocalSection",
    "ModelSection",
    "ray_address",
]

RAY_ADDRESS = re.compile(r"(?:[\w.-]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}")
Variable = Annotated[str, AfterValidator(variable_name)]


def _one_or_several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def ray_address(text: str) -> str:
    """``auto`` or ``HOST:PORT``. Raises ValueError for all else: for some of it Ray would start a
    cluster of its own.
    """
    if text != "auto" and not RAY_ADDRESS.fullmatch(text):
        raise ValueError(f"{text}: give auto, or HOST:PORT as ray start prints it")
    return text


class ModelSection(Section):
    """Which model answers, and what it is told beside the prompt."""

    heading: ClassVar[str] = "The model"

    backend: Annotated[
        Literal["http", "batch", "transformers", "vllm", "scripted"] | None,
        Flag("Who answers.", shown="http with --base-url, vllm with --serve, else transformers"),
    ] = None
    model: Annotated[
        str | None,
        Flag(
            "Model id, folder or hub id.",
            shown="smollm2; http: the one served",
            names=("--model", "--model_name"),
        ),
    ] = None
    api: Annotated[
        Literal["auto", "completions", "chat"],
        Flag("auto: completions, or chat where there is nothing else."),
    ] = "auto"
    temperature: Annotated[
        Annotated[float, Field(ge=0, le=2)] | None,
        Flag("Sampling temperature.", shown="1.0; smollm2: 0.85"),
    ] = None
    top_p: Annotated[
        Fraction | None,
        Flag("Share of nucleus sampling.", shown="1.0; smollm2: 0.9", names=("--top-p", "--top_p")),
    ] = None
    max_tokens: Annotated[
        Positive | None,
        Flag("Completion tokens of a request.", shown="3072; smollm2: 192"),
    ] = None
    context_length: Annotated[
        Positive | None,
        Flag("Tokens of prompt and completion.", shown="as the model or server says"),
    ] = None
    extra_body: Annotated[
        dict[str, Any],
        LATER,
        Flag("Further fields of each request's body, as a JSON object.", metavar="JSON"),
    ] = {}

    @model_validator(mode="after")
    def _body_is_ours_to_fill(self) -> Self:
        if taken := sorted(RESERVED & self.extra_body.keys()):
            raise ValueError(f"extra_body: {taken[0]} is filled by the engine itself")
        if (name := secret_field(self.extra_body)) is not None:
            raise ValueError(
                f"extra_body: {name!r} looks like a secret, which would end in the run's "
                "settings; give the key by environment or file, or as --header NAME=env:VARIABLE"
            )
        return self


class AddressSection(Section):
    """Where the model is served, and who may ask it."""

    heading: ClassVar[str] = "Hosts"

    base_url: Annotated[
        tuple[str, ...], BeforeValidator(_one_or_several), FREE, Flag("OpenAI-compatible endpoint.")
    ] = ()
    endpoints_file: Annotated[
        Path | None,
        FREE,
        Flag(
            "File with the URLs of endpoints that come and go, one a line; read when it changes.",
            names=("--endpoints",),
        ),
    ] = None
    key_env: Annotated[Variable, FREE, Flag("Environment variable with the key.")] = (
        DEFAULT_VARIABLE
    )
    key_file: Annotated[Path | None, FREE, Flag("File with the key, mode 0600.")] = None


class EndpointConfig(Strict):
    """One OpenAI-compatible endpoint, with what applies to it alone."""

    url: str
    key_env: Variable = DEFAULT_VARIABLE
    key_file: Path | None = None
    header: tuple[str, ...] = ()
    query: tuple[str, ...] = ()
    weight: Annotated[float, Field(gt=0)] = 1.0
    max_in_flight: Positive | None = None
    requests_per_min: Positive | None = None
    tokens_per_min: Positive | None = None


class HostSection(Section):
    """How hosts are asked."""

    heading: ClassVar[str] = "Requests to hosts"

    endpoint: Annotated[
        tuple[EndpointConfig, ...],
        FREE,
        Flag("Endpoint with limits of its own, instead of --base-url.", metavar="JSON"),
    ] = ()
    ca_file: Annotated[Path | None, FREE, Flag("Trust this certificate authority too.")] = None
    insecure_http: Annotated[bool, FREE, Flag("Send a key over plain http to another machine.")] = (
        False
    )
    header: Annotated[
        tuple[str, ...],
        FREE,
        Flag("Header of each request; NAME=env:VARIABLE for a secret.", metavar="NAME=VALUE"),
    ] = ()
    query: Annotated[
        tuple[str, ...], FREE, Flag("Field of each request's URL.", metavar="NAME=VALUE")
    ] = ()
    without: Annotated[
        tuple[str, ...],
        BeforeValidator(apart_at_commas),
        LATER,
        Flag(
            "Fields of the body that are never sent: stop, seed, temperature, …",
            metavar="FIELD,…",
        ),
    ] = ()
    send_seed: Annotated[bool, Flag("Give each request a seed of its own.")] = True
    proxy: Annotated[
        str | None,
        FREE,
        Flag("Proxy of all requests.", shown="HTTPS_PROXY, NO_PROXY", metavar="URL"),
    ] = None
    transport: Annotated[
        Literal["fast", "httpx"] | None,
        FREE,
        Flag("What carries requests.", shown="fast; httpx with a proxy"),
    ] = None
    first_token_s: Annotated[
        Seconds, FREE, Flag("Longest silence before a stream's first token, thoughts included.")
    ] = 120.0
    idle_s: Annotated[Seconds, FREE, Flag("Longest silence within a stream.")] = 30.0
    attempt_s: Annotated[
        Seconds, FREE, Flag("Longest time of one attempt, from its first byte to its last.")
    ] = 600.0
    request_batch_size: Annotated[
        int,
        Field(ge=1, le=1000),
        FREE,
        Flag(
            "Prompts in one Completions call.",
            names=("--request-batch-size", "--request_batch_size"),
        ),
    ] = 1

    @model_validator(mode="after")
    def _no_password(self) -> Self:
        if self.proxy is not None and "@" in self.proxy:
            raise ValueError(
                "proxy: a password on the command line can be read by others and ends in the run's "
                "settings; give the proxy as HTTPS_PROXY or HTTP_PROXY in the environment"
            )
        return self


class LocalSection(Section):
    """Models on this machine."""

    heading: ClassVar[str] = "Models on this machine"

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        Flag("Of the weights, with transformers.", shown="float32 on a CPU"),
    ] = None
    vllm_python: Annotated[Path | None, FREE, Flag("Interpreter of an environment with vllm.")] = (
        None
    )
    vllm_arg: Annotated[
        dict[str, str], FREE, Flag("Engine argument for vLLM.", metavar="KEY=VALUE")
    ] = {}
    serve: Annotated[bool, FREE, Flag("vLLM as a server that ends with the run.")] = False
    ray: Annotated[
        Annotated[str, AfterValidator(ray_address)] | None,
        FREE,
        Flag("With --serve: on the nodes of this Ray cluster.", metavar="auto|HOST:PORT"),
    ] = None
    replicas: Annotated[
        Positive | None, FREE, Flag("Servers of --serve.", shown="as many as the GPUs allow")
    ] = None
