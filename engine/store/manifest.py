"""What a run was started with, and what may differ when it goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

__all__ = ["Manifest"]

HASHED = {
    "recipe_asks": "what the recipe asks was changed since",
    "recipe_source": "the recipe's parser, filters or conditions were changed since",
    "seeds": "the seed tasks are others",
}
"""What it means that the hash of something differs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The settings of a run as plain JSON values, in four parts.

    Keys never come here.

    Attributes:
        fixed: what the requests are made of (recipe, hash of the seeds, model, sampling, run seed).
            Fixed for the life of the run, because the plan is a function of it.
        decision: what the decisions follow from (thresholds, blocked words). Fixed too, except that
            ``woolmill redecide`` decides the stored answers again under others.
        free: what no result depends on (endpoints, limits, target, display). May differ in every
            session.
        learnt: by an endpoint's name, what it takes otherwise than other hosts. Found out while
            the run goes on.
    """

    fixed: Mapping[str, Any]
    decision: Mapping[str, Any] = field(default_factory=dict)
    free: Mapping[str, Any] = field(default_factory=dict)
    learnt: Mapping[str, Any] = field(default_factory=dict)
    engine_version: str = ""

    def differences(self, other: Manifest) -> list[str]:
        """One line for each field of ``fixed`` and ``decision`` in which ``other`` differs."""
        lines = []
        for mine, theirs in (self.fixed, other.fixed), (self.decision, other.decision):
            was, now = dict(_leaves(_plain(mine))), dict(_leaves(_plain(theirs)))
            lines += [
                f"{name}: {HASHED.get(name) or f'was {_show(was, name)}, now {_show(now, name)}'}"
                for name in sorted(was.keys() | now.keys())
                if name not in was or name not in now or was[name] != now[name]
            ]
        return lines

    def decides_otherwise(self, other: Manifest) -> bool:
        """Whether ``other`` would ask the same, and differs only in what decisions follow from."""
        return bool(_plain(self.fixed) == _plain(other.fixed))


def _plain(value: Any) -> Any:
    """As it reads after a round trip through JSON, so that tuples equal lists."""
    return orjson.loads(orjson.dumps(value, option=orjson.OPT_SORT_KEYS))


def _show(leaves: dict[str, Any], name: str) -> str:
    return orjson.dumps(leaves[name]).decode() if name in leaves else "absent"


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of all values below ``value``, each with its value."""
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from _leaves(below, f"{name}.{key}" if name else key)
    else:
        yield name, value
