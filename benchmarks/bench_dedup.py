"""Near-duplicate rejection: how fast, how exact, how much memory, beside what else there is.

    python -m benchmarks.bench_dedup [--quick] [--file F]
        [--only rouge,chinese,peers,stream,semantic,encoder]

Times are CPU time of the process. Compiling is left out (it is done once, before; the compiled
loops are kept on disk), and so is making the texts. Every figure of ours includes tokenising.

The texts are made here: a vocabulary of 200,000 words by Zipf's law, 10 words a text (p99 25), one
text in seven an edit of an earlier one. ``--file`` takes the texts of a dataset instead (field
``instruction``). The Chinese texts are these with one or two characters for each word: 16 tokens
where the others have 10. The vectors are made from real embeddings of some thousand instructions:
200,000 centres between them, five vectors around each, at cosines from 0.7 to 1. The peers decide
the same stream; recall is against the exact decision at F > 0.7. Their thresholds: Jaccard 0.54,
which is F 0.7 for texts of one length, and cosine 0.9. semhash embeds with the word vectors of
MiniLM, as a static model.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import time
from bisect import bisect
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from engine.datasets import read_rows
from engine.dedup import RougeIndex, SemanticIndex, SentenceEncoder, tokenize
from engine.dedup.encoder import default_model
from engine.surroundings import cores

THRESHOLD = 0.7
JACCARD = THRESHOLD / (2 - THRESHOLD)


def main() -> None:
    """Run the sections asked for, and print their figures as one JSON object in the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the size")
    parser.add_argument("--only", help="sections, with commas between")
    parser.add_argument("--file", type=Path, help="a dataset in place of made texts")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(SECTIONS)
    figures: dict[str, Any] = {}
    texts: list[str] = []
    if {"rouge", "chinese", "peers", "stream", "spread"} & set(names):
        texts = (
            texts_of(arguments.file)
            if arguments.file
            else made_texts(60_000 if arguments.quick or names == ["chinese"] else 1_010_000)
        )
        warm_up(texts)
    for name in names:
        print(f"\n{name}")
        figures[name] = SECTIONS[name](texts, arguments.quick)
    print(json.dumps(figures))


# Texts and vectors


def made_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of a Zipf vocabulary; the share of near-duplicates is that of real instruction
    streams."""
    rng = np.random.default_rng(seed)
    weights = 1 / (np.arange(1, 200_001) + 2.7) ** 1.05
    cumulative = np.cumsum(weights) / weights.sum()
    lengths = np.clip(np.rint(rng.lognormal(2.2, 0.4, count)), 3, 60).astype(int)
    ends = np.cumsum(lengths)
    ids = np.searchsorted(cumulative, rng.random(ends[-1]))
    verbs = (rng.zipf(1.5, count) % 60).tolist()
    edited = (rng.random(count) < 0.15).tolist()
    earlier = (rng.random(count) * np.arange(count)).astype(int).tolist()
    texts: list[list[int]] = []
    for i in range(count):
        own = ids[ends[i] - lengths[i] : ends[i]].tolist()
        if edited[i] and i > 100:
            words = list(texts[earlier[i]])
            for new in own[: 1 + i % 3]:
                place = new % len(words)
                if new % 3 == 0:
                    words[place] = new
                elif new % 3 == 1:
                    words.insert(place, new)
                elif len(words) > 3:
                    words.pop(place)
        else:
            words = [verbs[i], *own[1:]]
        texts.append(words)
    return [" ".join(map(word, words)) for words in texts]


def word(rank: int) -> str:
    """A pronounceable word for each rank, the more frequent the shorter."""
    letters = ""
    rank += 1
    while rank:
        letters += "bdfgklmnprstvz"[rank % 14] + "aeiou"[rank // 14 % 5]
        rank //= 70
    return letters


def chinese_of(texts: Sequence[str]) -> list[str]:
    """Texts with one character for a short word and two for others, the same for the same word; of
    3,500 by Zipf's law."""
    weights = 1 / (np.arange(1, 3_501) + 6)
    cumulative = (np.cumsum(weights) / weights.sum()).tolist()

    @cache
    def characters(latin: str) -> str:
        rng = random.Random(latin)
        count = 1 if len(latin) < 3 else 2
        return "".join(chr(0x4E00 + bisect(cumulative, rng.random())) for _ in range(count))

    return ["".join(map(characters, text.split())) + "。" for text in texts]


def texts_of(path: Path) -> list[str]:
    return [row.text(("instruction",)) for row in read_rows(path)]


TOPICS = (
    "the sea,tax returns,learning German,quantum physics,job interviews,old bicycles,bread,chess,"
    "a lost dog,climate change,electric cars,space travel,public libraries,saving money,honey bees,"
    "volcanoes,ancient Rome,jazz,vaccines,city traffic,online privacy,coffee,grandparents,sleep,"
    "black holes,friendship,sorting algorithms,a haunted house,the stock market,breakfast,birds"
).split(",")
FORMS = (
    "Write a poem about {t}.|Explain {t} to a child of {n}.|List {n} facts about {t}.|"
    "Compare {t} with {u}.|Draft an email to a friend about {t}.|What would happen without {t}?|"
    "Give {n} tips on {t}.|How are {t} and {u} connected?|Suggest a title for an essay on {t}.|"
    "Invent a dialogue about {t} between two people who like {u}.|Plan a lesson on {t} and {u}.|"
    "Write a story of {n} sentences in which {t} and {u} play a part.|Make a quiz about {t}."
).split("|")


def instructions(count: int) -> list[str]:
    rng = random.Random(0)
    texts = (
        rng.choice(FORMS).format(t=rng.choice(TOPICS), u=rng.choice(TOPICS), n=rng.randint(3, 12))
        for _ in itertools.count()
    )
    return list(itertools.islice(dict.fromkeys(itertools.islice(texts, 4 * count)), count))


class Clusters:
    """Vectors around centres that lie between real embeddings."""

    def __init__(self, base: NDArray[np.float32], centres: int) -> None:
        self._base = base
        rng = np.random.default_rng(1)
        self._from = rng.integers(len(base), size=(3, centres))

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[np.float32]:
        """(count, D), of unit length."""
        one, two, three = self._from[:, rng.integers(self._from.shape[1], size=count)]
        centre = unit(self._base[one] + 0.8 * (self._base[two] - self._base[three]))
        a, b = rng.integers(len(self._base), size=(2, count))
        spread = rng.uniform(0.1, 0.7, (count, 1)).astype(np.float32)
        return unit(centre + spread * (self._base[a] - self._base[b]))


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


# Measuring


def cpu(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of CPU, and what the work returned."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def row(name: str, **figures: float) -> None:
    cells = "  ".join(f"{key} {value:,.4g}" for key, value in figures.items())
    print(f"  {name:<28} {cells}", flush=True)


def warm_up(texts: Sequence[str]) -> None:
    index = RougeIndex(THRESHOLD)
    for text in texts[:4_100]:
        index.add(text)
    index.find("a")
    index.nearest("a")


def slowest(times: list[float]) -> dict[str, float]:
    """Of CPU times in seconds: the 99.99th percentile and the worst, in milliseconds."""
    ordered = sorted(times)
    return {
        "p9999_ms": ordered[int(len(ordered) * 0.9999)] * 1e3,
        "worst_ms": ordered[-1] * 1e3,
    }


def worst_pause_s(cpu_s: float) -> float:
    """The longest CPU time of a microsecond's work, tried for so long: what the machine adds.

    A virtual machine counts what its host takes away as ours, in pauses of any length.
    """
    end = time.thread_time() + cpu_s
    worst = 0.0
    while (start := time.thread_time()) < end:
        sum(range(100))
        worst = max(worst, time.thread_time() - start)
    return worst


# Sections


def rouge(texts: list[str], quick: bool) -> dict[str, Any]:
    """One candidate against a pool: ours, the loop over rouge_score, rapidfuzz's cdist."""
    figures: dict[str, Any] = {}
    index = RougeIndex(THRESHOLD)
    queries = texts[-min(5_000, len(texts) // 5) :]
    most = len(texts) - len(queries)
    sizes = [size for size in (1_000, 10_000, 50_000, 1_000_000) if size <= most] or [most]
    inserts: list[float] = []
    gc.collect()
    gc.freeze()  # or the collector walks through the texts during somebody's insert
    pair_s = rouge_score_pair_s(texts[:20], texts[20:40])
    for size in sizes:
        for text in texts[len(index) : size]:
            start = time.thread_time()
            index.add(text)
            inserts.append(time.thread_time() - start)
        find_s, hits = cpu(lambda: [index.find(text) for text in queries])
        some = range(size - (64 if size > 100_000 else min(size, 1_024)), size)
        nearest_s, _ = cpu(lambda: index.neighbours(some))  # noqa: B023
        cdist_s = cdist_candidate_s(texts[:size], queries[: 4 if size > 100_000 else 20])
        ours_s = find_s / len(queries)
        figures[str(size)] = at = {
            "find_us": ours_s * 1e6,
            "candidates_per_cpu_s": 1 / ours_s,
            "refused": sum(hit is not None for hit in hits),
            "nearest_and_mean_us": nearest_s / len(some) * 1e6,
            "rouge_score_ms": pair_s * size * 1e3,
            "faster_than_rouge_score": pair_s * size / ours_s,
            "cdist_ms": cdist_s * 1e3,
            "bytes_an_item": index.nbytes / size,
        }
        row(f"pool of {size:,}", **at)
    figures["insert"] = {
        "mean_us": sum(inserts) / len(inserts) * 1e6,
        **slowest(inserts),
        "machine_worst_ms": worst_pause_s(sum(inserts)) * 1e3,
    }
    row("insert", **figures["insert"])
    gc.unfreeze()
    return figures


def chinese(texts: list[str], quick: bool) -> dict[str, Any]:
    """A decision among 50,000 Chinese texts by characters, beside one among English ones."""
    size = 10_000 if quick else 50_000
    some = texts[: size + 5_000]
    figures: dict[str, Any] = {}
    for language, rows in (("en", some), ("zh", chinese_of(some))):
        index = RougeIndex(language=language)
        index.admit(rows[-4_100:])  # compiled by now, and the table of characters made
        index.find(rows[0])
        index = RougeIndex(language=language)
        for text in rows[:size]:
            index.add(text)
        rest = rows[size:]
        rounds = [cpu(lambda: [index.find(text) for text in rest]) for _ in range(5)]  # noqa: B023
        tokens = [len(tokenize(text, language)) for text in rows]
        figures[language] = {
            "find_us": min(seconds for seconds, _ in rounds) / len(rest) * 1e6,
            "refused": sum(hit is not None for hit in rounds[0][1]),
            "tokens": sum(tokens) / len(tokens),
            "bytes_an_item": index.nbytes / size,
        }
        row(f"{language}, pool of {size:,}", **figures[language])
    figures["times_english"] = figures["zh"]["find_us"] / figures["en"]["find_us"]
    print(f"  times English: {figures['times_english']:.2f}")
    return figures


def rouge_score_pair_s(pool: Sequence[str], candidates: Sequence[str]) -> float:
    """CPU seconds of one pair, tokenised before, as Alpaca's loop does it."""
    from rouge_score import rouge_scorer

    score: Any = rouge_scorer._score_lcs
    tokens = [tokenize(text) for text in pool]
    seconds, _ = cpu(
        lambda: [
            score(mine, theirs) for c in candidates for mine in [tokenize(c)] for theirs in tokens
        ]
    )
    return seconds / len(pool) / len(candidates)


def cdist_candidate_s(pool: Sequence[str], candidates: Sequence[str]) -> float:
    """CPU seconds of one candidate: a character for each token, all pairs at once."""
    number: dict[str, int] = {}

    def characters(text: str) -> str:
        ids = (number.setdefault(token, len(number)) for token in tokenize(text))
        return "".join(chr(i + 0x20 + 0x800 * (i + 0x20 >= 0xD800)) for i in ids)

    as_characters = [characters(text) for text in pool]
    mine = [characters(text) for text in candidates]
    seconds, _ = cpu(
        lambda: process.cdist(mine, as_characters, scorer=LCSseq.similarity, dtype=np.uint8)
    )
    return seconds / len(candidates)


def peers(texts: list[str], quick: bool) -> dict[str, Any]:
    """A stream decided by each: rows a CPU second, and recall and precision of its refusals."""
    stream = texts[: 2_000 if quick else 20_000]

    def ours() -> set[int]:
        index = RougeIndex(THRESHOLD)
        refused = set()
        for i, text in enumerate(stream):
            if index.find(text) is None:
                index.add(text)
            else:
                refused.add(i)
        return refused

    def datasketch() -> set[int]:
        from datasketch import MinHash, MinHashLSH

        lsh = MinHashLSH(threshold=JACCARD, num_perm=128)
        refused = set()
        for i, text in enumerate(stream):
            minhash = MinHash(num_perm=128)
            minhash.update_batch([token.encode() for token in tokenize(text)])
            if lsh.query(minhash):
                refused.add(i)
            else:
                lsh.insert(i, minhash)
        return refused

    def rensa() -> set[int]:
        from rensa import RMinHash, RMinHashDeduplicator

        deduplicator: Any = RMinHashDeduplicator(JACCARD, 128, True)
        refused = set()
        for i, text in enumerate(stream):
            minhash = RMinHash(128, 42)
            minhash.update(tokenize(text))
            if not deduplicator.add(str(i), minhash):
                refused.add(i)
        return refused

    def semhash() -> set[int]:
        from semhash import SemHash

        model: Any = static_model()
        texts_ = [f"{text}\0{i}" for i, text in enumerate(stream)]
        number = {text: i for i, text in enumerate(texts_)}
        hashed: Any = SemHash.from_records(texts_, model=model)
        return {number[d.record] for d in hashed.self_deduplicate(0.9).filtered}

    exact_s, exact = cpu(ours)
    figures: dict[str, Any] = {}
    for name, decide in (("datasketch", datasketch), ("rensa", rensa), ("semhash", semhash)):
        try:
            seconds, refused = cpu(decide)
        except ImportError as exc:
            print(f"  {name:<28} not installed ({exc}); pip install 'woolmill[bench]'")
            continue
        both = len(refused & exact)
        figures[name] = {
            "rows_per_cpu_s": len(stream) / seconds,
            "recall": both / max(1, len(exact)),
            "precision": both / max(1, len(refused)),
        }
    figures = {
        "ours": {"rows_per_cpu_s": len(stream) / exact_s, "recall": 1.0, "precision": 1.0},
        **figures,
    }
    for name, at in figures.items():
        row(f"{name}, {len(stream):,} rows", **at)
    return figures


def static_model() -> Any:
    """MiniLM's word vectors as a model2vec model."""
    from model2vec import StaticModel
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    folder = Path(default_model())
    vectors = load_file(folder / "model.safetensors")["embeddings.word_embeddings.weight"]
    return StaticModel(vectors, Tokenizer.from_file(str(folder / "tokenizer.json")), normalize=True)


def stream(texts: list[str], quick: bool) -> dict[str, Any]:
    """A stream as a run sees it: decisions alone, and with the ten nearest and the mean."""
    candidates = texts[: 5_000 if quick else 52_000]
    figures: dict[str, Any] = {"rows": len(candidates)}
    for name, batch in (("decisions", 0), ("with_ten_nearest_and_mean", 16)):
        wall = time.perf_counter()
        seconds, accepted = cpu(lambda: replay(candidates, batch))  # noqa: B023
        figures[name] = {"cpu_s": seconds, "wall_s": time.perf_counter() - wall}
        figures["accepted"] = accepted
        row(name.replace("_", " "), **figures[name])
    return figures


def replay(candidates: Sequence[str], batch: int) -> int:
    index = RougeIndex(THRESHOLD)
    for text in candidates:
        if index.find(text) is not None:
            continue
        index.add(text)
        if batch and len(index) % batch == 0:
            index.neighbours(range(len(index) - batch, len(index)))
    return len(index)


def spread(texts: list[str], quick: bool) -> dict[str, Any]:
    """A batch by one thread and by one on each core, by turns: decisions, and nearest and mean."""
    figures: dict[str, Any] = {}
    sizes = (20_000,) if quick else (200_000, 1_000_000, 3_000_000)
    rounds, batch, asked = 16, 256, 128
    if not quick:
        texts = made_texts(sizes[-1] + 2 * rounds * batch * len(sizes), seed=1)
    probes = iter(texts[sizes[-1] :])
    ways = [RougeIndex(THRESHOLD), RougeIndex(THRESHOLD, threads=cores())]
    done = 0
    for size in sizes:
        for index in ways:
            index.extend(texts[done:size])
        done = size
        for _ in range(2):  # the first round warms up
            batches = [list(itertools.islice(probes, batch)) for _ in range(rounds)]
            decided, compared = [], []
            for index in ways:
                began = time.perf_counter()
                for some in batches:
                    index.admit(some)
                decided.append((time.perf_counter() - began) / rounds / batch)
                began = time.perf_counter()
                index.neighbours(range(len(index) - asked, len(index)))
                compared.append((time.perf_counter() - began) / asked)
        assert len(ways[0]) == len(ways[1])
        figures[str(size)] = {
            "decision_us": decided[0] * 1e6,
            f"decision_{cores()}_threads_us": decided[1] * 1e6,
            "nearest_and_mean_us": compared[0] * 1e6,
            f"nearest_and_mean_{cores()}_threads_us": compared[1] * 1e6,
        }
        row(f"pool of {size:,}", **figures[str(size)])
    return figures


def semantic(_texts: list[str], quick: bool) -> dict[str, Any]:
    """A million vectors: recall of the exact decision, CPU and memory."""
    count = 50_000 if quick else 1_000_000
    base = SentenceEncoder(threads=1).encode(instructions(1_000 if quick else 4_000))
    clusters = Clusters(base, count // 5)
    rng = np.random.default_rng(2)
    queries = clusters.draw(1_000, np.random.default_rng(3))
    warm = SemanticIndex(base.shape[1])
    for vector in clusters.draw(4_200, rng):
        warm.add(vector)
    warm.find(queries[0])
    index = SemanticIndex(base.shape[1], 0.9)
    best = np.full(len(queries), -1.0, np.float32)
    inserts: list[float] = []
    gc.collect()
    gc.freeze()
    for start in range(0, count, 10_000):
        vectors = clusters.draw(min(10_000, count - start), rng)
        best = np.maximum(best, (vectors @ queries.T).max(axis=0))
        for vector in vectors:
            began = time.thread_time()
            index.add(vector)
            inserts.append(time.thread_time() - began)
    gc.unfreeze()
    for query in queries[:200]:
        index.find(query)
    find_s, hits = cpu(lambda: [index.find(query) for query in queries])
    found = np.array([hit is not None for hit in hits])
    exact = best > 0.9
    figures = {
        "vectors": count,
        "find_us": find_s / len(queries) * 1e6,
        "exact_refusals": int(exact.sum()),
        "recall": float((found & exact).sum() / exact.sum()),
        "false_positives": int((found & ~exact).sum()),
        "bytes_of_memory_a_vector": index.nbytes / count,
        "insert_us": sum(inserts) / len(inserts) * 1e6,
        **slowest(inserts),
        "machine_worst_ms": worst_pause_s(sum(inserts)) * 1e3,
    }
    row(f"{count:,} vectors", **figures)
    return figures


def encoder(_texts: list[str], quick: bool) -> dict[str, Any]:
    """Texts a CPU second: sentence-transformers as it comes, and ours."""
    from sentence_transformers import SentenceTransformer

    texts = instructions(256 if quick else 768)
    theirs: Any = SentenceTransformer(default_model(), device="cpu")
    ours = SentenceEncoder()
    halved = SentenceEncoder(precision="bfloat16")
    options = {"show_progress_bar": False, "normalize_embeddings": True}
    ways: dict[str, Callable[[list[str]], Any]] = {
        "sentence_transformers": lambda some: theirs.encode(some, **options),
        "sentence_transformers_64": lambda some: theirs.encode(some, batch_size=64, **options),
        "ours": ours.encode,
        "ours_bfloat16": halved.encode,
    }
    figures: dict[str, Any] = {"runtime": ours.runtime}
    vectors: dict[str, Any] = {}
    for name, encode in ways.items():
        encode(texts[:32])
        seconds, vectors[name] = cpu(lambda: encode(texts))  # noqa: B023
        figures[name] = len(texts) / seconds
    for name in ("ours", "ours_bfloat16"):
        cosines = (vectors[name] * vectors["sentence_transformers"]).sum(axis=1)
        figures[f"least_cosine_{name}"] = float(cosines.min())
    row("texts a CPU second", **{k: v for k, v in figures.items() if k != "runtime"})
    return figures


SECTIONS: dict[str, Callable[[list[str], bool], dict[str, Any]]] = {
    "rouge": rouge,
    "chinese": chinese,
    "peers": peers,
    "stream": stream,
    "spread": spread,
    "semantic": semantic,
    "encoder": encoder,
}

if __name__ == "__main__":
    main()
