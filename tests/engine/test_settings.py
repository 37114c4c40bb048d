"""Settings: file, flags over the file, and errors that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.cli.generate import generate
from engine.errors import ConfigError
from engine.sections import OnResume, marked
from engine.settings import SECTIONS, RunConfig, flag_name, load_config


def config(folder: Path, text: str, **flags: Any) -> RunConfig:
    path = folder / "run.toml"
    path.write_text(text)
    return load_config(path, flags)


def test_flags_lie_over_the_file(tmp_path: Path) -> None:
    made = config(tmp_path, "target = 5\ntemperature = 0.5", target=9, seed=None, base_url=())
    assert (made.target, made.temperature, made.seed) == (9, 0.5, 0)


def test_a_file_of_windows_begins_with_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbftarget = 7\r\n")
    assert load_config(path, {}).target == 7


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


INTERNAL = {"stage", "semantic_dimension"}
"""Set by a run itself."""


def test_every_setting_has_a_flag_and_every_flag_is_a_setting() -> None:
    flags = {param.name: param for param in generate.params}
    assert flags.keys() - {"config_file"} == RunConfig.model_fields.keys() - INTERNAL
    for name in RunConfig.model_fields.keys() - INTERNAL:
        assert flag_name(name) in flags[name].opts


def test_tables_and_lists_are_flags_too(tmp_path: Path) -> None:
    words = ["--fit", "prompt,completion", "--no-send-seed", "--filters", '{"min_length": 2}']
    words += ["--endpoint", '{"url": "http://127.0.0.1:1", "weight": 2}', "--no-progress"]
    words += ["--models", '{"judge": {"model": "m", "base_url": "http://127.0.0.1:2"}}']
    flags = generate.make_context("generate", [*words, "--wait-for-server", "60"]).params
    del flags["config_file"]
    made = load_config(None, flags)
    assert made.fit == ("prompt", "completion")
    assert (made.send_seed, made.progress, made.wait_for_server_s) == (False, False, 60.0)
    assert made.filters.min_length == 2
    assert [endpoint.weight for endpoint in made.endpoint] == [2.0]
    assert made.models["judge"].base_url == ("http://127.0.0.1:2",)


def test_one_address_needs_no_list(tmp_path: Path) -> None:
    assert config(tmp_path, 'base_url = "http://127.0.0.1:1"').base_url == ("http://127.0.0.1:1",)


SMALL = ("smollm2", "/home/me/.cache/models/smollm2/", "HuggingFaceTB/SmolLM2-135M-Instruct")


@pytest.mark.parametrize("name", SMALL)
def test_the_small_model_gets_its_sampling_wherever_it_runs(name: str) -> None:
    """In this process, named for a server, or said by the server itself."""
    small = load_config(None, {}).sampling()
    http: dict[str, Any] = {"base_url": ("http://127.0.0.1:1",)}
    assert load_config(None, {"model": name}).sampling() == small
    assert load_config(None, {**http, "model": name}).sampling() == small
    served = load_config(None, {**http, "temperature": 0.3}).answered_by([name], None)
    assert served.sampling() == {**small, "temperature": 0.3}
    other = load_config(None, http).answered_by(["SmolLM2-1.7B-Instruct"], None)
    assert other.sampling()["max_tokens"] == 3072


def test_a_run_that_goes_on_keeps_its_sampling() -> None:
    """As one that was started before its server's model was known for what it is."""
    earlier = {"max_tokens": 3072, "temperature": 1.0, "top_p": 1.0, "model": "smollm2"}
    served = load_config(None, {"base_url": ("http://127.0.0.1:1",)})
    assert served.answered_by(["smollm2"], earlier).sampling()["max_tokens"] == 3072


def test_no_two_sections_have_a_setting_of_one_name() -> None:
    names = [name for section in SECTIONS for name in section.model_fields]
    assert len(names) == len(set(names))


def test_what_becomes_of_a_setting_on_resume() -> None:
    """Free and shaping the decisions exclude each other."""
    free, decision = marked(RunConfig, OnResume.FREE), marked(RunConfig, OnResume.DECISION)
    assert {"target", "out", "max_in_flight", "base_url", "rows", "models"} <= free
    assert {"rouge_threshold", "scope", "against", "filters", "language"} <= decision
    assert not free & decision


def test_a_stage_s_own_model_is_checked_as_the_run_s(tmp_path: Path) -> None:
    """A secret in ``extra_body`` would end in the settings there too."""
    with pytest.raises(ConfigError, match="looks like a secret"):
        config(tmp_path, '[models.judge]\nmodel = "m"\nextra_body = { api_key = "sk-1" }')


def test_precision_is_for_models_in_this_process() -> None:
    assert load_config(None, {"dtype": "bfloat16"}).dtype == "bfloat16"
    with pytest.raises(ConfigError, match="dtype goes with backend transformers"):
        load_config(None, {"dtype": "bfloat16", "backend": "vllm"})
