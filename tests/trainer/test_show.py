"""trainer.show: what a person sees of a record is what is trained on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.chat_templates import set_chat_template
from trainer.errors import ConfigError
from trainer.show import main, shown

pytestmark = pytest.mark.slow


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hé\x1b[31m!"}]
    rows = [{"messages": turns}, {"messages": turns}, {"instruction": "Say", "output": "yes"}]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_learned_tokens_are_marked(
    llama: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The learned tokens alone stand in brackets, with the layout and limits of the flags; and no
    control character of a record reaches the terminal.
    """
    assert main(["--data", str(chats), "--model", str(llama), "-n", "1"]) == 0
    out = capsys.readouterr().out
    assert "chats.jsonl:1: " in out
    assert "chats.jsonl:2: " not in out
    (marked,) = re.findall("⟦(.*?)⟧", out, re.DOTALL)
    assert marked.endswith("│<|im_end|>│\\n")
    assert "\\x1b" in marked
    assert "\x1b" not in out
    assert "<|im_start|>" in out.partition("⟦")[0]
    flags = ["--model_max_length", "4", "--colour", "always"]
    assert main(["--data", str(chats), "--model", str(llama), *flags]) == 0
    assert "dropped: too_long" in capsys.readouterr().out


def test_colours_mark_the_same(tokenizer: Any) -> None:
    ids, learned = tokenizer("Say it")["input_ids"], [False, True]
    learned = [False] * (len(ids) - 1) + [True]
    coloured = shown(ids, learned, tokenizer, colour=True)
    plain = shown(ids, learned, tokenizer, colour=False)
    assert coloured.count("\x1b[1;32m") == plain.count("⟦") == 1
    assert re.sub("\x1b\\[[0-9;]*m", "", coloured) == re.sub("[⟦⟧]", "", plain)


def test_a_reader_that_goes_away_is_no_fault(llama: Path, chats: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m trainer.show --data {chats} --model {llama} | head -1",
        shell=True, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("chats.jsonl:1: ")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "nowhere.json", "--model", "MODEL"], 78, "nowhere.json"),
        (["--data", "DATA", "--model", "./nowhere"], 78, "there is no such folder"),
        (["--data", "DATA", "--model", "MODEL", "--no_such_flag", "1"], 64, "unknown flag"),
        (["--data", "DATA", "--model", "MODEL", "--chat_template", "nope"], 78, "no such file or"),
    ],
)
def test_faults_are_one_line(
    llama: Path,
    chats: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    real = {"MODEL": str(llama), "DATA": str(chats)}
    assert main([real.get(word, word) for word in arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_chat_templates_by_name_and_by_file(tokenizer: Any, tmp_path: Path) -> None:
    """Two of our own, TRL's where it is installed, any file; and chatml only with its tokens."""
    before = tokenizer.chat_template
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    try:
        set_chat_template(tokenizer, "chatml")
        assert "<|im_end|>" in tokenizer.apply_chat_template(turns, tokenize=False)
        set_chat_template(tokenizer, "plain")
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        assert text == "<s>User: Hi\n\nAssistant: Yes</s>\n\n"
        asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        assert text.startswith(asked)
        set_chat_template(tokenizer, "llama3")
        assert "<|eot_id|>" in tokenizer.apply_chat_template(turns, tokenize=False)
        (tmp_path / "own.jinja").write_text("{{ messages[0].content }}")
        set_chat_template(tokenizer, str(tmp_path / "own.jinja"))
        assert tokenizer.apply_chat_template(turns, tokenize=False) == "Hi"
        with pytest.raises(ConfigError, match="names are chatml, plain, any that TRL ships"):
            set_chat_template(tokenizer, "../nope")
    finally:
        tokenizer.chat_template = before

    class NoTokens:
        chat_template = None

        def get_vocab(self) -> dict[str, int]:
            return {}

    with pytest.raises(ConfigError, match=r"has no <\|im_start\|>"):
        set_chat_template(NoTokens(), "chatml")
