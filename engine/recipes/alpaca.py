"""The Alpaca recipe: a numbered list of tasks that the model continues, and the parser of its
continuation.

Format and decisions are those of Stanford Alpaca's ``encode_prompt`` and
``post_process_gpt3_response`` (https://github.com/tatsu-lab/stanford_alpaca,
generate_instruction.py); the header text is our own. Its parser is kept with its edges (labels are
not anchored to a line, their order is not checked), because a record that one of the two accepts
and the other refuses would make results incomparable.

Outside English the parser is more lenient, as models are with what they copy: it takes the labels
of any language here, full-width digits, dots and colons, and ``＃＃＃``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from engine.languages import ENGLISH, MIXED, language_of
from engine.recipes.base import CUT, Ask, Part, Piece, Recipe, Reference, Refusal
from engine.recipes.filters import Filters
from engine.records import Completion, Record, SeedTask

__all__ = ["Alpaca", "Scope", "Seeded", "compared_text", "demonstration", "header", "parse", "tail"]

LAST_NUMBER = 20
"""Tasks of a list, the demonstrations among them; the header asks for as many."""
MOST_RECORDS = LAST_NUMBER - 1
"""Records that one answer can hold at most; paces the first requests."""
STOP = (f"\n{LAST_NUMBER}", f"{LAST_NUMBER}.")
"""Alpaca's: the answer ends where the last number begins, so that task is never written."""
SAMPLING = {"stop": STOP, "forbid_eos": True}
"""An end of text is forbidden, as by Alpaca's ``logit_bias``: the list must go on until it is full.
"""
Scope = Literal["instruction", "instruction+input"]

_HEADER = """\
Write a varied list of 20 tasks for a text-only assistant. Someone will hand each task to the assistant and \
judge how well it is carried out.

What the list must be like:
1. No two tasks open with the same verb; spread the verbs as widely as you can.
2. Change the wording too: some tasks are orders, some are questions, some describe a situation first.
3. Cover many kinds of work: open answers, classification, rewriting, extraction, reasoning, planning, code.
4. A language model must be able to do each task with text alone: nothing to see, hear, show or click, and no \
alarm, reminder or action in the world.
5. Everything is in English.
6. An instruction is one or two sentences long.
7. Where a task needs material, give it as the input: realistic, specific, no placeholder, at most 100 words.
8. Where a task needs no material, as with general questions, the input is exactly "<noinput>".
9. The output answers the instruction and its input fully and correctly, in fewer than 100 words.

List of 20 tasks:
"""
"""What the model is asked for, above the demonstrations. Alpaca asks for the same in its own words.
"""


_HEADER_ZH = """\
请为一个只会处理文字的助手编写一份内容丰富的清单，共 20 项任务。每一项都会交给这个助手去完成，再由人评判完成得好不好。

对这份清单的要求：
1. 各项任务开头的动词不要重复，动词的范围越广越好。
2. 说法也要多样：有的是直接的要求，有的是提问，有的先交代情形再提出任务。
3. 覆盖各类工作：开放问答、分类、改写、信息提取、推理、制订计划、编写代码等。
4. 任务必须仅凭文字就能完成：不需要看、听、展示或点击任何东西，也不需要在现实世界里设闹钟、发提醒或执行操作。
5. 全部使用自然、地道的中文。
6. 每条指令只有一到两句话。
7. 任务需要材料时，写在输入里：内容真实具体，不用占位符，不超过 150 字。
8. 任务不需要材料时（例如一般性的问题），输入处只写“<无输入>”。
9. 输出要完整、正确地回应指令和输入，不超过 200 字。

20 项任务的清单：
"""
"""The same in Chinese."""


@dataclass(frozen=True, slots=True)
class Labels:
    """How the parts of an entry are named."""

    instruction: str
    input: str
    output: str
    nothing: str
    """In the place of an input."""


_ENGLISH = Labels("Instruction:", "Input:", "Output:", "<noinput>")
"""Alpaca's labels, and what stands for an input that is empty."""
_LABELS = {"zh": Labels("指令：", "输入：", "输出：", "<无输入>")}
"""Labels of languages whose demonstrations are not labelled in English."""
_NO_INPUT = frozenset(
    (
        "<noinput>",
        "noinput",
        "<无输入>",
        "无输入",
        "<無輸入>",
        "無輸入",
        "<无>",
        "（无）",
        "(无)",
        "无",
    )
)
"""What models write, in lower case, where there is no input; the first is Alpaca's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeded:
    """What the recipe is made with.

    Attributes:
        tasks: seed tasks, of which each prompt shows some.
        demonstrations: how many it shows.
        language: what prompts are written in, and answers parsed as.
        filters: what is refused at sight; None: as the language has it.
        scope: what of a row is compared.
    """

    tasks: Sequence[SeedTask]
    demonstrations: int = 3
    language: str = ENGLISH
    filters: Filters | None = None
    scope: Scope = "instruction"


class Alpaca(Recipe):
    """Demonstrations in, a longer list out; see the head of this file."""

    name = "alpaca"
    fields = ("instruction", "input", "output")
    asks = "any"
    most = MOST_RECORDS
    builtin = True
    takes_seeds = True

    def __init__(self, seeded: Seeded) -> None:
        self._seeded = seeded
        self._filters = seeded.filters or Filters(seeded.language)
        self._shown: dict[tuple[int, str], Part] = {}
        language = seeded.language
        self._header = Part(header(language))
        self._tail = Part(lambda left: tail(left, language))

    def prompt(self, ask: Ask) -> list[Part]:
        tasks = ask.choose(self._seeded.tasks, self._seeded.demonstrations)
        shown = [self._demonstration(number, task) for number, task in enumerate(tasks, 1)]
        return [self._header, *shown, self._tail]

    def _demonstration(self, number: int, task: SeedTask) -> Part:
        part = self._shown.get((number, task.id))
        if part is None:
            part = self._shown[number, task.id] = demonstration(number, task, self._seeded.language)
        return part

    def recurring(self) -> Iterable[str]:
        yield self._header.render(0)
        for left in range(1, self._seeded.demonstrations + 1):
            yield self._tail.render(left)
            for task in self._seeded.tasks:
                yield self._demonstration(left, task).render(left)

    def sampling(self, ask: Ask) -> Mapping[str, Any]:
        return SAMPLING

    def parse(self, ask: Ask, answer: Completion) -> list[Piece]:
        return parse(
            answer,
            demonstrations=len(ask.shown),
            api=answer.api or "completions",
            language=self._seeded.language,
        )

    def refuse(self, row: Record) -> Refusal | None:
        return self._filters.refusal(row)

    def compared(self, row: Record) -> str:
        return compared_text(self._seeded.scope, row["instruction"], row["input"])

    def references(self) -> Iterator[Reference]:
        for task in self._seeded.tasks:
            text = compared_text(self._seeded.scope, task.instruction, task.input)
            yield text, f"seed:{task.id}"


def compared_text(scope: Scope, instruction: str, input: str) -> str:
    """What is compared of a record: its instruction, or instruction and input on two lines."""
    return f"{instruction}\n{input}" if scope == "instruction+input" and input else instruction


def header(language: str = ENGLISH) -> str:
    """What every prompt begins with; the same bytes each time, so that prefix caches hit.

    Chinese has a header of its own; another language is named in the English one.
    """
    if language == "zh":
        return _HEADER_ZH
    if language == ENGLISH:
        return _HEADER
    wanted = f"Everything is in {language_of(language).name}"
    if language == MIXED:
        wanted = "Each task is in the language of one of the tasks shown"
    return _HEADER.replace("Everything is in English", wanted)


def demonstration(number: int, task: SeedTask, language: str = ENGLISH) -> Part:
    """One task as an entry of the list; its input may be shortened."""
    labels = _LABELS.get(language, _ENGLISH)
    colons = ":" if labels is _ENGLISH else ":："
    instruction = re.sub(r"\s+", " ", task.instruction).strip().rstrip(colons)
    space = " " if labels is _ENGLISH else ""
    before = f"###\n{number}. {labels.instruction}{space}{instruction}\n{number}. {labels.input}\n"
    text = f"{before}{task.input or labels.nothing}\n{number}. {labels.output}\n{task.output}\n"
    core = (len(before), len(before) + len(task.input)) if task.input else None
    return Part(text, "drop", source=task.id, core=core)


def tail(demonstrations: int, language: str = ENGLISH) -> str:
    """What the prompt ends with, and the model goes on from."""
    return f"###\n{demonstrations + 1}. {_LABELS.get(language, _ENGLISH).instruction}"


_OPENING = re.compile(r"\s*+(?:###)?+\s*+([0-9]+)\.\s++Instruction:")
_LABEL = re.compile(r"\.\s++(Instruction|Input|Output):")
"""Behind the number of an entry: ``. Instruction:``. Not anchored to a line, as Alpaca's is not."""
# The same as models write them in other languages; here too each repetition is possessive, or a
# run of dots or spaces would take time with the square of its length.
_ANY_OPENING = re.compile(
    r"\s*+(?:###|＃＃＃)?+\s*+([0-9０-９]{1,9}+)[.．。、]\s*+(?:Instruction|指令)\s*+[:：]"
)
_ANY_LABEL = re.compile(
    r"[.．。、]\s*+(Instruction|Input|Output|指令|输入|輸入|输出|輸出)\s*+[:：]"
)
"""The same in any language here, with full-width signs: ``．指令：``."""
_ANY_SEPARATOR = re.compile("###|＃＃＃")
_TO_ASCII = {ord(wide): str(digit) for digit, wide in enumerate("０１２３４５６７８９")}
"""Full-width digits, for ``str.translate``."""
FEW_NUMBERS = 64
"""Numbers whose labels have a pattern of their own."""
MOST_LABELS_SHOWN = 12
"""Labels of a piece that its refusal names."""


def parse(
    completion: Completion,
    *,
    demonstrations: int,
    api: Literal["completions", "chat"] = "completions",
    language: str = ENGLISH,
) -> list[Piece]:
    """Split an answer into records, in English exactly as the reference does; a blank piece is no
    piece.

    A chat model is not bound to continue the text: where it repeats the opening label itself, it is
    not set before the answer a second time.

    The time is linear in the length of the answer, whatever it holds: a model that has fallen into
    a loop must not stop the process that decides.
    """
    first = demonstrations + 1
    strict = language == ENGLISH
    text = _continued(completion.text, first, api, language)
    parts = text.split("###") if strict else _ANY_SEPARATOR.split(text)
    cut = len(parts) - 1 if completion.finish_reason in CUT else None
    pieces = []
    for position, part in enumerate(parts):
        if not part or part.isspace():
            continue
        if position == cut:
            pieces.append(Piece(position, None, ("cut_off", CUT[completion.finish_reason])))
            continue
        if strict and first + position <= FEW_NUMBERS:  # three times as fast
            around = _labelled(first + position).split(part)
            fields, labels = around[::2], around[1::2]
        else:
            fields, labels = _split(part, first + position, _LABEL if strict else _ANY_LABEL)
        if len(labels) != 3:
            shown = ", ".join(labels[:MOST_LABELS_SHOWN]) or "none"
            more = ", …" if len(labels) > MOST_LABELS_SHOWN else ""
            detail = f"labels numbered {first + position}: {shown}{more}"
            pieces.append(Piece(position, None, ("bad_format", detail)))
            continue
        instruction, given, output = (field.strip() for field in fields[1:])
        if given.lower() == "<noinput>" or (not strict and given.lower() in _NO_INPUT):
            given = ""
        pieces.append(Piece(position, Record(instruction=instruction, input=given, output=output)))
    return pieces


def _continued(
    text: str, first: int, api: Literal["completions", "chat"], language: str = ENGLISH
) -> str:
    """The answer with its opening label, which the prompt ended with or the answer repeats."""
    if api == "chat":
        opening = (_OPENING if language == ENGLISH else _ANY_OPENING).match(text)
        if opening and opening.group(1).translate(_TO_ASCII) == str(first):
            return text[opening.start(1) :]
    return f"{first}. Instruction:{text}"


@lru_cache(maxsize=FEW_NUMBERS)
def _labelled(number: int) -> re.Pattern[str]:
    """The labels of piece ``number``, one of few: an answer can hold 250,000 pieces."""
    return re.compile(rf"{number}\.\s++(Instruction|Input|Output):")


def _split(part: str, number: int, pattern: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """What stands around the labels numbered ``number``, and those labels.

    A number is looked for before each label rather than by a pattern for each number: an answer of
    a megabyte can hold 250,000 pieces. Like the reference, this finds "4." within "14." too.
    """
    if ":" not in part and "：" not in part:
        return [part], []
    digits = str(number)
    fields, labels, end = [], [], 0
    for label in pattern.finditer(part):
        before = part[max(end, label.start() - len(digits)) : label.start()]
        if before == digits or (pattern is not _LABEL and before.translate(_TO_ASCII) == digits):
            fields.append(part[end : label.start() - len(digits)])
            labels.append(label.group(1))
            end = label.end()
    fields.append(part[end:])
    return fields, labels
