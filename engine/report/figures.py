"""Store to figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.datasets import count_bad_rows
from engine.money import Prices
from engine.recipes.load import ALPACA
from engine.stages import root_of
from engine.store import Counts, RunReader
from engine.store.lock import is_held
from engine.store.reader import Session
from engine.thoughts import THOUGHTS_ONLY

__all__ = ["figures"]


def figures(run: RunReader, *, exact: bool = True) -> dict[str, Any]:
    """What the run did so far, as plain JSON values; all from acknowledged rows.

    Each request that was sent stands in exactly one figure: ``requests`` is the sum of
    ``responses``, ``failed``, ``dropped_at_a_stop`` (on the wire when the session ended in
    order), ``waiting_at_a_stop`` (to be asked again then, as after a refusal), ``lost_in_a_crash``
    (the session did not end in order) and ``in_flight`` (of the session that a process writes now,
    or in batches). A request that a later session sends again counts
    again. ``not_compared_by_meaning`` are accepted records that the embedding model could not read.
    ``input_rows_left_out`` could not be read, and have no request.
    ``wasted`` are answers to requests that had one already, or were asked anew.
    ``tokens_without_answer`` and ``cost_without_answer`` are the most that these and the attempts
    without an answer may have taken beside ``tokens`` and ``cost``.

    ``parsed`` are pieces that became a row. Reasons of a recipe's own do not say whether there was
    one: then these are counted one by one, or not at all (None) where not ``exact``.

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
    written = is_held(run.folder / "run.lock")
    unanswered = _unanswered(run.unanswered(), sessions, run.in_batches(), written=written)
    prices = Prices.of(run.manifest.free)
    cost = prices.cost_if_known(counts)
    tokens = {"prompt": counts.prompt_tokens, "completion": counts.completion_tokens}
    return {
        "run": str(run.folder),
        "model": run.manifest.fixed.get("model"),
        "backend": run.manifest.fixed.get("backend"),
        "requests": counts.answered + sum(unanswered.values()),
        "responses": counts.answered - counts.failed - counts.not_asked,
        "failed": counts.failed,
        **unanswered,
        "wasted": counts.wasted,
        "attempts": counts.attempts,
        "truncated": counts.truncated,
        "pieces": counts.decided,
        "parsed": _parsed(run, counts, exact=exact),
        "accepted": counts.accepted,
        "not_compared_by_meaning": counts.accepted - counts.vectors
        if run.manifest.decision.get("semantic")
        else 0,
        "rejected": dict(sorted(counts.reasons.items(), key=lambda item: (-item[1], item[0]))),
        "finish_reasons": counts.finish_reasons,
        "tokens": tokens,
        "tokens_estimated": counts.estimated,
        "tokens_per_accepted": round(sum(tokens.values()) / counts.accepted, 1)
        if counts.accepted
        else None,
        "tokens_cached": counts.cached_tokens,
        "tokens_of_thoughts": counts.reasoning_tokens,
        "cost": None if cost is None else round(cost, 6),
        "tokens_without_answer": counts.lost_tokens,
        "cost_without_answer": round(prices.cost_of_lost(counts), 6) if prices.known else None,
        "input_rows_left_out": count_bad_rows(root_of(run.folder)),
        "sessions": len(sessions),
        "seconds": round(seconds, 3),
        "tokens_per_s": round(counts.completion_tokens / seconds, 2) if seconds else None,
    }


def _parsed(run: RunReader, counts: Counts, *, exact: bool) -> int | None:
    if run.manifest.fixed.get("recipe", ALPACA) == ALPACA:
        return counts.decided - sum(
            count
            for reason, count in counts.reasons.items()
            if reason in UNPARSED or reason.startswith("failed:")
        )
    if not exact:
        return None
    refused = run.decisions(accepted=False)
    return counts.accepted + sum(decision.record is not None for decision in refused)


def _unanswered(
    by_session: Mapping[int, int],
    sessions: Sequence[Session],
    in_batches: int,
    *,
    written: bool,
) -> dict[str, int]:
    """``in_batches``: requests that a provider still works on, whatever became of who sent them."""
    ended = [session for session in sessions if session.ended_s is not None]
    left = sum(by_session.get(session.number, 0) for session in ended)
    dropped = sum(each.perhaps_billed(by_session.get(each.number, 0)) for each in ended)
    latest = sessions[-1] if sessions else None
    under_way = written and latest is not None and latest.ended_s is None
    in_flight = by_session.get(latest.number, 0) if latest is not None and under_way else 0
    became = {
        "waiting_at_a_stop": left - dropped,
        "dropped_at_a_stop": dropped,
        "lost_in_a_crash": sum(by_session.values()) - left - in_flight,
    }
    for name, count in became.items():
        awaited = min(in_batches, count)
        became[name] -= awaited
        in_batches -= awaited
        in_flight += awaited
    return {**became, "in_flight": in_flight}


UNPARSED = frozenset(
    {"bad_format", "cut_off", "no_record", "content_filter", "refusal", THOUGHTS_ONLY}
)
"""Reasons of pieces that never became a record."""
