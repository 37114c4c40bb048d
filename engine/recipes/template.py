"""Recipes in a TOML file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import ConfigError
from engine.recipes.base import Recipe

__all__ = ["load_template"]


def load_template(spec: str, options: Mapping[str, Any]) -> Recipe:
    """The recipe of a built-in name or a TOML file. Raises ConfigError."""
    raise ConfigError(f"--recipe {spec}: there is no such recipe")
