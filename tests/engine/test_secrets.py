"""Keys: where they may come from, and that nothing shows them."""

from __future__ import annotations

import base64
import copy
import json
import os
import pickle
import traceback
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from engine.errors import ConfigError
from engine.run.generate import make_backends
from engine.secrets import DEFAULT_VARIABLE, Secret, keep_from_children, read_key, secret_field
from engine.settings import load_config

CANARY = "sk-CANARY0123456789abcdWXYZ"


def test_security_5_a_secret_masks_itself() -> None:
    """str, repr, format, copies and tracebacks show the last four characters at most."""
    secret = Secret(CANARY)
    shown = f"{secret} {secret!r} {secret:>9} {copy.copy(secret)} {copy.deepcopy([secret])}"
    assert "CANARY" not in shown
    assert str(secret) == "sk-…WXYZ"
    assert secret.reveal() == CANARY
    try:
        raise RuntimeError(secret)
    except RuntimeError:
        assert "CANARY" not in traceback.format_exc()


def test_security_5_a_secret_is_never_pickled() -> None:
    """A pickle would be a copy on disk."""
    with pytest.raises(TypeError, match="never pickled"):
        pickle.dumps(Secret(CANARY))


@pytest.mark.parametrize(
    "value", ["", "a\nb", '"quoted"', "'quoted'", "two words", "schlüssel", "tab\t"]
)
def test_fault_119_keys_that_cannot_be_sent(value: str) -> None:
    """A key that is no header value is refused before anything is sent, and is not shown."""
    with pytest.raises(ConfigError) as caught:
        Secret(value, source="$KEY")
    assert "$KEY" in str(caught.value)
    assert not value or value not in str(caught.value)


def test_security_1_environment_and_private_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment goes before the file; a file that others can read is refused."""
    file = tmp_path / "key"
    file.write_text(CANARY + "\n")
    file.chmod(0o600)
    monkeypatch.setenv("WOOLMILL_TEST_KEY", "from-environment")
    first, second = read_key(env="WOOLMILL_TEST_KEY", file=file), read_key(env="NO_SUCH", file=file)
    assert first is not None
    assert first.reveal() == "from-environment"
    assert second is not None
    assert second.reveal() == CANARY
    monkeypatch.delenv(DEFAULT_VARIABLE)
    assert read_key(env=DEFAULT_VARIABLE) is None
    assert read_key(env=DEFAULT_VARIABLE, file=file) == second
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_key(file=file)


def test_a_key_file_that_is_no_file(tmp_path: Path) -> None:
    """Missing, a pipe, or not ASCII: one line that names it, and no hanging."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    odd = tmp_path / "odd"
    odd.write_bytes(b"\xff\xfe")
    odd.chmod(0o600)
    for path in (tmp_path / "none", pipe, odd):
        with pytest.raises(ConfigError, match=path.name):
            read_key(file=path)


@pytest.mark.parametrize(
    "key", ["0f9e8d7c6b5a49382716", CANARY, "a/b+c%d\\e&f~0123456789", "sk-1234"]
)
def test_a_key_is_masked_in_every_form_that_a_text_gives_it(key: str) -> None:
    """As it is, in a URL, in JSON, and in base64 behind any number of other bytes."""
    secret = Secret(key)
    said = [key, quote(key, safe=""), quote(key), json.dumps(key)[1:-1]]
    said += [json.dumps(key)[1:-1].replace("/", "\\/")]
    for before in ("", "u", "us", "user:", "Bearer "):
        whole = f"{before}{key} and more".encode()
        said += [base64.b64encode(whole).decode(), base64.urlsafe_b64encode(whole).decode()]
    for text in said:
        sentence = f"the key {text} is refused; {text}"
        masked = secret.mask(sentence)
        assert secret.occurs_in(sentence.encode())
        assert not secret.occurs_in(masked.encode())
        assert key not in masked
        assert masked.startswith("the key ")
        assert masked.count(str(secret)) >= 2
    for before in ("", "u", "us"):
        alone = base64.b64encode(f"{before}{key}".encode()).decode()
        assert secret.mask(alone) != alone


def test_a_text_without_the_key_stays_the_same_object() -> None:
    """Masking costs next to nothing where there is nothing to mask."""
    text = "nothing here " * 1000
    assert Secret(CANARY).mask(text) is text


@pytest.mark.parametrize("word", ["EMPTY", "ollama", "none", "x", "lm-studio", "12345678"])
def test_a_word_in_a_key_s_place_is_not_masked(word: str) -> None:
    """Servers that want no key are given a word, and texts that hold it must not change."""
    assert Secret(word).mask(f"write {word} here") == f"write {word} here"
    assert not Secret(word).occurs_in(word.encode())


def test_a_named_variable_that_is_not_set() -> None:
    """It never means "no key" in silence: only the default may be absent."""
    with pytest.raises(ConfigError, match="MISTRAL_KEY is not set") as caught:
        read_key(env="MISTRAL_KEY")
    assert caught.value.exit_code == 78


KEYS = ["sk-proj-canary0123456789", "a0f9e8d7c6b5a49382716", "gsk_Canary0123456789abcdef"]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_in_the_place_of_its_variable_s_name(key: str, tmp_path: Path) -> None:
    """It is refused before anything is stored, and no message says it back."""
    file = tmp_path / "run.toml"
    file.write_text(f'[[endpoint]]\nurl = "http://127.0.0.1:1/v1"\nkey_env = "{key}"\n')
    settings = {"base_url": ("http://127.0.0.1:1/v1",), "key_env": key}
    for how in (
        lambda: make_backends(load_config(None, settings)),
        lambda: make_backends(load_config(file, {})),
        lambda: make_backends(load_config(None, {"backend": "scripted", "key_env": key})),
        lambda: read_key(file=key),
    ):
        with pytest.raises(ConfigError) as caught:
            how()
        assert key not in str(caught.value)
        assert (
            "key_env" in str(caught.value)
            or "key-env" in str(caught.value)
            or ("key_file" in str(caught.value))
        )


def test_names_of_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is set is a name, however it looks; what is not set is one where it looks so."""
    monkeypatch.setenv("my_key_of_2026_for_the_host", CANARY)
    assert read_key(env="my_key_of_2026_for_the_host") == Secret(CANARY)
    for name in ("MISTRAL", "AZURE_OPENAI_API_KEY_2026_EAST", "k"):
        assert load_config(None, {"key_env": name}).key_env == name
        keep_from_children(name)
    for name in ("", "1KEY", "MY-KEY", "MY KEY", "KEY=x", "SCHLÜSSEL", "KEY\n"):
        with pytest.raises(ConfigError, match="key-env"):
            load_config(None, {"key_env": name})


KEY = "sk-proj-Ab3dEf6hIj9lMn2pQr5t"


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"api_key": "0123456789abcdef"}, "api_key"),
        ({"a": [{"headers": {"Authorization": "x"}}]}, "Authorization"),
        ({"metadata": {"note": f"see {KEY}"}}, "note"),
        ({"metadata": ["Bearer 0123456789abcdef"]}, "metadata"),
        ({"max_tokens": 9, "stop_token_ids": [1], "prompt_cache_key": "alpaca"}, None),
        ({"guided_json": {"required": ["key_takeaways", "sk-learn"]}, "api_key": None}, None),
    ],
)
def test_a_secret_in_a_body_is_found_by_name_or_looks(body: dict[str, Any], name: str) -> None:
    assert secret_field(body) == name
