"""A recipe's TOML file: its tables, its keys, and what is wrong with them in one line.

An unknown key is an error that names the nearest one: a misspelt ``refuse`` would otherwise accept
everything in silence.
"""

from __future__ import annotations

import re
import tomllib
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from engine.errors import ConfigError
from engine.languages import language_of
from engine.records import RESERVED
from engine.secrets import secret_field
from engine.settings import ModelConfig
from engine.text import nearest

__all__ = [
    "OWN_NAMES",
    "Answer",
    "Examples",
    "Refuse",
    "Stage",
    "TemplateFile",
    "Turn",
    "read_file",
]

OWN_NAMES = frozenset(("row", "options", "sample", "index", "text", "reasoning", "item"))
"""What templates know besides fields; nothing else may be called so."""
ROUND = "round"
"""What the templates of a stage with rounds know too, from 1."""


def _name(name: str) -> str:
    if not name.isidentifier():
        raise ValueError(f"{name!r} cannot be a name in a template; use letters, digits and _")
    return name


def _own_name(name: str) -> str:
    if name in OWN_NAMES:
        raise ValueError(f"{name!r} has a meaning in templates already; choose another name")
    return _name(name)


def _pattern(source: str) -> str:
    try:
        re.compile(source)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it is no regular expression: {error}") from error
    return source


def _stage_name(name: str) -> str:
    if name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"{name!r} names a folder too; use letters, digits, - and _")
    return name


Name = Annotated[str, Field(min_length=1), AfterValidator(_name)]
OwnName = Annotated[str, Field(min_length=1), AfterValidator(_own_name)]
Pattern = Annotated[str, Field(min_length=1), AfterValidator(_pattern)]
Filled = Annotated[str, Field(min_length=1)]
Version = Annotated[
    str, BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)
]
Language = Annotated[str, AfterValidator(lambda code: language_of(code).code)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RecipeTable(_Table):
    """What the recipe is called, and what of its rows is compared."""

    name: Filled
    version: Version = "1"
    description: str = ""
    compare: str | None = None
    language: Language | None = None


class Rows(_Table):
    """That there is a request for each input row."""

    path: Filled | None = None
    samples: Annotated[int, Field(ge=1, le=100_000)] = 1


class Examples(_Table):
    """Rows of a file, some of which each prompt shows."""

    source: Filled = Field(alias="from")
    count: Annotated[int, Field(ge=1, le=1000)] = 3


class Option(_Table):
    """An option of which there are only some values."""

    default: Any
    choices: Annotated[tuple[Any, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _agree(self) -> Option:
        if self.default not in self.choices:
            raise ValueError(f"default {self.default!r} is none of the choices")
        return self


class Answer(_Table):
    """How the answer is read. Which keys go with which format is checked here."""

    format: Literal["text", "list", "json", "tags", "regex", "numbered"] = "text"
    keep_cut: bool = False
    """text: an answer that ended at its token limit is taken as it is."""
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    constrain: bool = True
    """json: ask the server to keep to the schema, where it can."""
    repair: bool = False
    tags: tuple[Name, ...] = ()
    optional: tuple[Name, ...] = ()
    pattern: Pattern | None = None
    labels: tuple[Filled, ...] = ()

    @model_validator(mode="after")
    def _agree(self) -> Answer:
        for name in sorted(self.model_fields_set - {"format"}):
            key = type(self).model_fields[name].alias or name
            if self.format != GOES_WITH[key]:
                raise ValueError(f"{key} goes with format {GOES_WITH[key]}, not {self.format}")
        for form, key in (("tags", "tags"), ("regex", "pattern"), ("numbered", "labels")):
            if self.format == form and not getattr(self, key):
                raise ValueError(f"format {form} needs {key}")
        if self.pattern is not None and not re.compile(self.pattern).groupindex:
            raise ValueError("pattern has no named group, such as (?P<score>[0-9]+)")
        return self


GOES_WITH = {
    "keep_cut": "text",
    "schema": "json",
    "constrain": "json",
    "repair": "json",
    "tags": "tags",
    "optional": "tags",
    "pattern": "regex",
    "labels": "numbered",
}
"""Keys of ``answer``, each with its format."""


class Refuse(_Table):
    """A rule that refuses rows; each of its conditions does so by itself."""

    field: Filled | None = None
    words_below: Annotated[int, Field(ge=1)] | None = None
    words_above: Annotated[int, Field(ge=0)] | None = None
    characters_below: Annotated[int, Field(ge=1)] | None = None
    characters_above: Annotated[int, Field(ge=0)] | None = None
    matches: Pattern | None = None
    not_matches: Pattern | None = None
    when: Filled | None = None
    reason: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")] | None = None

    @model_validator(mode="after")
    def _agree(self) -> Refuse:
        of_field = self.model_fields_set - {"field", "when", "reason"}
        if of_field and self.field is None:
            raise ValueError(f"{min(of_field)} needs a field")
        if not of_field and self.when is None:
            raise ValueError("it refuses nothing; give words_below, matches, when, …")
        return self


class Sampling(BaseModel):
    """How the model is asked to continue; further fields of the request's body as they are."""

    model_config = ConfigDict(extra="allow", frozen=True)

    max_tokens: Annotated[int, Field(gt=0, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: tuple[Filled, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _one_stop(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("stop"), str):
            return {**values, "stop": (values["stop"],)}
        return values

    @model_validator(mode="after")
    def _agree(self) -> Sampling:
        extra = self.model_extra or {}
        if taken := sorted(RESERVED & extra.keys()):
            raise ValueError(f"{taken[0]} is filled by the engine itself")
        if (name := secret_field(extra)) is not None:
            raise ValueError(f"{name!r} looks like a secret, which has no place in a recipe")
        return self

    def body(self) -> dict[str, Any]:
        """What was given, as fields of a request's body."""
        return self.model_dump(exclude_unset=True, exclude_none=True)


class Stage(_Table):
    """One request, and what becomes of its answer."""

    name: Annotated[str, Field(max_length=60), AfterValidator(_stage_name)] = ""
    system: Filled | None = None
    user: Filled | None = None
    assistant: Filled | None = None
    completion: Filled | None = None
    answer: Answer = Field(default_factory=lambda: Answer.model_validate({}))
    give: dict[Name, str] = {}
    refuse: tuple[Refuse, ...] = ()
    keep: Filled | None = None
    compare: Filled | None = None
    drop: tuple[Filled, ...] = ()
    """Fields of the row before that are not kept."""
    sampling: Sampling = Sampling()
    model: Name | None = None
    """The table of ``models`` that says who answers."""
    samples: Annotated[int, Field(ge=1, le=100_000)] | None = None
    reduce: Annotated[str, Field(pattern=r"^(all|(majority|best):.+)$")] | None = None
    on_refuse: Literal["keep_parent"] | None = None
    rounds: Annotated[int, Field(ge=1, le=100)] = 1

    @model_validator(mode="after")
    def _go_together(self) -> Stage:
        if self.on_refuse and (self.samples or 1) > 1:
            raise ValueError("on_refuse goes with one sample: each would keep the same row")
        if self.on_refuse and self.reduce:
            raise ValueError("on_refuse and reduce do not go together")
        return self

    @model_validator(mode="after")
    def _agree(self) -> Stage:
        turns = [name for name in ("system", "user", "assistant") if getattr(self, name)]
        if self.completion and turns:
            raise ValueError(f"completion is the whole prompt; {turns[0]} does not go with it")
        if not self.completion and not self.user:
            raise ValueError("it asks nothing; give user, or completion for a raw text")
        return self


class Turn(_Table):
    """One turn of a chat to train on."""

    role: Literal["system", "user", "assistant"]
    content: Filled


class Export(_Table):
    """How a row becomes the turns of a chat."""

    messages: tuple[Turn, ...] = ()


class TemplateFile(_Table):
    """All of a file."""

    recipe: RecipeTable
    options: dict[OwnName, Option | bool | int | float | str | list[Any]] = {}
    rows: Rows | None = None
    vary: dict[OwnName, Examples | Annotated[tuple[Any, ...], Field(min_length=1)]] = {}
    stage: Annotated[tuple[Stage, ...], Field(min_length=1)]
    models: dict[Name, ModelConfig] = {}
    export: Export = Export()

    @model_validator(mode="before")
    @classmethod
    def _one_stage(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("stage"), dict):
            return {**values, "stage": [values["stage"]]}
        return values

    @model_validator(mode="after")
    def _agree(self) -> TemplateFile:
        several = len(self.stage) > 1
        for number, stage in enumerate(self.stage, 1):
            if several and not stage.name:
                raise ValueError(f"stage {number}: give it a name, as there are several")
            if stage.rounds > 1 and not stage.name:
                raise ValueError("stage: give it a name, as it has rounds")
            if stage.rounds > 1 and ROUND in self.vary:
                raise ValueError(f"vary.{ROUND} has a meaning where a stage has rounds")
        names = [name for name, _, _ in self.steps()]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"stage: there are two called {twice!r}")
        asked = {stage.model for stage in self.stage}
        for name, settings in self.models.items():
            if name not in asked:
                raise ValueError(f"models.{name}: no stage asks it")
            if settings.key_file is not None:
                raise ValueError(f"models.{name}.key_file has no place in a recipe; give key_env")
        first = self.stage[0]
        for key in ("samples", "on_refuse"):
            if getattr(first, key) and self.rows is None:
                raise ValueError(f"stage.{key} is about input rows; add a table [rows]")
        for stage in self.stage:
            of_rows = self.rows.samples if self.rows is not None and stage is first else 1
            if stage.reduce and (stage.samples or of_rows) == 1:
                raise ValueError(f"stage.{stage.name}.reduce needs samples, two or more")
        return self

    def steps(self) -> list[tuple[str, int, Stage]]:
        """What a row goes through: name, number of the round (0: it has none) and stage."""
        return [
            (f"{stage.name}-{number}" if number else stage.name, number, stage)
            for stage in self.stage
            for number in (range(1, stage.rounds + 1) if stage.rounds > 1 else (0,))
        ]


TABLES: dict[str, type[BaseModel]] = {
    "recipe": RecipeTable,
    "rows": Rows,
    "stage": Stage,
    "answer": Answer,
    "refuse": Refuse,
    "models": ModelConfig,
    "export": Export,
    "messages": Turn,
    "vary": Examples,
    "options": Option,
}
"""The model of each table by its key, to tell which keys a misspelt one may have meant."""


def _key_fails(error: Exception) -> bool:
    return "character for a key part" in str(error)


def read_file(data: bytes, where: str) -> TemplateFile:
    """The file's content. Raises ConfigError, naming table and key."""
    try:
        values = tomllib.loads(data.decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        quotes = "; names with letters beyond A to Z stand in quotes" if _key_fails(error) else ""
        raise ConfigError(f"{where}: not TOML: {error}{quotes}") from error
    try:
        return TemplateFile.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    # Of a value that may be one of several kinds, the unknown key says most.
    found = error.errors()
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    path = [str(part) for part in first["loc"] if isinstance(part, str) and "[" not in part]
    path = [part for part in path if part not in KINDS]
    shown = ".".join(path)
    if first["type"] == "extra_forbidden":
        place, key = path[:-1], path[-1]
        table = next((TABLES[part] for part in reversed(place) if part in TABLES), TemplateFile)
        keys = [field.alias or name for name, field in table.model_fields.items()]
        return f"unknown key {shown!r}; {nearest(key, keys)}"
    if first["type"] == "missing":
        return f"{shown} is missing"
    message = first["msg"].removeprefix("Value error, ")
    return f"{shown}: {message}" if shown else message


KINDS = frozenset(("Examples", "Option", "bool", "int", "float", "str", "list"))
"""Parts of a place that pydantic names after types."""
