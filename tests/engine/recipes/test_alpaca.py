"""The Alpaca recipe decides as the reference does.

``reference`` is written from the documented behaviour of ``post_process_gpt3_response``, apart from the engine's
code, and returns what the original would keep.
"""

from __future__ import annotations

import re
import string
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.recipes import alpaca
from engine.recipes.alpaca import Alpaca, Seeded
from engine.recipes.base import Ask, Piece
from engine.recipes.filters import ALPACA_FILTERS, BLOCKED_WORDS, first_refusal
from engine.records import Completion, Record, SeedTask, Usage
from tests.engine.asked import alpaca_prompts, rendered, shown
from tests.linear import in_linear_time


def completion(text: str, finish_reason: str = "stop") -> Completion:
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    return Completion(text=text, finish_reason=finish_reason, usage=usage)


def kept(text: str, finish_reason: str = "stop", demonstrations: int = 3) -> list[dict[str, str]]:
    pieces = alpaca.parse(completion(text, finish_reason), demonstrations=demonstrations)
    records = [p.record for p in pieces if p.record and first_refusal(p.record) is None]
    return [
        {"instruction": r["instruction"], "input": r["input"], "output": r["output"]}
        for r in records
    ]


def reference(text: str, finish_reason: str, demonstrations: int) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    raw = re.split("###", f"{demonstrations + 1}. Instruction:" + text)
    for place, part in enumerate(raw):
        if finish_reason == "length" and place + 1 == len(raw):
            continue
        number = place + demonstrations + 1
        fields: list[Any] = re.split(rf"{number}\.\s+(Instruction|Input|Output):", part)
        if len(fields) != 7:
            continue
        instruction, given_input, output = fields[2].strip(), fields[4].strip(), fields[6].strip()
        if given_input.lower() == "<noinput>":
            given_input = ""
        words = instruction.split()
        if len(words) <= 3 or len(words) > 150:
            continue
        if any(re.search(rf"\b({w})\b", instruction, re.IGNORECASE) for w in BLOCKED_WORDS):
            continue
        if instruction.startswith("Write a program"):
            continue
        if instruction[0] in string.punctuation or not instruction[0].isascii():
            continue
        found.append({"instruction": instruction, "input": given_input, "output": output})
    return found


GOOD = " Name the largest planet known.\n4. Input:\n<noinput>\n4. Output:\nJupiter\n"
CASES = {
    "one record": (GOOD, "stop", 1),
    "input kept": (GOOD.replace("<noinput>", "of the sun"), "stop", 1),
    "noinput in any case": (GOOD.replace("<noinput>", "<NoInput>"), "stop", 1),
    "the next number": (GOOD + "###\n5. Instruction: Say four words now\n5. Input:\nx\n5. Output:\ny", "stop", 2),
    "a wrong number is dropped": (GOOD + "###\n7. Instruction: Say four words now\n7. Input:\nx\n7. Output:\ny", "stop", 1),
    "numbers go on behind a dropped piece": (GOOD + "###\nnoise\n###\n6. Instruction: Say four words now\n6. Input:\nx\n6. Output:\ny", "stop", 2),
    "length drops the last piece": (GOOD, "length", 0),
    "length keeps the others": (GOOD + "###\n5. Instruc", "length", 1),
    "length behind a separator": (GOOD + "###", "length", 1),
    "a missing part": (" Name the largest planet known.\n4. Output:\nJupiter\n", "stop", 0),
    "a doubled part": (GOOD + "4. Output:\nagain", "stop", 0),
    "the number inside another number": (GOOD.replace("4. Input", "14. Input"), "stop", 1),
    "labels in another order": (" Name it in full.\n4. Output:\na\n4. Input:\nb", "stop", 1),
    "separator inside an output": (GOOD + "### Heading\n", "stop", 1),
    "no space behind the number": (GOOD.replace("4. Input", "4.Input"), "stop", 0),
    "line break behind the number": (GOOD.replace("4. Input", "4.\nInput"), "stop", 1),
    "empty": ("", "stop", 0),
    "three words": (" Name the planet\n4. Input:\n\n4. Output:\nx", "stop", 0),
    "four words": (" Name the planet now\n4. Input:\n\n4. Output:\nx", "stop", 1),
    "150 words": (" " + "word " * 150 + "\n4. Input:\n\n4. Output:\nx", "stop", 1),
    "151 words": (" " + "word " * 151 + "\n4. Input:\n\n4. Output:\nx", "stop", 0),
    "blocked word": (" Describe this Image to me\n4. Input:\n\n4. Output:\nx", "stop", 0),
    "blocked word inside a word": (" Describe the imagery to me\n4. Input:\n\n4. Output:\nx", "stop", 1),
    "go to": (" Please GO TO the shop\n4. Input:\n\n4. Output:\nx", "stop", 0),
    "write a program": (" Write a program that sorts\n4. Input:\n\n4. Output:\nx", "stop", 0),
    "write a programme later": (" Now Write a program please\n4. Input:\n\n4. Output:\nx", "stop", 1),
    "punctuation first": (' "Quote this for me\n4. Input:\n\n4. Output:\nx', "stop", 0),
    "not ASCII first": (" Écris une phrase courte\n4. Input:\n\n4. Output:\nx", "stop", 0),
    "digit first": (" 3 cats sat where exactly\n4. Input:\n\n4. Output:\nx", "stop", 1),
    "empty output is kept": (" Say nothing at all\n4. Input:\n\n4. Output:\n", "stop", 1),
}  # fmt: skip


@pytest.mark.parametrize(("text", "finish", "count"), CASES.values(), ids=CASES)
def test_reference_cases(text: str, finish: str, count: int) -> None:
    """Each case keeps what the reference keeps, and as many records as the case says."""
    assert kept(text, finish) == reference(text, finish, 3)
    assert len(kept(text, finish)) == count


fragments = st.sampled_from(
    ["###", "\n", " ", "4", "5", "6", ".", "14. ", "4. Instruction:", "4. Input:", "4. Output:", "5. Instruction: ",
     "5. Input:\n", "5. Output:\n", "6. Instruction:", "<noinput>", "Write a program", "draw", "go to", "É", "!",
     "Name the largest one known", "\u2028", "\x1c", "\ud800", "###\n5. Instruction: Tell me it all\n5. Input:\n"]
)  # fmt: skip
texts = st.one_of(st.text(), st.lists(st.one_of(fragments, st.text(max_size=8))).map("".join))


@given(texts, st.sampled_from(["stop", "length"]), st.integers(1, 5))
@example(GOOD + "###", "length", 3)
def test_any_text_is_decided_as_the_reference_decides(
    text: str, finish: str, demonstrations: int
) -> None:
    assert kept(text, finish, demonstrations) == reference(text, finish, demonstrations)


def test_an_end_for_an_unknown_reason_costs_the_last_piece_alone() -> None:
    """The pieces before it are whole, and paid."""
    answer = f"{GOOD}\n###\n5. Instruction: Name a metal.\n5. Input:\n<noinput>\n5. Output:\nIr"
    first, last = alpaca.parse(completion(answer, "unknown"), demonstrations=3)
    assert first.record is not None
    assert last.refusal is not None
    assert last.refusal[0] == "cut_off"


@given(texts, st.sampled_from(["stop", "length", "unknown"]))
def test_every_piece_has_a_record_or_a_reason_and_a_place_of_its_own(
    text: str, finish: str
) -> None:
    pieces = alpaca.parse(completion(text, finish), demonstrations=3)
    assert all((piece.record is None) == (piece.refusal is not None) for piece in pieces)
    positions = [piece.position for piece in pieces]
    assert positions == sorted(set(positions))


@pytest.mark.parametrize("start", ["4. Instruction:", "\n4. Instruction:", "###\n4. Instruction:"])
def test_a_chat_model_may_repeat_the_label(start: str) -> None:
    answer = completion(start + GOOD)
    (piece,) = alpaca.parse(answer, demonstrations=3, api="chat")
    assert piece.record == Record(
        instruction="Name the largest planet known.", input="", output="Jupiter"
    )


def task(number: int, instruction: str = "", given: str = "") -> SeedTask:
    return SeedTask(
        id=f"t{number}",
        instruction=instruction or f"Do thing {number}",
        input=given,
        output=f"Done {number}",
    )


def test_prompt_format() -> None:
    """Demonstrations as the reference writes them, behind our own header."""
    tasks = [task(1, instruction="  Sort\n these:  "), task(2, given="b a")]
    prompt = rendered(tasks)
    assert prompt.removeprefix(alpaca.header()) == (
        "###\n1. Instruction: Sort these\n1. Input:\n<noinput>\n1. Output:\nDone 1\n"
        "###\n2. Instruction: Do thing 2\n2. Input:\nb a\n2. Output:\nDone 2\n"
        "###\n3. Instruction:"
    )


def test_a_demonstration_survives_its_own_codec() -> None:
    """What the prompt shows, the parser would read back."""
    entry = shown(4, task(4, given="given")).removeprefix("###\n4. Instruction:")
    (piece,) = alpaca.parse(completion(entry), demonstrations=3)
    assert piece.record == Record(instruction="Do thing 4", input="given", output="Done 4")


def test_sampling_is_a_function_of_seed_and_index() -> None:
    tasks = [task(number) for number in range(20)]

    def draws(seed: int) -> list[list[str]]:
        picked = (Ask(index=index, seed=seed).choose(tasks, 3) for index in range(50))
        return [[task.id for task in three] for three in picked]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert all(len(set(three)) == 3 for three in draws(1))
    assert len({tuple(three) for three in draws(1)}) > 45


def test_scope_takes_the_input_in() -> None:
    """Two records that share an instruction are one by the instruction, two with their inputs."""
    rows = [
        {"instruction": "Translate to German.", "input": given, "output": ""}
        for given in ("Good morning to all of you", "Where is the station, please?", "")
    ]
    narrow, wide = (
        Alpaca(Seeded(tasks=[], scope="instruction")),
        Alpaca(Seeded(tasks=[], scope="instruction+input")),
    )
    assert [narrow.compared(row) for row in rows] == ["Translate to German."] * 3
    assert [wide.compared(row) for row in rows] == [
        "Translate to German.\nGood morning to all of you",
        "Translate to German.\nWhere is the station, please?",
        "Translate to German.",
    ]


def test_requests_have_seeds_of_their_own() -> None:
    def seed(index: int, **more: Any) -> int | None:
        prompt = alpaca_prompts([task(n) for n in range(9)], max_tokens=9, **more).prompt(index)
        assert prompt is not None
        return prompt.sampling.seed

    assert seed(1) == seed(1) != seed(2)
    assert seed(1, send_seed=False) is None


def old_parse(text: str, finish_reason: str, api: str, demonstrations: int) -> list[Piece]:
    """The patterns that the parser had when it took a quadratic time, word for word."""
    first = demonstrations + 1
    repeated = api == "chat" and re.match(rf"\s*(?:###)?\s*(?={first}\.\s+Instruction:)", text)
    text = text[repeated.end() :] if repeated else f"{first}. Instruction:{text}"
    parts = text.split("###")
    pieces = []
    for position, part in enumerate(parts):
        if not part.strip():
            continue
        if finish_reason == "length" and position == len(parts) - 1:
            refusal = ("cut_off", "the answer ended at its token limit")
            pieces.append(Piece(position, None, refusal))
            continue
        fields = re.split(rf"{first + position}\.\s+(Instruction|Input|Output):", part)
        if len(fields) != 7:
            labels = ", ".join(fields[1::2]) or "none"
            refusal = ("bad_format", f"labels numbered {first + position}: {labels}")
            pieces.append(Piece(position, None, refusal))
            continue
        instruction, given_input, output = (fields[at].strip() for at in (2, 4, 6))
        if given_input.lower() == "<noinput>":
            given_input = ""
        record = Record(instruction=instruction, input=given_input, output=output)
        pieces.append(Piece(position, record))
    return pieces


FRAGMENTS = st.sampled_from(
    [
        "4",
        "14",
        "5",
        "05",
        "٤",
        ".",
        "4.",
        "5.",
        " ",
        "\n",
        "\t",
        "\u2003",
        "\x1c",
        "#",
        "##",
        "###",
        " Instruction:",
        "Input:",
        "\nOutput:",
        "4. Instruction:",
        "4. Input:",
        "4. Output:",
        "5. Instruction:",
        "5. Input:",
        "5.\nOutput:",
        "<noinput>",
        "word",
        ":",
        "Instruction",
    ]
)


@given(
    st.lists(FRAGMENTS, max_size=24).map("".join),
    st.sampled_from(["stop", "length"]),
    st.sampled_from(["completions", "chat"]),
)
def test_the_linear_parser_reads_what_the_old_patterns_read(
    text: str, finish_reason: str, api: Any
) -> None:
    """The same pieces, records and details, whatever labels, numbers and blanks stand where."""
    parsed = alpaca.parse(completion(text, finish_reason), demonstrations=3, api=api)
    assert parsed == old_parse(text, finish_reason, api, 3)


MEGABYTE = 1_000_000
"""Less than one on a machine of one's own; what is quadratic takes minutes."""
HOSTILE = {
    "newlines": "\n",
    "spaces": " ",
    "wide_spaces": "\u2003",
    "hashes": "#",
    "separators": "###",
    "separated_blanks": "### ",
    "separated_words": "###x",
    "numbers": "4.",
    "numbers_apart": "4.\n",
    "numbers_far_apart": "4." + "\n" * 1000,
    "digits": "4",
    "labels": "4. Input:",
    "label_names": "Instruction: Input: Output:",
    "records": "###4. Instruction: a b c d 4. Input: 4. Output: e",
    "letters": "a",
    "hyphens": "a-",
    "dots": ".",
    "blocked_words": "graph ",
    "nearly_blocked_words": "go  to",
    "punctuation": "!",
    "surrogates": "\ud83d",
}


@pytest.mark.parametrize("api", ["completions", "chat"])
@pytest.mark.parametrize("fragment", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("before", ["", " ", "4. Instruction: four words of text 4. Input: "])
@pytest.mark.slow
def test_a_megabyte_of_anything_is_parsed_and_filtered_in_no_time(
    before: str, fragment: str, api: Any
) -> None:
    """A model that fell into a loop: time grows with the length, not with its square."""
    text = before + fragment * (MEGABYTE // len(fragment)) + "4. Output: x"
    with in_linear_time():
        for piece in alpaca.parse(completion(text), demonstrations=3, api=api):
            if piece.record is not None:
                first_refusal(piece.record)


@pytest.mark.parametrize("fragment", HOSTILE.values(), ids=HOSTILE.keys())
def test_every_filter_is_linear(fragment: str) -> None:
    """Each by itself, since an earlier one may hide a later one."""
    record = Record(instruction=fragment * (MEGABYTE // len(fragment)), input="", output="")
    for check in ALPACA_FILTERS:
        with in_linear_time():
            check(record)


def test_a_piece_names_some_of_its_labels_and_not_a_hundred_thousand() -> None:
    """The reason is kept in the store."""
    (piece,) = alpaca.parse(completion("4. Input:" * 100_000), demonstrations=3)
    assert piece.refusal is not None
    assert len(piece.refusal[1]) < 200
    assert piece.refusal[1].endswith("Input, …")


def test_an_instruction_of_too_many_tokens_is_refused_by_a_name_of_its_own() -> None:
    """150 words without a space in them can be of any length. 1,000 tokens pass, 1,001 do not, and
    what Alpaca's own filters refuse keeps their reasons.
    """

    def refused(instruction: str) -> str | None:
        refusal = first_refusal(Record(instruction=instruction, input="", output="x"))
        return refusal and refusal[0]

    words = "Say these words again: "  # five tokens
    assert refused(words + "ab" + " b" * 10 + "-c" * 492) is None  # 11 + 2 * 492 + 5
    assert refused(words + "ab" + " b" * 10 + "-c" * 492 + "-") == "too_many_tokens"
    assert refused(words + "-".join("ab" for _ in range(20_000))) == "too_many_tokens"
    assert refused(words + "a" * 32 * 995) is None
    assert refused(words + "a" * 32 * 996) == "too_many_tokens"
    assert refused(words + "的" * 1_000) == "too_many_tokens"
    assert refused("word " * 20_000) == "too_long"
