"""Store to figures."""

from __future__ import annotations

from typing import Any

from engine.money import Prices
from engine.store import RunReader
from engine.thoughts import THOUGHTS_ONLY

__all__ = ["figures"]


def figures(run: RunReader) -> dict[str, Any]:
    """What the run did so far, as plain JSON values; all from acknowledged rows.

    ``seconds`` is the time from a session's start to its end, summed over sessions; a session that
    was killed counts to the last answer that it could have committed.
    """
    counts = run.counts()
    seconds = 0.0
    sessions = run.sessions()
    for session, following in zip(sessions, [*sessions[1:], None], strict=True):
        end = session.ended_s
        if end is None:
            latest = [counts.last_at_s] if counts.last_at_s is not None else []
            latest += [following.started_s] if following is not None else []
            end = min(latest, default=session.started_s)
        seconds += max(0.0, end - session.started_s)
    parsed = counts.decided - sum(
        count
        for reason, count in counts.reasons.items()
        if reason in UNPARSED or reason.startswith("failed:")
    )
    free = run.manifest.free
    prices = Prices(
        prompt=free.get("price_prompt") or None,  # 0 in runs from before it could be left out
        completion=free.get("price_completion") or None,
        cached=free.get("price_cached"),
    )
    tokens = {"prompt": counts.prompt_tokens, "completion": counts.completion_tokens}
    return {
        "run": str(run.folder),
        "model": run.manifest.fixed.get("model"),
        "backend": run.manifest.fixed.get("backend"),
        "requests": counts.sent,
        "responses": counts.answered - counts.failed,
        "failed": counts.failed,
        "attempts": counts.attempts,
        "truncated": counts.truncated,
        "pieces": counts.decided,
        "parsed": parsed,
        "accepted": counts.accepted,
        "rejected": dict(sorted(counts.reasons.items(), key=lambda item: (-item[1], item[0]))),
        "finish_reasons": counts.finish_reasons,
        "tokens": tokens,
        "tokens_estimated": counts.estimated,
        "tokens_per_accepted": round(sum(tokens.values()) / counts.accepted, 1)
        if counts.accepted
        else None,
        "tokens_cached": counts.cached_tokens,
        "tokens_of_thoughts": counts.reasoning_tokens,
        "cost": round(prices.cost(counts), 6) if prices.known or counts.stated_nano else None,
        "sessions": len(sessions),
        "seconds": round(seconds, 3),
        "tokens_per_s": round(counts.completion_tokens / seconds, 2) if seconds else None,
    }


UNPARSED = frozenset(
    {"bad_format", "cut_off", "no_record", "content_filter", "refusal", THOUGHTS_ONLY}
)
"""Reasons of pieces that never became a record."""
