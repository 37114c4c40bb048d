"""distilabel: a pipeline of a task and a step that parses; a second run takes from its cache."""

import json
import sys

from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts, StepInput, step
from distilabel.steps.tasks import TextGeneration

ROWS, URL, FOLDER, IN_FLIGHT = sys.argv[1:]


@step(inputs=["generation"], outputs=["answer", "certainty"])
def parse(inputs: StepInput):
    for row in inputs:
        try:
            reply = json.loads(row["generation"])
            row["answer"], row["certainty"] = reply["answer"], reply["certainty"]
        except (TypeError, ValueError, KeyError):
            row["answer"] = row["certainty"] = None
    yield inputs


def main():
    with open(ROWS, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        row["instruction"] = (
            'Answer as JSON with the fields "answer" (text) and "certainty" (1 to 5).'
            f"\n\nQuestion: {row['question']}"
        )
    with Pipeline(name="answers", cache_dir=FOLDER) as pipeline:
        load = LoadDataFromDicts(data=rows, batch_size=int(IN_FLIGHT))
        ask = TextGeneration(
            llm=OpenAILLM(
                model="toy",
                base_url=URL,
                api_key="none",
                generation_kwargs={"max_new_tokens": 256},
            ),
            input_batch_size=int(IN_FLIGHT),
        )
        load >> ask >> parse()
    made = pipeline.run(use_cache=True)["default"]["train"]
    kept = sum(row["answer"] is not None for row in made)
    print(json.dumps({"rows": kept, "told_lost": len(made) - kept}))


if __name__ == "__main__":
    main()
