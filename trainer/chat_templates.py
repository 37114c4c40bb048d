"""Chat templates for models that have none: two of our own by name, TRL's where it is installed, or
any file.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError

__all__ = ["set_chat_template"]

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, as OpenAI described it and Qwen uses it. The model has to learn the two special tokens.
"""
_PLAIN = (
    "{{ bos_token or '' }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token + '\n\n' }}{% else %}"
    "{{ message['role'].capitalize() + ': ' + message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
"""For models without special tokens for turns: plain words, and the end-of-text token after
answers."""
_OWN = {"chatml": _CHATML, "plain": _PLAIN}
"""By their names in ``--chat_template``."""


def set_chat_template(tokenizer: Any, wanted: str) -> None:
    """Give ``tokenizer`` the chat template ``wanted``: a file, or a name.

    ``chatml`` needs its two tokens in the vocabulary; ``plain`` ends answers in the tokenizer's own
    end-of-text token, and so fits every base model.

    Raises:
        ConfigError: there is no such template, or the tokenizer lacks its tokens.
    """
    tokenizer.chat_template = _text(wanted)
    missing = [t for t in ("<|im_start|>", "<|im_end|>") if t not in tokenizer.get_vocab()]
    if wanted == "chatml" and missing:
        raise ConfigError(
            f"--chat_template chatml: the tokenizer has no {missing[0]}, so that answers would end"
            " in ordinary characters; use --chat_template plain"
        )


def _text(wanted: str) -> str:
    if wanted in _OWN:
        return _OWN[wanted]
    file = Path(wanted).expanduser()
    if not file.is_file() and "/" not in wanted and (folder := _trls()) is not None:
        file = folder / f"{wanted.removesuffix('.jinja')}.jinja"
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        names = ", ".join([*_OWN, *([] if _trls() is None else ["any that TRL ships"])])
        raise ConfigError(
            f"--chat_template {wanted}: there is no such file or name; names are {names}"
        ) from exc


def _trls() -> Path | None:
    """The folder of TRL's chat templates, which is never imported."""
    found = importlib.util.find_spec("trl")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / "chat_templates"
