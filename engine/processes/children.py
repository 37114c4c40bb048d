"""Start other processes, and say how they ended. Nothing else in the engine starts one.

A child sees of our environment only what a list here allows, so that a key is not handed on however
its variable is called; and a Python child imports nothing from the folder that the person happens
to be in. The price: a variable that some library reads, and that the list does not have, is not
set there.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal

import engine
from engine import secrets
from engine.processes.frames import Frame, Frames, frame

__all__ = [
    "Child",
    "end_group",
    "environment",
    "how_it_ended",
    "python_command",
    "run",
    "start",
    "start_async",
    "tethered",
]

TETHER = Path(__file__).with_name("tether.py")
PIECE = 1 << 18
"""Bytes that are read at once of what a child says; an answer takes some kilobytes."""
Need = Literal["engine", "hub", "pip", "ray", "web"]
Pipe = int | IO[bytes] | None


def _names(patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns.split()).replace("*", r"\w*"))


_ALWAYS = _names(
    """PATH HOME USER LOGNAME SHELL LANG LANGUAGE LC_* TZ TMPDIR TEMP TMP XDG_* WOOLMILL_*
    LD_LIBRARY_PATH LD_PRELOAD VIRTUAL_ENV CONDA_PREFIX MALLOC_* MIMALLOC_* NO_COLOR
    CC CXX CPATH C_INCLUDE_PATH CPLUS_INCLUDE_PATH LIBRARY_PATH
    CUDA_* NVIDIA_* NCCL_* HIP_* ROCR_* ROCM_* HSA_* AMD_* XLA_* TPU_* ZE_* SYCL_* ASCEND_* HABANA_*
    OMP_* GOMP_* KMP_* MKL_* OPENBLAS_* BLIS_* VECLIB_* GLOO_* UCX_* FI_* RAY_*
    NUMBA_* ORT_* ONEDNN_* DNNL_* TORCH* PYTORCH_* TRITON_* FLASHINFER_* VLLM_* RAYON_*
    TOKENIZERS_* TIKTOKEN_* HF_* HUGGINGFACE_HUB_CACHE TRANSFORMERS_* SENTENCE_TRANSFORMERS_*"""
)
_LIKE_A_KEY = re.compile("KEY|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|TOKEN(?!IZERS)")
_NETWORK = "(HTTP|HTTPS|ALL|NO)_PROXY (http|https|all|no)_proxy SSL_CERT_FILE SSL_CERT_DIR"
_FOR: dict[Need, re.Pattern[str]] = {
    "engine": _names(
        """PYTHON(DONTWRITEBYTECODE|FAULTHANDLER|HASHSEED|HOME|IOENCODING|MALLOC|NOUSERSITE)
        PYTHON(PYCACHEPREFIX|TRACEMALLOC|UNBUFFERED|USERBASE|UTF8|WARNINGS|COERCECLOCALE)"""
    ),
    "hub": _names(f"{_NETWORK} HF_TOKEN HF_TOKEN_PATH HUGGING_FACE_HUB_TOKEN *_CA_BUNDLE"),
    "pip": _names(f"{_NETWORK} PIP_* *_CA_BUNDLE"),
    "web": _names(f"{_NETWORK} *_CA_BUNDLE"),
    "ray": _names("RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH"),
}
"""What besides is for a child that has our modules, that asks the hub of models, that is pip, that
asks other hosts, or that joins a Ray cluster."""


def environment(*needs: Need) -> dict[str, str]:
    """The environment for a child: what is allowed to all, and to those with its ``needs``.

    Never in it: what a key was read from, and whatever holds a key that was read.
    """
    more = [_FOR[need] for need in needs]
    allowed = {
        name: value
        for name, value in os.environ.items()
        if (_ALWAYS.fullmatch(name) and not _LIKE_A_KEY.search(name))
        or any(pattern.fullmatch(name) for pattern in more)
    }
    if "engine" in needs:
        allowed["PYTHONPATH"] = os.pathsep.join(_module_paths())
    kept = {n: value for n, value in allowed.items() if not secrets.tells_a_key(n, value)}
    return kept | {"PYTHONSAFEPATH": "1"}  # for what the child starts in its turn


def _module_paths() -> list[str]:
    """Where the engine is, and what the person added; an empty entry would be the folder one is
    in.
    """
    added = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [str(Path(engine.__file__).parent.parent), *filter(None, added)]


def python_command(*arguments: str, interpreter: Path | None = None) -> list[str]:
    """The command for a Python child. ``-P``: no module of the folder that one happens to be in,
    nor of the one that a script lies in.
    """
    return [str(interpreter or sys.executable), "-P", *arguments]


def tethered(*command: str) -> list[str]:
    """``command`` so that it dies with this process, of which it has a pipe as its stdin."""
    return python_command(str(TETHER), *command)


def run(
    command: Sequence[str], environment: Mapping[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run ``command`` in ``folder`` to its end, with what it printed."""
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=dict(environment),
        cwd=folder,
        check=False,
    )


def start(
    command: Sequence[str], environment: Mapping[str, str], **pipes: Pipe
) -> subprocess.Popen[bytes]:
    """Start ``command`` in a session of its own, so that Ctrl-C is for this process alone.

    Args:
        pipes: stdin, stdout and stderr, as ``subprocess`` takes them.
    """
    return subprocess.Popen(command, env=dict(environment), start_new_session=True, **_given(pipes))


class Child:
    """A child process, for the event loop that started it.

    ``subprocess`` starts it, whatever the loop is: uvloop's own way forks, and then runs Python in
    the child before its program, which may wait there for ever for a lock that a thread of this
    process held. (Seen with a process group of torch.distributed.)

    Attributes:
        pid: its process id, and its group's.
        stdin: a pipe to it; None where it has no pipe of ours.
        stdout: a pipe from it, likewise.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        stdin: asyncio.WriteTransport | None,
        stdout: asyncio.StreamReader | None,
    ) -> None:
        self.pid = process.pid
        self.stdin = stdin
        self.stdout = stdout
        self._process = process
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        threading.Thread(target=self._await, name="woolmill-child", daemon=True).start()

    async def wait(self) -> int:
        """Wait for its end; its status, below zero the signal that ended it."""
        return await asyncio.shield(self._ended)

    def send(self, head: bytes, body: Sequence[bytes] = ()) -> None:
        """Send a message, as ``frames`` has them. Nothing happens where it has ended: whoever
        hears it is told so.
        """
        if self.stdin is not None and not self.stdin.is_closing():
            self.stdin.writelines(frame(head, body))

    async def messages(self) -> AsyncIterator[Frame]:
        """What it says, until the end of its output. Processes of its own may hold that open
        beyond its end.
        """
        assert self.stdout is not None
        frames = Frames()
        while piece := await self.stdout.read(PIECE):
            for message in frames.take_in(piece):
                yield message

    def kill(self) -> None:
        """End it at once. Nothing happens where it has ended."""
        self._process.kill()

    async def close(self, within_s: float | None = None) -> None:
        """Let it see the end of its input, of which it ends; by force where that takes longer."""
        if self.stdin is not None:
            self.stdin.close()
        await asyncio.wait([self._ended], timeout=within_s)
        self.kill()
        await self.wait()

    def _await(self) -> None:
        """In a thread of its own."""
        status, loop = self._process.wait(), self._ended.get_loop()
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(self._over, status)

    def _over(self, status: int) -> None:
        self._ended.set_result(status)
        if self.stdin is not None and not self.stdin.is_closing():
            self.stdin.abort()


async def start_async(
    command: Sequence[str], environment: Mapping[str, str], **pipes: Pipe
) -> Child:
    """As ``start``, for the event loop."""
    process, loop = start(command, environment, **pipes), asyncio.get_running_loop()
    stdin, reader = None, None
    try:
        if process.stdin is not None:
            stdin, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, process.stdin)
        if process.stdout is not None:
            reader = asyncio.StreamReader()
            protocol = asyncio.StreamReaderProtocol(reader)
            await loop.connect_read_pipe(lambda: protocol, process.stdout)
    except BaseException:  # raised again: nobody would end it
        process.kill()
        raise
    return Child(process, stdin, reader)


def end_group(pid: int, signum: signal.Signals = signal.SIGKILL) -> None:
    """Send ``signum`` to what ``start`` started, and to all that it has started and left behind."""
    with suppress(ProcessLookupError, PermissionError):  # nothing is left; macOS says it otherwise
        os.killpg(pid, signum)


def _given(pipes: dict[str, Pipe]) -> dict[str, Any]:
    """All three pipes; what is not named is the null device, never this process's own stdin."""
    return {"stdin": subprocess.DEVNULL} | pipes


def how_it_ended(status: int | None) -> str:
    """How a process ended, from its status as ``subprocess`` or a shell tells it."""
    if status is not None and status > 128:
        status = 128 - status
    if status is None or status >= 0:
        return f"with status {status}"
    try:
        return f"by {signal.Signals(-status).name}"
    except ValueError:
        return f"by signal {-status}"
