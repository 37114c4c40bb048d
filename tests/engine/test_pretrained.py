"""A folder that brings code: it is opened without that code, or refused; nobody is asked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import models
from engine.backends.local.backend import load
from engine.dedup.encoder import SentenceEncoder
from engine.errors import ConfigError
from engine.prompts.tokens import tokenizer_counter

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
AUTO_MAP = {
    "AutoConfig": "evil.EvilConfig",
    "AutoTokenizer": ["evil.EvilTok", None],
    "AutoModel": "evil.EvilModel",
    "AutoModelForCausalLM": "evil.EvilModel",
}


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What exists once planted code was run; every question would be answered with yes."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return tmp_path / "RAN"


def plant(folder: Path, ran: Path) -> None:
    """Code in ``folder`` that leaves its mark when it is imported."""
    (folder / "evil.py").write_text(
        f"open({str(ran)!r}, 'w')\n"
        "from transformers import PretrainedConfig\n"
        "class EvilConfig(PretrainedConfig): model_type = 'evilmodel'\n"
        "class EvilTok: pass\n"
        "class EvilModel: pass\n"
    )


def strange(tmp_path: Path, ran: Path) -> Path:
    """A model that nobody can open without its code."""
    folder = tmp_path / "strange"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "evilmodel", "auto_map": AUTO_MAP})
    )
    tokenizer = {"tokenizer_class": "EvilTok", "auto_map": AUTO_MAP}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    plant(folder, ran)
    return folder


def also_plain(tmp_path: Path, ran: Path) -> Path:
    """The embedding model, which names code beside what transformers knows by itself."""
    folder = tmp_path / "plain"
    shutil.copytree(models.locate("minilm"), folder)
    for name in ("config.json", "tokenizer_config.json"):
        told = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(told | {"auto_map": AUTO_MAP}))
    plant(folder, ran)
    return folder


OPENED: dict[str, Callable[[str], Any]] = {
    "tokenizer": tokenizer_counter,
    "model": lambda folder: load(folder, torch.device("cpu")),
    "embedding": SentenceEncoder,
}


@pytest.mark.parametrize("what", OPENED)
def test_what_needs_its_code_is_refused(tmp_path: Path, ran: Path, what: str) -> None:
    """In one line that says why, with the exit code of a wrong setting."""
    with pytest.raises(ConfigError, match="never run") as caught:
        OPENED[what](str(strange(tmp_path, ran)))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 78
    assert not ran.exists()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["tokenizer", "embedding"])
def test_what_does_not_need_its_code_is_opened_without(
    tmp_path: Path, ran: Path, what: str
) -> None:
    """As most models that still bring the code of their first days."""
    OPENED[what](str(also_plain(tmp_path, ran)))
    assert not ran.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["evil.EvilModel", "os.system", "sentence_transformers_evil.Evil"]
)
def test_an_embedding_s_modules_are_sentence_transformers_own(
    tmp_path: Path, ran: Path, module: str
) -> None:
    """A folder's list of modules may name any class; others are refused."""
    folder = also_plain(tmp_path, ran)
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = module
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match="never run"):
        SentenceEncoder(str(folder))
    assert not ran.exists()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["model_args", "config_args", "tokenizer_args", "model_kwargs"])
def test_a_folder_cannot_set_the_flag_itself(tmp_path: Path, ran: Path, part: str) -> None:
    """Its settings are handed to transformers, and the flag is not among them."""
    folder = also_plain(tmp_path, ran)
    told = {"max_seq_length": 256, part: {"trust_remote_code": True}}
    (folder / "sentence_bert_config.json").write_text(json.dumps(told))
    SentenceEncoder(str(folder))
    assert not ran.exists()


@pytest.mark.parametrize(
    "damage", [{"tokenizer.json": "{"}, {"tokenizer.json": "[" * 5000}, {"config.json": "[]"}, {}]
)
def test_a_damaged_tokenizer_is_one_line(tmp_path: Path, damage: dict[str, str]) -> None:
    """Whatever transformers makes of it."""
    for name, text in damage.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="cannot be loaded; give a folder"):
        tokenizer_counter(str(tmp_path))


def test_a_yes_on_standard_input_makes_no_difference(tmp_path: Path, ran: Path) -> None:
    """The whole command, with somebody who says yes to everything."""
    command = [sys.executable, "-m", "engine", "generate", "--backend=scripted", "--no-semantic"]
    command += [f"--tokenizer={strange(tmp_path, ran)}", "--target=2", f"--out={tmp_path / 'run'}"]
    done = subprocess.run(
        command,
        input="y\n" * 100,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78, done.stderr
    assert "never run" in done.stderr
    assert "Traceback" not in done.stderr
    assert not ran.exists()
