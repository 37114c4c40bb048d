"""The providers, each in its own words; see ``world``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar

import orjson

from tests.engine.batches.world import Asked, Batch, Line, Provider, Said, error, form_of

__all__ = ["PROVIDERS", "Anthropic", "Azure", "Gemini", "Mistral", "OpenAI", "Together"]

NOT_FOUND: Said = (404, error("No such object", "not_found"))
LOST: Said = (0, b"")


class OpenAI(Provider):
    name = "openai"
    uploads = "/files"
    purpose = "batch"
    batches_at = "/batches"

    def route(self, asked: Asked) -> Said:
        method, path, raw, headers = asked.method, asked.path, asked.raw, asked.headers
        path = path.removeprefix(self.root)
        place = path.split("/")[1:]
        if method == "POST" and path == self.uploads:
            fields, data, name = form_of(raw, headers["content-type"])
            if fields.get("purpose") != self.purpose:
                return 400, error("purpose")
            return 200, {"id": self.add_file(data, name), "object": "file", "status": "processed"}
        if path == "/files":
            return 200, {"data": [{"id": i, "filename": n} for i, n in self.names.items()]}
        if place[0] == "files":
            return self._file(method, place)
        if method == "POST" and path == self.batches_at:
            return self._create(orjson.loads(raw))
        if method == "GET" and path == self.batches_at:
            return 200, self.listing([self.told(batch) for batch in self.list()])
        if not path.startswith(self.batches_at):
            return NOT_FOUND
        id, *rest = path.removeprefix(self.batches_at + "/").split("/")
        if (batch := self.batches.get(id)) is None:
            return NOT_FOUND
        if method == "POST" and rest == ["cancel"]:
            batch.state = batch.state if batch.ended else "cancelling"
        else:
            self.look(batch)
        return 200, self.told(batch)

    def _file(self, method: str, place: list[str]) -> Said:
        id = place[1]
        if id not in self.files:
            return NOT_FOUND
        if method == "DELETE":
            del self.files[id]
            self.deleted.add(id)
            return 200, {"id": id, "deleted": True}
        return 200, self.given(self.files[id])

    def listing(self, told: list[Any]) -> Any:
        return {"object": "list", "data": told, "has_more": False}

    def _create(self, body: dict[str, Any]) -> Said:
        file, tag = self.asked(body)
        if file not in self.files:
            return 400, error(f"Invalid file {file}")
        lines = [self.line(orjson.loads(raw), body) for raw in self.files[file].splitlines()]
        batch = self.make(lines, tag=tag, file=file)
        if self.lost_creates:
            self.lost_creates -= 1
            return LOST
        return 200, self.wrapped(self.told(batch))

    def asked(self, body: dict[str, Any]) -> tuple[str, str]:
        """File and tag of what is to be created."""
        assert body["completion_window"] == "24h"
        assert body["endpoint"] == "/v1/chat/completions"
        return body["input_file_id"], body.get("metadata", {}).get("woolmill", "")

    def wrapped(self, told: Any) -> Any:
        return told

    def line(self, line: dict[str, Any], order: dict[str, Any]) -> Line:
        assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
        return Line(line["custom_id"], line["body"])

    def finish(self, batch: Batch) -> None:
        done = [line for line in batch.lines if line.kind == "answered"]
        rest = [line for line in batch.lines if line.kind != "answered"]
        for name, lines in (("output", done), ("errors", rest)):
            if lines:
                data = self.shuffled([orjson.dumps(self.result(line)) + b"\n" for line in lines])
                batch.files[name] = self.add_file(data, f"{name}.jsonl")

    def result(self, line: Line) -> Any:
        said: dict[str, Any] = {"id": f"r-{line.id}", "custom_id": line.id, "error": None}
        if line.kind in ("expired", "cancelled"):
            code = f"batch_{line.kind}"
            message = "This request could not be executed before the completion window expired."
            return said | {"response": None, "error": {"code": code, "message": message}}
        return said | {"response": {"status_code": line.status, "body": line.answer}}

    def told(self, batch: Batch) -> Any:
        done = sum(line.kind == "answered" for line in batch.lines)
        failed = sum(line.kind == "failed" for line in batch.lines)
        return {
            "id": batch.id,
            "object": "batch",
            "status": batch.state,
            "input_file_id": batch.file,
            "output_file_id": batch.files.get("output"),
            "error_file_id": batch.files.get("errors"),
            "errors": {"data": [batch.failure]} if batch.failure else None,
            "request_counts": {"total": len(batch.lines), "completed": done, "failed": failed},
            "metadata": {"woolmill": batch.tag},
        }


class Azure(OpenAI):
    name = "azure"
    root = "/openai/v1"

    def key_of(self, headers: Mapping[str, str]) -> str:
        return headers.get("api-key", "") or super().key_of(headers)


class Together(OpenAI):
    name = "together"
    uploads = "/files/upload"
    purpose = "batch-api"

    def listing(self, told: list[Any]) -> Any:
        return told

    def wrapped(self, told: Any) -> Any:
        return {"job": told, "warning": ""}

    def asked(self, body: dict[str, Any]) -> tuple[str, str]:
        assert "metadata" not in body
        return body["input_file_id"], ""

    def told(self, batch: Batch) -> Any:
        told = super().told(batch)
        for name in ("metadata", "request_counts", "errors", "object"):
            del told[name]
        why = batch.failure["message"] if batch.failure else None
        return told | {"status": batch.state.upper(), "progress": 50.0, "error": why}


class Mistral(OpenAI):
    name = "mistral"
    batches_at = "/batch/jobs"
    WORDS: ClassVar = {
        "validating": "QUEUED", "in_progress": "RUNNING", "completed": "SUCCESS",
        "failed": "FAILED", "expired": "TIMEOUT_EXCEEDED", "cancelling": "CANCELLATION_REQUESTED",
        "cancelled": "CANCELLED",
    }  # fmt: skip

    def asked(self, body: dict[str, Any]) -> tuple[str, str]:
        assert body["endpoint"] == "/v1/chat/completions"
        return body["input_files"][0], body["metadata"]["woolmill"]

    def line(self, line: dict[str, Any], order: dict[str, Any]) -> Line:
        assert set(line) == {"custom_id", "body"}
        return Line(line["custom_id"], {**line["body"], "model": order["model"]})

    def told(self, batch: Batch) -> Any:
        done = sum(line.kind == "answered" for line in batch.lines)
        failed = sum(line.kind == "failed" for line in batch.lines)
        return {
            "id": batch.id,
            "input_files": [batch.file],
            "metadata": {"woolmill": batch.tag},
            "endpoint": "/v1/chat/completions",
            "status": self.WORDS[batch.state],
            "output_file": batch.files.get("output"),
            "error_file": batch.files.get("errors"),
            "errors": [{"message": batch.failure["message"], "count": 1}] if batch.failure else [],
            "total_requests": len(batch.lines),
            "completed_requests": done + failed,
            "succeeded_requests": done,
            "failed_requests": failed,
        }


class Anthropic(Provider):
    name = "anthropic"
    takes_seed = False
    at = "/v1/messages/batches"

    def key_of(self, headers: Mapping[str, str]) -> str:
        return headers.get("x-api-key", "") or super().key_of(headers)

    def route(self, asked: Asked) -> Said:
        method, path, raw, headers = asked.method, asked.path, asked.raw, asked.headers
        if not path.startswith(self.at):
            return NOT_FOUND
        assert headers["anthropic-version"] == "2023-06-01"
        if path == self.at and method == "POST":
            requests = orjson.loads(raw)["requests"]
            batch = self.make([self.line(request) for request in requests])
            if self.lost_creates:
                self.lost_creates -= 1
                return LOST
            return 200, self.told(batch)
        if path == self.at:
            return 200, {"data": [self.told(each) for each in self.list()], "has_more": False}
        id, *rest = path.removeprefix(self.at + "/").split("/")
        batch = self.batches.get(id)  # type: ignore[assignment]
        if batch is None or batch.deleted:
            return NOT_FOUND
        if method == "DELETE":
            batch.deleted = True
            self.deleted.add(id)
            return 200, {"id": id, "type": "message_batch_deleted"}
        if rest == ["results"]:
            return 200, self.given(self.files[batch.files["results"]])
        if rest == ["cancel"]:
            batch.state = batch.state if batch.ended else "cancelling"
        else:
            self.look(batch)
        return 200, self.told(batch)

    def line(self, request: dict[str, Any]) -> Line:
        params = request["params"]
        assert set(params) <= {
            *(
                "model",
                "max_tokens",
                "messages",
                "system",
                "temperature",
                "top_p",
                "stop_sequences",
            ),
        }, set(params)
        return Line(request["custom_id"], params)

    def finish(self, batch: Batch) -> None:
        lines = [orjson.dumps(self.result(line)) + b"\n" for line in batch.lines]
        batch.files["results"] = self.add_file(self.shuffled(lines), "results.jsonl")

    def result(self, line: Line) -> Any:
        if line.kind in ("expired", "cancelled"):
            kind = {"cancelled": "canceled"}.get(line.kind, line.kind)
            return {"custom_id": line.id, "result": {"type": kind}}
        if line.kind == "failed":
            kind = "invalid_request_error" if line.status == 400 else "api_error"
            inner = {"type": kind, "message": line.answer["error"]["message"]}
            failed = {"type": "errored", "error": {"type": "error", "error": inner}}
            return {"custom_id": line.id, "result": failed}
        text = line.answer["choices"][0]["message"]["content"]
        usage = line.answer["usage"]
        message = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": line.body["model"],
            "content": [{"type": "text", "text": text}],
            "stop_reason": "end_turn",
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "output_tokens": usage["completion_tokens"],
                "cache_read_input_tokens": 0,
            },
        }
        return {"custom_id": line.id, "result": {"type": "succeeded", "message": message}}

    def told(self, batch: Batch) -> Any:
        kinds = [line.kind for line in batch.lines]
        ended = batch.ended
        counts = {
            "processing": 0 if ended else len(kinds),
            "succeeded": kinds.count("answered"),
            "errored": kinds.count("failed"),
            "canceled": kinds.count("cancelled"),
            "expired": kinds.count("expired"),
        }
        state = "ended" if ended else "in_progress"
        return {
            "id": batch.id,
            "type": "message_batch",
            "processing_status": "canceling" if batch.state == "cancelling" else state,
            "request_counts": counts,
            "created_at": datetime.fromtimestamp(time.time(), UTC).isoformat(),
            "results_url": f"{self.origin}{self.at}/{batch.id}/results" if ended else None,
        }


class Gemini(Provider):
    name = "gemini"
    root = "/v1beta/openai"

    def key_of(self, headers: Mapping[str, str]) -> str:
        return headers.get("x-goog-api-key", "") or super().key_of(headers)

    def route(self, asked: Asked) -> Said:
        method, path, raw, query, headers = (
            asked.method,
            asked.path,
            asked.raw,
            asked.query,
            asked.headers,
        )
        if path == "/upload/v1beta/files":
            if headers.get("x-goog-upload-command") == "start":
                place = f"{self.origin}{path}?upload_id=1"
                return 200, {}, {"x-goog-upload-url": place}  # type: ignore[return-value]
            assert headers["x-goog-upload-command"] == "upload, finalize"
            return 200, {"file": {"name": f"files/{self.add_file(raw, 'in').replace('-', '')}"}}
        if path == "/v1beta/models/m:batchGenerateContent":
            return self._create(orjson.loads(raw)["batch"])
        if path.startswith("/download/v1beta/files/"):
            assert query == {"alt": "media"}
            return self._file(path.split("/")[-1].removesuffix(":download"), "GET")
        if path == "/v1beta/batches":
            return 200, {"operations": [self.told(batch) for batch in self.list()]}
        if path.startswith("/v1beta/files/"):
            return self._file(path.split("/")[-1], method)
        if not path.startswith("/v1beta/batches/"):
            return NOT_FOUND
        id, _, verb = path.removeprefix("/v1beta/").partition(":")
        batch = self.batches.get(id)
        if batch is None or batch.deleted:
            return NOT_FOUND
        if method == "DELETE":
            batch.deleted = True
            return 200, {}
        if verb == "cancel":
            batch.state = batch.state if batch.ended else "cancelling"
        else:
            self.look(batch)
        return 200, self.told(batch)

    def batch_id(self, number: int) -> str:
        return f"batches/b{number:04d}"

    def _file(self, name: str, method: str) -> Said:
        id = next((each for each in self.files if each.replace("-", "") == name), None)
        if id is None:
            return NOT_FOUND
        if method == "DELETE":
            del self.files[id]
            self.deleted.add(id)
            return 200, {}
        return 200, self.given(self.files[id])

    def _create(self, order: dict[str, Any]) -> Said:
        file = order["inputConfig"]["fileName"]
        _, data = self._file(file.removeprefix("files/"), "GET")
        lines = [self.line(orjson.loads(raw)) for raw in data.splitlines()]
        batch = self.make(lines, tag=order["displayName"], file=file)
        if self.lost_creates:
            self.lost_creates -= 1
            return LOST
        return 200, self.told(batch)

    def line(self, line: dict[str, Any]) -> Line:
        request = line["request"]
        assert set(request) <= {"contents", "generationConfig", "systemInstruction"}
        assert set(request["generationConfig"]) <= {
            *("maxOutputTokens", "temperature", "topP", "stopSequences", "seed"),
        }
        turns = [
            {"role": turn["role"], "content": turn["parts"][0]["text"]}
            for turn in request["contents"]
        ]
        config = request["generationConfig"]
        return Line(line["key"], {"model": "m", "messages": turns, "seed": config.get("seed")})

    def finish(self, batch: Batch) -> None:
        if batch.state == "expired":
            return  # with all that was done, which is not charged
        lines = [orjson.dumps(self.result(line)) + b"\n" for line in batch.lines]
        batch.files["responses"] = self.add_file(self.shuffled(lines), "out").replace("-", "")

    def result(self, line: Line) -> Any:
        if line.kind == "cancelled":
            return {"key": line.id, "error": {"code": 1, "message": "cancelled"}}
        if line.kind == "failed":
            code = 3 if line.status == 400 else 13
            return {"key": line.id, "error": {**line.answer["error"], "code": code}}
        text = line.answer["choices"][0]["message"]["content"]
        usage = line.answer["usage"]
        candidate = {
            "content": {"role": "model", "parts": [{"text": text}]},
            "finishReason": "STOP",
        }
        counts = {
            "promptTokenCount": usage["prompt_tokens"],
            "candidatesTokenCount": usage["completion_tokens"],
            "totalTokenCount": usage["total_tokens"],
        }
        response = {"candidates": [candidate], "usageMetadata": counts, "modelVersion": "m"}
        return {"key": line.id, "response": response}

    def told(self, batch: Batch) -> Any:
        states = {
            "validating": "PENDING", "in_progress": "RUNNING", "completed": "SUCCEEDED",
            "cancelling": "RUNNING",
        }  # fmt: skip
        state = states.get(batch.state, batch.state.upper())
        kinds = [line.kind for line in batch.lines]
        told: dict[str, Any] = {
            "name": batch.id,
            "metadata": {
                "displayName": batch.tag,
                "state": f"BATCH_STATE_{state}",
                "batchStats": {
                    "requestCount": str(len(kinds)),
                    "successfulRequestCount": str(kinds.count("answered")),
                },
            },
            "done": batch.ended,
        }
        if batch.ended and "responses" in batch.files:
            told["response"] = {"responsesFile": f"files/{batch.files['responses']}"}
        if batch.failure:
            told["error"] = {"code": 8, **batch.failure}
        return told


PROVIDERS: tuple[type[Provider], ...] = (OpenAI, Azure, Together, Mistral, Anthropic, Gemini)
