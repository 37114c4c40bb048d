"""What can go wrong, as a tree. Each error is one line for the person and knows its exit code.

    WoolmillError                      70  when nothing more exact fits
    ├── InternalError                  70  a bug of ours; what arrived is kept
    ├── UsageError                     64  the command line
    ├── InputError                     65  seeds, datasets, a damaged run store
    ├── UnavailableError               69  the server, or the backend's process, is gone too long
    ├── OutputError                    73  an output cannot be created
    ├── DiskError                      74  reading or writing failed; the run stops for good
    ├── StoppedError                   75  stopped early and resumable: quota, outage, lock
    │   └── SpentError                 75  a cap, a budget or the input is used up: raise it first
    ├── AuthError                      77  key, permission, certificate
    ├── ConfigError                    78  settings, model, endpoint
    └── BackendError                       one request failed; the verdict says what follows
        (it becomes a retry, a dead letter or one of the above)

The codes follow BSD's sysexits.h. Besides them: 0 done, 3 done with dead letters, 130 and 143
drained after SIGINT and after SIGTERM, SIGHUP or SIGXCPU. What ended a run first gives its code;
what goes wrong afterwards is a line more.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AuthError",
    "BackendError",
    "ConfigError",
    "DiskError",
    "InputError",
    "InternalError",
    "OutputError",
    "SpentError",
    "StoppedError",
    "UnavailableError",
    "UsageError",
    "WoolmillError",
    "first_known",
]

DONE_WITH_DEAD_LETTERS = 3
"""The status of a run that reached its end although some requests failed for good: neither 0, which
scripts take for clean, nor that of an error."""


class WoolmillError(Exception):
    """The root. ``str(error)`` is one line: what, where, what to do next."""

    exit_code: ClassVar[int] = 70


class InternalError(WoolmillError):
    """A bug of ours that ended a run in order. Its cause has the traceback that a report needs."""

    @classmethod
    def of(cls, exc: BaseException) -> InternalError:
        """The error for an exception that nobody meant to raise; to be raised from it."""
        first = next(iter(str(exc).splitlines()), "")
        error = cls(
            f"a bug of ours ({type(exc).__name__}: {first}); what arrived is kept: report it, "
            "then resume"
        )
        error.__cause__ = exc
        return error


class UsageError(WoolmillError):
    """The command line cannot be understood."""

    exit_code = 64


class InputError(WoolmillError):
    """A seed file, dataset or run store holds what it must not. Names ``path:line``."""

    exit_code = 65


class UnavailableError(WoolmillError):
    """The server or the backend's process is not there, and waiting did not help."""

    exit_code = 69


class OutputError(WoolmillError):
    """An output file or folder cannot be created."""

    exit_code = 73


class DiskError(WoolmillError):
    """A write or sync failed. Nothing acknowledged is lost; the run does not go on by itself."""

    exit_code = 74


class StoppedError(WoolmillError):
    """Stopped before the target and resumable: quota, too many rejects, or the run is in use."""

    exit_code = 75


class SpentError(StoppedError):
    """What the person allowed is used up: the run is resumable once that is raised, and the same
    command alone would only stop again.
    """


class AuthError(WoolmillError):
    """The server refuses the key, or its certificate cannot be trusted."""

    exit_code = 77


class ConfigError(WoolmillError):
    """A setting, model or endpoint is wrong, and asking again will not change it."""

    exit_code = 78


class BackendError(WoolmillError):
    """One request failed. Raised by backends only; ``engine.run.deliver`` decides what follows."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came while a run was starting."""


def first_known(exc: BaseException) -> WoolmillError | None:
    """The error of ours that ``exc`` is, or the first of those in a group; None: there is none."""
    if isinstance(exc, WoolmillError):
        return exc
    inner = exc.exceptions if isinstance(exc, BaseExceptionGroup) else ()
    return next((known for known in map(first_known, inner) if known), None)
