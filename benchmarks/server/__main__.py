"""The server on a port of its own; see ``python -m benchmarks.server --help``."""

from __future__ import annotations

import argparse
import asyncio

import uvloop

import benchmarks.server
from benchmarks.capacity import Batching
from benchmarks.server import QUICK_FAULTS, Behaviour, Server


async def serve(behaviour: Behaviour, port: int) -> None:
    server = Server(behaviour)
    await server.start(port)
    print(f"listening on {server.url}", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=benchmarks.server.__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model", default="toy")
    parser.add_argument("--records", type=int, default=3, help="records in an answer")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds to an answer")
    parser.add_argument("--slots", type=int, help="429 beyond this many in flight")
    parser.add_argument("--requests-per-min", type=float)
    parser.add_argument("--tokens-per-min", type=float)
    parser.add_argument(
        "--max-num-seqs", type=int, help="behave like vLLM with this many sequences"
    )
    parser.add_argument("--kv-tokens", type=int, help="with --max-num-seqs: room in its cache")
    parser.add_argument("--fault-rate", type=float, default=0.0, help="share of requests that fail")
    parser.add_argument("--faults", default=",".join(QUICK_FAULTS), help="comma-separated kinds")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    batching = None
    if args.max_num_seqs:
        batching = Batching(max_num_seqs=args.max_num_seqs, kv_tokens=args.kv_tokens)
    behaviour = Behaviour(
        model=args.model,
        root=args.model,
        owned_by="vllm" if batching else "toy",
        records=args.records,
        latency_s=args.latency,
        batching=batching,
        slots=args.slots,
        requests_per_min=args.requests_per_min,
        tokens_per_min=args.tokens_per_min,
        fault_rate=args.fault_rate,
        faults=tuple(args.faults.split(",")),
        seed=args.seed,
    )
    uvloop.run(serve(behaviour, args.port))


if __name__ == "__main__":
    main()
