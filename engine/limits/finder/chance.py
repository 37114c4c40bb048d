"""Whether refusals (429) come by chance or from a limit.

Some servers refuse one request in a hundred whatever is in flight; cutting back for those would
cost most of the goodput. So their number is weighed against what is known of this server: each
refusal adds, and each request that was taken takes away, the logarithm of how much likelier it is
beyond a limit than by chance (Wald's sequential test).
"""

from __future__ import annotations

import math

__all__ = ["Chance"]

PRIOR = (1.0, 200.0)
"""Refusals by chance and requests before anything is known: three refusals in a row prove a limit.
Sixteen times as many requests are remembered."""
SHARES = (0.0005, 0.15)
"""The least and the most that is put down to chance: no refusal proves a limit by itself, unless
one is expected, and a limit's own refusals do not excuse themselves."""
BEYOND = 0.5
"""The share of requests that is refused beyond a limit."""
SURE = 11.0
"""Evidence that proves a limit: seen about once in e^SURE requests where there is none. Where a
refusal is expected, half of it will do."""


class Chance:
    """The refusals of one server. Requests are numbered as they are sent, and refusals are back in
    about that order and long before answers: whatever is between two was taken.
    """

    def __init__(self) -> None:
        self._refusals, self._requests = PRIOR
        self._latest = 0  # request that was refused
        self._evidence = 0.0
        self._suspect = 0  # refusals since there was no evidence

    @property
    def share(self) -> float:
        """What share of requests is refused by chance, as far as is known."""
        return min(max(self._refusals / self._requests, SHARES[0]), SHARES[1])

    def refused(self, number: int, *, expected: bool = False) -> int:
        """How many refusals, with that of request ``number``, prove a limit; 0: none yet.

        Those of a proof are the limit's, and the next proof starts from nothing.
        """
        taken = number - self._latest - 1
        if taken < 0:  # out of order: of a wave, which is no row
            return 0
        self._latest = number
        self._requests += taken + 1
        # Each that was taken speaks for chance; once nothing speaks for a limit, what was refused
        # meanwhile was chance's.
        self._evidence += taken * math.log((1 - BEYOND) / (1 - self.share))
        if self._evidence <= 0.0:
            self._refusals += self._suspect
            self._evidence, self._suspect = 0.0, 0
        if self._requests > 16 * PRIOR[1]:  # a server's ways change: what is old weighs less
            self._refusals, self._requests = self._refusals / 2, self._requests / 2
        self._evidence += math.log(BEYOND / self.share)
        self._suspect += 1
        if self._evidence < SURE / (2 if expected else 1):
            return 0
        proof, self._suspect, self._evidence = self._suspect, 0, 0.0
        return proof

    def excuse(self, refusals: int) -> None:
        """``refusals`` that proved a limit came by chance after all."""
        self._refusals += refusals

    def learn(self, refusals: int, taken: int) -> None:
        """Beside so many taken so many were refused by chance, as is known from elsewhere."""
        self._refusals, self._requests = float(refusals), float(refusals + taken)
