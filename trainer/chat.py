"""Find, in a chat that its template has rendered, what the assistant said, for any template.

A template is a program: it may strip the thinking of earlier turns (Qwen3), end the last turn
otherwise than the others (gpt-oss, Phi-3), move the system prompt to the last question (Mistral),
open an answer with ``<think>`` (DeepSeek), or end an answer in the next turn's first token (GLM).
Nothing is known about any of them here. A chat is rendered as a server would render it, up to each
question and up to each answer, and the renderings are compared:

* What stands behind the question's rendering, in the answer's, is what the model generates there.
* Where the rendering of the whole chat holds all of this unchanged, the chat is one training row.
* Where it does not, the chat is split: one row for each such answer, each as inference sees it.
* What was to be learned and cannot be found in the row is an error, never a shorter record.

The price: two renderings an answer; and a chat whose history is rewritten costs the tokens of that
history once for each of its answers.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.errors import DataError
from trainer.examples import Message

__all__ = ["ChatRow", "ChatTemplate"]

_SPLIT = (
    "the chat template renders earlier turns otherwise than later ones: split, one training row for"
    " each answer as it is asked for"
)
"""What a person is told of how a template was dealt with; each note once, with a count of chats."""
_COMPOSED = (
    "the chat template renders a question otherwise once it is answered: rows are put together from"
    " the question as asked and the answer"
)
"""The text that is learned is then one that no rendering has as a whole."""
_OPENED = (
    "the chat template asks for answers with {}, which these answers do not begin with: they are"
    " learned without it"
)
"""With the opening itself, as JSON."""
_BORROWED = "the chat template ends answers in the next turn's first token ({}): it is learned"
"""With that token: GLM's template ends an answer in ``<|user|>``."""
_ENDLESS = (
    "the chat template ends answers in no special token, so that the model cannot learn to stop;"
    " give another with --chat_template"
)
"""A model that is trained so goes on to write the other side of the chat."""

_OVERLAP = 256
"""Characters before an answer that are compared to find where it begins."""

_TOOL_ANSWER = {"role": "tool", "content": "x", "name": "x", "tool_call_id": "x"}
"""A turn that may follow a call: only to see how the template ends the turn before."""
_QUESTION = {"role": "user", "content": "x"}
"""The same after an answer."""


@dataclass(frozen=True, slots=True)
class ChatRow:
    """The text of one training row, and the stretches of it that are learned."""

    text: str
    learned: tuple[tuple[int, int], ...]


class ChatTemplate:
    """Lays chats out with one tokenizer's template.

    Args:
        special: matches the tokenizer's special tokens.
    """

    def __init__(self, tokenizer: Any, special: re.Pattern[str]) -> None:
        self._tokenizer = tokenizer
        self.special = special
        self.notes: Counter[str] = Counter()
        """What a person should know about how records were laid out, and of how many it is so."""

    def rows(
        self, name: str, messages: Sequence[Message], variables: dict[str, Any]
    ) -> list[ChatRow]:
        """The training rows of one chat, in the order of their answers.

        Args:
            variables: of the template besides the messages, such as ``tools``.

        Raises:
            DataError: the template refuses the chat, or leaves something of it out.
        """
        reasons: list[str] = []
        notes: Counter[str] = Counter()
        for turns in _forms(messages):
            notes.clear()
            try:
                rows = list(_Chat(self, messages, turns, variables, notes).rows())
            except _Unfit as exc:
                reasons.append(str(exc))
                continue
            if len(rows) > 1:
                notes[_SPLIT] += 1
            self.notes += Counter(notes.keys())
            return rows
        raise DataError(
            f"{name}: the chat template {reasons[0]}; change the record, or give another template"
            " with --chat_template"
        )

    def render(
        self, turns: Sequence[Any], variables: dict[str, Any], *, prompt: bool = False
    ) -> str:
        """The text of ``turns``, with what asks for an answer at its end if ``prompt``.

        Raises:
            _Unfit: the template refuses.
        """
        import jinja2

        try:
            text = self._tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=prompt, **variables
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as exc:
            raise _Unfit(f"refuses it: {' '.join(str(exc).split())}") from exc
        assert isinstance(text, str)
        return text


class _Unfit(Exception):
    """This form of the chat cannot be laid out; says why, after "the chat template"."""


class _Chat:
    """One chat in one form, and its renderings."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        turns: list[dict[str, Any]],
        variables: dict[str, Any],
        notes: Counter[str],
    ) -> None:
        self._messages, self._turns, self._variables = messages, turns, variables
        self._template, self._special, self._notes = template, template.special, notes
        self._known: dict[tuple[int, bool], str] = {}

    def rows(self) -> Iterator[ChatRow]:
        """From the first answer to the last, as few as there can be."""
        wanted = [i for i, m in enumerate(self._messages) if m.role == "assistant" and m.learned]
        found: list[ChatRow] = []
        while wanted:
            last = wanted[-1]
            text = self._upto(last + 1)
            spans = {i: span for i in wanted if (span := self._span(i, text)) is not None}
            row = self._with_thought(last, text, spans.get(last))
            if row is None and last in spans:
                spans[last], text = self._ended(last, text, spans[last])
                row = ChatRow(text, tuple(spans.values()))
                wanted = [i for i in wanted if i not in spans]
            else:
                row, spans = row or self._composed(last), {}
                wanted.pop()
            self._check(row, last, sorted(spans) or [last])
            found.append(row)
        return iter(found[::-1])

    def _upto(self, count: int, *, prompt: bool = False) -> str:
        """The first ``count`` turns, rendered."""
        if not count:
            return self._opening() if prompt else ""
        key = (count, prompt)
        if key not in self._known:
            self._known[key] = self._template.render(
                self._turns[:count], self._variables, prompt=prompt
            )
        return self._known[key]

    def _opening(self) -> str:
        """What asks for an answer that nobody asked for, since no template renders no turns."""
        asked = self._template.render([_QUESTION], self._variables)
        asking = self._template.render([_QUESTION], self._variables, prompt=True)
        prompt = asking[_common(asked, asking) :]
        said = self._upto(1)
        if not prompt or (at := said.find(prompt)) < 0:
            raise _Unfit("cannot begin with the assistant")
        return said[: at + len(prompt)]

    def _span(self, index: int, text: str) -> tuple[int, int] | None:
        """What turn ``index`` generates, as a stretch of ``text``; None if ``text`` holds it
        otherwise, or after another history.
        """
        before, after = self._upto(index, prompt=True), self._upto(index + 1)
        start = _common(before, text)
        if start < len(before):
            history = _common(self._upto(index), before)
            opened = self._border(before, history, start)
            if start < history or opened is None:
                return None
            start = opened
        if after[:start] != text[:start]:
            return None
        end = self._whole_tokens(after, start + _common(after[start:], text[start:]))
        if self._special.sub("", after[end:]).strip():
            return None  # the turns differ in more than what ends them
        if not self._stops(text[start:end]):
            following = re.compile(rf"\s*(?:{self._special.pattern})").match(text, end)
            end = following.end() if following else end
        return start, end

    def _border(self, before: str, history: int, limit: int) -> int | None:
        """Where the part of the generation prompt ends that stands before every answer: behind its
        last special token or line end up to ``limit``.
        """
        ends = [m.end() for m in self._special.finditer(before, history)]
        ends += [i + 1 for i, c in enumerate(before) if c == "\n" and i >= history]
        return max((end for end in ends if end <= limit), default=None)

    def _whole_tokens(self, text: str, end: int) -> int:
        """``end``, or the start of the special token that it lies in."""
        for match in self._special.finditer(text, max(0, end - 100), end + 100):
            if match.start() < end < match.end():
                return match.start()
        return end

    def _stops(self, learned: str) -> bool:
        """Whether ``learned`` ends in a special token."""
        ends = [match.end() for match in self._special.finditer(learned)]
        return bool(ends) and ends[-1] == len(learned.rstrip())

    def _ended(self, index: int, text: str, span: tuple[int, int]) -> tuple[tuple[int, int], str]:
        """The row of the last answer, with the token that ends it, wherever that comes from."""
        start, end = span
        before = self._upto(index, prompt=True)
        if start < len(before):
            shown = json.dumps(before[start:])
            self._notes[_OPENED.format(shown)] += 1
        if self._stops(text[start:end]):
            return span, text
        calls = self._messages[index].tool_calls
        following = _TOOL_ANSWER if calls else _QUESTION
        try:
            more = self._template.render([*self._turns[: index + 1], following], self._variables)
        except _Unfit:
            more = ""
        tail = text[start:end].rpartition("</think>")[2][-32:]  # thinking may be gone by then
        at = more.rfind(tail)
        found = re.compile(rf"\s*(?:{self._special.pattern})").match(more, at + len(tail))
        if at < 0 or found is None:
            self._notes[_ENDLESS] += 1
            return span, text
        self._notes[_BORROWED.format(found.group().strip())] += 1
        text = text[:end] + found.group()
        return (start, len(text)), text

    def _with_thought(self, index: int, text: str, span: tuple[int, int] | None) -> ChatRow | None:
        """The row of an answer whose thinking the template asks for and does not render: it ends
        the prompt in ``<think>`` and renders answers alone. None for every other.
        """
        before = self._upto(index, prompt=True)
        if span is None or not re.search(r"<think>\s*\Z", before[span[0] :]):
            return None
        thought, _ = _thought_and_answer(self._turns[index])
        if not thought or _holds(_bare(text[slice(*span)]), thought):
            return None
        text = f"{before}{thought.strip()}\n</think>\n\n{text[slice(*span)]}"
        return ChatRow(text, ((len(before), len(text)),))

    def _composed(self, index: int) -> ChatRow:
        """The row of an answer that no finished chat shows as it is asked for: the prompt, and
        behind it what the finished chat has behind the last thing that both have.
        """
        before, after = self._upto(index, prompt=True), self._upto(index + 1)
        _, answer = _thought_and_answer(self._turns[index])
        limit = after.rfind(answer.strip()) if answer.strip() else -1
        ends = [
            end
            for end in range(1, (len(after) if limit < 0 else limit) + 1)
            if after[end - 1] == before[-1]
        ]
        asked = before[: -_OVERLAP - 1 : -1]
        overlap, at = max(
            ((_common(asked, after[max(0, end - _OVERLAP) : end][::-1]), end) for end in ends),
            default=(0, 0),
        )
        if overlap < 3:
            raise _Unfit("renders an answer otherwise than it asks for it")
        self._notes[_COMPOSED] += 1
        text = before + after[at:]
        span, text = self._ended(index, text, (len(before), len(text)))
        return ChatRow(text, (span,))

    def _check(self, row: ChatRow, last: int, learned: Sequence[int]) -> None:
        """That ``row`` holds what the record holds.

        Raises:
            _Unfit: it leaves something out.
        """
        everything = _bare(row.text)
        spoken = _bare("".join(row.text[start:end] for start, end in row.learned))
        for tool in self._variables.get("tools", ()):
            if (tool_name := _name(tool)) and not _holds(everything, tool_name):
                raise _Unfit(f"leaves out the tool {tool_name!r}")
        for index, turn in enumerate(self._turns[: last + 1]):
            thought, answer = _thought_and_answer(turn)
            where = spoken if index in learned else everything
            for part, what in ((answer, "text"), *((_name(c), "tool call") for c in _calls(turn))):
                if not _holds(where, part):
                    raise _Unfit(f"leaves out the {what} of turn {index} ({turn['role']})")
            if index in learned and not _holds(spoken, thought):
                raise _Unfit(f"leaves out what the assistant thinks in turn {index}")


def _forms(messages: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
    """The chat as templates want it: arguments of calls as objects or as JSON, no content beside
    calls as "" or as null. The first is what most want.
    """
    turns = [m.as_dict() for m in messages]
    for turn in turns:
        if turn.get("reasoning_content"):  # gpt-oss's and LFM's name for it
            turn["thinking"] = turn["reasoning_content"]
    yield turns
    if any(m.tool_calls for m in messages):
        yield [_changed(turn, as_text=True) for turn in turns]
        yield [_changed(turn, no_content=True) for turn in turns]
        yield [_changed(turn, as_text=True, no_content=True) for turn in turns]


def _changed(
    turn: dict[str, Any], *, as_text: bool = False, no_content: bool = False
) -> dict[str, Any]:
    if not turn.get("tool_calls"):
        return turn
    out = dict(turn)
    if no_content and not turn["content"]:
        out["content"] = None
    if as_text:
        out["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.dumps(
                call["function"]["arguments"], ensure_ascii=False)}}
            for call in turn["tool_calls"]
        ]  # fmt: skip
    return out


def _calls(turn: dict[str, Any]) -> Sequence[Any]:
    return turn.get("tool_calls") or ()


def _name(tool: Any) -> str:
    """Of a tool or of a call of it."""
    inner = tool.get("function", tool) if isinstance(tool, dict) else {}
    name = inner.get("name") if isinstance(inner, dict) else None
    return name if isinstance(name, str) else ""


def _thought_and_answer(turn: dict[str, Any]) -> tuple[str, str]:
    content = turn["content"] or ""
    if turn["role"] != "assistant":
        return "", content
    thought = turn.get("reasoning_content") or ""
    if "</think>" in content:
        inline, _, content = content.rpartition("</think>")
        thought = thought or inline.replace("<think>", "")
    return thought, content


def _bare(text: str) -> str:
    """Without white space, which templates trim."""
    return "".join(text.split())


def _holds(text: str, part: str) -> bool:
    """Whether ``text`` (bare) has ``part``, as it is or as JSON has it."""
    if _bare(part) in text:
        return True
    return any(_bare(json.dumps(part, ensure_ascii=a)[1:-1]) in text for a in (False, True))


def _common(a: str, b: str) -> int:
    """Length of what both begin with."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # a slice is compared in one go, a character never by itself
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
