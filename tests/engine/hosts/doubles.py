"""The hosts of docs/hosts.md, each as it answers, after its documentation and public reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tests.engine.hosts.double import FIELDS, KEY, THOUGHT, Answer, Double, Refusal, openai_error

__all__ = ["DOUBLES"]

Complaint = tuple[str, Refusal] | None
Query = Mapping[str, str]


def learns(**learnt: Any) -> Mapping[str, Any]:
    """What a run must have learnt about a host."""
    return learnt


class OpenAI(Double):
    row = "OpenAI"
    model = "gpt-4o-mini"
    completions = True  # the route is there, for other models
    learnt = learns(api="chat")
    told = frozenset(("cached_tokens",))

    def refusal(self, body: Answer, query: Query) -> Complaint:
        if "prompt" in body:
            message = (
                "This is a chat model and not supported in the v1/completions endpoint. Did you "
                "mean to use v1/chat/completions?"
            )
            return "api", (404, openai_error(message, param="model"))
        for name in body.keys() - FIELDS - {"max_completion_tokens"}:
            message = f"Unrecognized request argument supplied: {name}"
            return name, (400, openai_error(message))
        if len(body.get("stop", ())) > 4:
            message = "Invalid 'stop': array too long. Expected an array with maximum length 4."
            return "stop", (400, openai_error(message, param="stop", code="array_above_max_length"))
        return None

    def headers(self) -> Mapping[str, str]:
        return {
            "x-ratelimit-limit-requests": "10000",
            "x-ratelimit-remaining-requests": "9999",
            "x-ratelimit-reset-requests": "6ms",
            "x-ratelimit-limit-tokens": "2000000",
            "x-ratelimit-remaining-tokens": "1990000",
            "x-ratelimit-reset-tokens": "300ms",
        }

    def usage(self, prompt_tokens: int, completion_tokens: int) -> Answer:
        return {
            **super().usage(prompt_tokens, completion_tokens),
            "prompt_tokens_details": {"cached_tokens": prompt_tokens // 2, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        }

    def envelope(self, api: str, *, streamed: bool) -> Answer:
        dated = {"model": f"{self.model}-2025-04-16", "service_tier": "default"}
        return {**super().envelope(api, streamed=streamed), **dated, "usage": None}

    def message(self, text: str) -> Answer:
        return {"role": "assistant", "content": text, "refusal": None, "annotations": []}


class OpenAIReasoning(OpenAI):
    row = "OpenAI, reasoning models"
    model = "o4-mini"
    learnt = learns(api="chat", max_tokens="max_completion_tokens", left_out=["stop", "top_p"])
    told = frozenset(("cached_tokens", "reasoning_tokens"))
    flagged_as = "content_filter"

    def refusal(self, body: Answer, query: Query) -> Complaint:
        if complaint := super().refusal(body, query):
            return complaint
        hint = " Use 'max_completion_tokens' instead."
        for name in ("max_tokens", "top_p", "stop", "presence_penalty", "logprobs"):
            if name in body:
                message = f"Unsupported parameter: '{name}' is not supported with this model."
                message += hint * (name == "max_tokens")
                error = openai_error(message, param=name, code="unsupported_parameter")
                return name, (400, error)
        if body.get("temperature", 1) != 1:
            message = (
                f"Unsupported value: 'temperature' does not support {body['temperature']} with "
                "this model. Only the default (1) value is supported."
            )
            error = openai_error(message, param="temperature", code="unsupported_value")
            return "temperature", (400, error)
        return None

    def flagged(self, prompt: str) -> Refusal:
        message = (
            "Invalid prompt: your prompt was flagged as potentially violating our usage policy. "
            "Please try again with a different prompt."
        )
        return 400, openai_error(message, code="invalid_prompt")

    def usage(self, prompt_tokens: int, completion_tokens: int) -> Answer:
        usage = super().usage(prompt_tokens, completion_tokens + 256)
        usage["completion_tokens_details"]["reasoning_tokens"] = 256
        return usage


class Azure(OpenAI):
    """The API without a version, ``/openai/v1``."""

    row = "Azure OpenAI"
    root = "/openai/v1"
    model = "my-gpt"
    flagged_as = "content_filter"

    def models(self) -> Any:
        """What the region has, not what is deployed."""
        return {"object": "list", "data": [self.card("gpt-4o-2024-11-20"), self.card("o3")]}

    def key_of(self, headers: Mapping[str, str]) -> str:
        return headers.get("api-key") or super().key_of(headers)

    def wrong_key(self) -> Refusal:
        message = (
            "Access denied due to invalid subscription key or wrong API endpoint. Make sure to "
            "provide a valid key for an active subscription."
        )
        return 401, {"error": {"code": "401", "message": message}}

    def refusal(self, body: Answer, query: Query) -> Complaint:
        if "prompt" in body:
            message = (
                "The completion operation does not work with the specified model, gpt-4o. Please "
                "choose different model and try again."
            )
            return "api", (400, {"error": {"code": "OperationNotSupported", "message": message}})
        return super().refusal(body, query)

    def flagged(self, prompt: str) -> Refusal:
        message = (
            "The response was filtered due to the prompt triggering Azure OpenAI's content "
            "management policy. Please modify your prompt and retry."
        )
        found = {"violence": {"filtered": True, "severity": "medium"}}
        inner = {"code": "ResponsibleAIPolicyViolation", "content_filter_result": found}
        error = openai_error(message, "", "prompt", "content_filter")["error"]
        return 400, {"error": {**error, "status": 400, "innererror": inner}}

    def first_event(self) -> Answer:
        found = [{"prompt_index": 0, "content_filter_results": {}}]
        return {"choices": [], "id": "", "model": "", "object": "", "prompt_filter_results": found}


class AzureClassic(Azure):
    """A deployment's own URL, with an API version of before ``stream_options``."""

    row = "Azure OpenAI, classic"
    root = "/openai/deployments/my-gpt"
    completions = False
    learnt = learns(api="chat", left_out=["stream_options"])
    told = frozenset()
    flagged_as = ""

    def models(self) -> Any:
        return self.no_route("")

    def key_of(self, headers: Mapping[str, str]) -> str:
        return headers.get("api-key", "")

    def no_route(self, path: str) -> Refusal:
        return 404, {"error": {"code": "404", "message": "Resource not found"}}

    def refusal(self, body: Answer, query: Query) -> Complaint:
        if query != {"api-version": "2024-06-01"}:
            return "query", self.no_route("")
        if "stream_options" in body:
            message = "Unrecognized request argument supplied: stream_options"
            return "stream_options", (400, openai_error(message))
        return super().refusal(body, query)


class Anthropic(Double):
    row = "Anthropic"
    model = "claude-sonnet-4-5"
    learnt = learns(api="chat", left_out=["temperature"])

    def models(self) -> Any:
        """Its list is of the native API, which wants another header."""
        error = {"type": "authentication_error", "message": "x-api-key header is required"}
        return 401, {"type": "error", "error": error}

    def wrong_key(self) -> Refusal:
        error = {"type": "authentication_error", "message": "invalid x-api-key"}
        return 401, {"type": "error", "error": error}

    def no_route(self, path: str) -> Refusal:
        return 404, {"type": "error", "error": {"type": "not_found_error", "message": "Not found"}}

    def refusal(self, body: Answer, query: Query) -> Complaint:
        if "temperature" in body and "top_p" in body:
            message = (
                "`temperature` and `top_p` cannot both be specified for this model. Please use "
                "only one."
            )
            return "temperature", (400, openai_error(message, code="invalid_request_error"))
        return None

    def headers(self) -> Mapping[str, str]:
        return {
            "anthropic-ratelimit-requests-limit": "4000",
            "anthropic-ratelimit-requests-remaining": "3999",
            "anthropic-ratelimit-requests-reset": "2026-11-29T12:00:00Z",
        }


class Gemini(Double):
    row = "Gemini"
    root = "/v1beta/openai"
    model = "gemini-2.5-flash"
    always_counts = True
    learnt = learns(api="chat", left_out=["seed"])
    told = frozenset(("reasoning_tokens",))
    flagged_as = "no_choices"

    def models(self) -> Any:
        names = ("models/gemini-2.5-pro", f"models/{self.model}")
        return {"object": "list", "data": [self.card(name) for name in names]}

    def wrong_key(self) -> Refusal:
        return 400, self._error("API key not valid. Please pass a valid API key.")

    def no_route(self, path: str) -> Refusal:
        return 404, b"<!DOCTYPE html><html lang=en><title>Error 404 (Not Found)!!1</title>"

    def refusal(self, body: Answer, query: Query) -> Complaint:
        for name in ("seed", "presence_penalty", "top_k"):
            if name in body:
                message = (
                    f'Invalid JSON payload received. Unknown name "{name}": Cannot find field.'
                )
                return name, (400, self._error(message))
        return None

    def flagged(self, prompt: str) -> Refusal:
        usage = {"prompt_tokens": 900, "completion_tokens": 0, "total_tokens": 900}
        return 200, {**self.envelope("chat", streamed=False), "choices": [], "usage": usage}

    def usage(self, prompt_tokens: int, completion_tokens: int) -> Answer:
        usage = super().usage(prompt_tokens, completion_tokens)
        return usage | {"total_tokens": usage["total_tokens"] + 256}  # thoughts, unnamed

    def _error(self, message: str) -> list[Answer]:
        kind = "type.googleapis.com/google.rpc.BadRequest"
        details = [{"@type": kind, "fieldViolations": [{"description": message}]}]
        error = {"code": 400, "message": message, "status": "INVALID_ARGUMENT", "details": details}
        return [{"error": error}]


class Mistral(Double):
    row = "Mistral"
    model = "magistral-small-latest"
    always_counts = True
    context_length = 40960
    learnt = learns(api="chat", left_out=["seed", "stream_options"])

    def card(self, name: str) -> Answer:
        return {**super().card(name), "owned_by": "mistralai", "max_context_length": 40960}

    def wrong_key(self) -> Refusal:
        return 401, {"detail": "Unauthorized"}

    def no_route(self, path: str) -> Refusal:
        return 404, {"message": "no Route matched with those values", "request_id": "x"}

    def refusal(self, body: Answer, query: Query) -> Complaint:
        for name in body.keys() - (FIELDS - {"seed", "stream_options"}):
            field = {"type": "extra_forbidden", "loc": ["body", name], "input": body[name]}
            field["msg"] = "Extra inputs are not permitted"
            error = {"object": "error", "message": {"detail": [field]}, "param": None, "code": None}
            return name, (422, {**error, "type": "invalid_request_error"})
        return None

    def headers(self) -> Mapping[str, str]:
        return {"x-ratelimit-limit-req-minute": "60", "x-ratelimit-remaining-req-minute": "59"}

    def message(self, text: str) -> Answer:
        return {"role": "assistant", "tool_calls": None, "content": [*_thinking(), _part(text)]}

    def deltas(self, text: str) -> Iterator[Answer]:
        yield {"role": "assistant", "content": ""}
        yield {"content": _thinking()}
        yield {"content": [_part(text[:40])]}
        yield {"content": text[40:]}


def _part(text: str) -> Answer:
    return {"type": "text", "text": text}


def _thinking() -> list[Answer]:
    return [{"type": "thinking", "thinking": [_part(THOUGHT)]}]


class DeepSeek(Double):
    row = "DeepSeek"
    model = "deepseek-reasoner"
    keeps_alive = ": keep-alive"
    completions = True  # the route is there, to say that it is elsewhere
    learnt = learns(api="chat")
    told = frozenset(("cached_tokens", "reasoning_tokens"))
    flagged_as = "content_filter"

    def card(self, name: str) -> Answer:
        return {"id": name, "object": "model", "owned_by": "deepseek"}

    def wrong_key(self) -> Refusal:
        message = "Authentication Fails, Your api key: ****4a36 is invalid"
        return 401, openai_error(message, "authentication_error", code="invalid_request_error")

    def refusal(self, body: Answer, query: Query) -> Complaint:
        if "prompt" in body:
            message = (
                "completions api is only available when using beta api (set "
                'base_url="https://api.deepseek.com/beta")'
            )
            return "api", (400, openai_error(message, code="invalid_request_error"))
        return None

    def flagged(self, prompt: str) -> Refusal:
        return 400, openai_error("Content Exists Risk", code="invalid_request_error")

    def before_body(self) -> bytes:
        return b"\n" * 12  # one each few seconds, while a request waits

    def message(self, text: str) -> Answer:
        return {"role": "assistant", "content": text, "reasoning_content": THOUGHT}

    def deltas(self, text: str) -> Iterator[Answer]:
        yield {"role": "assistant", "content": None, "reasoning_content": ""}
        yield {"content": None, "reasoning_content": THOUGHT}
        for delta in super().deltas(text):
            yield {**delta, "reasoning_content": None}

    def usage(self, prompt_tokens: int, completion_tokens: int) -> Answer:
        hit = prompt_tokens // 2
        return {
            **super().usage(prompt_tokens, completion_tokens),
            "prompt_tokens_details": {"cached_tokens": hit},
            "completion_tokens_details": {"reasoning_tokens": 16},
            "prompt_cache_hit_tokens": hit,
            "prompt_cache_miss_tokens": prompt_tokens - hit,
        }


class OpenRouter(Double):
    row = "OpenRouter"
    root = "/api/v1"
    model = "openai/gpt-4o-mini"
    completions = True
    keeps_alive = ": OPENROUTER PROCESSING"
    context_length = 128000
    told = frozenset(("cached_tokens", "cost"))
    flagged_as = "content_filter"

    def card(self, name: str) -> Answer:
        top = {"context_length": 128000, "max_completion_tokens": 16384}
        return {"id": name, "context_length": 128000, "pricing": {}, "top_provider": top}

    def wrong_key(self) -> Refusal:
        return 401, {"error": {"message": "User not found.", "code": 401}}

    def refusal(self, body: Answer, query: Query) -> Complaint:
        if self.refused["upstream"] < 2:  # what stands behind is busy; the status is 200
            metadata = {"provider_name": "OpenAI", "raw": "slow down", "retry_after_seconds": 0.1}
            error = {"code": 429, "message": "Provider returned error", "metadata": metadata}
            return "upstream", (200, {"error": error, "user_id": "u"})
        return None

    def flagged(self, prompt: str) -> Refusal:
        message = f'{self.model} requires moderation. Your input was flagged for "violence".'
        metadata = {"reasons": ["violence"], "flagged_input": prompt[:100], "provider_name": "x"}
        return 403, {"error": {"message": message, "code": 403, "metadata": metadata}}

    def usage(self, prompt_tokens: int, completion_tokens: int) -> Answer:
        return {
            **super().usage(prompt_tokens, completion_tokens),
            "cost": 0.000125,
            "is_byok": False,
            "prompt_tokens_details": {"cached_tokens": prompt_tokens // 2},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }


class Together(Double):
    row = "Together"
    model = "meta-llama/Llama-3.3-70B-Instruct-Turbo"
    completions = True
    finish_of_completions = "eos"
    always_counts = True
    context_length = 131072

    def models(self) -> Any:
        return [self.card("other/model"), self.card(self.model)]

    def card(self, name: str) -> Answer:
        return {"id": name, "object": "model", "type": "chat", "context_length": 131072}

    def headers(self) -> Mapping[str, str]:
        return {"x-ratelimit-limit": "10", "x-ratelimit-remaining": "9", "x-ratelimit-reset": "1"}


class Fireworks(Double):
    row = "Fireworks"
    root = "/inference/v1"
    model = "accounts/fireworks/models/llama-v3p1-8b-instruct"
    completions = True
    always_counts = True
    context_length = 131072

    def card(self, name: str) -> Answer:
        return {**super().card(name), "supports_chat": True, "context_length": 131072}

    def refusal(self, body: Answer, query: Query) -> Complaint:
        for name in body.keys() - FIELDS - {"top_k", "min_p", "service_tier"}:
            message = f"Extra inputs are not permitted, field: '{name}', value: {body[name]!r}"
            error = openai_error(message, code="invalid_request_error")
            return name, (400, error)
        return None


class Groq(Double):
    row = "Groq"
    root = "/openai/v1"
    model = "llama-3.1-8b-instant"
    context_length = 131072
    learnt = learns(api="chat")

    def card(self, name: str) -> Answer:
        return {**super().card(name), "context_window": 131072, "max_completion_tokens": 131072}

    def wrong_key(self) -> Refusal:
        return 401, openai_error("Invalid API Key", code="invalid_api_key")

    def no_route(self, path: str) -> Refusal:
        message = f"Unknown request URL: POST {path}. Please check the URL for typos"
        return 404, openai_error(message, code="unknown_url")

    def refusal(self, body: Answer, query: Query) -> Complaint:
        for name in body.keys() - FIELDS - {"reasoning_format", "service_tier"}:
            return name, (400, openai_error(f"property '{name}' is unsupported"))
        return None

    def headers(self) -> Mapping[str, str]:
        """Requests are counted by the day, tokens by the minute."""
        return {
            "x-ratelimit-limit-requests": "14400",
            "x-ratelimit-remaining-requests": "14370",
            "x-ratelimit-reset-requests": "2m59.56s",
            "x-ratelimit-limit-tokens": "600000",
            "x-ratelimit-remaining-tokens": "599000",
            "x-ratelimit-reset-tokens": "7.66ms",
        }


class Keyless(Double):
    """A server of one's own."""

    completions = True

    def key_of(self, headers: Mapping[str, str]) -> str:
        """Any will do, and none."""
        return KEY


class Vllm(Keyless):
    row = "vLLM"
    model = "Qwen/Qwen3-8B"
    context_length = 40960

    def card(self, name: str) -> Answer:
        card = {**super().card(name), "owned_by": "vllm", "root": name, "parent": None}
        return {**card, "max_model_len": 40960}


class Sglang(Keyless):
    """With a parser for reasoning."""

    row = "SGLang"
    model = "Qwen/Qwen3-8B"
    context_length = 40960

    def card(self, name: str) -> Answer:
        card = {**super().card(name), "owned_by": "sglang", "root": name}
        return {**card, "max_model_len": 40960}

    def choice(self, api: str, text: str) -> Answer:
        return {**super().choice(api, text), "matched_stop": 151645}

    def message(self, text: str) -> Answer:
        return {"role": "assistant", "content": text, "reasoning_content": THOUGHT}

    def deltas(self, text: str) -> Iterator[Answer]:
        yield {"role": "assistant", "content": "", "reasoning_content": None}
        yield {"content": None, "reasoning_content": THOUGHT}
        for delta in super().deltas(text):
            yield {**delta, "reasoning_content": None}


class LlamaCpp(Keyless):
    row = "llama.cpp"
    model = "qwen3-8b-q4_k_m.gguf"

    def models(self) -> Any:
        meta = {"n_ctx_train": 40960, "n_params": 8190735360}  # not what its slots have
        card = {**self.card(self.model), "owned_by": "llamacpp", "meta": meta}
        return {"models": [{"name": self.model}], "object": "list", "data": [card]}

    def envelope(self, api: str, *, streamed: bool) -> Answer:
        timings = {"prompt_n": 1, "predicted_per_second": 42.0}
        return {**super().envelope(api, streamed=streamed), "timings": timings}


class Ollama(Keyless):
    """Its templates leave thoughts in the text where nobody asked for them apart."""

    row = "Ollama"
    model = "qwen3"

    def models(self) -> Any:
        return {"object": "list", "data": [self.card("qwen3:latest"), self.card("llama3.2:3b")]}

    def message(self, text: str) -> Answer:
        return super().message(f"<think>\n{THOUGHT}\n</think>\n\n{text}")

    def deltas(self, text: str) -> Iterator[Answer]:
        return super().deltas(f"<think>\n{THOUGHT}\n</think>\n\n{text}")


class LiteLLM(Double):
    """In front of a host that takes no seed."""

    row = "LiteLLM"
    model = "my-alias"
    completions = True
    learnt = learns(left_out=["seed"])

    def card(self, name: str) -> Answer:
        return {**super().card(name), "owned_by": "openai"}

    def wrong_key(self) -> Refusal:
        message = "Authentication Error, Invalid proxy server token passed."
        return 401, openai_error(message, "token_not_found_in_db", "key", "401")

    def refusal(self, body: Answer, query: Query) -> Complaint:
        if "seed" in body:
            message = (
                "litellm.UnsupportedParamsError: anthropic does not support parameters: ['seed'], "
                f"for model={self.model}. To drop these, set `litellm.drop_params=True`."
            )
            return "seed", (400, openai_error(message, "None", "None", "400"))
        return None


DOUBLES: tuple[type[Double], ...] = (
    *(OpenAI, OpenAIReasoning, Azure, AzureClassic, Anthropic, Gemini, Mistral, DeepSeek),
    *(OpenRouter, Together, Fireworks, Groq, Vllm, Sglang, LlamaCpp, Ollama, LiteLLM),
)
"""In the order of docs/hosts.md."""
