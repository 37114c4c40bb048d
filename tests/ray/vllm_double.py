"""What runs in the place of vLLM's server on a node: the loopback server, at the address and with
the key that it is given. Each answer that was made is a line of the file WOOLMILL_PAID: the port,
and a hash of the prompt and its seed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

from benchmarks.server import Behaviour, Server


class Paid(Counter[str]):
    """Counts what was paid, and writes it down at once: the process may be killed."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port
        self._file = os.open(os.environ["WOOLMILL_PAID"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def update(self, keys: Iterable[str] | None = None, /, **more: Any) -> None:  # type: ignore[override]
        for key in keys or ():
            os.write(self._file, f"{self._port} {key}\n".encode())


async def serve(host: str, port: int, behaviour: Behaviour) -> None:
    server = Server(behaviour)
    server.ledger.paid = Paid(port)
    await server.start(port, host=host)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--served-model-name", required=True)
    given, _ = parser.parse_known_args()
    behaviour = Behaviour(
        model=given.served_model_name,
        root=given.served_model_name,
        api_key=os.environ["VLLM_API_KEY"],
        latency_s=0.25,
    )
    asyncio.run(serve(given.host, given.port, behaviour))


if __name__ == "__main__":
    main()
