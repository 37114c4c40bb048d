"""The body of a request, in OpenAI's words; ``dialect`` puts it into the host's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.errors import ConfigError
from engine.records import Api, Prompt

__all__ = ["CONTINUES", "request_body"]

CONTINUES = ("vllm", "sglang")
"""Owners of models whose server begins a new turn after an assistant's unless told otherwise. Other
hosts go on with it by themselves, or cannot.
"""


def request_body(
    prompts: Sequence[Prompt],
    *,
    model: str,
    api: Api,
    streamed: bool,
    ignores_eos: bool,
    continues: bool,
) -> dict[str, Any]:
    """One call's body. All prompts of a call sample as the first of them does.

    Args:
        ignores_eos: the server can be told not to end at the end-of-text token.
        continues: it must be told to go on with an assistant's turn at a chat's end.

    Raises ConfigError for several chats in one call.
    """
    first = prompts[0]
    sampling = first.sampling
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    if api == "chat":
        if len(prompts) != 1:
            raise ConfigError("the chat API takes one prompt a call; set --request-batch-size 1")
        body["messages"] = [{"role": t.role, "content": t.content} for t in first.chat]
        if continues and first.begun:
            body |= {"continue_final_message": True, "add_generation_prompt": False}
    else:
        body["prompt"] = first.text if len(prompts) == 1 else [p.text for p in prompts]
    if sampling.stop:
        body["stop"] = sampling.stop
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.forbid_eos and ignores_eos:
        body["ignore_eos"] = True
    if sampling.extra:
        body |= sampling.extra
    if streamed:
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
    return body
