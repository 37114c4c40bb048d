"""The gauges of a server's ``/metrics``, in Prometheus' text format."""

from __future__ import annotations

import re

__all__ = ["read_gauges"]

RUNNING = rb"vllm:num_requests_running|sglang:num_running_reqs|llamacpp:requests_processing"
"""Names, as alternatives of one pattern, for requests that the engine is working on."""
WAITING = rb"vllm:num_requests_waiting|sglang:num_queue_reqs|llamacpp:requests_deferred"
"""For requests that it has taken and not begun."""
PREEMPTIONS = rb"vllm:num_preemptions(?:_total)?"
"""For how often a request lost its place for want of memory; with or without the ``_total`` that
Prometheus' clients add to a counter's name."""
GAUGE = re.compile(
    rb"^(?:(%b)|(%b)|(%b))(?:\{.*\})? ([0-9.eE+]+)$" % (RUNNING, WAITING, PREEMPTIONS), re.MULTILINE
)
"""vLLM, SGLang and llama.cpp's server; tgi has no counterpart."""


def read_gauges(raw: bytes) -> tuple[float, float, float] | None:
    """(running, waiting, preemptions), summed over the server's engines; None where there are
    none.
    """
    sums = [0.0, 0.0, 0.0]
    found = False
    for *names, value in GAUGE.findall(raw):
        try:
            sums[next(i for i, name in enumerate(names) if name)] += float(value)
        except ValueError:
            continue
        found = True
    return (sums[0], sums[1], sums[2]) if found else None
