"""Woolmill under its own name: ``import woolmill`` gives the public names of ``engine``.

>>> import woolmill
>>> for row in woolmill.generate("alpaca", target=100, out="runs/alpaca", base_url="http://…/v1"):
...     print(row["instruction"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import engine
from engine import __all__ as __all__

if TYPE_CHECKING:
    from engine import *  # noqa: F403


def __getattr__(name: str) -> Any:
    # As in ``engine``: what is behind a name is loaded when it is first asked for.
    if name in __all__:
        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
