"""datatrove: a rollout function, with checkpoints and its cache of requests."""

import json
import sys
from pathlib import Path

from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
from datatrove.pipeline.writers import JsonlWriter

ROWS, URL, FOLDER, IN_FLIGHT = sys.argv[1:]


def documents():
    with open(ROWS, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            yield Document(text=row["question"], id=str(row["number"]))


async def answer(document, generate):
    prompt = (
        'Answer as JSON with the fields "answer" (text) and "certainty" (1 to 5).'
        f"\n\nQuestion: {document.text}"
    )
    result = await generate({"messages": [{"role": "user", "content": prompt}], "max_tokens": 256})
    try:
        reply = json.loads(result.text)
        return {"answer": reply["answer"], "certainty": reply["certainty"]}
    except (TypeError, ValueError, KeyError):
        return None


def main():
    made = Path(FOLDER, "made")
    runner = InferenceRunner(
        rollout_fn=answer,
        config=InferenceConfig(
            server_type="endpoint",
            endpoint_url=URL.removesuffix("/v1"),
            model_name_or_path="toy",
            max_concurrent_generations=int(IN_FLIGHT),
        ),
        output_writer=JsonlWriter(
            str(made), output_filename="${rank}_${chunk_index}.jsonl", compression=None
        ),
        checkpoints_local_dir=str(Path(FOLDER, "checkpoints")),
        records_per_chunk=500,
    )
    LocalPipelineExecutor(
        pipeline=[list(documents()), runner], logging_dir=str(Path(FOLDER, "logs")), tasks=1
    ).run()
    rows = [
        json.loads(line) for file in made.glob("*.jsonl") for line in file.read_text().splitlines()
    ]
    kept = sum(bool(row["metadata"].get("rollout_results")) for row in rows)
    print(json.dumps({"rows": kept, "told_lost": len(rows) - kept}))


if __name__ == "__main__":
    main()
