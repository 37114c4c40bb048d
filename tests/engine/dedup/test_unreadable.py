"""What the embedding model cannot read is not compared by meaning, and that is counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engine.dedup import Candidate, Cascade, SentenceEncoder, encoder
from engine.dedup import command as tool
from engine.dedup.encoder import Precision, default_model
from tests.engine.sentences import CHANGED, OTHERS

SENTENCES = {code: tuple(row[0] for row in rows) for code, rows in CHANGED.items()} | OTHERS


class ReadsLatin:
    """An encoder for which every text means the same, and that reads nothing but ASCII."""

    dimension = 8
    precision: Precision = "float32"

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        assert all(map(str.isascii, texts)), texts
        return np.full((len(texts), 8), 8**-0.5, np.float32)

    def readable(self, texts: Sequence[str]) -> list[bool]:
        return [text.isascii() for text in texts]


def plan(texts: Sequence[str]) -> list[Candidate]:
    return [Candidate(text=text, source=f"row:{i}.0") for i, text in enumerate(texts)]


def test_unreadable_candidates_are_accepted_without_a_vector() -> None:
    """Whether by themselves or in a batch, before or after readable ones."""
    texts = [
        "写一首关于大海的诗",
        "Name a colour",
        "解释什么是光合作用",
        "Explain tides",
        "!!!",
        "???",
    ]
    for size in (1, 6):
        cascade = Cascade(0.75, 0.9, ReadsLatin(), language="zh")
        judged = [
            judgement
            for start in range(0, 6, size)
            for judgement in cascade.judge(plan(texts[start : start + size]))
        ]
        assert [j.reason for j in judged] == [None, None, None, "duplicate_semantic", None, None]
        assert [j.unreadable for j in judged] == [True, False, True, False, True, True]
        assert [j.vector is not None for j in judged] == [False, True, False, False, False, False]


def test_unreadable_references_are_counted_and_compared_by_words() -> None:
    cascade = Cascade(0.75, 0.9, ReadsLatin(), language="zh")
    cascade.add_reference(["写一首关于大海的诗歌", "Name a colour"], ["seed:a", "seed:b"])
    assert cascade.unreadable == 1
    same, alike, other = cascade.judge(
        plan(["写一首关于大海的诗歌", "写一首关于大海的情歌", "Explain tides"])
    )
    assert (same.reason, alike.reason) == ("duplicate_exact", "duplicate_rouge")
    assert other.nearest is not None
    assert (other.reason, other.nearest.source) == ("duplicate_semantic", "seed:b")


def test_a_vector_kept_of_an_unreadable_text_is_not_used() -> None:
    """Runs from before have some, made from unknown tokens."""
    cascade = Cascade(None, 0.9, ReadsLatin())
    kept = np.full(8, 8**-0.5, np.float32)
    texts = ["写一首关于大海的诗", "Name a colour", "解释什么是光合作用"]
    assert cascade.restore(plan(texts), [kept, None, None]) == 1
    (judgement,) = cascade.judge(plan(["Explain tides"]))
    assert judgement.nearest is not None
    assert judgement.nearest.text == "Name a colour"


def test_an_encoder_that_does_not_say_reads_everything() -> None:
    class Plain:
        dimension = 2
        precision: Precision = "float32"

        def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
            return np.full((len(texts), 2), 2**-0.5, np.float32)

    cascade = Cascade(None, 0.9, Plain())
    judged = cascade.judge(plan(["写一首诗吧", "解释光合作用"]))
    assert [j.reason for j in judged] == [None, "duplicate_semantic"]


@pytest.fixture(scope="module")
def minilm() -> SentenceEncoder:
    return SentenceEncoder(default_model(), threads=1)


@pytest.mark.slow
@pytest.mark.parametrize("script", SENTENCES)
def test_the_default_model_never_refuses_a_script_that_it_cannot_read(
    script: str, minilm: SentenceEncoder
) -> None:
    """Distinct everyday sentences of twelve scripts and emoji: none is refused for its meaning."""
    cascade = Cascade(None, 0.9, minilm, language="mul")
    judged = cascade.judge(plan(SENTENCES[script]))
    assert {j.reason for j in judged} == {None}
    if script in ("zh", "th", "am", "km", "my", "emoji"):
        assert all(j.unreadable for j in judged)


@pytest.mark.slow
def test_the_default_model_reads_english_code_and_a_foreign_name(minilm: SentenceEncoder) -> None:
    texts = [
        "Explain photosynthesis to a child of five, please.",
        "def f(x): return [i ** 2 for i in x]",
        "Où est né le président français ?",
        "Translate the sentence about the River Þjórsá into plain English prose.",
        "",
    ]
    assert all(minilm.readable(texts))
    assert minilm.readable([]) == []
    assert minilm.readable(["写一首诗 in English please", "x" * 400]) == [False, False]
    # One unknown token of many may stand for most of the text.
    assert minilm.readable(["say it in English please: สวัสดีตอนเช้าทุกคนวันนี้อากาศดีมาก"]) == [False]


@pytest.mark.slow
def test_tokenizers_of_any_kind_are_asked(minilm: SentenceEncoder) -> None:
    """One of transformers, a bare one of tokenizers, one written in Python, and none at all."""
    bare = Tokenizer.from_file(str(Path(default_model()) / "tokenizer.json"))

    class Slow:
        unk_token = "?"

        def tokenize(self, text: str) -> list[str]:
            return [word if word.isascii() else "?" for word in text.split()]

    texts = ["写一首诗吧 now", "Name a colour", ""]
    for tokenizer, expected in (
        (bare, minilm.readable(texts)),
        (Slow(), [False, True, True]),
        (None, [True, True, True]),
    ):
        shares = encoder._unknown_shares(SimpleNamespace(tokenizer=tokenizer))(texts)
        assert [share <= encoder.MOST_UNKNOWN for share in shares] == expected


@pytest.mark.slow
def test_padding_is_no_part_of_a_text(minilm: SentenceEncoder) -> None:
    """The verdict on one text does not depend on those beside it."""
    texts = ["写一首关于大海的诗", "word " * 200, "Name a colour 🙂 and 🎉", "Explain tides"]
    together = minilm.readable(texts)
    assert together == [minilm.readable([text])[0] for text in texts]


@pytest.mark.slow
def test_the_tool_says_what_was_not_compared(
    tmp_path: Path, minilm: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the remedy; ``--explain`` shows no cosine of such rows."""
    monkeypatch.setattr(tool, "SentenceEncoder", lambda *_a, **_k: minilm)
    path = tmp_path / "in.jsonl"
    rows = [*SENTENCES["zh"][:3], "😀🎉", "Name three primary colours.", SENTENCES["zh"][0] + "呢"]
    path.write_text("\n".join(json.dumps({"instruction": row}) for row in rows))
    done = CliRunner().invoke(tool.dedup, [str(path), "-o", str(tmp_path / "out.jsonl")])
    assert done.exit_code == 0, done.output
    assert "6 rows, 5 accepted" in done.output
    assert "        1  without any letter or digit: compared by the same text alone" in done.output
    assert "        4  not compared by meaning: the embedding model cannot read" in done.output
    assert "intfloat/multilingual-e5-small" in done.output
    assert "by ROUGE-L of characters above 0.75, as the rows are in Chinese" in done.output
    shown = CliRunner().invoke(tool.dedup, [str(path), "--explain"]).output
    assert "5 rows that the embedding model cannot read have no cosine" in shown
    assert SENTENCES["zh"][0] in shown


@pytest.mark.parametrize("language", ["zh", "th", "ar", "ru"])
def test_explain_shows_pairs_of_any_script(language: str, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    sentence, word, other = CHANGED[language][0]
    rows = [sentence, sentence.replace(word, other)]
    path.write_text("\n".join(json.dumps({"instruction": row}) for row in rows))
    for asked in ("auto", language):
        command = [str(path), "--explain", "--no-semantic", "--language", asked]
        shown = CliRunner().invoke(tool.dedup, command)
        assert shown.exit_code == 0
        assert all(row in shown.output for row in rows)
        unit = "characters, refused above 0.75" if language in ("zh", "th") else "words, refused"
        assert f"ROUGE-L of {unit}" in shown.output


def test_every_two_sentences_here_are_distinct() -> None:
    for sentences in SENTENCES.values():
        assert all(one != other for one, other in combinations(sentences, 2))
    assert encoder.MOST_UNKNOWN == 0.1
