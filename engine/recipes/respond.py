"""Respond: an instruction, a question or a whole chat in; an answer of the model out.

Input rows may have ``messages`` (or ``conversations``), of which the last turns that are not the
assistant's are answered; ``instruction`` with an ``input``; or one of ``question``, ``prompt``,
``problem`` and ``query``. A row's own ``system`` goes before the option's. Every row comes out with
``instruction``, ``input`` and ``output`` as Alpaca has them, the thoughts in ``reasoning``, and all
turns in ``messages``.

It is the second half of most published recipes: Magpie's gen_res.py
(https://github.com/magpie-align/magpie, MIT; chat template, temperature 0, 4,096 tokens), Open-R1's
and OpenThoughts' n answers to a problem (https://github.com/huggingface/open-r1, Apache-2.0;
https://github.com/open-thoughts/open-thoughts, Apache-2.0). Departures: a failed one of n answers
costs that answer alone, not the row; an answer that the token limit cut is refused; sampling is the
person's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from engine.recipes.base import CUT, QUESTIONS, Ask, Part, Piece, Recipe, Role
from engine.recipes.guard import NotAsked, RecipeFault
from engine.records import Completion, Record

__all__ = ["Respond", "input_of", "question_of"]

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""Roles of chats, in OpenAI's words and in ShareGPT's."""
Turn = tuple[Role, str]


class Respond(Recipe):
    """See the head of this file.

    Args:
        system: goes before every chat that has no system turn of its own; empty: none.
    """

    name = "respond"
    fields = ("instruction", "input", "output", "reasoning", "messages")
    needs_rows = True
    builtin = True
    OPTIONS: ClassVar[dict[str, Any]] = {"system": ""}

    def __init__(self, *, system: str = "") -> None:
        self._system = system

    def prompt(self, ask: Ask) -> list[Part]:
        try:
            return [Part(content, role=role) for role, content in self._turns(ask)]
        except RecipeFault as fault:  # of the row, and not of the recipe
            raise NotAsked(str(fault)) from fault

    def parse(self, ask: Ask, answer: Completion) -> Iterator[Piece]:
        if answer.finish_reason in CUT:
            yield Piece(0, None, ("cut_off", CUT[answer.finish_reason]))
        elif text := answer.text.strip():
            row, asked = ask.row or {}, self._turns(ask)
            alone = not isinstance(_chat(row), list)
            record = {
                "instruction": question_of(row) if alone else asked[-1][1],
                "input": input_of(row) if alone else "",
                "output": text,
                "reasoning": answer.reasoning,
                "messages": [
                    {"role": role, "content": content}
                    for role, content in [*asked, ("assistant", text)]
                ],
            }
            yield Piece(0, record)

    def _turns(self, ask: Ask) -> list[Turn]:
        """The chat that is answered. Raises RecipeFault where the row has none."""
        row = ask.row or {}
        chat = _chat(row)
        if isinstance(chat, list):
            turns = [_turn(turn) for turn in chat]
            while turns and turns[-1][0] == "assistant":
                turns.pop()
        else:
            given = input_of(row)
            turns = [("user", f"{question_of(row)}\n\n{given}" if given else question_of(row))]
        if not turns or turns[-1][0] != "user":
            raise RecipeFault("the row's messages have no turn of the user to answer")
        own = row.get("system")
        system = own if isinstance(own, str) and own.strip() else self._system
        if turns[0][0] == "system" or not system.strip():
            return turns
        return [("system", system), *turns]


def _chat(row: Record) -> Any:
    return row.get("messages") or row.get("conversations")


def _turn(turn: Any) -> Turn:
    values: Mapping[str, Any] = turn if isinstance(turn, dict) else {}
    role = ROLES.get(str(values.get("role") or values.get("from")))
    content = values.get("content", values.get("value"))
    if role is None:
        raise RecipeFault(
            f"a turn of the row is {values.get('role') or values.get('from')!r}'s; there are "
            "system, user and assistant"
        )
    if isinstance(content, list):  # parts, as OpenAI has them
        content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
    if not isinstance(content, str) or not content.strip():
        raise RecipeFault(f"a turn of the row ({role}) has no text")
    return role, content


def question_of(row: Record) -> str:
    for name in QUESTIONS:
        if isinstance(text := row.get(name), str) and text.strip():
            return text
    for name in QUESTIONS:
        if name in row:
            blank = row[name] is None or isinstance(row[name], str)
            raise RecipeFault(f"the row's {name} is {'blank' if blank else 'not text'}")
    raise RecipeFault(
        f"the row has none of messages, {', '.join(QUESTIONS)}; name the column so, it has "
        f"{', '.join(row) or 'nothing'}"
    )


def input_of(row: Record) -> str:
    given = row.get("input")
    return given if isinstance(given, str) and given.strip() else ""
