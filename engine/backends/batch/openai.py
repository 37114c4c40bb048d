"""OpenAI's batch API, and Azure's, which is the same: upload, create, look, fetch.

    POST /files            the requests, purpose batch
    POST /batches          {input_file_id, endpoint, completion_window, metadata}
    GET  /batches/{id}     status, request_counts, output_file_id, error_file_id
    GET  /files/{id}/content

A batch that expired or was cancelled keeps, and charges, the lines that were done by then; the
others stand in its error file. https://platform.openai.com/docs/guides/batch
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import orjson

from engine.backends.base import Failure, Verdict
from engine.backends.batch.client import Client
from engine.backends.batch.jobs import ENDPOINTS, Job, Limits, Order, Result
from engine.backends.openai.error_body import clean, read_error
from engine.backends.openai.verdicts import classify
from engine.records import Api

__all__ = ["AzureJobs", "FileJobs", "OpenAIJobs", "openai_result", "whole_failure"]

RUNNING = frozenset(
    ("validating", "in_progress", "finalizing", "cancelling", "queued", "running", "pending")
)
"""States in which nothing can be fetched yet. Any other word, known or not, is an end."""
NEVER_RAN = frozenset(("batch_expired", "batch_cancelled", "batch_canceled"))
"""Codes of lines in an error file whose turn never came."""
PAGE = 100
"""Batches on a page of the list: the most that OpenAI gives at once."""
MOST_PAGES = 20
"""Pages of a provider's list of batches that are looked through for one of ours."""
ENQUEUED = ("token_limit_exceeded", "request_limit_exceeded", "batch_limit_exceeded")
"""Codes of a batch that was refused since too much is enqueued."""


class FileJobs:
    """What providers have in common that take a file and give files.

    Subclasses say the paths and the words; all of them are OpenAI's here.
    """

    name: str
    apis: tuple[Api, ...] = ("chat", "completions")
    limits = Limits(lines=50_000, bytes=200_000_000)
    price_share = 0.5
    counts_late = False
    batches: ClassVar[str] = "/batches"
    uploads: ClassVar[str] = "/files"
    purpose: ClassVar[str] = "batch"

    def __init__(self, client: Client) -> None:
        self._client = client

    # Lines

    def line(self, id: str, body: Mapping[str, Any], api: Api) -> Any:
        return {"custom_id": id, "method": "POST", "url": ENDPOINTS[api], "body": body}

    def result(self, line: Any) -> Result | None:
        return openai_result(line)

    # Jobs

    async def upload(self, order: Order) -> str:
        with order.path.open("rb") as file:
            name = f"woolmill-{order.tag}.jsonl"
            made = await self._client.send(
                "POST",
                self.uploads,
                data=self.form(name),
                files={"file": (name, file, "application/jsonl")},
            )
        return _id_of(made, self.name)

    def form(self, name: str) -> dict[str, str]:
        """Fields beside the file, whose name tells whose it is."""
        return {"purpose": self.purpose}

    async def create(self, order: Order) -> Job:
        return self.job(await self._client.json("POST", self.batches, self.asked(order)))

    def asked(self, order: Order) -> dict[str, Any]:
        """The body that creates a batch."""
        return {
            "input_file_id": order.file,
            "endpoint": ENDPOINTS[order.api],
            "completion_window": "24h",
            "metadata": {"woolmill": order.tag},
        }

    async def find(self, order: Order) -> Job | None:
        after = None
        for _ in range(MOST_PAGES):
            params = {"limit": PAGE} | ({"after": after} if after else {})
            listed = await self._client.json("GET", self.batches, params=params)
            page = listed if isinstance(listed, list) else listed.get("data")
            jobs = [each for each in page or () if isinstance(each, dict)]
            for each in jobs:
                if self.is_ours(each, order):
                    return self.job(each)
            if isinstance(listed, list) or not listed.get("has_more") or not jobs:
                return None
            after = jobs[-1].get("id")
        return None

    def is_ours(self, listed: Mapping[str, Any], order: Order) -> bool:
        """Whether a batch in the provider's list is this one: by its tag or by its file."""
        metadata = listed.get("metadata")
        tag = metadata.get("woolmill") if isinstance(metadata, dict) else None
        return tag == order.tag or (bool(order.file) and listed.get("input_file_id") == order.file)

    async def status(self, id: str) -> Job:
        return self.job(await self._client.json("GET", f"{self.batches}/{id}"))

    def job(self, told: Any) -> Job:
        """A batch in the provider's words. Raises Failure for what is none."""
        id = _id_of(told, self.name)
        state = str(told.get("status", "")).lower()
        counts = told.get("request_counts")
        counts = counts if isinstance(counts, dict) else {}
        outputs = tuple(
            f"/files/{told[name]}/content"
            for name in ("output_file_id", "error_file_id")
            if isinstance(told.get(name), str) and told[name]
        )
        return Job(
            id=id,
            state=state,
            running=state in RUNNING,
            total=_count(counts.get("total")),
            done=_count(counts.get("completed")),
            failed=_count(counts.get("failed")),
            outputs=outputs,
            failure=whole_failure(told.get("errors"), self.name)
            if state == "failed" and not outputs
            else None,
        )

    async def download(self, source: str, path: Path) -> None:
        await self._client.fetch(source, path)

    async def cancel(self, id: str) -> None:
        await self._client.json("POST", f"{self.batches}/{id}/cancel")

    async def delete(self, job: Job | None, file: str) -> None:
        sources = [source.removesuffix("/content") for source in job.outputs] if job else []
        for path in [*sources, *([f"/files/{file}"] if file else [])]:
            await self._gone(path)

    async def _gone(self, path: str) -> None:
        """Delete what may be deleted already."""
        try:
            await self._client.json("DELETE", path)
        except Failure as failure:
            if failure.verdict.reason != "http_404":
                raise

    async def aclose(self) -> None:
        with suppress(Exception):
            await self._client.aclose()


class OpenAIJobs(FileJobs):
    name = "openai"


class AzureJobs(FileJobs):
    """Azure's, below ``/openai/v1``; the model is a deployment of the kind for batches."""

    name = "azure"


def openai_result(line: Any) -> Result | None:
    """What a line of an output or error file says; None where it is not about a request."""
    if not isinstance(line, dict) or not isinstance(line.get("custom_id"), str):
        return None
    response, error = line.get("response"), line.get("error")
    if isinstance(error, dict) and str(error.get("code")) in NEVER_RAN:
        return Result(id=line["custom_id"], ran=False)
    if isinstance(response, dict) and "body" in response:
        status = response.get("status_code", 200)
        status = status if isinstance(status, int) and 100 <= status < 600 else 500
        return Result(id=line["custom_id"], status=status, body=response["body"])
    return Result(id=line["custom_id"], status=_status_of(error), body={"error": error})


def whole_failure(errors: Any, where: str) -> Verdict:
    """Why a batch was refused as a whole: nothing of it ran.

    ``throttled``: too much is enqueued, which passes. Else the first reason, as any refusal.
    """
    listed = errors.get("data") if isinstance(errors, dict) else errors
    first = next((each for each in listed or () if isinstance(each, dict)), None)
    if first is None:
        first = {"message": str(errors or "the provider does not say why")}
    said = read_error(orjson.dumps({"error": first}))
    if said.names.intersection(ENQUEUED) or "enqueued" in said.text.lower():
        return Verdict(kind="throttled", reason="enqueued", message=clean(said.text))
    return classify(status=400, body=orjson.dumps({"error": first}), where=where)


def _status_of(error: Any) -> int:
    """The HTTP status of a line that has an error alone."""
    code = error.get("code") if isinstance(error, dict) else None
    try:
        status = int(str(code))
    except ValueError:
        return 500 if code in (None, "", "server_error", "internal_error") else 400
    return status if 400 <= status < 600 else 500


def _id_of(told: Any, where: str) -> str:
    id = told.get("id") if isinstance(told, dict) else None
    if not isinstance(id, str) or not id.replace("-", "").replace("_", "").isalnum():
        message = f"{where}: answers without an id"
        raise Failure(Verdict(kind="ambiguous", reason="bad_json", message=message))
    return id


def _count(count: Any) -> int | None:
    return count if isinstance(count, int) and 0 <= count < 2**40 else None
