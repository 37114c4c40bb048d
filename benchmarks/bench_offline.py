"""Offline backends on the same Alpaca prompts and the same real model: output tokens a second.

    python -m benchmarks.bench_offline [--prompts 64] [--max-tokens 128]
                                       [--vllm-python .venv-vllm/bin/python] [--only NAME,NAME]

* ``generate-8`` and ``generate-16``: transformers' ``model.generate``, one batch after another.
* ``transformers``: our in-process backend.
* ``llm-generate``: ``vllm.LLM.generate`` on all prompts at once.
* ``vllm``: our backend with vLLM in a child process.
* ``http``: our HTTP backend to a vLLM server that ``engine.backends.vllm.servers`` starts.

Loading is not measured; each is warmed up with one short prompt. Prompts are sampled from the
bundled seeds, answers at temperature 1 without the end-of-text token, so that all have the same
work. ``first`` and ``last`` are when the first and the last answer could have been saved. ``cpu``
is the processor time of this process, which other work on the machine disturbs less than seconds;
for vLLM it is not known. All run in single precision.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine import models
from engine.backends.base import Backend
from engine.prompts.fit import Prompts
from engine.recipes.alpaca import Alpaca, Seeded
from engine.recipes.seeds import bundled_seeds, read_seeds
from engine.records import Completion, Prompt, Sampling

MODEL = "smollm2"
VLLM_ARGUMENTS = {"dtype": "float32", "max_model_len": 4096, "max_num_seqs": 64}


@dataclass(frozen=True, slots=True)
class Run:
    """One contender's figures."""

    tokens: int
    seconds: float
    first_s: float
    last_s: float
    cpu_s: float | None = None

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def make_prompts(count: int, max_tokens: int) -> list[Prompt]:
    """The first ``count`` prompts of a run with seed 0."""
    recipe = Alpaca(Seeded(tasks=read_seeds(bundled_seeds())))
    sampling = {"max_tokens": max_tokens, "temperature": 1.0, "top_p": 1.0}
    made = Prompts(recipe, seed=0, api="completions", sampling=sampling)
    return [prompt for index in range(count) if (prompt := made.prompt(index)) is not None]


def run_generate(prompts: Sequence[Prompt], batch_size: int) -> Run:
    """``model.generate`` in padded batches, as its documentation shows it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = models.locate(MODEL)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    eos = model.generation_config.eos_token_id

    def generate(batch: Sequence[Prompt], max_tokens: int) -> int:
        inputs = tokenizer([prompt.text for prompt in batch], return_tensors="pt", padding=True)
        out = model.generate(
            **inputs,
            do_sample=True,
            top_k=0,
            max_new_tokens=max_tokens,
            suppress_tokens=[eos],
            stop_strings=list(batch[0].sampling.stop),
            tokenizer=tokenizer,
        )
        # What follows a stop string is padding, and the end-of-text token is never chosen.
        return int((out[:, inputs.input_ids.shape[1] :] != tokenizer.pad_token_id).sum())

    torch.manual_seed(0)
    with torch.inference_mode():
        generate(prompts[:1], 2)
        tokens, first_s = 0, 0.0
        began, cpu = time.monotonic(), time.process_time()
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            tokens += generate(batch, batch[0].sampling.max_tokens)
            first_s = first_s or time.monotonic() - began
    seconds = time.monotonic() - began
    return Run(tokens, seconds, first_s, seconds, time.process_time() - cpu)


async def run_backend(backend: Backend, prompts: Sequence[Prompt], in_flight: int) -> Run:
    """A backend of ours, fed as the pipeline does: one prompt a call, so many calls at once."""
    await backend.start()
    try:
        await backend.complete(
            [Prompt(index=0, text="Hello", api="completions", sampling=Sampling(max_tokens=2))]
        )
        places = asyncio.Semaphore(in_flight)
        saved: list[float] = []
        began, cpu = time.monotonic(), time.process_time()

        async def answer(prompt: Prompt) -> int:
            async with places:
                [completion] = await backend.complete([prompt])
            if not isinstance(completion, Completion):
                raise completion
            saved.append(time.monotonic() - began)
            return completion.usage.completion_tokens

        tokens = sum(await asyncio.gather(*map(answer, prompts)))
        return Run(
            tokens, time.monotonic() - began, min(saved), max(saved), time.process_time() - cpu
        )
    finally:
        await backend.aclose()


def run_transformers(prompts: Sequence[Prompt], rows: int | None) -> Run:
    """Our in-process backend."""
    from engine.backends.local.backend import TransformersBackend

    backend = TransformersBackend(MODEL, max_in_flight=rows)
    return asyncio.run(run_backend(backend, prompts, backend.max_in_flight or 1))


def run_vllm(prompts: Sequence[Prompt], python: Path) -> Run:
    """Our backend with vLLM in a child process."""
    from engine.backends.vllm.backend import VllmBackend

    args = {name: str(value) for name, value in VLLM_ARGUMENTS.items()}
    in_flight = int(args.pop("max_num_seqs"))
    backend = VllmBackend(MODEL, python=python, args=args, max_in_flight=in_flight)
    run = asyncio.run(run_backend(backend, prompts, in_flight))
    return Run(run.tokens, run.seconds, run.first_s, run.last_s)


def run_http(prompts: Sequence[Prompt], python: Path) -> Run:
    """Our HTTP backend and a server."""
    from engine.backends.openai.backend import HttpBackend
    from engine.backends.vllm.servers import serving

    args = {name: str(value) for name, value in VLLM_ARGUMENTS.items()}
    with serving(MODEL, python=python, args=args) as [server]:
        backend = HttpBackend(server.base_url, MODEL)
        run = asyncio.run(run_backend(backend, prompts, int(args["max_num_seqs"])))
    return Run(run.tokens, run.seconds, run.first_s, run.last_s)


def run_llm_generate(prompts: Sequence[Prompt], python: Path) -> Run:
    """vLLM's own offline API."""
    from engine.backends.vllm.arguments import child_environment, engine_arguments

    job = {
        "prompts": [prompt.text for prompt in prompts],
        "model": models.locate(MODEL),
        "arguments": engine_arguments({n: str(v) for n, v in VLLM_ARGUMENTS.items()}),
        "max_tokens": prompts[0].sampling.max_tokens,
        "stop": list(prompts[0].sampling.stop),
    }
    program = Path(__file__).with_name("vllm_batch.py")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run(
            [str(python), "-P", str(program), str(result)],
            input=json.dumps(job),
            text=True,
            capture_output=True,
            env=child_environment(),
            check=False,
        )
        if not result.exists():
            raise SystemExit(f"llm-generate failed:\n{done.stderr[-2000:]}")
        figures = json.loads(result.read_text())
    seconds = figures["seconds"]
    return Run(figures["tokens"], seconds, seconds, seconds)


def main() -> None:
    """Run the contenders one after another and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, help="of the transformers backend")
    parser.add_argument("--vllm-python", type=Path, help="without: the first three only")
    parser.add_argument("--only", help="names, separated by commas")
    options = parser.parse_args()

    contenders: dict[str, Any] = {
        "generate-8": lambda p: run_generate(p, 8),
        "generate-16": lambda p: run_generate(p, 16),
        "transformers": lambda p: run_transformers(p, options.rows),
    }
    if (python := options.vllm_python) is not None:
        contenders |= {
            "llm-generate": lambda p: run_llm_generate(p, python),
            "vllm": lambda p: run_vllm(p, python),
            "http": lambda p: run_http(p, python),
        }
    chosen = options.only.split(",") if options.only else list(contenders)
    prompts = make_prompts(options.prompts, options.max_tokens)
    words = statistics.mean(len(prompt.text.split()) for prompt in prompts)
    print(
        f"{len(prompts)} Alpaca prompts of {words:.0f} words on average, at most "
        f"{options.max_tokens} tokens each; {MODEL}, {os.cpu_count()} cores, {platform.machine()}"
    )
    print(f"{'':14}{'tokens':>8}{'seconds':>9}{'tokens/s':>10}{'cpu':>8}{'first':>8}{'last':>8}")
    runs: dict[str, Run] = {}
    for name in chosen:
        run = runs[name] = contenders[name](prompts)
        cpu = f"{run.cpu_s:8.1f}" if run.cpu_s is not None else f"{'':8}"
        print(
            f"{name:14}{run.tokens:8}{run.seconds:9.1f}{run.tokens_per_s:10.1f}{cpu}"
            f"{run.first_s:8.1f}{run.last_s:8.1f}",
            flush=True,
        )
    print(json.dumps({name: asdict(run) | ratios(name, runs) for name, run in runs.items()}))


def ratios(name: str, runs: dict[str, Run]) -> dict[str, float]:
    """How the contender compares with the best of those it is measured against."""
    rivals = {
        "transformers": ["generate-8", "generate-16"],
        "vllm": ["llm-generate"],
        "http": ["llm-generate"],
    }
    best = [runs[rival].tokens_per_s for rival in rivals.get(name, []) if rival in runs]
    figures = {"tokens_per_s": runs[name].tokens_per_s}
    return figures | ({"ratio": runs[name].tokens_per_s / max(best)} if best else {})


if __name__ == "__main__":
    main()
