"""The reference page says what the code says."""

from __future__ import annotations

from scripts.reference import PATH, reference


def test_the_reference_is_not_stale() -> None:
    assert PATH.read_text(encoding="utf-8") == reference(), "python -m scripts.reference"
