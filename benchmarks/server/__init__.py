"""An OpenAI-shaped server on the loopback that can be as slow, narrow and toxic as one likes.

    python -m benchmarks.server --port 8000 --latency 0.5 --fault-rate 0.2

It answers Alpaca prompts with Alpaca records (a pure function of the prompt, so reruns agree), can
behave like vLLM (queue, knee, preemptions, ``/metrics``) or like a hosted API (429 beyond so many
in flight or a minute, with or without headers), goes wrong in every way of ``FAULTS``, and keeps a
ledger: what was asked, what was paid for, and how many generations were alive at once.

A fault is drawn from (seed, prompt, attempt), so a run can be repeated. A generation is *paid* when
its tokens were made, whether or not the answer then arrived.

behaviour    what it is like, what can go wrong, and the ledger
server       the port, and what all connections share
peer         one connection: routes, limits, what fails before anything is generated
generation   one answer in the making, and what goes wrong with it
"""

from benchmarks.server.behaviour import (
    EARLY_FAULTS,
    FAULTS,
    LATE_FAULTS,
    ODD_FAULTS,
    QUICK_FAULTS,
    Behaviour,
    Ledger,
)
from benchmarks.server.server import Server

__all__ = [
    "EARLY_FAULTS",
    "FAULTS",
    "LATE_FAULTS",
    "ODD_FAULTS",
    "QUICK_FAULTS",
    "Behaviour",
    "Ledger",
    "Server",
]
