"""Why a run ended before its target, in words: what happened, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import SpentError
from engine.run.progress import Pace, Progress, of_target

__all__ = ["at_cap", "at_end_of_rows", "barren", "given_up", "thoughts"]


def at_cap(progress: Progress, pace: Pace) -> SpentError:
    """All requests that were allowed are decided."""
    return SpentError(
        f"asked all {pace.max_requests} requests of --max-requests and accepted"
        f" {progress.accepted}{of_target(progress.target)} records; go on with a higher"
        " --max-requests"
    )


def at_end_of_rows(progress: Progress, _pace: Pace) -> SpentError:
    """The input has no more rows."""
    return SpentError(
        f"asked about all input rows ({progress.requests:,} requests) and accepted"
        f" {progress.accepted:,} of {progress.target:,}; give more rows at the end of the input,"
        " or leave --target out for what there is, or ask more often about each with --samples in a"
        " new run"
    )


def barren(progress: Progress, answers: int) -> str:
    """So many answers in a row gave nothing."""
    reasons = ", ".join(f"{reason} {count}" for reason, count in progress.reasons.most_common(4))
    return (
        f"the last {answers} answers gave no acceptable record"
        f" (accepted {progress.accepted}{of_target(progress.target)}; refused: {reasons});"
        " try other seeds, model or sampling, or allow more with --max-barren-requests"
    )


def given_up(told: Sequence[tuple[int, float]]) -> str:
    """What backends said that they dropped: how many answers, and seconds for the others; empty
    where they dropped none.
    """
    dropped = sum(count for count, _ in told)
    if not dropped:
        return ""
    others_s = max(seconds for _, seconds in told)
    others = f"; finishing the others within {others_s:.0f} s" if others_s else ""
    return f"giving up {dropped} unfinished answers (they cost nothing){others}"


def thoughts(answers: int, max_tokens: int) -> str:
    """So many answers in a row were thoughts alone."""
    return (
        f"the last {answers} answers were thoughts and nothing else: the model spends all of its"
        f" {max_tokens} tokens on them; raise --max-tokens"
    )
