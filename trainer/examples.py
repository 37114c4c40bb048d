"""What is trained on: an instruction, a chat, or plain text. Readers make them, templates lay them
out; both sides know these types and nothing of each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "Conversation",
    "Example",
    "Instruction",
    "Message",
    "Role",
    "Text",
    "alpaca_prompt",
    "question",
]

_TASK = "Below is an instruction that describes a task"
"""Alpaca's prompts, to the letter: models that were trained on them expect the same."""
_RESPOND = "Write a response that appropriately completes the request."
"""The sentence that both of them share."""

Role = Literal["system", "developer", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: Role
    content: str
    reasoning_content: str | None = None
    """What the assistant thought before it answered."""
    tool_calls: tuple[dict[str, Any], ...] = ()
    """In OpenAI's form: ``{"type": "function", "id", "function": {"name", "arguments"}}``, with the
    arguments as an object, as chat templates expect them, whatever the file held."""
    tool_call_id: str | None = None
    """Of a tool's answer: the call that it belongs to."""
    name: str | None = None
    """Of the participant or the tool that speaks."""
    learned: bool = True
    """Whether this turn of the assistant is learned; False where the file gives it weight 0."""

    def as_dict(self) -> dict[str, Any]:
        """What a chat template is given: fields that hold nothing are left out."""
        fields: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning_content is not None:
            fields["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            fields["tool_calls"] = list(self.tool_calls)
        if self.tool_call_id is not None:
            fields["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            fields["name"] = self.name
        return fields


@dataclass(frozen=True, slots=True)
class Instruction:
    """One record in Alpaca's terms. ``name`` says where it stands: ``data.json#17``."""

    name: str
    instruction: str
    input: str
    output: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """One chat; at least one turn is the assistant's and learned."""

    name: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of the functions that the assistant may call, for the chat template."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further variables of the chat template, such as ``enable_thinking``."""


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, laid out by nobody: ``prompt`` is read and ``completion`` is learned."""

    name: str
    prompt: str
    """Empty where the whole text is learned."""
    completion: str


Example = Instruction | Conversation | Text


def question(instruction: str, input: str) -> str:
    """An instruction with its input, as one turn of the user."""
    return "\n\n".join(part for part in (instruction, input) if part)


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The prompt that Stanford Alpaca trains on, up to and including ``### Response:``."""
    if input:
        return (
            f"{_TASK}, paired with an input that provides further context. {_RESPOND}\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
        )
    return f"{_TASK}. {_RESPOND}\n\n### Instruction:\n{instruction}\n\n### Response:"
