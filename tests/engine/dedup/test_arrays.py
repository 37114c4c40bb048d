"""An index as flat arrays, and these in a file: what comes back is what went in, or nothing."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.dedup import Candidate, Cascade, RougeIndex, cascade, kernels, rouge, vocabulary
from engine.dedup.array_file import MAGIC, read_arrays, read_head, write_arrays
from engine.dedup.exact import ExactIndex
from engine.dedup.memory import Part
from engine.dedup.texts import Texts
from engine.errors import ConfigError
from tests.engine.synthetic import BagEncoder, varied

pytestmark = pytest.mark.slow


def made_texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [varied(draw)["instruction"] for _ in range(count)]


def candidates(texts: list[str], first: int = 0) -> list[Candidate]:
    return [Candidate(text=text, source=f"row:{i}.0") for i, text in enumerate(texts, first)]


def through_a_file(held: Cascade, path: Path) -> dict[str, Part]:
    write_arrays(path, {}, held.arrays())
    return read_arrays(path)[1]


def with_references() -> Cascade:
    fresh = Cascade(0.7)
    fresh.add_reference(made_texts(20, seed=1), [f"seed:{i}" for i in range(20)])
    return fresh


def changed(part: Part, at: int, value: int) -> Part:
    array = part.array.copy()
    array[at] = value
    return Part(array, part.size)


def taken_in(fresh: Cascade, arrays: dict[str, Part], what: str) -> None:
    fresh.take(arrays, ())
    pytest.fail(what)


@pytest.fixture
def early_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small indexes then have all that large ones have."""
    monkeypatch.setattr(rouge, "EPOCH_STARTS", (60, 150))


@pytest.mark.parametrize("count", [0, 1, 59, 60, 61, 150, 400])
@pytest.mark.usefixtures("early_epochs")
def test_a_cascade_from_a_file_decides_like_the_one_that_was_written(
    tmp_path: Path, count: int
) -> None:
    """Also around the places at which an index changes its order, and what it adds later."""
    texts = made_texts(count + 200)
    written = with_references()
    written.judge(candidates(texts[:count]))
    read = with_references()
    read.take(through_a_file(written, tmp_path / "index"), ())
    assert len(read) == len(written)
    rest = candidates(texts[count:], count)
    assert read.judge(rest) == written.judge(rest)
    for name, array in written.arrays().items():
        assert np.array_equal(array, read.arrays()[name]), name


def test_what_is_written_is_what_was_there_when_it_was_asked_for(tmp_path: Path) -> None:
    """The file is written while decisions go on."""
    texts = made_texts(600)
    written = with_references()
    written.judge(candidates(texts[:300]))
    arrays = written.arrays()
    before = {name: array.copy() for name, array in arrays.items()}
    written.judge(candidates(texts[300:], 300))
    write_arrays(tmp_path / "index", {}, arrays)
    for name, part in read_arrays(tmp_path / "index")[1].items():
        assert np.array_equal(part.used, before[name]), name


def test_long_texts_come_back_too(tmp_path: Path) -> None:
    draw = random.Random(3)
    words = [f"w{i}" for i in range(3_000)]
    long = [" ".join(draw.choices(words, k=draw.randint(2_100, 2_300))) for _ in range(6)]
    near = [text.replace("w1", "w2", 3) for text in long]
    written, read = RougeIndex(), RougeIndex()
    assert written.admit([*made_texts(50), *long]).count(None) > 40
    write_arrays(tmp_path / "index", {}, written.arrays())
    read.take(read_arrays(tmp_path / "index")[1])
    found = [read.find(text) for text in near]
    assert None not in found
    assert found == [written.find(text) for text in near]
    assert read.nbytes == written.nbytes


def test_vectors_come_from_the_store_and_must_be_those_of_the_rows(tmp_path: Path) -> None:
    texts = made_texts(120)

    def fresh() -> Cascade:
        return Cascade(0.7, 0.9, BagEncoder(), directory=tmp_path)

    written = fresh()
    judged = written.judge(candidates(texts[:100]))
    vectors = [
        (f"row:{i}.0", judgement.vector)
        for i, judgement in enumerate(judged)
        if judgement.vector is not None
    ]
    read = fresh()
    read.take(through_a_file(written, tmp_path / "index"), vectors)
    rest = candidates(texts[100:], 100)
    for one, other in zip(read.judge(rest), written.judge(rest), strict=True):
        assert (one.reason, one.nearest, one.most_similar) == (
            other.reason,
            other.nearest,
            other.most_similar,
        )
    for wrong in (vectors[1:], vectors[:-1], [*vectors[:3], *vectors[4:]]):
        with pytest.raises(ValueError, match="other vectors"):
            fresh().take(read_arrays(tmp_path / "index")[1], wrong)


def test_other_references_are_another_index(tmp_path: Path) -> None:
    written = with_references()
    written.judge(candidates(made_texts(50)))
    other = Cascade(0.7)
    other.add_reference(["Name a colour"], ["seed:0"])
    with pytest.raises(ValueError, match="compares with other texts"):
        other.take(through_a_file(written, tmp_path / "index"), ())
    with pytest.raises(ValueError, match="its arrays are others"):
        Cascade(None).take({"digests": Part(np.zeros(2, np.uint64), 2)}, ())


@pytest.mark.usefixtures("early_epochs")
def test_numbers_that_lead_astray_are_seen_before_compiled_code_trusts_them(
    tmp_path: Path,
) -> None:
    """Whatever number of an array is another, it is refused, or no decision leaves the arrays."""
    written = with_references()
    written.judge(candidates(made_texts(200)))
    write_arrays(tmp_path / "index", {}, written.arrays())
    arrays = read_arrays(tmp_path / "index")[1]
    chunk = int(np.flatnonzero(arrays["heads"].used < kernels.ALONE)[0])
    place = next(int(h) for h in arrays["heads"].used[chunk:] if 0 < h < kernels.ALONE)
    astray: dict[str, tuple[str, int, int]] = {
        "a token that there is not": ("tokens", 0, arrays["counts"].size),
        "a text that ends before it begins": ("starts", 3, 0),
        "a text that ends beyond the tokens": ("starts", 5, arrays["tokens"].size + 9),
        "a word that ends beyond the letters": ("word_ends", 2, arrays["words"].size + 9),
        "a string that ends beyond the letters": ("text_ends", -1, 1 << 40),
        "a head beyond the postings": ("heads", 0, arrays["postings"].size + 5),
        "a head that is no chunk": ("heads", 0, place + 1),
        "a head that is no item": ("heads", 0, kernels.ALONE | 10_000),
        "a chunk larger than the rest": ("postings", place, 60_000 << 16),
        "a chunk that is its own predecessor": ("postings", place + 1, place),
        "a posting that is no item": ("postings", place + 2, 10_000),
    }
    crafted = {
        what: (name, changed(arrays[name], at % arrays[name].size, value))
        for what, (name, at, value) in astray.items()
    }
    crafted |= {
        f"one more in {name}": (name, Part(part.array, part.size + 1))
        for name, part in arrays.items()
        if name != "vector_items"  # not read here
    }
    for what, (name, part) in crafted.items():
        with pytest.raises(ValueError, match=r"order|other|size|tokens|lie"):
            taken_in(with_references(), {**arrays, name: part}, what)


# The file


def small_file(path: Path) -> bytes:
    arrays: dict[str, NDArray[Any]] = {
        "a": np.arange(9, dtype=np.uint32),
        "empty": np.empty(0, np.uint64),
        "b": np.frombuffer(b"letters", np.uint8),
    }
    write_arrays(path, {"about": "this"}, arrays)
    return path.read_bytes()


def test_a_file_of_arrays_holds_what_was_put_in(tmp_path: Path) -> None:
    path = tmp_path / "file"
    small_file(path)
    about, arrays = read_arrays(path)
    assert about == read_head(path) == {"about": "this"}
    assert {name: part.used.tolist() for name, part in arrays.items()} == {
        "a": list(range(9)),
        "empty": [],
        "b": list(b"letters"),
    }
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]
    assert read_head(tmp_path / "none") is None


def torn(whole: bytes) -> Iterator[bytes]:
    yield from (whole[:end] for end in range(len(whole)))
    yield whole + b"\0"
    yield whole + whole
    for at in range(len(whole)):
        yield whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]


def test_no_byte_of_it_can_be_another(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for wrong in torn(small_file(path)):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="it"):
            read_arrays(path)


@pytest.mark.parametrize(
    "head",
    [
        b"[]",
        b'{"about": 1, "arrays": []}',
        b'{"about": {}, "arrays": [["a", "<u4", -1]]}',
        b'{"about": {}, "arrays": [["a", "|O", 1]]}',
        b'{"about": {}, "arrays": [["a", "<u8", 1e999]]}',
        b'{"about": {}, "arrays": [["a", "<u8", 1000000000000000000000000]]}',
        b"[" * 5_000,
        b"\xff",
    ],
)
def test_a_head_from_a_stranger_is_refused(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(MAGIC + struct.pack("<I", len(head)) + head + bytes(32))
    for read in read_arrays, read_head:
        with pytest.raises(ValueError, match="it"):
            read(path)


def test_only_a_plain_file_is_read_and_a_link_is_never_followed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    small_file(path)
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="symbolic links"):
        read_arrays(tmp_path / "link")
    with pytest.raises(ValueError, match="no plain file"):
        read_arrays(tmp_path / "fifo")
    (tmp_path / "other.new").symlink_to(path)
    small = path.read_bytes()
    write_arrays(tmp_path / "other", {}, {})
    assert path.read_bytes() == small
    assert not (tmp_path / "other").is_symlink()


# Parts


def test_texts_of_all_kinds_come_back() -> None:
    texts, kept = Texts(), ["", "a", "写一首诗", "\ud83d", "b" * 70_000, ""]
    for text in kept:
        texts.append(text)
    assert [texts[i] for i in range(len(texts))] == kept
    with pytest.raises(IndexError):
        texts[len(kept)]


def test_a_table_of_digests_grows_and_finds_the_first() -> None:
    """More than it begins with, some of them twice; and the same after a restart."""
    texts = [f"text {i % 3_000}" for i in range(4_000)]
    index = ExactIndex()
    for text in texts:
        index.add(text)
    assert [index.find(text) for text in texts] == [i % 3_000 for i in range(4_000)]
    assert index.find("text 3000") is None
    read = ExactIndex()
    for text in texts:
        read.add(text)
    more = ExactIndex()
    for text in [*texts, *(f"more {i}" for i in range(5_000))]:
        more.add(text)
    digests = more.digests()
    read.take(Part(digests.copy(), len(digests)))
    assert len(read) == 9_000
    assert [read.find(f"more {i}") for i in range(5_000)] == list(range(4_000, 9_000))
    assert [read.find(text) for text in texts] == [i % 3_000 for i in range(4_000)]


def test_the_same_digest_over_and_over_is_no_table() -> None:
    with pytest.raises(ValueError, match="the same digest"):
        ExactIndex().take(Part(np.ones(4_000, np.uint64), 4_000))


# Bounds


@pytest.mark.parametrize(
    ("bound", "value", "said"),
    [
        ((kernels, "MOST"), 4_000, r"it holds [\d,]+ texts"),
        ((vocabulary, "MOST_LETTERS"), 600, r"it holds [\d,]+ different words"),
        ((cascade, "MOST_ITEMS"), 100, "it holds 100 texts"),
    ],
)
@pytest.mark.parametrize("how", ["judge", "restore", "references"])
def test_what_32_bits_cannot_number_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, bound: tuple[Any, str], value: int, said: str, how: str
) -> None:
    """And what is there stays as it was: it is found, and nothing has wrapped."""
    monkeypatch.setattr(*bound, value)
    full, texts = Cascade(0.7), made_texts(400)
    add: dict[str, Callable[[Candidate], object]] = {
        "judge": lambda candidate: full.judge([candidate]),
        "restore": lambda candidate: full.restore([candidate], [None]),
        "references": lambda candidate: full.add_reference([candidate.text], ["seed:1"]),
    }

    def fill() -> None:
        for candidate in candidates(texts):
            add[how](candidate)

    with pytest.raises(ConfigError, match=f"index is full: {said}, .*go on in a new run"):
        fill()
    assert 0 < len(full) < 400
    (judgement,) = full.judge(candidates(texts[:1]))
    assert judgement.reason == "duplicate_exact"


@pytest.mark.parametrize("batch", [1, 7, 300])
def test_the_nearest_are_not_looked_for_beyond_a_number_of_rows(
    monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """However candidates are cut into batches, the same rows have them, and no decision differs."""
    texts = candidates(made_texts(300))

    def judged(batch: int) -> list[Any]:
        held = with_references()
        return [j for i in range(0, 300, batch) for j in held.judge(texts[i : i + batch])]

    everything = judged(300)
    monkeypatch.setattr(cascade, "COMPARED_WITH_ALL", 120)
    some = judged(batch)
    assert [j.reason for j in some] == [j.reason for j in everything]
    accepted = [(j, k) for j, k in zip(some, everything, strict=True) if j.accepted]
    assert len(accepted) > 150
    for number, (one, other) in enumerate(accepted, 20):
        if number < 120:
            assert one == other
        else:
            assert (one.nearest, one.most_similar, one.mean_similarity) == (None, {}, None)
