"""A part of the proof in two processes, for machines of two cores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

__all__ = ["ALONE", "Share", "shared"]

WORKERS = 2
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Share:
    """What one of ``of`` processes does of the whole."""

    number: int = 0
    of: int = 1

    def take(self, whole: Sequence[T]) -> Sequence[T]:
        """Every ``of``-th item: what is slow stands together, and is spread."""
        return whole[self.number :: self.of]

    def count(self, whole: int) -> int:
        return len(self.take(range(whole)))


ALONE = Share()


def shared(part: Callable[[Path, Share], Counter[str]], folder: Path) -> Counter[str]:
    """The sum of what the shares of ``part`` count; what one of them raises is raised."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        shares = [
            pool.submit(part, folder / f"share{number}", Share(number, WORKERS))
            for number in range(WORKERS)
        ]
        return sum((share.result() for share in shares), Counter[str]())
