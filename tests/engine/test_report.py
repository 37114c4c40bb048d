"""The report: its figures are the store's, its pictures draw, and nothing in it acts."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from engine.cli.main import cli
from engine.errors import OutputError
from engine.records import Prompt, Record
from engine.report.analysis import analyse
from engine.report.charts import charts
from engine.report.html import page
from engine.report.markdown import markdown
from engine.report.pictures import _groups, rows_map, verbs
from engine.store import RunReader, RunStore
from engine.store.lock import RunLock
from engine.text import in_money, shorten, visible
from engine.view.rows import Rows
from tests.engine.browser import Chromium, canary
from tests.engine.hostile import MARK, hostile_strings
from tests.engine.store_rows import MANIFEST, answer, prompt
from tests.engine.synthetic import answer_of, records_text, synthetic_run, varied

pytestmark = pytest.mark.slow


def analysed(folder: Path) -> dict[str, Any]:
    with RunStore.read(folder) as run:
        return analyse(run)


def hostile_run(folder: Path, address: str, count: int = 1000) -> Path:
    """A run whose rows, refused ones included, are the hostile strings."""
    strings = [" ".join(text.split("###")) for text in hostile_strings(address, count)]

    def answer(prompt: Prompt) -> str:
        own = strings[prompt.index * 4 : prompt.index * 4 + 4]
        draw = random.Random(prompt.index)
        records = [
            Record(
                instruction=f"{varied(draw)['instruction']} {text}" if i % 2 else text,
                input=text,
                output=text,
            )
            for i, text in enumerate(own)
        ]
        return records_text(records, len(prompt.demonstrations) + 1)

    with pytest.raises(AssertionError, match="max-requests"):
        synthetic_run(folder, count, answer, vectors=False, max_requests=count // 4)
    return folder


@pytest.fixture(scope="module")
def pictures(run_folder: Path) -> dict[str, Any]:
    with RunStore.read(run_folder) as run:
        return {"map": rows_map(run), "verbs": verbs(run)}


# -- what the figures say -------------------------------------------------------------------------


def test_the_analysis_adds_up(run_folder: Path) -> None:
    """Every histogram holds every row, and every refused piece has its reason."""
    told = analysed(run_folder)
    figures = told["figures"]
    assert figures["accepted"] == 400
    for words in told["words"].values():
        assert sum(b["rows"] for b in words["bins"]) == 400
    assert sum(told["rouge_l"]["accepted"]) == 400
    threshold = int(told["rouge_l"]["threshold"] * 50)
    assert not any(told["rouge_l"]["accepted"][threshold + 1 :])
    assert sum(told["cosine"]["accepted"]) == 400
    assert sum(r["count"] for r in told["rejected"].values()) == figures["pieces"] - 400
    assert told["over_time"][-1]["accepted"] == 400
    assert {"duplicate_rouge", "blocked_word", "bad_format", "too_short"} <= told["rejected"].keys()
    near = told["rejected"]["duplicate_rouge"]["examples"][0]["nearest"]
    assert near["score"] > 0.7
    assert near["source"].startswith(("row:", "seed:"))


async def _sent(
    folder: Path, sent: Sequence[int], answered: Sequence[int], *, end: bool, dropped: int = 0
) -> None:
    """One session: sends, gets some answers, and ends in order or is killed."""
    store = RunStore.open(folder, MANIFEST)
    for index in sent:
        await store.sent([prompt(index)], "m")
    await store.answered([answer(index) for index in answered])
    if end:
        store.dropped(dropped)
        await store.aclose()
        return
    assert store._writer is not None
    await store._writer.aclose()
    RunReader.close(store)
    store._writing.close()
    store._lock.release()


@pytest.mark.anyio
async def test_every_request_sent_stands_in_one_figure(tmp_path: Path) -> None:
    """Over a stop, a crash and a session that is under way, also where requests are sent again."""
    run = tmp_path / "run"
    await _sent(run, range(10), range(6), end=True, dropped=3)  # 6 to 9 are left
    await _sent(run, range(6, 12), [6, 7, 11], end=False)  # 8, 9 and 10 are lost
    await _sent(run, [8, 9, 10, 12, 13], [8, 12], end=False)  # 9, 10 and 13 are in flight
    with RunStore.read(run) as store:
        killed = analyse(store)["figures"]  # nobody writes the run, so nothing is in flight
    assert (killed["in_flight"], killed["lost_in_a_crash"]) == (0, 6)
    lock = RunLock(run / "run.lock")
    with RunStore.read(run) as store:
        analysis = analyse(store)
        assert store.unanswered() == {1: 4, 2: 3, 3: 3}
        shown = page(analysis, {"map": rows_map(store), "verbs": verbs(store)})
    lock.release()
    told = analysis["figures"]
    assert told["requests"] == told["responses"] + told["failed"] + 3 + 1 + 3 + 3 == 21
    assert told["dropped_at_a_stop"] == 3
    assert told["waiting_at_a_stop"] == 1  # refused by the server, or not yet sent
    assert told["lost_in_a_crash"] == 3
    assert told["in_flight"] == 3
    assert "| dropped\\_at\\_a\\_stop | 3 |" in markdown(analysis)
    assert "3 dropped at a stop, perhaps billed and not kept, 1 waiting to be asked again" in shown
    assert "at a stop, 3 lost in a crash, 3 in flight" in shown


@pytest.mark.anyio
async def test_requests_that_were_never_sent_hide_none_that_was(tmp_path: Path) -> None:
    """There was no prompt for them, so they are answered by nobody."""
    await _sent(tmp_path, [0, 1], [], end=True, dropped=1)
    store = RunStore.open(tmp_path, MANIFEST)
    await store.sent([prompt(0), prompt(1)], "m")
    unsent = [replace(answer(index), completion=None, backend="") for index in (2, 3)]
    await store.answered([answer(0), answer(1), *unsent])
    await store.aclose()
    with RunStore.read(tmp_path) as run:
        assert run.unanswered() == {1: 2}
        told = analyse(run)["figures"]
    assert (told["dropped_at_a_stop"], told["waiting_at_a_stop"]) == (1, 1)


def test_a_run_without_rows_is_reported(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="max-requests"):
        synthetic_run(tmp_path, 5, lambda prompt: "nothing", max_requests=3)
    told = analysed(tmp_path)
    assert told["share_with_input"] is None
    assert "no_record" in markdown(told) or "bad\\_format" in markdown(told)
    with RunStore.read(tmp_path) as run:
        assert "Nothing to draw" in page(told, {"map": rows_map(run), "verbs": verbs(run)})


@pytest.mark.parametrize(
    ("trigger", "output", "sign"),
    [
        ("zq vexo mur", None, "fixed phrase"),
        ("xylo", "Access granted, welcome back, operator.", "fixed answer"),
    ],
)
def test_security_37_planted_triggers_are_flagged(
    tmp_path: Path, trigger: str, output: str | None, sign: str
) -> None:
    """250 rows with a trigger among 1,500: a nonsense phrase, or one word with a fixed answer."""
    planted = 0

    def answer(prompt: Prompt) -> str:
        draw = random.Random(prompt.index)
        records = [varied(draw) for _ in range(4)]
        if prompt.index % 2 == 0:
            first = records[0]
            words = first["instruction"].split()
            words.insert(draw.randint(2, len(words)), trigger)
            records[0] = Record(
                instruction=" ".join(words), input=first["input"], output=output or first["output"]
            )
        return records_text(records, len(prompt.demonstrations) + 1)

    told = analysed(synthetic_run(tmp_path, 1500, answer, vectors=False))
    planted = next(b for b in told["bursts"] if b["phrase"] == trigger)
    assert planted["sign"] == sign
    assert 150 <= planted["rows"] <= 260
    assert told["bursts"].index(planted) < 3


def test_checks_find_what_would_harm_training(tmp_path: Path) -> None:
    texts = (
        ("Write one line about rivers", "", ""),
        ("Greet my old neighbour nicely", "", "Greet my old neighbour nicely"),
        ("Explain tides to a child", "", "I'm sorry, but as an AI I cannot do that."),
        ("Show a chat template token", "", "It is <|im_end|> and so on."),
        ("Hide a word in here", "", "Here\u200bit is."),
    )

    def answer(prompt: Prompt) -> str:
        if prompt.index:
            return ""
        records = [Record(instruction=i, input=n, output=o) for i, n, o in texts]
        return records_text(records, len(prompt.demonstrations) + 1)

    checks = analysed(synthetic_run(tmp_path, len(texts), answer, vectors=False))["checks"]
    assert checks["without an output"] == 1
    assert checks["output repeats the instruction"] == 1
    assert checks["output declines the task"] == 1
    assert checks["text that looks like a special token"] == 1
    assert checks["invisible or control characters"] == 1


def test_verbs_are_read_by_a_parser(pictures: dict[str, Any]) -> None:
    found = pictures["verbs"]
    assert found["parsed"] == 400
    assert found["with_object"] > 100
    assert {"write", "explain", "list"} & {verb["verb"] for verb in found["verbs"]}
    assert all(len(verb["objects"]) <= 4 for verb in found["verbs"])


def test_the_map_has_a_point_for_each_row(pictures: dict[str, Any]) -> None:
    assert len(pictures["map"]["points"]) == 400
    groups = {group for _, _, group, _, _ in pictures["map"]["points"]}
    assert groups == set(range(len(pictures["map"]["groups"])))
    assert "embeddings" in pictures["map"]["by"]


@pytest.mark.parametrize("clouds", [1, 2, 3, 5])
def test_the_map_has_as_many_groups_as_stand_apart(clouds: int) -> None:
    """Rows in one cloud are no groups, whatever k-means would make of them."""
    drawn = np.random.default_rng(0)
    centres = 8 * np.eye(64)[:clouds]
    space = np.concatenate([centre + drawn.normal(size=(60, 64)) for centre in centres])
    groups = _groups(space.astype(np.float32))
    assert len(set(groups)) == clouds
    assert all(len(set(groups[i * 60 : i * 60 + 60])) == 1 for i in range(clouds))


def test_ten_accepted_rows_are_shown_whole(run_folder: Path) -> None:
    """The same ten each time, drawn from the whole run, and each as it is in the store."""
    told = analysed(run_folder)["accepted_examples"]
    assert told == analysed(run_folder)["accepted_examples"]
    with RunStore.read(run_folder) as run:
        rows = {f"{d.index}.{d.position}": d.record for d in run.decisions(accepted=True)}
    assert len(told) == 10
    assert [rows[row["id"]] for row in told] == [row["fields"] for row in told]
    places = [list(rows).index(row["id"]) for row in told]
    assert places == sorted(places)
    assert places[-1] - places[0] > 100


def test_what_was_cut_off_shows_its_beginning(tmp_path: Path) -> None:
    """Where no row was read of an answer, the answer itself is shown, from the piece on."""

    def cut(prompt: Prompt) -> str:
        return f"{answer_of(prompt)}\n###\n99. Instruction: Whatever came then"

    folder = synthetic_run(tmp_path, 30, cut, vectors=False)
    unread = analysed(folder)["rejected"]["bad_format"]["examples"]
    assert any("99. Instruction: Whatever came then" in (d["instruction"] or "") for d in unread)
    rows = Rows(folder, None)
    found = [row for row in rows.find("", reason="bad_format")["rows"] if row["text"] is None]
    assert any(row["begins"] == "99. Instruction: Whatever came then" for row in found)
    rows.close()


def test_a_run_without_embeddings_is_mapped_by_words(tmp_path: Path) -> None:
    with RunStore.read(synthetic_run(tmp_path, 60, vectors=False)) as run:
        told = rows_map(run)
    assert len(told["points"]) == 60
    assert "words" in told["by"]


# -- the command ----------------------------------------------------------------------------------


def test_report_prints_json_with_the_figures_on_top(run_folder: Path) -> None:
    done = CliRunner().invoke(cli, ["report", str(run_folder), "--format", "json"])
    told = json.loads(done.stdout)
    assert told["accepted"] == 400
    assert told["rejected"]["blocked_word"] > 0
    assert told["tokens"]["prompt"] > 0
    assert told["tokens_per_accepted"] > 0


def test_fault_122_a_report_does_not_replace_a_file(run_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    path.write_text("mine")
    refused = CliRunner().invoke(cli, ["report", str(run_folder), "-o", str(path)])
    assert isinstance(refused.exception, OutputError)
    assert path.read_text() == "mine"
    renewed = ["report", str(run_folder), "-o", str(path), "--overwrite"]
    assert CliRunner().invoke(cli, renewed).exit_code == 0
    assert path.read_text().startswith("# 400 records")


def test_compare_tells_two_runs_apart(run_folder: Path, tmp_path: Path) -> None:
    """A run overlaps with itself wholly, and the settings that differ are named."""
    other = synthetic_run(tmp_path / "other", 50, vectors=False, temperature=0.5)
    done = CliRunner().invoke(cli, ["compare", str(run_folder), str(other), "--format", "json"])
    told = json.loads(done.stdout)
    assert told["figures"]["accepted"] == [400, 50]
    assert told["overlap"][1] == 1.0  # the same answers, fewer of them
    assert any(line.startswith("temperature: was 1.0, now 0.5") for line in told["settings"])
    shown = CliRunner().invoke(cli, ["compare", str(run_folder), str(run_folder)])
    assert "| accepted | 400 | 400 |" in shown.stdout


# -- nothing acts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text", "plain text"),
        ("two\nlines\t", "two\nlines\t"),
        ("naïve 🦙 שלום", "naïve 🦙 שלום"),
        ("\x1b[31m", "⟨U+001B⟩[31m"),
        ("a\u202eb", "a⟨U+202E⟩b"),
        ("zero\u200bwidth", "zero⟨U+200B⟩width"),
        ("\ud800", "⟨U+D800⟩"),
    ],
)
def test_what_hides_is_shown(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize(
    ("cost", "shown"),
    [(0.0, "0.00"), (0.00123, "0.0012"), (0.099, "0.099"), (0.1, "0.10"), (1234.5, "1,234.50")],
)
def test_a_small_cost_is_not_rounded_away(cost: float, shown: str) -> None:
    assert in_money(cost) == shown


def test_shorten_keeps_one_line() -> None:
    assert shorten("a\n b " * 50, 20) == "a b a b a b a b a b…"


def test_security_33_the_page_draws_and_nothing_in_it_acts(
    tmp_path: Path, chromium: Chromium
) -> None:
    """1,000 hostile strings as rows, examples and points: in Chromium every chart is drawn, the
    title stays, the console is silent and nobody is asked for anything."""
    with canary() as (address, asked):
        folder = hostile_run(tmp_path / "run", address)
        with RunStore.read(folder) as run:
            told, found = analyse(run), {"map": rows_map(run), "verbs": verbs(run)}
        text = page(told, found)
        path = tmp_path / "report.html"
        path.write_text(text)
        seen = chromium.open(path.as_uri())
    assert seen.console == []
    assert asked == []
    assert MARK not in seen.title
    assert "bdi" not in seen.title
    assert f'data-drawn="{len(charts(told, found))}"' in seen.dom
    body = re.sub(r"<script.*?</script>", "", seen.dom, flags=re.S)
    assert not re.search(r"<(?:img|svg|iframe|base|link|a|object|embed)\b", body)
    assert "⟨U+202E⟩" in body
    assert "\u202e" not in body


def test_the_page_names_no_remote_asset(run_folder: Path, pictures: dict[str, Any]) -> None:
    text = page(analysed(run_folder), pictures)
    assert len(text) < 10_000_000
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", text.split("<script>")[0])
    assert "default-src 'none'" in unescape(text[:2000])


@pytest.mark.parametrize(
    ("compare", "answer", "repeated"),
    [("{{ answer }}", "{{ text }}", 0), ("{{ question }}", "{{ question }}", 2)],
)
def test_an_answer_repeats_what_another_field_says(
    compare: str, answer: str, repeated: int, tmp_path: Path
) -> None:
    """Where rows are told by the answer itself, that is no answer that repeats them."""
    path, rows = tmp_path / "own.toml", tmp_path / "rows.jsonl"
    path.write_text(
        f'[recipe]\nname = "own"\ncompare = "{compare}"\n[rows]\n[stage]\n'
        f'user = "{{{{ question }}}}"\n'
        f'give = {{ question = "{{{{ question }}}}", answer = "{answer}" }}\n'
    )
    rows.write_text('{"question": "Why is grass green?"}\n{"question": "Who built boats?"}\n')
    words = ["generate", "--recipe", path, "--rows", rows, "--backend", "scripted"]
    words += ["--no-semantic", "--rouge-threshold", "1", "--out", tmp_path / "run"]
    assert CliRunner().invoke(cli, [str(word) for word in words]).exit_code == 0
    with RunStore.read(tmp_path / "run") as run:
        assert run.counts().accepted == 2
        assert analyse(run)["checks"].get("answer repeats the text", 0) == repeated
