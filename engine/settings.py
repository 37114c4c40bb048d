"""The run's settings: one TOML file, flags over the file, and an unknown key is an error.

Which settings may change when a run goes on is said here once (``FREE``): everything else shapes
the plan or the decisions and is compared with what the run store remembers.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from engine.errors import ConfigError
from engine.languages import ENGLISH, language_of
from engine.prompts.fit import FitStep
from engine.recipes.alpaca import Scope, Seeded
from engine.recipes.base import Recipe
from engine.recipes.filters import Filters, FilterSettings, FirstCharacter
from engine.recipes.load import load_recipe
from engine.records import EVERY, RESERVED, SeedTask
from engine.secrets import DEFAULT_VARIABLE, secret_field, variable_name
from engine.surroundings import spelt_out

__all__ = [
    "AUTO",
    "EMBEDDED_MODEL",
    "EVERY",
    "EndpointConfig",
    "FiltersConfig",
    "RunConfig",
    "config_of",
    "load_config",
]

EMBEDDED_MODEL = "smollm2"
"""The model that ``woolmill models fetch`` can get without a model hub."""
# At Alpaca's own sampling a model of this size loses the format at once, and it repeats itself the
# longer it writes: benchmarks/README.md has what was tried.
EMBEDDED_SAMPLING = {"max_tokens": 192, "temperature": 0.85, "top_p": 0.9}
DEFAULT_SAMPLING = {"max_tokens": 3072, "temperature": 1.0, "top_p": 1.0}

Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(gt=0, lt=2**63)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]

SENT = (
    *("stop", "seed", "temperature", "top_p", "stream", "stream_options", "ignore_eos"),
    *("max_tokens", "max_completion_tokens"),
)
"""The others that it fills, which ``without`` can leave out."""
AUTO = "auto"


def _language(code: str) -> str:
    return code if code == AUTO else language_of(code).code


Variable = Annotated[str, AfterValidator(variable_name)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class EndpointConfig(_Strict):
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


class FiltersConfig(_Strict):
    """Which instructions are refused at sight; None: as the run's language has it."""

    min_length: Annotated[int, Field(ge=0)] | None = None
    """In characters where words do not stand apart, else in words."""
    max_length: Positive | None = None
    blocked_words: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    blocked_openings: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    first_character: FirstCharacter | None = None
    """ascii, letter (no punctuation) or any."""


class ModelConfig(_Strict):
    """Who answers one stage of a recipe, where that is another model than the run's."""

    backend: Literal["http", "transformers", "vllm", "scripted"] | None = None
    base_url: tuple[str, ...] = ()
    model: str | None = None
    api: Literal["auto", "completions", "chat"] = "auto"
    key_env: Variable = DEFAULT_VARIABLE
    key_file: Path | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Fraction | None = None
    max_tokens: Positive | None = None
    extra_body: dict[str, Any] = {}
    context_length: Positive | None = None
    max_in_flight: Positive | Literal["auto"] = "auto"
    requests_per_min: Positive | None = None
    tokens_per_min: Positive | None = None
    price_prompt: Price | None = None
    price_completion: Price | None = None
    price_cached: Price | None = None

    @field_validator("base_url", mode="before")
    @classmethod
    def _one_address(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class RunConfig(_Strict):
    """Everything ``woolmill generate`` can be told. Names are those of the flags."""

    recipe: Annotated[str, Field(min_length=1)] = "alpaca"
    """A built-in recipe, FILE.toml, FILE.py:CLASS or package.module:CLASS."""
    recipe_options: dict[str, Any] = {}
    """Values for the options that the recipe's file declares."""
    rows: Path | None = None
    """Input rows: a file, a folder or another run."""
    stage: str = ""
    """Of a recipe with several, the one that this run is of; set by the run itself."""
    models: dict[str, ModelConfig] = {}
    """Who answers the stages that name a model of their own."""
    samples: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Requests for each input row; None: as the recipe says, else one."""
    seeds: Path | None = None
    """Seed tasks; None: the bundled ones."""
    language: Annotated[str, AfterValidator(_language)] = AUTO
    """ISO 639 code of what records are written in; auto: as the seeds are."""
    filters: FiltersConfig = FiltersConfig()
    target: Positive = 100
    """Accepted rows wanted; where it is not given and there are input rows, ``EVERY``."""
    out: Path = Path("runs/alpaca")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    num_demonstrations: Annotated[int, Field(ge=1, le=18)] = 3

    backend: Literal["http", "transformers", "vllm", "scripted"] | None = None
    """None: http where a base_url is given, else transformers."""
    model: str | None = None
    api: Literal["auto", "completions", "chat"] = "auto"
    """auto: completions; chat where the host, or the model, has nothing else."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Fraction | None = None
    max_tokens: Positive | None = None
    """These three are Alpaca's where None (1.0, 1.0, 3072); the embedded model's own with it."""
    send_seed: bool = True
    """Give each request a seed of its own."""
    extra_body: dict[str, Any] = {}
    """Further fields of each request's body, as the host documents them."""
    without: tuple[str, ...] = ()
    """Fields of the body that are never sent."""
    context_length: Positive | None = None
    """Tokens of prompt and completion; None: as the model or server says."""
    tokenizer: str | None = None
    """Counts prompt tokens: a folder, a hub id, or tiktoken:NAME; None: the backend's own."""
    fit: tuple[FitStep, ...] = ("demonstrations", "prompt", "completion")

    rouge_threshold: Fraction | None = 0.7
    semantic: bool | None = None
    """Reject near-duplicates by meaning; None: where the packages are installed."""
    semantic_threshold: Fraction = 0.9
    semantic_model: str | None = None
    semantic_precision: Literal["float32", "bfloat16"] = "float32"
    scope: Scope = "instruction"
    against: tuple[Path, ...] = ()
    """Datasets to stay clear of: compared with, never exported."""

    base_url: tuple[str, ...] = ()
    endpoint: tuple[EndpointConfig, ...] = ()
    key_env: Variable = DEFAULT_VARIABLE
    key_file: Path | None = None
    ca_file: Path | None = None
    insecure_http: bool = False
    """Send a key over plain http to another machine."""
    header: tuple[str, ...] = ()
    """Of each request: NAME=VALUE, or NAME=env:VARIABLE for what nobody may read."""
    query: tuple[str, ...] = ()
    """Of each request's URL: NAME=VALUE."""
    proxy: str | None = None
    """URL of a proxy; None: as HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY say."""
    transport: Literal["fast", "httpx"] | None = None
    """What carries requests; None: fast, httpx where a proxy is used."""
    first_token_s: Seconds = 120.0
    """Silence before the first token of a stream, thoughts included."""
    idle_s: Seconds = 30.0
    """Silence within a stream."""
    attempt_s: Seconds = 600.0
    """One attempt, from its first byte to its last."""
    max_in_flight: Positive | Literal["auto"] = "auto"
    request_batch_size: Annotated[int, Field(ge=1, le=1000)] = 1
    requests_per_min: Positive | None = None
    tokens_per_min: Positive | None = None
    max_requests: Positive | None = None
    max_attempts: Positive = 4
    """Attempts that may have been paid for, per request."""
    max_refusals_in_a_row: Positive = 20
    """Requests refused as if a setting were wrong, without an answer between, that end the run."""
    max_outage_s: Seconds = 600.0
    max_tokens_total: Positive | None = None
    max_cost: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    price_prompt: Price | None = None
    """Per million prompt tokens, in the currency of max_cost."""
    price_completion: Price | None = None
    price_cached: Price | None = None
    """Per million prompt tokens that the host had in its cache; None: as the others."""
    max_barren_requests: Positive = 300
    """Stop after this many answers in a row without one accepted record."""
    drain_timeout_s: Seconds = 120.0
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights with backend transformers; None: what suits the device, float32 on a CPU."""
    vllm_python: Path | None = None
    """Interpreter of another environment that has vllm."""
    vllm_arg: dict[str, str] = {}
    serve: bool = False
    """Run vLLM as servers that start and end with the run, instead of in a child process."""
    replicas: Positive | None = None
    """Servers of ``serve``; None: as many as the GPUs allow."""

    @model_validator(mode="after")
    def _agree(self) -> RunConfig:
        if self.request_batch_size > 1 and self.api == "chat":
            raise ValueError(
                "request_batch_size needs api = completions: a chat call has one prompt"
            )
        if self.max_cost is not None and None in (self.price_prompt, self.price_completion):
            raise ValueError(
                "max_cost needs both price_prompt and price_completion; write 0 for what is free"
            )
        if taken := sorted(RESERVED & self.extra_body.keys()):
            raise ValueError(f"extra_body: {taken[0]} is filled by the engine itself")
        if (name := secret_field(self.extra_body)) is not None:
            raise ValueError(
                f"extra_body: {name!r} looks like a secret, which would end in the run's "
                "settings; give the key by environment or file, or as --header NAME=env:VARIABLE"
            )
        if taken := sorted((RESERVED - {"stream", "stream_options"}).intersection(self.without)):
            raise ValueError(f"without: no request can be made without {taken[0]}")
        if unknown := sorted(set(self.without).difference(SENT, self.extra_body)):
            close = get_close_matches(unknown[0].lower(), SENT, n=1)
            meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(SENT[:5])}"
            raise ValueError(f"without: {unknown[0]!r} is never sent; {meant}")
        if self.proxy is not None and "@" in self.proxy:
            raise ValueError(
                "proxy: a password on the command line can be read by others and ends in the run's "
                "settings; give the proxy as HTTPS_PROXY or HTTP_PROXY in the environment"
            )
        if self.base_url and self.endpoint:
            raise ValueError("give either base_url or [[endpoint]] tables, not both")
        if self.chosen_backend == "http" and not self.base_url and not self.endpoint:
            raise ValueError("backend http needs base_url, for example http://127.0.0.1:8000/v1")
        if self.chosen_backend != "http" and (self.base_url or self.endpoint):
            raise ValueError(f"base_url goes with backend http, not {self.chosen_backend}")
        if self.chosen_backend != "http":
            for name in ("extra_body", "without", "header", "query", "proxy", "transport"):
                if getattr(self, name):
                    raise ValueError(f"{name} goes with backend http, not {self.chosen_backend}")
        if self.dtype is not None and self.chosen_backend != "transformers":
            raise ValueError("dtype goes with backend transformers; vllm takes --vllm-arg dtype=…")
        if self.serve and self.chosen_backend != "vllm":
            raise ValueError("serve goes with backend vllm")
        return self

    @property
    def chosen_backend(self) -> Literal["http", "transformers", "vllm", "scripted"]:
        """What ``backend`` None stands for."""
        return self.backend or ("http" if self.base_url or self.endpoint else "transformers")

    @property
    def spoken(self) -> str:
        """The code of the run's language; ``auto`` is settled before, where there are seeds."""
        return ENGLISH if self.language == AUTO else self.language

    def checks(self) -> Filters:
        """The filters of the run."""
        return Filters(self.spoken, FilterSettings(**self.filters.model_dump()))

    def make_recipe(self, tasks: Sequence[SeedTask]) -> Recipe:
        """The recipe, with its seed tasks if it takes some. Settled settings only. Raises
        ConfigError.
        """
        seeded = Seeded(
            tasks=tasks,
            demonstrations=self.num_demonstrations,
            language=self.spoken,
            filters=self.checks(),
            scope=self.scope,
        )
        here = self.chosen_backend in ("transformers", "vllm")
        model = self.model or (EMBEDDED_MODEL if here else "")
        recipe = load_recipe(self.recipe, seeded, self.recipe_options, model)
        if not self.stage:
            return recipe
        for stage in recipe.stages:
            if stage.name == self.stage:
                return stage
        raise ConfigError(f"recipe {recipe.name} has no stage {self.stage}, which the run is of")

    @property
    def asked_api(self) -> Literal["completions", "chat"]:
        """The API that prompts are made for; ``auto`` is settled before, where it can be."""
        return "chat" if self.api == "chat" else "completions"

    def sampling(self) -> dict[str, Any]:
        """``max_tokens``, ``temperature`` and ``top_p`` as given, else the model's defaults."""
        here = self.chosen_backend in ("transformers", "vllm")
        embedded = here and self.model in (None, EMBEDDED_MODEL)
        defaults = EMBEDDED_SAMPLING if embedded else DEFAULT_SAMPLING
        given = self.model_dump(include=set(defaults), exclude_none=True)
        return {**defaults, **given}

    def endpoints(self) -> tuple[EndpointConfig, ...]:
        """The [[endpoint]] tables, or one for each base_url."""
        return self.endpoint or tuple(
            EndpointConfig(
                url=url,
                key_env=self.key_env,
                key_file=self.key_file,
                header=self.header,
                query=self.query,
            )
            for url in self.base_url
        )


FREE = frozenset(
    "target out base_url endpoint key_env key_file ca_file insecure_http max_in_flight"
    " request_batch_size requests_per_min tokens_per_min max_requests max_attempts max_outage_s"
    " max_tokens_total max_cost price_prompt price_completion max_barren_requests drain_timeout_s"
    " vllm_python vllm_arg serve replicas tokenizer header query proxy transport first_token_s"
    " idle_s attempt_s max_refusals_in_a_row price_cached rows models".split()
)
"""Settings that may differ when a run goes on: they change when and where, never what."""
LATER = frozenset(
    "extra_body without language filters recipe_options samples recipe_asks stage".split()
)
"""Settings that the first runs did not have: kept only where they are used, so that those runs go
on.
"""


def load_config(path: Path | None, flags: dict[str, Any]) -> RunConfig:
    """Settings of the file with the flags laid over them; flags that are None were not given.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest name), or a value out of range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as exc:
            raise ConfigError(f"{path}: cannot be read: {exc.strerror}; check --config") from exc
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise ConfigError(f"{path}: not TOML: {exc}") from exc
    given = {name: value for name, value in flags.items() if value is not None and value != ()}
    for name, value in given.items():
        if isinstance(value, str) and spelt_out(value) != value:
            raise ConfigError(
                f"--{name.replace('_', '-')}: {spelt_out(value)} holds bytes that are not UTF-8; "
                "give it another name, for example by a link"
            )
    try:
        return RunConfig.model_validate(values | given)
    except ValidationError as exc:
        raise ConfigError(_explain(exc, path, given)) from exc


def config_of(settings: Mapping[str, Any]) -> RunConfig:
    """Settings that a program gives by their names. One value stands for a list of one.

    Raises ConfigError as ``load_config`` does.
    """
    values = {
        name: (value,) if _is_list(name) and isinstance(value, str | Path) else value
        for name, value in settings.items()
    }
    try:
        return RunConfig.model_validate(values)
    except ValidationError as exc:
        raise ConfigError(_explain(exc, None, {})) from exc


def _is_list(name: str) -> bool:
    field = RunConfig.model_fields.get(name)
    return field is not None and get_origin(field.annotation) is tuple


FLAGS = {"max_outage_s": "max_outage", "drain_timeout_s": "drain_timeout"}
"""Flags that are named otherwise than their settings."""


_TABLES: dict[str, type[BaseModel]] = {
    "endpoint": EndpointConfig,
    "filters": FiltersConfig,
    "models": ModelConfig,
}


def _explain(exc: ValidationError, path: Path | None, flags: dict[str, Any]) -> str:
    first = exc.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
    name = str(first["loc"][0]) if first["loc"] else ""
    origin = f"{path}: " if path is not None and name not in flags else ""
    shown = f"--{FLAGS.get(name, name).replace('_', '-')}" if name in flags else where
    if first["type"] == "extra_forbidden":
        fields = (_TABLES.get(name, RunConfig) if "." in where else RunConfig).model_fields
        near = get_close_matches(where.rsplit(".", 1)[-1], fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; see woolmill generate --help"
        if secret_field({where: "given"}):
            hint = "; a key is read from the variable key_env or the file key_file, never a value"
        return f"{origin}unknown setting {where!r}{hint}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{origin}{shown}: {message}" if shown else f"{origin}{message}"
