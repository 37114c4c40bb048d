"""What was refused: as a file of its own, and failed requests that are sent again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import engine
from engine.cli.main import cli
from engine.errors import UsageError
from tests.engine.answers import Answers
from tests.engine.api_runs import QUICK, Loopback, nothing_is_left, numbers, questions, server
from tests.engine.hosts.double import KEY, Answer, Refusal
from tests.engine.hosts.doubles import Azure, Vllm

pytestmark = pytest.mark.slow

__all__ = ["nothing_is_left", "server"]


def say(*words: str) -> str:
    """What a command prints."""
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def made(folder: Path, url: str, count: int) -> list[int]:
    """The numbers of the rows of a run about so many questions."""
    own = {**QUICK, "base_url": url, "max_in_flight": 1}
    return numbers(engine.generate(Answers, rows=questions(count), out=folder, **own))


def refused(folder: Path) -> list[dict[str, Any]]:
    path = folder.parent / "refused.jsonl"
    say("export", str(folder), "--refused", "-o", str(path), "--overwrite", *CODE)
    return [json.loads(line) for line in path.read_text().splitlines()]


CODE = ("--recipe", "tests.engine.answers:Answers")


def test_each_refused_piece_is_a_line_with_all_it_came_from(
    tmp_path: Path, server: Loopback
) -> None:
    assert made(tmp_path / "run", server.url, 7) == [0, 1, 2, 3, 5, 6]
    assert refused(tmp_path / "run") == [
        {
            "id": "4.0",
            "reason": "unwanted",
            "detail": "its number is one of five",
            "record": None,
            "nearest": None,
            "answer": "It is so.",
            "row": 4,
            "sample": 0,
            "input": {"number": 4, "question": "What is 4?"},
        }
    ]


def test_a_refused_piece_has_its_row_s_id_under_the_name_that_accepted_rows_have(
    tmp_path: Path, server: Loopback
) -> None:
    rows = [{"id": f"q-{row['number']}", **row} for row in questions(5)]
    own = {**QUICK, "base_url": server.url}
    list(engine.generate(Answers, rows=rows, out=tmp_path / "run", carry=["id"], **own))
    (line,) = refused(tmp_path / "run")
    assert (line["woolmill_id"], line["id"]) == ("4.0", "q-4")


def test_a_near_duplicate_names_what_it_resembles(tmp_path: Path) -> None:
    rows = [{"question": "What is rain?"}, {"question": "What is rain?"}]
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[recipe]\nname = "r"\ncompare = "{{ question }}"\n[rows]\n[stage]\n'
        'user = "Answer {{ question }}"\n'
        'give = { question = "{{ question }}", answer = "{{ text }}" }\n'
    )
    run = tmp_path / "run"
    list(engine.generate(str(recipe), rows=rows, out=run, backend="scripted", semantic=False))
    (line,) = refused(run)
    assert line["reason"].startswith("duplicate")
    assert line["nearest"] == {"text": "What is rain?", "score": 1.0, "source": "row:0.0"}
    assert line["record"]["question"] == "What is rain?"


@pytest.mark.parametrize("other", [("--take", "3"), ("--format", "csv"), ("--group",)])
def test_it_goes_with_nothing_else(
    tmp_path: Path, server: Loopback, other: tuple[str, ...]
) -> None:
    made(tmp_path / "run", server.url, 1)
    with pytest.raises(UsageError, match="--refused goes alone, with --format jsonl"):
        say("export", str(tmp_path / "run"), "--refused", *other, "-o", str(tmp_path / "out"))


def test_failed_requests_are_asked_again_and_the_rows_stand_in_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    run = tmp_path / "run"
    with Azure(flag=2) as host:
        url = f"{host.url}{host.root}"
        assert made(run, url, 4) == [0, 1, 3]
        assert [(line["reason"], line["row"]) for line in refused(run)] == [
            ("failed:content_filter", 2)
        ]
        host.flag = None
        assert made(run, url, 7) == [0, 1, 3, 5, 6]  # a failed request is not sent again by itself
        answered = host.answered
        told = say("redecide", str(run), "--drop-failed")
        assert told == "dropped 1 answer; woolmill generate asks anew what it needs of them\n"
        assert made(run, url, 7) == [0, 1, 2, 3, 5, 6]
        assert host.answered == answered + 1
    assert "dropped 0 answers" in say("redecide", str(run), "--drop-failed")


def test_answers_that_only_gave_refusals_are_asked_anew_by_reason(
    tmp_path: Path, server: Loopback
) -> None:
    """Those of other reasons, and answers with an accepted row, stay."""
    run = tmp_path / "run"
    made(run, server.url, 7)
    asked = server.ledger.paid.total()
    drop = ("redecide", str(run), "--drop-refused", "unwanted")
    assert say(*drop, "--dry-run") == "1 answer would be dropped\n"
    assert "dropped 1 answer;" in say(*drop)
    assert made(run, server.url, 7) == [0, 1, 2, 3, 5, 6]
    assert server.ledger.paid.total() == asked + 1
    assert [line["row"] for line in refused(run)] == [4]
    with pytest.raises(UsageError, match=r"nothing was refused as no_record; .*: unwanted$"):
        say("redecide", str(run), "--drop-refused", "no_record")


class Recording(Vllm):
    """Notes the seeds that came with each prompt."""

    model = "toy"

    def __init__(self) -> None:
        super().__init__()
        self.seeds: dict[str, list[int]] = {}

    def refusal(self, body: Answer, query: Mapping[str, str]) -> tuple[str, Refusal] | None:
        self.seeds.setdefault(str(body.get("messages") or body["prompt"]), []).append(body["seed"])
        return super().refusal(body, query)


def test_what_is_asked_anew_has_another_seed_each_time(tmp_path: Path) -> None:
    """A server that obeys seeds would say the same again; what was not dropped is not asked."""
    run = tmp_path / "run"
    with Recording() as host:
        made(run, host.url, 7)
        for _ in range(2):
            say("redecide", str(run), "--drop-refused", "unwanted")
            assert made(run, host.url, 7) == [0, 1, 2, 3, 5, 6]
    asked = list(host.seeds.values())
    assert sorted(len(seeds) for seeds in asked) == [1] * 6 + [3]
    assert all(len(set(seeds)) == len(seeds) for seeds in asked)
    assert "sound (7 answers" in say("verify", str(run))


def test_dropping_goes_alone(tmp_path: Path, server: Loopback) -> None:
    made(tmp_path / "run", server.url, 1)
    with pytest.raises(UsageError, match="go with nothing but --dry-run"):
        say("redecide", str(tmp_path / "run"), "--drop-failed", "--target", "3")
    assert say("redecide", str(tmp_path / "run"), "--drop-failed", "--dry-run") == (
        "0 answers would be dropped\n"
    )
