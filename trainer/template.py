"""Lay a record out as text, and say which parts of it are learned.

Alpaca's text is an interchange format: models in the wild expect it byte for byte. For chats the
model's own chat template is rendered (trainer/chat.py), and what is learned are the assistant's
turns with whatever the template puts behind them, since that is what must be generated.

Text of a record may hold the spelling of a special token (``<|im_end|>``, ``</s>``). A tokenizer
would turn it into the real token, and a record could end its own turn and open another. Such
stretches are handed on as ``literal``: tokenised as ordinary characters.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from trainer.chat import ChatRow, ChatTemplate
from trainer.errors import ConfigError
from trainer.examples import Conversation, Example, Message, Text, alpaca_prompt, question

__all__ = ["Piece", "Template", "alpaca_prompt"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text that is learned as a whole or not at all."""

    text: str
    learned: bool
    literal: bool = False
    """Spells a special token without meaning it."""


class Template:
    """Renders records for one tokenizer.

    Args:
        tokenizer: of transformers; its chat template and special tokens are used.
        kind: ``alpaca``, ``chat``, or ``auto``: chats as chats, instructions as Alpaca does.
    """

    def __init__(self, tokenizer: Any, kind: Literal["auto", "alpaca", "chat"]) -> None:
        if kind == "chat" and not tokenizer.chat_template:
            raise ConfigError(
                "--template chat: the tokenizer has no chat template; use --template alpaca"
            )
        self._has_chat_template = bool(tokenizer.chat_template)
        self._kind = kind
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        special |= set(tokenizer.all_special_tokens)
        longest_first = sorted(map(re.escape, special), key=len, reverse=True)
        self._special = re.compile("|".join(longest_first) or "(?!)")
        # The characters that stand for a hidden spelling are hidden themselves.
        self._hidden = re.compile("|".join([*longest_first, "[\uf8f0\uf8f1]"]))
        self._chats = ChatTemplate(tokenizer, self._special)

    @property
    def notes(self) -> Counter[str]:
        """What a person should know about how records were laid out, and of how many it is so."""
        return self._chats.notes

    def is_chat(self, example: Example) -> bool:
        """Whether the model's chat template lays ``example`` out."""
        if self._kind == "auto":
            return isinstance(example, Conversation)
        # Text without a prompt holds no question that a chat could ask.
        return self._kind == "chat" and not (isinstance(example, Text) and not example.prompt)

    def rows(self, example: Example) -> list[list[Piece]]:
        """The training rows of ``example``, each as its stretches in order: one, or several of a
        chat whose answers are asked for in other words than its template finishes them with. The
        end-of-text token of Alpaca's layout is not among them.

        Raises:
            ConfigError: a chat, and no template for it.
            DataError: the chat template refuses the record, or leaves out something of it.
        """
        if self.is_chat(example):
            return self._chat(example)
        if isinstance(example, Conversation):
            raise ConfigError(
                f"{example.name}: is a conversation, which --template alpaca cannot lay out; use"
                " --template chat"
            )
        if isinstance(example, Text):
            opening = self._split(example.prompt, False) if example.prompt else ()
            return [[*opening, *self._split(example.completion, True)]]
        prompt = alpaca_prompt(example.instruction, example.input)
        return [[*self._split(prompt, False), *self._split(example.output, True)]]

    def _split(self, text: str, learned: bool) -> Iterator[Piece]:
        """``text`` of a record: its special spellings apart, as literals."""
        start = 0
        for match in self._special.finditer(text):
            if match.start() > start:
                yield Piece(text[start : match.start()], learned)
            yield Piece(match.group(), learned, literal=True)
            start = match.end()
        if start < len(text) or not text:
            yield Piece(text[start:], learned)

    def _chat(self, example: Example) -> list[list[Piece]]:
        if not self._has_chat_template:
            raise ConfigError(
                f"{example.name}: is a conversation, and the tokenizer has no chat template; give"
                " one with --chat_template"
            )
        # What a record spells of special tokens becomes private characters before the template is
        # rendered, and a literal piece after it.
        hidden: list[str] = []

        def hide(match: re.Match[str]) -> str:
            hidden.append(match.group())
            return f"\uf8f0{len(hidden) - 1}\uf8f1"

        def hidden_in(value: Any) -> Any:
            return _inside(value, lambda text: self._hidden.sub(hide, text))

        messages = [
            replace(
                message,
                content=hidden_in(message.content),
                reasoning_content=hidden_in(message.reasoning_content),
                tool_calls=hidden_in(message.tool_calls),
            )
            for message in _as_messages(example)
        ]
        variables: dict[str, Any] = {}
        if isinstance(example, Conversation):
            variables |= example.template_kwargs
            if example.tools:
                variables["tools"] = hidden_in(list(example.tools))
        rows = self._chats.rows(example.name, messages, variables)
        return [list(_revealed(row, hidden)) for row in rows]


def _as_messages(example: Example) -> tuple[Message, ...]:
    if isinstance(example, Conversation):
        return example.messages
    if isinstance(example, Text):
        return Message("user", example.prompt), Message("assistant", example.completion)
    asked = question(example.instruction, example.input)
    return Message("user", asked), Message("assistant", example.output)


def _inside(value: Any, change: Callable[[str], str]) -> Any:
    """``value`` with every text inside of it changed; the keys of objects stay as they are."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _inside(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_inside(inner, change) for inner in value)
    return value


def _revealed(row: ChatRow, hidden: list[str]) -> Iterator[Piece]:
    edges = sorted({0, len(row.text), *(edge for span in row.learned for edge in span)})
    for start, end in itertools.pairwise(edges):
        learned = any(a <= start and end <= b for a, b in row.learned)
        for index, part in enumerate(re.split("\uf8f0(\\d+)\uf8f1", row.text[start:end])):
            if index % 2:
                yield Piece(hidden[int(part)], learned, literal=True)
            elif part:
                yield Piece(part, learned)
