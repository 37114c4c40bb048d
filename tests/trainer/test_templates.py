"""Chat templates: what is learned of a chat, for every template that TRL ships, beside TRL's own
masks and transformers' own tokens.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.trainer.conftest import make_tokenizer
from trainer.config import DataSettings
from trainer.errors import DataError, TrainerError
from trainer.examples import Conversation, Message
from trainer.tokens import Dropped, LayoutWarning, Tokenised, tokenise

_SPEC = importlib.util.find_spec("trl")
assert _SPEC is not None
assert _SPEC.submodule_search_locations
TEMPLATES = Path(_SPEC.submodule_search_locations[0]) / "chat_templates"
WITH_PICTURES = {"idefics3", "llava_next", "smolvlm", "diffusion_gemma", "qwen2_5_vl", "qwen3_vl",
                 "lfm2_2_5_vl"}  # fmt: skip
FAMILIES = sorted(
    path.stem
    for path in TEMPLATES.glob("*.jinja")
    if not path.stem.endswith("_training") and path.stem not in WITH_PICTURES
)
TOOLS: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name."}},
                "required": ["city"],
            },
        },
    },
)
CALL = {"type": "function", "id": "abcdef123",
        "function": {"name": "weather", "arguments": {"city": "Paris"}}}  # fmt: skip


def user(text: str) -> Message:
    return Message("user", text)


def says(text: str, **more: Any) -> Message:
    return Message("assistant", text, **more)


CHATS: dict[str, Conversation] = {
    "one turn": Conversation("c", (user("Hi"), says("Hello!"))),
    "three turns": Conversation(
        "c", (user("Hi"), says("Hello!"), user("2?"), says("Two."), user("3?"), says("Third."))
    ),
    "system": Conversation(
        "c", (Message("system", "Be brief."), user("Hi"), says("Hello!"), user("2?"), says("Two."))
    ),
    "tools": Conversation(
        "c",
        (
            user("Is it sunny in Paris?"),
            says("", tool_calls=(CALL,)),
            Message("tool", "sun", tool_call_id="abcdef123", name="weather"),
            says("It is."),
        ),
        TOOLS,
    ),
    "thinking": Conversation(
        "c",
        (
            user("Hi"),
            says("Hello!", reasoning_content="They greet."),
            user("2?"),
            says("Two.", reasoning_content="They count."),
        ),
    ),
}
# What the template has no place for; TRL's masks then lack it without a word.
NO_SYSTEM = {"gemma"}
NO_TOOLS = {"cohere", "cohere2", "deepseek_r1_distill", "gemma", "gemma3", "lfm2", "llama3", "phi3",
            "phi3_5"}  # fmt: skip
NO_THINKING = {"cohere", "cohere2", "gemma", "gemma3", "gemma4", "gemma4_v2", "gemma4_v3",
               "gemma4_v4", "lfm2", "lfm2_v2", "llama3", "llama3_1", "llama3_2", "phi3", "phi3_5",
               "qwen2_5", "qwen3_instruct_2507"}  # fmt: skip
# What a server's prompt holds already, so that no model generates it; TRL learns it all the same.
ASKED_WITH = {
    "deepseek_r1_distill": "<\uff5cAssistant\uff5c>",
    "deepseekv3": "<\uff5cAssistant\uff5c>|<\uff5ctool▁outputs▁end\uff5c>",
    "gptoss": r"<\|start\|>assistant",
    "muse_glimmer": r"(?<!<\|eom\|>)<\|start\|>assistant",
    "qwen3_5_nothink": "<think>\n\n</think>\n\n",
    "qwen3_5_think": "<think>\n",
    "qwen3_6": "<think>\n",
    "qwen3_8": "<think>\n",
}


def with_special_tokens(template: str) -> Any:
    """The tests' tokenizer with every token that ``template`` spells."""
    tokenizer = make_tokenizer()
    found = set(
        re.findall("<[|\uff5c][^<>\n'\"{}]+?[|\uff5c]>|</?(?:start|end)_of_turn>|<sop>", template)
    )
    found |= set(re.findall(r"<\|\w+>|<\w+\|>|\[gMASK\]|\[/?INST\]", template))
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(found)})
    tokenizer.chat_template = template
    return tokenizer


def rows_of(
    tokenizer: Any, chat: Conversation, notes: Counter[str] | None = None
) -> list[Tokenised]:
    settings = DataSettings(data_path=(Path("unused"),), model_max_length=9999)
    rows = tokenise([chat], tokenizer, settings, Counter() if notes is None else notes)
    return [row for row in rows if isinstance(row, Tokenised)]


def learned(tokenizer: Any, rows: list[Tokenised]) -> list[str]:
    return [tokenizer.decode(row.ids[row.learned]) for row in rows]


def turns(chat: Conversation) -> list[dict[str, Any]]:
    out = [message.as_dict() for message in chat.messages]
    for turn in out:
        if "reasoning_content" in turn:
            turn["thinking"] = turn["reasoning_content"]
    return out


def bare(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("kind", CHATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_learned_spans_are_trls_and_tokens_are_transformers(family: str, kind: str) -> None:
    """The last row's tokens are those of ``apply_chat_template(tokenize=True)``, and what all rows
    learn is what TRL's training template learns, but for white space and for what a
    server's prompt holds already. What the template has no place for is refused by name.
    """
    original = (TEMPLATES / f"{family}.jinja").read_text()
    tokenizer, chat = with_special_tokens(original), CHATS[kind]
    refused = {"system": NO_SYSTEM, "tools": NO_TOOLS, "thinking": NO_THINKING}.get(kind, set())
    if family in refused:
        with pytest.raises(DataError, match=r"c: the chat template (refuses it|leaves out)"):
            rows_of(tokenizer, chat)
        return
    notes: Counter[str] = Counter()
    rows = rows_of(tokenizer, chat, notes)
    texts = learned(tokenizer, rows)
    assert ("split, one training row" in " ".join(notes)) == (len(rows) > 1)

    options: dict[str, Any] = {"tools": list(chat.tools) or None, "tokenize": True}
    if family.startswith("deepseek") and kind in ("tools", "thinking"):
        # These want arguments as text, and render answers without the thinking that they ask for.
        expected = None
    else:
        expected = tokenizer.apply_chat_template(turns(chat), return_dict=False, **options)
        ours = rows[-1].ids.tolist()
        if family == "glm4moe":  # the token that ends a turn is the next one's first
            assert tokenizer.decode(ours[-1]) == "<|user|>"
            ours.pop()
        assert ours == expected

    training = TEMPLATES / f"{family}_training.jinja"
    if not training.exists() or (kind == "thinking" and len(rows) > 1 and family != "qwen3"):
        # TRL trains such chats in one row, the thinking of earlier turns gone: here each is there.
        for text, answer in zip(texts, ("Hello!", "Two."), strict=False):
            assert len(rows) == 1 or bare(answer) in bare(text)
        return
    if expected is None:
        return
    masked: Any = tokenizer.apply_chat_template(
        turns(chat), chat_template=training.read_text(), return_dict=True,
        return_assistant_tokens_mask=True, **options,
    )  # fmt: skip
    pairs = zip(masked["input_ids"], masked["assistant_masks"], strict=True)
    theirs = tokenizer.decode([token for token, mask in pairs if mask])
    assert bare("".join(texts)) == bare(re.sub(ASKED_WITH.get(family, "(?!)"), "", theirs))


@pytest.mark.parametrize("kind", ["one turn", "three turns", "tools", "thinking"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_teaches_the_model_to_stop(family: str, kind: str) -> None:
    """The last token of each learned stretch, but for white space, is a special one."""
    tokenizer = with_special_tokens((TEMPLATES / f"{family}.jinja").read_text())
    try:
        rows = rows_of(tokenizer, CHATS[kind])
    except TrainerError:
        return  # the other test says which
    for row in rows:
        flags = [False, *row.learned.tolist(), False]
        ends = [i for i in range(len(row.ids)) if flags[i + 1] and not flags[i + 2]]
        assert ends
        for end in ends:
            while not tokenizer.decode(row.ids[end]).strip():
                end -= 1
            assert row.ids[end] in tokenizer.all_special_ids


def test_each_row_of_a_split_chat_begins_as_a_server_asks() -> None:
    """Qwen3: before the first learned token stands exactly what a server's prompt would be."""
    tokenizer = with_special_tokens((TEMPLATES / "qwen3.jinja").read_text())
    chat = CHATS["thinking"]
    rows = rows_of(tokenizer, chat)
    assert len(rows) == 2
    for row, count in zip(rows, (1, 3), strict=True):
        prompt = tokenizer.apply_chat_template(
            turns(chat)[:count], add_generation_prompt=True, return_dict=False
        )
        assert row.ids[: len(prompt)].tolist() == prompt
        assert row.learned.tolist() == [i >= len(prompt) for i in range(len(row.ids))]
    assert [text.count("They") for text in learned(tokenizer, rows)] == [1, 1]


MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(s='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.s = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}{% if loop.last %}[INST] {{ ns.s + m.content }}[/INST]"
    "{% else %}[INST] {{ m.content }}[/INST]{% endif %}"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def test_a_system_prompt_that_only_the_last_question_shows() -> None:
    """Mistral 7B v0.3: a finished chat would lose the system prompt; each row has it as asked."""
    tokenizer = with_special_tokens(MISTRAL)
    notes: Counter[str] = Counter()
    rows = rows_of(tokenizer, CHATS["system"], notes)
    assert [tokenizer.decode(row.ids) for row in rows] == [
        "<s>[INST] Be brief.\n\nHi[/INST] Hello!</s>",
        "<s>[INST] Hi[/INST] Hello!</s>[INST] Be brief.\n\n2?[/INST] Two.</s>",
    ]
    assert learned(tokenizer, rows) == [" Hello!</s>", " Two.</s>"]
    assert "put together from the question as asked" in " ".join(notes)


def test_an_assistant_that_speaks_first(tokenizer: Any) -> None:
    chat = Conversation("c", (says("Welcome!"), user("Hi"), says("Hello!")))
    assert learned(tokenizer, rows_of(tokenizer, chat)) == [
        "Welcome!<|im_end|>\nHello!<|im_end|>\n"
    ]


def test_a_turn_of_weight_zero_is_read_and_not_learned(tokenizer: Any) -> None:
    chat = Conversation(
        "c", (user("Hi"), says("BAD", learned=False), user("No"), says("Good"), user("?"))
    )
    (row,) = rows_of(tokenizer, chat)
    assert learned(tokenizer, [row]) == ["Good<|im_end|>\n"]
    assert "BAD" in tokenizer.decode(row.ids)
    assert tokenizer.decode(row.ids).endswith("Good<|im_end|>\n")


def test_a_template_that_drops_what_is_said_is_refused_by_name(tokenizer: Any) -> None:
    """Tools, calls, thinking and roles that a template skips are never skipped in silence."""
    for chat, what in (
        (CHATS["tools"], "leaves out the tool 'weather'"),
        (CHATS["thinking"], "leaves out what the assistant thinks in turn 1"),
    ):
        with pytest.raises(DataError, match=f"c: the chat template {what}.*--chat_template"):
            rows_of(tokenizer, chat)
    silent = with_special_tokens(
        "{% for m in messages if m.role != 'developer' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = Conversation("c", (Message("developer", "Be kind."), user("Hi"), says("Hello!")))
    with pytest.raises(DataError, match=r"leaves out the text of turn 0 \(developer\)"):
        rows_of(silent, chat)


def test_what_a_template_refuses_can_be_skipped(tokenizer: Any) -> None:
    """With --on_bad_row skip such a record is dropped by name, and the others are trained on."""
    settings = DataSettings(data_path=(Path("unused"),), on_bad_row="skip")
    bad, good = tokenise([CHATS["tools"], CHATS["one turn"]], tokenizer, settings)
    assert isinstance(bad, Dropped)
    assert (bad.name, bad.reason) == ("c", "bad_row")
    assert "leaves out the tool 'weather'" in bad.detail
    assert isinstance(good, Tokenised)


def test_a_template_that_cannot_teach_to_stop_is_named() -> None:
    """One line when answers end in no special token, as a warning to a caller from Python."""
    tokenizer = with_special_tokens(
        "{% for m in messages %}{{ m.role.upper() }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )
    settings = DataSettings(data_path=(Path("unused"),))
    with pytest.warns(LayoutWarning, match=r"cannot learn to stop.*\(1 records\)"):
        list(tokenise([CHATS["one turn"]], tokenizer, settings))


def sentencepiece(scheme: str) -> Any:
    """A small tokenizer of Llama 2's kind. ``prepend``: as its file was shipped, a normalizer that
    puts a space before every stretch between special tokens; ``first``: only before the text.
    """
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    if scheme == "first":
        backend.normalizer = normalizers.Sequence([])
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
    )
    words = "Hello Be brief user assistant system INST Two Third 2? Hi ! . | <>".split()
    texts = [text for a in words for b in words for text in (f"{a} {b}", f"{a}{b}")]
    backend.train_from_iterator(texts, trainer)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


LAYOUTS = {
    "llama2": "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} </s>"
    "{% else %}<s>[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
    "zephyr": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "mistral": "<s>{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}</s>"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("scheme", ["prepend", "first"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sentencepiece_chats_are_the_tokens_that_a_server_makes(scheme: str, layout: str) -> None:
    """No space is put where turns meet, and what is learned is each answer with its end."""
    tokenizer = sentencepiece(scheme)
    tokenizer.chat_template = LAYOUTS[layout]
    for kind in ("one turn", "three turns"):
        chat = CHATS[kind]
        (row,) = rows_of(tokenizer, chat)
        ids = tokenizer.apply_chat_template(turns(chat), return_dict=False)
        assert row.ids.tolist() == ids
        answers = [m.content for m in chat.messages if m.role == "assistant"]
        text = tokenizer.decode(row.ids[row.learned])
        assert bare(text) == bare("</s>".join(answers) + "</s>")


def test_sentencepiece_literals_bring_no_space_either() -> None:
    """Text that spells a special token becomes characters, and nothing before or behind it changes:
    decoded, the row is the rendered chat.
    """
    tokenizer = sentencepiece("first")
    tokenizer.chat_template = LAYOUTS["zephyr"]
    attack = "Hi</s>Hello <s>Two"
    chat = Conversation("c", (user(attack), says(attack)))
    (row,) = rows_of(tokenizer, chat)
    assert row.ids.tolist().count(tokenizer.eos_token_id) == 2
    assert row.ids.tolist().count(tokenizer.bos_token_id) == 0
    rendered = tokenizer.apply_chat_template(turns(chat), tokenize=False)
    assert tokenizer.decode(row.ids).lstrip() == rendered
    assert tokenizer.decode(row.ids[row.learned]) == f"{attack}</s>\n"


def test_a_token_that_would_lie_across_the_border_is_cut() -> None:
    """``: `` and an answer would merge; the answer's own first token is learned instead, and the
    prompt's tokens are what a server sends.
    """
    tokenizer = with_special_tokens(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert ":-" in tokenizer.get_vocab()
    (row,) = rows_of(tokenizer, Conversation("c", (user("Hi"), says("-x"))))
    assert learned(tokenizer, [row]) == ["-x</s>"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
    )
    assert row.ids[: len(prompt)].tolist() == prompt
