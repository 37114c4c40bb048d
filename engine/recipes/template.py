"""Recipes in a TOML file: templates ask, a format reads the answer, templates make the rows.

    row, vary, options ─▶ system, user, assistant ─▶ … ─▶ answer.format ─▶ give ─▶ refuse, keep

The names that templates know: the fields of the input row (and all of it as ``row``), what ``vary``
draws, ``options``, ``sample`` and ``index``; after the answer also ``text``, ``reasoning``,
``item`` and the fields that the format found, which come before the row's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import islice
from pathlib import Path
from typing import Any

from engine.datasets import Dataset
from engine.errors import ConfigError, WoolmillError
from engine.recipes.answers import (
    Fields,
    Format,
    ListAnswer,
    NumberedAnswer,
    RegexAnswer,
    TagsAnswer,
    TextAnswer,
)
from engine.recipes.base import CUT, RECIPE_ERROR, Ask, Part, Piece, Recipe, Refusal, Role, chat_of
from engine.recipes.guard import RecipeFault
from engine.recipes.load import CODED
from engine.recipes.rules import Rule
from engine.recipes.sandbox import Expression, Missing, Shortens, Text, as_text, value_of
from engine.recipes.seeds import bundled_seeds
from engine.recipes.template_file import (
    OWN_NAMES,
    Answer,
    Examples,
    Option,
    Stage,
    TemplateFile,
    read_file,
)
from engine.records import Completion, Record
from engine.text import shorten

__all__ = ["BUILTIN", "Template", "builtin_templates", "load_template", "settle_options"]

BUILTIN = "engine.recipes"
SUFFIX = ".toml"
MAX_FILE_BYTES = 16 * 2**20
MAX_EXAMPLES = 100_000
SEEDS = "seeds"
"""As the place of examples: the seed tasks that ship with the package."""


def load_template(spec: str, options: Mapping[str, Any]) -> Template:
    """The recipe of a built-in name or a TOML file, with values for its options.

    Raises ConfigError, which names the place and the nearest name that there is.
    """
    if spec.endswith(SUFFIX):
        path = Path(spec)
        try:
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise ConfigError(
                f"--recipe {spec}: cannot be read: {error.strerror or error}"
            ) from error
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(f"--recipe {spec}: is larger than 16 MiB, which no recipe is")
        return Template(read_file(data, str(path)), options, where=str(path), folder=path.parent)
    known = builtin_templates()
    if spec not in known:
        names = sorted((*CODED, *known))
        near = get_close_matches(spec, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise ConfigError(
            f"--recipe {spec}: there is no such recipe; {hint}; a recipe of your own is "
            "FILE.toml or FILE.py:CLASS"
        )
    content = read_file(known[spec].read_bytes(), spec)
    return Template(content, options, where=spec, folder=Path(str(known[spec])).parent)


def builtin_templates() -> dict[str, Traversable]:
    """The files of the recipes that ship with the package, by name."""
    folder = resources.files(BUILTIN) / "builtin"
    if not folder.is_dir():
        return {}
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return {f.name.removesuffix(SUFFIX): f for f in files if f.name.endswith(SUFFIX)}


@dataclass(frozen=True, slots=True)
class _Example:
    """A row that prompts show, and its source."""

    row: Record
    source: str


class Template(Recipe):
    """The recipe that a file describes; see the head of this module.

    Args:
        file: what the file says.
        options: values in the place of its options' defaults.
        where: what messages call it.
        folder: what its paths are relative to.

    Raises ConfigError for templates that are none, names that cannot be there, options that it has
    not.
    """

    def __init__(
        self, file: TemplateFile, options: Mapping[str, Any], *, where: str, folder: Path
    ) -> None:
        stage = file.stage[0]
        self.file = file
        self._where = where
        self.name, self.version = file.recipe.name, file.recipe.version
        self.language = file.recipe.language or ""
        self.asks = "completions" if stage.completion else "chat"
        self._options = settle_options(file.options, options, where)
        self._examples, self._no_examples = _examples(file, folder)
        self.needs_rows = file.rows is not None
        if file.rows is not None:
            self.samples = file.rows.samples
            if file.rows.path is not None:
                self.rows_path = folder / file.rows.path
        try:
            self._format = _format(stage)
            self.most = self._format.most
            self._compile(file, stage)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        self._sampling = self._body(stage)
        self.asks_sha256, self.source_sha256 = self._hashes(file, stage)

    def _compile(self, file: TemplateFile, stage: Stage) -> None:
        turns: list[tuple[Role, str]] = [("user", "completion"), ("system", "system")]
        turns += [("user", "user"), ("assistant", "assistant")]
        self._turns = [
            (role, Text(source, f"stage.{key}"))
            for role, key in turns
            if (source := getattr(stage, key)) is not None
        ]
        self._prefill = self._turns[-1][1] if stage.assistant else None
        given = stage.give or {name: f"{{{{ {name} }}}}" for name in self._format.names or ()}
        if not given:
            raise ConfigError(
                'stage.give is missing: name the fields of a row, as in give = { answer = "{{ text }}" }'
            )
        self.fields = tuple(given)
        self._give = {
            name: value_of(source, f"stage.give.{name}") for name, source in given.items()
        }
        self._rules = [Rule(rule, n, self.fields) for n, rule in enumerate(stage.refuse, 1)]
        self._keep = Expression(stage.keep, "stage.keep") if stage.keep else None
        of_row = {*self.fields, "options"}
        source = file.recipe.compare
        self._compare = None if source is None else _of_row(source, "recipe.compare", of_row)
        self._messages = [
            (turn.role, _of_row(turn.content, f"export.messages {n}", of_row))
            for n, turn in enumerate(file.export.messages, 1)
        ]
        self._after = self._needed_after()

    def _needed_after(self) -> frozenset[str]:
        """Names that only the input row can give, and that the answer's templates need."""
        if self._format.names is None:
            return frozenset()  # the answer may have any
        known = {*OWN_NAMES, *self._format.names, *self.file.vary}
        needed = {name for each in self._give.values() for name in each.needed}
        later = [rule.needed for rule in self._rules]
        later += [self._keep.needed] if self._keep else []
        needed |= {name for names in later for name in names} - set(self.fields)
        return frozenset(needed - known)

    # -- asking

    def prompt(self, ask: Ask) -> list[Part]:
        if self._no_examples:
            raise RecipeFault(self._no_examples)
        values, shown = self._values(ask)
        absent = self._after - values.keys()
        if absent:  # before anything is paid for an answer that no row can be made of
            self._say_absent(min(absent), values)
        if not shown:
            return [p for role, text in self._turns for p in _parts(role, text.chunks(values))]
        parts: list[Part] = []
        drops = [Part("", "drop", source=example.source) for _, example in shown]
        for role, text in self._turns:
            if role != "system":
                parts, drops = parts + drops, []
            parts += self._with_examples(role, text, values, shown)
        return parts

    def _with_examples(
        self, role: Role, text: Text, values: Fields, shown: Sequence[tuple[str, _Example]]
    ) -> list[Part]:
        """A turn as parts that follow how many examples are left."""
        if text.names.isdisjoint(self._examples):
            return _parts(role, text.chunks(values))
        made: dict[int, list[Part]] = {}

        def parts(left: int) -> list[Part]:
            if left not in made:
                made[left] = _parts(role, text.chunks(values | self._left(shown, left)))
            return made[left]

        whole, least = parts(len(shown)), parts(1)
        fixed = [part.text for part in whole if part.gives_way == "shorten"]
        if fixed != [part.text for part in least if part.gives_way == "shorten"] or len(
            whole
        ) != len(least):
            # What may be shortened goes with the examples: then they alone give way.
            return [Part(lambda left: "".join(str(p.text) for p in parts(left)), role=role)]
        return [
            part if part.gives_way == "shorten" else Part(_at(parts, place), role=role)
            for place, part in enumerate(whole)
        ]

    def _left(self, shown: Sequence[tuple[str, _Example]], left: int) -> Fields:
        """The examples by name, the first ``left`` of them."""
        values: Fields = {name: [] for name in self._examples}
        for name, example in shown[:left]:
            values[name].append(example.row)
        return values

    def _values(self, ask: Ask) -> tuple[Fields, list[tuple[str, _Example]]]:
        """What templates are filled with, and the examples among it."""
        values: Fields = {}
        if ask.row is not None:
            values = {**ask.row, "row": ask.row}
        shown: list[tuple[str, _Example]] = []
        for name, choices in self.file.vary.items():
            if isinstance(choices, Examples):
                chosen = ask.choose(self._examples[name], choices.count, "vary", name)
                shown += [(name, example) for example in chosen]
                values[name] = [example.row for example in chosen]
            else:
                values[name] = choices[ask.draw("vary", name) % len(choices)]
        values["options"] = self._options
        values["sample"], values["index"] = ask.sample, ask.index
        return values, shown

    def _say_absent(self, name: str, values: Fields) -> None:
        near = get_close_matches(name, [*values, *(self._format.names or ())], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        rows = "the input row has none" if "row" in values else "without --rows there is none"
        raise RecipeFault(f"the answer's templates need {name!r}, and {rows}{hint}")

    def sampling(self, ask: Ask) -> Mapping[str, Any]:
        return self._sampling

    def _body(self, stage: Stage) -> dict[str, Any]:
        body = stage.sampling.body()
        if stage.answer.schema_ is not None and stage.answer.constrain:
            name = re.sub(r"[^A-Za-z0-9_-]+", "_", self.name)[:64]
            schema = {"name": name, "schema": stage.answer.schema_, "strict": True}
            body.setdefault("response_format", {"type": "json_schema", "json_schema": schema})
        return body

    def recurring(self) -> Iterator[str]:
        for _, text in self._turns:
            if not text.names:
                yield text.render({})

    # -- reading

    def parse(self, ask: Ask, answer: Completion) -> Iterator[Piece]:
        values, shown = self._values(ask)
        if shown:
            there = [(name, example) for name, example in shown if example.source in ask.shown]
            values |= self._left(there, len(there))
        read = answer.text
        if self._prefill is not None and not isinstance(self._format, TextAnswer):
            before = self._prefill.render(values)
            read = read if read.startswith(before) else before + read
        values["text"], values["reasoning"] = answer.text.strip(), answer.reasoning
        found = self._format.read(read, CUT.get(answer.finish_reason))
        for position, each in enumerate(found):
            if isinstance(each, tuple):
                yield Piece(position, None, each)
            else:
                yield self._piece(position, values, each)

    def _piece(self, position: int, values: Fields, found: Fields) -> Piece:
        """The row that one found set of fields makes, or why it makes none."""
        try:
            known = values | found
            if self._format.names is None:  # whatever a model may call a field
                known |= {name: values[name] for name in self._own if name in values}
                known["item"] = found["item"]
            record = {name: template.value(known) for name, template in self._give.items()}
            return Piece(position, record, self._refusal(known | record))
        except Missing as error:
            if self._format.names is None and error.name not in self._own:
                return Piece(position, None, ("bad_format", f"the object has no {error.name!r}"))
            return Piece(position, None, (RECIPE_ERROR, str(error)))
        except RecipeFault as error:
            return Piece(position, None, (RECIPE_ERROR, str(error)))

    @cached_property
    def _own(self) -> frozenset[str]:
        """Names that mean the same whatever a model answers."""
        return OWN_NAMES | self.file.vary.keys()

    def _refusal(self, values: Fields) -> Refusal | None:
        for rule in self._rules:
            if refusal := rule.refusal(values):
                return refusal
        if self._keep is not None and not self._keep.value(values):
            said = [f"{name} = {_shown(values.get(name))}" for name in sorted(self._keep.names)]
            return "not_kept", f"{', '.join(said)}: not {self._keep.source}"
        return None

    # -- rows

    def compared(self, row: Record) -> str | None:
        if self._compare is None:
            return None
        return self._compare.render({**row, "options": self._options}).strip() or None

    @property
    def compares(self) -> bool:
        return self._compare is not None

    def messages(self, row: Record) -> list[dict[str, str]] | None:
        if not self._messages:
            return chat_of(row)
        values = {**row, "options": self._options}
        turns = [(role, text.render(values)) for role, text in self._messages]
        return [{"role": role, "content": content} for role, content in turns if content.strip()]

    def sample_answer(self) -> str:
        """An answer in the format that is meant, for trying the recipe out."""
        return self._format.sample()

    def _hashes(self, file: TemplateFile, stage: Stage) -> tuple[str, str]:
        """Of what prompts follow from, and of what decisions follow from."""
        said = stage.model_dump(mode="json", by_alias=True)
        shown = {
            name: [[example.source, example.row] for example in examples]
            for name, examples in self._examples.items()
        }
        vary = file.model_dump(mode="json", include={"vary"}, by_alias=True)["vary"]
        both = [self.name, vary, self._options, said["assistant"], said["sampling"]]
        asked = [said[name] for name in ("system", "user", "completion")]
        decided = [said[name] for name in ("answer", "give", "refuse", "keep")]
        after = self._names_after()
        kept = {name: rows for name, rows in shown.items() if name in after}
        return (
            _digest([*both, shown, *asked, self._sampling.get("response_format")]),
            _digest([*both, kept, *decided, file.recipe.compare]),
        )

    def _names_after(self) -> set[str]:
        """All names that the answer's templates may use."""
        used = [each.names for each in self._give.values()]
        used += [rule.names for rule in self._rules]
        used += [self._keep.names] if self._keep else []
        return {name for names in used for name in names}


def _at(parts: Callable[[int], list[Part]], place: int) -> Callable[[int], str]:
    return lambda left: str(parts(left)[place].text)


def _parts(role: Role, chunks: Sequence[str]) -> list[Part]:
    """A rendered turn: what may be shortened, and what stands around it."""
    if not any(type(chunk) is Shortens for chunk in chunks):
        return [Part("".join(chunks), role=role)]
    parts, plain = [], ""
    for chunk in chunks:
        if type(chunk) is Shortens:
            if plain:
                parts.append(Part(plain, role=role))
            plain = ""
            parts.append(Part("".join((chunk,)), "shorten", role=role))
        else:
            plain += chunk
    return [*parts, Part(plain, role=role)] if plain else parts


def _of_row(source: str, where: str, known: set[str]) -> Text:
    """A template over a finished row. Raises ConfigError for names that no row has."""
    text = Text(source, where)
    if absent := sorted(text.needed - known):
        near = get_close_matches(absent[0], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}"
        raise ConfigError(f"{where}: a row has no {absent[0]!r}; {hint}")
    return text


def _format(stage: Stage) -> Format:
    answer: Answer = stage.answer
    if answer.format == "json":
        from engine.recipes.json_answers import JsonAnswer  # its validator takes a while to load

        try:
            return JsonAnswer(answer.schema_, repair=answer.repair)
        except ConfigError as error:
            raise ConfigError(f"stage.answer.{error}") from error
    if answer.format == "tags":
        stops = [stop.strip() for stop in stage.sampling.stop]
        closed = [name for name in (*answer.tags, *answer.optional) if f"</{name}>" in stops]
        return TagsAnswer(answer.tags, answer.optional, closed)
    if answer.format == "regex":
        assert answer.pattern is not None
        return RegexAnswer(re.compile(answer.pattern))
    if answer.format == "numbered":
        return NumberedAnswer(answer.labels)
    return ListAnswer() if answer.format == "list" else TextAnswer(keep_cut=answer.keep_cut)


# -- options and examples


def settle_options(
    declared: Mapping[str, Any], given: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Each option's value. Raises ConfigError for what the file does not declare."""
    values = {
        name: option.default if isinstance(option, Option) else option
        for name, option in declared.items()
    }
    for name, value in given.items():
        if name not in declared:
            near = get_close_matches(name, declared, n=1)
            there = ", ".join(declared) or "none"
            hint = f"did you mean {near[0]}?" if near else f"its options: {there}"
            raise ConfigError(f"--set {name}: {where} has no such option; {hint}")
        values[name] = _converted(name, value, values[name])
        option = declared[name]
        if isinstance(option, Option) and values[name] not in option.choices:
            choices = ", ".join(map(str, option.choices))
            raise ConfigError(f"--set {name}={value}: choose one of {choices}")
    return values


def _converted(name: str, value: Any, default: Any) -> Any:
    """A value of the default's type; text from the command line is read as JSON for others."""
    if isinstance(value, str) and not isinstance(default, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ConfigError(f"--set {name}={value}: write {_kind(default)}") from None
    same = isinstance(value, bool) == isinstance(default, bool)
    number = isinstance(default, float) and isinstance(value, int)
    if not same or not (number or isinstance(value, type(default))):
        raise ConfigError(f"--set {name}={value}: write {_kind(default)}")
    return value


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    kinds: dict[type, str] = {int: "a whole number", float: "a number", list: "a JSON list"}
    return kinds.get(type(value), "a text" if isinstance(value, str) else "a JSON object")


def _examples(file: TemplateFile, folder: Path) -> tuple[dict[str, list[_Example]], str]:
    """The rows that prompts show, by name; and why they cannot be had, or nothing.

    That is told when a prompt is made: answers can be decided again without them.
    """
    examples: dict[str, list[_Example]] = {}
    fault = ""
    for name, wanted in file.vary.items():
        if not isinstance(wanted, Examples):
            continue
        path = bundled_seeds() if wanted.source == SEEDS else folder / wanted.source
        examples[name] = []
        try:
            rows = [_row(row.values) for row in islice(Dataset(path), MAX_EXAMPLES)]
        except WoolmillError as error:
            fault = f"vary.{name}: {error}"
            continue
        prefix = f"{name}." if sum(isinstance(v, Examples) for v in file.vary.values()) > 1 else ""
        ids = [str(row.get("id", number)) for number, row in enumerate(rows, 1)]
        if len(set(ids)) < len(ids):
            ids = [str(number) for number in range(1, len(rows) + 1)]
        examples[name] = [
            _Example(row, f"seed:{prefix}{id}") for id, row in zip(ids, rows, strict=True)
        ]
    return examples, fault


def _row(values: dict[str, Any]) -> Record:
    row: Record = json.loads(json.dumps(values, default=str))
    return row


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _shown(value: Any) -> str:
    return shorten(as_text(value), 60) if not isinstance(value, dict) else "{…}"
