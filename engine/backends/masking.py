"""Keys out of whatever a server sends: one that repeats its key must not get it into logs, stores
and datasets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine.backends.base import Failure, Verdict
from engine.records import Completion
from engine.secrets import Secret

__all__ = ["Masking"]


class Masking:
    """Knows the keys that one server was given."""

    def __init__(self, secrets: Sequence[Secret]) -> None:
        self._secrets = secrets

    def text(self, text: str) -> str:
        """``text`` without the keys."""
        for secret in self._secrets:
            text = secret.mask(text)
        return text

    def verdict(self, verdict: Verdict) -> Verdict:
        error = verdict.error
        if error is not None and self.text(str(error)) != str(error):
            error = type(error)(self.text(str(error)))
        return replace(verdict, message=self.text(verdict.message), error=error)

    def failure(self, failure: Failure) -> Failure:
        return Failure(self.verdict(failure.verdict)) if self._secrets else failure

    def outcome(self, outcome: Completion | BaseException) -> Completion | BaseException:
        """What a prompt came to, answer or failure."""
        if isinstance(outcome, Failure):
            return self.failure(outcome)
        if not self._secrets or not isinstance(outcome, Completion):
            return outcome
        said = outcome.text, outcome.reasoning, outcome.model
        masked = text, reasoning, model = tuple(map(self.text, said))
        if masked == said:
            return outcome
        return replace(outcome, text=text, reasoning=reasoning, model=model)
