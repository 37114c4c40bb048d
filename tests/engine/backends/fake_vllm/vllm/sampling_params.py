"""The kinds of output, and of constraints."""

import enum
from dataclasses import dataclass
from typing import Any


class RequestOutputKind(enum.Enum):
    """Only the one that is asked for."""

    FINAL_ONLY = 2


@dataclass
class StructuredOutputsParams:
    """What an answer is constrained to."""

    json: Any = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        if self.json == {"type": "nonsense"}:
            raise ValueError("no grammar for that")
