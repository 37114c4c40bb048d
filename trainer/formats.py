"""Rows to records: which columns say what, and nothing dropped in silence.

What a row is follows from its columns, so that a file may mix kinds:

    instruction, output[, input, system, history]   Alpaca, LLaMA-Factory; question, query and
                                                    response, answer, context mean the same
    instruction, instances                          Self-Instruct seed task, a record an instance
    messages | conversations[, tools, system]       chats: OpenAI's and ShareGPT's keys alike
    prompt, completion                              texts or turns; the completion is learned
    text                                            all of it is learned

A column that none of these uses is refused by name, unless it holds nothing, repeats what the row
says already, is known to describe the row (``id``, ``source``), or is named in ``ignore``: training
in silence on less than was given is worse than stopping.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.errors import DataError
from trainer.examples import (
    Conversation,
    Example,
    Instruction,
    Message,
    Role,
    Text,
    alpaca_prompt,
    question,
)

__all__ = ["LISTS", "Rules", "examples_of"]

_CHATS = ("messages", "conversations", "conversation")
"""Columns that hold a chat; the first that there is."""
LISTS = (*_CHATS, "instances", "prompt", "completion", "history", "tools", "functions")
"""Columns of a record that hold lists of objects."""
_ASKS = ("instruction", "question", "query")
"""Names of an instruction's columns in the datasets in use; the first that there is."""
_INPUTS = ("input", "context")
"""Likewise of what the instruction is about."""
_ANSWERS = ("output", "response", "answer")
"""Likewise of the answer, which is learned."""

_INDEXES = ("", "Unnamed: 0", "__index_level_0__")
"""The index of a table that pandas has written."""

_DESCRIBES = frozenset(_INDEXES) | frozenset(
    "id _id uid uuid idx index row_id conversation_id conv_id prompt_id question_id task_id"
    " source sources dataset dataset_name origin url urls license author category categories topic"
    " topics domain subject task task_name task_type language lang locale split created created_at"
    " updated_at date timestamp model model_name generator teacher num_turns turns_count"
    " num_tokens token_count length difficulty quality score scores hash sha256 md5 meta metadata"
    " is_classification demonstrations most_similar_instructions most_similar max_similarity"
    " avg_similarity_score parallel_tool_calls"
    " row sample parents".split()
)
"""Columns that describe a row and say nothing that a model would be shown or taught; the last are
those of the engine's exports."""
_DESCRIBES_AS = "woolmill_"
"""How such a column of an export begins where the row has one of that name."""

_TURN_DESCRIBES = frozenset("id message_id created created_at timestamp model tokens".split())
"""The same of one turn."""

_SPEAKERS: dict[str, Role] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
"""The role of each speaker's name, in lower case: OpenAI's, ShareGPT's, OpenAssistant's, Llama's.
Any other is an error, since learning the wrong side would show in no loss."""
_CALLERS = ("function_call", "tool_call")
"""Roles whose content is a call, as JSON."""

_DEEPEST = 64
"""Levels of objects and lists in a tool or a call."""

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a turn that hold its thinking."""
_WEIGHTS = ("weight", "train", "training", "loss")
"""Keys by which a turn says whether it is learned: 0 or false means that it is only read."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a person said about the rows of a dataset."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """New names of columns, of rows and of turns, by their old ones."""
    ignore: tuple[str, ...] = ()
    """Columns, of rows and of turns, that are left out."""
    on_bad_row: Literal["refuse", "skip"] = "refuse"


def examples_of(name: str, row: Any, rules: Rules) -> Iterator[Example]:
    """The records of one row, which is called ``name``.

    Raises:
        DataError: it is no record, or holds a column that would be lost. Names row and column.
    """
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise DataError(f"{name}: is {_kind(row)}, not an object")
    columns = _Columns(name, row, rules)
    if any(column in columns for column in _CHATS):
        yield _chat(columns)
    elif "instances" in columns:
        yield from _seed_task(columns)
    elif "prompt" in columns and "completion" in columns:
        yield _completion(columns)
    elif any(column in columns for column in _ASKS):
        yield _instruction(columns)
    elif "text" in columns:
        text = columns.text("text")
        columns.refuse_the_rest(text)
        yield Text(name, "", text)
    else:
        raise DataError(f"{name}: {_unknown(columns)}")


class _Columns:
    """The columns of one row under their final names, and which of them have been used."""

    def __init__(self, name: str, row: Mapping[str, Any], rules: Rules) -> None:
        self.name, self.rules = name, rules
        self._row: dict[str, Any] = {}
        self._used: set[str] = set()
        self._row = _renamed(name, row, rules)

    def __contains__(self, column: str) -> bool:
        return column in self._row

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def take(self, *names: str) -> Any:
        """The value of the first of ``names`` that the row has, else None."""
        for column in names:
            if column in self._row:
                self._used.add(column)
                return self._row[column]
        return None

    def text(self, *names: str, default: str | None = None) -> str:
        """The same, which must be text."""
        value = self.take(*names)
        if value is None and default is not None:
            return default
        told = next((column for column in names if column in self._row), names[0])
        return _text(self.name, told, value)

    def refuse_the_rest(self, *said: str) -> None:
        """Raise DataError if a column is left that would be lost; ``said`` are the row's texts."""
        lost = [
            column
            for column, value in self._row.items()
            if column not in self._used | _DESCRIBES
            and not column.startswith(_DESCRIBES_AS)
            and not _empty(value)
            and value not in said
        ]
        if lost:
            used = ", ".join(column for column in self._row if column in self._used)
            raise DataError(
                f"{self.name}: holds {used}, and would lose {', '.join(lost)}; leave out what is"
                f" not to be learned, as with --ignore_columns {','.join(lost)}, or give a column"
                " its meaning with --column_mapping OLD=NEW"
            )


def _renamed(name: str, row: Mapping[str, Any], rules: Rules) -> dict[str, Any]:
    """What a row or a turn holds, under its columns' final names."""
    out: dict[str, Any] = {}
    for column, value in row.items():
        if value is None or column in rules.ignore:
            continue
        new = rules.columns.get(column, column)
        if new in out:
            raise DataError(
                f"{name}: --column_mapping gives two columns the name {new!r}; leave one of them"
                " out with --ignore_columns"
            )
        out[new] = value
    return out


def _unknown(columns: _Columns) -> str:
    names = ", ".join(columns) or "none"
    if "chosen" in columns:
        return (
            "is a preference pair, and this trainer learns answers; to learn the chosen ones:"
            " --column_mapping chosen=messages (turns) or prompt=prompt,chosen=completion (texts),"
            " with --ignore_columns rejected"
        )
    return (
        f"is no kind of record that is known; its columns are {names}. Known are messages,"
        " conversations, instruction and output, prompt and completion, text: rename columns, as"
        " with --column_mapping OLD=NEW,OLD=NEW"
    )


# -- instructions and texts ------------------------------------------------------------------------


def _instruction(columns: _Columns) -> Example:
    name = columns.name
    asked = columns.text(*_ASKS)
    given = columns.text(*_INPUTS, default="")
    answer = columns.text(*_ANSWERS)
    system = columns.text("system", "system_prompt", default="")
    history = list(_history(name, columns.take("history")))
    tools, variables = _tools(columns), _variables(columns)
    prompt = alpaca_prompt(asked, given)
    said = question(asked, given)
    columns.refuse_the_rest(
        asked, given, answer, said, prompt, prompt + answer, f"{prompt}\n{answer}"
    )
    if not (system or history or tools or variables):
        return Instruction(name, asked, given, answer)
    # Alpaca's layout has no place for these.
    opening = [Message("system", system)] if system else []
    turns = [*opening, *history, Message("user", said), Message("assistant", answer)]
    return Conversation(name, tuple(turns), tools, variables)


def _history(name: str, value: Any) -> Iterator[Message]:
    """LLaMA-Factory's earlier turns: pairs of a question and its answer, both text."""
    for index, pair in enumerate(_list(name, "history", value)):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"{name}: history {index} is no pair of a question and its answer")
        yield Message("user", _text(name, f"history {index}", pair[0]))
        yield Message("assistant", _text(name, f"history {index}", pair[1]))


def _seed_task(columns: _Columns) -> Iterator[Instruction]:
    asked = columns.text("instruction")
    instances = _list(columns.name, "instances", columns.take("instances"))
    if not instances:
        raise DataError(f"{columns.name}: is a seed task without instances to learn from")
    for index, instance in enumerate(instances):
        where = f"{columns.name}.{index}" if index else columns.name
        if not isinstance(instance, dict):
            raise DataError(f"{where}: is {_kind(instance)}, not an object")
        inner = _Columns(where, instance, Rules(ignore=columns.rules.ignore))
        given, answer = inner.text("input", default=""), inner.text("output")
        inner.refuse_the_rest()
        yield Instruction(where, asked, given, answer)
    columns.take("name")  # of the task, which no prompt shows
    columns.refuse_the_rest(asked)


def _completion(columns: _Columns) -> Example:
    name, prompt, completion = columns.name, columns.take("prompt"), columns.take("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        texts = _text(name, "prompt", prompt), _text(name, "completion", completion)
        columns.refuse_the_rest(*texts)
        return Text(name, *texts)
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    said = completion
    if isinstance(completion, str):
        said = [{"role": "assistant", "content": completion}]
    turns = [
        *_turns(columns, "prompt", asked, learned=False),
        *_turns(columns, "completion", said, learned=True),
    ]
    return _conversation(columns, turns)


# -- chats -----------------------------------------------------------------------------------------


def _chat(columns: _Columns) -> Conversation:
    column = next(name for name in _CHATS if name in columns)
    return _conversation(columns, list(_turns(columns, "turn", columns.take(column))))


def _conversation(columns: _Columns, turns: list[Message]) -> Conversation:
    name = columns.name
    system = columns.text("system", "system_prompt", default="")
    told = [turn.content for turn in turns if turn.role == "system"]
    if system and system not in told:
        if told:
            raise DataError(
                f"{name}: has a system column and another system turn; leave one of them out, as"
                " with --ignore_columns system"
            )
        turns = [Message("system", system), *turns]
    tools, variables = _tools(columns), _variables(columns)
    columns.refuse_the_rest(*(turn.content for turn in turns))
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError(f"{name}: has no turn of the assistant to learn from")
    if not any(turn.role == "assistant" and turn.learned for turn in turns):
        raise DataError(f"{name}: has no turn to learn from: all of the assistant's have weight 0")
    return Conversation(name, tuple(turns), tools, variables)


def _turns(
    columns: _Columns, part: str, value: Any, *, learned: bool | None = None
) -> Iterator[Message]:
    """The turns of a list of them. ``learned`` overrides weights; None leaves them."""
    turns = _parsed(value)
    if not isinstance(turns, list | tuple):
        raise DataError(f"{columns.name}: its turns are {_kind(value)}, not a list")
    for index, turn in enumerate(turns):
        where = f"{part} {index}"
        if not isinstance(turn, dict):
            raise DataError(f"{columns.name}: {where} is {_kind(turn)}, not an object")
        yield _turn(columns, where, turn, learned)


def _turn(columns: _Columns, where: str, turn: Mapping[str, Any], learned: bool | None) -> Message:
    name = columns.name
    left = _renamed(f"{name}: {where}", turn, columns.rules)
    left = {key: value for key, value in left.items() if key not in _TURN_DESCRIBES}
    spoken = left.pop("role") if "role" in left else left.pop("from", None)
    content = left.pop("content") if "content" in left else left.pop("value", None)
    calls = _calls(name, where, left.pop("tool_calls", None) or left.pop("function_call", None))
    if spoken in _CALLERS:
        spoken, calls, content = "assistant", _calls(name, where, _parsed(content)), None
        if not calls:
            raise DataError(f"{name}: {where} is a call, and its content is no JSON of one")
    role = _SPEAKERS.get(str(spoken).lower())
    if role is None:
        raise DataError(
            f"{name}: {where} has the role {spoken!r}; known are {', '.join(_SPEAKERS)},"
            f" {', '.join(_CALLERS)}"
        )
    text, thought = _content(name, where, content, calls)
    for key in _THOUGHTS:
        if thought is None and isinstance(left.get(key), str):
            thought = _text(name, f"{where}: {key}", left.pop(key)) or None
        elif left.get(key) == thought:
            left.pop(key, None)
    if (thought or calls) and role != "assistant":
        what = "reasoning" if thought else "tool calls"
        raise DataError(f"{name}: {where} is the {role}'s and has {what}; only the assistant has")
    wanted = _wanted(name, where, role, left)
    call_id, speaker = left.pop("tool_call_id", None), left.pop("name", None)
    lost = [key for key, value in left.items() if not _empty(value)]
    if lost:
        raise DataError(
            f"{name}: {where} would lose {', '.join(lost)}; leave it out with --ignore_columns"
            f" {','.join(lost)}"
        )
    return Message(
        role,
        text,
        reasoning_content=thought,
        tool_calls=calls,
        tool_call_id=None if call_id is None else _text(name, f"{where}: tool_call_id", call_id),
        name=None if speaker is None else _text(name, f"{where}: name", speaker),
        learned=role != "assistant" or (wanted and learned is not False),
    )


def _content(name: str, where: str, content: Any, calls: tuple[Any, ...]) -> tuple[str, str | None]:
    """The text of a turn, and what was thought before it where that is a part of its content."""
    if content is None and calls:
        return "", None
    if not isinstance(content, list | tuple):
        return _text(name, f"{where}: content", content), None
    texts: list[str] = []
    thoughts: list[str] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else "text"
        value = part.get(kind if kind in _THOUGHTS else "text") if isinstance(part, dict) else part
        if kind not in ("text", "input_text", "output_text", *_THOUGHTS):
            raise DataError(
                f"{name}: {where}: part {index} of its content is of the type {kind!r}; this"
                " trainer learns text alone"
            )
        into = thoughts if kind in _THOUGHTS else texts
        into.append(_text(name, f"{where}: part {index}", value))
    return "".join(texts), "".join(thoughts) or None


def _wanted(name: str, where: str, role: Role, left: dict[str, Any]) -> bool:
    """Whether the turn's weight lets it be learned."""
    wanted = True
    for key in _WEIGHTS:
        if key in left:
            weight = left.pop(key)
            if weight not in (0, 1):
                raise DataError(
                    f"{name}: {where}: {key} is {weight!r}; known are 0 (is not learned) and 1"
                )
            if weight and role != "assistant":
                raise DataError(
                    f"{name}: {where}: {key} asks to learn a turn of the {role}; only the"
                    f" assistant's are learned. Leave all weights out with --ignore_columns {key}"
                )
            wanted = wanted and bool(weight)
    return wanted


def _calls(name: str, where: str, value: Any) -> tuple[dict[str, Any], ...]:
    """Tool calls in OpenAI's form, their arguments as an object."""
    calls = _parsed(value)
    if isinstance(calls, dict):
        calls = [calls]
    out: list[dict[str, Any]] = []
    for index, call in enumerate(_list(name, f"{where}: tool_calls", calls)):
        told = f"{where}: tool call {index}"
        if not isinstance(call, dict):
            raise DataError(f"{name}: {told} is {_kind(call)}, not an object")
        function = call.get("function", {k: v for k, v in call.items() if k not in ("id", "type")})
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{name}: {told} names no function")
        arguments = _parsed(function.get("arguments", function.get("parameters", {})) or {})
        if not isinstance(arguments, dict):
            raise DataError(f"{name}: {told}: its arguments are no JSON object")
        rest = {k: v for k, v in function.items() if k not in ("arguments", "parameters")}
        identity = {} if call.get("id") is None else {"id": call["id"]}
        known = {"type": "function", **identity}
        whole = {**known, "function": {**rest, "arguments": arguments}}
        _check_inside(name, told, whole)
        out.append(whole)
    return tuple(out)


def _tools(columns: _Columns) -> tuple[dict[str, Any], ...]:
    """The functions that may be called, in OpenAI's form."""
    tools = []
    for index, tool in enumerate(_list(columns.name, "tools", _tools_column(columns))):
        if not isinstance(tool, dict):
            raise DataError(f"{columns.name}: tool {index} is {_kind(tool)}, not an object")
        _check_inside(columns.name, f"tool {index}", tool)
        wrapped = "function" in tool or "type" in tool
        tools.append(tool if wrapped else {"type": "function", "function": tool})
    return tuple(tools)


def _tools_column(columns: _Columns) -> Any:
    value = columns.take("tools", "functions")
    return [] if value == "" else _parsed(value)


def _variables(columns: _Columns) -> dict[str, Any]:
    value = _parsed(columns.take("chat_template_kwargs")) or {}
    if not isinstance(value, dict) or {"tools", "messages", "tokenize"} & set(value):
        raise DataError(f"{columns.name}: chat_template_kwargs is no object of template variables")
    _check_inside(columns.name, "chat_template_kwargs", value)
    return {str(key): inner for key, inner in value.items() if inner is not None}


# -- values ----------------------------------------------------------------------------------------


def _text(name: str, part: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name}: {part} is {_kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        raise DataError(f"{name}: {part} holds half a surrogate pair at {exc.start}") from exc
    return value


def _check_inside(name: str, part: str, value: Any) -> None:
    """Raise DataError where a text inside of ``value`` is none, or is nested too deeply."""
    level = [value]
    for _ in range(_DEEPEST):
        for text in (inner for inner in level if isinstance(inner, str)):
            _text(name, part, text)
        level = [
            inner
            for outer in level
            for inner in (
                [*outer, *outer.values()]
                if isinstance(outer, dict)
                else outer
                if isinstance(outer, list | tuple)
                else ()
            )
        ]
        if not level:
            return
    raise DataError(f"{name}: {part} is nested more than {_DEEPEST} deep")


def _list(name: str, part: str, value: Any) -> list[Any] | tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise DataError(f"{name}: {part} is {_kind(value)}, not a list")
    return value


def _parsed(value: Any) -> Any:
    """What a table's cell holds as JSON text, else ``value`` itself."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _empty(value: Any) -> bool:
    """Nothing is lost with it."""
    return value is None or value == "" or (isinstance(value, dict | list | tuple) and not value)


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
