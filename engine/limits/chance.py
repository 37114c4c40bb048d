"""Whether refusals (429) come by chance or from a limit.

Some servers refuse one request in a hundred whatever is in flight; cutting back for those would
cost most of the goodput. So their number is weighed against what is known of this server: each
refusal adds, and each request sent takes away, the logarithm of how much likelier it is beyond a
limit than by chance (Wald's sequential test).
"""

from __future__ import annotations

import math

__all__ = ["Chance"]

PRIOR = (0.02, 20.0)
"""Refusals by chance and ends of requests before anything is known."""
MOST = 0.12
"""More than this is never put down to chance, lest a limit's own refusals excuse themselves."""
EXCESS, LEAST_EXCESS = 4.0, 0.1
"""Beyond a limit, so many times as many are refused as by chance, and at least such a share."""
SURE = 4.5
"""Evidence by which refusals are a limit's. One is enough where those by chance are as rare as
``PRIOR`` has it."""
CLOSE = 4
"""Refusals with fewer answers than this between them are close."""
SCATTERED = 0.015
"""Such a share of refusals, most of them not close, is a server's that refuses by chance, whatever
was cut meanwhile."""
WINDOW = 400
"""Ends of requests over which that share is taken; more where more are in flight."""


class Chance:
    """The refusals of one server. ``sent`` at each request, ``answered`` or ``refused`` at its end.

    Attributes:
        share: what share is refused by chance, as far as is known.
        close: whether the latest refusal came soon after the one before.
    """

    def __init__(self) -> None:
        self.close = False
        self._refusals, self._ends = PRIOR
        self._evidence = 0.0
        self._answers = 0  # since the last refusal
        self._window = [0, 0, 0]  # ends, refusals, and close refusals among them

    @property
    def share(self) -> float:
        return min(self._refusals / self._ends, MOST)

    @property
    def scattered(self) -> bool:
        return self.share > SCATTERED

    def sent(self) -> None:
        """Taken for accepted until it is refused: refusals are back long before answers."""
        share, excess = self._shares()
        self._evidence = max(self._evidence + math.log((1 - excess) / (1 - share)), 0.0)

    def answered(self, most: float) -> bool:
        """One end; ``most`` may be in flight. True: refusals prove to be scattered over a window of
        ends, whatever was cut meanwhile, and count as chance from now on.
        """
        self._answers += 1
        return self._ended(most)

    def refused(self, most: float) -> bool:
        """The same for a refusal."""
        self.close = self._answers < CLOSE
        self._answers = 0
        self._window[1] += 1
        self._window[2] += self.close
        return self._ended(most)

    def is_limit(self) -> bool:
        """Whether the refusal just counted proves a limit; the next proof starts from nothing."""
        share, excess = self._shares()
        self._evidence += math.log(excess / share)
        if self._evidence < SURE * (2 if self.scattered else 1):
            return False
        self._evidence = 0.0
        return True

    def excuse(self, refusals: int) -> None:
        """So many were by chance."""
        self._refusals += refusals

    def _shares(self) -> tuple[float, float]:
        """What share is refused by chance, and what share would be beyond a limit."""
        share = self.share
        return share, min(max(EXCESS * share, LEAST_EXCESS), 0.9)

    def _ended(self, most: float) -> bool:
        self._ends += 1
        self._window[0] += 1
        ends, refusals, close = self._window
        if ends < max(WINDOW, 4 * most):
            return False
        self._window = [0, 0, 0]
        known = self.share
        self._refusals, self._ends = self._refusals / 2, self._ends / 2
        if refusals < SCATTERED * ends or close >= refusals / 2 or known >= refusals / ends / 2:
            return False
        self._refusals, self._ends = refusals / 2, ends / 2
        return True
