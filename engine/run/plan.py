"""Which request of a plan is next, and how many may be under way: arithmetic, without any waiting.

    0 ──────▶ undecided ──────▶ answered_below ──────▶ next_number ──────▶ end
      decided           answered                sent               not sent

Each mark is the first number that is not so yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

__all__ = ["Plan"]

WINDOW = 100_000
"""Requests that may be sent beyond the first undecided one; an index costs some hundred bytes."""


class Plan:
    """The cursor of one plan, from where earlier sessions left it.

    Args:
        answered_below: every request below this number has its answer.
        answered_beyond: those above it that have one too.
        in_flight: sent earlier, and not answered.
        awaited: of those, the ones whose answers may still come; they are not sent again.
        undecided: the first request that may not be decided in full.
    """

    def __init__(
        self,
        *,
        answered_below: int = 0,
        answered_beyond: Iterable[int] = (),
        in_flight: Iterable[int] = (),
        awaited: Collection[int] = (),
        undecided: int = 0,
    ) -> None:
        self.answered_below = answered_below
        self.undecided = undecided
        self.end: int | None = None
        """How many requests there are at all; None: not known, or without end."""
        self.grows = False
        """The end is only that of now: more requests come to be possible."""
        self._answered = set(answered_beyond)
        self.next_number = 1 + max(
            answered_below - 1, *self._answered, *in_flight, *awaited, -1, -1
        )
        self._again = deque(
            number
            for number in range(answered_below, self.next_number)
            if number not in self._answered and number not in awaited
        )
        """Requests that go out before any new one, in plan order: what was in flight, what was put
        back, and what was never sent though later requests were."""

    @property
    def sent(self) -> int:
        """Requests that were taken and not put back."""
        return self.next_number - len(self._again)

    @property
    def to_decide(self) -> int:
        """Answers that could be decided now."""
        return max(0, self.answered_below - self.undecided)

    def wanted(self, needed: int, most: int | None = None) -> int:
        """How many requests may be taken, where the answers to ``needed`` from the first undecided
        one on are called for. ``most`` bounds the plan besides its end.

        It is by their numbers and not by how many are under way: where one is to be sent again,
        nothing behind it can be decided, however much of that is answered already.
        """
        horizon = self._horizon(needed)
        ends = [end for end in (most, self.end) if end is not None]
        new = max(0, min([horizon, *ends]) - self.next_number)
        if horizon >= self.next_number:
            return len(self._again) + new
        return sum(number < horizon for number in self._again)

    def is_needless(self, number: int, needed: int) -> bool:
        """A request that was taken is not called for any more."""
        return number >= self._horizon(needed)

    def _horizon(self, needed: int) -> int:
        """The first request that is not called for."""
        return self.undecided + min(needed, WINDOW)

    def take(self, count: int) -> list[int]:
        """The next ``count`` requests; those sent before a restart come first."""
        numbers = []
        for _ in range(count):
            if self._again:
                numbers.append(self._again.popleft())
            else:
                numbers.append(self.next_number)
                self.next_number += 1
        return numbers

    def put_back(self, numbers: Iterable[int]) -> None:
        """These were taken and not sent; they come first again."""
        self._again = deque(sorted([*numbers, *self._again]))

    def ends_before(self, number: int) -> None:
        """There is no request ``number``, nor one behind it."""
        if self.end is None or number < self.end:
            self.end = number
            self.next_number = min(self.next_number, number)

    def has_answer(self, number: int) -> bool:
        """Whether the answer to a request is committed."""
        return number < self.answered_below or number in self._answered

    def answered(self, number: int) -> bool:
        """The answer to a request is committed. True where answers are complete further than
        before.
        """
        self._answered.add(number)
        before = self.answered_below
        while self.answered_below in self._answered:
            self._answered.remove(self.answered_below)
            self.answered_below += 1
        return self.answered_below > before

    @property
    def is_decided(self) -> bool:
        """All that was sent is answered and decided."""
        return self.undecided >= self.next_number

    @property
    def is_complete(self) -> bool:
        """The plan has an end that stands, and all before it is decided."""
        return self.end is not None and not self.grows and self.undecided >= self.end
