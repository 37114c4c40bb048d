"""Self-Instruct: its parsers, filters and rules beside an independent reading of the published
code, and whole runs of its three stages.
"""

from __future__ import annotations

import random
import re
import string
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.languages import ENGLISH
from engine.prompts.fit import Prompts, join
from engine.recipes.alpaca import Seeded
from engine.recipes.base import Ask, Piece, Recipe
from engine.recipes.filters import Filters, FilterSettings
from engine.recipes.guard import parsed
from engine.recipes.load import load_recipe
from engine.recipes.seeds import bundled_seeds, fingerprint, read_seeds
from engine.recipes.self_instruct import Classification, Instances, Instructions
from engine.records import Completion, Record, Usage
from engine.run.manifest import make_manifest
from engine.run.settle import settle
from engine.settings import RunConfig
from engine.store import RunStore
from engine.upkeep.redecide import redecide_run
from tests.engine.recipes.stages import accepted, dump, ran, stage_folders

TASKS = read_seeds(bundled_seeds())
SEEDED = Seeded(tasks=TASKS)
DAMAGED = 150


def answered(text: str, finish: str = "stop", api: Any = "completions") -> Completion:
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    return Completion(text=text, finish_reason=finish, usage=usage, api=api)


def found(recipe: Recipe, text: str, finish: str = "stop", **more: Any) -> list[Piece]:
    ask = Ask(index=3, seed=5, row=more.pop("row", None), shown=("x",) * 8)
    return parsed(recipe, ask, answered(text, finish, **more))


def taken(pieces: list[Piece]) -> list[Record]:
    return [piece.record for piece in pieces if piece.record and piece.refusal is None]


def reasons(pieces: list[Piece]) -> list[str]:
    return [piece.refusal[0] if piece.refusal else "row" for piece in pieces]


def damaged(whole: str, number: int) -> str:
    """The text with some of its characters and lines left out, doubled, exchanged or cut."""
    draw = random.Random(number)
    text = list(whole)
    for _ in range(draw.randrange(12)):
        at = draw.randrange(len(text))
        kind = draw.randrange(5)
        if kind == 0:
            del text[at : at + draw.randrange(1, 30)]
        elif kind == 1:
            text[at:at] = text[draw.randrange(len(text)) :][:40]
        elif kind == 2:
            text[at] = draw.choice([*"\n\n .:19é-", "\nExample 2\n", "Output:", "Input:"])
        elif kind == 3:
            text = text[: len(text) - draw.randrange(20)]
        else:
            lines = "".join(text).split("\n")
            draw.shuffle(lines)
            text = list("\n".join(lines))
        text = text or ["."]
    return "".join(text)


# -- the first stage

LISTED = """ Describe the smell of rain to a person from the desert.
10. write a haiku about NASA and the moons of Jupiter:
11. Draw a map of the village.
12. Sum up.
13. Write a program that sorts a list of names.
14. Étudie la phrase et traduis chaque mot.
15. "Quoted tasks begin with a sign of their own.
"""


def published_list(text: str, finish: str) -> list[str]:
    """post_process_gpt3_response of bootstrap_instructions.py, read anew."""
    if finish == "length":
        return []
    kept = []
    for raw in re.split(r"\n\d+\s?\. ", text):
        inst = re.sub(r"\s+", " ", raw).strip().capitalize()
        if inst == "":
            continue
        if len(inst.split()) <= 3 or len(inst.split()) > 150:
            continue
        words = "image images graph graphs picture pictures file files map maps draw plot".split()
        if any(re.search(rf"\b{word}\b", inst, re.IGNORECASE) for word in [*words, "go to"]):
            continue
        if inst.startswith("Write a program") or inst[0] in string.punctuation:
            continue
        if not inst[0].isascii():
            continue
        kept.append(inst)
    return kept


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_a_list_is_read_as_the_published_code_reads_it(finish: str) -> None:
    """In faithful mode, for damaged answers too."""
    recipe = Instructions(SEEDED, faithful=True)
    seen = 0
    for number in range(DAMAGED):
        text = damaged(LISTED, number)
        rows = [row["instruction"] for row in taken(found(recipe, text, finish))]
        assert rows == published_list(text, finish), text
        seen += len(rows)
    assert (seen > DAMAGED) == (finish == "stop")


def test_the_bugs_are_left_out() -> None:
    """Names stay as they are written; of a list that was cut only its end is lost."""
    recipe = Instructions(SEEDED)
    whole = found(recipe, LISTED)
    assert [row["instruction"] for row in taken(whole)] == [
        "Describe the smell of rain to a person from the desert.",
        "Write a haiku about NASA and the moons of Jupiter:",
    ]
    assert reasons(whole)[2:] == [
        *("blocked_word", "too_short", "write_a_program", "not_ascii_start", "punctuation_start"),
    ]
    cut = found(recipe, LISTED, "length")
    assert reasons(cut)[:2] == ["row", "row"]
    assert reasons(cut)[-1] == "cut_off"
    # What a blank line ends is whole, and what follows is none of the list's.
    (only,) = found(recipe, " Name three old breeds of sheep.\n\nSome other text", "length")
    assert only.record == {"instruction": "Name three old breeds of sheep."}
    assert only.refusal is None


@pytest.mark.parametrize(
    "text",
    [
        "9. Name three rivers of France.\n10. Explain how a loom works.",
        "Sure, here are more:\n\n9. Name three rivers of France.\n\n10. Explain how a loom works.\n",
        "Name three rivers of France.\n10. Explain how a loom works.",
        "Here they are:\n1. Name three rivers of France.\n2. Explain how a loom works.",
    ],
)
def test_a_chat_model_s_list_is_read_from_its_first_number(text: str) -> None:
    assert [row["instruction"] for row in taken(found(Instructions(SEEDED), text, api="chat"))] == [
        "Name three rivers of France.",
        "Explain how a loom works.",
    ]


def test_what_a_prompt_shows() -> None:
    """Eight in all: seeds, and up to two of the rows that the pool holds; numbered up to 9."""
    recipe = Instructions(SEEDED)
    pool = [{"instruction": f"Made here:  number {n}:"} for n in range(40)]
    for rows, own in ((), 0), (pool[:1], 1), (pool, 2):
        text, _ = join(recipe.prompt(Ask(index=1, seed=2, pool=rows)))
        lines = text.split("\n")
        assert lines[-1] == "9."
        assert [line.partition(".")[0] for line in lines[2:-1]] == list("12345678")
        assert sum("Made here: number" in line and line[-1] != ":" for line in lines) == own
    orders = {
        tuple("pool" in p.source for p in recipe.prompt(Ask(index=n, pool=pool))) for n in range(50)
    }
    assert len(orders) > 10  # they are shuffled
    few = Instructions(Seeded(tasks=TASKS[:3]))
    assert join(few.prompt(Ask(index=0)))[0].endswith("\n4.")


def test_a_prompt_that_is_too_long_shows_fewer() -> None:
    prompts = Prompts(
        Instructions(SEEDED),
        seed=0,
        api="completions",
        sampling={"max_tokens": 64, "temperature": 1.0, "top_p": 1.0},
        given={"max_tokens": 64},
        context_length=200,
    )
    prompt = prompts.prompt(0)
    assert prompt is not None
    assert prompt.truncated
    shown = len(prompt.demonstrations)
    assert 1 <= shown < 8
    assert prompt.text.endswith(f"\n{shown + 1}.")


def test_published_constants() -> None:
    faithful = Instructions(SEEDED, faithful=True).sampling(Ask(index=0))
    assert faithful == {
        "max_tokens": 1024,
        "temperature": 0.7,
        "top_p": 0.5,
        "presence_penalty": 2,
        "stop": ("\n\n", "\n16", "16.", "16 ."),
    }
    assert "16." not in Instructions(SEEDED).sampling(Ask(index=0))["stop"]
    judged = Classification(faithful=True).sampling(Ask(index=0))
    assert (judged["max_tokens"], judged["temperature"]) == (3, 0)
    assert judged["stop"] == ("\n", "Task")
    for yes, tokens in (True, 300), (False, 350):
        ask = Ask(index=0, row={"instruction": "Do it.", "is_classification": yes})
        assert Instances().sampling(ask) == {
            "max_tokens": tokens,
            "temperature": 0,
            "top_p": 1,
            "presence_penalty": 1.5,
            "stop": ("Example 6", "Task:"),
        }


def test_a_person_s_filters_and_language_hold() -> None:
    settings = FilterSettings(blocked_words=("rain",), min_length=1)
    own = Instructions(Seeded(tasks=TASKS, filters=Filters(ENGLISH, settings)))
    assert own.refuse({"instruction": "Describe rain"}) == ("blocked_word", "rain")
    assert own.refuse({"instruction": "Draw it"}) is None
    assert Instructions(SEEDED).refuse({"instruction": "Compose music for a film."}) is None
    chinese = Instructions(Seeded(tasks=TASKS, language="zh"))
    assert "Chinese" in join(chinese.prompt(Ask(index=0)))[0]
    assert chinese.refuse({"instruction": "写一首关于雨的诗"}) is None


# -- the second stage


@pytest.mark.parametrize(
    ("text", "yes", "published"),
    [
        (" Yes", True, True),
        ("yes\n", True, True),
        ("YES", True, True),
        (" No", False, False),
        ("Yes.", True, False),
        ("**Yes**", True, False),
        ("Yes, it", True, False),
        ("Yesterday", False, False),
        ("", False, False),
        ("No, yes", False, False),
    ],
)
def test_what_counts_as_yes(text: str, yes: bool, published: bool) -> None:
    row = {"instruction": "Is it so?"}
    for faithful, wanted in (False, yes), (True, published):
        (piece,) = found(Classification(faithful=faithful), text, "length", row=row)
        assert piece.record == {**row, "is_classification": wanted}
        assert piece.refusal is None


# -- the third stage

GENERATED = """Example 1
Sentence: Him was late.
Output: He was late.
Example 2
Input: She go home.
Output: She goes home.
Example 3.
Input 3: It rain: today
Output 3 : It rains today.
Input: More of it
Example 4
Input: The same
Output: The same
Example 5
Input: And this:
Output: Or that.
Example 6
Text: They sings.
Output: They sing.
Example 7
Text: We is here.
Output: We are here.
Example 8
Text: You am there.
Output: You are there.
"""
CLASSIFIED = """Class label: cheerful
Sentence: What a morning!
Class label: gloomy
Sentence: It rains again.
Class label: gloomy
Class label:
Sentence: Nothing is said.
Class label: cheerful
Sentence: What a morning!
"""


def published_pair(text: str) -> tuple[str, str]:
    if re.findall(r"Output\s*\d*\s*:", text):
        parts = re.split(r"Output\s*\d*\s*:", text)
        given, output = parts[0].strip(), parts[1].strip()
    else:
        given, output = "", text.strip()
    if re.findall(r"Input\s*\d*\s*:", output):
        output = re.split(r"Input\s*\d*\s*:", output)[0].strip()
    return re.sub(r"^Input\s*\d*\s*:", "", given).strip(), output


def published_instances(text: str, finish: str, classification: bool) -> list[tuple[str, str]]:
    """The parsers and filters of prepare_for_finetuning.py, read anew, in the answer's order."""
    pairs = []
    if classification:
        if "Class label:" not in text:
            return []
        for piece in text.split("Class label:")[1:]:
            fields = piece.strip().split("\n", 1)
            pairs.append((fields[1].strip() if len(fields) == 2 else "", fields[0].strip()))
    else:
        text = text.strip()
        if re.findall(r"Example\s?\d*\.?", text):
            pieces = [each.strip() for each in re.split(r"Example\s?\d*\.?", text)]
            pairs = [published_pair(each) for each in pieces if each != ""]
        elif re.findall(r"Output\s*\d*\s*:", text):
            pairs = [published_pair(text)]
    if finish == "length":
        pairs = pairs[:-1]
    kept = []
    for given, output in pairs:
        if given == output or output == "" or given.endswith(":") or output.endswith(":"):
            continue
        kept.append((given, output))
    for one in kept:
        for other in kept:
            if one[0] != "" and one[0] == other[0] and one[1] != other[1]:
                return []
    return list(dict.fromkeys(kept))


@pytest.mark.parametrize("classification", [False, True])
@pytest.mark.parametrize("finish", ["stop", "length"])
def test_instances_are_read_as_the_published_code_reads_them(
    classification: bool, finish: str
) -> None:
    """For damaged answers too; of more than five, five are drawn and stay in their order."""
    row = {"instruction": "Do it.", "is_classification": classification}
    several = contradicted = 0
    for number in range(DAMAGED):
        whole = CLASSIFIED if classification else GENERATED
        if number % 3 == 0 and not classification:
            whole += "Example 9\nText: We is here.\nOutput: We was here.\nExample 10\nOutput: Hm.\n"
        text = damaged(whole, number)
        pieces = found(Instances(), text, finish, row=row)
        wanted = published_instances(text, finish, classification)
        rows = [(record["input"], record["output"]) for record in taken(pieces)]
        assert len(rows) == min(5, len(wanted)), text
        assert [pair for pair in wanted if pair in rows] == rows, text
        several += len(rows) > 1
        contradicted += "contradiction" in reasons(pieces)
        assert all(record["instruction"] == "Do it." for record in taken(pieces))
    assert several > DAMAGED / 4
    assert contradicted


def test_every_instance_that_is_lost_has_a_reason() -> None:
    pieces = found(Instances(), GENERATED, row={"instruction": "A", "is_classification": False})
    assert sorted(reasons(pieces)) == sorted(
        ["row"] * 5 + ["beyond_five", "input_is_output", "ends_with_colon"]
    )
    row = {"instruction": "A", "is_classification": True}
    assert reasons(found(Instances(), CLASSIFIED, row=row)) == [
        *("row", "row", "row", "row", "repeated")
    ]
    assert reasons(found(Instances(), CLASSIFIED.strip(), "length", row=row))[-1] == "cut_off"
    twice = "Class label: a\nText: x\nClass label: b\nText: x\nClass label: c\nText: y"
    assert reasons(found(Instances(), twice, row=row)) == ["contradiction"] * 3
    assert reasons(found(Instances(), "I cannot.", row=row)) == ["bad_format"]


def test_markup_around_labels_of_a_chat_is_passed_over() -> None:
    row = {"instruction": "A", "is_classification": False}
    text = "**Example 1:**\n**Input:** She go.\n**Output:** She goes.\n\n### Example 2\n**Output**: Hm."
    rows = taken(found(Instances(), text, api="chat", row=row))
    assert [(each["input"], each["output"]) for each in rows] == [
        ("She go.", "She goes."),
        ("", "Hm."),
    ]
    row["is_classification"] = True
    (label,) = taken(found(Instances(), "**Class label:** good\nFilm: Yes!", api="chat", row=row))
    assert (label["input"], label["output"]) == ("Film: Yes!", "good")


@pytest.mark.parametrize("word", ["Output", "Example", "Input", "\n", "Class label:", "9. "])
def test_a_loop_takes_no_time(word: str) -> None:
    """Time linear in what a model repeats: 120,000 of anything are read at once."""
    for fill in (" ", "1", "\n"):
        text = (word + fill * 20_000) * 5 + word * 20_000
        for yes in (True, False):
            found(Instances(), text, row={"instruction": "A", "is_classification": yes})
        found(Instructions(SEEDED), text, api="chat")


# -- whole runs


def scripted(prompt: Any) -> str:
    """A model that plays along, with some faults; a function of the prompt."""
    text, draw = prompt.text, random.Random(f"{prompt.text}{prompt.sampling.seed}")
    if text.endswith("\nIs it classification?"):
        return draw.choice([" Yes", " No", " No", " Perhaps"])
    if "Write examples of each task" in text[:60]:
        return draw.choice(
            [
                "Example 1\nText: a {0}\nOutput: b {0}\nExample 2\nOutput: c {0}\n",
                "Output: {0}\n",
                "I do not know.",
            ]
        ).format(draw.randrange(10**6))
    if "classification task, write a class label" in text[:80]:
        return f"Class label: good\nText: {draw.randrange(10**6)}\nClass label: bad\nText: no\n"
    assert text.endswith("\n9.")
    items = [
        " ".join("".join(draw.choices(string.ascii_lowercase, k=6)) for _ in range(7))
        for _ in range(7)
    ]
    return " " + "\n".join(f"{9 + n}. {item}"[3 * (n == 0) :] for n, item in enumerate(items))


@pytest.mark.anyio
@pytest.mark.slow
async def test_the_dataset_is_the_same_for_any_concurrency(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target exactly, at the last stage; rows that were made are shown in later prompts."""
    for flight in (1, 16):
        result = await ran(
            tmp_path / str(flight), monkeypatch, scripted,
            recipe="self-instruct", target=200, max_in_flight=flight,
        )  # fmt: skip
        assert result.stop.reached, result.stop.error
    assert dump(tmp_path / "1") == dump(tmp_path / "16")
    rows = accepted(tmp_path / "16")
    assert len(rows) == 200
    assert {tuple(row) for row in rows} == {("instruction", "input", "output", "is_classification")}
    assert {row["is_classification"] for row in rows} == {True, False}
    first, second, _ = stage_folders(tmp_path / "16")
    asked = [row["instruction"] for row in accepted(first)]
    assert [row["instruction"] for row in accepted(second)] == asked[: len(accepted(second))]
    with RunStore.read(first) as run:
        shown = [answer.demonstrations for answer, _ in run.all_answers()]
        assert run.manifest.fixed["seeds"]
    assert {len(each) for each in shown} == {8}
    with RunStore.read(tmp_path / "16") as run:
        assert run.manifest.fixed["seeds"] is None


@pytest.mark.anyio
@pytest.mark.slow
async def test_seeds_are_kept_and_their_stage_can_be_decided_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Own seeds and filters are taken, and kept where the first stage is; nobody need name them
    again.
    """
    seeds = tmp_path / "own.jsonl"
    lines = bundled_seeds().read_text().splitlines()[:30]
    seeds.write_text("\n".join(lines))
    run = tmp_path / "run"
    settings = {"recipe": "self-instruct", "target": 20, "seeds": seeds}
    await ran(run, monkeypatch, scripted, **settings)
    seeds.unlink()
    first = stage_folders(run)[0]
    before = dump(first)
    done = await redecide_run(first, None, {})
    assert done.accepted == done.accepted_before
    assert dump(first) == before
    with pytest.raises(ConfigError, match="respond has its own"):
        await ran(tmp_path / "other", monkeypatch, scripted, recipe="respond", seeds=seeds)


def test_options_are_named() -> None:
    assert load_recipe("self-instruct", SEEDED, {"faithful": "true"}).stages
    with pytest.raises(ConfigError, match="did you mean 'faithful'"):
        load_recipe("self-instruct", SEEDED, {"faithfull": "true"})
    config = RunConfig(recipe="self-instruct", stage="self-instruct/instances")
    assert config.make_recipe(()).name == "self-instruct/instances"


def test_the_head_names_source_and_departures() -> None:
    import engine.recipes.self_instruct as module

    head = module.__doc__ or ""
    for word in ("arXiv", "Apache-2.0", "commit", "departures", "own words", "faithful"):
        assert word in head


def test_a_class_of_a_user_s_may_take_seeds_too(tmp_path: Path) -> None:
    """It is made with the tasks, the language and the filters that the run settles."""
    (tmp_path / "own.py").write_text(
        "from engine.recipes.base import Part, Recipe\n\n\n"
        "class Own(Recipe):\n"
        "    fields, takes_seeds = ('text',), True\n\n"
        "    def __init__(self, seeded):\n        self.seeded = seeded\n\n"
        "    def prompt(self, ask):\n        return [Part(self.seeded.tasks[0].instruction)]\n\n"
        "    def parse(self, ask, answer):\n        yield {'text': answer.text}\n"
    )
    config = RunConfig(recipe=f"{tmp_path / 'own.py'}:Own", backend="scripted", out=tmp_path / "x")
    settled = settle(config)
    assert [task.id for task in settled.tasks] == [task.id for task in TASKS]
    assert settled.recipe.prompt(Ask(index=0))[0].text == TASKS[0].instruction
    manifest = make_manifest(settled.config, settled.recipe, settled.tasks, "scripted")
    assert manifest.fixed["seeds"] == fingerprint(TASKS)
