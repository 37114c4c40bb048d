"""``magpie``: the model's own chat template cut open where the user speaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine import models
from engine.errors import ConfigError
from engine.prompts.fit import Prompts
from engine.recipes.base import Ask, Piece
from engine.recipes.guard import RecipeFault, parsed
from engine.recipes.load import load_recipe
from engine.recipes.magpie import FAMILIES, Magpie, of_template
from engine.records import Completion, Usage
from engine.run.display import SilentDisplay
from engine.run.generate import generate
from engine.run.settle import settle
from engine.settings import RunConfig
from engine.store import RunStore

pytestmark = pytest.mark.slow

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES: dict[str, tuple[str, str, str]] = {
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
        "'<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "qwen2.5": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are Qwen, created by "
        "Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}{% endif %}" + CHATML,
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>",
    ),
    "qwen": (CHATML, "<|im_start|>user\n", "<|im_end|>"),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role "
        "not supported') }}{% endif %}{% for m in messages %}{{ '<start_of_turn>' + m.role + '\n' "
        "+ m.content | trim + '<end_of_turn>\n' }}{% endfor %}",
        "<bos><start_of_turn>user\n",
        "<end_of_turn>",
    ),
    "phi": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}",
        "<|user|>\n",
        "<|end|>",
    ),
    "phi4": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + "
        "'<|im_end|>' }}{% endfor %}",
        "<|im_start|>user<|im_sep|>",
        "<|im_end|>",
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% endfor %}",
        "<s>[INST] ",
        "[/INST]",
    ),
}
BOS = {"llama3": "<|begin_of_text|>", "gemma": "<bos>", "mistral": "<s>"}


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_template_is_cut_where_the_user_speaks(family: str) -> None:
    """As the paper has it; and the table of families says the same, for models elsewhere."""
    template, before, after = TEMPLATES[family]
    tokens = {} if family == "mistral" else {after: 7, after[:-1]: 8}
    opening = of_template(template, {"bos_token": BOS.get(family)}, tokens)
    assert (opening.before, opening.after) == (before, after)
    assert opening.stop_ids == (() if family == "mistral" else (7,))
    assert FAMILIES[family].before == before
    assert FAMILIES[family].after.strip() == after


def test_the_day_is_no_part_of_a_prompt() -> None:
    template = "Today is {{ strftime_now('%d %b %Y') }}. {{ messages[0].content }}!"
    assert of_template(template, {}, {}).before == "Today is 26 Jul 2024. "


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (TEMPLATES["gemma"][0], "System role not supported"),
        ("{{ messages | length }}", "leaves out what the user says"),
        ("{% for m in messages %}", "cannot be rendered"),
        ("{{ ''.__class__.__mro__ }}", "cannot be rendered"),
        ("{{ messages[0].content + 1 }}", "cannot be rendered"),
    ],
)
def test_a_template_that_is_of_no_use_says_so(template: str, words: str) -> None:
    with pytest.raises(RecipeFault, match=words):
        of_template(template, {}, {}, system="Talk about chess.")


def folder(path: Path, config: dict[str, Any], **files: str) -> str:
    path.mkdir()
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return str(path)


def test_a_models_own_files_come_first(tmp_path: Path) -> None:
    """Wherever the template stands in them, and with the ids of its tokens."""
    tokens = json.dumps({"added_tokens": [{"id": 5, "content": "<|im_end|>"}]})
    decoder = {"added_tokens_decoder": {"6": {"content": "<|im_end|>"}}}
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    places = [
        folder(tmp_path / "llama-3-a", {"chat_template": CHATML}, tokenizer__json=tokens),
        folder(tmp_path / "llama-3-b", {"chat_template": named} | decoder),
        folder(tmp_path / "llama-3-c", decoder, chat_template__jinja=CHATML),
    ]
    openings = [Magpie(place).opening for place in places]
    assert {opening.before for opening in openings} == {"<|im_start|>user\n"}
    assert [opening.stop_ids for opening in openings] == [(5,), (6,), (6,)]
    steered = Magpie(places[0], system="Talk about chess.").opening.before
    assert steered == "<|im_start|>system\nTalk about chess.<|im_end|>\n<|im_start|>user\n"


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5"),
        ("Qwen/Qwen3-8B", "qwen"),
        ("google/gemma-2-9b-it", "gemma"),
        ("microsoft/Phi-3-mini-4k-instruct", "phi"),
        ("microsoft/phi-4", "phi4"),
    ],
)
def test_a_model_that_is_elsewhere_goes_by_its_family(model: str, family: str) -> None:
    assert Magpie(model).opening == FAMILIES[family]


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Magpie("my/own"), "name it with --set family"),
        (Magpie(""), "name it with --set family"),
        (Magpie("x", family="lama"), "there are llama3, qwen"),
        (Magpie("Qwen/Qwen3-8B", system="Chess."), "needs the model's own template"),
    ],
)
def test_what_cannot_be_told_is_asked_for(recipe: Magpie, words: str) -> None:
    with pytest.raises(RecipeFault, match=words):
        recipe.prompt(Ask(index=0))


def found(text: str, finish: str = "stop") -> list[Piece]:
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    answer = Completion(text=text, finish_reason=finish, usage=usage)
    return parsed(Magpie(family="qwen"), Ask(index=0), answer)


@pytest.mark.parametrize(
    "text",
    [
        "How deep is the sea?",
        "  How deep is the sea? \n",
        "How deep is the sea?<|im_end|>\n<|im_start|>assistant\nVery.",
        "How deep is the sea?<|eot_id|><|start_header_id|>assistant",
        "How deep is the sea? [/INST] Very",
    ],
)
def test_only_what_the_user_says_is_taken(text: str) -> None:
    (piece,) = found(text)
    assert piece.record == {"instruction": "How deep is the sea?"}
    assert piece.refusal is None


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ("", "stop", "no_record"),
        ("\n", "stop", "no_record"),
        ("<|im_end|>", "stop", "no_record"),
        ("How deep", "length", "cut_off"),
        ("Translate the following:", "stop", "unfinished"),
    ],
)
def test_odd_answers_are_refused(text: str, finish: str, reason: str) -> None:
    (piece,) = found(text, finish)
    assert piece.refusal is not None
    assert piece.refusal[0] == reason


def test_a_turn_that_ended_before_the_limit_is_whole() -> None:
    (piece,) = found("How deep is the sea?<|im_end|>\n<|im_start|>assistant\nVe", "length")
    assert piece.record == {"instruction": "How deep is the sea?"}


def test_requests_differ_by_their_seeds_alone() -> None:
    prompts = Prompts(Magpie(family="qwen"), seed=0, api="completions", sampling={})
    made = [prompt for index in range(50) if (prompt := prompts.prompt(index))]
    assert {prompt.text for prompt in made} == {"<|im_start|>user\n"}
    assert len({prompt.sampling.seed for prompt in made}) == 50
    assert made[0].sampling.extra == {"add_special_tokens": False}
    assert made[0].sampling.stop == ("<|im_end|>", "\n")


@pytest.mark.parametrize("url", ["https://api.openai.com/v1", "https://api.anthropic.com/v1"])
def test_a_host_of_chats_is_refused_before_the_start(url: str, tmp_path: Path) -> None:
    config = RunConfig(recipe="magpie", base_url=(url,), model="m", out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"has no API for; use a vLLM server"):
        settle(config)


@pytest.mark.parametrize("backend", ["scripted", "vllm", "transformers"])
def test_engines_that_go_on_with_a_text_are_not(backend: str, tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {"recipe": "magpie", "backend": backend, "model": "Qwen/Qwen3-8B", "out": tmp_path / "run"}
    )
    assert settle(config).config.api == "completions"


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="no such option; did you mean 'family'"):
        load_recipe("magpie", None, {"familly": "qwen"})  # type: ignore[arg-type]
    made = load_recipe("magpie", None, {"one_line": "false", "family": "qwen"})  # type: ignore[arg-type]
    assert made.sampling(Ask(index=0))["stop"] == ("<|im_end|>",)


@pytest.mark.anyio
async def test_the_real_small_model_speaks_as_a_user(tmp_path: Path) -> None:
    """Its own template, its own stop token: two instructions, each of one line."""
    models.fetch("smollm2")
    config = RunConfig(
        recipe="magpie",
        backend="transformers",
        target=2,
        max_tokens=48,
        max_in_flight=4,
        max_requests=24,
        semantic=False,
        out=tmp_path / "run",
    )
    result = await generate(config, SilentDisplay())
    assert result.stop.error is None, result.stop.error
    with RunStore.read(tmp_path / "run") as run:
        rows = [decision.record or {} for decision, _ in run.accepted()]
    assert len(rows) == 2
    assert all(row["instruction"] and "\n" not in row["instruction"] for row in rows)
    assert not any("<|im_" in row["instruction"] for row in rows)
