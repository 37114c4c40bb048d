"""Datasets of several scripts: each row as in a dataset of its own script."""

from __future__ import annotations

import random
from pathlib import Path

import orjson
import pytest
from click.testing import CliRunner

from engine.dedup import Candidate, Cascade, RougeIndex
from engine.dedup import command as tool
from engine.dedup.by_script import ByScript, RougeByScript
from engine.languages import detect
from tests.engine.dedup.test_cascade import BagEncoder
from tests.engine.sentences import changed

pytestmark = pytest.mark.slow


def rows_of(language: str) -> list[str]:
    """Ten sentences, each with one that has a word changed behind it."""
    return [text for pair in changed(language) for text in pair]


VERBS = ("Describe", "Explain", "Draw", "Sell", "Count", "Paint", "Clean")
ENGLISH = [
    f"{verb} {count} {things} for my {who}"
    for verb in VERBS
    for count in ("two", "seven", "ten")
    for things in ("old houses", "fast cars", "green apples")
    for who in ("sister in Berlin", "class")
]
RUSSIAN, CHINESE, THAI = rows_of("ru"), rows_of("zh"), rows_of("th")


def mixed() -> list[str]:
    texts = [*ENGLISH, *RUSSIAN, *CHINESE, *THAI, "😀", "😀🎉"]
    random.Random(5).shuffle(texts)
    return texts


def accepted_alone(texts: list[str], own: set[str], index: RougeIndex) -> list[str]:
    mine = [text for text in texts if text in own]
    found = zip(mine, index.admit(mine), strict=True)
    return [text for text, hit in found if hit is None]


@pytest.mark.parametrize("size", [1, 7, 500])
@pytest.mark.parametrize("meaning", [None, 0.999])
def test_each_row_is_decided_as_among_its_own_script(size: int, meaning: float | None) -> None:
    """By any cut into batches, with and without meaning."""
    texts = mixed()
    encoder = None if meaning is None else BagEncoder()
    cascade = Cascade(0.7, meaning, encoder, neighbours=1, by_script=ByScript.each("en"))
    candidates = [Candidate(text=text, source=f"row:{i}") for i, text in enumerate(texts)]
    judgements = [
        judgement
        for start in range(0, len(texts), size)
        for judgement in cascade.judge(candidates[start : start + size])
    ]
    kept = {text for text, judgement in zip(texts, judgements, strict=True) if judgement.accepted}
    for own, index in (
        (ENGLISH, RougeIndex()),
        (RUSSIAN, RougeIndex(language="ru")),
        ([*CHINESE, *THAI], RougeIndex(language="zh")),
    ):
        alone = accepted_alone(texts, set(own), index)
        assert len(alone) < len(own)
        assert kept & set(own) == set(alone)
    for text, judgement in zip(texts, judgements, strict=True):
        if judgement.nearest is not None:
            place = int(judgement.nearest.source.removeprefix("row:"))
            assert texts[place] == judgement.nearest.text
            assert place < texts.index(text)
    assert {"😀", "😀🎉"} <= kept


def test_the_index_counts_all_its_items() -> None:
    """So that a limit, a hit and a neighbour are those of the whole."""
    index = RougeByScript(ByScript.each("en"))
    index.extend(["写一首关于秋天的诗", "Name three colours", "写一首关于大海的诗"])
    hit = index.find("写一首关于大海的歌诗")
    assert hit is not None
    assert hit.item == 2
    assert index.admit(["Sing a song", "画一幅肖像画", "Never reached"], 2) == [None, None]
    assert len(index) == 5
    nearest = index.neighbours([2, 4, 3], k=1)
    assert [[hit.item for hit in near.hits] for near in nearest] == [[0], [0], [1]]
    alone = RougeIndex(language="zh")
    alone.add("写一首关于秋天的诗")
    assert nearest[0].mean == pytest.approx(alone.nearest("写一首关于大海的诗").mean / 2)


def dedup(path: Path, texts: list[str], *arguments: str) -> tuple[list[str], str]:
    """The texts that are kept, and what is told."""
    path.write_bytes(b"\n".join(orjson.dumps({"instruction": text}) for text in texts))
    out = path.with_name("out.jsonl")
    command = [str(path), "-o", str(out), "--overwrite", "--no-semantic", *arguments]
    result = CliRunner().invoke(tool.dedup, command, catch_exceptions=False)
    kept = [orjson.loads(line)["instruction"] for line in out.read_bytes().splitlines()]
    return kept, result.stdout


@pytest.mark.parametrize("chinese", [CHINESE[:4], CHINESE])
def test_few_chinese_rows_are_compared_too_and_english_ones_as_without_them(
    chinese: list[str], tmp_path: Path
) -> None:
    """Whether their share of the letters is below that of a dataset in several languages or not."""
    english, said = dedup(tmp_path / "in.jsonl", ENGLISH)
    assert english == accepted_alone(ENGLISH, set(ENGLISH), RougeIndex())
    assert english != accepted_alone(ENGLISH, set(ENGLISH), RougeIndex(0.75))
    assert "by ROUGE-L of" not in said
    assert detect([*chinese, *ENGLISH]) == ("en" if len(chinese) < 10 else "mul")
    both, said = dedup(tmp_path / "in.jsonl", [*chinese, *ENGLISH])
    assert both == [*chinese[::2], *english]
    assert (
        f"by ROUGE-L of words above 0.7, and in {len(chinese)} rows whose script sets no spaces of "
        "characters above 0.75; else name a --language\n" in said
    )
    _, said = dedup(tmp_path / "in.jsonl", ["写一首诗", "写一首歌", *ENGLISH])
    assert "at ROUGE-L of characters 0.70 instead of 0.75, 1 more refused:" in said


def test_a_threshold_and_a_language_that_are_named_hold_for_all(tmp_path: Path) -> None:
    texts = [*CHINESE[:4], *ENGLISH]
    kept, said = dedup(tmp_path / "in.jsonl", texts, "--language", "en")
    assert set(CHINESE[:4]) <= set(kept)
    assert "4  without any word in English: no ROUGE-L; --language mul compares" in said
    kept, _ = dedup(tmp_path / "in.jsonl", texts, "--rouge-threshold", "1")
    assert kept == texts


def test_accents_alone_do_not_change_the_threshold_of_words(tmp_path: Path) -> None:
    texts = [
        "Décris l'été à la mer en dix mots",
        "Décris l'été à la mer en vers rimés déjà",
    ]
    assert 0.7 < RougeIndex(0.1, "fr").admit(texts)[1].score < 0.75  # type: ignore[union-attr]
    kept, said = dedup(tmp_path / "in.jsonl", texts)
    assert kept == texts[:1]
    assert "by ROUGE-L of words above 0.7, as the rows are in several languages; else" in said


def test_explain_shows_pairs_by_their_own_tokens(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    texts = [*CHINESE[:2], *ENGLISH[:9]]
    path.write_bytes(b"\n".join(orjson.dumps({"instruction": text}) for text in texts))
    said = CliRunner().invoke(tool.dedup, [str(path), "--explain", "--no-semantic"]).stdout
    assert "ROUGE-L of words, refused above 0.7, and of characters, refused above 0.75" in said
    assert CHINESE[1] in said
