"""Together's batch API: OpenAI's in other words. It has no metadata, so that a batch is found by
its file. https://docs.together.ai/docs/batch-inference
"""

from __future__ import annotations

from typing import Any

from engine.backends.base import Verdict
from engine.backends.batch.jobs import ENDPOINTS, Job, Limits, Order
from engine.backends.batch.openai import FileJobs, whole_failure

__all__ = ["TogetherJobs"]


class TogetherJobs(FileJobs):
    name = "together"
    limits = Limits(lines=50_000, bytes=100_000_000)
    uploads = "/files/upload"
    purpose = "batch-api"

    def form(self, name: str) -> dict[str, str]:
        return {"purpose": self.purpose, "file_name": name}

    def asked(self, order: Order) -> dict[str, Any]:
        return {
            "input_file_id": order.file,
            "endpoint": ENDPOINTS[order.api],
            "completion_window": "24h",
        }

    def job(self, told: Any) -> Job:
        """``create`` wraps the job; ``progress`` is a percentage, and there are no counts."""
        if isinstance(told, dict) and isinstance(told.get("job"), dict):
            told = told["job"]
        job = super().job(told)
        failure: Verdict | None = None
        if job.state == "failed" and not job.outputs:
            failure = whole_failure([{"message": str(told.get("error") or "")}], self.name)
        return Job(
            id=job.id,
            state=job.state,
            running=job.running,
            outputs=job.outputs,
            failure=failure,
        )
