"""Settings: file, flags over the file, and errors that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.settings import FREE, RunConfig, load_config


def config(folder: Path, text: str, **flags: Any) -> RunConfig:
    path = folder / "run.toml"
    path.write_text(text)
    return load_config(path, flags)


def test_flags_lie_over_the_file(tmp_path: Path) -> None:
    made = config(tmp_path, "target = 5\ntemperature = 0.5", target=9, seed=None, base_url=())
    assert (made.target, made.temperature, made.seed) == (9, 0.5, 0)


def test_defaults_depend_on_the_backend() -> None:
    embedded = load_config(None, {})
    assert embedded.chosen_backend == "transformers"
    assert embedded.sampling()["temperature"] < 1
    hosted = load_config(None, {"base_url": ("http://127.0.0.1:1",)})
    assert hosted.chosen_backend == "http"
    assert hosted.sampling() == {"max_tokens": 3072, "temperature": 1.0, "top_p": 1.0}
    assert load_config(None, {"top_p": 0.5}).sampling()["top_p"] == 0.5


BAD = {
    "targt = 3": "did you mean 'target'",
    "target = 0": "target",
    "target = -1": "target",
    "target = 'many'": "target",
    "temperature = nan": "temperature",
    "top_p = 1.5": "top_p",
    "rouge_threshold = 0": "rouge_threshold",
    "backend = 'http'": "base_url",
    "request_batch_size = 5\napi = 'chat'": "request_batch_size",
    "max_cost = 3.0": "price_prompt",
    "max_outage_s = inf": "max_outage_s",
    "[[endpoint]]\nurl = 'http://x'\nwieght = 2": "did you mean 'weight'",
    "target =": "TOML",
    "target = 1\ntarget = 2": "TOML",
    "a = " + "[" * 5000: "TOML",
}


@pytest.mark.parametrize(("text", "said"), BAD.items(), ids=[f"fault_117_{i}" for i in range(15)])
def test_a_bad_setting_is_one_line_with_its_name(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, text)
    assert said in str(caught.value)
    assert str(tmp_path / "run.toml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_flag_is_named_as_a_flag() -> None:
    with pytest.raises(ConfigError, match="--top-p"):
        load_config(None, {"top_p": 2.0})


def test_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--config"):
        load_config(tmp_path / "none.toml", {})
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="TOML"):
        load_config(tmp_path / "bytes.toml", {})


def test_what_may_change_on_resume_are_settings() -> None:
    assert set(RunConfig.model_fields) >= FREE


def test_precision_is_for_models_in_this_process() -> None:
    assert load_config(None, {"dtype": "bfloat16"}).dtype == "bfloat16"
    with pytest.raises(ConfigError, match="dtype goes with backend transformers"):
        load_config(None, {"dtype": "bfloat16", "backend": "vllm"})
