"""Whether an answer is right, said by code that may hang, crash or take the memory: Math-Verify, or
a function of the user's. It runs in a process of its own, which is killed where it takes too long.

Messages are frames (``engine.processes.frames``). The process takes ``{"row", "gold", "answer", "text"}`` and says
``{"verified": true | false | null, "detail"}``; the end of its input ends it at once.
"""

from __future__ import annotations

import ast
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import orjson

from engine.errors import ConfigError, WoolmillError
from engine.processes.children import end_group, environment, how_it_ended, python_command, start
from engine.processes.frames import Frames, frame, keep_pipes, read_frame
from engine.recipes.load import file_module
from engine.records import Record
from engine.text import shorten

__all__ = ["MATH_VERIFY", "Verdict", "Verifier"]

MATH_VERIFY = "math-verify"
"""As it is named in ``--set verifier=``: Hugging Face's library, from ``pip install math-verify``.
"""
Verdict = tuple[bool | None, str]
"""Whether the answer is right (None: nobody can say), and a detail for the person."""
START_S = 60.0
"""Until the process has loaded what it needs, on a machine that is busy."""
MOST_DETAIL = 300
"""Characters kept of what a verifier raised; the answer itself may be in it."""
MOST_SAID = 1 << 20
"""Bytes of one verdict. A function that prints without end must not fill this process's memory."""


class Verifier:
    """The parent's side.

    Args:
        spec: ``math-verify``, or ``FILE.py:FUNCTION``, which is called with the input row, the
            final answer and the whole text, and returns whether the answer is right.
        limit_s: for one verdict.

    Raises ConfigError where there is no such package, file or function.
    """

    def __init__(self, spec: str, limit_s: float) -> None:
        if limit_s <= 0:
            raise ConfigError(
                f"--set limit_s={limit_s:g}: write the seconds that a verdict may take"
            )
        self._spec = spec
        self._limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None
        self._lock = threading.Lock()
        _look_up(spec)

    def verdict(self, row: Record, gold: str, answer: str, text: str) -> Verdict:
        """What the code says, or that it did not come to say it. Blocks for ``limit_s`` at most,
        and at the first time until the process is there.
        """
        asked = {"row": row, "gold": gold, "answer": answer, "text": text}
        request = orjson.dumps(asked, default=str)
        with self._lock:
            if self._process is None and (fault := self._start()):
                return None, fault
            assert self._process is not None
            assert self._process.stdin is not None
            try:
                self._process.stdin.writelines(frame(request))
                self._process.stdin.flush()
                said = self._message(self._limit_s)
            except OSError:  # it has ended
                said = b""
            if said is None:
                self._stop(kills=True)
                return None, f"no verdict within {self._limit_s:g} s"
            try:
                found = orjson.loads(said)
                return found["verified"], found["detail"]
            except ValueError:
                return None, f"the verifier ended {self._stop()}"

    def _start(self) -> str:
        """Start the process; why it did not, or nothing."""
        process = start(
            python_command("-m", "engine.recipes.verifier", self._spec),
            environment("engine"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._process = process
        self._end = weakref.finalize(self, _kill, process)
        said = self._message(START_S)
        if said:
            fault: str = orjson.loads(said)["fault"]
            if not fault:
                return ""
            self._stop(kills=True)
            return fault
        if said is None:
            self._stop(kills=True)
            return f"the verifier did not load within {START_S:g} s"
        return f"the verifier ended {self._stop()}"

    def _message(self, seconds: float) -> bytes | None:
        """The next message; None: there is none in time; empty: the process has ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        out, until, frames = self._process.stdout.fileno(), time.monotonic() + seconds, Frames()
        while len(frames) <= MOST_SAID:
            left = until - time.monotonic()
            if left <= 0 or not select.select([out], [], [], left)[0]:
                return None
            piece = os.read(out, MOST_SAID)
            if not piece:
                break
            for message in frames.take_in(piece):
                return message.head
        return b""

    def _stop(self, *, kills: bool = False) -> str:
        """End the process, and say how it had ended by itself."""
        process, self._process = self._process, None
        if process is None:
            return "before it began"
        with suppress(subprocess.TimeoutExpired):  # it may be about to end by itself
            process.wait(timeout=0 if kills else 1.0)
        self._end()
        return how_it_ended(process.returncode)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it has started: it leads a session of its own."""
    end_group(process.pid)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # what was written to it has no reader any more
                pipe.close()


def _look_up(spec: str) -> None:
    """Raises ConfigError for what cannot be there when it is needed."""
    if spec == MATH_VERIFY:
        if find_spec("math_verify") is None:
            raise ConfigError(
                f"--set verifier={spec} needs a package: pip install 'woolmill[verify]'"
            )
        return
    file, _, name = spec.rpartition(":")
    if not file.endswith(".py") or not name:
        raise ConfigError(f"--set verifier={spec}: write match, {MATH_VERIFY}, or FILE.py:FUNCTION")
    try:
        tree = ast.parse(Path(file).read_bytes())
    except OSError as error:
        raise ConfigError(
            f"--set verifier={spec}: {file} cannot be read: {error.strerror}"
        ) from error
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"--set verifier={spec}: {file} is no Python: {error}") from error
    names = {each.name for each in tree.body if isinstance(each, ast.FunctionDef | ast.ClassDef)}
    names |= {each.id for each in ast.walk(tree) if isinstance(each, ast.Name)}
    names |= {each.asname or each.name for each in ast.walk(tree) if isinstance(each, ast.alias)}
    if name not in names:
        raise ConfigError(f"--set verifier={spec}: there is no function {name} in {file}")


# The process's side


def _function(spec: str) -> Callable[[dict[str, Any]], bool | None]:
    """What gives the verdict. Raises whatever loading it raises."""
    if spec == MATH_VERIFY:
        import logging

        import math_verify

        # It warns at each call that a time limit of its own is off.
        logging.getLogger("math_verify").setLevel(logging.ERROR)

        def by_math(asked: dict[str, Any]) -> bool | None:
            # Its own time limits are alarms; the process is killed instead.
            gold = math_verify.parse(asked["gold"], parsing_timeout=None)
            if not gold:
                gold = math_verify.parse(f"\\boxed{{{asked['gold']}}}", parsing_timeout=None)
            answer = math_verify.parse(f"\\boxed{{{asked['answer']}}}", parsing_timeout=None)
            if not gold:
                return None
            return bool(math_verify.verify(gold, answer, timeout_seconds=None))

        return by_math
    file, _, name = spec.rpartition(":")
    function = getattr(file_module(Path(file), "--set verifier="), name)

    def by_function(asked: dict[str, Any]) -> bool | None:
        said = function(asked["row"], asked["answer"], asked["text"])
        if said is None:
            return None
        if said not in (True, False):  # a "no" would be as true as a "yes"
            raise TypeError(f"{name} returned {said!r:.40}, not true, false or None")
        return bool(said)

    return by_function


def _verdict(judge: Callable[[dict[str, Any]], bool | None], asked: dict[str, Any]) -> Verdict:
    try:
        said = judge(asked)
    except Exception as error:  # noqa: BLE001 - the user's code; the verdict tells
        words = shorten(f"{type(error).__name__}: {error}".replace("\n", " "), MOST_DETAIL)
        return None, f"the verifier raised {words}"
    return said, "" if said is not None else "the verifier cannot tell"


def _listen(source: BinaryIO, inbox: queue.SimpleQueue[bytes]) -> NoReturn:
    """Take in requests, and end with the parent, whatever goes on, with all that was started."""
    while (message := read_frame(source)) is not None:
        inbox.put(message.head)
    os.killpg(0, signal.SIGKILL)
    os._exit(0)


def main() -> NoReturn:
    """Take requests until the input ends; what the code prints goes to standard error."""
    source, out = keep_pipes()

    def say(message: dict[str, Any]) -> None:
        out.writelines(frame(orjson.dumps(message)))
        out.flush()

    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()  # one request: the next comes after it
    threading.Thread(target=_listen, args=(source, inbox), daemon=True).start()
    try:
        judge = _function(sys.argv[1])
    except (Exception, SystemExit) as error:  # noqa: BLE001 - told, and this process is over
        words = str(error) if isinstance(error, WoolmillError) else repr(error)
        say({"fault": shorten(words, MOST_DETAIL)})
        threading.Event().wait()
    say({"fault": ""})
    while True:
        verified, detail = _verdict(judge, orjson.loads(inbox.get()))
        say({"verified": verified, "detail": detail})


if __name__ == "__main__":
    main()
