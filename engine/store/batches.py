"""What the store knows of batches: requests that were handed to a provider in one file, whose
answers come hours later.

A batch is a row of ``meta`` called ``batch.TAG``. It is committed before the provider hears of it,
and each step is, so that a start after a crash knows what may be there:

    new ──▶ creating ──▶ open ──▶ collected
     └─────────┴──────────┴─────▶ void

``new``: nothing runs; a file may have been uploaded. ``creating``: the provider may have it, or
not; its own list must tell, by the tag. ``open``: it has it, under ``job``. ``collected``: all its
answers are here. ``void``: it gave none, and never will.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.errors import InputError

__all__ = ["AWAITED", "BatchRow", "BatchState", "runs_of"]

BatchState = Literal["new", "creating", "open", "collected", "void"]
AWAITED: frozenset[BatchState] = frozenset(("creating", "open"))
"""States of batches whose answers may come: their requests are not sent again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRow:
    """One batch as the store keeps it."""

    tag: str
    """Ours; the provider is told it, so that it can be found there."""
    provider: str
    model: str
    state: BatchState
    requests: tuple[tuple[int, int], ...]
    """Its requests, as (first, behind the last) of each run of them in a row."""
    made_s: float
    """Unix time."""
    tokens: int = 0
    """The most that its requests can use."""
    file: str = ""
    """The provider's name for what was uploaded; empty where nothing is there, or nothing more."""
    job: str = ""
    """The provider's name for the batch."""
    done: dict[str, int] = field(default_factory=dict)
    """What became of its requests, once it is collected."""
    seen: str = ""
    """The provider's last word on its state."""
    learnt: dict[str, Any] = field(default_factory=dict)
    """What was known of the provider when its lines were written."""
    cleared: bool = False
    """Nothing of it is left at the provider."""

    def __len__(self) -> int:
        return sum(end - first for first, end in self.requests)

    def __iter__(self) -> Iterator[int]:
        for first, end in self.requests:
            yield from range(first, end)

    @property
    def awaited(self) -> bool:
        """Its answers may still come."""
        return self.state in AWAITED

    @classmethod
    def of(cls, fields: Any) -> BatchRow:
        """From the JSON of its row. Raises InputError for JSON of another shape."""
        try:
            runs = tuple((int(first), int(end)) for first, end in fields["requests"])
            return cls(**{**fields, "requests": runs})
        except (KeyError, TypeError, ValueError) as exc:
            raise InputError(f"a batch's row of table meta holds no batch ({exc})") from exc


def runs_of(requests: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Requests as the runs of which they are made."""
    runs: list[list[int]] = []
    for request in sorted(requests):
        if runs and runs[-1][1] == request:
            runs[-1][1] += 1
        else:
            runs.append([request, request + 1])
    return _pairs(runs)


def _pairs(runs: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((first, end) for first, end in runs)
