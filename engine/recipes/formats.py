"""The format of an answer that a TOML recipe names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from engine.errors import ConfigError
from engine.recipes.answers import (
    Format,
    ListAnswer,
    NumberedAnswer,
    RegexAnswer,
    TagsAnswer,
    TextAnswer,
)
from engine.recipes.template_file import Answer

__all__ = ["format_of"]


def format_of(answer: Answer, stop: Sequence[str], where: str) -> Format:
    """What reads answers. ``stop`` ends them. Raises ConfigError for a schema that is none."""
    if answer.format == "json":
        from engine.recipes.json_answers import JsonAnswer  # its validator takes a while to load

        try:
            return JsonAnswer(answer.schema_, repair=answer.repair)
        except ConfigError as error:
            raise ConfigError(f"{where}.{error}") from error
    if answer.format == "tags":
        stops = [stop.strip() for stop in stop]
        closed = [name for name in (*answer.tags, *answer.optional) if f"</{name}>" in stops]
        return TagsAnswer(answer.tags, answer.optional, closed)
    if answer.format == "regex":
        assert answer.pattern is not None
        return RegexAnswer(re.compile(answer.pattern))
    if answer.format == "numbered":
        return NumberedAnswer(answer.labels)
    return ListAnswer() if answer.format == "list" else TextAnswer(keep_cut=answer.keep_cut)
