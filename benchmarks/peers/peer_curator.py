"""bespokelabs-curator: a class of two methods.

The answer is parsed by hand: a response format is refused for a model whose name it does not know.
It counts tokens with tiktoken, whose table litellm brings along.
"""

import json
import os
import sys
from pathlib import Path

from bespokelabs import curator
from datasets import Dataset
from litellm import litellm_core_utils

ROWS, URL, FOLDER, IN_FLIGHT = sys.argv[1:]


class Answers(curator.LLM):
    def prompt(self, row):
        return (
            'Answer as JSON with the fields "answer" (text) and "certainty" (1 to 5).'
            f"\n\nQuestion: {row['question']}"
        )

    def parse(self, row, reply):
        try:
            reply = json.loads(reply)
            return {
                "number": row["number"],
                "answer": reply["answer"],
                "certainty": reply["certainty"],
            }
        except (ValueError, KeyError):
            return {"number": row["number"], "answer": None, "certainty": None}


def main():
    tables = Path(litellm_core_utils.__path__[0], "tokenizers")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(tables)
    with open(ROWS, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    answers = Answers(
        model_name="toy",
        backend="openai",
        generation_params={"max_tokens": 256},
        backend_params={
            "base_url": URL,
            "api_key": "none",
            "max_concurrent_requests": int(IN_FLIGHT),
            "max_requests_per_minute": 10_000_000,
            "max_tokens_per_minute": 10_000_000_000,
            "require_all_responses": False,
        },
    )
    made = answers(Dataset.from_list(rows), working_dir=FOLDER).dataset
    kept = sum(row["answer"] is not None for row in made)
    print(json.dumps({"rows": kept, "told_lost": len(made) - kept}))


if __name__ == "__main__":
    main()
