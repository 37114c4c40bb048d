"""Settings of a loop: what is its own, a table for each round's run, and one for its training."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, field_validator

from engine.errors import ConfigError
from engine.secrets import secret_field
from engine.sections import FREE, Flag, Positive, Section, marked
from engine.settings import EMBEDDED_MODEL, RunConfig, config_of, read_toml
from engine.text import nearest

__all__ = ["LoopConfig", "load_loop"]

OF_GENERATION = frozenset(("out", "seeds", "stage"))
"""Settings of a run that the loop itself gives to each round's."""
OF_TRAINING = frozenset(
    (
        *("config", "model_name_or_path", "data_path", "eval_data_path", "eval_split_ratio"),
        *("output_dir", "resume", "overwrite", "dataset_cache_dir"),
    )
)
"""Flags of the trainer that the loop itself gives."""
FIXED_AFTER_ALL = frozenset(("target", "rows"))
"""What a run may change when it goes on, and a round may not: its rows follow from it."""
_FLAG = re.compile(r"[a-z][a-z0-9_]*")


class LoopConfig(Section):
    """Everything ``woolmill loop`` can be told."""

    heading: ClassVar[str] = "The loop"

    rounds: Annotated[Positive, FREE, Flag("Rounds wanted.")] = 2
    out: Annotated[
        Path, FREE, Flag("The loop's folder; the same again goes on.", path="folder")
    ] = Path("runs/loop")
    model: Annotated[
        str,
        Field(min_length=1),
        Flag("The first round's model: a fetched name, a folder or a hub id."),
    ] = EMBEDDED_MODEL
    seeds: Annotated[Path | None, Flag("Tasks that people wrote, JSON Lines.", shown="bundled")] = (
        None
    )
    held_out: Annotated[
        Positive, Flag("Of the seeds: never shown and never trained on, but measured by.")
    ] = 40
    start: Annotated[
        Literal["kept", "first"],
        Flag(
            "What a round trains: the model kept last, on its own rows; or the first model, on the"
            " rows of all rounds that were kept and its own."
        ),
    ] = "kept"
    with_seeds: Annotated[bool, Flag("Train on the other seeds as well.")] = True
    validation: Annotated[
        Annotated[float, Field(ge=0, lt=1)],
        Flag("Share of a round's rows that is not trained on; no near-duplicate straddles."),
    ] = 0.1
    always: Annotated[
        bool, FREE, Flag("Keep a round's model also where the held-out loss rises.")
    ] = False
    keep: Annotated[Positive, FREE, Flag("Rounds whose runs and models stay on the disk.")] = 1
    processes: Annotated[
        Positive, Flag("Processes that train: python -m trainer, or torchrun for several.")
    ] = 1
    generate: Annotated[
        dict[str, Any], Flag("A setting of woolmill generate, for each round's run.")
    ] = {}
    train: Annotated[dict[str, Any], Flag("A flag of python -m trainer, without its dashes.")] = {}

    @field_validator("generate")
    @classmethod
    def _generation_is_ours(cls, given: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(OF_GENERATION & given.keys()):
            raise ValueError(f"{taken[0]} is given by the loop itself; see --{taken[0]}")
        return given

    @field_validator("train")
    @classmethod
    def _training_is_ours(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name, value in given.items():
            if name in OF_TRAINING:
                raise ValueError(f"{name} is given by the loop itself")
            if not _FLAG.fullmatch(name):
                raise ValueError(f"{name!r} is no flag of the trainer; write it without dashes")
            if not isinstance(value, str | int | float | list | tuple):
                raise ValueError(f"{name} should be a text, a number, true, false or a list")
        if (secret := secret_field(given)) is not None:
            raise ValueError(f"{secret!r} looks like a secret, which others could read")
        return given

    @property
    def trains_itself(self) -> bool:
        """Whether the model that is trained answers; else a host's, or one that is named, does."""
        named = {"model", "base_url", "endpoint", "provider"} & self.generate.keys()
        return not named and self.generate.get("backend") not in ("http", "batch", "scripted")

    def run(self, **given: Any) -> RunConfig:
        """The settings of a round's run: the table's, and what is ``given``. Raises ConfigError."""
        try:
            return config_of(self.generate | given)
        except ConfigError as error:
            raise ConfigError(f"[generate]: {error}") from error

    def fixed(self) -> dict[str, Any]:
        """What may not change when the loop goes on, as plain JSON values without a key."""
        own = self.model_dump(mode="json", exclude={*marked(LoopConfig, FREE), "generate"})
        free = set(marked(RunConfig, FREE) - FIXED_AFTER_ALL)
        run = self.run().model_dump(mode="json", exclude=free)
        return {**own, "generate": {name: run[name] for name in self.generate if name in run}}


def load_loop(path: Path | None, given: Mapping[str, Any]) -> LoopConfig:
    """Settings of the file with ``given`` laid over them, its tables' entries one by one.

    Raises ConfigError: an unreadable file, an unknown name, or a value out of range.
    """
    values = {} if path is None else read_toml(path)
    for name, value in given.items():
        if name in ("generate", "train") and isinstance(values.get(name), dict):
            values[name] = values[name] | (value or {})
        elif value is not None:
            values[name] = value
    try:
        config = LoopConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        where = "" if path is None or given.get(name) is not None else f"{path}: "
        if first["type"] == "extra_forbidden":
            if name in RunConfig.model_fields:
                hint = "settings of each round's run belong into the table [generate]"
            else:
                hint = nearest(name, LoopConfig.model_fields, "see woolmill loop --help")
            raise ConfigError(f"{where}unknown setting {name!r}; {hint}") from error
        said = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}{name}: {said}" if name else f"{where}{said}") from error
    config.run()  # what is wrong in the table is known before anything is done
    return config
