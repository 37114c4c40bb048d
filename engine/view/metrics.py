"""A run's counts in Prometheus' text format
(https://prometheus.io/docs/instrumenting/exposition_formats/).
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.store import RunReader

__all__ = ["metrics"]


def metrics(run: RunReader, *, tokens_in_the_making: int | None = None) -> str:
    """Counters of acknowledged rows, which never fall while a run goes on; and what only the run
    itself knows, where it is the one that asks.
    """
    counts = run.counts()
    lines: list[str] = []

    def metric(name: str, kind: str, help_: str, samples: Mapping[str, float]) -> None:
        lines.extend((f"# HELP woolmill_{name} {help_}", f"# TYPE woolmill_{name} {kind}"))
        lines.extend(f"woolmill_{name}{labels} {value}" for labels, value in samples.items())

    metric("accepted_records_total", "counter", "Accepted records.", {"": counts.accepted})
    target = run.manifest.free.get("target")
    if target is not None:
        metric("target_records", "gauge", "Accepted records wanted.", {"": target})
    metric("refused_pieces_total", "counter", "Refused pieces by reason.",
           {_labels("reason", reason): n for reason, n in counts.reasons.items()})  # fmt: skip
    metric("requests_sent_total", "counter", "Requests sent.", {"": counts.sent})
    metric("answers_total", "counter", "Requests that came to an end, by backend.",
           {_labels("backend", name): n for name, n in counts.backends.items()})  # fmt: skip
    metric("failed_requests_total", "counter", "Requests that failed for good.",
           {"": counts.failed})  # fmt: skip
    metric("attempts_total", "counter", "Attempts, retries among them.", {"": counts.attempts})
    metric("tokens_total", "counter", "Tokens billed.",
           {_labels("kind", "prompt"): counts.prompt_tokens,
            _labels("kind", "completion"): counts.completion_tokens})  # fmt: skip
    metric("wasted_answers_total", "counter", "Answers to requests that had one already.",
           {"": counts.wasted})  # fmt: skip
    if tokens_in_the_making is not None:
        metric("tokens_in_the_making", "gauge", "Completion tokens of unfinished answers.",
               {"": tokens_in_the_making})  # fmt: skip
    if counts.last_at_s is not None:
        metric("last_answer_timestamp_seconds", "gauge", "Unix time of the last answer's commit.",
               {"": counts.last_at_s})  # fmt: skip
    return "\n".join(lines) + "\n"


def _labels(name: str, value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'{{{name}="{escaped}"}}'
