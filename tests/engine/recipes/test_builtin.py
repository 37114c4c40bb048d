"""The recipes that ship as files: what they ask, what they take of an answer, and a run of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.prompts.fit import Prompts, join
from engine.recipes.base import Ask, Piece, Recipe
from engine.recipes.guard import RecipeFault, parsed
from engine.recipes.load import CODED, load_recipe
from engine.recipes.template import Template, builtin_templates
from engine.records import Completion, Usage
from engine.run.display import SilentDisplay
from engine.run.generate import generate
from engine.settings import RunConfig
from engine.store import RunStore

pytestmark = pytest.mark.slow

DOCUMENT = (
    "The lighthouse of Alexandria was built in the third century before our era, on an island in "
    "front of the harbour. It stood for some sixteen hundred years, until earthquakes broke it "
    "down, and its fire could be seen from thirty miles out at sea."
)
STYLES = {
    *("easy", "medium", "hard", "qa", "math", "table", "faq", "tutorial"),
    *("diverse_qa", "distill", "extract", "knowledge_list", "wikipedia"),
}
LABELS = {
    "instruction": "User prompt:",
    "knowledge": "Title:",
    "npc": "Name:",
    "math": "Math problem:",
}
PERSONA = {"persona": "A nurse in Oslo who mends old radios."}


def recipe(name: str, **options: Any) -> Recipe:
    return load_recipe(name, None, options)  # type: ignore[arg-type]


def asked(name: str, row: dict[str, Any], **options: Any) -> tuple[str, str]:
    """The system's words and the user's."""
    _, turns = join(recipe(name, **options).prompt(Ask(index=0, row=row)))
    system, user = turns
    assert (system.role, user.role) == ("system", "user")
    return system.content, user.content


def found(
    name: str, row: dict[str, Any], text: str, finish: str = "stop", **options: Any
) -> list[Piece]:
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    answer = Completion(text=text, finish_reason=finish, usage=usage, api="chat")
    return parsed(recipe(name, **options), Ask(index=0, row=row), answer)


def reasons(pieces: list[Piece]) -> list[str | None]:
    return [piece.refusal and piece.refusal[0] for piece in pieces]


@pytest.mark.parametrize("name", sorted(builtin_templates()))
def test_a_file_names_its_source_and_what_it_leaves(name: str) -> None:
    """Paper, code, licence and departures stand at its head."""
    head = builtin_templates()[name].read_text(encoding="utf-8").split("[recipe]")[0]
    for word in ("arXiv", "code", "Departures", "own words"):
        assert word in head, word
    made = recipe(name)
    assert isinstance(made, Template)
    assert made.name == name
    assert made.needs_rows
    assert made.file.recipe.description
    assert name not in CODED


def test_each_style_of_rephrase_asks_for_something_else() -> None:
    prompts = {style: asked("rephrase", {"text": DOCUMENT}, style=style)[1] for style in STYLES}
    assert len(set(prompts.values())) == len(STYLES)
    assert all(prompt.endswith(f"Text:\n{DOCUMENT}") for prompt in prompts.values())
    assert not any(prompt.startswith((" ", "\n")) for prompt in prompts.values())


def test_the_field_of_a_row_is_an_option() -> None:
    """Rows of any origin can be taken without renaming their columns."""
    for name, text in [
        ("rephrase", "Long ago a tower stood there. " * 5),
        ("backtranslate", "<instruction>Tell it as it was.</instruction>"),
        ("persona", "User prompt: How do I mend a radio?"),
    ]:
        row = {"content": DOCUMENT}
        assert DOCUMENT in asked(name, row, field="content")[1]
        (piece,) = found(name, row, text, field="content")
        assert piece.refusal is None
        assert DOCUMENT in (piece.record or {}).values()


def test_a_row_without_its_field_is_told_of() -> None:
    with pytest.raises(RecipeFault, match=r"stage\.user: .* 'text'"):
        asked("rephrase", {"content": DOCUMENT})


def test_a_document_that_is_too_long_is_shortened() -> None:
    row = {"text": " ".join(f"word{n}" for n in range(20_000))}
    prompts = Prompts(
        recipe("rephrase"),
        seed=0,
        api="chat",
        sampling={"max_tokens": 256, "temperature": 1.0, "top_p": 1.0},
        context_length=4096,
        rows=_Rows(row),
    )
    prompt = prompts.prompt(0)
    assert prompt is not None
    assert prompt.truncated
    assert (prompt.tokens or 0) + prompt.sampling.max_tokens <= 4096
    assert "word0 word1" in prompt.messages[1].content
    assert "in the clear, even English" in prompt.messages[1].content


class _Rows:
    def __init__(self, row: dict[str, Any]) -> None:
        self._only = row

    def row(self, number: int) -> dict[str, Any] | None:
        return self._only if number == 0 else None


BODY = "A tower of light stood off Alexandria. " * 4


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        (BODY, BODY.strip()),
        (f"Here is the text rewritten for children:\n\n{BODY}", BODY.strip()),
        (f"Sure! Here's a simple version:\n{BODY}", BODY.strip()),
        (f"Certainly:\n{BODY}", BODY.strip()),
        (f"\n\n{BODY}\n", BODY.strip()),
        (f"Here: a list\n{BODY}", f"Here: a list\n{BODY.strip()}"),
        (f"# The tower\n\n{BODY}", f"# The tower\n\n{BODY.strip()}"),
    ],
)
def test_what_a_model_says_before_a_text_is_taken_off(text: str, taken: str) -> None:
    (piece,) = found("rephrase", {"text": DOCUMENT}, text, style="easy")
    assert piece.refusal is None
    assert piece.record == {"text": taken, "style": "easy", "original": DOCUMENT}


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ("Too short.", "stop", "too_short"),
        (DOCUMENT.replace(" ", "\n"), "stop", "unchanged"),
        (BODY, "length", "cut_off"),
        ("", "stop", "no_record"),
        (" \n ", "stop", "no_record"),
    ],
)
def test_odd_rephrasings_are_refused(text: str, finish: str, reason: str) -> None:
    assert reasons(found("rephrase", {"text": DOCUMENT}, text, finish)) == [reason]


@pytest.mark.parametrize("kind", LABELS)
def test_a_persona_is_asked_for_its_label_and_loses_it(kind: str) -> None:
    label = LABELS[kind]
    _, user = asked("persona", PERSONA, kind=kind)
    assert f'Begin your answer with "{label}"' in user
    assert user.endswith(PERSONA["persona"])
    body = "How many turns does the coil need, and why?"
    for text in (
        f"{label} {body}",
        f"**{label}** {body}",
        f"**{label[:-1]}**: {body}",
        f"## {label}\n\n{body}\n",
        f'"{label} {body}',
    ):
        (piece,) = found("persona", PERSONA, text, kind=kind)
        assert piece.refusal is None, text
        assert piece.record == {**PERSONA, "kind": kind, "content": body}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("How do I mend a radio from 1950?", "bad_format"),
        ("Math problem: What is two and two, and why is it so?", "wrong_label"),
        ("User prompt: Mend it.", "too_short"),
        ("User prompt:", "bad_format"),
        ("", "no_record"),
        ("Sure! User prompt: How do I mend a radio?", "bad_format"),
    ],
)
def test_a_persona_without_its_label_is_refused(text: str, reason: str) -> None:
    assert reasons(found("persona", PERSONA, text)) == [reason]


def test_a_text_is_traced_back_to_its_instruction() -> None:
    row = {"text": DOCUMENT}
    assert asked("backtranslate", row)[1].endswith(DOCUMENT)
    text = "<instruction>Tell the history of the lighthouse of Alexandria.</instruction>"
    (piece,) = found("backtranslate", row, text)
    assert piece.refusal is None
    assert piece.record == {
        "instruction": "Tell the history of the lighthouse of Alexandria.",
        "input": "",
        "output": DOCUMENT,
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Tell me about it.", "bad_format"),
        ("<instruction>Tell the", "bad_format"),
        ("<instruction>Tell it.</instruction>", "too_short"),
        (f"<instruction>Continue: {DOCUMENT}</instruction>", "quotes_the_text"),
        ("", "no_record"),
    ],
)
def test_odd_instructions_are_refused(text: str, reason: str) -> None:
    assert reasons(found("backtranslate", {"text": DOCUMENT}, text)) == [reason]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rephrase", {"style": "faq", "min_words": "5"}),
        *(("persona", {"kind": kind}) for kind in LABELS),
        ("backtranslate", {}),
    ],
)
async def test_each_decides_every_row(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Nine rows in, nine decisions out, two samples each; the scripted answers are all taken."""
    rows = tmp_path / "rows.jsonl"
    lines = [{"persona": f"Person {n}", "text": f"{n}. {DOCUMENT}"} for n in range(9)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = RunConfig(
        backend="scripted",
        recipe=name,
        recipe_options=options,
        rows=rows,
        samples=2,
        semantic=False,
        rouge_threshold=None,
        out=tmp_path / "run",
    )
    result = await generate(config, SilentDisplay())
    assert result.stop.error is None
    with RunStore.read(tmp_path / "run") as run:
        accepted = [decision.record for decision, _ in run.accepted()]
    assert result.progress.accepted == len(accepted) == 18
    assert {json.dumps(sorted(record or {})) for record in accepted} == {
        json.dumps(sorted(recipe(name).fields))
    }
