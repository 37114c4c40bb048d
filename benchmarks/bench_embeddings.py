"""Embeddings by a server against those of this process, in one run.

python -m benchmarks.bench_embeddings [--vllm-python PYTHON] [--count N]

``here`` is ``SentenceEncoder`` (all-MiniLM-L6-v2); ``toy`` a server in another process that answers
at once, so that what is left is the cost of asking; ``vllm`` a real one that serves the same model
on the same cores. CPU is of the process that decides alone.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import orjson

from benchmarks.bench_dedup import instructions, row
from engine.backends.vllm.servers import serving
from engine.dedup.encoder import SentenceEncoder
from engine.embeddings.kept import TemporaryVectors
from engine.embeddings.remote import RemoteEncoder
from engine.embeddings.served import with_served
from engine.settings import RunConfig

DIMENSION = 384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="be the toy server")
    parser.add_argument("--vllm-python", type=Path)
    parser.add_argument("--count", type=int, default=768)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve())
        return
    texts = instructions(args.count)
    here = SentenceEncoder()
    expected = measure("here", here.encode, texts)
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.bench_embeddings", "--serve"], stdout=subprocess.PIPE
    ) as toy:
        assert toy.stdout is not None
        try:
            many = [f"{text} {n}" for n in range(10) for text in texts]
            remote("toy", toy.stdout.readline().decode().strip(), many)
        finally:
            toy.kill()
    if args.vllm_python is not None:
        arguments = {"dtype": "float32"}
        with serving("minilm", python=args.vllm_python, args=arguments) as [server]:
            vectors = remote("vllm", server.base_url, texts)
        print(f"  least cosine of vllm's {(vectors * expected).sum(axis=1).min():.7f}")


def remote(name: str, url: str, texts: Sequence[str]) -> Any:
    config = anyio.run(with_served, RunConfig(semantic_url=url))
    encoder = RemoteEncoder(config, None, TemporaryVectors(), print)
    try:
        return measure(name, encoder.encode, texts)
    finally:
        encoder.close()


def measure(name: str, encode: Callable[[Sequence[str]], Any], texts: Sequence[str]) -> Any:
    """Encode the texts, 512 at a time as the deciding process does."""
    encode([f"{text}?" for text in texts[:64]])
    began, cpu_s = time.perf_counter(), time.process_time()
    parts = [encode(texts[start : start + 512]) for start in range(0, len(texts), 512)]
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_s
    row(name, vectors_a_second=len(texts) / wall_s, us_of_cpu_a_vector=cpu_s / len(texts) * 1e6)
    return np.concatenate(parts)


async def serve() -> None:
    """Answers every batch with the same vector for each text."""
    vector = orjson.dumps(np.random.default_rng(0).normal(size=DIMENSION).tolist())

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:  # the client has hung up
                break
            size = 0
            for line in head.lower().split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    size = int(line[15:])
            asked = await reader.readexactly(size)
            body = b'{"data": [{"id": "toy"}]}'
            if head.startswith(b"POST"):
                items = [
                    b'{"index": %d, "embedding": %b}' % (index, vector)
                    for index in range(len(orjson.loads(asked)["input"]))
                ]
                body = b'{"data": [%b]}' % b", ".join(items)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(client, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    main()
