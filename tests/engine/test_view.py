"""The local page: what it finds, whom it answers, and that nothing in it acts."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from engine.cli.main import cli, main
from engine.errors import ConfigError, InputError, UsageError
from engine.kept import recipe_of
from engine.recipes.seeds import KEPT, bundled_seeds, fingerprint, keep, kept_seeds, read_seeds
from engine.records import Prompt
from engine.stages import stages_of_run
from engine.store import RunReader, RunStore
from engine.store.database import connect, put_meta, read_run_id
from engine.store.schema import Checksum
from engine.view import app as app_module
from engine.view import server as server_module
from engine.view.app import Access, make_app
from engine.view.metrics import metrics
from engine.view.rows import PAGE, Rows
from engine.view.server import bind, make_server
from tests.engine.browser import Chromium, canary
from tests.engine.hostile import MARK
from tests.engine.synthetic import answer_of, synthetic_run
from tests.engine.test_report import hostile_run

pytestmark = pytest.mark.slow

TOKEN = "canary-token-0123456789-0123456789-0123456789"


@dataclass(frozen=True, slots=True)
class Served:
    """A running page."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def link(self) -> str:
        return f"{self.url}/enter?token={TOKEN}"

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.ask("GET", path, **headers)

    def ask(self, method: str, path: str, **headers: str) -> httpx.Response:
        given = {"authorization": f"Bearer {TOKEN}"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        with httpx.Client(trust_env=False) as client:
            return client.request(method, f"{self.url}{path}", headers=given)


def page_rows(folder: Path) -> Rows:
    """What the page of ``folder`` tells of its last stage, with the run's own recipe."""
    return stage_rows(folder)[-1]


def stage_rows(folder: Path) -> list[Rows]:
    """That of all its stages."""
    rows: list[Rows] = []
    for stage in stages_of_run(folder):
        with RunReader(stage.folder) as run:
            run.named_recipe = run.manifest.free.get("recipe_spec", "")
            recipe = recipe_of(run)
        before = rows[-1] if rows else None
        rows.append(Rows(stage.folder, recipe, name=stage.name, before=before))
    return rows


@contextmanager
def served(folder: Path) -> Iterator[Served]:
    """The page of ``folder``, as ``woolmill view`` serves it, from a thread."""
    rows = stage_rows(folder)
    listener, _ = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    hosts = frozenset({f"127.0.0.1:{port}", f"localhost:{port}"})
    access = Access(token=TOKEN, hosts=hosts, cookie=f"woolmill-{port}")
    server = make_server(make_app(rows, access))
    loop = asyncio.new_event_loop()
    work = server.serve(sockets=[listener])
    thread = threading.Thread(target=loop.run_until_complete, args=(work,))
    thread.start()
    try:
        yield Served(port)
    finally:
        server.should_exit = True
        thread.join()
        loop.close()
        for stage in rows:
            stage.close()
        listener.close()


@pytest.fixture(scope="module")
def page(run_folder: Path) -> Iterator[Served]:
    with served(run_folder) as page:
        yield page


@pytest.fixture
def rows(run_folder: Path) -> Iterator[Rows]:
    rows = page_rows(run_folder)
    yield rows
    rows.close()


# -- what it finds --------------------------------------------------------------------------------


def test_every_row_is_found_once(rows: Rows, run_folder: Path) -> None:
    """Page after page, the latest first, accepted and refused."""
    seen: list[str] = []
    found = rows.find("")
    while True:
        assert len(found["rows"]) <= PAGE
        seen += [row["id"] for row in found["rows"]]
        if found["next"] is None:
            break
        found = rows.find("", before=found["next"])
    with RunReader(run_folder) as run:
        expected = [f"{d.index}.{d.position}" for d in run.decisions()]
    assert seen == expected[::-1]
    assert found["matches"] == len(expected)


def test_words_and_filters_narrow(rows: Rows) -> None:
    """All words must stand in the row; the last may be the beginning of one."""
    accepted = rows.find("letter", status="accepted")
    assert accepted["rows"]
    for row in accepted["rows"]:
        assert row["reason"] is None
        told = rows.row(*map(int, row["id"].split(".")))
        assert "letter" in json.dumps(told["fields"]).lower()
    both = rows.find("letter grandm")
    assert 0 < both["matches"] < rows.find("letter")["matches"]
    blocked = rows.find("", reason="blocked_word")
    assert {row["reason"] for row in blocked["rows"]} == {"blocked_word"}
    assert rows.find("picture", status="accepted")["matches"] == 0


def test_a_row_is_found_by_its_number(rows: Rows) -> None:
    """Where there is one; a number in a text is a word."""
    named = rows.find("")["rows"][3]["id"]
    assert [row["id"] for row in rows.find(f" {named} ")["rows"]] == [named]
    assert rows.find("999999.0")["matches"] == 0


def test_a_near_duplicate_says_how_near_and_to_what_threshold(rows: Rows) -> None:
    found = rows.find("", reason="duplicate_rouge")["rows"]
    assert found
    for row in found:
        told = rows.row(*map(int, row["id"].split(".")))
        assert told["detail"] == f"ROUGE-L {told['nearest']['score']:.3f}, above 0.7"
    (blocked, *_) = rows.find("", reason="blocked_word")["rows"]
    assert "above" not in rows.row(*map(int, blocked["id"].split(".")))["detail"]


@pytest.mark.parametrize(
    "words",
    ['"', "a OR", "NEAR(a b)", "*", "instruction:x", "'; DROP TABLE row; --", "-x", "\ud800"],
)
def test_what_is_typed_is_never_syntax(rows: Rows, words: str) -> None:
    rows.find(words)
    assert rows.find("")["matches"] > 400


def test_a_row_says_where_it_comes_from(tmp_path: Path) -> None:
    """The prompt is, to the byte, the one that was sent; so are answer and decision."""
    sent: dict[int, Prompt] = {}

    def answer(prompt: Prompt) -> str:
        sent[prompt.index] = prompt
        return answer_of(prompt)

    folder = synthetic_run(tmp_path, 30, answer, vectors=False)
    rows = page_rows(folder)
    told = rows.row(3, 1)
    assert told["prompt"] == sent[3].text
    assert told["demonstrations"] == list(sent[3].demonstrations)
    assert told["answer"] == answer_of(sent[3])
    assert told["model"] == "scripted"
    with RunReader(folder) as run:
        decision = run.decision(3, 1)
    assert decision is not None
    assert told["reason"] == decision.reason
    assert decision.record is not None
    assert told["fields"] == [[name, value] for name, value in decision.record.items()]
    with pytest.raises(InputError, match="no row"):
        rows.row(3, 99)
    rows.close()


def test_a_run_shows_prompts_of_the_seeds_it_kept(tmp_path: Path) -> None:
    own = read_seeds(bundled_seeds())[:5]
    keep(own, tmp_path)
    assert kept_seeds(tmp_path, fingerprint(own)) == own
    assert kept_seeds(tmp_path, fingerprint(own), bundled_seeds()) == []
    (tmp_path / KEPT).write_text("no JSON")
    assert kept_seeds(tmp_path, fingerprint(own)) == []
    bundled = read_seeds(bundled_seeds())
    assert kept_seeds(tmp_path, fingerprint(bundled)) == bundled


def test_rows_decided_later_are_found(tmp_path: Path) -> None:
    """The page goes on with the run: what is committed while it is open is found."""
    synthetic_run(tmp_path, 30, vectors=False)
    rows = page_rows(tmp_path)
    before = rows.find("")["matches"]
    synthetic_run(tmp_path, 60, vectors=False)
    assert rows.find("")["matches"] > before
    assert rows.state()["accepted"] == 60
    rows.close()


# -- whom it answers ------------------------------------------------------------------------------


def test_security_26_the_token_becomes_a_cookie(page: Served) -> None:
    """The link sets a cookie that scripts cannot read, and leads to an address without a token."""
    with httpx.Client(trust_env=False) as client:
        entered = client.get(page.link)
        assert entered.status_code == 303
        assert entered.headers["location"] == "/"
        cookie = entered.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert client.get(f"{page.url}/").status_code == 200
    for token in ("", "x", TOKEN[:-1], TOKEN + "x", "ü"):
        with httpx.Client(trust_env=False) as stranger:
            refused = stranger.get(f"{page.url}/enter", params={"token": token})
            assert refused.status_code == 401
            assert "set-cookie" not in refused.headers


@pytest.mark.parametrize(
    "path", ["/", "/api/state", "/api/rows", "/report", "/metrics", "/static/view.js", "/x"]
)
def test_security_26_nothing_without_the_token(page: Served, path: str) -> None:
    for given in ("", "Bearer", "Bearer x", "Basic " + TOKEN):
        assert page.get(path, authorization=given).status_code == 401


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example", "[::1]:80"]
)
def test_security_27_another_name_is_refused(page: Served, host: str) -> None:
    """DNS rebinding: a page that makes its own name resolve to this machine gets nothing."""
    assert page.get("/api/state", host=host).status_code == 421


def test_security_27_another_origin_is_refused(page: Served) -> None:
    assert page.get("/api/state", origin=page.url).status_code == 200
    for origin in ("http://evil.example", "null", "https://127.0.0.1", "http://127.0.0.1:1"):
        assert page.get("/api/state", origin=origin).status_code == 403
    assert page.get("/api/state", sec_fetch_site="cross-site").status_code == 403


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"])
def test_security_28_it_is_read_only(page: Served, method: str) -> None:
    for path in ("/api/state", "/", "/enter", "/nowhere"):
        assert page.ask(method, path).status_code == 405


@pytest.mark.parametrize(
    "path",
    ["/", "/enter", "/api/state", "/api/row/999999/0", "/static/view.css", "/none", "/report"],
)
def test_security_29_every_answer_is_fenced(page: Served, path: str) -> None:
    headers = page.get(path).headers
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert "unsafe" not in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert not any(name.startswith("access-control") for name in headers)


@pytest.mark.parametrize(
    "path",
    ["/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/static//etc/passwd",
     "/static/%00", "/../../etc/passwd", "/static/view.html"],
)  # fmt: skip
def test_security_31_no_path_leads_out(page: Served, path: str) -> None:
    """Sent as it is, since a client would tidy it up."""
    with socket.create_connection(("127.0.0.1", page.port), timeout=10) as connection:
        head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\nConnection: close\r\n"
        connection.sendall(f"{head}Authorization: Bearer {TOKEN}\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.split(b" ", 2)[1] in (b"404", b"400")
    assert b"root:" not in answer
    assert b"import" not in answer


@pytest.mark.parametrize(
    "query",
    ["before=x", "before=-1", "before=" + "9" * 40, "status=x&reason=%00", "q=" + "a" * 5000],
)
def test_odd_questions_get_an_answer(page: Served, query: str) -> None:
    assert page.get(f"/api/rows?{query}").status_code == 200
    assert page.get("/api/row/99999999999999999999/0").status_code == 404


def test_metrics_are_the_stores_counts(page: Served) -> None:
    text = page.get("/metrics").text
    assert "woolmill_accepted_records_total 400\n" in text
    assert re.search(r'woolmill_refused_pieces_total\{reason="blocked_word"\} \d+', text)
    assert 'woolmill_tokens_total{kind="prompt"}' in text


def test_metrics_say_what_a_run_cost(tmp_path: Path) -> None:
    """By the prices of the run; without any there is no such line, rather than a wrong 0."""
    priced = synthetic_run(tmp_path / "priced", 20, vectors=False,
                           price_prompt=1e6, price_completion=2e6)  # fmt: skip
    free = synthetic_run(tmp_path / "free", 20, vectors=False)
    with RunReader(priced) as run, RunReader(free) as other:
        counts = run.counts()
        cost = counts.prompt_tokens + 2 * counts.completion_tokens
        assert f"woolmill_cost_total {cost:.6f}\n" in metrics(run)
        assert "cost" not in metrics(other)


def test_the_run_keeps_a_metrics_file(tmp_path: Path) -> None:
    """What stands in it at the end is what the page serves; it may change when a run goes on."""
    run, path = tmp_path / "run", tmp_path / "woolmill.prom"
    command = ["generate", "--backend", "scripted", "--no-semantic", "--out", str(run)]
    for target in (10, 20):
        with pytest.raises(SystemExit, match=r"^0$"):
            main([*command, "--target", str(target), "--metrics-file", str(path)])
        assert f"woolmill_accepted_records_total {target}\n" in path.read_text()
    with RunReader(run) as reader:
        assert path.read_text() == metrics(reader)
        decided = reader.counts().last_decided
    assert decided is not None
    assert f"woolmill_decided_requests_total {decided[0] + 1}\n" in path.read_text()
    assert f'woolmill_run_info{{folder="{run}",recipe="alpaca"}} 1\n' in path.read_text()
    assert "woolmill_running 0\n" in path.read_text()
    with closing(RunStore.open(run, reader.manifest)) as store:
        assert "woolmill_running 1\n" in metrics(store)
    assert path.stat().st_mode & 0o777 == 0o644  # node-exporter is another user


def test_fault_120_a_metrics_file_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One warning; the run is not affected."""
    command = ["generate", "--backend", "scripted", "--no-semantic", "--target", "10"]
    nowhere = tmp_path / "no" / "woolmill.prom"
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*command, "--out", str(tmp_path / "run"), "--metrics-file", str(nowhere)])
    told = capsys.readouterr()
    assert "accepted 10 of 10" in told.out
    assert told.err.count("the run goes on") == 1


def test_a_metrics_file_in_the_store_s_place_is_not_written(tmp_path: Path) -> None:
    """Nor where the run has yet to begin."""
    run = tmp_path / "run"
    command = ["generate", "--backend", "scripted", "--no-semantic", "--target", "10"]
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*command, "--out", str(run), "--metrics-file", str(run / "run.sqlite")])
    with RunReader(run) as reader:
        assert "woolmill_accepted_records_total 10\n" in metrics(reader)


# -- slow, many, taken ----------------------------------------------------------------------------


def test_fault_121_a_slow_client_is_ended(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that never ends its headers (slowloris), and one that sends a body without end."""
    monkeypatch.setattr(server_module, "HEADERS_S", 0.2)
    with served(run_folder) as page:
        with socket.create_connection(("127.0.0.1", page.port), timeout=10) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nA: b")
            assert ended(connection)
        with socket.create_connection(("127.0.0.1", page.port), timeout=10) as connection:
            head = (
                f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\nContent-Length: 1000000\r\n\r\n"
            )
            connection.sendall(head.encode())
            assert b" 413 " in connection.recv(65536)
        assert page.get("/api/state").status_code == 200


def test_fault_121_two_hundred_connections_are_bounded(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the limit connections are closed at once; when the others go, the page answers."""
    monkeypatch.setattr(server_module, "HEADERS_S", 60.0)
    with served(run_folder) as page:
        with ExitStack() as stack:
            connections = [
                stack.enter_context(socket.create_connection(("127.0.0.1", page.port), timeout=10))
                for _ in range(200)
            ]
            closed = [connection for connection in connections if is_closed(connection)]
            assert len(closed) >= 200 - server_module.CONNECTIONS - 1
        with httpx.Client(transport=httpx.HTTPTransport(retries=20), trust_env=False) as client:
            headers = {"authorization": f"Bearer {TOKEN}"}
            assert client.get(f"{page.url}/api/state", headers=headers).status_code == 200


def ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def is_closed(connection: socket.socket) -> bool:
    """Whether the server ended it; asks after every connection was taken or refused."""
    connection.settimeout(0.02)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


def test_security_32_too_many_requests_are_put_off(
    page: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "PER_SECOND", 2)
    with httpx.Client(trust_env=False, headers={"authorization": f"Bearer {TOKEN}"}) as client:
        codes = [client.get(f"{page.url}/static/view.css").status_code for _ in range(30)]
    assert set(codes) == {200, 429}


def test_fault_120_a_taken_port_gives_the_next(run_folder: Path) -> None:
    first, moved = bind("127.0.0.1", 0)
    taken = first.getsockname()[1]
    second, moved = bind("127.0.0.1", taken)
    assert moved
    assert second.getsockname()[1] != taken
    first.close()
    second.close()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--host", "0.0.0.0"], UsageError),
        (["--host", "192.0.2.1"], UsageError),
        (["--host", "example"], UsageError),
        (["--host", "0.0.0.0", "--expose"], UsageError),
    ],
)
def test_security_25_only_this_machine_unless_said(
    run_folder: Path, arguments: list[str], error: type[Exception]
) -> None:
    done = CliRunner().invoke(cli, ["view", str(run_folder), *arguments])
    assert isinstance(done.exception, error)


def test_a_chosen_token_is_not_printed(run_folder: Path) -> None:
    """What is printed ends in logs; the variable's name stands in the link instead."""
    command = [sys.executable, "-m", "engine", "view", str(run_folder), "--port", "0"]
    given = {**os.environ, "WOOLMILL_VIEW_TOKEN": TOKEN}
    with subprocess.Popen(command, env=given, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        link = process.stdout.readline().strip()
        process.send_signal(signal.SIGINT)
    assert TOKEN not in link
    assert link.endswith("/enter?token=$WOOLMILL_VIEW_TOKEN")


def test_a_short_token_is_refused(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WOOLMILL_VIEW_TOKEN", "short")
    done = CliRunner().invoke(cli, ["view", str(run_folder)])
    assert isinstance(done.exception, ConfigError)


# -- nothing acts ---------------------------------------------------------------------------------


def test_security_30_hostile_rows_are_text(tmp_path: Path, chromium: Chromium) -> None:
    """In Chromium: list and detail of hostile rows, no element of theirs, a silent console, nobody
    asked, and the title is ours."""
    with canary() as (address, asked):
        folder = hostile_run(tmp_path / "run", address)
        with served(folder) as page:
            for row in ("0.1", "5.1"):
                seen = chromium.open(f"{page.link}#{row}", settle_ms=3000)
                assert seen.console == []
                assert MARK not in seen.title
                assert seen.title.endswith("Woolmill")
                assert 'data-rows="50"' in seen.dom
                assert "<h2>raw answer" in seen.dom or "raw answer</summary>" in seen.dom
                elements = {name.lower() for name in re.findall(r"<([a-zA-Z]+)", seen.dom)}
                assert not elements & {"img", "svg", "iframe", "base", "object", "style"}
                assert seen.dom.count("<script") == seen.dom.count("<link") == 1
                assert "\u202e" not in seen.dom
    assert asked == []


def test_the_page_says_why_a_limit_is_where_it_is(
    run_folder: Path, tmp_path: Path, chromium: Chromium
) -> None:
    """In Chromium: the latest change in one line, all of them below it, and names are text."""
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    changes = [
        {"endpoint": name, "at_s": 60.0, "old": old, "new": new, "who": who, "why": why}
        for name, old, new, who, why in (
            ("other", 4, 8, "goodput", "doubling"),
            ("<b>here", 8, 7, "refusals", "refused with 7 in flight"),
        )
    ]
    path = folder / "run.sqlite"
    with closing(connect(path, write=True)) as connection:
        checksum = Checksum(read_run_id(connection, path))
        put_meta(connection, checksum, "limits", changes)
    with served(folder) as page:
        seen = chromium.open(page.link, settle_ms=3000)
    assert seen.console == []
    latest = "7 in flight: refused with 7 in flight · &lt;b&gt;here"
    assert f"<summary>last limit {latest}</summary>" in seen.dom, "nobody writes the run"
    assert f"8 → {latest} (refusals)" in seen.dom
    assert seen.dom.index("8 → 7 in flight") < seen.dom.index("4 → 8 in flight")
    assert "<b>" not in seen.dom
