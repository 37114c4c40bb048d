"""What is trained on: one source, or several that a mixture file names.

    [[source]]
    path = "chats/*.jsonl"        # as --data_path; relative to the mixture file
    weight = 3                    # share of the records of every epoch
    repeat = 2                    # how often a record may be seen in an epoch, 1 unless said
    template = "chat"             # as --template
    column_mapping = { question = "instruction" }
    ignore_columns = ["score"]
    on_bad_row = "skip"
    name = "chats"                # for people

An epoch ends when the first source is used up ``repeat`` times; without weights every source gives
``repeat`` times its records. What an epoch holds is a pure function of the seed and its number: a
source that gives a part of its records goes on with others in the next epoch.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trainer.config import DataSettings
from trainer.errors import ConfigError
from trainer.formats import Rules

__all__ = ["Source", "records_an_epoch", "sources"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class Source:
    """Records that are read by one set of rules."""

    name: str
    paths: tuple[Path, ...]
    settings: DataSettings
    """The run's, with what the source says for itself."""
    weight: float | None = None
    repeat: float = 1.0

    @property
    def rules(self) -> Rules:
        """How its rows become records."""
        data = self.settings
        return Rules(data.column_mapping, data.ignore_columns, data.on_bad_row)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    path: tuple[Path, ...]
    name: str | None = None
    weight: Positive | None = None
    repeat: Positive = 1.0
    template: Literal["auto", "alpaca", "chat"] | None = None
    column_mapping: dict[str, str] | None = None
    ignore_columns: tuple[str, ...] | None = None
    on_bad_row: Literal["refuse", "skip"] | None = None

    @field_validator("path", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


def sources(paths: Sequence[Path], settings: DataSettings) -> tuple[Source, ...]:
    """The sources that ``paths`` stand for: one, or those of a mixture file.

    Raises:
        ConfigError: the mixture file cannot be read, or contradicts itself.
    """
    if not any(path.suffix == ".toml" for path in paths):
        return (Source(", ".join(map(str, paths)), tuple(paths), settings),)
    if len(paths) > 1:
        raise ConfigError(f"{paths[0]}: a mixture file names all sources; give it alone")
    (path,) = paths
    try:
        body = tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}; check --data_path") from exc
    except ValueError as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    entries = body.get("source")
    if set(body) != {"source"} or not isinstance(entries, list):
        raise ConfigError(f"{path}: is no mixture file; it should hold [[source]] tables alone")
    found = tuple(_source(path, number, entry, settings) for number, entry in enumerate(entries, 1))
    weighted = [source.weight is not None for source in found]
    if any(weighted) and not all(weighted):
        raise ConfigError(f"{path}: source {weighted.index(False) + 1} has no weight; give all one")
    return found


def _source(path: Path, number: int, entry: Any, settings: DataSettings) -> Source:
    try:
        said = _Entry.model_validate(entry)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(map(str, first["loc"][:1]))
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{path}: source {number}: {where}: {message}") from exc
    own = {
        name: value
        for name in ("template", "column_mapping", "ignore_columns", "on_bad_row")
        if (value := getattr(said, name)) is not None
    }
    paths = tuple(_beside(path, one) for one in said.path)
    name = said.name or ", ".join(map(str, said.path))
    return Source(name, paths, settings.model_copy(update=own), said.weight, said.repeat)


def _beside(mixture: Path, path: Path) -> Path:
    """``path`` from the mixture file's folder; the id of a hub dataset stays what it is."""
    path = path.expanduser()
    beside = mixture.expanduser().parent / path
    hub = len(path.parts) == 2 and not path.suffix and not beside.exists()
    return path if hub else beside


def records_an_epoch(counts: Sequence[int], parts: Sequence[Source]) -> list[int]:
    """How many records each source gives to every epoch; ``counts`` are those that it has."""
    limits = [part.repeat * count for part, count in zip(parts, counts, strict=True)]
    weights = [
        limit if part.weight is None else part.weight
        for part, limit in zip(parts, limits, strict=True)
    ]
    scale = min(limit / weight for limit, weight in zip(limits, weights, strict=True))
    return [max(1, round(weight * scale)) for weight in weights]
