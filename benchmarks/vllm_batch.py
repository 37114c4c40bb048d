"""``vllm.LLM.generate`` on all prompts at once: what the offline API that vLLM documents does.

Run by ``bench_offline`` under the interpreter that has vLLM: reads a JSON object from stdin
(``prompts``, ``model``, ``arguments``, ``max_tokens``, ``stop``), writes one to the file named.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Load, warm up with one prompt, measure."""
    from vllm import LLM, SamplingParams

    job = json.load(sys.stdin)
    llm = LLM(model=job["model"], **job["arguments"])
    sampling = [
        SamplingParams(max_tokens=job["max_tokens"], stop=job["stop"], seed=seed, ignore_eos=True)
        for seed in range(len(job["prompts"]))
    ]
    llm.generate(["Hello"], SamplingParams(max_tokens=2), use_tqdm=False)
    began = time.monotonic()
    answers = llm.generate(job["prompts"], sampling, use_tqdm=False)
    seconds = time.monotonic() - began
    tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
    Path(sys.argv[1]).write_text(json.dumps({"seconds": seconds, "tokens": tokens}))


if __name__ == "__main__":
    main()
