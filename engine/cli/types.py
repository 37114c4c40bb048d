"""Kinds of values that options take."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import click

__all__ = ["FILE", "PLACE", "SHARE", "Finite", "Place"]


class Finite(click.FloatRange):
    """A range of which "not a number" is no part, though no comparison keeps it out."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value} is no number.", param, ctx)
        return number


SHARE = Finite(0, 1, min_open=True)
"""A similarity in (0, 1]. At 0 any two texts with a word in common would be duplicates."""


class Place(click.Path):
    """A path. The empty one, which a variable without a value gives, is not the current folder, and
    ``-`` is no file of that name.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.fspath(value):
            self.fail("a path is empty; a variable in it may have no value.", param, ctx)
        if os.fspath(value) == "-":
            self.fail("- names no file here; give /dev/stdout, or ./- for one", param, ctx)
        return super().convert(value, param, ctx)


FILE = Place(path_type=Path, dir_okay=False)
"""A file to write; an option for a folder would only fail at the end."""
PLACE = Place(path_type=Path)
"""A file or a folder."""
