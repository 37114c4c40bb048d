"""Traces, their majority and their verdicts; and CoT-Self-Instruct, which is made of them."""

from __future__ import annotations

import json
import os
import random
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.prompts.fit import join
from engine.recipes.alpaca import Seeded
from engine.recipes.base import Ask, Piece, Recipe
from engine.recipes.cot_self_instruct import Questions
from engine.recipes.guard import RecipeFault, parsed
from engine.recipes.reason import Reason, boxed, expected_of, normalised
from engine.recipes.seeds import bundled_seeds, read_seeds
from engine.recipes.verifier import Verifier
from engine.records import Completion, Prompt, Usage
from engine.upkeep.redecide import redecide_run
from tests.engine.recipes.stages import accepted, dump, ran, stage_folders
from tests.linear import in_linear_time

pytestmark = pytest.mark.slow

ROW = {"problem": "What is 3 + 4?", "answer": "7"}


def found(recipe: Recipe, text: str, finish: str = "stop", row: Any = ROW) -> list[Piece]:
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    answer = Completion(text=text, finish_reason=finish, usage=usage, api="chat", reasoning="Hm.")
    return parsed(recipe, Ask(index=3, row=row), answer)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{7}.", "7"),
        (r"\boxed{\frac{1}{2}} at last", r"\frac{1}{2}"),
        (r"\boxed{1} no, \boxed{ 2 }", "2"),
        (r"\fbox{3} and \fboxed{4}", "4"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\text{if } x > \boxed{1} }", r"\text{if } x > \boxed{1}"),
        (r"\boxed{1} and \boxed{never closed", "1"),
        (r"\boxed{} \boxed{ }", None),
        (r"\boxed{{{", None),
        (r"} \boxed{6} }", "6"),
        (r"boxed{7} \boxed 8", None),
        ("", None),
        (r"\boxed{" + "9" * 3000 + "}", None),
    ],
)
def test_a_box_is_read_with_its_braces(text: str, content: str | None) -> None:
    assert boxed(text) == content


@pytest.mark.parametrize(
    "text", [r"\boxed{" * 50_000, "{" * 300_000, "\\" * 300_001, "}" * 300_000]
)
def test_a_loop_of_braces_takes_no_time(text: str) -> None:
    with in_linear_time():
        boxed(text + "}" * 50_000)
        normalised(text)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("7", " $7$ "),
        ("7", "7.0"),
        ("1000", "1,000"),
        ("-1000", r"-1{,}000.00"),
        ("0", "-0.0"),
        ("7", "+7."),
        (r"\frac{1}{2}", r"\dfrac{1}{2}"),
        (r"(1,2)", r"\left( 1, 2 \right)"),
        ("even", r"\text{Even}"),
        ("50%", r"50\%"),
        (r"x\in\{1\}", r"x \in \{1\}"),
    ],
)
def test_answers_that_are_the_same_but_for_how_they_are_written(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("7", "70"),
        ("-7", "7"),
        ("1.5", "15"),
        ("(1,2)", "12"),
        ("0.10", "10"),
        ("1,00", "100"),
        ("007", "0.7"),
    ],
)
def test_answers_that_differ_stay_different(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ("7", "7"),
        (70, "70"),
        (True, ""),
        (None, ""),
        (["7"], ""),
        ("3 and 4 are 7.\n#### 7", "7"),
        (r"Thus \boxed{7}.", "7"),
    ],
)
def test_a_known_answer_is_read_from_what_a_row_has(known: object, expected: str) -> None:
    assert expected_of(Ask(index=0, row={"answer": known})) == expected


def test_a_trace_is_a_row_with_its_verdict() -> None:
    (piece,) = found(Reason(), r" It is \boxed{7}. ")
    assert piece.record == {
        "question": "What is 3 + 4?",
        "output": r"It is \boxed{7}.",
        "reasoning": "Hm.",
        "answer": "7",
        "expected": "7",
        "verified": True,
        "verdict": "the same as the known answer",
        "votes": 1,
        "samples": 1,
    }
    (piece,) = found(Reason(), r"\boxed{8}")
    assert (piece.record or {})["verified"] is False
    (piece,) = found(Reason(), r"\boxed{8}", row={"question": "Why?"})
    assert (piece.record or {})["verified"] is None
    for text, finish, reason in (
        ("It is 7.", "stop", "no_answer"),
        (r"\boxed{7}", "length", "cut_off"),
        ("", "stop", "no_record"),
    ):
        (piece,) = found(Reason(), text, finish)
        assert piece.refusal
        assert piece.refusal[0] == reason
    text, _ = join(Reason().prompt(Ask(index=0, row=ROW)))
    assert text.startswith("What is 3 + 4?\n\nThink step by step.")
    assert join(Reason(closing="").prompt(Ask(index=0, row=ROW)))[0] == "What is 3 + 4?"


def reduced(recipe: Recipe, *answers: str | None) -> Any:
    rows: list[dict[str, Any] | None] = []
    for answer in answers:
        text = "nothing" if answer is None else rf"trace {len(rows)}: \boxed{{{answer}}}"
        (piece,) = found(recipe, text)
        rows.append(piece.record)
    return recipe.reduce(Ask(index=3, row=ROW), rows)


def test_the_majority_is_the_answer_that_most_agree_on() -> None:
    row = reduced(Reason(), "8", "7.0", None, "7")
    assert (row["answer"], row["votes"], row["samples"]) == ("7.0", 2, 4)
    assert row["output"].startswith("trace 1")
    assert reduced(Reason(), "8", "7", "7", "8")[0] == "no_majority"
    assert reduced(Reason(), "1", "2", "3")[1] == "3 answers have 1 of 3 votes each"
    assert reduced(Reason(), None, None)[0] == "no_answer"
    assert reduced(Reason(), "8", None)["votes"] == 1


def test_the_first_right_trace_is_kept_where_that_is_wanted() -> None:
    recipe = Reason(keep="verified")
    row = reduced(recipe, "8", "8", "7", "$7$")
    assert row["output"].startswith("trace 2")
    assert row["votes"] == 2
    assert reduced(recipe, "8", None, "9") == ("not_verified", "of 2 answers none is right")
    assert reduced(recipe, None)[0] == "no_answer"
    with pytest.raises(RecipeFault, match="no answer to verify by"):
        recipe.prompt(Ask(index=0, row={"question": "Why?"}))


# -- verifiers

OWN = """
import os, signal, subprocess, sys, time
from pathlib import Path

def check(row, answer, text):
    print("what it prints is no verdict")
    if answer == "hang":
        subprocess.Popen(["sleep", "987"])
        time.sleep(1e9)
    if answer == "die":
        os._exit(3)
    if answer == "raise":
        raise ValueError("no\\nsuch thing")
    if answer == "unknown":
        return None
    if answer == "word":
        return "no"
    return str(row["want"]) == answer
"""


def own(folder: Path, text: str = OWN) -> str:
    (folder / "own.py").write_text(text)
    return f"{folder / 'own.py'}:check"


def test_a_function_says_what_is_right_in_a_process_that_can_be_killed(tmp_path: Path) -> None:
    """After a hang, a death or an exception the next verdict comes all the same."""
    verifier = Verifier(own(tmp_path), limit_s=2)
    verdict = partial(_verdict, verifier)

    assert verdict("7") == (True, "")
    assert verdict("8") == (False, "")
    assert verdict("unknown") == (None, "the verifier cannot tell")
    assert verdict("raise") == (None, "the verifier raised ValueError: no such thing")
    told = "the verifier raised TypeError: check returned 'no', not true, false or None"
    assert verdict("word") == (None, told)
    assert verdict("die") == (None, "the verifier ended with status 3")
    assert verdict("7") == (True, "")
    assert verdict("hang") == (None, "no verdict within 2 s")
    assert verdict("7") == (True, "")
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and b"987" in _command(pid)]
    process = verifier._process
    assert process is not None
    del verdict, verifier
    assert process.returncode is not None  # it goes with whoever asked


def _verdict(verifier: Verifier, answer: str) -> Any:
    return verifier.verdict({"want": 7}, "", answer, "text")


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    """Its input ends, in the middle of a call too."""
    verifier = Verifier(own(tmp_path), limit_s=0.2)
    assert verifier._start() == ""
    process = verifier._process
    assert process is not None
    assert process.stdin is not None
    asked = {"row": {}, "gold": "", "answer": "hang", "text": ""}
    process.stdin.write(json.dumps(asked).encode() + b"\n")
    process.stdin.close()
    assert process.wait(timeout=20) != 0


def test_what_cannot_be_loaded_is_told_with_each_verdict(tmp_path: Path) -> None:
    verifier = Verifier(own(tmp_path, "import no_such_module\n" + OWN), limit_s=5)
    verified, detail = verifier.verdict({}, "", "7", "")
    assert verified is None
    assert "No module named 'no_such_module'" in detail


def test_a_verifier_that_is_none_is_refused_at_the_start(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("def check(:")
    for spec, said in (
        ("sympy", "write match, math-verify, or FILE.py:FUNCTION"),
        (f"{tmp_path}/none.py:check", "No such file"),
        (own(tmp_path).replace(":check", ":chekc"), "there is no function chekc"),
        (f"{broken}:check", "is no Python"),
    ):
        with pytest.raises(ConfigError, match=said):
            Reason(verifier=spec)
    with pytest.raises(ConfigError, match="write the seconds"):
        Reason(verifier=own(tmp_path), limit_s=0.0)
    if find_spec("math_verify") is None:
        with pytest.raises(ConfigError, match=r"pip install 'woolmill\[verify\]'"):
            Reason(verifier="math-verify")
    else:
        (piece,) = found(Reason(verifier="math-verify"), r"\boxed{\frac{14}{2}}")
        assert (piece.record or {})["verified"] is True


def test_a_function_may_verify_what_has_no_box(tmp_path: Path) -> None:
    recipe = Reason(verifier=own(tmp_path), keep="verified")
    (piece,) = found(recipe, "print(7)", row={"question": "Code?", "want": ""})
    assert (piece.record or {})["verified"] is True
    assert (piece.record or {})["verdict"] == "by the function"
    assert recipe.source_sha256


# -- whole runs


def scripted(prompt: Prompt) -> str:
    draw = random.Random(f"{prompt.text}{prompt.sampling.seed}")
    if prompt.text.startswith("Below are some tasks."):
        n = draw.randrange(10**9)
        words = " ".join(f"w{draw.randrange(10**6)}" for _ in range(8))
        return draw.choice(
            [
                f"I plan.\n<question>{words} {n}?</question>\n<answer>{draw.choice((7, 8))}</answer>",
                "I cannot.",
            ]
        )
    return draw.choice([r"So \boxed{7}.", r"So \boxed{7.0}.", r"So \boxed{8}.", "Hm.", ""])


@pytest.mark.anyio
@pytest.mark.parametrize("keep", ["majority", "verified", "all"])
async def test_every_question_is_decided_once(
    keep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for 1 and 16 in flight, and again when it is decided again."""
    rows = tmp_path / "rows.jsonl"
    lines = [{"question": f"What makes 7, number {n}?", "answer": 7} for n in range(30)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for flight in (1, 16):
        result = await ran(
            tmp_path / str(flight), monkeypatch, scripted,
            recipe="reason", recipe_options={"keep": keep}, rows=rows, max_in_flight=flight,
        )  # fmt: skip
        assert result.stop.reached, result.stop.error
    run = tmp_path / "16"
    decided = dump(run)
    assert decided == dump(tmp_path / "1")
    taken = accepted(run)
    assert taken
    if keep == "all":
        assert {row["verified"] for row in taken} == {True, False}
        assert len(decided) == 120
    else:
        assert len([reason for _, _, reason, *_ in decided if reason == "sample"]) > 60
        assert {row["samples"] for row in taken} == {4}
        assert len({row["question"] for row in taken}) == len(taken)
    if keep == "verified":
        assert {row["verified"] for row in taken} == {True}
    await redecide_run(run, None, {})
    assert dump(run) == decided


@pytest.mark.anyio
async def test_a_question_is_kept_where_fresh_answers_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flight in (1, 16):
        result = await ran(
            tmp_path / str(flight), monkeypatch, scripted,
            recipe="cot-self-instruct", target=12, max_in_flight=flight,
        )  # fmt: skip
        assert result.stop.reached, result.stop.error
    run = tmp_path / "16"
    decided = dump(run)
    assert decided == dump(tmp_path / "1")
    assert len(accepted(run)) == 12
    assert all(normalised(row["answer"]) == row["expected"] for row in accepted(run))
    assert "inconsistent" in {reason for _, _, reason, *_ in decided}
    first = stage_folders(run)[0]
    assert {tuple(row) for row in accepted(first)} == {("question", "answer")}


def test_a_question_is_taken_from_behind_the_thoughts() -> None:
    recipe = Questions(Seeded(tasks=read_seeds(bundled_seeds())))
    text, _ = join(recipe.prompt(Ask(index=1)))
    assert text.count("\nTask ") == 2
    said = (
        "<question>Try?</question> no. <question>How many?</question>\n"
        r"<answer>\boxed{7}</answer>"
    )
    (piece,) = found(recipe, said, row=None)
    assert piece.record == {"question": "How many?", "answer": "7"}
    for text, finish, reason in (
        ("<question>How many?</question>", "stop", "bad_format"),
        ("<question>How many?</question><answer>7", "length", "cut_off"),
        ("<question> </question><answer>7</answer>", "stop", "bad_format"),
    ):
        (piece,) = found(recipe, text, finish, row=None)
        assert piece.refusal
        assert piece.refusal[0] == reason
