"""Woolmill: three stages in TOML over the rows of a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import engine

RECIPE = """
[recipe]
name = "chain"
version = "1"

[[stage]]
name = "ask"
user = "Ask a hard question about: {{ topic }}"
give = { question = "{{ text }}" }

[[stage]]
name = "answer"
user = "Answer: {{ question }}"
give = { question = "{{ question }}", answer = "{{ text }}" }

[[stage]]
name = "judge"
user = "Judge this answer: {{ answer }}"
give = { question = "{{ question }}", answer = "{{ answer }}", verdict = "{{ text }}" }
"""


def main() -> None:
    rows, url, folder, in_flight = sys.argv[1:]
    recipe = Path(folder, "chain.toml")
    recipe.write_text(RECIPE)
    made = engine.generate(
        str(recipe),
        rows=rows,
        out=Path(folder, "run"),
        base_url=url,
        model="toy",
        max_in_flight=int(in_flight),
        max_tokens=256,
        semantic=False,
    )
    print(json.dumps({"rows": sum(1 for _ in made)}))


if __name__ == "__main__":
    main()
