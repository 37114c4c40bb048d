"""The state of a run in words: what holds it back, what it waits for, and all of it in one line.

``state`` is what ``engine.run.status.told`` gives.
"""

from __future__ import annotations

from typing import Any

from engine.text import counted, in_money, shorten, visible

__all__ = ["WAITING", "binds", "clock", "reached", "stage_line", "summary", "tokens_line"]

BACKLOG = 512
"""Answers that wait for their decision, from which on deciding is what holds the run back."""
STUCK_S = 2.0
"""No decision for so long, though there is something to decide: the next one is what is slow."""
LATE_S = 5.0
"""How long an answer is waited for before the display says for how long."""
AT_DISK = 0.5
"""Share of the calls under way that wait for a commit, from which on the disk holds the run back:
the servers have less than they could."""
FEW = 4
"""Calls that always may: a commit takes its 5 ms."""
WAITING = ("waiting", "draining")
"""How words begin that say what the run does, and not what holds it back."""


def binds(state: dict[str, Any]) -> str:
    """What holds the run back, or what it waits for, in a few words; empty where nothing does."""
    local = _held_back_here(state)
    if state["draining"]:
        return _draining(state, local)
    found = [*local, *_held_back_there(state)]
    if found:
        return ", ".join(found)
    names, awaited = _names(state), _awaited(state)
    if awaited and "limit" in names and not state["first_answers"]:
        return f"limit ({'; '.join([awaited, *_limited(state)])})"
    if awaited:
        return awaited
    if state["to_decide"]:
        return f"deciding ({state['to_decide']:,} answers)"
    if state["undecided"]:  # decisions fall in the order of the plan
        return f"waiting to ask again; {counted(state['undecided'], 'answer')} behind it"
    return _disk(state) if state["calls_at_disk"] else ""


def _held_back_here(state: dict[str, Any]) -> list[str]:
    """By this machine: its disk, its decisions."""
    found = []
    # At the start all calls are recorded in one commit: that holds nothing back.
    begins = state["first_answers"] and _oldest_s(state) < LATE_S
    if not begins and state["calls_at_disk"] > max(state["calls"] * AT_DISK, FEW):
        found.append(_disk(state))
    if state["to_decide"] > BACKLOG or state["deciding_s"] >= STUCK_S:
        since = f", for {state['deciding_s']:.0f} s" if state["deciding_s"] >= STUCK_S else ""
        found.append(f"deciding ({state['to_decide']:,} answers wait{since})")
    return found


def _held_back_there(state: dict[str, Any]) -> list[str]:
    """By what is not known of the servers, by one that is away, by what they may be asked."""
    found = []
    away = [endpoint for endpoint in state["endpoints"] if endpoint["state"] != "closed"]
    if state["learning_context"] and not away:
        found.append("learning the context length (one call at a time)")
    for endpoint in away:
        why = f": {shorten(endpoint['failure'], 80)}" if endpoint["failure"] else ""
        found.append(f"outage ({endpoint['name']}{why})")
    if not state["endpoints"]:
        found.append("outage (all servers have left)")
    return found + sorted(_names(state) - {"nothing", "limit", "outage"})


def _names(state: dict[str, Any]) -> set[str]:
    """What binds the endpoints, one or several of them."""
    return {endpoint["binds"] for endpoint in state["endpoints"]}


def _draining(state: dict[str, Any], held_back: list[str]) -> str:
    """A run that stops: what it still waits for, and how long it will."""
    awaited, left_s = _awaited(state) or "waiting for the decisions", state["drain_left_s"]
    left = "" if left_s is None or not state["calls"] else f", {left_s:.0f} s left"
    return ", ".join([f"draining ({awaited}{left})", *held_back])


def _disk(state: dict[str, Any]) -> str:
    return f"disk ({state['calls_at_disk']:,} of {state['calls']:,} calls wait for it)"


def _limited(state: dict[str, Any]) -> list[str]:
    """Why the limit is what it is, where one endpoint is held back by a limit that was found."""
    held = [endpoint for endpoint in state["endpoints"] if endpoint["binds"] == "limit"]
    return [held[0]["limit_why"]] if len(held) == 1 and held[0]["limit_why"] else []


def _awaited(state: dict[str, Any]) -> str:
    """What the servers still owe; empty where it is nothing."""
    busy = [endpoint for endpoint in state["endpoints"] if endpoint["in_flight"]]
    if not busy:
        return _batches(state["batches"])
    count = sum(endpoint["in_flight"] for endpoint in busy)
    oldest_s = _oldest_s(state)
    of = busy[0]["name"] if len(busy) == 1 else f"{len(busy)} endpoints"
    late = f", the oldest for {oldest_s:.0f} s" if oldest_s >= LATE_S else ""
    if state["first_answers"]:
        return f"waiting for the first answers: {counted(count, 'call')} to {of}{late}"
    return f"waiting for {counted(count, 'answer')} from {of}{late}"


def _oldest_s(state: dict[str, Any]) -> float:
    """For how long the oldest call has been under way."""
    return max((endpoint["oldest_s"] for endpoint in state["endpoints"]), default=0.0)


def _batches(batches: list[dict[str, Any]]) -> str:
    """What a provider still owes, and when it is asked next; empty where it is nothing."""
    if not batches:
        return ""
    requests = sum(batch["requests"] for batch in batches)
    done = sum(batch["done"] or 0 for batch in batches)
    states = ", ".join(sorted({batch["state"] for batch in batches}))
    oldest_s = max(batch["age_s"] for batch in batches)
    next_s = min(batch["next_look_s"] for batch in batches)
    many = "a batch" if len(batches) == 1 else f"{len(batches)} batches"
    answered = f", {done:,} done" if done else ""
    return (
        f"waiting for {many} of {counted(requests, 'request')} ({states}{answered}, for"
        f" {oldest_s // 3600} h {oldest_s % 3600 // 60} min), looking again in {next_s} s"
    )


def stage_line(stage: dict[str, Any]) -> str:
    """How far a stage before the last is, and how many of its rows the next one wants."""
    wanted = "" if stage["wanted"] is None else f" of {stage['wanted']:,} wanted"
    return (
        f"{visible(stage['name'])}: accepted {stage['accepted']:,}{wanted} · answers "
        f"{stage['answered']:,} · {stage['calls']:,} in flight · refused {stage['refused']:,}"
    )


def reached(state: dict[str, Any]) -> str:
    """How far the run is, by what it is to reach."""
    if state["target"] is not None:
        return f"accepted {state['accepted']:,}/{state['target']:,}"
    rows = "" if state["requests"] is None else f"/{state['requests']:,}"
    return f"decided {state['decided']:,}{rows} · accepted {state['accepted']:,}"


def tokens_line(state: dict[str, Any]) -> str:
    line = f"{state['prompt_tokens_per_s']:,.0f} in · {state['completion_tokens_per_s']:,.0f} out"
    if state["tokens_in_the_making"]:
        line += f" · {state['tokens_in_the_making']:,} in the making"
    per_row = state["tokens_per_accepted"]
    return line if per_row is None else f"{line} · {per_row:,.0f} for an accepted record"


def summary(state: dict[str, Any]) -> str:
    """One line: accepted of target, answers, in flight, tokens a second, cost, time left."""
    in_flight = sum(endpoint["in_flight"] for endpoint in state["endpoints"])
    limit = sum(endpoint["limit"] for endpoint in state["endpoints"])
    parts = [
        reached(state),
        f"answers {state['answered']:,}",
        f"in flight {in_flight}/{limit}",
        f"{state['completion_tokens_per_s']:,.0f} tokens/s",
    ]
    if state["tokens_in_the_making"]:
        parts.append(f"{state['tokens_in_the_making']:,} in the making")
    if held := binds(state):
        parts.append(held if held.startswith(WAITING) else f"held back by {held}")
    parts += [
        f"{visible(stage['name'])} {stage['accepted']:,} accepted" for stage in state["stages"]
    ]
    if state["failed"]:
        parts.append(f"failed {state['failed']:,}")
    if unread := state["not_compared_by_meaning"]:
        parts.append(f"not compared by meaning {unread:,}")
    if state["cost"] is not None:
        parts.append(f"cost {in_money(state['cost'])}")
    if state["left_s"] is not None and not state["draining"]:
        parts.append(f"{clock(state['left_s'])} left")
    return " · ".join(parts)


def clock(seconds: float) -> str:
    """``1:02:03``, or ``2:03`` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
