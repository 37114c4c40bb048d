"""distilabel: three tasks, each over what the one before it made."""

import json
import sys

from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import TextGeneration

ROWS, URL, FOLDER, IN_FLIGHT = sys.argv[1:]


def task(name, template, column, out):
    return TextGeneration(
        name=name,
        template=template,
        columns=[column],
        output_mappings={"generation": out, "model_name": f"{name}_model"},
        llm=OpenAILLM(
            model="toy",
            base_url=URL,
            api_key="none",
            generation_kwargs={"max_new_tokens": 256},
        ),
        input_batch_size=int(IN_FLIGHT),
        add_raw_output=False,
        add_raw_input=False,
    )


def main():
    with open(ROWS, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    with Pipeline(name="chain", cache_dir=FOLDER) as pipeline:
        load = LoadDataFromDicts(data=rows, batch_size=int(IN_FLIGHT))
        ask = task("ask", "Ask a hard question about: {{ topic }}", "topic", "question")
        answer = task("answer", "Answer: {{ question }}", "question", "answer")
        judge = task("judge", "Judge this answer: {{ answer }}", "answer", "verdict")
        load >> ask >> answer >> judge
    made = pipeline.run(use_cache=False)["default"]["train"]
    print(json.dumps({"rows": sum(row["verdict"] is not None for row in made)}))


if __name__ == "__main__":
    main()
