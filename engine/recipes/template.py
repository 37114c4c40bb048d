"""Recipes in a TOML file: templates ask, a format reads the answer, templates make the rows.

    row, vary, options ─▶ system, user, assistant ─▶ … ─▶ answer.format ─▶ give ─▶ refuse, keep

The names that templates know: the fields of the input row (and all of it as ``row``), what ``vary``
draws, ``options``, ``sample`` and ``index``; after the answer also ``text``, ``reasoning``,
``item`` and the fields that the format found, which come before the row's.

A file with several stages is a ``TemplateChain``; each of its stages is a ``Template`` that asks
about the rows of the one before, and keeps their fields. So what a stage needs is checked when the
file is read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.recipes.answers import Fields, TextAnswer
from engine.recipes.base import CUT, RECIPE_ERROR, Ask, Part, Piece, Recipe, Refusal, Role, chat_of
from engine.recipes.examples import Example, examples_of
from engine.recipes.formats import format_of
from engine.recipes.guard import RecipeFault
from engine.recipes.load import CODED
from engine.recipes.options import settle_options
from engine.recipes.reducing import Reduction, reduction
from engine.recipes.rules import Rule
from engine.recipes.sandbox import Expression, Missing, Shortens, Text, as_text, value_of
from engine.recipes.template_file import OWN_NAMES, ROUND, Examples, Stage, TemplateFile, read_file
from engine.records import Completion, Record
from engine.text import nearest, shorten

__all__ = ["BUILTIN", "Template", "TemplateChain", "builtin_templates", "load_template"]

BUILTIN = "engine.recipes"
"""The package whose folder ``builtin`` has the recipes that ship."""
SUFFIX = ".toml"
"""By which a recipe is known to be a file and no built-in name."""
MAX_FILE_BYTES = 16 * 2**20
"""Read at most, so that a dataset named by mistake is not read whole."""


def load_template(spec: str, options: Mapping[str, Any]) -> Template | TemplateChain:
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
        return _made(read_file(data, str(path)), options, str(path), path.parent)
    known = builtin_templates()
    if spec not in known:
        names = sorted((*CODED, *known))
        raise ConfigError(
            f"--recipe {spec}: there is no such recipe (one of your own is FILE.toml or "
            f"FILE.py:CLASS); {nearest(spec, names)}"
        )
    content = read_file(known[spec].read_bytes(), spec)
    return _made(content, options, spec, Path(str(known[spec])).parent)


def _made(
    file: TemplateFile, options: Mapping[str, Any], where: str, folder: Path
) -> Template | TemplateChain:
    """The recipe of a file. Raises ConfigError, naming ``where``."""
    settled = settle_options(file.options, options, where)
    try:
        stages: list[Template] = []
        for _ in file.steps():
            stages.append(Template(file, settled, folder, stages))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return stages[0] if len(stages) == 1 else TemplateChain(file, stages)


def builtin_templates() -> dict[str, Traversable]:
    """The files of the recipes that ship with the package, by name."""
    folder = resources.files(BUILTIN) / "builtin"
    if not folder.is_dir():
        return {}
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return {f.name.removesuffix(SUFFIX): f for f in files if f.name.endswith(SUFFIX)}


class Template(Recipe):
    """One stage that a file describes; see the head of this module.

    Args:
        file: what the file says.
        options: the value of each of its options.
        folder: what its paths are relative to.
        before: the file's stages before this one.

    Raises ConfigError for templates that are none and names that cannot be there.
    """

    def __init__(
        self,
        file: TemplateFile,
        options: Mapping[str, Any],
        folder: Path,
        before: Sequence[Template] = (),
    ) -> None:
        steps = file.steps()
        step, self._round, stage = steps[len(before)]
        self.file = file
        self.name, self.version = file.recipe.name, file.recipe.version
        self._at = "stage"
        if len(steps) > 1:
            self.name, self._at = f"{self.name}/{step}", f"stage.{step}"
        self.language = file.recipe.language or ""
        self.asks = "completions" if stage.completion else "chat"
        self._options = options
        self._examples, self._no_examples = examples_of(file, folder)
        self._before = before[-1].fields if before else None
        self._is_last = len(before) + 1 == len(steps)
        # Each stage draws anew, as its requests have the same numbers.
        self._draws = ("vary", step) if before else ("vary",)
        self._own_names = OWN_NAMES | ({ROUND} if self._round else set())
        self.keeps_parent = stage.on_refuse == "keep_parent"
        self.model = stage.model or ""
        if stage.model in file.models:
            self.model_settings = file.models[stage.model].model_dump(exclude_unset=True)
        self._of_input(stage, folder)
        self._format = format_of(stage.answer, stage.sampling.stop, f"{self._at}.answer")
        self.most = 1 if stage.reduce else self._format.most
        self._compile(stage)
        self._settle_compare(stage, before)
        if self._before is not None:
            self._check_names({*self._before})
        self._sampling = self._body(stage)
        self.asks_sha256, self.source_sha256 = self._hashes(stage)

    def _of_input(self, stage: Stage, folder: Path) -> None:
        """What the stage's input is."""
        rows = self.file.rows if self._before is None else None
        self.needs_rows = rows is not None or self._before is not None
        if rows is not None and rows.path is not None:
            self.rows_path = folder / rows.path
        self.samples = stage.samples or (rows.samples if rows is not None else 1)

    def _compile(self, stage: Stage) -> None:
        at = self._at
        turns: list[tuple[Role, str]] = [("user", "completion"), ("system", "system")]
        turns += [("user", "user"), ("assistant", "assistant")]
        self._turns = [
            (role, Text(source, f"{at}.{key}"))
            for role, key in turns
            if (source := getattr(stage, key)) is not None
        ]
        self._prefill = self._turns[-1][1] if stage.assistant else None
        given = stage.give or {name: f"{{{{ {name} }}}}" for name in self._format.names or ()}
        if not given and not (self._before and (stage.keep or stage.refuse)):
            raise ConfigError(
                f'{at}.give is missing: name the fields of a row, as in give = {{ answer = "{{{{ text }}}}" }}'
            )
        self._kept = self._kept_fields(stage, given)
        self.fields = (*self._kept, *given)
        self._give = {name: value_of(source, f"{at}.give.{name}") for name, source in given.items()}
        self._rules = [
            Rule(rule, f"{at}.refuse {n}", self.fields) for n, rule in enumerate(stage.refuse, 1)
        ]
        self._keep = Expression(stage.keep, f"{at}.keep") if stage.keep else None
        self._reduce: Reduction | None = None
        if stage.reduce:
            self.reduces = True
            self._reduce = reduction(stage.reduce, self.fields, tuple(given), f"{at}.reduce")
        turns_of = self.file.export.messages if self._is_last else ()
        self._messages = [
            (turn.role, _of_row(turn.content, f"export.messages {n}", self._of_row))
            for n, turn in enumerate(turns_of, 1)
        ]
        self._after = self._needed_after()

    def _kept_fields(self, stage: Stage, given: Mapping[str, str]) -> tuple[str, ...]:
        """Fields of the row before that stay. Raises ConfigError."""
        before = self._before or ()
        if absent := next((name for name in stage.drop if name not in before), None):
            raise ConfigError(f"{self._at}.drop: {_no_such(absent, before)}")
        new = sorted(given.keys() - set(before))
        if self.keeps_parent and new and self._before is not None:
            raise ConfigError(
                f"{self._at}.give.{new[0]}: on_refuse keeps the row before where none is accepted, "
                f"which has no {new[0]!r}; give it in an earlier stage too"
            )
        return tuple(name for name in before if name not in given and name not in stage.drop)

    @property
    def _of_row(self) -> set[str]:
        return {*self.fields, "options"}

    def _settle_compare(self, stage: Stage, before: Sequence[Template]) -> None:
        """A stage's own ``compare``; that of the recipe is for the first stage that gives all that
        it names.
        """
        source, at = stage.compare, f"{self._at}.compare"
        common = self.file.recipe.compare
        self._compares_common = False
        if source is None and common is not None and not any(b._compares_common for b in before):
            self._compares_common = Text(common, "recipe.compare").needed <= self._of_row
            if self._compares_common or self._is_last:
                source, at = common, "recipe.compare"
        self._compare = None if source is None else _of_row(source, at, self._of_row)

    def _check_names(self, before: set[str]) -> None:
        """Raises ConfigError for a name that the stages before do not give."""
        asking = before | self.file.vary.keys() | self._own_names
        texts: list[tuple[Text | Expression, set[str]]] = [(t, asking) for _, t in self._turns]
        if self._format.names is not None:  # else the answer may have any
            found = asking | set(self._format.names)
            whole = found | set(self.fields)
            texts += [(each, found) for each in self._give.values()]
            texts += [(rule.when, whole) for rule in self._rules if rule.when is not None]
            texts += [(self._keep, whole)] if self._keep is not None else []
        for text, known in texts:
            if absent := sorted(text.needed - known):
                raise ConfigError(f"{text.where}: {_no_such(absent[0], known)}")
            if absent := sorted(text.of_row - before):
                raise ConfigError(f"{text.where}: {_no_such(absent[0], before)}")

    def _needed_after(self) -> frozenset[str]:
        """Names that only the input row can give, and that the answer's templates need."""
        kept = frozenset(self.fields) if self.keeps_parent else frozenset()
        if self._format.names is None:
            return kept  # the answer may have any
        known = {*self._own_names, *self._format.names, *self.file.vary}
        needed = {name for each in self._give.values() for name in each.needed}
        later = [rule.needed for rule in self._rules]
        later += [self._keep.needed] if self._keep else []
        needed |= {name for names in later for name in names} - set(self.fields)
        return kept | frozenset(needed - known)

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
        self, role: Role, text: Text, values: Fields, shown: Sequence[tuple[str, Example]]
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

    def _left(self, shown: Sequence[tuple[str, Example]], left: int) -> Fields:
        """The examples by name, the first ``left`` of them."""
        values: Fields = {name: [] for name in self._examples}
        for name, example in shown[:left]:
            values[name].append(example.row)
        return values

    def _values(self, ask: Ask) -> tuple[Fields, list[tuple[str, Example]]]:
        """What templates are filled with, and the examples among it."""
        values: Fields = {}
        if ask.row is not None:
            values = {**ask.row, "row": ask.row}
        shown: list[tuple[str, Example]] = []
        for name, choices in self.file.vary.items():
            if isinstance(choices, Examples):
                chosen = ask.choose(self._examples[name], choices.count, *self._draws, name)
                shown += [(name, example) for example in chosen]
                values[name] = [example.row for example in chosen]
            else:
                values[name] = choices[ask.draw(*self._draws, name) % len(choices)]
        values["options"] = self._options
        values["sample"], values["index"] = ask.sample, ask.index
        if self._round:
            values[ROUND] = self._round
        return values, shown

    def _say_absent(self, name: str, values: Fields) -> None:
        there = [*values, *(self._format.names or ())]
        rows = "the input row has none" if "row" in values else "without --rows there is none"
        raise RecipeFault(
            f"the answer's templates need {name!r}, and {rows}; {nearest(name, there)}"
        )

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
            record = {name: values["row"][name] for name in self._kept}
            record |= {name: template.value(known) for name, template in self._give.items()}
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
        return self._own_names | self.file.vary.keys()

    def _refusal(self, values: Fields) -> Refusal | None:
        for rule in self._rules:
            if refusal := rule.refusal(values):
                return refusal
        if self._keep is not None and not self._keep.value(values):
            said = [f"{name} = {_shown(values.get(name))}" for name in sorted(self._keep.names)]
            return "not_kept", f"{', '.join(said)}: not {self._keep.source}"
        return None

    # -- rows

    def reduce(self, ask: Ask, rows: Sequence[Record | None]) -> Record | Refusal:
        assert self._reduce is not None
        given = [row for row in rows if row is not None]
        return self._reduce(given) if given else ("no_sample", "no sample gave a row")

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

    def _hashes(self, stage: Stage) -> tuple[str, str]:
        """Of what prompts follow from, and of what decisions follow from."""
        said = stage.model_dump(mode="json", by_alias=True)
        shown = {
            name: [[example.source, example.row] for example in examples]
            for name, examples in self._examples.items()
        }
        vary = self.file.model_dump(mode="json", include={"vary"}, by_alias=True)["vary"]
        both = [self.name, vary, self._options, said["assistant"], said["sampling"]]
        asked = [said[name] for name in ("system", "user", "completion")]
        decided = [said[name] for name in ("answer", "give", "refuse", "keep")]
        after = self._names_after()
        kept = {name: rows for name, rows in shown.items() if name in after}
        compare = None if self._compare is None else self._compare.source
        of_stages = [self.fields, stage.reduce, stage.on_refuse]
        if self._before is None and of_stages[1:] == [None, None]:
            of_stages = []  # as in runs made before there were stages
        return (
            _digest([*both, shown, *asked, self._sampling.get("response_format")]),
            _digest([*both, kept, *decided, compare, *of_stages]),
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
        raise ConfigError(
            f"{where}: a row has no {absent[0]!r}; {nearest(absent[0], sorted(known))}"
        )
    return text


def _no_such(name: str, known: Iterable[str]) -> str:
    """What is said of a name that the rows of the stage before have not."""
    return f"no stage before gives {name!r}; {nearest(name, sorted(known))}"


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _shown(value: Any) -> str:
    return shorten(as_text(value), 60) if not isinstance(value, dict) else "{…}"


class TemplateChain(Recipe):
    """All stages of a file that has several.

    Args:
        file: what the file says.
        stages: two or more, in order.
    """

    asks = "any"

    def __init__(self, file: TemplateFile, stages: Sequence[Template]) -> None:
        first, last = stages[0], stages[-1]
        self.file = file
        self.name, self.version = file.recipe.name, file.recipe.version
        self.language, self.fields = first.language, last.fields
        self.needs_rows, self.rows_path = first.needs_rows, first.rows_path
        self.samples = first.samples
        self._stages = tuple(stages)

    @property
    def stages(self) -> Sequence[Template]:
        return self._stages

    def messages(self, row: Record) -> list[dict[str, str]] | None:
        return self._stages[-1].messages(row)
