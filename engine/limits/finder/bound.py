"""What a witness says of the limit: at most this many in flight, because of this."""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["NONE", "Bound"]


class Bound(NamedTuple):
    """At most ``most`` requests in flight."""

    most: float
    why: str = ""


NONE = Bound(math.inf)
"""The witness has nothing against any number."""
