"""Woolmill: a few seed tasks in, N accepted unique instruction records out.

>>> from engine import open_run
>>> with open_run("runs/alpaca") as run:
...     for record in run:
...         print(record["instruction"], record["output"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.api import OpenRun, open_run

__all__ = ["OpenRun", "open_run"]


def __getattr__(name: str) -> Any:
    """Load the public names when they are first asked for, so that importing stays fast."""
    if name in __all__:
        from engine import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
