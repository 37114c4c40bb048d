"""The kinds of output."""

import enum


class RequestOutputKind(enum.Enum):
    """Only the one that is asked for."""

    FINAL_ONLY = 2
