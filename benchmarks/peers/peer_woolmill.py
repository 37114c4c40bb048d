"""Woolmill: a recipe in TOML, rows from Python."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import engine

RECIPE = '''
[recipe]
name = "answers"
version = "1"

[[stage]]
name = "answer"
user = """Answer as JSON with the fields "answer" (text) and "certainty" (1 to 5).

Question: {{ question }}"""
give = { number = "{{ number }}", answer = "{{ answer }}", certainty = "{{ certainty }}" }

[stage.answer]
format = "json"
schema.type = "object"
schema.properties.answer.type = "string"
schema.properties.certainty.type = "integer"
schema.required = ["answer", "certainty"]
'''


def main() -> None:
    rows, url, folder, in_flight = sys.argv[1:]
    recipe = Path(folder, "answers.toml")
    recipe.write_text(RECIPE)
    kept = lost = 0
    for decision in engine.generate(
        str(recipe),
        rows=rows,
        out=Path(folder, "run"),
        base_url=url,
        model="toy",
        max_in_flight=int(in_flight),
        decisions=True,
        semantic=False,
    ):
        kept += decision.accepted
        lost += not decision.accepted
    print(json.dumps({"rows": kept, "told_lost": lost}))


if __name__ == "__main__":
    main()
