"""Mistral's batch API. https://docs.mistral.ai/capabilities/batch

    POST /files            the requests, purpose batch
    POST /batch/jobs       {input_files, endpoint, model, metadata, timeout_hours}
    GET  /batch/jobs/{id}  status, total_requests, output_file, error_file

Answers stay for a day after the end; a job that ran out of time keeps what was done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.backends.batch.jobs import ENDPOINTS, Job, Limits, Order
from engine.backends.batch.openai import FileJobs
from engine.records import Api

__all__ = ["MistralJobs"]

STATES = {"cancellation_requested": "cancelling", "timeout_exceeded": "expired"}
"""Mistral's words for OpenAI's."""
HOURS = 24
"""How long Mistral may work on a job. After a day, as at the other providers, a job ends with what
is done by then."""
WORDS = {
    "id": "id",
    "output_file_id": "output_file",
    "error_file_id": "error_file",
    "errors": "errors",
}
"""OpenAI's names, as ``FileJobs`` reads a job, and Mistral's for the same."""


class MistralJobs(FileJobs):
    name = "mistral"
    apis: tuple[Api, ...] = ("chat",)
    limits = Limits(lines=100_000, bytes=512_000_000)
    batches = "/batch/jobs"

    def line(self, id: str, body: Mapping[str, Any], api: Api) -> Any:
        """The model stands in the job, and must not stand in its lines."""
        return {"custom_id": id, "body": {n: v for n, v in body.items() if n != "model"}}

    def asked(self, order: Order) -> dict[str, Any]:
        return {
            "input_files": [order.file],
            "endpoint": ENDPOINTS[order.api],
            "model": order.model,
            "metadata": {"woolmill": order.tag},
            "timeout_hours": HOURS,
        }

    def is_ours(self, listed: Mapping[str, Any], order: Order) -> bool:
        files = listed.get("input_files")
        ours = isinstance(files, list) and bool(order.file) and order.file in files
        return ours or super().is_ours(listed, order)

    async def find(self, order: Order) -> Job | None:
        """Mistral counts pages, from 0, newest first."""
        for page in range(20):
            params = {"page": page, "page_size": 100}
            listed = await self._client.json("GET", self.batches, params=params)
            jobs = listed.get("data") if isinstance(listed, dict) else None
            for each in jobs or ():
                if isinstance(each, dict) and self.is_ours(each, order):
                    return self.job(each)
            if not jobs or len(jobs) < 100:
                return None
        return None

    def job(self, told: Any) -> Job:
        """In OpenAI's words."""
        if not isinstance(told, dict):
            return super().job(told)
        state = str(told.get("status", "")).lower()
        state = STATES.get(state, state)
        counts = {
            "total": told.get("total_requests"),
            "completed": told.get("succeeded_requests", told.get("completed_requests")),
            "failed": told.get("failed_requests"),
        }
        same = {ours: told.get(theirs) for ours, theirs in WORDS.items()}
        return super().job(
            {**same, "id": told.get("id"), "status": state, "request_counts": counts}
        )
