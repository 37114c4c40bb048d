"""Magpie: a chat model is given its own chat template up to the user's turn, and writes what a user
would say.

After Xu et al., "Magpie: Alignment Data Synthesis from Scratch by Prompting Aligned LLMs with
Nothing" (arXiv 2406.08464; code: https://github.com/magpie-align/magpie, MIT, exp/gen_ins.py and
configs/model_configs.json). No seeds, no instructions of ours: all requests are the same text, and
only their seeds differ. Answers come from the recipe ``respond`` over the rows made here.

Departures from it:
* The template is read from the model's own files where they are on this machine, with the system
  turn that it adds by itself; the paper keeps a table of 34 models. Ours, of families, stands in
  where the files are elsewhere.
* A request asks for one answer; the original asks for 200 at once and shuffles them by a generator
  that is never seeded.
* What goes on after the user's turn is cut off for all models; the original does so for two.
* An instruction that ends in a colon is refused here; the original leaves it to the filter of its
  300K sets, whose other steps (quality, reward, length) are choices over the whole set.
* Neither of its logits processors (temperature of the first token, no Markdown).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import orjson

from engine import models
from engine.errors import WoolmillError
from engine.recipes.base import CUT, Ask, Part, Piece, Recipe, Refusal
from engine.recipes.guard import RecipeFault
from engine.records import Completion, Record

__all__ = ["FAMILIES", "Magpie", "Opening", "of_template"]

MARK = "WoolmillsUserTurn"
"""Stands in the place of the user's words while a template is rendered."""
DATE = "26 Jul 2024"
"""What Llama's template has as today where nobody says: a prompt must not depend on the day."""
MOST_TURN_END = 64
"""Characters of what ends a turn where it is no special token. It is sent as a stop string, and
servers limit those."""
TOKENS = "tokenizer.json"
"""The tokenizers library's file: it has the ids of special tokens without loading anything."""
NEXT_TURN = re.compile(
    r"<\|im_(?:start|end)\|>|<\|start_header_id\|>|<\|eot_id\|>|<(?:start|end)_of_turn>"
    r"|<\|(?:user|assistant|system|end)\|>|\[/?INST\]"
)
"""Where another turn begins, in the words of the usual templates."""


@dataclass(frozen=True, slots=True)
class Opening:
    """A chat template cut open at the user's words."""

    before: str
    after: str
    """What ends the user's turn."""
    stop_ids: tuple[int, ...] = ()
    """Tokens of it, where they are known."""


FAMILIES = {
    "llama3": Opening(
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>", (128009,)
    ),
    "qwen": Opening("<|im_start|>user\n", "<|im_end|>"),
    "qwen2.5": Opening(
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>",
    ),
    "gemma": Opening("<bos><start_of_turn>user\n", "<end_of_turn>"),
    "phi": Opening("<|user|>\n", "<|end|>"),
    "phi4": Opening("<|im_start|>user<|im_sep|>", "<|im_end|>"),
    "mistral": Opening("<s>[INST] ", " [/INST]"),
    "chatml": Opening("<|im_start|>user\n", "<|im_end|>"),
}
"""Openings of models whose files are not on this machine, by the family of the template."""
NAMED = (
    (r"llama-?3", "llama3"),
    (r"qwen-?2\.5", "qwen2.5"),
    (r"qwen", "qwen"),
    (r"gemma", "gemma"),
    (r"phi-?4", "phi4"),
    (r"phi-?3", "phi"),
    (r"mistral|mixtral", "mistral"),
    (r"smollm|yi-|hermes|chatml", "chatml"),
)
"""Families by how their models are called; the first that fits."""


class Magpie(Recipe):
    """See the head of this file.

    Args:
        model: as the run names it; its files are looked for on this machine.
        family: one of ``FAMILIES``, where the template is not to be read from the model; empty: it
            is.
        system: a system turn before the user's, by which topics are steered; empty: none but the
            template's own.
        one_line: end at the first line feed, as the original does by default.
    """

    name = "magpie"
    fields = ("instruction",)
    asks = "completions"
    raw = True
    builtin = True
    OPTIONS: ClassVar[dict[str, Any]] = {"family": "", "system": "", "one_line": True}

    def __init__(
        self, model: str = "", *, family: str = "", system: str = "", one_line: bool = True
    ) -> None:
        self._model = model
        self._family = family
        self._system = system
        self._one_line = one_line

    @cached_property
    def opening(self) -> Opening:
        """Raises RecipeFault with the remedy where the template cannot be had."""
        if self._family and self._family not in FAMILIES:
            raise RecipeFault(f"no family {self._family!r}; there are {', '.join(FAMILIES)}")
        if not self._family and (found := _of_model(self._model, self._system)) is not None:
            return found
        if self._system:
            raise RecipeFault("a system turn needs the model's own template on this machine")
        name = self._family or next(
            (family for words, family in NAMED if re.search(words, self._model.lower())), ""
        )
        if not name:
            raise RecipeFault(
                f"the chat template of {self._model or 'the model'} cannot be told; name it with "
                f"--set family=…, one of {', '.join(FAMILIES)}"
            )
        return FAMILIES[name]

    def prompt(self, ask: Ask) -> list[Part]:
        return [Part(self.opening.before)]

    def recurring(self) -> Iterator[str]:
        yield self.opening.before

    def sampling(self, ask: Ask) -> Mapping[str, Any]:
        opening = self.opening
        stop = (opening.after, "\n") if self._one_line else (opening.after,)
        sampling: dict[str, Any] = {
            "temperature": 1.0,
            "top_p": 1.0,
            "max_tokens": 2048,
            "stop": stop,
            "add_special_tokens": False,  # the template has them
        }
        if opening.stop_ids:
            sampling["stop_token_ids"] = list(opening.stop_ids)
        return sampling

    def parse(self, ask: Ask, answer: Completion) -> Iterator[Piece]:
        text = NEXT_TURN.split(answer.text, maxsplit=1)[0]
        whole = len(text) < len(answer.text) or answer.finish_reason not in CUT
        if not whole:
            yield Piece(0, None, ("cut_off", CUT[answer.finish_reason]))
        elif text := text.strip():
            yield Piece(0, {"instruction": text})

    def refuse(self, row: Record) -> Refusal | None:
        if row["instruction"].endswith((":", "：")):
            return "unfinished", "it ends in a colon, and what should follow is missing"
        return None

    def compared(self, row: Record) -> str | None:
        return str(row["instruction"])


def _of_model(model: str, system: str) -> Opening | None:
    """The opening of the model's own template; None where its files are not here."""
    file = _file(model, "chat_template.jinja")
    config = _json(_file(model, "tokenizer_config.json"))
    template: Any = config.get("chat_template")
    if file is not None:
        template = file.read_text(encoding="utf-8")
    if isinstance(template, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in template}
        template = named.get("default")
    if not isinstance(template, str):
        return None
    special = {
        name: value.get("content") if isinstance(value, dict) else value
        for name in ("bos_token", "eos_token")
        if (value := config.get(name))
    }
    return of_template(template, special, _tokens(model, config), system)


def of_template(
    template: str, special: Mapping[str, Any], tokens: Mapping[str, int], system: str = ""
) -> Opening:
    """A chat template cut open at the user's words.

    Args:
        special: ``bos_token`` and ``eos_token``.
        tokens: ids of the tokens that the tokenizer has besides those of texts.

    Raises RecipeFault where it cannot be rendered, or leaves the user's words out.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": MARK})
    try:
        text = environment.from_string(template).render(
            messages=turns,
            add_generation_prompt=False,
            raise_exception=_refused,
            strftime_now=lambda _: DATE,
            **special,
        )
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise RecipeFault(f"the model's chat template cannot be rendered: {error}") from error
    before, mark, after = text.partition(MARK)
    if not mark:
        raise RecipeFault("the model's chat template leaves out what the user says")
    after = after.lstrip()
    ends = [token for token in tokens if token and after.startswith(token)]
    if ends:
        after = max(ends, key=len)
        return Opening(before, after, (tokens[after],))
    return Opening(before, after.split("\n")[0][:MOST_TURN_END] or "\n")


def _refused(words: str) -> str:
    raise ValueError(words)


def _tokens(model: str, config: Mapping[str, Any]) -> dict[str, int]:
    """Ids of added tokens by their text."""
    listed = _json(_file(model, TOKENS)).get("added_tokens")
    if isinstance(listed, list):
        return {str(token["content"]): int(token["id"]) for token in listed}
    decoder = config.get("added_tokens_decoder")
    decoder = decoder if isinstance(decoder, dict) else {}
    return {str(token["content"]): int(id_) for id_, token in decoder.items()}


def _file(model: str, name: str) -> Path | None:
    """A file of the model on this machine: of a fetched one, of a folder, of the hub's cache."""
    try:
        where = Path(models.locate(model)) if model else Path()
    except WoolmillError:
        return None
    if model and (where / name).is_file():
        return where / name
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, name)
    except (ImportError, ValueError):  # the second: no name that the hub could have
        return None
    return Path(found) if isinstance(found, str) else None


def _json(file: Path | None) -> dict[str, Any]:
    try:
        read = {} if file is None else orjson.loads(file.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return read if isinstance(read, dict) else {}
