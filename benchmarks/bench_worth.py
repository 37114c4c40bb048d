"""What generated rows are worth: the same model and the same number of output tokens, four ways.

    python -m benchmarks.bench_worth [--folder runs/worth] [--tokens 12000] [--targets 1500]

    published    Alpaca's loop as published (benchmarks/worth/published.py)
    alpaca       Woolmill's recipe alpaca
    instruct     Woolmill's recipe self-instruct
    filtered     the rows of ``instruct`` again, with what repeats itself or another row taken out
    seeds        people's seed tasks, to train on
    untouched    the model as it is

Of each arm, for each of three seeds: rows and unique rows per 1,000 output tokens, pairs above a
cosine of 0.9, distinct verb-noun pairs, distinct trigrams, and the held-out loss of the model after
one pass over rows of ``--targets`` target tokens. Held out are seed tasks that no arm has seen.

The work comes in pieces (an arm's rows, or its training, for one seed), each of which is kept in
``--folder`` and not done again: run it as often as it takes. ``--pieces 3`` stops after three. The
table holds what is there so far.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

import engine
from benchmarks.worth import measures, published
from benchmarks.worth.measures import Row
from engine.dedup.encoder import SentenceEncoder
from engine.loop.people import apart
from engine.models import locate
from engine.recipes.seeds import as_lines, bundled_seeds, read_seeds
from engine.store import RunStore

MODEL = "smollm2"
SAMPLING = {"max_tokens": 192, "temperature": 0.85, "top_p": 0.9}
"""Of both Alpaca loops: at the published temperature of 1 this model loses the format."""
GENERATING = ("published", "alpaca", "instruct")
ARMS = (*GENERATING, "filtered", "seeds")
RECIPES = {"alpaca": "alpaca", "instruct": "self-instruct"}
HELD_OUT = 40
MOST_WORDS, LEAST_DISTINCT, CLOSE = 150, 0.5, 0.8
"""What ``filtered`` takes out: longer outputs, outputs of which fewer of the words differ, and rows
that are closer to an earlier one, by cosine.
"""
TRAINING = [
    *("--template", "chat", "--num_train_epochs", "1", "--global_batch_size", "4"),
    *("--per_device_train_batch_size", "1", "--model_max_length", "512"),
    *("--learning_rate", "2e-5", "--warmup_ratio", "0.1", "--save_strategy", "no"),
]


class Bench:
    """The pieces in ``folder``."""

    def __init__(self, folder: Path, tokens: int, targets: int) -> None:
        self.folder, self.tokens, self.targets = folder, tokens, targets
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"tokens": tokens, "targets": targets, "model": MODEL, "held_out": HELD_OUT}
        kept = folder / "settings.json"
        if kept.exists() and json.loads(kept.read_text()) != settings:
            sys.exit(f"{folder}: holds pieces of other settings ({kept.read_text()})")
        kept.write_text(json.dumps(settings))
        self.shown, held_out = apart(read_seeds(bundled_seeds()), HELD_OUT)
        (folder / "shown.jsonl").write_bytes(as_lines(self.shown))
        (folder / "held_out.jsonl").write_bytes(as_lines(held_out))

    def place(self, arm: str, seed: int, name: str) -> Path:
        path = self.folder / f"{arm}-{seed}" / name
        path.parent.mkdir(exist_ok=True)
        return path

    def pieces(self, seeds: int) -> Iterator[tuple[str, Path, Callable[[], Any]]]:
        """Every piece: what it is called, the file that says that it is done, and what makes it."""
        base = self.place("untouched", 0, "loss.json")
        yield "untouched: loss", base, self._untouched
        for seed in range(seeds):
            for arm in ARMS:
                rows = self.place(arm, seed, "rows.json")
                yield f"{arm} {seed}: rows", rows, lambda a=arm, s=seed: self._rows(a, s)
                loss = self.place(arm, seed, "loss.json")
                yield f"{arm} {seed}: training", loss, lambda a=arm, s=seed: self._loss(a, s)

    # -- rows -------------------------------------------------------------------------------------

    def _rows(self, arm: str, seed: int) -> dict[str, Any]:
        """The arm's rows in their order, and the output tokens that they took."""
        if arm == "seeds":
            rows = [
                {"instruction": t.instruction, "input": t.input, "output": t.output}
                for t in self.shown[seed:] + self.shown[:seed]
            ]
            return {"rows": rows, "tokens": None}
        if arm == "filtered":
            made = json.loads(self.place("instruct", seed, "rows.json").read_text())
            return {"rows": list(filtered(made["rows"])), "tokens": made["tokens"]}
        if arm == "published":
            path = self.place(arm, seed, "answers.jsonl")
            asyncio.run(published.answers(path, MODEL, self.shown, SAMPLING, seed, self.tokens))
            used = sum(answer["tokens"] for answer in published.kept(path))
            return {"rows": list(published.rows(path, self.shown)), "tokens": used}
        run = self.place(arm, seed, "run")
        settings: dict[str, Any] = {
            "target": 10**6,
            "seeds": self.folder / "shown.jsonl",
            "seed": seed,
            "backend": "transformers",
            "model": MODEL,
            "max_barren_requests": 10**6,
            "max_in_flight": 8,  # what is under way at the end is dropped, and was paid for
        }
        for _ in engine.generate(RECIPES[arm], out=run, decisions=True, **settings):
            if output_tokens(run) >= self.tokens:
                break
        with engine.open_run(run) as made:
            rows = [{k: str(row[k]) for k in ("instruction", "input", "output")} for row in made]
        return {"rows": rows, "tokens": output_tokens(run)}

    # -- training ---------------------------------------------------------------------------------

    def _loss(self, arm: str, seed: int) -> dict[str, Any]:
        """The held-out loss after one pass over rows of ``targets`` target tokens."""
        rows = json.loads(self.place(arm, seed, "rows.json").read_text())["rows"]
        chosen, targets = self._first_targets(rows)
        if not chosen:
            return {"loss": None, "rows": 0, "targets": 0}
        data, out = self.place(arm, seed, "train.json"), self.place(arm, seed, "model")
        data.write_text(json.dumps(chosen))
        more = ["--eval_data_path", str(self.folder / "held_out.jsonl"), "--seed", str(seed)]
        self._trainer("trainer", data, out, "--overwrite", *TRAINING, *more)
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
        for weights in out.glob("*.safetensors"):
            weights.unlink()
        return {"loss": losses[-1], "rows": len(chosen), "targets": targets}

    def _first_targets(self, rows: Sequence[Row]) -> tuple[list[Row], int]:
        """The first rows that have so many target tokens, the last of them perhaps cut off."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(locate(MODEL))
        chosen, targets = [], 0
        for row in rows:
            size = len(tokenizer(row["output"]).input_ids) + 1  # and the end of the turn
            if row["output"].strip() and targets + size <= self.targets:
                chosen.append(row)
                targets += size
        return chosen, targets

    def _untouched(self) -> dict[str, Any]:
        out = self.place("untouched", 0, "scores")
        flags = ["--template", "chat", "--model_max_length", "512"]
        self._trainer("trainer.evaluate", self.folder / "held_out.jsonl", out, *flags)
        return {"loss": json.loads((out / "loss.json").read_text())[0]["loss"]}

    def _trainer(self, program: str, data: Path, out: Path, *flags: str) -> None:
        command = [
            *(sys.executable, "-m", program, "--model_name_or_path", MODEL),
            *("--data_path", str(data), "--output_dir", str(out)),
            *("--dataset_cache_dir", str(self.folder / "cache"), *flags),
        ]
        with (out.parent / "training.log").open("w") as log:
            subprocess.run(command, stdout=log, stderr=log, env=os.environ, check=True)


def filtered(rows: Sequence[Row]) -> Iterator[Row]:
    """Rows whose output neither is long, nor repeats itself or its question, and which no earlier
    one is close to.
    """
    kept: list[NDArray[np.float32]] = []
    vectors = measures.unit_vectors(rows, SentenceEncoder()) if rows else []
    for row, vector in zip(rows, vectors, strict=True):
        words = row["output"].lower().split()
        if not 0 < len(words) <= MOST_WORDS or len(set(words)) < LEAST_DISTINCT * len(words):
            continue
        if row["output"].strip() in (row["instruction"].strip(), row["input"].strip()):
            continue
        if any(float(vector @ other) > CLOSE for other in kept):
            continue
        kept.append(vector)
        yield row


def output_tokens(run: Path) -> int:
    """Completion tokens of a run and its stages."""
    total = 0
    for store in run.rglob("run.sqlite"):
        with RunStore.read(store.parent) as stage:
            total += stage.counts().completion_tokens
    return total


def table(bench: Bench, seeds: int) -> dict[str, dict[str, list[float]]]:
    """The figures of each arm, for each seed that is there."""
    encoder = SentenceEncoder()
    figures: dict[str, dict[str, list[float]]] = {}
    everything: dict[tuple[str, int], Any] = {}
    for arm in ARMS:
        for seed in range(seeds):
            path = bench.place(arm, seed, "rows.json")
            if path.exists():
                everything[arm, seed] = json.loads(path.read_text())
    sizes = [measures.words_in(made["rows"]) for made in everything.values()]
    words = min(sizes, default=0)
    for (arm, seed), made in everything.items():
        rows, tokens = made["rows"], made["tokens"]
        alike = measures.alike(rows, encoder)
        told = {
            "rows": len(rows),
            "pairs above 0.9": alike["pairs"],
            "verb-noun pairs": measures.verb_pairs(rows),
            f"distinct-3 of {words} words": measures.distinct_3(rows, words),
        }
        if tokens:
            told |= {
                "rows per 1,000 tokens": 1000 * len(rows) / tokens,
                "unique per 1,000 tokens": 1000 * alike["unique"] / tokens,
            }
        loss = bench.place(arm, seed, "loss.json")
        if loss.exists():
            trained = json.loads(loss.read_text())
            told |= {"target tokens": trained["targets"], "held-out loss": trained["loss"]}
        for name, value in told.items():
            if value is not None:
                figures.setdefault(arm, {}).setdefault(name, []).append(value)
    base = bench.place("untouched", 0, "loss.json")
    if base.exists():
        figures["untouched"] = {"held-out loss": [json.loads(base.read_text())["loss"]]}
    return figures


def show(figures: dict[str, dict[str, list[float]]]) -> None:
    names = list(dict.fromkeys(name for told in figures.values() for name in told))
    print(f"| {' | '.join(['', *names])} |\n|{'---|' * (len(names) + 1)}")
    for arm, told in figures.items():
        print(f"| {' | '.join([arm, *(_cell(told.get(name, [])) for name in names)])} |")


def _cell(values: Sequence[float]) -> str:
    """The mean, and the least and the greatest of several."""
    if not values:
        return ""
    spread = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
    return f"{mean(values):.4g}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/worth"))
    parser.add_argument("--tokens", type=int, default=12_000, help="output tokens of an arm")
    parser.add_argument("--targets", type=int, default=1_500, help="target tokens trained on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pieces", type=int, default=10**6, help="do so many, then stop")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    bench = Bench(args.folder, args.tokens, args.targets)
    done, left = 0, 0
    for name, path, make in bench.pieces(args.seeds):
        if path.exists():
            continue
        if done == args.pieces:
            left += 1
            continue
        print(name, file=sys.stderr, flush=True)
        made = json.dumps(make())
        temporary = path.with_suffix(".part")
        temporary.write_text(made)
        temporary.replace(path)
        done += 1
    figures = table(bench, args.seeds)
    show(figures)
    print(json.dumps({"bench": "worth", "left": left, "tokens": args.tokens, **figures}))


if __name__ == "__main__":
    main()
