"""What a run of millions of rows costs besides its requests: the index, its memory, a restart.

    python -m benchmarks.bench_large [--rows 1000000] [--folder F]

Candidates are decided one after the other, without neighbours, and go into a store as a run puts
them there, four to an answer, until so many are accepted. Their words are made up: five million by
Zipf's law, lengths as of Alpaca's instructions (10 words, 60 bytes), one in seven an edit of one of
the latest. Then the process that decides is started as ``woolmill generate`` starts it, and timed
from its start to its first decisions: with the snapshot of the index, which lacks as many rows as a
run lets one lack, and without. Last come an export and the report.

At a million rows this takes some minutes and 2 GB of disk, at ten million ten times as much.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import anyio
import numpy as np

from benchmarks.bench_export import measured
from engine.decide.decider import make_cascade, row_source
from engine.decide.process import Deciding
from engine.decide.snapshot import EVERY, SHARE, Snapshots
from engine.dedup.cascade import Candidate, Cascade, Judgement
from engine.dedup.exact import digest
from engine.recipes.seeds import keep
from engine.records import Answer, Completion, Decision, Record, SeedTask, Usage
from engine.run.manifest import make_manifest
from engine.run.settle import settle
from engine.settings import RunConfig
from engine.store import SNAPSHOT, RunStore

Row = Callable[[str, float, str], None]

WORDS = 5_000_000
PIECES = 4
"""To an answer."""
LATEST = 50_000
"""Texts that edits are made of."""
CHUNK = 10_000
"""Candidates that are made and decided together."""
UNDECIDED = 256
"""Answers that wait for a decision at the restart."""
OBJECTS = 1_000_000
"""Texts that are laid out as Python's own objects, for comparison."""
OUTPUT = "The answer says in a sentence or two what was asked for, as answers of models do. " * 2


class Texts:
    """Candidates without an end."""

    def __init__(self) -> None:
        weights = 1 / (np.arange(1, WORDS + 1) + 2.7) ** 1.05
        self._cumulative = np.cumsum(weights) / weights.sum()
        self._rng = np.random.default_rng(0)
        self._words: dict[int, str] = {}
        self._latest: list[list[int]] = []

    def make(self, count: int) -> Iterator[str]:
        rng = self._rng
        lengths = np.clip(np.rint(rng.lognormal(2.2, 0.4, count)), 4, 60).astype(int)
        drawn = np.searchsorted(self._cumulative, rng.random(lengths.sum())).tolist()
        edited = (rng.random(count) < 1 / 7).tolist()
        start = 0
        for length, is_edited in zip(lengths.tolist(), edited, strict=True):
            ranks = drawn[start : start + length]
            start += length
            if is_edited and self._latest:
                given = self._latest[ranks[0] % len(self._latest)]
                at = ranks[1] % len(given)
                ranks = [*given[:at], ranks[2], *given[at + 1 :]]
            self._latest.append(ranks)
            yield " ".join(map(self._word, ranks))
        del self._latest[:-LATEST]

    def _word(self, rank: int) -> str:
        """A pronounceable word for each rank, the more frequent the shorter."""
        if rank not in self._words:
            letters, left = "", rank + 1
            while left:
                letters += "bdfgklmnpr"[left % 10] + "ae"[left // 10 % 2]
                left //= 20
            self._words[rank] = letters
        return self._words[rank]


class Fill:
    """A run that is filled as if its requests had been answered."""

    def __init__(self, folder: Path) -> None:
        settings = RunConfig.model_validate(
            {"backend": "scripted", "out": folder, "semantic": False, "target": 1 << 40}
        )
        settled = settle(settings)
        self.config, self.recipe, self.tasks = settled.config, settled.recipe, settled.tasks
        manifest = make_manifest(self.config, self.recipe, self.tasks, "made-up")
        self.store = RunStore.open(folder, manifest)
        keep(self.tasks, folder)
        self.accepted = self.requests = 0
        self.last = (-1, 0)

    async def add(self, texts: list[str], judgements: list[Judgement]) -> None:
        """Decided pieces, four to an answer; what is left over in the last is a piece less."""
        decisions = []
        for number, (text, judgement) in enumerate(zip(texts, judgements, strict=True)):
            decisions.append(
                Decision(
                    index=self.requests + number // PIECES,
                    position=number % PIECES,
                    reason=judgement.reason,
                    record=Record(instruction=text, input="", output=OUTPUT),
                    nearest=judgement.nearest,
                    mean_similarity=judgement.mean_similarity,
                )
            )
        await self.answer(texts)
        await self.store.decided(decisions)
        self.accepted += sum(judgement.accepted for judgement in judgements)
        self.last = (decisions[-1].index, decisions[-1].position)

    async def answer(self, texts: list[str]) -> None:
        usage = Usage(prompt_tokens=900, completion_tokens=280)
        answers = []
        for start in range(0, len(texts), PIECES):
            completion = Completion(
                text=answer_text(texts[start : start + PIECES]),
                finish_reason="stop",
                usage=usage,
                model="made-up",
            )
            answers.append(
                Answer(
                    index=self.requests + len(answers),
                    demonstrations=("seed_task_0", "seed_task_1", "seed_task_2"),
                    completion=completion,
                    backend="scripted",
                )
            )
        await self.store.sent_earlier([(answer.index, bytes(16)) for answer in answers])
        await self.store.answered(answers)
        self.requests += len(answers)


def answer_text(texts: list[str]) -> str:
    """What Alpaca's parser reads as so many records, after three demonstrations."""
    parts = []
    for number, text in enumerate(texts, 4):
        head = "" if number == 4 else f"{number}. Instruction:"
        parts.append(f"{head} {text}\n{number}. Input:\n<noinput>\n{number}. Output:\n{OUTPUT}\n")
    return "###\n".join(parts)


async def measure(folder: Path, rows: int, row: Row) -> None:
    """All of it, into the table."""
    run, made = Fill(folder), Texts()
    cascade = make_cascade(run.config, run.recipe)
    cascade.neighbours = 0
    snapshots = Snapshots(run.store, lambda line: print(f"    {line}", flush=True))
    marks = [mark for mark in (10**power for power in range(4, 9)) if mark < rows] + [rows]
    latest: deque[tuple[float, int]] = deque(maxlen=5)
    lacking = max(EVERY, rows // SHARE)
    while run.accepted < rows:
        texts = list(made.make(CHUNK))
        candidates = [
            Candidate(text=text, source=row_source(run.requests + n // PIECES, n % PIECES))
            for n, text in enumerate(texts)
        ]
        goal = rows - lacking if run.accepted < rows - lacking else rows
        began = time.process_time()
        judgements = cascade.judge(candidates, goal - run.accepted)
        latest.append((time.process_time() - began, len(judgements)))
        await run.add(texts[: len(judgements)], judgements)
        if run.accepted >= marks[0]:
            cpu, judged = map(sum, zip(*latest, strict=True))
            row(f"decision at {marks.pop(0):,} rows", cpu / judged * 1e6, "µs of CPU a candidate")
        if run.accepted == rows - lacking:
            began = time.perf_counter()
            snapshots.keep(cascade, run.last, run.accepted)
            row("snapshot: decisions held up", (time.perf_counter() - began) * 1e3, "ms")
            snapshots.wait()
            row("snapshot: written in", time.perf_counter() - began, "s")
            row("snapshot: size", (folder / SNAPSHOT).stat().st_size / 1e6, "MB")
    rouge = cascade._rouge
    assert rouge is not None
    row("index of ROUGE-L", rouge.nbytes / len(cascade), "bytes an item")
    row("beside it: texts, sources, digests", cascade.nbytes / len(cascade), "bytes an item")
    row("beside it, as Python's objects", as_objects(cascade), "bytes an item")
    await run.answer(list(made.make(UNDECIDED * PIECES)))
    await run.store.aclose()
    row("store", (folder / "run.sqlite").stat().st_size / 1e6, "MB")
    config, tasks, below = run.config, run.tasks, run.requests
    del run, cascade, rouge, candidates, judgements

    async def restart(how: str) -> None:
        seconds, peak_mb = await first_decisions(config, tasks, below)
        row(f"restart {how}: first decisions after", seconds, "s")
        row(f"restart {how}: memory", peak_mb, "MB")

    await restart("with the snapshot")
    for name, arguments in JOBS.items():
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            cost = measured(*arguments[:1], str(folder), *arguments[1:], "-o", f"{scratch}/out")
        row(name, cost["s"], "s")
        row(f"{name}: memory", cost["peak_mb"], "MB")
    (folder / SNAPSHOT).unlink()
    await restart("without")  # takes longest by far


JOBS = {
    "export to JSON Lines": ("export", "--format", "jsonl"),
    "report": ("report", "--format", "html"),
}


async def first_decisions(
    config: RunConfig, tasks: Sequence[SeedTask], below: int
) -> tuple[float, float]:
    """Seconds from the start of the process that decides to its first decisions; its most MB."""
    began = time.perf_counter()
    deciding = Deciding(config, tasks, lambda line: print(f"    {line}", flush=True))
    try:
        await deciding.start()
        await deciding.ready()
        deciding.tell(below)
        async for _ in deciding.batches():
            break
        seconds = time.perf_counter() - began
        assert deciding._process is not None
        return seconds, peak_mb(deciding._process.pid)
    finally:
        await deciding.aclose()


def as_objects(cascade: Cascade) -> float:
    """Bytes an item of lists of texts and sources, and of a ``dict`` of digests."""
    count = min(OBJECTS, len(cascade))
    texts = [cascade._texts[i] for i in range(count)]
    sources = [cascade._sources[i] for i in range(count)]
    first: dict[bytes, int] = {}
    for item, text in enumerate(texts):
        first.setdefault(digest(text), item)
    held = [*texts, *sources, *first.keys(), *first.values(), texts, sources, first]
    return sum(map(sys.getsizeof, held)) / count


def peak_mb(pid: int) -> float:
    """The most memory that a process had so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1.024e-3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where to write [the system's for such files]")
    options = parser.parse_args()
    figures: dict[str, float] = {}

    def row(name: str, value: float, unit: str) -> None:
        figures[f"{name}, {unit}"] = round(value, 3)
        print(f"  {name:<46} {value:>12,.1f} {unit}", flush=True)

    with tempfile.TemporaryDirectory(prefix="bench-large-", dir=options.folder) as folder:
        anyio.run(
            measure, Path(folder) / "run", options.rows, row, backend_options={"use_uvloop": True}
        )
    print(json.dumps({"benchmark": "large", "rows": options.rows, "results": figures}))


if __name__ == "__main__":
    main()
