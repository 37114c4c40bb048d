"""Thoughts told from answers, whichever model's tags they stand between."""

from __future__ import annotations

import pytest

from engine.records import Completion, Usage
from engine.thoughts import BARE, OPENING, TAGS, is_thoughts_only, thoughts_apart
from tests.linear import in_linear_time

RECORD = " Name a colour.\n4. Input:\n<noinput>\n4. Output:\nRed."


def completion(text: str, *, reasoning: str = "", reasoning_tokens: int = 0) -> Completion:
    usage = Usage(prompt_tokens=1, completion_tokens=9, reasoning_tokens=reasoning_tokens)
    return Completion(text=text, finish_reason="stop", usage=usage, reasoning=reasoning)


@pytest.mark.parametrize(("opening", "closing"), TAGS.items(), ids=TAGS)
@pytest.mark.parametrize("before", ["", "\n\n "], ids=["at the start", "after blanks"])
def test_a_leading_thought_is_apart(opening: str, closing: str, before: str) -> None:
    """Tag and thought leave the text, whatever the tag; the answer keeps its every character."""
    apart = thoughts_apart(completion(f"{before}{opening}\nA list? Yes.\n{closing}{RECORD}"))
    assert apart.text == RECORD
    assert apart.reasoning == "A list? Yes."
    assert thoughts_apart(apart) == apart


@pytest.mark.parametrize("closing", [c for c in TAGS.values() if BARE.fullmatch(c)])
def test_a_thought_whose_tag_the_template_opened_is_apart(closing: str) -> None:
    """The text begins with the thought and has only the closing tag."""
    apart = thoughts_apart(completion(f"A list? Yes.{closing}\n\n{RECORD}"))
    assert (apart.text, apart.reasoning) == (f"\n\n{RECORD}", "A list? Yes.")
    assert OPENING[closing] in TAGS


@pytest.mark.parametrize("opening", TAGS)
def test_a_thought_without_an_end_leaves_no_answer(opening: str) -> None:
    """The token limit fell into it."""
    apart = thoughts_apart(completion(f"{opening}Let me see whether"))
    assert (apart.text, apart.reasoning) == ("", "Let me see whether")
    assert is_thoughts_only(apart)


SPLITS = [
    ("several in a row", "<think>one</think>\n<think>two</think>\nyes", "\nyes", "one\n\ntwo"),
    ("of two kinds", "<think>one</think><reasoning>two</reasoning>yes", "yes", "one\n\ntwo"),
    ("an empty one", "<think>\n\n</think>\n\nyes", "\n\nyes", ""),
    ("an opening tag within", "<think>is <think> a tag?</think>yes", "yes", "is <think> a tag?"),
    ("closed once more", "one</think>two</think>yes", "yes", "one\n\ntwo"),
    ("none", "yes", "yes", ""),
    ("blank", " \n", " \n", ""),
    ("within the answer", "Write <think>so</think> first.", "Write <think>so</think> first.", ""),
    ("opened within the answer", "yes, <think>then", "yes, <think>then", ""),
    ("after the answer", "yes<think>was it?</think>", "yes<think>was it?</think>", ""),
    ("another model's closing tag", "</b>yes</thinking>", "</b>yes</thinking>", ""),
    ("gpt-oss", "<|channel|>analysis<|message|>so<|channel|>final<|message|>yes", "yes", "so"),
]


@pytest.mark.parametrize(
    ("text", "answer", "thought"), [pytest.param(*row[1:], id=row[0]) for row in SPLITS]
)
def test_splits(text: str, answer: str, thought: str) -> None:
    """A pair of tags within the answer is its subject; what leads is a thought."""
    apart = thoughts_apart(completion(text))
    assert (apart.text, apart.reasoning) == (answer, thought)


def test_thoughts_that_came_beside_the_text_stay_first() -> None:
    apart = thoughts_apart(completion("<think>two</think>yes", reasoning="one"))
    assert (apart.text, apart.reasoning) == ("yes", "one\n\ntwo")


@pytest.mark.parametrize(
    ("text", "reasoning", "reasoning_tokens", "only"),
    [
        ("", "hm", 0, True),
        (" \n", "hm", 0, True),
        ("", "", 64, True),
        ("yes", "hm", 64, False),
        ("", "", 0, False),
    ],
)
def test_thoughts_without_an_answer(
    text: str, reasoning: str, reasoning_tokens: int, only: bool
) -> None:
    """OpenAI's thoughts are counted and never shown."""
    thought = completion(text, reasoning=reasoning, reasoning_tokens=reasoning_tokens)
    assert is_thoughts_only(thought) is only


@pytest.mark.parametrize(
    "unit",
    ["<think>", "</think>", "<think>a</think>", "<", "\n", "a </think> <think> ", "[THINK]"],
)
def test_a_megabyte_of_tags_is_read_in_linear_time(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    with in_linear_time():
        thoughts_apart(completion(text))
