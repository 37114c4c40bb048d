"""Which of FAISS's own incremental indexes finds near-duplicates by meaning, and at what price.

    python -m benchmarks.bench_faiss [--vectors 1000000] [--folder F]

The vectors are those of ``bench_dedup``. A decision is whether any vector has a cosine above 0.9 to
a query; an index names candidates, and their cosines are computed from full vectors in a file. So
none invents a duplicate, and what counts is which it misses. Indexes with trained lists are trained
on the first 100,000 vectors; the sign lists that the engine uses take the first 4,096 for centres.
Vectors are added one batch of 256 after the other. CPU is that of the process, on one thread, for
queries one at a time and 256 together; memory is the size of the index as FAISS writes it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from benchmarks.bench_dedup import Clusters, instructions
from engine.dedup import SemanticIndex, SentenceEncoder

THRESHOLD = 0.9
QUERIES = 2_000
TRAINED_ON = 100_000
BATCH = 256
LISTED = ("IVF1024,RaBitQ", "IVF1024,RaBitQfs", "IVF1024,PQ96x4fs", "IVF1024,SQ8")
PROBES = 32
NEAREST = 32
"""Candidates of a query whose cosines are computed."""
Search = Callable[[NDArray[np.float32]], NDArray[np.int64]]


class Work:
    """The vectors, in a file, and what the exact decisions about the queries are."""

    def __init__(self, folder: Path, count: int) -> None:
        base = SentenceEncoder(threads=1).encode(instructions(4_000))
        clusters = Clusters(base, count // 5)
        rng = np.random.default_rng(2)
        self.queries = clusters.draw(QUERIES, np.random.default_rng(3))
        shape = (count, base.shape[1])
        self.vectors = np.memmap(folder / "vectors", np.float32, "w+", shape=shape)
        best = np.full(QUERIES, -1.0, np.float32)
        for start in range(0, count, 10_000):
            some = clusters.draw(min(10_000, count - start), rng)
            self.vectors[start : start + len(some)] = some
            best = np.maximum(best, (some @ self.queries.T).max(axis=0))
        self.exact = best > THRESHOLD

    def decide(self, search: Search, batch: int) -> dict[str, float]:
        """What the decisions by ``search``, which names items (Q, N; -1: none), cost and miss."""
        found = np.zeros(QUERIES, np.bool_)
        began = time.process_time()
        for start in range(0, QUERIES, batch):
            some = self.queries[start : start + batch]
            for place, items in enumerate(search(some), start):
                cosines = self.vectors[items[items >= 0]] @ self.queries[place]
                found[place] = (cosines > THRESHOLD).any()
        cpu_s = time.process_time() - began
        return self.figures(found) | {f"us_a_query_{batch}": cpu_s / QUERIES * 1e6}

    def figures(self, found: NDArray[np.bool_]) -> dict[str, float]:
        return {
            "recall": float((found & self.exact).sum() / self.exact.sum()),
            "same_decisions": float((found == self.exact).mean()),
            "false_positives": int((found & ~self.exact).sum()),
        }


def listed(work: Work, factory: str) -> dict[str, float]:
    """An inverted file that FAISS trains itself."""
    index = faiss.index_factory(work.vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    return searched(
        work, index, index.add, lambda queries: index.search(queries, NEAREST)[1], work.vectors
    )


def binary(work: Work, lists: int, probes: int) -> dict[str, float]:
    """An inverted file of sign codes, compared bit by bit."""
    dimension = work.vectors.shape[1]
    index = faiss.IndexBinaryIVF(faiss.IndexBinaryFlat(dimension), dimension, lists)
    return searched(
        work,
        index,
        lambda vectors: index.add(signs(vectors)),
        lambda queries: index.search(signs(queries), NEAREST)[1],
        signs(work.vectors[:TRAINED_ON]),
        probes,
    )


def searched(
    work: Work,
    index: Any,
    add: Callable[[NDArray[np.float32]], None],
    search: Search,
    training: NDArray[Any],
    probes: int = PROBES,
) -> dict[str, float]:
    index.train(training[:TRAINED_ON])
    index.nprobe = probes
    began = time.process_time()
    for start in range(0, len(work.vectors), BATCH):
        add(work.vectors[start : start + BATCH])
    added_s = time.process_time() - began
    is_binary = isinstance(index, faiss.IndexBinary)
    write = faiss.serialize_index_binary if is_binary else faiss.serialize_index
    return {
        **work.decide(search, 1),
        **work.decide(search, BATCH),
        "us_an_insert": added_s / len(work.vectors) * 1e6,
        "bytes_a_vector": len(write(index)) / len(work.vectors),
    }


def engines(work: Work) -> dict[str, float]:
    """The engine's index, which reads vectors and decides by itself, one query at a time."""
    index = SemanticIndex(work.vectors.shape[1], THRESHOLD)
    began = time.process_time()
    for vector in work.vectors:
        index.add(vector)
    added_s = time.process_time() - began
    began = time.process_time()
    found = np.array([index.find(query) is not None for query in work.queries])
    return {
        **work.figures(found),
        "us_a_query_1": (time.process_time() - began) / QUERIES * 1e6,
        "us_an_insert": added_s / len(work.vectors) * 1e6,
        "bytes_a_vector": index.nbytes / len(work.vectors),
    }


def signs(vectors: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.packbits(vectors > 0, axis=1, bitorder="little")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where to write [the system's for such files]")
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        work = Work(Path(folder), options.vectors)
        ways: dict[str, Callable[[], dict[str, float]]] = {"the engine's": lambda: engines(work)}
        for lists, probes in ((1_024, 64), (4_096, 128)):
            name = f"BinaryIVF{lists}, {probes} read"
            ways[name] = lambda lists=lists, probes=probes: binary(work, lists, probes)  # type: ignore[misc]
        for factory in LISTED:
            ways[factory] = lambda factory=factory: listed(work, factory)  # type: ignore[misc]
        for name, measure in ways.items():
            figures[name] = {key: round(value, 4) for key, value in measure().items()}
            print(f"{name:26}", figures[name], flush=True)
    print(json.dumps({"benchmark": "faiss", "vectors": options.vectors, "results": figures}))


if __name__ == "__main__":
    main()
