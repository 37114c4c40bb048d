"""What a server sends for one call, whole or in events, and whether that is an answer.

Each prompt needs its choice, and each choice must be known to be at its end; an error, wherever it
comes, outweighs the rest. Finish reasons are given in OpenAI's words, whatever the host's are. What
a batch is billed for is one sum, so its shares are estimates that add up to it.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import httpx
import orjson

from engine.backends.base import Failure, Verdict
from engine.backends.openai.error_body import as_json, clean, is_error, is_html
from engine.backends.openai.verdicts import html_page
from engine.errors import ConfigError
from engine.records import Completion, Prompt, Usage

__all__ = ["Events", "Reply", "Unpacker", "parsed"]

TELLING = (b'"message"', b'"content"', b'"text"', b'"finish_reason"', b'"delta"')
"""Keys of which a choice has one each. Within a text, quotes are escaped."""
STOP, LENGTH, FILTER = "stop", "length", "content_filter"
"""OpenAI's finish reasons: it ended by itself, at the limit of tokens, or was withheld."""
FINISH = {
    **dict.fromkeys(
        ("stop", "end_turn", "eos", "eos_token", "stop_sequence", "complete", "completed"), STOP
    ),
    **dict.fromkeys(
        (
            *("length", "max_tokens", "max_output_tokens", "model_length"),
            *("model_context_window_exceeded", "max_length"),
        ),
        LENGTH,
    ),
    **dict.fromkeys(
        (
            *("content_filter", "content_filtered", "sensitive", "safety", "recitation"),
            *("blocklist", "prohibited_content", "spii", "moderation", "error_toxic"),
        ),
        FILTER,
    ),
    **dict.fromkeys(("tool_calls", "function_call", "tool_use", "tool_call"), "tool_calls"),
    **{same: same for same in ("refusal", "repetition")},
    **dict.fromkeys(("abort", "cancelled", "canceled"), "abort"),
    **dict.fromkeys(
        (
            *("error", "network_error", "insufficient_system_resource", "failed"),
            *("model_error", "timeout"),
        ),
        "error",
    ),
}
"""OpenAI's word for each host's: Anthropic, TGI, Together, Mistral, z.ai, DeepSeek, Gemini, xAI,
Cohere.
``abort`` and ``error`` are no answers; any other word is ``unknown``.
"""
CACHED = (
    "prompt_tokens_details.cached_tokens",
    "prompt_cache_hit_tokens",
    "cache_read_input_tokens",
    "input_tokens_details.cached_tokens",
    "cached_tokens",
)
"""Where hosts count prompt tokens that were cached."""
PLAIN = frozenset(("prompt_tokens", "completion_tokens", "total_tokens"))
"""A usage of these fields alone needs no search for cached tokens or a price."""
THOUGHTS = (
    "completion_tokens_details.reasoning_tokens",
    "output_tokens_details.reasoning_tokens",
    "reasoning_tokens",
)
"""Where hosts count the tokens of thoughts, which are part of the completion's."""
MOST_TOKENS = 10**8
"""A count beyond this is a mistake of the server's: no context is so long."""
MOST_COST = 1e6
"""In dollars, for one call. What is beyond is a mistake of the server's, which would use up a
budget at once."""


class Reply:
    """What one call's events add up to, whole or streamed. Choices are told apart by ``index``."""

    def __init__(self, count: int) -> None:
        self.texts: list[list[str]] = [[] for _ in range(count)]
        self.thoughts: list[list[str]] = [[] for _ in range(count)]
        self.finish: list[str | None] = [None] * count
        self.unknown = ""
        """A finish reason that stands in no list here."""
        self.refused = [False] * count
        self.usage: Any = None
        self._counted = 0
        """Pieces that were there when the latest usage came."""
        self.model = ""
        self.error: bytes | None = None
        self.strange = False
        """There was a choice that belongs to no prompt."""
        self.started = False
        """A token is here, be it a thought's."""
        self.done = False
        """The stream says by ``[DONE]`` that it is at its end."""
        self.whole = False
        """Not a stream, but one JSON answer."""
        self.ttft_s: float | None = None

    @classmethod
    def of_whole(cls, data: Any, count: int) -> Reply:
        answer = cls(count)
        answer.whole = True
        answer.add(data, "message")
        return answer

    @property
    def finished(self) -> bool:
        """Every choice has its finish reason: nothing that comes now is part of the answer."""
        return self.error is None and None not in self.finish

    @property
    def pieces(self) -> int:
        """Pieces of text and thoughts so far; in a stream, about as many tokens."""
        return sum(map(len, self.texts)) + sum(map(len, self.thoughts))

    def add(self, data: Any, part: str) -> None:
        """Take in one JSON value: a whole answer (``part`` is ``message``) or a stream's event
        (``delta``).
        """
        if isinstance(data, list) and data:
            data = data[0]  # Gemini's errors
        if not isinstance(data, dict):
            raise Failure(Verdict(kind="ambiguous", reason="bad_json", message="not a JSON object"))
        if is_error(data, whole=self.whole):
            self.error = as_json(data)
            return
        choices = data.get("choices")
        if isinstance(data.get("model"), str):
            self.model = data["model"]
        self._note_usage(data)
        for choice in choices if isinstance(choices, list) else ():
            self._add_choice(choice, part)

    def _note_usage(self, data: dict[str, Any]) -> None:
        """Keep the latest count: of the answer, or where Groq and Moonshot put it in streams."""
        beside = data.get("x_groq")
        if usage := data.get("usage") or (isinstance(beside, dict) and beside.get("usage")):
            self.usage, self._counted = usage, self.pieces

    def _add_choice(self, choice: Any, part: str) -> None:
        index = choice.get("index") if isinstance(choice, dict) else "?"
        if not isinstance(index, int):
            index = 0 if index is None else int(index) if index in ("0", "1", "2") else index
        if not isinstance(index, int) or not 0 <= index < len(self.texts):
            self.strange = True  # one more than was asked for, or of nobody knows what
            return
        if choice.get("error"):
            self.error = as_json({"error": choice["error"]})
            return
        message = choice.get(part) or choice.get("message")
        content = choice.get("text") if message is None else None
        if isinstance(message, dict):
            content = message.get("content")
            self.refused[index] |= bool(message.get("refusal"))
            if thought := _reasoning(message):
                self.thoughts[index].append(thought)
                self.started = True
        if isinstance(content, list):
            for thinks, text in _parts(content):
                (self.thoughts if thinks else self.texts)[index].append(text)
                self.started = True
        elif isinstance(content, str):
            self.texts[index].append(content)
            self.started |= bool(content)
        if "usage" in choice:
            self._note_usage(choice)
        if choice.get("finish_reason"):  # "" is what some write while it goes on
            word = str(choice["finish_reason"])
            self.finish[index] = FINISH.get(word.lower(), "unknown")
            if self.finish[index] == "unknown":
                self.unknown = clean(word)

    def completions(
        self, prompts: Sequence[Prompt], latency_s: float
    ) -> list[Completion | BaseException]:
        usages = self._usages(prompts)
        if not self.whole and self.pieces > self._counted + len(prompts):
            # The count is of the midst of the stream, and what came behind it was paid too.
            usages = [
                replace(told, completion_tokens=seen.completion_tokens, estimated=True)
                if seen.completion_tokens > told.completion_tokens
                else told
                for told, seen in zip(usages, self._estimates(prompts), strict=True)
            ]
        outcomes: list[Completion | BaseException] = [
            self._completion(i, usage, prompts[i].sampling.max_tokens, latency_s)
            for i, usage in zip(range(len(prompts)), usages, strict=True)
        ]
        for i, outcome in enumerate(outcomes):
            if isinstance(outcome, Failure):
                outcomes[i] = Failure(replace(outcome.verdict, taken=self.taken(prompts)[i]))
        return outcomes

    def taken(self, prompts: Sequence[Prompt]) -> list[int | None]:
        """Tokens that each prompt has taken, whose answer is of no use: by the host's last count or
        by what came, whichever is more, as a count in the midst of a stream is not the last. None
        where nothing says so. Thoughts that the host keeps to itself are not seen.
        """
        found: list[int | None] = []
        for i, (told, seen) in enumerate(
            zip(self._usages(prompts), self._estimates(prompts), strict=True)
        ):
            ended = self.whole or self.done or self.finish[i] is not None
            known = any(self.texts[i]) or any(self.thoughts[i]) or (ended and not told.estimated)
            tokens = (use.prompt_tokens + use.completion_tokens for use in (told, seen))
            found.append(max(tokens) if known else None)
        return found

    def _completion(
        self, i: int, usage: Usage, max_tokens: int, latency_s: float
    ) -> Completion | Failure:
        finish, text, reasoning = self.finish[i], "".join(self.texts[i]), "".join(self.thoughts[i])
        nothing = (not text or text.isspace()) and (not reasoning or reasoning.isspace())
        if finish is None and self.whole and not nothing:
            # One JSON value cannot have been cut: the host leaves the reason out.
            finish = LENGTH if usage.completion_tokens >= max_tokens else STOP
        if finish is None and self.strange:
            return _in_vain("bad_json", "a choice out of range")
        if finish is None and nothing and (self.done or self.whole):
            return _in_vain("no_choices", "no choice for the prompt")
        if finish is None:
            return _in_vain("cut_body", "no finish_reason")
        if finish in ("abort", "error"):
            return _in_vain(f"finish_{finish}", "given up by the server")
        if self.refused[i]:
            finish = "refusal"
        elif nothing and finish == STOP and not usage.estimated and not usage.completion_tokens:
            return _in_vain("empty_answer", "an empty answer of no tokens")
        return Completion(
            text=text,
            finish_reason=finish,
            usage=usage,
            reasoning=reasoning,
            model=self.model,
            latency_s=latency_s,
            ttft_s=self.ttft_s,
        )

    def _usages(self, prompts: Sequence[Prompt]) -> list[Usage]:
        """Each prompt's share. A batch is billed as one sum, so its shares are estimates."""
        usage = self.usage if isinstance(self.usage, dict) else {}
        if usage.keys() <= PLAIN and len(prompts) == 1 and (plain := _plain(usage)) is not None:
            return [plain]
        p = _count(usage, "prompt_tokens", "input_tokens")
        c = _count(usage, "completion_tokens", "output_tokens")
        cost = _cost(usage.get("cost"))
        if p is not None and c is not None and len(prompts) == 1:
            return [_usage(usage, p, c, cost)]
        usages = self._estimates(prompts)
        if p is not None and c is not None:
            read = _shares(p, [each.prompt_tokens for each in usages])
            written = _shares(c, [each.completion_tokens for each in usages])
            usages = [
                Usage(prompt_tokens=r, completion_tokens=w, estimated=True)
                for r, w in zip(read, written, strict=True)
            ]
        share = None if cost is None else cost / len(prompts)
        return [replace(each, cost=share) for each in usages]

    def _estimates(self, prompts: Sequence[Prompt]) -> list[Usage]:
        """What each prompt took as far as can be seen here, at four characters a token, or one a
        piece of a stream where that is more, as in Chinese.
        """
        came = [
            [piece for piece in (*texts, *thoughts) if piece]
            for texts, thoughts in zip(self.texts, self.thoughts, strict=True)
        ]
        return [
            Usage(
                prompt_tokens=prompt.tokens or max(prompt.size_bytes // 4, 1),
                completion_tokens=max(sum(map(len, parts)) // 4, 1 if self.whole else len(parts))
                if parts
                else 0,
                estimated=True,
            )
            for prompt, parts in zip(prompts, came, strict=True)
        ]


def _in_vain(reason: str, message: str) -> Failure:
    return Failure(Verdict(kind="ambiguous", reason=reason, message=message))


def _reasoning(message: dict[str, Any]) -> str:
    """The thoughts of a message or delta, under the name that this host has for them."""
    for name in ("reasoning_content", "reasoning", "thinking"):
        if (thought := message.get(name)) and isinstance(thought, str):
            return thought
    details = message.get("reasoning_details")
    if not isinstance(details, list):
        return ""
    texts = [d.get("text") or d.get("summary") for d in details if isinstance(d, dict)]
    return "".join(text for text in texts if isinstance(text, str))


def _parts(content: list[Any]) -> list[tuple[bool, str]]:
    """(is a thought, text) of each part that has text: Mistral, and gateways to Anthropic."""
    found = []
    for part in content:
        if isinstance(part, str):
            found.append((False, part))
        elif isinstance(part, dict):
            kind = str(part.get("type", "text"))
            thinks = "think" in kind or "reason" in kind
            for name in ("text", "thinking", "reasoning", "summary"):
                text = part.get(name)
                if isinstance(text, list):
                    text = "".join(inner for _, inner in _parts(text))
                if isinstance(text, str) and text:
                    found.append((thinks, text))
                    break
    return found


def _count(usage: dict[str, Any], *names: str) -> int | None:
    """The first plausible count above zero among ``names``, else zero where one says so. A name
    ``A.B`` is field B of the object A.
    """
    found = None
    for name in names:
        outer, _, inner = name.rpartition(".")
        fields = usage.get(outer) if outer else usage
        if isinstance(fields, dict) and (count := _tokens(fields.get(inner))) is not None:
            if count:
                return count
            found = 0
    return found


def _plain(usage: dict[str, Any]) -> Usage | None:
    """The usage that nearly all servers tell: two counts and their sum. None: look closer."""
    p, c = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(p) is not int or type(c) is not int or not 0 <= p <= MOST_TOKENS >= c >= 0:
        return None
    return (
        Usage(prompt_tokens=p, completion_tokens=c) if usage.get("total_tokens") == p + c else None
    )


def _usage(usage: dict[str, Any], prompt: int, completion: int, cost: float | None) -> Usage:
    """One completion's tokens, in the words of OpenAI, DeepSeek, Anthropic, xAI or OpenRouter."""
    cached = _count(usage, *CACHED) or 0
    thoughts = _count(usage, *THOUGHTS) or 0
    if cached > prompt:
        prompt += cached  # Anthropic's own count is of what was not cached
    beside = (_count(usage, "total_tokens") or 0) - prompt - completion
    if beside > 0 and (beside == thoughts or not thoughts):
        completion, thoughts = completion + beside, beside  # xAI and Gemini, which may not name it
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        cached_tokens=cached,
        reasoning_tokens=min(thoughts, completion),
        cost=cost,
    )


def _tokens(count: Any) -> int | None:
    """``count`` where it is a number of tokens that can be."""
    if isinstance(count, float) and count.is_integer():
        count = int(count)
    whole = isinstance(count, int) and not isinstance(count, bool)
    return count if whole and 0 <= count <= MOST_TOKENS else None


def _cost(cost: Any) -> float | None:
    if isinstance(cost, dict):
        cost = cost.get("total_cost")  # Perplexity
    number = isinstance(cost, int | float) and not isinstance(cost, bool)
    return float(cost) if number and math.isfinite(cost) and 0 <= cost <= MOST_COST else None


class Events:
    """A stream's lines, put together to events for ``reply``.

    Lenient where the meaning is plain: an event's JSON may stand on several lines, events need no
    blank line between them, and what is no JSON (keep-alives that a gateway wrapped) is a sign of
    life and nothing else.
    """

    def __init__(self, reply: Reply, max_event_bytes: int) -> None:
        self._reply = reply
        self._max_event_bytes = max_event_bytes
        self._rest: list[bytes] = []
        """Pieces of the line that is not at its end yet."""
        self._rest_bytes = 0
        self._begun: list[bytes] = []
        """Lines of an event whose JSON goes on."""
        self._begun_bytes = 0

    def feed(self, data: bytes) -> None:
        """Take in the next bytes. Raises Failure for an event without end and for broken JSON."""
        if b"\n" in data:
            first, *lines, data = data.split(b"\n")
            self._line(b"".join([*self._rest, first]))
            for line in lines:
                self._line(line)
            self._rest, self._rest_bytes = [], 0
        if data:
            self._rest.append(data)
            self._rest_bytes += len(data)
            self._check_size()

    def end(self) -> None:
        """There are no more bytes."""
        self._line(b"".join(self._rest))
        self._dispatch()

    def _begin(self, data: bytes) -> None:
        """Keep a line of an event that may go on in the next one."""
        self._begun.append(data)
        self._begun_bytes += len(data)
        self._check_size()

    def _check_size(self) -> None:
        if self._rest_bytes + self._begun_bytes > self._max_event_bytes:
            message = f"an event of more than {self._max_event_bytes} bytes"
            raise Failure(Verdict(kind="ambiguous", reason="bad_stream", message=message))

    def _line(self, line: bytes) -> None:
        line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.startswith(b"data:"):
            if self._begun and not line.strip():
                self._dispatch()
            return
        data = line[5:].strip()
        if self._reply.done:
            return
        if self._begun and data != b"[DONE]":
            self._begin(data)
        elif data == b"[DONE]":
            self._dispatch()
            self._reply.done = True
        elif data[:1] in (b"{", b"["):
            try:
                event = _json(data, len(self._reply.texts))
            except (ValueError, RecursionError):
                self._begin(data)
            else:
                self._reply.add(event, "delta")

    def _dispatch(self) -> None:
        """The event that was begun is at its end."""
        lines, self._begun, self._begun_bytes = self._begun, [], 0
        if not lines:
            return
        try:
            event = _json(b"\n".join(lines), len(self._reply.texts))
        except (ValueError, RecursionError) as exc:
            message = f"an event is not JSON: {clean(str(exc))}"
            raise Failure(Verdict(kind="ambiguous", reason="bad_stream", message=message)) from exc
        self._reply.add(event, "delta")


def _shares(total: int, weights: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to ``weights`` whose sum is ``total``."""
    scale = sum(weights) or 1
    ends = [0]
    for weight in weights:
        ends.append(ends[-1] + weight)
    cuts = [total * end // scale for end in ends[:-1]] + [total]
    return [b - a for a, b in pairwise(cuts)]


def parsed(raw: bytes, response: httpx.Response, where: str, choices: int = 1) -> Any:
    """A whole answer's JSON, with at most so many ``choices``. Raises Failure."""
    try:
        return _json(raw, choices)
    except (ValueError, RecursionError) as exc:
        if is_html(raw, response.headers.get("content-type", "")):
            raise Failure(html_page(where, raw)) from exc
        raise Failure(
            Verdict(kind="ambiguous", reason="bad_json", message=clean(str(exc)))
        ) from exc


def _json(raw: bytes, choices: int) -> Any:
    """Raises ValueError also where an object has a key twice: of two answers under one key nobody
    knows which was meant.
    """
    data = orjson.loads(raw)
    if raw.count(b'"choices"') > 1 or any(raw.count(key) > choices for key in TELLING):
        json.loads(raw, object_pairs_hook=_each_key_once)
    return data


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError(f"a key comes twice in one object, among {', '.join(data)}")
    return data


class Unpacker:
    """Takes an answer's pieces as they come and gives them back unpacked: we ask for an
    uncompressed body, but some proxies compress it anyway.

    Raises Failure where the answer grows beyond ``limit`` bytes.
    """

    def __init__(self, encoding: str, limit: int) -> None:
        self._left = limit
        self._limit = limit
        self._decompressor: Any = None
        encoding = encoding.strip().lower()
        if encoding in ("gzip", "x-gzip", "deflate"):
            self._decompressor = zlib.decompressobj(zlib.MAX_WBITS | 32)
        elif encoding in ("br", "zstd", "compress"):
            error = ConfigError(
                f"answers come with content-encoding {encoding}, which was not asked for; let the "
                "proxy or gateway in between pass them as they are"
            )
            raise Failure(
                Verdict(kind="settings", reason="encoding", message=str(error), error=error)
            )

    def __call__(self, piece: bytes) -> bytes:
        if self._decompressor is not None:
            try:
                piece = self._decompressor.decompress(piece, self._left + 1)
            except zlib.error as exc:
                message = f"the compressed body is damaged ({clean(str(exc))})"
                raise Failure(
                    Verdict(kind="ambiguous", reason="unreadable", message=message)
                ) from exc
        self._left -= len(piece)
        if self._left < 0:
            message = f"an answer of more than {self._limit} bytes"
            raise Failure(Verdict(kind="dead", reason="too_large", message=message))
        return piece
