"""The processes of one run, and the few things they say to each other outside of FSDP.

torchrun starts one process a device and describes them in the environment; without it there is one
process, and the same code runs with a group of one. Small facts travel as tensors over gloo on the
CPU, also beside nccl, and in float64.

A fault on one rank must not leave the others waiting: what only some ranks do is done inside
:meth:`Ranks.together`, after which all go on or all stop. A rank that is killed or hangs is noticed
by the next collective, at once or after ``--timeout_s``. Work is told from silence: a rank that
tokenises, loads or hashes for hours shows signs of life from a thread of its own, and the others
wait for it; only a rank that is silent for ``--timeout_s`` is lost.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from trainer.config import ParallelSettings
from trainer.errors import ConfigError, StoppedError, TrainerError

__all__ = ["OtherRankFailed", "RankLost", "Ranks", "noticing_lost_ranks"]

T = TypeVar("T")


class OtherRankFailed(TrainerError):
    """Another rank has failed and says why; this one ends quietly with the same exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"another rank failed with exit code {exit_code}")
        self.other_exit_code = exit_code


class RankLost(StoppedError):
    """Another process was killed, has crashed, or hangs. The process group is of no more use."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers."""

    rank: int
    size: int
    local_rank: int
    """Among the processes of this host; 0 does what is done once a host."""
    local_size: int
    device: torch.device
    saving: dist.ProcessGroup
    """A gloo group for checkpoints alone: a save in the background must not mix its messages with
    those of training."""
    life: _Life | None = None
    """How ranks know of each other that they work; None where there is one."""

    @classmethod
    def start(cls, settings: ParallelSettings) -> Ranks:
        """Join the process group that the environment describes, or start one of one process.

        Raises:
            ConfigError: no such device, or a broken environment.
            RankLost: the others do not come.
        """
        size = _number("WORLD_SIZE", 1)
        local_rank = _number("LOCAL_RANK", 0)
        device = _device(settings.device, local_rank)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=settings.timeout_s)
        with noticing_lost_ranks():
            if size > 1:
                dist.init_process_group(backend, timeout=timeout)
            else:
                store = torch._C._distributed_c10d.HashStore()
                dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)
            saving = dist.new_group(backend="gloo", timeout=timeout)
        rank, local_size = dist.get_rank(), _number("LOCAL_WORLD_SIZE", size)
        life = _Life(rank, size, settings.timeout_s) if size > 1 else None
        return cls(rank, size, local_rank, local_size, device, saving, life)

    def stop(self) -> None:
        """Leave the process group."""
        if self.life is not None:
            self.life.stop()
        dist.destroy_process_group()

    def sum(self, values: list[float]) -> list[float]:
        """``values`` summed over all ranks, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: bytes, group: dist.ProcessGroup | None = None) -> list[bytes]:
        """The ``value`` of every rank; all must have the same length."""
        mine = torch.frombuffer(bytearray(value), dtype=torch.uint8)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine, group=group)
        return [bytes(tensor.tolist()) for tensor in every]

    def fail(self, error: TrainerError) -> NoReturn:
        """End every rank with ``error``, which all have and one says. Collective."""

        def raise_it() -> NoReturn:
            raise error

        self.together(raise_it)

    def together(self, action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """Do ``action`` on this rank, and go on only if it succeeded on every rank.

        Raises:
            TrainerError, OSError: this rank's own.
            OtherRankFailed: it succeeded here and failed elsewhere, or an earlier rank has failed
                in the same way and says so.
        """
        error: TrainerError | OSError | None = None
        try:
            result = action()
        except (TrainerError, OSError) as exc:
            error = exc
        code = error.exit_code if isinstance(error, TrainerError) else 74
        if self.life is not None:
            self.life.meet("saving" if group is self.saving else "training")
        codes = [byte[0] for byte in self.gather(bytes([code if error else 0]), group)]
        failed = [rank for rank, code in enumerate(codes) if code]
        if error is not None and failed[0] == self.rank:
            raise error
        if failed:
            raise OtherRankFailed(codes[failed[0]])
        return result


class _Life:
    """Signs of life, in the store through which the ranks have found each other.

    Every rank adds to a counter of its own once in a while, whatever its main thread does; who
    waits looks whether the counters of the others move.
    """

    def __init__(self, rank: int, size: int, timeout_s: float) -> None:
        self._rank, self._size, self._timeout_s = rank, size, timeout_s
        self._store = dist.distributed_c10d._get_default_store()
        self._meetings = {"training": 0, "saving": 0}
        self._over = threading.Event()
        threading.Thread(target=self._beat, name="signs of life", daemon=True).start()

    def stop(self) -> None:
        """Show no more signs of life."""
        self._over.set()

    def meet(self, name: str) -> None:
        """Return when every rank has called this as often, for this ``name``.

        Raises:
            RankLost: a rank has not, and was silent for the timeout.
        """
        self._meetings[name] += 1
        key = f"woolmill/{name}/{self._meetings[name]}"
        self._store.add(key, 1)
        pause_s, heard = 0.001, [(0, time.monotonic())] * self._size
        looked = time.monotonic()
        while self._store.add(key, 0) < self._size:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.2)
            if time.monotonic() - looked > self._timeout_s / 10:
                looked = time.monotonic()
                beats = [self._store.add(self._own(rank), 0) for rank in range(self._size)]
                heard = [
                    old if old[0] == beat else (beat, looked)
                    for old, beat in zip(heard, beats, strict=True)
                ]
                if any(looked - since > self._timeout_s for _, since in heard):
                    raise RankLost(_lost(silent=True))

    def _beat(self) -> None:
        # A lost store means that rank 0 is gone, which the main thread notices by itself.
        with contextlib.suppress(dist.DistError, RuntimeError):
            while not self._over.wait(min(1.0, self._timeout_s / 10)):
                self._store.add(self._own(self._rank), 1)

    @staticmethod
    def _own(rank: int) -> str:
        return f"woolmill/beats/{rank}"


@contextmanager
def noticing_lost_ranks() -> Iterator[None]:
    """Turn the failure of a collective into :class:`RankLost`.

    gloo reports a lost peer as a bare RuntimeError, so its own name in the text is all there is to
    go by; every other RuntimeError passes.
    """
    try:
        yield
    except dist.DistError as exc:
        raise RankLost(_lost(silent="imed out" in str(exc))) from exc
    except RuntimeError as exc:
        if "gloo" not in str(exc):
            raise
        raise RankLost(_lost(silent="imed out" in str(exc))) from exc


def _lost(*, silent: bool) -> str:
    what = "does not answer (--timeout_s)" if silent else "is gone"
    return f"another rank {what}; start all of them again with --resume"


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise ConfigError(f"{variable}={text!r} is not a number; launch with torchrun")
    return int(text)


def _device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("--device cuda: this PyTorch sees no GPU")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank} of this host has no GPU of its own, there are"
            f" {torch.cuda.device_count()}; lower --nproc_per_node"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
