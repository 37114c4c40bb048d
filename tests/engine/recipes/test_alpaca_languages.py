"""The Alpaca recipe outside English: header, labels, and a parser that takes what models write."""

from __future__ import annotations

from typing import Literal

import pytest

from engine.backends.scripted import alpaca_text
from engine.recipes import alpaca
from engine.recipes.filters import Filters
from engine.recipes.seeds import bundled_seeds, read_seeds
from engine.records import Completion, Record, SeedTask, Usage
from tests.engine.asked import rendered, shown
from tests.linear import in_linear_time

TASKS = read_seeds(bundled_seeds("zh"))


def completion(text: str, finish_reason: str = "stop") -> Completion:
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    return Completion(text=text, finish_reason=finish_reason, usage=usage)


def records(
    text: str, api: Literal["completions", "chat"] = "completions", language: str = "zh"
) -> list[Record]:
    pieces = alpaca.parse(completion(text), demonstrations=3, api=api, language=language)
    return [piece.record for piece in pieces if piece.record]


WANTED = [
    Record(instruction="写一首关于秋天的诗", input="", output="秋风起，白云飞。"),
    Record(instruction="把句子译成英文", input="你好，世界", output="Hello, world"),
]


@pytest.mark.parametrize(
    "text",
    [
        "写一首关于秋天的诗\n4. 输入：\n<无输入>\n4. 输出：\n秋风起，白云飞。\n###\n"
        "5. 指令：把句子译成英文\n5. 输入：\n你好，世界\n5. 输出：\nHello, world",
        # Full-width digits, dots, separators; half-width colons.
        "写一首关于秋天的诗\n４．输入:\n<noinput>\n４．输出:\n秋风起，白云飞。\n＃＃＃\n"
        "５．指令:把句子译成英文\n５．输入:\n你好，世界\n５．输出:\nHello, world",
        # English labels, in full and in part.
        " 写一首关于秋天的诗\n4. Input:\n<noinput>\n4. Output:\n秋风起，白云飞。\n###\n"
        "5. Instruction: 把句子译成英文\n5. 输入：\n你好，世界\n5. Output：\nHello, world",
        "写一首关于秋天的诗\n4、输入：无\n4、输出：秋风起，白云飞。\n### 5。指令 ：把句子译成英文\n"
        "5.輸入：你好，世界\n5.輸出：Hello, world",
    ],
)
def test_labels_of_any_width_and_both_languages_are_read(text: str) -> None:
    assert records(text) == WANTED


@pytest.mark.parametrize("opening", ["4. 指令：", "＃＃＃\n４．指令:", "###\n4. Instruction: "])
def test_a_chat_model_may_repeat_the_opening(opening: str) -> None:
    answer = f"{opening}写一首诗\n4. 输入：\n<无输入>\n4. 输出：\n好"
    (record,) = records(answer, api="chat")
    assert record == Record(instruction="写一首诗", input="", output="好")
    assert records(answer, api="completions") == []


def test_in_english_only_alpacas_own_labels_are_read() -> None:
    """Or a record would be accepted that the reference refuses."""
    answer = "写一首诗\n4. 输入：\n<无输入>\n4. 输出：\n好"
    assert records(answer, language="en") == []
    wide = " Name a colour here\n４. Input:\n<noinput>\n４. Output:\nRed"
    assert records(wide, language="en") == []
    lenient = [Record(instruction="Name a colour here", input="", output="Red")]
    assert records(wide, language="fr") == lenient


def test_labels_with_another_number_are_text() -> None:
    text = "解释清单\n4. 输入：\n3. 输出：这是正文\n4. 输出：\n好"
    (record,) = records(text)
    assert record["input"] == "3. 输出：这是正文"


def test_every_chinese_task_comes_back_from_its_demonstration() -> None:
    """The prompt teaches a form that the parser reads."""
    for task in TASKS:
        entry = shown(4, task, "zh").removeprefix("###\n4. 指令：")
        (record,) = records(entry)
        assert tuple(record.values()) == (
            task.instruction.rstrip("："),
            task.input,
            task.output,
        )


def test_the_chinese_prompt() -> None:
    prompt = rendered(TASKS[:3], "zh")
    assert prompt.startswith(alpaca.header("zh"))
    assert prompt.endswith("###\n4. 指令：")
    body = prompt.removeprefix(alpaca.header("zh"))
    assert "Instruction" not in body
    assert "20 项任务" in alpaca.header("zh")


def test_the_scripted_backend_goes_on_in_the_prompts_language() -> None:
    """Its records pass the Chinese filters, and the parser reads them all."""
    answer = alpaca_text(rendered(TASKS[:3], "zh"), seed=1, records=5)
    found = records(answer)
    assert len(found) == 5
    assert all(Filters("zh").refusal(record) is None for record in found)
    english = alpaca_text(rendered(TASKS[:3]), seed=1)
    assert "指令" not in english


def test_other_languages_are_named_in_the_english_header() -> None:
    english = alpaca.header()
    assert alpaca.header("ja") == english.replace("is in English", "is in Japanese")
    assert "language of one of the tasks shown" in alpaca.header("mul")
    task = SeedTask(id="a", instruction="Été", input="", output="x")
    assert alpaca.demonstration(1, task, "fr") == alpaca.demonstration(1, task)


@pytest.mark.parametrize(
    "part", ["4. 输入：", ".", "4.", "．" * 3, " ", "＃＃", "4. ", "。、", "指令：", "\n4．\n"]
)
def test_time_is_linear_whatever_the_model_repeats(part: str) -> None:
    for api in ("completions", "chat"):
        with in_linear_time():
            records(part * (600_000 // len(part)), api=api)
