"""What a host takes of a request's body, learnt from its refusals once for a run.

OpenAI's reasoning models want ``max_completion_tokens`` and take neither ``stop`` nor another
temperature; Mistral and Gemini refuse ``seed`` and ``stream_options``; some hosts have chats alone.
A refusal costs nothing and names the field, so the field is renamed or left out and the request is
sent again. Only a field that the engine or the recipe added is ever left out: what the user asked
for is the user's to take back, with ``--without``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from engine.backends.base import Verdict
from engine.backends.constraint import CONSTRAINT
from engine.records import Api
from engine.text import shorten

__all__ = ["RENAMED", "Dialect"]

MOST_SAID = 200
"""Characters of a host's own words in a lesson."""
RENAMED = ("max_tokens", "max_completion_tokens")
"""OpenAI's older name for the most tokens of an answer, and the one that its reasoning models take
in its place."""
CHANGES_ANSWERS = frozenset(
    (
        *("ignore_eos", "seed", "stop", "top_p", "temperature", "top_k", "min_p"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "stop_token_ids"),
        *("continue_final_message", "add_generation_prompt"),
    )
)
"""Fields whose loss changes what is answered, so the person is told; the other optional ones only
change how the answer travels."""
OPTIONAL = CHANGES_ANSWERS | {"stream_options", "stream", CONSTRAINT}
"""Fields without which a request can be made."""
CHAT_ONLY = re.compile(
    r"chat[/ ]completions|chat model|not supported in the v1/completions"
    r"|completion operation does not work|(?:only|use) (?:the )?chat"
    r"|completions api is only available|no route|could not route"
    r"|\bmessages\b.{0,30}(?:required|missing)|(?:required|missing)\b.{0,30}\bmessages\b"
    r"|\bprompt\W{1,3}is (?:unsupported|not (?:supported|permitted|allowed))",
    re.IGNORECASE,
)
"""How a host says with status 400 that it has no completions, or not for this model: OpenAI, Azure,
DeepSeek, Cloudflare; and a gateway that takes every path for chats, which misses ``messages``.
"""
STREAM_ONLY = re.compile(
    r"only supports? stream|must have stream ?= ?true|stream\w* (?:is|mode is) required"
    r"|non-streaming calls?",
    re.IGNORECASE,
)
"""How a host says that it wants streams: DashScope, Fireworks."""
WORD = re.compile(r"[a-z_]+")
"""Words of a host's message that may be names of fields: "Unsupported parameter: ``top_k``"."""


class Dialect:
    """How requests to one host differ from OpenAI's completions.

    Args:
        without: fields never sent (``--without``).
        asked: fields that the user gave, which are never left out unasked.
    """

    def __init__(
        self,
        *,
        without: Collection[str] = (),
        asked: Collection[str] = (),
    ) -> None:
        self._without = frozenset(without)
        self._asked = frozenset(asked)
        self.any_api = False
        """A request for completions may go out as a chat."""
        self._omitted: set[str] = set()
        self._renamed = False
        self._chat = False
        self._only_streams = False
        self._answered: set[str] = set()
        """Fields of requests that were answered: the host takes these."""
        self._apis: set[str] = set()

    @property
    def learnt(self) -> dict[str, Any]:
        """Plain JSON values, empty where nothing is special."""
        learnt: dict[str, Any] = {}
        if self._omitted:
            learnt["left_out"] = sorted(self._omitted)
        if self._renamed:
            learnt["max_tokens"] = RENAMED[1]
        if self._chat:
            learnt["api"] = "chat"
        if self._only_streams:
            learnt["stream"] = True
        return learnt

    def restore(self, learnt: Mapping[str, Any]) -> None:
        """Know this and no more: what an earlier session learnt, as ``learnt`` gave it. What is not
        of that form is left out.
        """
        names = learnt.get("left_out")
        self._omitted = set(OPTIONAL.intersection(names if isinstance(names, list) else ()))
        self._renamed = learnt.get("max_tokens") == RENAMED[1]
        self._chat = self.any_api and learnt.get("api") == "chat"
        self._only_streams = learnt.get("stream") is True

    def streams(self, wanted: bool) -> bool:
        """Whether an answer is asked for as a stream, where that is ``wanted`` or not."""
        return (wanted or self._only_streams) and "stream" not in self._omitted | self._without

    def api(self, wanted: Api) -> Api:
        """The API by which a request that names ``wanted`` goes out."""
        return "chat" if self._chat else wanted

    def spoken(self, body: dict[str, Any]) -> dict[str, Any]:
        """``body`` as the host takes it. Changes the argument."""
        if self._renamed and RENAMED[0] in body:
            body[RENAMED[1]] = body.pop(RENAMED[0])
        for left_out in (self._omitted, self._without):
            for name in left_out:
                body.pop(name, None)
        return body

    def answered(self, body: Iterable[str], api: Api) -> None:
        """The host answered a request with these fields."""
        if api not in self._apis or not self._answered.issuperset(body):
            self._apis.add(api)
            self._answered.update(body)

    def learn(self, verdict: Verdict, text: str, body: Mapping[str, Any], api: Api) -> str | None:
        """Learn from a refusal of ``body``; what was learnt in words, None where it is nothing.

        ``text`` is the host's message. After a field (or the API) was once answered, a refusal is
        about the request and not about the field.
        """
        if verdict.kind != "settings":
            return None
        if self._goes_by_chat(verdict, text, api):
            self._chat = True
            return "it has no completions (or not for this model): asking by chat"
        if verdict.reason not in ("http_400", "http_422"):
            return None
        if "stream" not in body and not self._only_streams and STREAM_ONLY.search(text):
            self._only_streams = True
            return "it answers by streams only"
        named = [name for name in verdict.parameters if name in body]
        for said in named or WORD.findall(text.lower()):
            # Some name only what they want: "use max_completion_tokens".
            name = RENAMED[0] if said == RENAMED[1] and said not in body else said
            if name not in body or name in self._answered:
                continue
            if name == RENAMED[0] and not self._renamed:
                self._renamed = True
                return f"it takes {RENAMED[1]} in the place of {RENAMED[0]}"
            if name in OPTIONAL and name not in self._asked:
                self._omitted |= {name}
                return _left_out(name, text)
        return None

    def _goes_by_chat(self, verdict: Verdict, text: str, api: Api) -> bool:
        if not self.any_api or api == "chat" or self._chat or "completions" in self._apis:
            return False
        if verdict.reason in ("http_404", "http_405", "http_501"):
            return True
        refused = verdict.reason in ("http_400", "http_422")
        return refused and ("messages" in verdict.parameters or bool(CHAT_ONLY.search(text)))

    def __str__(self) -> str:
        """In words, for whoever resumes a run."""
        said = ["asked by chat"] if self._chat else []
        said += [f"{RENAMED[1]} for {RENAMED[0]}"] if self._renamed else []
        said += ["by streams only"] if self._only_streams else []
        said += [f"without {', '.join(sorted(self._omitted))}"] if self._omitted else []
        return "; ".join(said)


def _left_out(name: str, said: str) -> str:
    """What leaving a field out means, in words."""
    lesson = f"it does not take {name}, which is left out"
    if name == CONSTRAINT:
        return (
            f"{lesson}: answers are not constrained there, and checked here all the same "
            f"(it says: {shorten(said, MOST_SAID)})"
        )
    return lesson + "; answers differ from what it would give" * (name in CHANGES_ANSWERS)
