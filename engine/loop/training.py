"""The trainer as a child: its commands, its way to the end, and what went wrong in its words.

Only files cross: datasets and a model's folder go in, a model's folder and ``loss.json`` come out.
The child ends with this process however that ends (``tether.py``). Its log is locked by whoever
writes it: a start waits there until nothing is left of a child that an earlier start has lost.
"""

from __future__ import annotations

import fcntl
import logging
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from engine import errors
from engine.errors import InputError, UnavailableError, WoolmillError
from engine.files import open_log, tail_lines
from engine.processes.children import (
    end_group,
    environment,
    how_it_ended,
    python_command,
    start,
    tethered,
)
from engine.text import shorten

__all__ = ["LOSS", "losses", "trainer"]

_log = logging.getLogger(__name__)

LOSS = "loss.json"
LATE_S = 600.0
"""How long a trainer that was asked to end may take to save where it is."""
OUR_ERRORS = {
    kind.exit_code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, WoolmillError) and kind is not WoolmillError
}
"""By exit code: the trainer has the same."""
OWN_LINE = re.compile(r"^trainer(?:\[rank \d+\])?: (.+)", re.MULTILINE)
TORCHRUN_STATUS = re.compile(r"^ +exitcode +: (\d+)", re.MULTILINE)


def trainer(
    program: str,
    given: Mapping[str, Any],
    own: Mapping[str, Any],
    *,
    processes: int,
    cache: Path,
    log: Path,
) -> None:
    """Run ``trainer`` or ``trainer.evaluate`` to its end, with the person's flags (``given``) and
    the loop's ``own``, which go before them. Raises WoolmillError where it fails.
    """
    command = ["-m", program]
    if processes > 1:
        rendezvous = ["--standalone", "--nproc_per_node", str(processes)]
        command = ["-m", "torch.distributed.run", *rendezvous, *command]
    flags: dict[str, Any] = {"template": "chat", **given, **own, "dataset_cache_dir": cache}
    for name, value in flags.items():
        several = value if isinstance(value, list | tuple) else [value]
        command += [f"--{name}", *map(str, several)]
    _run(python_command(*command), log)


def losses(folder: Path) -> list[float]:
    """What ``trainer.evaluate`` has written, in the order of its files. Raises InputError."""
    path = folder / LOSS
    try:
        return [float(each["loss"]) for each in orjson.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: is not what the trainer writes ({error})") from error


def _run(command: Sequence[str], path: Path) -> None:
    with open_log(path) as log:
        _wait_for_earlier(log, path)
        before = path.stat().st_size
        try:
            child = start(
                tethered(*command),
                environment("engine", "hub"),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )
        except OSError as error:
            raise UnavailableError(f"the trainer cannot be started: {error.strerror}") from error
        try:
            status = child.wait()
        except BaseException:  # Ctrl-C or the like, raised again
            end_group(child.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                child.wait(LATE_S)
            raise
        finally:
            assert child.stdin is not None
            child.stdin.close()  # the tether: what is left of the child dies of it
            child.wait()
    if status:
        said, own_status = _last_words(path, before)
        said, status = said or f"it ended {how_it_ended(status)}", own_status or status
        raise OUR_ERRORS.get(status, UnavailableError)(f"training: {said}; its log is {path}")


def _wait_for_earlier(log: BinaryIO, path: Path) -> None:
    """Until nothing writes the log any more."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _log.warning("waiting for the end of what an earlier start left: it writes %s", path)
        fcntl.flock(log, fcntl.LOCK_EX)


def _last_words(path: Path, start: int) -> tuple[str, int | None]:
    """The last line that the trainer itself said after ``start``, empty where there is none, and
    its exit status as torchrun tells it, whose own is always 1.
    """
    text = "\n".join(tail_lines(path, after=start, most=1 << 20))
    own = OWN_LINE.findall(text)
    statuses = TORCHRUN_STATUS.findall(text)
    return shorten(own[-1], 400) if own else "", int(statuses[-1]) if statuses else None
