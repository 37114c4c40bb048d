"""Whether refusals (429) come by chance or from a limit.

Some servers refuse one request in a hundred whatever is in flight; cutting back for those would
cost most of the goodput. So their number is weighed against what is known of this server: each
refusal adds, and each request sent takes away, the logarithm of how much likelier it is beyond a
limit than by chance (Wald's sequential test).
"""

from __future__ import annotations

import math

__all__ = ["Chance"]

PRIOR = (0.2, 200.0)
"""Refusals by chance and ends of requests before anything is known."""
DOUBTED = 0.04
"""The share that is put down to chance at least, where refusals are doubted."""
MOST = 0.12
"""More than this is never put down to chance, lest a limit's own refusals excuse themselves."""
EXCESS, LEAST_EXCESS = 4.0, 0.2
"""Beyond a limit, so many times as many are refused as by chance, and at least such a share."""
SURE, SURER = 9.0, 11.0
"""Evidence by which refusals are a limit's; the second where some are known to come by chance. With
``PRIOR`` two in a row are enough. Where there is none, one is seen about once in e^SURE
requests."""
EXPECTED = 4.0
"""Evidence that is there already beyond a limit that was found: there one refusal is enough."""
CLOSE = 4
"""Refusals with fewer requests than this sent between them are close."""
SCATTERED = 0.015
"""Such a share of refusals, most of them not close, is a server's that refuses by chance, whatever
was cut meanwhile."""
WINDOW = 400
"""Ends of requests over which that share is taken; more where more are in flight."""


class Chance:
    """The refusals of one server. ``sent`` at each request, ``answered`` or ``refused`` at its end.

    Attributes:
        share: what share is refused by chance, as far as is known.
        doubted: whether to put more down to chance than is known.
    """

    def __init__(self) -> None:
        self.doubted = False
        self._refusals, self._ends = PRIOR
        self._evidence = 0.0
        self._suspect = 0  # refusals since there was no evidence
        self._sent = 0  # since the last refusal
        self._window = [0, 0, 0]  # ends, refusals, and close refusals among them

    @property
    def share(self) -> float:
        known = min(self._refusals / self._ends, MOST)
        return max(known, DOUBTED) if self.doubted else known

    @property
    def scattered(self) -> bool:
        return self.share > SCATTERED

    def sent(self) -> None:
        """Taken for accepted until it is refused: refusals are back long before answers."""
        self._sent += 1
        if self._evidence == 0.0:
            return
        share, excess = self._shares()
        self._evidence += math.log((1 - excess) / (1 - share))
        if self._evidence <= 0.0:
            self._refusals += self._suspect
            self._evidence, self._suspect = 0.0, 0

    def answered(self, most: float) -> bool:
        """One end; ``most`` may be in flight. True: refusals prove to be scattered over a window of
        ends, whatever was cut meanwhile, and count as chance from now on.
        """
        return self._ended(most)

    def refused(self, most: float, *, expected: bool = False) -> bool:
        """The same for a refusal; ``expected``: of a trial."""
        self._window[1] += not expected
        self._window[2] += self._sent < CLOSE and not expected
        self._sent = 0
        return self._ended(most)

    def proof(self, *, expected: bool = False) -> int:
        """How many refusals, with the one just counted, prove a limit; 0: they prove none yet.

        Those of a proof are the limit's, and the next proof starts from nothing. They count as
        chance when what was sent since has outweighed them.
        """
        share, excess = self._shares()
        self._evidence += math.log(excess / share)
        self._suspect += 1
        wanted = (SURER if self.scattered else SURE) - (EXPECTED if expected else 0.0)
        if self._evidence < wanted:
            return 0
        proof, self._suspect, self._evidence = self._suspect, 0, 0.0
        return proof

    def excuse(self, refusals: int) -> None:
        """So many that proved a limit count as chance all the same."""
        self._refusals += refusals

    def learn(self, refusals: int, ends: int) -> None:
        """Of so many ends so many were refused by chance, as is known from elsewhere."""
        self._refusals, self._ends = float(refusals), float(ends)
        self._evidence, self._suspect = 0.0, 0

    def look_anew(self) -> None:
        """The refusals so far have another cause that is known."""
        self._window = [0, 0, 0]

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
