"""Anthropic's Message Batches. https://docs.anthropic.com/en/docs/build-with-claude/batch-processing

    POST /messages/batches               {requests: [{custom_id, params}]}
    GET  /messages/batches/{id}          processing_status, request_counts, results_url
    GET  /messages/batches/{id}/results  {custom_id, result: {type, message | error}} a line

There are no files to upload and no metadata: a batch is found by when it was made and how many
requests it has, and what its answers are called must bear that out. Answers stay for 29 days. Only
those that succeeded are charged; an error there is one of the request, and costs nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.backends.base import Failure, Verdict
from engine.backends.batch.client import Client
from engine.backends.batch.jobs import Job, Limits, Order, Result
from engine.records import Api

__all__ = ["AnthropicJobs", "message_body", "openai_body"]

VERSION = "2023-06-01"
"""Every request to Anthropic's API must name the version that it is written for."""
FINISH = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length"}
"""OpenAI's word for each of Anthropic's stop reasons. Any other (``refusal``, say) is kept as it
is."""
STATUSES = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "timeout_error": 504,
    "overloaded_error": 529,
}
"""The status of each type of error; any other is 500."""
SKEW_S = 300.0
"""How far a clock here may be ahead of the provider's."""
OURS = frozenset(
    ("model", "messages", "max_tokens", "max_completion_tokens", "stop", "response_format", "seed")
)
"""Fields that are put into other words, or that Anthropic has not."""


class AnthropicJobs:
    name = "anthropic"
    apis: tuple[Api, ...] = ("chat",)
    limits = Limits(lines=100_000, bytes=256_000_000)
    price_share = 0.5
    counts_late = True

    def __init__(self, client: Client) -> None:
        self._client = client

    def line(self, id: str, body: Mapping[str, Any], api: Api) -> Any:
        return {"custom_id": id, "params": message_body(body)}

    def result(self, line: Any) -> Result | None:
        result = line.get("result") if isinstance(line, dict) else None
        if not isinstance(result, dict) or not isinstance(line.get("custom_id"), str):
            return None
        kind, id = result.get("type"), line["custom_id"]
        if kind == "succeeded" and isinstance(result.get("message"), dict):
            return Result(id=id, body=openai_body(result["message"]))
        if kind in ("canceled", "expired"):
            return Result(id=id, ran=False)
        error = result.get("error")
        inner = error.get("error", error) if isinstance(error, dict) else error
        named = inner.get("type") if isinstance(inner, dict) else None
        return Result(id=id, status=STATUSES.get(str(named), 500), body={"error": inner})

    async def upload(self, order: Order) -> str:
        return ""

    async def create(self, order: Order) -> Job:
        content = _requests(order.path)
        return _job(await self._client.send("POST", "/messages/batches", content=content))

    async def find(self, order: Order) -> Job | None:
        after = None
        for _ in range(20):
            params = {"limit": 100} | ({"after_id": after} if after else {})
            listed = await self._client.json("GET", "/messages/batches", params=params)
            page = listed.get("data") if isinstance(listed, dict) else None
            for each in page or ():
                made_s = _unix_s(each.get("created_at"))
                if made_s is not None and made_s < order.made_s - SKEW_S:
                    return None  # newest first: the rest is older
                job = _job(each)
                if job.total == order.lines and job.id not in order.others:
                    return job
            if not page or not listed.get("has_more"):
                return None
            after = listed.get("last_id")
        return None

    async def status(self, id: str) -> Job:
        return _job(await self._client.json("GET", f"/messages/batches/{id}"))

    async def download(self, source: str, path: Path) -> None:
        await self._client.fetch(source, path)

    async def cancel(self, id: str) -> None:
        await self._client.json("POST", f"/messages/batches/{id}/cancel")

    async def delete(self, job: Job | None, file: str) -> None:
        if job is None:
            return
        try:
            await self._client.json("DELETE", f"/messages/batches/{job.id}")
        except Failure as failure:
            if failure.verdict.reason != "http_404":
                raise

    async def aclose(self) -> None:
        with suppress(Exception):
            await self._client.aclose()


def message_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """A chat's body in Anthropic's words. A field that both have goes as it is."""
    turns = [turn for turn in body["messages"] if turn["role"] != "system"]
    system = "\n\n".join(t["content"] for t in body["messages"] if t["role"] == "system")
    made: dict[str, Any] = {
        "model": body["model"],
        "max_tokens": body.get("max_tokens") or body.get("max_completion_tokens"),
        "messages": turns,
    }
    made |= {name: value for name, value in body.items() if name not in OURS}
    if system:
        made["system"] = system
    if stop := [text for text in body.get("stop") or () if text.strip()]:
        made["stop_sequences"] = stop  # one of blanks alone is refused
    if "temperature" in made and made.get("top_p") == 1:
        del made["top_p"]  # newer models take one of the two
    asked = body.get("response_format")
    if isinstance(asked, dict) and isinstance(asked.get("json_schema"), dict):
        schema = asked["json_schema"].get("schema", {})
        made["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
    return made


def openai_body(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of Anthropic's in OpenAI's words."""
    content = message.get("content")
    parts = [part for part in content or () if isinstance(part, dict)]
    finish = str(message.get("stop_reason") or "")
    usage = message.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    read = _number(usage.get("cache_read_input_tokens"))
    made = _number(usage.get("cache_creation_input_tokens"))
    prompt = _number(usage.get("input_tokens")) + read + made
    completion = _number(usage.get("output_tokens"))
    counts: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    if read:
        counts["prompt_tokens_details"] = {"cached_tokens": read}
    return {
        "model": message.get("model"),
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": parts},
                "finish_reason": FINISH.get(finish, finish) or None,
            }
        ],
        "usage": counts if usage else None,
    }


async def _requests(path: Path) -> AsyncIterator[bytes]:
    """The body that creates a batch: the file's lines as one list."""
    yield b'{"requests":['
    with path.open("rb") as file:
        for number, line in enumerate(file):
            yield (b"," if number else b"") + line.rstrip(b"\n")
    yield b"]}"


def _job(told: Any) -> Job:
    id = told.get("id") if isinstance(told, dict) else None
    if not isinstance(id, str) or not id.replace("_", "").replace("-", "").isalnum():
        message = "anthropic: answers without an id"
        raise Failure(Verdict(kind="ambiguous", reason="bad_json", message=message))
    state = str(told.get("processing_status", ""))
    counts = told.get("request_counts")
    counts = counts if isinstance(counts, dict) else {}
    numbers = {name: _number(counts.get(name)) for name in counts}
    results = told.get("results_url")
    ended = state == "ended"
    return Job(
        id=id,
        state=state,
        running=not ended,
        total=sum(numbers.values()) if numbers else None,
        done=numbers.get("succeeded") if ended else None,
        failed=numbers.get("errored") if ended else None,
        outputs=(str(results),) if ended and results else (),
    )


def _number(value: Any) -> int:
    return value if isinstance(value, int) and 0 <= value < 2**40 else 0


def _unix_s(text: Any) -> float | None:
    try:
        when = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
