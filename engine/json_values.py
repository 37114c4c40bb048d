"""JSON whose integers are of any size.

orjson reads one beyond 64 bits as a float, which is another number: as the id of a row, that of
another row. Whoever reads values of strangers asks here whether to read them again by Python's own
json, which takes ten times as long.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

__all__ = ["has_large_float", "loads"]


def loads(data: bytes) -> Any:
    """One JSON value, as Python's own json reads it. Raises ValueError."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:  # half of a surrogate pair, or NaN
        return json.loads(data)
    return json.loads(data) if has_large_float(value) else value


def has_large_float(value: Any) -> bool:
    """Whether a number in what orjson read may have been an integer beyond 64 bits."""
    if isinstance(value, float):
        return abs(value) >= 2**63
    if isinstance(value, dict):
        return any(map(has_large_float, value.values()))
    return isinstance(value, list) and any(map(has_large_float, value))
