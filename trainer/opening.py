"""Open a model, a tokenizer or a configuration, from a folder or from the hub: the only place.

What comes with a model is data. A folder may name Python files of its own to be run for it, and
transformers would run them, or ask the person whether it should; here it is told no, so that such a
folder is refused in one line and nothing waits for an answer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.errors as hub
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from trainer.errors import AuthError, ConfigError, DataError, TrainerError, UnavailableError

disable_progress_bar()  # type: ignore[no-untyped-call]

__all__ = ["architecture", "opened"]


def opened(cls: Any, name: str, what: str, **options: Any) -> Any:
    """``cls``, one of transformers' Auto classes, with what ``name`` holds of it.

    Args:
        what: "model", "tokenizer": the word for it in a message.

    Raises:
        ConfigError, DataError, AuthError, UnavailableError: it cannot be opened.
    """
    try:
        return cls.from_pretrained(name, trust_remote_code=False, **options)
    except SafetensorError as exc:
        raise DataError(f"{name}: its weights are damaged: {exc}") from exc
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise _explained(exc, name, what) from exc


def architecture(config: Any, **options: Any) -> Any:
    """The model that ``config`` describes, with random weights."""
    model: Any = AutoModelForCausalLM
    return model.from_config(config, trust_remote_code=False, **options)


def _explained(exc: Exception, name: str, what: str) -> TrainerError:
    causes: list[BaseException] = []
    cause: BaseException | None = exc
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(c, hub.GatedRepoError) for c in causes):
        return AuthError(f"{name}: the hub wants an access token for it; set HF_TOKEN")
    if "custom code" in str(exc) or "trust_remote_code" in str(exc):
        return ConfigError(
            f"{name}: its {what} wants to run Python code of its own, which is never done here; use"
            " a model that transformers knows by itself"
        )
    if Path(name).is_dir():
        return ConfigError(f"{name}: holds no {what} that transformers can load: {_short(exc)}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return ConfigError(f"{name}: there is no such folder; check --model_name_or_path")
    if any(isinstance(c, hub.RepositoryNotFoundError) for c in causes):
        return ConfigError(f"{name}: is neither a folder nor a model on the hub")
    if any(isinstance(c, hub.LocalEntryNotFoundError | ConnectionError) for c in causes):
        return UnavailableError(f"{name}: is no folder, and the model hub cannot be reached")
    return ConfigError(f"{name}: no {what} could be loaded: {_short(exc)}")


def _short(exc: Exception) -> str:
    return json.dumps(str(exc).strip().partition("\n")[0][:200], ensure_ascii=False)
