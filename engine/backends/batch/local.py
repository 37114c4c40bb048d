"""Batches without a provider: files that are carried to a machine and back, and vLLM's run-batch in
a child process. Both speak OpenAI's lines, and cost what the machine costs.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine import models
from engine.backends.base import Verdict
from engine.backends.batch.jobs import ENDPOINTS, Job, Limits, Order, Result
from engine.backends.batch.openai import openai_result
from engine.backends.vllm.arguments import child_environment, engine_arguments, last_error
from engine.backends.vllm.servers import flags_of
from engine.errors import UnavailableError
from engine.files import open_log
from engine.processes.children import how_it_ended, python_command, start_async, tethered
from engine.records import Api

__all__ = ["CarriedJobs", "VllmJobs", "answers_path"]


def answers_path(folder: Path, tag: str) -> Path:
    """Where the answers to a batch lie that were made elsewhere, or by a child."""
    return folder / f"{tag}.answers.jsonl"


class _LocalJobs:
    """Jobs whose files lie in the run's own folder."""

    apis: tuple[Api, ...] = ("chat", "completions")
    limits = Limits(lines=50_000, bytes=2_000_000_000)
    price_share = 1.0
    counts_late = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def line(self, id: str, body: Mapping[str, Any], api: Api) -> Any:
        return {"custom_id": id, "method": "POST", "url": ENDPOINTS[api], "body": body}

    def result(self, line: Any) -> Result | None:
        return openai_result(line)

    async def upload(self, order: Order) -> str:
        return ""

    async def download(self, source: str, path: Path) -> None:
        await asyncio.to_thread(shutil.copyfile, source, path)

    async def delete(self, job: Job | None, file: str) -> None:
        if job is not None:
            answers_path(self._folder, job.id).unlink(missing_ok=True)


class CarriedJobs(_LocalJobs):
    """Requests that a person carries to where they are answered: ``woolmill batch export`` takes
    them out, ``woolmill batch import`` brings the answers.
    """

    name = "file"

    async def create(self, order: Order) -> Job:
        return await self.status(order.tag)

    async def find(self, order: Order) -> Job | None:
        return await self.status(order.tag)

    async def status(self, id: str) -> Job:
        answers = answers_path(self._folder, id)
        here = answers.is_file()
        outputs = (str(answers),) if here else ()
        return Job(
            id=id, state="answered" if here else "waiting", running=not here, outputs=outputs
        )

    async def cancel(self, id: str) -> None:
        """What was not answered by now is not waited for."""
        answers_path(self._folder, id).touch(mode=0o600)

    async def aclose(self) -> None:
        return


class VllmJobs(_LocalJobs):
    """vLLM's run-batch, one batch at a time, in a child that ends with the run.

    vLLM reads the whole file and writes answers at its end, or as they come, in versions that do:
    whatever stands in its file when it ends, however it ends, is kept.

    Args:
        folder: the run's batches; its log is beside them.
        python: interpreter of an environment with vLLM.
        args: arguments of the engine.
    """

    name = "vllm"

    def __init__(
        self,
        folder: Path,
        model: str,
        *,
        python: Path | None = None,
        args: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(folder)
        self._model = model
        self._python = python
        self._arguments = engine_arguments(args or {})
        self._turn = asyncio.Lock()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._failed: dict[str, str] = {}

    async def create(self, order: Order) -> Job:
        where = await asyncio.to_thread(models.locate, self._model)
        command = python_command(
            "-m", "vllm.entrypoints.openai.run_batch", interpreter=self._python
        )
        command += ["-i", str(order.path), "-o", str(answers_path(self._folder, order.tag))]
        command += ["--model", where, "--served-model-name", order.model]
        command += flags_of(self._arguments)
        self._running[order.tag] = asyncio.create_task(self._run(order.tag, command))
        return await self.status(order.tag)

    async def find(self, order: Order) -> Job | None:
        """A child ended with the run that started it; what it had written is there."""
        here = answers_path(self._folder, order.tag).is_file()
        return await self.status(order.tag) if here else None

    async def status(self, id: str) -> Job:
        task = self._running.get(id)
        if task is not None and not task.done():
            return Job(id=id, state="running", running=True)
        answers = answers_path(self._folder, id)
        outputs = (str(answers),) if answers.is_file() else ()
        failure = None
        if not outputs and (said := self._failed.get(id)):
            error = UnavailableError(f"vLLM's run-batch: {said}; its log is {self._log}")
            failure = Verdict(kind="fatal", reason="vllm", message=str(error), error=error)
        return Job(id=id, state="ended", running=False, outputs=outputs, failure=failure)

    async def cancel(self, id: str) -> None:
        task = self._running.pop(id, None)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def aclose(self) -> None:
        for id in list(self._running):
            with suppress(Exception):
                await self.cancel(id)

    @property
    def _log(self) -> Path:
        return self._folder / "run-batch.log"

    async def _run(self, id: str, command: list[str]) -> None:
        """One child to its end; killed with this task, and with this process by its tether."""
        async with self._turn:
            with open_log(self._log) as log:
                try:
                    child = await start_async(
                        tethered(*command),
                        child_environment(),
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=log,
                    )
                except OSError as error:
                    self._failed[id] = f"cannot be started: {error.strerror}"
                    return
            try:
                status = await child.wait()
            finally:
                await child.close()  # the tether
            if status:
                self._failed[id] = last_error(self._log) or f"ended {how_it_ended(status)}"
