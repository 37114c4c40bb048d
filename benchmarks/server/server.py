"""The port, and what all connections share: behaviour, ledger, buckets, the draw of faults."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from types import TracebackType
from typing import Any

from benchmarks.capacity import TokenBucket
from benchmarks.server.behaviour import ODD_FAULTS, Behaviour, Ledger
from benchmarks.server.peer import Peer

__all__ = ["Server"]


class Server:
    """``async with Server(Behaviour(…)) as server`` listens on a free loopback port at ``url``."""

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        self.behaviour = behaviour or Behaviour()
        self.ledger = Ledger()
        self.requests: TokenBucket | None = None
        self.tokens: TokenBucket | None = None
        self.port = 0
        self.paths: Counter[str] = Counter()
        self.peers: set[Peer] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self, port: int = 0, *, host: str = "127.0.0.1", ssl: Any = None) -> None:
        if self.behaviour.requests_per_min:
            self.requests = TokenBucket(self.behaviour.requests_per_min)
        if self.behaviour.tokens_per_min:
            self.tokens = TokenBucket(self.behaviour.tokens_per_min)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Peer(self), host, port, backlog=8192, ssl=ssl
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close the port and every connection, as a killed process does."""
        if self._server is not None:
            self._server.close()
        for peer in list(self.peers):
            peer.reset()

    async def __aenter__(self) -> Server:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    def draw_fault(self, key: str) -> str | None:
        behaviour = self.behaviour
        if not behaviour.fault_rate and behaviour.odd_every is None:
            return None
        rng = random.Random(f"{behaviour.seed} {key} {self.ledger.asked[key]}")
        if behaviour.odd_every is not None:
            drawn = rng.randrange(behaviour.odd_every)
            if drawn < len(ODD_FAULTS):
                return ODD_FAULTS[drawn]
        return rng.choice(behaviour.faults) if rng.random() < behaviour.fault_rate else None

    def metrics(self) -> bytes:
        engine = self.behaviour.batching
        running = engine.running if engine else self.ledger.live
        waiting = engine.waiting if engine else 0
        preemptions = engine.preemptions if engine else 0.0
        label = f'{{engine="0",model_name="{self.behaviour.model}"}}'
        return (
            f"vllm:num_requests_running{label} {float(running)}\n"
            f"vllm:num_requests_waiting{label} {float(waiting)}\n"
            f"vllm:num_preemptions_total{label} {preemptions}\n"
        ).encode()
