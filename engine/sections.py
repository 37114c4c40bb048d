"""How a section of the settings declares one: its type and default as pydantic has them, and beside
them what the command line shows and whether it may differ when a run goes on.

    target: Annotated[Positive, FREE, Flag("Accepted records wanted.")] = 100

The packages own their sections; ``engine.settings`` puts them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

__all__ = [
    "DECISION",
    "FREE",
    "LATER",
    "Flag",
    "Fraction",
    "OnResume",
    "Positive",
    "Price",
    "Seconds",
    "Section",
    "Strict",
    "apart_at_commas",
    "flag_of",
    "marked",
]

Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(gt=0, lt=2**63)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class OnResume(Enum):
    """What becomes of a setting when a run goes on. Without a mark, it shapes the requests and is
    fixed for the life of the run.
    """

    FREE = auto()
    """It may differ: it changes when and where, never what."""
    DECISION = auto()
    """It shapes the decisions: fixed too, but ``woolmill redecide`` decides again under another."""
    LATER = auto()
    """The first runs did not have it: it is kept only where it is used, so that those go on."""


FREE, DECISION, LATER = OnResume.FREE, OnResume.DECISION, OnResume.LATER
"""Short names, as they stand beside each setting."""


@dataclass(frozen=True)
class Flag:
    """A setting's flag. The command line follows its type; a setting without one is for files."""

    help: str
    shown: str | None = None
    """The default in words, where the value does not say it."""
    names: tuple[str, ...] = ()
    """Instead of ``--`` and the setting's name; Alpaca's own are among them."""
    metavar: str | None = None
    path: Literal["file", "folder", "either"] = "file"
    """What a Path must not be the other of."""


class Strict(BaseModel):
    """Settings in which an unknown name is an error. One value stands for a list of one."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    @model_validator(mode="before")
    @classmethod
    def _one_for_a_list(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {
            name: (value,) if isinstance(value, str | Path) and _is_list(cls, name) else value
            for name, value in values.items()
        }


class Section(Strict):
    """Settings of one package."""

    heading: ClassVar[str]
    """Over its flags in the help."""


def _is_list(settings: type[BaseModel], name: str) -> bool:
    """Whether the setting is a list, or may be one."""
    field = settings.model_fields.get(name)
    if field is None:
        return False
    kinds = (field.annotation, *get_args(field.annotation))
    return any(get_origin(kind) is tuple for kind in kinds)


def apart_at_commas(values: Any) -> Any:
    """For lists that a flag may give in one word, as in ``--without stop,seed``."""
    if not isinstance(values, list | tuple):
        return values
    words = [value.split(",") if isinstance(value, str) else [value] for value in values]
    return tuple(word for several in words for word in several if word)


def flag_of(field: FieldInfo) -> Flag | None:
    """How a setting is given on the command line; None where it is not."""
    return next((mark for mark in field.metadata if isinstance(mark, Flag)), None)


def marked(settings: type[BaseModel], mark: OnResume) -> frozenset[str]:
    """The names of the settings that carry a mark."""
    fields: dict[str, Any] = settings.model_fields
    return frozenset(name for name, field in fields.items() if mark in field.metadata)
