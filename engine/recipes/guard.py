"""Calls into a recipe's own code: bounded in time, checked, and with any mistake turned into words.

A recipe may be a user's Python or a template over strangers' rows. What it raises is one request's
fault, told with the line that raised it; what takes it too long is ended.
"""

from __future__ import annotations

import ctypes
import inspect
import signal
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from types import FrameType
from typing import Any, get_args

import orjson

from engine.recipes.base import (
    MOST_PIECES,
    NOT_ASKED,
    RECIPE_ERROR,
    Ask,
    Part,
    Piece,
    Recipe,
    Refusal,
    Role,
)
from engine.records import Completion, Record

__all__ = [
    "NotAsked",
    "RecipeFault",
    "compared_text",
    "parsed",
    "parts_of",
    "reduced_of",
    "time_limit",
    "unchanged_of",
]

LIMIT_S = 10.0
"""For one answer; those of real recipes take microseconds."""
PROMPT_LIMIT_S = 2.0
"""For one prompt; all of a run wait meanwhile."""
ROLES = get_args(Role)
"""The roles that a part may have, from the type; user code is not held to types."""
MOST_WORDS = 500
"""Characters of an exception's text that are told."""
MOST_NEAR = 30
"""Characters of a prompt that are told, in front of what cannot be sent."""


class RecipeFault(Exception):
    """What a recipe's own code failed at; ``str`` is one line for the person."""

    reason = RECIPE_ERROR


class NotAsked(RecipeFault):
    """Raised by ``prompt`` where there is nothing to ask about a row: nobody is, nothing is paid,
    and the row goes on where the recipe ``keeps_parent``.
    """

    reason = NOT_ASKED


class _TimeUp(BaseException):
    """Raised within code that takes too long; no ``except Exception`` there holds it up."""


@contextmanager
def time_limit(limit_s: float | None = None) -> Iterator[None]:
    """End what runs within after ``limit_s``, or ``LIMIT_S``, by a RecipeFault.

    In the main thread by a timer signal, which also ends sleeps and regular expressions; in others
    by an exception that takes effect at the next bytecode. It fires again until it is heeded. A
    timer that the program had set goes on afterwards.
    """
    seconds = LIMIT_S if limit_s is None else limit_s
    main = threading.current_thread() is threading.main_thread()
    watch: _Alarm | _Watchdog = _Alarm() if main else _watchdog
    try:
        watch.begin(seconds)
        try:
            yield
        finally:
            watch.end()
    except _TimeUp:
        watch.end()
        raise RecipeFault(f"it took more than {seconds:g} s") from None


class _Alarm:
    """Ends a call in the main thread."""

    def __init__(self) -> None:
        self._armed = False
        self._began = time.monotonic()

    def begin(self, seconds: float) -> None:
        self._armed = True
        self._handler = signal.signal(signal.SIGALRM, self._ring)
        self._timer = signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)

    def end(self) -> None:
        if not self._armed:
            return
        self._armed = False  # from here on a late ring does nothing
        left, interval = self._timer
        if left:  # somebody else's, who waits for it
            left = max(1e-6, left - (time.monotonic() - self._began))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, left, interval)

    def _ring(self, _signum: int, _frame: FrameType | None) -> None:
        if self._armed:
            raise _TimeUp


class _Watchdog:
    """Ends calls in threads other than the main one."""

    def __init__(self) -> None:
        self._until: dict[int, float] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self, seconds: float) -> None:
        with self._lock:
            self._until[threading.get_ident()] = time.monotonic() + seconds
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, daemon=True)
                self._thread.start()

    def end(self) -> None:
        with self._lock:
            self._until.pop(threading.get_ident(), None)
            # What was raised and has not taken effect yet must not do so later.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.get_ident()), None)

    def _watch(self) -> None:
        while True:
            time.sleep(0.5)
            with self._lock:
                if not self._until:  # it is started again where it is needed
                    self._thread = None
                    return
                for thread, until in self._until.items():
                    if time.monotonic() > until:
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(
                            ctypes.c_ulong(thread), ctypes.py_object(_TimeUp)
                        )


_watchdog = _Watchdog()


def parts_of(recipe: Recipe, ask: Ask) -> list[Part]:
    """What ``recipe.prompt`` gives. Raises RecipeFault; NotAsked where that asks nothing about a
    row, which a model would answer with words about anything.
    """
    parts = _parts_of(recipe, ask)
    if ask.row is not None and _is_blank(parts):
        raise NotAsked("the prompt is blank: the row has nothing where the recipe asks about it")
    return parts


def _parts_of(recipe: Recipe, ask: Ask) -> list[Part]:
    try:
        if recipe.builtin:
            return _sendable(list(recipe.prompt(ask)))
        with time_limit(PROMPT_LIMIT_S):
            parts = list(_given(recipe.prompt(ask), "prompt", "Part"))
    except (RecipeFault, KeyboardInterrupt):
        raise
    except BaseException as error:  # sys.exit() is no more than a mistake about one request
        raise RecipeFault(_line(error)) from error
    if not parts or not all(isinstance(part, Part) for part in parts):
        wrong = next((part for part in parts if not isinstance(part, Part)), None)
        of = f"a list of {_kind(wrong)}" if parts else "an empty list"
        raise RecipeFault(f"prompt() gave {of} where a list of Part is meant")
    return _sendable(parts)


def _is_blank(parts: list[Part]) -> bool:
    """The last turn of the user, which is what is asked, has no words."""
    for role, turn in groupby(reversed(parts), key=lambda part: part.role):
        if role == "user":
            return all(isinstance(part.text, str) and not part.text.strip() for part in turn)
    return False


def _given(what: Any, method: str, of: str) -> Iterable[Any]:
    """What a method gave, which must be several things. Raises RecipeFault."""
    if inspect.iscoroutine(what):
        what.close()
        raise RecipeFault(f"{method}() is asynchronous; the functions of a recipe are plain ones")
    if what is None or isinstance(what, (str, bytes, dict, Part)):
        raise RecipeFault(f"{method}() gave {_kind(what)} where a list of {of} is meant")
    return what  # type: ignore[no-any-return]


def _sendable(parts: list[Part]) -> list[Part]:
    """The parts, of which no request can be made where a row's text is none that UTF-8 has."""
    for part in parts:
        if part.role not in ROLES:
            raise RecipeFault(
                f"prompt() gave a Part of role {part.role!r}; there are {', '.join(ROLES)}"
            )
    for text in (part.text for part in parts if not callable(part.text)):
        if not isinstance(text, str):
            raise RecipeFault(f"prompt() gave a Part of {_kind(text)} where a text is meant")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            near = text[max(0, error.start - MOST_NEAR) : error.start]
            raise RecipeFault(
                f"the prompt holds half of a surrogate pair, which cannot be sent, behind {near!r}"
            ) from error
    return parts


def parsed(recipe: Recipe, ask: Ask, answer: Completion) -> list[Piece]:
    """What ``recipe.parse`` finds, each piece a row, already filtered, or a reason; never raises.

    An answer that nothing was found in gives one piece that says so.
    """
    pieces: list[Piece] = []
    try:
        if recipe.builtin:
            for found in recipe.parse(ask, answer):
                own = isinstance(found, Piece)
                piece = found if own else _piece(recipe, found, len(pieces), pieces)
                pieces.append(_filtered(recipe, piece))
        else:
            with time_limit():
                for found in _given(recipe.parse(ask, answer), "parse", "rows"):
                    if len(pieces) == MOST_PIECES:  # it ran away: nothing of it can be meant
                        pieces.clear()
                        raise RecipeFault(f"parse() gave more than {MOST_PIECES:,} pieces")
                    pieces.append(_filtered(recipe, _piece(recipe, found, len(pieces), pieces)))
    except RecipeFault as error:
        pieces.append(Piece(_next(pieces), None, (RECIPE_ERROR, str(error))))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is this answer's
        pieces.append(Piece(_next(pieces), None, (RECIPE_ERROR, _line(error))))
    return pieces or [Piece(0, None, ("no_record", "the answer is blank"))]


def reduced_of(recipe: Recipe, ask: Ask, rows: Sequence[Record | None]) -> Piece:
    """What ``recipe.reduce`` makes of the samples of an input row; never raises."""
    try:
        with nullcontext() if recipe.builtin else time_limit():
            return _filtered(recipe, _piece(recipe, recipe.reduce(ask, rows), 0, ()))
    except RecipeFault as error:
        return Piece(0, None, (RECIPE_ERROR, str(error)))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is this row's
        return Piece(0, None, (RECIPE_ERROR, _line(error)))


def unchanged_of(recipe: Recipe, row: Record, position: int) -> Piece:
    """An input row that no answer improves, as a piece; never raises."""
    try:
        with nullcontext() if recipe.builtin else time_limit():
            record = recipe.unchanged(row)
        if not isinstance(record, dict):
            raise RecipeFault(f"unchanged() gave {_kind(record)} where a row is meant")
        return Piece(position, record)
    except RecipeFault as error:
        return Piece(position, None, (RECIPE_ERROR, str(error)))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this row's
        return Piece(position, None, (RECIPE_ERROR, _line(error)))


def compared_text(recipe: Recipe, row: Record) -> str | None:
    """What ``recipe.compared`` gives. Raises RecipeFault."""
    if recipe.builtin:
        return recipe.compared(row)
    try:
        with time_limit():
            text = recipe.compared(row)
    except (RecipeFault, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise RecipeFault(_line(error)) from error
    if text is not None and not isinstance(text, str):
        raise RecipeFault(f"compared() gave {_kind(text)} where a text or None is meant")
    return text


def _filtered(recipe: Recipe, piece: Any) -> Piece:
    """The piece with what the recipe's filters say of its row."""
    if piece.record is None or piece.refusal is not None:
        return piece  # type: ignore[no-any-return]
    refusal = recipe.refuse(piece.record)
    if refusal is None:
        return piece  # type: ignore[no-any-return]
    if not _is_refusal(refusal):
        raise RecipeFault(f"refuse() gave {_kind(refusal)} where a reason and a detail are meant")
    return Piece(piece.position, piece.record, (refusal[0], refusal[1]))


def _piece(recipe: Recipe, found: object, position: int, before: Sequence[Piece]) -> Piece:
    """What a parser gave, as a piece. Raises RecipeFault for what is none."""
    refusal: Refusal | None = None
    record: object = found
    if isinstance(found, Piece):
        position, record, refusal = found.position, found.record, found.refusal
        if before and position <= before[-1].position:
            raise RecipeFault("parse() gave pieces whose positions do not rise")
    elif _is_refusal(found):
        record, refusal = None, (found[0], found[1])  # type: ignore[index]
    if record is None:
        if not _is_refusal(refusal):
            raise RecipeFault(f"parse() gave {_kind(found)} where a row or a refusal is meant")
        return Piece(position, None, refusal)
    if not isinstance(record, dict):
        raise RecipeFault(f"parse() gave {_kind(found)} where a row or a refusal is meant")
    if record.keys() != set(recipe.fields):
        raise RecipeFault(
            f"parse() gave a row of {', '.join(map(str, record)) or 'no fields'}; "
            f"the recipe's fields are {', '.join(recipe.fields)}"
        )
    row = {name: record[name] for name in recipe.fields}
    try:
        orjson.dumps(row)
    except TypeError as error:
        if "surrogates" not in str(error):
            raise RecipeFault(f"a row's value is none that JSON has: {error}") from error
    return Piece(position, row, refusal)


def _is_refusal(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(text, str) for text in value)
    )


def _next(pieces: Sequence[Piece]) -> int:
    return pieces[-1].position + 1 if pieces else 0


def _kind(value: object) -> str:
    name = type(value).__name__
    return "nothing" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _line(error: BaseException) -> str:
    """What was raised, and the innermost line of the recipe's own that did."""
    words = f"{type(error).__name__}: {error}".replace("\n", " ")[:MOST_WORDS]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/engine/recipes/guard.py" not in frame.filename]
    if not own:
        return words
    last = own[-1]
    return f"{words} ({last.filename.rsplit('/', 1)[-1]}:{last.lineno})"
