"""What can end a training run, as a tree. Each error is one line and knows its exit code.

    TrainerError               70  a bug of ours, when nothing more exact fits
    ├── UsageError             64  the command line
    ├── DataError              65  a dataset or a checkpoint holds what it must not
    ├── UnavailableError       69  the model hub cannot be reached
    ├── OutputError            73  the output folder cannot be created, or is taken
    ├── DiskError              74  reading or writing failed
    ├── StoppedError           75  stopped early and resumable: not-finite loss, a lost rank
    ├── AuthError              77  the model hub refuses access
    ├── ConfigError            78  settings, model, tokenizer, device
    └── Interrupted       130/143  SIGINT or SIGTERM: a checkpoint was written

The codes follow BSD's sysexits.h and are the engine's too; the trainer repeats them because it
never imports the engine.
"""

from __future__ import annotations

__all__ = [
    "AuthError",
    "ConfigError",
    "DataError",
    "DiskError",
    "Interrupted",
    "OutputError",
    "StoppedError",
    "TrainerError",
    "UnavailableError",
    "UsageError",
]


class TrainerError(Exception):
    """The root. ``str(error)`` is one line: what, where, what to do next."""

    exit_code = 70


class UsageError(TrainerError):
    """The command line cannot be understood."""

    exit_code = 64


class DataError(TrainerError):
    """A dataset or checkpoint is damaged or malformed. Names the file, and the record if it can."""

    exit_code = 65


class UnavailableError(TrainerError):
    """The model is on a hub that does not answer."""

    exit_code = 69


class OutputError(TrainerError):
    """The output folder cannot be created, or holds a run already."""

    exit_code = 73


class DiskError(TrainerError):
    """Reading or writing failed: a full disk, a broken one."""

    exit_code = 74


class StoppedError(TrainerError):
    """Training stopped before its end and can go on from a checkpoint."""

    exit_code = 75


class AuthError(TrainerError):
    """The model hub wants a token, or another one."""

    exit_code = 77


class ConfigError(TrainerError):
    """A setting, model or tokenizer is wrong, and trying again will not change it."""

    exit_code = 78


class Interrupted(TrainerError):
    """A signal asked for the end; the step was finished and a checkpoint written."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum  # as shells count
