"""Read instruction records and conversations from whatever file they came in.

The file is the interface to the engine, or to any other tool: nothing is imported from there. What
a row is follows from its keys, so that a file may mix kinds:

    instruction, output[, input]      Alpaca
    instruction, instances            Self-Instruct seed task; each instance is a record
    messages                          OpenAI's chat rows (role, content)
    conversations                     ShareGPT (from, value)

and where the rows are follows from the path: a JSON list, JSON Lines, Parquet, or the folder of a
Woolmill run, of which the accepted records are read. A row that is none of these is an error that
names it: silently training on fewer records than were given is worse than stopping.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer.errors import ConfigError, DataError

__all__ = ["Conversation", "Example", "Instruction", "Message", "Role", "Text", "read_examples"]

RUN_STORE = "run.sqlite"
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


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


def read_examples(path: Path) -> list[Example]:
    """All records of ``path``, in order.

    Raises:
        ConfigError: there is no such file, or Parquet without pyarrow.
        DataError: a row that is no record, or a file that is damaged or empty. Names it.
    """
    if not path.exists():
        raise ConfigError(f"{path}: there is no such file; check --data_path")
    examples = [example for name, row in _rows(path) for example in _examples(name, row)]
    if not examples:
        raise DataError(f"{path}: holds no records")
    return examples


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(name, row) of every row; rows are counted from 0, lines from 1."""
    if path.is_dir():
        return _run_folder_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    return _json_rows(path)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as exc:
        raise DataError(f"{path}: is not UTF-8 at byte {exc.start}") from exc
    except OSError as exc:
        raise DataError(f"{path}: cannot be read: {exc.strerror}") from exc
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as exc:
            raise DataError(f"{path}:{exc.lineno}:{exc.colno}: {exc.msg}") from exc
        yield from ((f"{path.name}#{index}", row) for index, row in enumerate(rows))
        return
    # Not splitlines(): U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path.name}:{number}", json.loads(line)
            except json.JSONDecodeError as exc:
                raise DataError(f"{path}:{number}:{exc.colno}: {exc.msg}") from exc


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError as exc:
        raise ConfigError(f"{path}: Parquet needs pyarrow; pip install pyarrow") from exc
    try:
        rows = pq.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as exc:
        raise DataError(f"{path}: is not a whole Parquet file: {_first_line(exc)}") from exc
    yield from ((f"{path.name}#{index}", row) for index, row in enumerate(rows))


def _run_folder_rows(folder: Path) -> Iterator[tuple[str, Any]]:
    store = folder / RUN_STORE
    if not store.is_file():
        raise ConfigError(f"{folder}: is a folder without {RUN_STORE}; name a dataset or a run")
    query = "SELECT request, position, body FROM decision WHERE reason IS NULL ORDER BY 1, 2"
    try:
        with closing(sqlite3.connect(f"{store.resolve().as_uri()}?mode=ro", uri=True)) as database:
            for request, position, body in database.execute(query):
                yield f"{folder.name}#{request}.{position}", json.loads(body)["record"]
    except (sqlite3.Error, json.JSONDecodeError, KeyError) as exc:
        raise DataError(f"{store}: is not a whole run store: {_first_line(exc)}") from exc


def _examples(name: str, row: Any) -> Iterator[Example]:
    if not isinstance(row, dict):
        raise DataError(f"{name}: is a {type(row).__name__}, not an object")
    if "messages" in row or "conversations" in row:
        yield Conversation(name, tuple(_messages(name, row)))
    elif "instances" in row:
        for index, instance in enumerate(row["instances"] or ()):
            where = f"{name}.{index}" if index else name
            if not isinstance(instance, dict):
                raise DataError(f"{where}: is a {type(instance).__name__}, not an object")
            merged = instance | {"instruction": row.get("instruction")}
            yield _instruction(where, merged)
    else:
        yield _instruction(name, row)


def _instruction(name: str, row: dict[str, Any]) -> Instruction:
    text = {key: row.get(key) for key in ("instruction", "input", "output")}
    text["input"] = "" if text["input"] is None else text["input"]
    return Instruction(name, **{key: _text(name, key, value) for key, value in text.items()})


def _messages(name: str, row: dict[str, Any]) -> Iterator[Message]:
    sharegpt = "messages" not in row
    turns = row["conversations" if sharegpt else "messages"]
    if not isinstance(turns, list):
        raise DataError(f"{name}: its turns are {_kind(turns)}, not a list")
    roles = set()
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise DataError(f"{name}: turn {index} is {_kind(turn)}, not an object")
        role, content = turn.get("role"), turn.get("content")
        if sharegpt:
            role, content = turn.get("from"), turn.get("value")
            role = _SHAREGPT_ROLES.get(str(role), role)
        if role not in ("system", "user", "assistant"):
            raise DataError(f"{name}: turn {index} has the role {role!r}; known are system, user,"
                            " assistant")  # fmt: skip
        roles.add(role)
        yield Message(role, _text(name, f"turn {index}", content))
    if "assistant" not in roles:
        raise DataError(f"{name}: has no turn of the assistant to learn from")


def _text(name: str, part: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name}: {part} is {_kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        raise DataError(f"{name}: {part} holds half a surrogate pair at {exc.start}") from exc
    return value


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def _first_line(exc: Exception) -> str:
    return str(exc).partition("\n")[0]
