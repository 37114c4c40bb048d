"""The trainer's command: parse, train, and one line with an exit code for what went wrong.

    torchrun --nproc_per_node 2 -m trainer --model_name_or_path DIR --data_path alpaca.json \\
        --output_dir out

Also a script, ``torchrun … trainer/train.py``, as Alpaca's README starts its own.
"""

from __future__ import annotations

import sys

if __package__ in (None, ""):  # started as a script
    import pathlib

    # Not its own folder, whose file names would hide other packages'.
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import importlib.util
import os
import traceback
from collections.abc import Callable, Sequence

from trainer.config import Settings, parse
from trainer.errors import ConfigError, DiskError, TrainerError
from trainer.launched import end_with_torchrun

__all__ = ["carry_out", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; the exit code."""

    def act(settings: Settings) -> None:
        # After parsing: --help and a mistyped flag should not wait for torch.
        from trainer.loop import train

        train(settings)

    return carry_out(act, sys.argv[1:] if argv is None else list(argv))


def carry_out(act: Callable[[Settings], None], arguments: list[str]) -> int:
    """Do ``act`` with the settings that ``arguments`` make; the exit code. What goes wrong is one
    line.
    """
    end_with_torchrun()
    debug = "--debug" in arguments
    rank = os.environ.get("RANK", "0")
    code, line = 0, ""
    try:
        settings = parse(arguments)
        _check_packages(settings)
    except TrainerError as exc:  # the same on every rank
        sys.stderr.write(f"trainer: {exc}\n" if rank == "0" else "")
        return exc.exit_code
    try:
        act(settings)
    except TrainerError as exc:
        code, line = _told(exc)
        if debug:
            traceback.print_exc()
    except OSError as exc:
        code, line = DiskError.exit_code, f"{exc.filename or 'disk'}: {exc.strerror or exc}"
        if debug:
            traceback.print_exc()
    except KeyboardInterrupt:
        code, line = 130, "interrupted at once; what was saved is untouched, go on with --resume"
    except Exception as exc:  # noqa: BLE001 - the last resort; a bug must end in one line too
        code, line = 70, f"a bug of ours: {type(exc).__name__}: {exc} (--debug shows where)"
        if debug:
            traceback.print_exc()
    if line:
        sys.stderr.write(f"trainer{f'[rank {rank}]' if rank != '0' else ''}: {line}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    if code and "torch" in sys.modules:
        # Peers that are gone, a save in its thread: no orderly way out may wait for them.
        os._exit(code)
    return code


def _check_packages(settings: Settings) -> None:
    """What is missing should be known before a model is loaded, without loading anything."""
    needed = ["torch", "transformers", "safetensors"]
    needed += ["peft"] if settings.model.lora_r else []
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"{', '.join(missing)}: not installed; get it with: pip install 'woolmill[train]'"
        )
    for name in settings.log.report_to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"--report_to {name}: pip install {name}")


def _told(exc: TrainerError) -> tuple[int, str]:
    from trainer.ranks import OtherRankFailed

    if isinstance(exc, OtherRankFailed):
        return exc.other_exit_code, ""
    return exc.exit_code, " ".join(str(exc).split())


if __name__ == "__main__":
    sys.exit(main())
