"""The trainer beside the ordinary ways to fine-tune the same model on the same records.

Same records, same real model (SmolLM2-135M), same number of optimizer steps, one thread; each way
in a process of its own, one after the other. Counted are CPU seconds of the training loop alone (no
import, load, tokenising or export) and that process's peak resident memory. Tokens are those of the
records: padding does not count, whoever computes it.

On a processor a batch buys nothing and costs padding, so that the best ordinary way is one record
at a time. Ours is compared with the best of these, whichever that is in this run:

    hf_1          transformers' Trainer, Alpaca's dataset, one record at a time
    hf_flattened  transformers' Trainer with DataCollatorWithFlattening, 4 at a time in one row
    hf_8          transformers' Trainer, padded, 8 at a time: its default
    trl_1         TRL's SFTTrainer, one record at a time
    trl_packed    TRL's SFTTrainer, packing=True, rows of 512
    ours_512      this trainer, packed in rows of 512
    ours_2048     this trainer, packed in rows of 2,048

each also with _bf16 behind its name. With --processes 2 every way runs under torchrun, and CPU
seconds are rank 0's times two.

    python -m benchmarks.bench_trainer [--model DIR] [--steps 1] [--records 16] [--processes 1]
        [--only hf_1,ours_512]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MAX_LENGTH = 512
PEERS = {"hf_1": 1, "hf_flattened": 4, "hf_8": 8, "trl_1": 1, "trl_packed": 1}
"""The ordinary ways, and how many records each takes at a time."""
OURS = ("ours_512", "ours_2048")
VARIANTS = tuple(f"{name}{kind}" for kind in ("", "_bf16") for name in (*PEERS, *OURS))
DEFAULT_MODEL = (
    Path(os.environ.get("WOOLMILL_HOME", "~/.cache/woolmill")).expanduser() / "models" / "smollm2"
)
SEEDS = Path(__file__).resolve().parent.parent / "engine" / "data" / "seed_tasks.jsonl"
LEARNING_RATE = 2e-5
FIGURES = "figures: "


def records(count: int) -> list[dict[str, str]]:
    """``count`` records of mixed length, from the bundled seed tasks.

    Seed tasks are shorter than what models write: a third of the records get a second task's text
    as their input, and a tenth three, so that lengths spread to 512 as in a generated dataset.
    """
    tasks = [json.loads(line) for line in SEEDS.read_text(encoding="utf-8").splitlines()]
    texts = [f"{t['instruction']}\n{t['instances'][0]['output']}" for t in tasks]
    rows = []
    for index in range(count):
        task = tasks[index * 7 % len(tasks)]
        first = task["instances"][0]
        more = 3 if index % 10 == 3 else index % 3 == 1
        borrowed = [texts[(index * 11 + k + 1) % len(texts)] for k in range(int(more))]
        body = "\n\n".join(filter(None, [first["input"], *borrowed]))
        rows.append({"instruction": task["instruction"], "input": body, "output": first["output"]})
    return rows


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def ours(name: str, model: Path, data: Path, steps: int, per_step: int) -> dict[str, float]:
    """The real command, and what it wrote to metrics.jsonl."""
    from trainer.train import main

    row = int(name.removesuffix("_bf16").rpartition("_")[2])
    out = data.parent / f"{name}.out"
    code = main(
        f"--model_name_or_path {model} --data_path {data} --output_dir {out} --overwrite"
        f" --dataset_cache_dir {data.parent}/cache --max_steps {steps} --save_strategy no"
        f" --per_device_train_batch_size {row // MAX_LENGTH} --model_max_length {MAX_LENGTH}"
        f" --global_batch_size {per_step} --learning_rate {LEARNING_RATE}"
        f" --bf16 {name.endswith('_bf16')} --lr_scheduler_type constant --too_long truncate".split()
    )
    assert code == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {"cpu_s": sum(r["cpu_s"] for r in rows), "peak_mib": rows[-1]["peak_memory_mib"]}


def peers(name: str, model: Path, data: Path, steps: int, per_step: int) -> dict[str, float]:
    """transformers' and TRL's trainers, timed from their first step to their last."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorWithFlattening,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from trainer import DataCollatorForSupervisedDataset, SupervisedDataset

    result: dict[str, float] = {}

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            result["cpu_s"] = -time.process_time()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            result["cpu_s"] += time.process_time()
            result["peak_mib"] = peak_mib()

    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model, model_max_length=MAX_LENGTH)
    way, half = name.removesuffix("_bf16"), name.endswith("_bf16")
    per_device = PEERS[way]
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": steps,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": per_device,
            "gradient_accumulation_steps": max(1, per_step // per_device // world()),
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": half,
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
        }
        if way.startswith("trl"):
            trainer = _trl(way, hf, tokenizer, data, steps, options, Clock())
        else:
            dataset: Any = SupervisedDataset(data, tokenizer)
            collator: Any = DataCollatorForSupervisedDataset(tokenizer)
            if way == "hf_flattened":
                dataset = [
                    {name: row[name].tolist() for name in ("input_ids", "labels")}
                    for row in (dataset[i] for i in range(len(dataset)))
                ]
                collator = DataCollatorWithFlattening()
            trainer = Trainer(
                model=hf,
                args=TrainingArguments(**options),
                train_dataset=dataset,
                data_collator=collator,
                callbacks=[Clock()],
            )
        trainer.train()
    return result


def _trl(
    variant: str,
    hf: Any,
    tokenizer: Any,
    data: Path,
    steps: int,
    options: dict[str, Any],
    clock: Any,
) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from trainer.template import alpaca_prompt

    rows = json.loads(data.read_text())
    dataset = Dataset.from_list(
        [
            {"prompt": alpaca_prompt(r["instruction"], r["input"]), "completion": r["output"]}
            for r in rows
        ]
    )
    if variant == "trl_packed":
        options |= {"packing": True, "per_device_train_batch_size": 1}
    config = SFTConfig(**options, max_length=MAX_LENGTH, completion_only_loss=True)
    trainer = SFTTrainer(
        model=hf, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[clock]
    )
    if variant == "trl_packed":
        # As many packs a step as give the wanted number of steps for one epoch.
        config.gradient_accumulation_steps = -(-len(trainer.train_dataset) // steps)
        trainer = SFTTrainer(
            model=hf,
            args=config,
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[clock],
        )
    return trainer


def loss_head(positions: int = 2048, labelled: float = 0.3) -> dict[str, float]:
    """Output head and loss alone, forward and backward: seconds, and MiB above the inputs."""
    import threading

    import torch

    from trainer.loss import summed_cross_entropy

    torch.manual_seed(0)
    hidden = torch.randn(positions, 576, requires_grad=True)
    weight = torch.randn(49152, 576, requires_grad=True)
    targets = torch.randint(0, 49152, (positions,))
    chosen = torch.arange(positions)[: int(positions * labelled)]
    labels = torch.full_like(targets, -100)
    labels[chosen] = targets[chosen]

    def full() -> None:
        logits = torch.nn.functional.linear(hidden, weight).float()
        torch.nn.functional.cross_entropy(logits, labels).backward()

    def chunks() -> None:
        loss = summed_cross_entropy(hidden[chosen], weight, None, targets[chosen])
        (loss / len(chosen)).backward()

    def resident() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def peak_of(action: Any) -> float:
        before, highest, done = resident(), [0.0], threading.Event()

        def watch() -> None:
            while not done.wait(0.002):
                highest[0] = max(highest[0], resident())

        thread = threading.Thread(target=watch)
        thread.start()
        action()
        done.set()
        thread.join()
        return highest[0] - before

    figures: dict[str, float] = {}
    for name, action in ("chunks", chunks), ("full", full):
        hidden.grad = weight.grad = None
        figures[f"{name}_mib"] = peak_of(action)
        times = []
        for _ in range(3):
            hidden.grad = weight.grad = None
            start = time.process_time()
            action()
            times.append(time.process_time() - start)
        figures[f"{name}_cpu_s"] = min(times)
    return figures


def in_a_process(name: str, arguments: argparse.Namespace, data: Path) -> dict[str, float]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m"]
    if arguments.processes > 1 and name != "loss_head":
        launch = f"torch.distributed.run --standalone --nproc_per_node {arguments.processes} -m"
        command += launch.split()
    command += ["benchmarks.bench_trainer", "--variant", name]
    command += ["--model", str(arguments.model), "--data", str(data)]
    command += ["--steps", str(arguments.steps), "--records", str(arguments.records)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(FIGURES)]
    figures: dict[str, float] = json.loads(line.removeprefix(FIGURES))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--records", type=int, default=16, help="of one optimizer step")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", help="comma-separated variants")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        measure(arguments.variant, arguments)
        return

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "records.json"
        rows = records(arguments.steps * arguments.records)
        data.write_text(json.dumps(rows))
        tokens, learned = count_tokens(arguments.model, data)
        names = arguments.only.split(",") if arguments.only else VARIANTS
        print(
            f"{len(rows)} records, {tokens:,} tokens, {learned:,} of them learned;"
            f" {arguments.steps} optimizer steps, {arguments.processes} processes"
        )
        results = {}
        for name in names:
            results[name] = figures = in_a_process(name, arguments, data)
            figures["cpu_s"] *= arguments.processes
            figures["tokens_per_cpu_s"] = tokens / figures["cpu_s"]
            print(
                f"{name:<20}{figures['tokens_per_cpu_s']:>9.1f} tokens/CPU-s"
                f"{figures['cpu_s']:>9.1f} CPU-s{figures['peak_mib']:>9,.0f} MiB",
                flush=True,
            )
        head = in_a_process("loss_head", arguments, data)
    print(
        f"loss head     full logits {head['full_cpu_s']:.2f} CPU-s {head['full_mib']:,.0f} MiB;"
        f" labelled in chunks {head['chunks_cpu_s']:.2f} CPU-s {head['chunks_mib']:,.0f} MiB"
    )
    print(json.dumps({"bench": "trainer", "loss_head": head, **results} | ratios(results, head)))


def measure(name: str, arguments: argparse.Namespace) -> None:
    """One way, in this process; its figures are a line of the output."""
    if name == "loss_head":
        figures = loss_head()
    else:
        way = ours if name.startswith("ours") else peers
        figures = way(name, arguments.model, arguments.data, arguments.steps, arguments.records)
    if os.environ.get("RANK", "0") == "0":
        print(f"{FIGURES}{json.dumps(figures)}", flush=True)


def count_tokens(model: Path, data: Path) -> tuple[int, int]:
    """All tokens of the records, and those that are learned."""
    from transformers import AutoTokenizer

    from trainer.config import DataSettings
    from trainer.records import read_examples
    from trainer.tokens import Tokenised, tokenise

    settings = DataSettings(data_path=(data,), model_max_length=MAX_LENGTH, too_long="truncate")
    tokenizer = AutoTokenizer.from_pretrained(model)
    kept = [
        row
        for row in tokenise(read_examples(data), tokenizer, settings)
        if isinstance(row, Tokenised)
    ]
    return sum(len(row.ids) for row in kept), sum(int(row.learned.sum()) for row in kept)


def ratios(
    results: dict[str, dict[str, float]], head: dict[str, float]
) -> dict[str, dict[str, float | str]]:
    """Ours beside the best ordinary way of this run: how many times as fast, at what share of its
    memory; in each type.
    """
    out: dict[str, float | str] = {
        "loss_head_faster": head["full_cpu_s"] / head["chunks_cpu_s"],
        "loss_head_smaller": head["full_mib"] / head["chunks_mib"],
    }
    for kind in ("", "_bf16"):
        rivals = [f"{name}{kind}" for name in PEERS if f"{name}{kind}" in results]
        if not rivals:
            continue
        best = min(rivals, key=lambda name: results[name]["cpu_s"])
        out[f"best_ordinary{kind}"] = best
        for name in OURS:
            if f"{name}{kind}" in results:
                mine = results[f"{name}{kind}"]
                out[f"{name}{kind}_faster"] = results[best]["cpu_s"] / mine["cpu_s"]
                out[f"{name}{kind}_memory"] = mine["peak_mib"] / results[best]["peak_mib"]
    return {"ratios": out}


if __name__ == "__main__":
    main()
