"""The command line: what a person types, sees and gets back as a status."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from benchmarks.server import Behaviour, Server
from engine.cli.ending import END
from engine.cli.main import ForPeople, main
from engine.errors import DiskError, StoppedError, WoolmillError
from engine.report.figures import figures
from engine.run.display import SilentDisplay
from engine.run.generate import Result
from engine.run.generate import generate as run_to_its_end
from engine.run.progress import Display, Progress, Stop
from engine.settings import RunConfig
from engine.stages import stages_of_run
from engine.store import RunStore

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def woolmill(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    """Run the command in this process: (exit status, standard output, standard error)."""
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in argv])
    assert isinstance(caught.value.code, int)
    out, err = capsys.readouterr()
    return caught.value.code, out, err


def scripted(out: Path, *more: str) -> list[str]:
    return ["generate", "--backend", "scripted", "--no-semantic", "--out", str(out), *more]


@pytest.mark.parametrize(
    ("typed", "meant"), [("--traget", "--target"), ("--max-token", "--max-tokens")]
)
def test_a_mistyped_flag_is_told_with_the_nearest_one(
    capsys: pytest.CaptureFixture[str], typed: str, meant: str
) -> None:
    status, _, err = woolmill(capsys, "generate", typed, "5")
    assert status == 64
    assert f"No such option '{typed}'. Did you mean '{meant}'?" in err


ENDED = {"json": '"status": 143, "reason": "stopped by SIGTERM"', "text": ""}


@pytest.mark.parametrize(("format", "told"), ENDED.items(), ids=ENDED)
def test_sigterm_while_it_waits_for_a_server_ends_in_order(
    tmp_path: Path, format: str, told: str
) -> None:
    """Also where a shell started it in the background, which ignores SIGINT."""
    words = ["--base-url", "http://127.0.0.1:9/v1", "--wait-for-server", "60", "--no-semantic"]
    command = [sys.executable, "-m", "engine", "generate", *words, "--log-format", format]
    with subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "Waiting up to" in line:
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
    assert process.returncode == 143
    assert told in rest
    assert "Traceback" not in rest


def test_generate_export_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The main job: records, datasets in three formats, and figures that add up."""
    run = tmp_path / "run"
    status, out, _ = woolmill(capsys, *scripted(run, "--target", "30"))
    assert status == 0
    assert "accepted 30 of 30" in out
    assert str(run / "alpaca_data.json") in out

    rows = json.loads((run / "alpaca_data.json").read_text())
    assert len(rows) == 30
    assert all(list(row) == ["instruction", "input", "output"] for row in rows)

    jsonl, messages = tmp_path / "rows.jsonl", tmp_path / "chat.jsonl"
    assert woolmill(capsys, "export", run, "--format", "jsonl", "-o", jsonl)[0] == 0
    assert woolmill(capsys, "export", run, "--format", "messages", "-o", messages)[0] == 0
    lines = [json.loads(line) for line in jsonl.read_text().splitlines()]
    assert [line["instruction"] for line in lines] == [row["instruction"] for row in rows]
    assert all(len(line["most_similar_instructions"]) == 10 for line in lines)
    assert all(0 < line["avg_similarity_score"] < 1 for line in lines)
    chat = json.loads(messages.read_text().splitlines()[0])["messages"]
    assert [turn["role"] for turn in chat] == ["user", "assistant"]

    status, out, _ = woolmill(capsys, "report", run, "--format", "json")
    figures = json.loads(out)
    assert status == 0
    assert figures["accepted"] == 30
    assert figures["responses"] == figures["requests"]
    assert figures["parsed"] == 30 + sum(figures["rejected"].values())
    assert figures["tokens"]["completion"] > 0


def test_the_end_says_what_there_is_what_it_took_and_where_to_look(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Over all sessions of the run, with the prices that the last one had."""
    run, prices = tmp_path / "run", ("--price-prompt", "1000000", "--price-completion", "0")
    woolmill(capsys, *scripted(run, "--target", "30"))
    status, out, _ = woolmill(capsys, *scripted(run, "--target", "120", *prices))
    assert status == 0
    with RunStore.read(run) as store:
        counts = store.counts()
    refused = sum(counts.reasons.values())
    lines = out.splitlines()
    assert lines[0].startswith("accepted 120 of 120 in ")
    assert refused
    assert lines[1].startswith(f"refused  {refused} (")
    assert all(f"{reason} {n}" in lines[1] for reason, n in counts.reasons.items())
    spent = f"{counts.prompt_tokens:,} in, {counts.completion_tokens:,} out"
    assert lines[2] == f"tokens   {spent}; cost {counts.prompt_tokens:,}.00"
    assert lines[-1] == f"look     woolmill view {run}   or   woolmill report {run} --format md"


def events(text: str) -> list[dict[str, Any]]:
    """Every line is JSON, and the last one alone is the end."""
    read = [json.loads(line) for line in text.splitlines()]
    assert [event["event"] == "end" for event in read] == [False] * (len(read) - 1) + [True]
    return read


ENDS = {
    "done": ("--target 20", 0, "done"),
    "stopped": ("--target 500 --max-requests 3", 75, "--max-requests"),
    "a number that is none": ("--target x", 64, "--target"),
    "an unknown flag": ("--tarrget 5", 64, "--tarrget"),
    "a wrong setting": ("--target 0", 78, "--target"),
    "no such seeds": ("--seeds {folder}/none", 65, "none"),
    "no server": ("--backend http --base-url http://127.0.0.1:9 --model m", 69, "127.0.0.1:9"),
}


@pytest.mark.parametrize(("more", "status", "said"), ENDS.values(), ids=ENDS)
def test_json_logs_have_no_bare_line_and_end_in_an_event(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, more: str, status: int, said: str
) -> None:
    words = [*more.format(folder=tmp_path).split(), "--max-outage", "0.2", "--log-format", "json"]
    got, out, err = woolmill(capsys, *scripted(tmp_path / "run", *words))
    assert (got, out) == (status, "")
    end = events(err)[-1]
    assert end["status"] == status
    assert said in end["reason"]
    assert list(end) == ["time", "event", *END], "null where a run did not begin"
    if status in (0, 75):
        dataset = json.loads(Path(end["dataset"]).read_text())
        assert len(dataset) == end["accepted"]
        assert end["completion_tokens"] > 0
    assert (end["resume"] is not None) == (status == 69)  # the cap must be raised first


def test_json_logs_as_a_setting_and_a_bug_as_an_event(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("engine.run.settle.read_seeds", broken)
    config = tmp_path / "run.toml"
    config.write_text('log_format = "json"')
    status, out, err = woolmill(capsys, *scripted(tmp_path / "run", "--config", str(config)))
    assert (status, out) == (70, "")
    assert "RuntimeError: boom" in events(err)[-1]["traceback"]


def test_a_mistake_in_a_file_that_wants_json_is_an_event(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "run.toml"
    config.write_text('log_format = "json"\ntargett = 5')
    status, out, err = woolmill(capsys, "generate", "--config", str(config))
    assert (status, out) == (78, "")
    assert "unknown setting 'targett'; did you mean 'target'?" in events(err)[-1]["reason"]
    text = ("generate", "--config", str(config), "--log-format", "text")
    assert woolmill(capsys, *text)[2].startswith("woolmill: error: ")


@pytest.mark.anyio
async def test_a_server_that_still_loads_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing listens when the run starts; it begins as soon as something does."""
    monkeypatch.setattr("engine.run.servers.ASKED_EVERY_S", 0.05)
    server = Server(Behaviour())
    with socket.socket() as probe:  # a port that is free, and stays so
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    class Notes(SilentDisplay):
        def note(self, message: str) -> None:
            said.append(message)
            if "--wait-for-server" in message:
                tasks.start_soon(server.start, port)

    said: list[str] = []
    settings = {"base_url": f"http://127.0.0.1:{port}", "semantic": False, "target": 5}
    config = RunConfig.model_validate(
        {**settings, "out": tmp_path / "run", "wait_for_server_s": 30, "max_tokens": 500}
    )
    async with anyio.create_task_group() as tasks:
        result = await run_to_its_end(config, Notes())
        await server.stop()
    assert result.stop.reached
    assert result.progress.accepted == 5
    assert sum("--wait-for-server" in message for message in said) == 1


def test_alpacas_own_options_are_aliases(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, out, _ = woolmill(
        capsys, "generate", "--backend", "scripted", "--no-semantic",
        "--num_instructions_to_generate", "5", "--output_dir", tmp_path, "--model_name", "m",
        "--num_prompt_instructions", "2", "--request_batch_size", "5",
    )  # fmt: skip
    assert status == 0
    assert "accepted 5 of 5" in out


def test_settings_come_from_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(f'target = 7\nbackend = "scripted"\nsemantic = false\nout = "{tmp_path}/r"')
    assert "accepted 7 of 7" in woolmill(capsys, "generate", "--config", config)[1]


def test_a_bad_row_names_both_ways_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole commands, and never the same one alone, which would only stop there again."""
    rows, good = tmp_path / "rows.jsonl", [json.dumps({"question": f"Why {n}?"}) for n in range(9)]
    rows.write_text("\n".join([*good[:6], "{broken", *good[6:]]))
    words = scripted(tmp_path / "run", "--recipe", "respond", "--rows", str(rows))

    def said(*more: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["woolmill", *words, *more])
        status, _, err = woolmill(capsys, *words, *more)
        return status, err.splitlines()

    same = f"woolmill {shlex.join(words)}"
    status, lines = said()
    assert status == 65
    assert lines[-2:] == [
        f"mend {rows}:7, then resume with: {same}",
        f"or leave such rows out with: {same} --on-bad-row skip",
    ]
    status, lines = said("--log-format", "json")
    assert json.loads(lines[-1])["resume"] is None
    assert said("--on-bad-row", "skip")[0] == 0
    shutil.rmtree(tmp_path / "run")
    assert said()[0] == 65
    rows.write_text("\n".join([*good[:6], '{"question": "mended"}', *good[6:]]))
    assert said()[0] == 0


def test_going_on_is_the_same_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, err = woolmill(capsys, *scripted(tmp_path, "--target", "30", "--max-requests", "5"))
    assert status == 75
    assert "go on with a higher --max-requests" in err
    assert "resume with: " not in err  # which could only stop again
    assert woolmill(capsys, *scripted(tmp_path, "--target", "30"))[0] == 0


RUN = "generate --backend scripted --no-semantic --out {folder}/run"
HTTP = "generate --no-semantic --out {folder}/run --base-url"
MISTAKES = {
    "unknown command": ("generat", 64, "generat"),
    "unknown option": (f"{RUN} --targt 3", 64, "--target"),
    "no number": (f"{RUN} --target x", 64, "--target"),
    "out of range": (f"{RUN} --target 0", 78, "--target"),
    "key in argv": (f"{RUN} --api-key sk-1", 64, "--api-key"),
    "missing seeds": (f"{RUN} --seeds {{folder}}/none", 65, "--seeds"),
    "bad seeds": (f"{RUN} --seeds {{folder}}/seeds.jsonl", 65, "seeds.jsonl:1"),
    "seeds are a folder": (f"{RUN} --seeds {{folder}}", 64, "--seeds"),
    "missing config": (f"{RUN} --config {{folder}}/none.toml", 78, "--config"),
    "http without endpoint": ("generate --backend http", 78, "base_url"),
    "no scheme": (f"{HTTP} 127.0.0.1:9", 78, "--base-url"),
    "key in url": (f"{HTTP} http://u:p@127.0.0.1:9", 78, "--base-url"),
    "no port": (f"{HTTP} http://127.0.0.1:65536", 78, "--base-url"),
    "key in a header": (
        f"{HTTP} http://127.0.0.1:9 --header X-Org=sk-proj-Ab3dEf6hIj9lMn2pQr5t",
        78,
        "X-Org=env:",
    ),
    "key in a query": (
        f"{HTTP} http://127.0.0.1:9 --query x=sk-proj-Ab3dEf6hIj9lMn2pQr5t",
        78,
        "--query x",
    ),
    "key in a body": (
        f"""{HTTP} http://127.0.0.1:9 --extra-body '{{{{"api_key": "abc"}}}}'""",
        78,
        "'api_key'",
    ),
    "a field that is never sent": (
        f"{HTTP} http://127.0.0.1:9 --without Temprature",
        78,
        "did you mean 'temperature'?",
    ),
    "password in a proxy": (
        f"{HTTP} http://127.0.0.1:9 --proxy http://me:abc@h",
        78,
        "HTTPS_PROXY",
    ),
    "a number beyond 64 bits": (f"{RUN} --target {10**21}", 78, "--target"),
    "a name too long": (f"generate --backend scripted --out {'x' * 300}", 73, "too long"),
    "open key file": (f"{HTTP} http://127.0.0.1:9 --key-file {{folder}}/key", 78, "600"),
    "no key file": (f"{HTTP} http://127.0.0.1:9 --key-file {{folder}}/none", 78, "none"),
    "out is a file": ("generate --out {folder}/key", 64, "--out"),
    "no run": ("report {folder}/none", 65, "none"),
    "export of no run": ("export {folder} -o x", 65, "no run"),
    "unknown model name": ("models fetch smollm", 78, "smollm2"),
}


@pytest.mark.parametrize(("command", "expected", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_with_its_status(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    expected: int,
    said: str,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")  # it would go before the file
    (tmp_path / "seeds.jsonl").write_text("{}\n")
    (tmp_path / "key").write_text("sk-1")
    (tmp_path / "key").chmod(0o644)
    status, out, err = woolmill(capsys, *shlex.split(command.format(folder=tmp_path)))
    assert (status, out) == (expected, "")
    assert err.startswith("woolmill: error: ")
    assert err.count("\n") == 1
    assert said in err
    assert "sk-1" not in err


def test_fault_002_a_dead_port(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Nothing listens: 69 after --max-outage, with the address."""
    config = tmp_path / "run.toml"
    config.write_text("max_outage_s = 0.2")
    status, _, err = woolmill(
        capsys, "generate", "--config", config, "--base-url", "http://127.0.0.1:9/v1",
        "--no-semantic", "--out", tmp_path / "run", "--model", "m",
    )  # fmt: skip
    assert status == 69
    assert "127.0.0.1:9" in err


def test_export_into_a_missing_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    woolmill(capsys, *scripted(tmp_path / "run", "--target", "3"))
    missing = tmp_path / "no" / "rows.json"
    status, _, err = woolmill(capsys, "export", tmp_path / "run", "-o", missing)
    assert status == 73
    assert str(missing) in err


def test_fault_071_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    """``woolmill report … | head`` with nobody at the other end."""
    woolmill_run = [sys.executable, "-m", "engine"]
    subprocess.run([*woolmill_run, *scripted(tmp_path, "--target", "3")], check=True, cwd=ROOT)
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*woolmill_run, "report", str(tmp_path)], stdout=write, stderr=subprocess.PIPE, cwd=ROOT
    )
    os.close(write)
    assert done.returncode == 143
    assert done.stderr == b""


def test_a_problem_that_doctor_finds_is_no_closed_pipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its exit code is the one that it promises, also by the way that the program takes."""
    settings = tmp_path / "run.toml"
    settings.write_text('[[endpoint]]\nurl = "http://127.0.0.1:9/v1"\nkey_env = "NOT_SET"\n')
    status, out, _ = woolmill(capsys, "doctor", "--config", settings)
    assert status == 78
    assert "NOT_SET is not set" in out


@pytest.mark.parametrize(
    ("logger", "line"),
    [
        ("engine.limits.endpoint", "woolmill: it is out of service"),
        ("transformers", "woolmill: transformers: it is out of service"),
    ],
)
def test_a_line_of_the_log_names_other_packages_alone(logger: str, line: str) -> None:
    told = logging.makeLogRecord({"name": logger, "msg": "it is %s", "args": ("out of service",)})
    assert ForPeople("woolmill: %(message)s").format(told) == line


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = woolmill(capsys)
    assert status == 64
    assert err.startswith("Usage: ")


@pytest.mark.anyio
@pytest.mark.parametrize("recipe", ["alpaca", "self-instruct"])
async def test_a_stop_says_what_it_dropped(recipe: str, tmp_path: Path) -> None:
    """Requests that a slow server had not answered within the drain time are named at the end, in
    the report, and while they are waited for; also those of a first stage.
    """
    config = tmp_path / "run.toml"
    config.write_text("drain_timeout_s = 1.0\nmax_in_flight = 8\n")
    async with Server(Behaviour(latency_s=600.0)) as server:
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "engine", "generate", "--config", str(config)],
            *["--base-url", server.url, "--no-semantic", "--out", str(tmp_path / "run")],
            *["--recipe", recipe],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        while server.ledger.asked.total() < 8:  # noqa: ASYNC110 - another process brings them
            await anyio.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
    assert process.returncode == 130
    assert "SIGINT: sending nothing more, waiting up to 1 s for 8 calls in flight" in err.decode()
    dropped = "dropped  8 requests, perhaps billed, whose answers were not waited for"
    assert f"{dropped}; the same command sends them again" in out.decode()
    first = next(iter(stages_of_run(tmp_path / "run")))
    with RunStore.read(first.folder) as run:
        told = figures(run)
    assert told["dropped_at_a_stop"] == told["requests"] == 8


def test_an_error_that_an_interrupt_brought_about_is_an_interrupt(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As uvloop's loop fails to close when Ctrl-C comes within its own closing."""

    def interrupted(*args: object, **kwargs: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("Cannot close a running event loop")

    monkeypatch.setattr("engine.run.settle.read_seeds", interrupted)
    status, _, err = woolmill(capsys, *scripted(tmp_path))
    assert status == 130
    assert "Traceback" not in err


STOPS = {
    "disk": (DiskError("no disk"), 74),
    "budget": (StoppedError("no money"), 75),
    None: (None, 70),
}


@pytest.mark.parametrize(("error", "status"), STOPS.values(), ids=map(str, STOPS))
def test_what_ended_a_run_first_gives_its_status(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: WoolmillError | None,
    status: int,
) -> None:
    """An export that fails afterwards, by a bug even, is said beside it and hides nothing."""

    async def ended(config: RunConfig, display: Display) -> Result:
        progress = Progress(target=5, accepted=5, sent=3, answered=3)
        return Result(stop=Stop(error=error), progress=progress, folder=config.out, seconds=1.0)

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("engine.run.generate.generate", ended)
    monkeypatch.setattr("engine.store.RunStore.read", broken)
    got, out, err = woolmill(capsys, *scripted(tmp_path))
    assert got == status
    said = [line for line in err.splitlines() if line.startswith("woolmill: error: ")]
    assert said[0].endswith(str(error)) == (error is not None)
    assert "a bug of ours (RuntimeError: boom)" in said[-1]
    assert "in broken" in err
    assert "dataset" not in out


def test_a_bug_is_status_70_with_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("engine.run.settle.read_seeds", broken)
    status, _, err = woolmill(capsys, *scripted(tmp_path))
    assert status == 70
    assert "RuntimeError: boom" in err
