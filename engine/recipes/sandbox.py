"""Templates and expressions of a recipe's file, in Jinja's sandbox.

A template is its author's; what it is filled with is strangers': values are never read as templates
again, nothing can be included or imported, nothing is random, and what a template makes is bounded.
The time that it takes is bounded by whoever calls it (``engine.recipes.guard``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import orjson
from jinja2 import StrictUndefined, TemplateSyntaxError, Undefined, UndefinedError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import ConfigError
from engine.recipes.guard import RecipeFault
from engine.text import nearest

__all__ = ["Expression", "Missing", "Shortens", "Text", "as_text", "value_of"]

MAX_CHARACTERS = 4 * 2**20
"""Of what one template makes."""
MAX_DIGITS = 10_000
"""Digits of a power, about. ``9**9**9`` would never end, and no limit of time stops it within one
operation."""
MAX_ITEMS = 100_000
"""Of a value that is made while it is read, such as what ``map`` gives."""
ELSEWHERE = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
"""Statements that would read another file: a recipe is one file."""
ALLOWS_ABSENCE = {"defined", "undefined", "default", "d"}
"""Tests and filters that are there for names that may be missing."""


class Shortens(str):
    """A value that may be shortened where the context is too short."""

    __slots__ = ()

    def __str__(self) -> Shortens:  # so that it is still one when a template gives it out
        return self


class Missing(RecipeFault):
    """A template needs a name that is not there."""

    def __init__(self, line: str, name: str) -> None:
        super().__init__(line)
        self.name = name


def as_text(value: Any) -> str:
    """How a value stands in a text: nothing for null, JSON for lists and objects."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, Undefined):
        return str(value)  # raises
    if isinstance(value, bool | list | dict | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with fields before methods and without numbers and texts of any size."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """A column may be called ``items`` or ``keys``."""
        if isinstance(obj, dict) and attribute in obj:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str | bytes):
            raise RecipeFault("a text is not formatted by %; write {{ … }} in its place")
        if operator == "*" and not (_is_number(left) and _is_number(right)):
            size = len(left) * right if hasattr(left, "__len__") else left * len(right)
            if size > MAX_CHARACTERS:
                raise RecipeFault("a value is repeated too often")
        if operator == "**" and abs(right) * len(f"{left:.0f}") > MAX_DIGITS:
            raise RecipeFault("a power is too large")
        return super().call_binop(context, operator, left, right)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _environment() -> _Environment:
    environment = _Environment(
        undefined=StrictUndefined,
        finalize=as_text,
        keep_trailing_newline=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shorten"] = lambda value: Shortens(as_text(value))
    environment.filters["tojson"] = _json
    del environment.filters["random"]
    del environment.globals["lipsum"]
    return environment


_JINJA = _environment()
"""One for all templates; it holds no state of theirs."""


class _Compiled:
    """What templates and expressions have in common.

    Attributes:
        where: the key of the file, for messages.
        names: names that it may use.
        needed: those that it cannot do without.
        of_row: fields of ``row`` that it cannot do without.
    """

    def __init__(self, source: str, where: str) -> None:
        self.source = source
        self.where = where
        self.names: frozenset[str] = frozenset()
        self.needed: frozenset[str] = frozenset()
        self.of_row: frozenset[str] = frozenset()

    def _parse(self, source: str) -> nodes.Template:
        try:
            tree = _JINJA.parse(source)
            if foreign := next(tree.find_all(ELSEWHERE), None):
                kind = type(foreign).__name__.removeprefix("From").lower()
                raise TemplateSyntaxError(f"{kind} is not allowed in a recipe", foreign.lineno)
            _JINJA.compile(tree)
            tree = _JINJA.parse(source)  # compiling may change it
        except TemplateSyntaxError as error:
            line = f" (line {error.lineno})" if "\n" in source else ""
            raise ConfigError(f"{self.where}: {error.message}{line}") from error
        except RecursionError as error:
            raise ConfigError(f"{self.where}: it is nested too deeply") from error
        self.names = frozenset(meta.find_undeclared_variables(tree) - _JINJA.globals.keys())
        lacking = list(_may_lack(tree))
        self.needed = self.names - {node.name for node in lacking if isinstance(node, nodes.Name)}
        read = [node for node in tree.find_all(nodes.Getattr) if node not in lacking]
        fields = {node.attr for node in read if _is_row(node.node)}
        self.of_row = frozenset(fields - set(dir(dict)))  # row.items() is no field
        return tree

    def _fault(self, error: Exception, values: Mapping[str, Any]) -> RecipeFault:
        """What went wrong, as one line that names the key of the file."""
        if isinstance(error, RecipeFault):
            return RecipeFault(f"{self.where}: {error}")
        if isinstance(error, UndefinedError):
            name = next((n for n in self.names if f"'{n}' is undefined" == str(error)), None)
            if name is None:  # a field of an object, such as row.id
                words = str(error).replace("'dict object'", "the object")
                return RecipeFault(f"{self.where}: {words}")
            hint = nearest(name, values, f"there is {_some(values)}")
            return Missing(f"{self.where}: there is no {name!r}; {hint}", name)
        return RecipeFault(f"{self.where}: {type(error).__name__}: {error}".replace("\n", " "))


def _may_lack(tree: nodes.Template) -> Iterator[nodes.Node]:
    for found in tree.find_all((nodes.Test, nodes.Filter)):
        assert isinstance(found, nodes.Test | nodes.Filter)
        if found.name in ALLOWS_ABSENCE and found.node is not None:
            yield found.node


def _is_row(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == "row"


def _some(values: Mapping[str, Any]) -> str:
    names = list(values)
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


class Text(_Compiled):
    """A template that makes a text. Raises ConfigError where it is none."""

    def __init__(self, source: str, where: str) -> None:
        super().__init__(source, where)
        self._template = _JINJA.from_string(self._parse(source))
        self._root: Callable[[Any], Iterator[str]] = self._template.root_render_func

    def chunks(self, values: dict[str, Any]) -> list[str]:
        """The text in pieces, of which those that may be shortened are ``Shortens``.

        Raises RecipeFault; Missing where a name is not there.
        """
        chunks, size = [], 0
        try:
            for chunk in self._root(self._template.new_context(values)):
                size += len(chunk)
                if size > MAX_CHARACTERS:
                    raise RecipeFault(f"it makes more than {MAX_CHARACTERS:,} characters")
                chunks.append(chunk)
        except Exception as error:
            raise self._fault(error, values) from error
        return chunks

    def render(self, values: dict[str, Any]) -> str:
        """The text. Raises as ``chunks`` does."""
        return "".join(self.chunks(values))


class Expression(_Compiled):
    """An expression with a value of any JSON type. Raises ConfigError where it is none."""

    def __init__(self, source: str, where: str) -> None:
        super().__init__(source, where)
        tree = self._parse(f"{{{{ {source} }}}}")
        expression = _only_expression(tree)
        if expression is None:
            raise ConfigError(f"{where}: {source!r} is no expression")
        self._compile(expression)

    def _compile(self, expression: nodes.Expr) -> None:
        kept = nodes.Assign(nodes.Name("result", "store"), expression, lineno=1)
        self._template = _JINJA.from_string(nodes.Template([kept], lineno=1))
        self._root: Callable[[Any], Iterator[str]] = self._template.root_render_func

    def value(self, values: dict[str, Any]) -> Any:
        """The value. Raises RecipeFault; Missing where a name is not there."""
        try:
            context = self._template.new_context(values)
            for _ in self._root(context):
                pass
            result = context.vars["result"]
            kind = type(result)
            if kind is str or kind is int or result is None:
                return result
            if isinstance(result, Undefined):
                result._fail_with_undefined_error()
            return _plain(result)
        except Exception as error:
            raise self._fault(error, values) from error


class _Alone(Expression):
    """A template that is nothing but one expression."""

    def __init__(self, text: Text, expression: nodes.Expr) -> None:
        _Compiled.__init__(self, text.source, text.where)
        self.names, self.needed, self.of_row = text.names, text.needed, text.of_row
        self._compile(expression)


class _Named(_Alone):
    """One name, as most are: it is looked up, which takes a thirtieth of the time."""

    def __init__(self, text: Text, expression: nodes.Name) -> None:
        super().__init__(text, expression)
        self._name = expression.name

    def value(self, values: dict[str, Any]) -> Any:
        if self._name in values:
            return _plain(values[self._name])
        return super().value(values)


class _Rendered(Text):
    """A template as a value: its text."""

    def value(self, values: dict[str, Any]) -> Any:
        return self.render(values)


def value_of(source: str, where: str) -> Expression | _Rendered:
    """A template for a value. What is exactly one ``{{ expression }}`` keeps its JSON type."""
    text = _Rendered(source, where)
    expression = _only_expression(_JINJA.parse(source))
    if expression is None:
        return text
    if isinstance(expression, nodes.Name):
        return _Named(text, expression)
    return _Alone(text, expression)


def _only_expression(tree: nodes.Template) -> nodes.Expr | None:
    match tree.body:
        case [nodes.Output(nodes=[expression])] if not isinstance(expression, nodes.TemplateData):
            return expression
    return None


def _plain(value: Any) -> Any:
    """The value with JSON's types alone; what is made while it is read becomes a list."""
    if isinstance(value, str):
        return str.__str__(value)
    if value is None or isinstance(value, bool | int | float | list | dict):
        return value
    if isinstance(value, tuple):
        return list(value)
    if hasattr(value, "__iter__"):
        items = list(islice(iter(value), MAX_ITEMS + 1))
        if len(items) > MAX_ITEMS:
            raise RecipeFault(f"a list has more than {MAX_ITEMS:,} items")
        return items
    try:
        orjson.dumps(value)
    except TypeError:
        raise RecipeFault(f"a {type(value).__name__} is no value that a row can have") from None
    return value
