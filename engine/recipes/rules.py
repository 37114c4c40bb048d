"""Rules of a recipe's file that refuse rows: lengths, patterns, expressions."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from engine.errors import ConfigError
from engine.recipes.base import Refusal
from engine.recipes.sandbox import Expression, as_text
from engine.recipes.template_file import Refuse
from engine.text import nearest, shorten

__all__ = ["Rule"]

Check = Callable[[str], str | None]
"""What of a text is not wanted; None: it is fine."""
MOST_SHOWN = 80
"""Characters of a text that a refusal quotes."""


class Rule:
    """One table of ``refuse``. Raises ConfigError for a field that rows have not.

    Attributes:
        when: its expression.
        names: names that its expression may use.
        needed: those of them that it cannot do without.
    """

    def __init__(self, rule: Refuse, where: str, fields: Sequence[str]) -> None:
        if rule.field is not None and rule.field not in fields:
            hint = nearest(rule.field, fields)
            raise ConfigError(f"{where}: a row has no field {rule.field!r}; {hint}")
        self._field = rule.field
        self._reason = rule.reason
        self._checks = list(_checks(rule))
        self.when = Expression(rule.when, f"{where}.when") if rule.when else None
        self.names = self.when.names if self.when else frozenset()
        self.needed = self.when.needed if self.when else frozenset()

    def refusal(self, values: dict[str, Any]) -> Refusal | None:
        """Why the row among ``values`` is refused. Raises RecipeFault."""
        if self._field is not None and self._checks:
            text = as_text(values[self._field])
            for reason, check in self._checks:
                if (detail := check(text)) is not None:
                    return self._reason or reason, f"{self._field}: {detail}"
        if self.when is not None and self.when.value(values):
            return self._reason or "refused", self.when.source
        return None


def _checks(rule: Refuse) -> Iterator[tuple[str, Check]]:
    for unit, measure in (("words", lambda text: len(text.split())), ("characters", len)):
        below, above = getattr(rule, f"{unit}_below"), getattr(rule, f"{unit}_above")
        if below is not None:
            yield "too_short", _bounded(measure, unit, range(below))
        if above is not None:
            yield "too_long", _bounded(measure, unit, range(above + 1, sys.maxsize))
    if rule.matches is not None:
        yield "matches", _matching(re.compile(rule.matches))
    if rule.not_matches is not None:
        yield "not_matching", _not_matching(re.compile(rule.not_matches))


def _bounded(measure: Callable[[str], int], unit: str, refused: range) -> Check:
    def check(text: str) -> str | None:
        size = measure(text)
        return f"{size} {unit}" if size in refused else None

    return check


def _matching(pattern: re.Pattern[str]) -> Check:
    def check(text: str) -> str | None:
        found = pattern.search(text)
        return None if found is None else shorten(found.group(), MOST_SHOWN)

    return check


def _not_matching(pattern: re.Pattern[str]) -> Check:
    return lambda text: None if pattern.search(text) else shorten(text, MOST_SHOWN)
