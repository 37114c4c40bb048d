"""Gemini's batch mode. https://ai.google.dev/gemini-api/docs/batch-mode

    POST /upload/v1beta/files                      in two steps: where to, then the requests
    POST /v1beta/models/{model}:batchGenerateContent
    GET  /v1beta/batches/{id}                      metadata.state, batchStats, response
    GET  /download/v1beta/files/{id}:download?alt=media

A batch that expires after 48 hours gives nothing. What was asked is named by ``key``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.backends.base import Failure, Verdict
from engine.backends.batch.client import PIECE_BYTES, Client
from engine.backends.batch.jobs import Job, Limits, Order, Result
from engine.backends.batch.openai import whole_failure
from engine.records import Api

__all__ = ["GeminiJobs", "gemini_body", "openai_body"]

MIME = "application/jsonl"
"""What the upload must declare: Gemini takes a batch's requests as JSON Lines alone."""
RUNNING = frozenset(("PENDING", "RUNNING", "CANCELLING", "UNSPECIFIED", ""))
"""States, without their prefix, of a batch that may still end well. The last two are a batch of
which the API says nothing yet; taking them for an end would give up what has been paid for."""
STATUSES = {
    3: 400, 5: 404, 7: 403, 8: 429, 9: 400, 11: 400, 14: 503, 16: 401,
}  # fmt: skip
"""The HTTP status of each of gRPC's codes; any other is 500."""
FIELDS = {
    "max_tokens": "maxOutputTokens",
    "max_completion_tokens": "maxOutputTokens",
    "temperature": "temperature",
    "top_p": "topP",
    "top_k": "topK",
    "stop": "stopSequences",
    "seed": "seed",
    "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
}
"""Gemini's name for each of OpenAI's fields of sampling, within ``generationConfig``."""
TAKEN = frozenset(("model", "messages", "response_format", *FIELDS))
"""Fields of a chat that are translated; any other goes along as it is."""


class GeminiJobs:
    name = "gemini"
    apis: tuple[Api, ...] = ("chat",)
    limits = Limits(lines=100_000, bytes=2_000_000_000)
    price_share = 0.5
    counts_late = False

    def __init__(self, client: Client) -> None:
        self._client = client

    def line(self, id: str, body: Mapping[str, Any], api: Api) -> Any:
        return {"key": id, "request": gemini_body(body)}

    def result(self, line: Any) -> Result | None:
        if not isinstance(line, dict) or not isinstance(line.get("key"), str):
            return None
        if isinstance(line.get("response"), dict):
            return Result(id=line["key"], body=openai_body(line["response"]))
        error = line.get("error")
        code = error.get("code") if isinstance(error, dict) else None
        if code == 1:  # cancelled
            return Result(id=line["key"], ran=False)
        status = STATUSES.get(code, code) if isinstance(code, int) else 500
        status = status if isinstance(status, int) and 400 <= status < 600 else 500
        return Result(id=line["key"], status=status, body={"error": error})

    async def upload(self, order: Order) -> str:
        size = str(order.path.stat().st_size)
        begun = await self._client.headers_of(
            "POST",
            "/upload/v1beta/files",
            body={
                "file": {"displayName": f"woolmill-{order.tag}", "mimeType": "application/jsonl"}
            },
            headers={
                "X-Goog-Upload-Protocol": "resumable",
                "X-Goog-Upload-Command": "start",
                "X-Goog-Upload-Header-Content-Length": size,
                "X-Goog-Upload-Header-Content-Type": MIME,
            },
        )
        made = await self._client.send(
            "POST",
            begun.get("x-goog-upload-url", ""),
            content=_pieces(order.path),
            headers={
                "X-Goog-Upload-Offset": "0",
                "X-Goog-Upload-Command": "upload, finalize",
                "Content-Length": size,
            },
        )
        file = made.get("file") if isinstance(made, dict) else None
        return _named(file, "files/")

    async def create(self, order: Order) -> Job:
        model = order.model.removeprefix("models/")
        body = {"batch": {"displayName": order.tag, "inputConfig": {"fileName": order.file}}}
        path = f"/v1beta/models/{model}:batchGenerateContent"
        return _job(await self._client.json("POST", path, body))

    async def find(self, order: Order) -> Job | None:
        token = ""
        for _ in range(20):
            params = {"pageSize": 100} | ({"pageToken": token} if token else {})
            listed = await self._client.json("GET", "/v1beta/batches", params=params)
            listed = listed if isinstance(listed, dict) else {}
            for each in listed.get("operations") or listed.get("batches") or ():
                if _metadata(each).get("displayName") == order.tag:
                    return _job(each)
            token = listed.get("nextPageToken") or ""
            if not token:
                return None
        return None

    async def status(self, id: str) -> Job:
        return _job(await self._client.json("GET", f"/v1beta/{id}"))

    async def download(self, source: str, path: Path) -> None:
        await self._client.fetch(f"/download/v1beta/{source}:download?alt=media", path)

    async def cancel(self, id: str) -> None:
        await self._client.json("POST", f"/v1beta/{id}:cancel")

    async def delete(self, job: Job | None, file: str) -> None:
        names = [
            *(job.outputs if job else ()),
            *([job.id] if job else []),
            *([file] if file else []),
        ]
        for name in names:
            try:
                await self._client.json("DELETE", f"/v1beta/{name}")
            except Failure as failure:
                if failure.verdict.reason not in ("http_404", "http_403"):
                    raise

    async def aclose(self) -> None:
        with suppress(Exception):
            await self._client.aclose()


def gemini_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """A chat's body in Gemini's words."""
    config: dict[str, Any] = {}
    for name, theirs in FIELDS.items():
        if body.get(name) not in (None, [], ()):
            config[theirs] = body[name]
    asked = body.get("response_format")
    if isinstance(asked, dict):
        config["responseMimeType"] = "application/json"
        if isinstance(asked.get("json_schema"), dict):
            config["responseJsonSchema"] = asked["json_schema"].get("schema", {})
    further = {name: value for name, value in body.items() if name not in TAKEN}
    config |= further.pop("generationConfig", {})
    turns = [
        {
            "role": "model" if turn["role"] == "assistant" else "user",
            "parts": [{"text": turn["content"]}],
        }
        for turn in body["messages"]
        if turn["role"] != "system"
    ]
    system = [{"text": t["content"]} for t in body["messages"] if t["role"] == "system"]
    made = {"contents": turns, "generationConfig": config, **further}
    return made | ({"systemInstruction": {"parts": system}} if system else {})


def openai_body(response: Mapping[str, Any]) -> dict[str, Any]:
    """An answer of Gemini's in OpenAI's words."""
    candidates = response.get("candidates")
    choices = []
    for candidate in candidates[:1] if isinstance(candidates, list) else ():
        content = candidate.get("content") if isinstance(candidate, dict) else None
        parts = content.get("parts") if isinstance(content, dict) else None
        texts = [part for part in parts or () if isinstance(part, dict)]
        message = {
            "role": "assistant",
            "content": "".join(str(p.get("text", "")) for p in texts if not p.get("thought")),
        }
        if thoughts := "".join(str(p.get("text", "")) for p in texts if p.get("thought")):
            message["reasoning_content"] = thoughts
        finish = str(candidate.get("finishReason", "")).lower()
        choices.append({"index": 0, "message": message, "finish_reason": finish or None})
    blocked = response.get("promptFeedback")
    if not choices and isinstance(blocked, dict) and blocked.get("blockReason"):
        message = {"role": "assistant", "content": ""}
        choices = [{"index": 0, "message": message, "finish_reason": "content_filter"}]
    usage = response.get("usageMetadata")
    counts = None
    if isinstance(usage, dict):
        prompt, total = usage.get("promptTokenCount", 0), usage.get("totalTokenCount", 0)
        thoughts_count = usage.get("thoughtsTokenCount", 0)
        counts = {
            "prompt_tokens": prompt,
            "completion_tokens": usage.get("candidatesTokenCount", 0) + thoughts_count,
            "total_tokens": total,
            "completion_tokens_details": {"reasoning_tokens": thoughts_count},
            "prompt_tokens_details": {"cached_tokens": usage.get("cachedContentTokenCount", 0)},
        }
    return {"model": response.get("modelVersion"), "choices": choices, "usage": counts}


async def _pieces(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def _metadata(told: Any) -> Mapping[str, Any]:
    found = told.get("metadata", told) if isinstance(told, dict) else {}
    return found if isinstance(found, dict) else {}


def _job(told: Any) -> Job:
    id, about = _named(told, "batches/"), _metadata(told)
    state = str(about.get("state", "")).removeprefix("BATCH_STATE_").removeprefix("JOB_STATE_")
    stats = about.get("batchStats")
    stats = stats if isinstance(stats, dict) else {}
    response = told.get("response")
    output = response if isinstance(response, dict) else about.get("output")
    file = output.get("responsesFile") if isinstance(output, dict) else None
    ended = state not in RUNNING or bool(told.get("done"))
    failure = None
    if ended and not file and state == "FAILED":
        failure = whole_failure([told.get("error") or {}], "gemini")
    return Job(
        id=id,
        state=state.lower(),
        running=not ended,
        total=_number(stats.get("requestCount")),
        done=_number(stats.get("successfulRequestCount")),
        failed=_number(stats.get("failedRequestCount")),
        outputs=(_named({"name": file}, "files/"),) if ended and file else (),
        failure=failure,
    )


def _named(told: Any, prefix: str) -> str:
    """The name of a thing of Gemini's, which becomes part of a path. Raises Failure."""
    name = told.get("name") if isinstance(told, dict) else None
    rest = name.removeprefix(prefix) if isinstance(name, str) else ""
    if not isinstance(name, str) or not name.startswith(prefix) or set(rest) & set("/?#:%. "):
        message = f"gemini: answers without a name of {prefix}"
        raise Failure(Verdict(kind="ambiguous", reason="bad_json", message=message))
    return name


def _number(value: Any) -> int | None:
    """int64 is a string in Google's JSON."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return None
