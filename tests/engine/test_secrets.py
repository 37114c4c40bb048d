"""Keys: where they may come from, and that nothing shows them."""

from __future__ import annotations

import copy
import os
import pickle
import traceback
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.secrets import Secret, read_key

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
    assert read_key(env="NO_SUCH") is None
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
