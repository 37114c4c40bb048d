"""Lay a record out as text, and say which parts of it are learned.

Alpaca's text is an interchange format: models in the wild expect it byte for byte. For chats the
model's own chat template is rendered, and what is learned are the assistant's turns with whatever
the template puts behind them, since that is what must be generated.

Text of a record may hold the spelling of a special token (``<|im_end|>``, ``</s>``). A tokenizer
would turn it into the real token, and a record could end its own turn and open another. Such
stretches are handed on as ``literal``: tokenised as ordinary characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainer.errors import ConfigError, DataError
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
        self._tokenizer = tokenizer
        self._kind = kind
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        special |= set(tokenizer.all_special_tokens)
        longest_first = sorted(map(re.escape, special), key=len, reverse=True)
        self._special = re.compile("|".join(longest_first) or "(?!)")

    def is_chat(self, example: Example) -> bool:
        """Whether the model's chat template lays ``example`` out."""
        if self._kind == "auto":
            return isinstance(example, Conversation)
        # Text without a prompt holds no question that a chat could ask.
        return self._kind == "chat" and not (isinstance(example, Text) and not example.prompt)

    def pieces(self, example: Example) -> list[Piece]:
        """The stretches of ``example`` in order. The end-of-text token of Alpaca's layout is not
        among them.

        Raises:
            ConfigError: a chat, and no template for it.
            DataError: the chat template refuses the record, or does not lay turns end to end.
        """
        if self.is_chat(example):
            return list(self._chat(example))
        if isinstance(example, Conversation):
            raise ConfigError(
                f"{example.name}: is a conversation, which --template alpaca cannot lay out; use"
                " --template chat"
            )
        if isinstance(example, Text):
            opening = self._split(example.prompt, False) if example.prompt else ()
            return [*opening, *self._split(example.completion, True)]
        prompt = alpaca_prompt(example.instruction, example.input)
        return [*self._split(prompt, False), *self._split(example.output, True)]

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

    def _chat(self, example: Example) -> Iterator[Piece]:
        if not self._tokenizer.chat_template:
            raise ConfigError(
                f"{example.name}: is a conversation, and the tokenizer has no chat template"
            )
        messages = _as_messages(example)
        # What a record spells of special tokens becomes private characters before the template is
        # rendered, and a literal piece after it.
        hidden: list[str] = []

        def hide(match: re.Match[str]) -> str:
            hidden.append(match.group())
            return f"\uf8f0{len(hidden) - 1}\uf8f1"

        turns = [_inside(m.as_dict(), lambda text: self._special.sub(hide, text)) for m in messages]
        variables: dict[str, Any] = {}
        if isinstance(example, Conversation):
            variables |= example.template_kwargs
            if example.tools:
                variables["tools"] = list(example.tools)
        done = ""
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = self._render(example.name, turns[:index], variables, prompt=True)
            after = self._render(example.name, turns[: index + 1], variables, prompt=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise DataError(
                    f"{example.name}: the chat template does not lay its turns end to end, so what"
                    " the assistant said cannot be told apart; split it into one answer a record"
                )
            yield from _reveal(before[len(done) :], False, hidden)
            yield from _reveal(after[len(before) :], messages[index].learned, hidden)
            done = after

    def _render(
        self, name: str, turns: Sequence[Any], variables: dict[str, Any], *, prompt: bool
    ) -> str:
        import jinja2

        try:
            text = self._tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=prompt, **variables
            )
        except (jinja2.TemplateError, TypeError) as exc:
            raise DataError(f"{name}: the chat template refuses it: {exc}") from exc
        assert isinstance(text, str)
        return text


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
        return [_inside(inner, change) for inner in value]
    return value


def _reveal(text: str, learned: bool, hidden: list[str]) -> Iterator[Piece]:
    parts = re.split("\uf8f0(\\d+)\uf8f1", text)
    for index, part in enumerate(parts):
        if index % 2:
            yield Piece(hidden[int(part)], learned, literal=True)
        elif part:
            yield Piece(part, learned)
