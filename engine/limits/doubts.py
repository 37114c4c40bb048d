"""Whether refusals that blame the settings are right about them.

A wrong key, model or address is refused from the first request on. After thousands of good answers
the same words come from a gateway that restarts, or are about one prompt; then the run goes on, and
only many different prompts in a row, without a good answer between them, are believed. A prompt
that is refused again after as many answers says nothing new: it is refused for itself, and at the
end of a run none but such are left.
"""

from __future__ import annotations

__all__ = ["Doubts"]

CONFIRMED = 2
"""Refusals that are believed before any answer: one, and one that confirms it."""
OF_THE_PROMPT = frozenset({"http_400", "http_403", "http_422"})
"""Reasons that can lie in a prompt: only those of different prompts confirm each other."""


class Doubts:
    """One run's. ``most``: different prompts whose refusal is believed after a good answer."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.ever_answered = False
        """Whether any request of this session was answered."""
        self.answered_before = False
        """Whether one was in an earlier session, with the same model and sampling: what can lie in
        a prompt does so then, while the key and the address may be others now."""
        self.took_back = False
        """Whether a prompt was answered that had been refused for what can lie in a prompt: the
        host, or a gateway before it, refuses at random."""
        self._refusals = 0
        self._prompts: set[int] = set()
        self._answers = 0
        self._refused: dict[int, int] = {}
        """How many answers there were when a prompt was refused first, for what can lie in it."""

    def answered(self) -> None:
        """A request was answered: the settings are right."""
        self.ever_answered = True
        self._answers += 1
        self._refusals = 0
        self._prompts.clear()

    def has_answered(self, reason: str) -> bool:
        """Whether there was an answer that speaks against ``reason``."""
        return self.ever_answered or (self.answered_before and reason in OF_THE_PROMPT)

    def settled(self, index: int, reason: str) -> bool:
        """Whether a second refusal of request ``index`` for ``reason`` is the host's last word.

        Before any answer it is: other requests must say what is wrong. Later it is about the
        prompt where no other has been refused since the last answer; else it may come from a
        gateway that starts anew, or from one that refuses at random.
        """
        if not self.has_answered(reason):
            return True
        return not self.took_back and self._prompts <= {index}

    def believed(self, index: int, reason: str) -> bool:
        """Take in that request ``index`` was refused for ``reason``; True: the settings are
        wrong.
        """
        if reason in OF_THE_PROMPT:
            since = self._answers - self._refused.setdefault(index, self._answers)
            if index in self._prompts or since >= self._most:
                return False
        self._prompts.add(index)
        self._refusals += 1
        if not self.has_answered(reason):
            return self._refusals >= CONFIRMED
        return len(self._prompts) >= self._most
