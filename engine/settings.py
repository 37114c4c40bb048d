"""The run's settings: one TOML file, flags over the file, and an unknown key is an error.

Each package owns a section (``engine.sections`` says how); here they are put together, and what
must agree between two of them is said.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, PrivateAttr, ValidationError, model_validator

from engine.backends.batch.settings import BatchSection
from engine.backends.settings import (
    AddressSection,
    EndpointConfig,
    HostSection,
    LocalSection,
    ModelSection,
)
from engine.dedup.settings import DedupSection
from engine.errors import ConfigError
from engine.languages import ENGLISH
from engine.limits.settings import BudgetSection, PriceSection, RateSection
from engine.prompts.settings import PromptSection
from engine.recipes.alpaca import Seeded
from engine.recipes.base import Recipe
from engine.recipes.filters import Filters, FilterSettings
from engine.recipes.load import load_recipe
from engine.recipes.settings import AUTO, FiltersConfig, RecipeSection
from engine.records import EVERY, RESERVED, SeedTask
from engine.run.settings import EndSection, RunSection, ShowSection
from engine.secrets import secret_field
from engine.sections import DECISION, FREE, LATER, Flag, Positive, Section, flag_of
from engine.surroundings import spelt_out
from engine.text import nearest

__all__ = [
    "AUTO",
    "EMBEDDED_MODEL",
    "EVERY",
    "SECTIONS",
    "EndpointConfig",
    "FiltersConfig",
    "RunConfig",
    "config_of",
    "flag_name",
    "load_config",
    "read_toml",
]

EMBEDDED_MODEL = "smollm2"
"""The model that ``woolmill models fetch`` can get without a model hub."""
EMBEDDED_NAMES = (EMBEDDED_MODEL, "smollm2-135m-instruct")
"""What folders, hub ids and servers call it, in small letters."""
# At Alpaca's own sampling a model of this size loses the format at once, and it repeats itself the
# longer it writes: benchmarks/README.md has what was tried.
EMBEDDED_SAMPLING = {"max_tokens": 192, "temperature": 0.85, "top_p": 0.9}
DEFAULT_SAMPLING = {"max_tokens": 3072, "temperature": 1.0, "top_p": 1.0}

SENT = (
    *("stop", "seed", "temperature", "top_p", "stream", "stream_options", "ignore_eos"),
    *("max_tokens", "max_completion_tokens"),
)
"""The others that it fills, which ``without`` can leave out."""


class ModelConfig(ModelSection, AddressSection, RateSection, PriceSection):
    """Who answers one stage of a recipe, where that is another model than the run's."""


class StagesSection(Section):
    """Recipes of several stages."""

    heading: ClassVar[str] = "Stages"

    models: Annotated[
        dict[str, ModelConfig],
        FREE,
        Flag("Who answers the stages that name a model of their own.", metavar="JSON"),
    ] = {}


class RunConfig(
    RecipeSection,
    RunSection,
    ModelSection,
    AddressSection,
    HostSection,
    BatchSection,
    LocalSection,
    RateSection,
    BudgetSection,
    PriceSection,
    EndSection,
    PromptSection,
    DedupSection,
    StagesSection,
    ShowSection,
):
    """Everything ``woolmill generate`` can be told. Names are those of the flags."""

    stage: Annotated[str, LATER] = ""
    """Of a recipe with several, the one that this run is of; set by the run itself."""
    semantic_dimension: Annotated[Positive | None, DECISION, LATER] = None
    """Of the vectors that ``semantic_url`` gives; set by the run itself."""
    _defaults: dict[str, Any] | None = PrivateAttr(default=None)
    """Of ``sampling``, once it is known who answers."""

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        if self.request_batch_size > 1 and self.api == "chat":
            raise ValueError(
                "request_batch_size needs api = completions: a chat call has one prompt"
            )
        if self.max_cost is not None and None in (self.price_prompt, self.price_completion):
            raise ValueError(
                "max_cost needs both price_prompt and price_completion; write 0 for what is free"
            )
        if taken := sorted((RESERVED - {"stream", "stream_options"}).intersection(self.without)):
            raise ValueError(f"without: no request can be made without {taken[0]}")
        if unknown := sorted(set(self.without).difference(SENT, self.extra_body)):
            meant = nearest(unknown[0].lower(), SENT)
            raise ValueError(f"without: {unknown[0]!r} is never sent; {meant}")
        named = [n for n in ("base_url", "endpoint", "endpoints_file") if getattr(self, n)]
        if len(named) > 1:
            raise ValueError("give one of base_url, [[endpoint]] tables and endpoints_file")
        if self.chosen_backend == "http" and not named:
            raise ValueError("backend http needs base_url, for example http://127.0.0.1:8000/v1")
        over_http = self.chosen_backend in ("http", "batch")
        if not over_http and named:
            raise ValueError(f"{named[0]} goes with backend http, not {self.chosen_backend}")
        if self.endpoints_file is not None and self.chosen_backend != "http":
            raise ValueError("endpoints_file goes with backend http; batches need base_url")
        if not over_http:
            for name in ("extra_body", "without", "header", "query", "proxy", "transport"):
                if getattr(self, name):
                    raise ValueError(f"{name} goes with backend http, not {self.chosen_backend}")
        if self.dtype is not None and self.chosen_backend != "transformers":
            raise ValueError("dtype goes with backend transformers; vllm takes --vllm-arg dtype=…")
        if self.serve and self.chosen_backend != "vllm":
            raise ValueError("serve goes with backend vllm")
        if self.ray is not None and not self.serve:
            raise ValueError("ray goes with serve: servers that Ray places for the run")
        return self

    @model_validator(mode="after")
    def _batches_can_be_made(self) -> RunConfig:
        if self.chosen_backend != "batch":
            for name in ("provider", "tail", "wait", "batch_lines", "batch_tokens", "batch_price"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} goes with backend batch, not {self.chosen_backend}")
            return self
        if self.provider is None:
            raise ValueError("backend batch needs a provider, for example openai")
        if self.model is None:
            raise ValueError("backend batch needs a model")
        if self.tail == "live" and not self.base_url and not self.endpoint:
            raise ValueError("tail live needs base_url: where the last few are asked")
        if self.provider == "azure" and not self.base_url and not self.endpoint:
            raise ValueError(
                "provider azure needs base_url, as https://NAME.openai.azure.com/openai/v1"
            )
        return self

    @property
    def tail_is_live(self) -> bool:
        """Of a run in batches: the last few requests go to the hosts one by one."""
        return self.tail != "batch" and bool(self.base_url or self.endpoint)

    @property
    def price_of_batches(self) -> float:
        """What an answer in a batch costs, as a share of a live one's price."""
        hosted = self.provider not in (None, "vllm", "file")
        return self.batch_price or (0.5 if hosted else 1.0)

    @property
    def chosen_backend(self) -> Literal["http", "batch", "transformers", "vllm", "scripted"]:
        """What ``backend`` None stands for."""
        hosts = self.base_url or self.endpoint or self.endpoints_file
        return self.backend or ("http" if hosts else "vllm" if self.serve else "transformers")

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
        defaults = self._defaults
        if defaults is None:
            here = self.chosen_backend in ("transformers", "vllm")
            defaults = _defaults_of(self.model or (EMBEDDED_MODEL if here else ""))
        given = self.model_dump(include=set(defaults), exclude_none=True)
        return {**defaults, **given}

    def answered_by(self, names: Iterable[str], earlier: Mapping[str, Any] | None) -> RunConfig:
        """The settings with the sampling that suits the model which a server says that it has, by
        any of its ``names``; a run that goes on keeps what it began with (``earlier``).
        """
        found = self.model_copy()
        found._defaults = next(
            (given for given in map(_defaults_of, names) if given is EMBEDDED_SAMPLING),
            self._defaults,
        )
        if earlier is not None:
            defaults = found._defaults or DEFAULT_SAMPLING
            found._defaults = {name: earlier.get(name, value) for name, value in defaults.items()}
        return found

    def endpoints(self) -> tuple[EndpointConfig, ...]:
        """The [[endpoint]] tables, or one for each base_url; those of a fleet are not known yet."""
        return self.endpoint or tuple(map(self.endpoint_at, self.base_url))

    def endpoint_at(self, url: str) -> EndpointConfig:
        """An endpoint that has no settings of its own but its URL."""
        return EndpointConfig(
            url=url,
            key_env=self.key_env,
            key_file=self.key_file,
            header=self.header,
            query=self.query,
        )


def _defaults_of(model: str) -> dict[str, Any]:
    """The sampling of a model, by its id, folder or hub id; a host may put a tag to it."""
    name = model.rstrip("/").rpartition("/")[2].partition(":")[0].lower()
    return EMBEDDED_SAMPLING if name in EMBEDDED_NAMES else DEFAULT_SAMPLING


SECTIONS: tuple[type[Section], ...] = RunConfig.__bases__
"""In the order of the help."""


def load_config(path: Path | None, flags: dict[str, Any]) -> RunConfig:
    """Settings of the file with the flags laid over them; flags that are None were not given.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest name), or a value out of range.
    """
    values = {} if path is None else read_toml(path)
    given = {name: value for name, value in flags.items() if value is not None and value != ()}
    for name, value in given.items():
        if isinstance(value, str) and spelt_out(value) != value:
            raise ConfigError(
                f"{flag_name(name)}: {spelt_out(value)} holds bytes that are not UTF-8; "
                "give it another name, for example by a link"
            )
    try:
        return RunConfig.model_validate(values | given)
    except ValidationError as exc:
        raise ConfigError(_explain(exc, path, given)) from exc


def read_toml(path: Path) -> dict[str, Any]:
    """What a settings file says. Raises ConfigError where it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}; check --config") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(f"{path}: not TOML: {exc}") from exc


def config_of(settings: Mapping[str, Any], flags: Mapping[str, Any] | None = None) -> RunConfig:
    """Settings that a program gives by their names; ``flags`` are those of them that a person gave.
    Raises ConfigError as ``load_config`` does.
    """
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as exc:
        raise ConfigError(_explain(exc, None, flags or {})) from exc


def flag_name(name: str) -> str:
    """The flag of a setting, or the name that it would have."""
    field = RunConfig.model_fields.get(name)
    flag = flag_of(field) if field is not None else None
    return flag.names[0] if flag is not None and flag.names else f"--{name.replace('_', '-')}"


_TABLES: dict[str, type[BaseModel]] = {
    "endpoint": EndpointConfig,
    "filters": FiltersConfig,
    "models": ModelConfig,
}


def _explain(exc: ValidationError, path: Path | None, flags: Mapping[str, Any]) -> str:
    first = exc.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
    name = str(first["loc"][0]) if first["loc"] else ""
    origin = f"{path}: " if path is not None and name not in flags else ""
    shown = flag_name(name) if name in flags else where
    if first["type"] == "extra_forbidden":
        fields = (_TABLES.get(name, RunConfig) if "." in where else RunConfig).model_fields
        hint = nearest(where.rsplit(".", 1)[-1], fields, "see woolmill generate --help")
        if secret_field({where: "given"}):
            hint = "a key is read from the variable key_env or the file key_file, never a value"
        return f"{origin}unknown setting {where!r}; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{origin}{shown}: {message}" if shown else f"{origin}{message}"
