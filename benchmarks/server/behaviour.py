"""What the server is like, in how many ways it can go wrong, and what it saw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.capacity import Batching

__all__ = [
    "EARLY_FAULTS",
    "FAULTS",
    "LATE_FAULTS",
    "ODD_FAULTS",
    "QUICK_FAULTS",
    "Behaviour",
    "Ledger",
]

EARLY_FAULTS = (
    "429", "429_bare", "408", "500", "502", "503", "529", "reset", "hang", "garbage", "header_bomb",
)  # fmt: skip
"""Before anything is generated, so nothing is paid."""
LATE_FAULTS = (
    "cut", "reset_midway", "short_length", "truncated_json", "nan", "bad_utf8", "error_in_200",
    "error_event", "no_finish", "done_only", "abort", "stall",
)  # fmt: skip
"""After the tokens were made: paid for, and of no use."""
FAULTS = EARLY_FAULTS + LATE_FAULTS
ODD_FAULTS = ("html", "403", "404", "bad_gzip")
"""What blames the settings, or cannot be decoded, though nothing is wrong with the request."""
QUICK_FAULTS = tuple(f for f in FAULTS if f not in ("hang", "stall"))
"""Those that show at once; the other two only after the client's own time-out."""


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What the server is like. Replace ``Server.behaviour`` to change it while it runs."""

    model: str = "toy"
    root: str = "toy"
    owned_by: str = "vllm"
    max_model_len: int | None = 4096
    tells_length: bool = True
    """Whether its list of models says so; if not, an overflow's message does."""
    api_key: str | None = None
    records: int = 3
    """Records in an answer."""
    text: str | None = None
    """One answer to everything, instead of records."""
    answer: Callable[[str, int], str] | None = None
    """Makes the answer to a prompt that is asked for the nth time, from 1."""
    latency_s: float = 0.0
    """From question to answer, where ``batching`` does not decide it."""
    latency_spread: float = 0.0
    """Share by which it differs, either way: answers come one by one and not in waves."""
    batching: Batching | None = None
    slots: int | None = None
    """429 beyond this many in flight."""
    requests_per_min: float | None = None
    tokens_per_min: float | None = None
    quota_headers: bool = True
    retry_after: str | None = "1"
    """The header of a 429, as it is written."""
    faults: tuple[str, ...] = QUICK_FAULTS
    fault_rate: float = 0.0
    odd_every: int | None = None
    """One request in so many comes to each of ``ODD_FAULTS``."""
    seed: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields put over each answer, to build shapes that have no name here."""


class Ledger:
    """What the server saw. ``paid`` and ``asked`` count by prompt."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.faults: Counter[str] = Counter()
        self.live = 0
        self.peak_live = 0
        self.hung_up = 0
        """Generations whose client closed the connection before the answer."""
        self.overflows = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0

    def summary(self) -> dict[str, Any]:
        return {
            "requests": self.asked.total(),
            "paid": self.paid.total(),
            "paid_twice": sum(n - 1 for n in self.paid.values()),
            "statuses": {str(k): v for k, v in self.statuses.items()},
            "faults": dict(self.faults),
            "live": self.live,
            "peak_live": self.peak_live,
            "hung_up": self.hung_up,
            "overflows": self.overflows,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
        }
