"""A run's counts in Prometheus' text format
(https://prometheus.io/docs/instrumenting/exposition_formats/).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from engine.money import Prices
from engine.recipes.load import ALPACA
from engine.stages import open_stages, stages_of_run
from engine.store import Counts, RunReader
from engine.store.lock import is_held

__all__ = ["metrics"]

Samples = Mapping[tuple[tuple[str, str], ...], float]
"""Values by their labels."""


def metrics(run: RunReader, *, tokens_in_the_making: int | None = None) -> str:
    """Counters of acknowledged rows, which never fall while a run goes on; and what only the run
    itself knows, where it is the one that asks.

    Those of a run of several stages have the label ``stage``; the last one is ``run`` itself.
    """
    *earlier, last = stages_of_run(run.folder)
    lines: list[str] = []
    with open_stages(earlier) as before:
        told = [*zip(earlier, before, strict=True), (last, run)]
        counts = [(stage.name, each.counts()) for stage, each in told]
        prices = [Prices.of(each.manifest.free) for _, each in told]
    costs = [price.cost_if_known(each) for price, (_, each) in zip(prices, counts, strict=True)]
    lost = [price.cost_of_lost(each) for price, (_, each) in zip(prices, counts, strict=True)]

    def metric(name: str, kind: str, help_: str, samples: Callable[[Counts], Samples]) -> None:
        lines.extend((f"# HELP woolmill_{name} {help_}", f"# TYPE woolmill_{name} {kind}"))
        for stage, each in counts:
            own = (("stage", stage),) if stage else ()
            for labels, value in samples(each).items():
                lines.append(f"woolmill_{name}{_labels((*own, *labels))} {value}")

    def of_last(name: str, help_: str, value: int) -> None:
        """What only the stage has that gives the dataset."""
        own = (("stage", last.name),) if last.name else ()
        lines.extend((f"# HELP woolmill_{name} {help_}", f"# TYPE woolmill_{name} gauge"))
        lines.append(f"woolmill_{name}{_labels(own)} {int(value)}")

    free, fixed = run.manifest.free, run.manifest.fixed
    named = (("folder", str(run.folder.resolve())), ("recipe", fixed.get("recipe", ALPACA)))
    lines += ["# HELP woolmill_run_info Which run it is.", "# TYPE woolmill_run_info gauge"]
    lines.append(f"woolmill_run_info{_labels(named)} 1")
    metric("accepted_records_total", "counter", "Accepted records.", lambda c: {(): c.accepted})
    target = free.get("target")
    if target is not None:
        of_last("target_records", "Accepted records wanted.", target)
    of_last("running", "Whether a process writes the run.", is_held(run.folder / "run.lock"))
    metric("refused_pieces_total", "counter", "Refused pieces by reason.",
           lambda c: {(("reason", reason),): n for reason, n in c.reasons.items()})  # fmt: skip
    metric("decided_requests_total", "counter", "Requests up to the last decision.",
           lambda c: {(): c.last_decided[0] + 1 if c.last_decided else 0})  # fmt: skip
    metric("requests_sent_total", "counter", "Requests sent.", lambda c: {(): c.sent})
    metric("answers_total", "counter", "Requests that came to an end, by backend.",
           lambda c: {(("backend", name),): n for name, n in c.backends.items() if name},
           )  # fmt: skip
    metric("unsent_requests_total", "counter", "Requests that there was no prompt to send for.",
           lambda c: {(): c.backends.get("", 0)})  # fmt: skip
    metric("failed_requests_total", "counter", "Requests that failed permanently.",
           lambda c: {(): c.failed})  # fmt: skip
    metric("attempts_total", "counter",
           "Attempts, retries among them, at requests that were answered or failed in the end.",
           lambda c: {(): c.attempts})  # fmt: skip
    metric("tokens_total", "counter", "Tokens billed.",
           lambda c: {(("kind", "prompt"),): c.prompt_tokens,
                      (("kind", "completion"),): c.completion_tokens})  # fmt: skip
    for name, kind, help_, amounts in (
        ("cost_total", "counter", "Money spent, in the currency of the prices.", costs),
        ("cost_without_answer", "gauge",
         "The most that attempts without an answer may have cost; a budget counts it.", lost),
    ):  # fmt: skip
        if any(cost is not None for cost in costs):
            lines.extend((f"# HELP woolmill_{name} {help_}", f"# TYPE woolmill_{name} {kind}"))
            for (stage, _), amount in zip(counts, amounts, strict=True):
                own = (("stage", stage),) if stage else ()
                lines.append(f"woolmill_{name}{_labels(own)} {amount or 0.0:.6f}")
    metric("tokens_without_answer", "gauge",
           "The most that attempts without an answer may have been billed.",
           lambda c: {(): c.lost_tokens})  # fmt: skip
    metric("wasted_answers_total", "counter",
           "Answers whose requests had one already, or were asked anew.",
           lambda c: {(): c.wasted})  # fmt: skip
    if tokens_in_the_making is not None:
        of_last("tokens_in_the_making", "Completion tokens of unfinished answers.",
                tokens_in_the_making)  # fmt: skip
    if any(each.last_at_s is not None for _, each in counts):
        metric("last_answer_timestamp_seconds", "gauge", "Unix time of the last answer's commit.",
               lambda c: {} if c.last_at_s is None else {(): c.last_at_s})  # fmt: skip
    return "\n".join(lines) + "\n"


def _labels(labels: tuple[tuple[str, str], ...]) -> str:
    told = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels)
    return f"{{{told}}}" if told else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
