"""Every command of README and docs runs, in order, page by page.

They run as they stand but for what a test cannot have: servers are a loopback server, hosted models
the one it serves, targets small, models in this process the scripted backend. ``make`` goals are
looked up in the Makefile, ``pip`` extras in pyproject.toml, and the trainer's command lines are
parsed (tests/trainer/test_docs.py runs those of its page).
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import click
import httpx
import pytest
import yaml

from benchmarks.server import Behaviour, Server
from engine.cli.generate import generate
from engine.cli.main import cli, main
from engine.loop.command import loop
from engine.loop.ledger import Ledger
from engine.loop.settings import load_loop
from engine.models import NAMES
from engine.recipes.seeds import bundled_seeds
from engine.settings import load_config
from tests.engine.batches.shapes import OpenAI
from tests.engine.batches.world import KEY, answer_elsewhere
from tests.engine.loop.test_ledger import DONE, START

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TO_READ = ("architecture.md", "reference.md")
"""Pages without a command to try; tests/docs/test_reference.py looks at the second."""
PAGES = [
    *(ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md")),
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in TO_READ),
]
MOST = 25
"""Accepted records that a command of the docs gets to ask for."""
SERVED = "toy"
SERVERS = ("--base-url", "--endpoints")
LOCAL_SERVER = "http://127.0.0.1:8000/v1"
"""As programs of the docs have it."""


def steps(page: Path) -> list[tuple[str, str]]:
    """What a reader does, in order: ("", command) for a line behind ``$`` in a console block, and
    (file, text) for a block that is named after a file.
    """
    blocks = re.findall(
        r"^```(\w+)(?: ([\w.-]+))?\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S
    )
    found: list[tuple[str, str]] = []
    for kind, file, text in blocks:
        if file:
            found.append((file, text))
        elif kind == "console":
            lines = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
            found += [("", re.sub(r"\s+#.*", "", line)) for line in lines]
    return found


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A loopback server that stands in for every server of the docs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = Server(Behaviour(model=SERVED))
    asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
    yield server.url
    asyncio.run_coroutine_threadsafe(server.stop(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.timeout(120)
def test_the_commands_of_a_page_run(
    page: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seed_tasks.jsonl").write_bytes(bundled_seeds().read_bytes())
    (tmp_path / "people.csv").write_text("name,job\nAda,beekeeper\nGrace,train driver\n")
    (tmp_path / "questions.jsonl").write_text('{"id": 1, "question": "Why is the sky blue?"}\n')
    listed = steps(page)
    assert listed
    if any("runs/demo" in line for _, line in listed):
        run(["generate", "--backend", "scripted", "--target", "20", "--out", "runs/demo"])
    for file, line in listed:
        if file:
            text = line.replace(LOCAL_SERVER, f"{address}/v1")
            (tmp_path / file).write_text(text, encoding="utf-8")
            continue
        try:
            run_line(line, address, monkeypatch)
        except AssertionError as exc:
            raise AssertionError(f"{page.name}: $ {line}\n{exc}") from exc


def run_line(line: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if line.startswith("export "):
        name, _, value = line.removeprefix("export ").partition("=")
        monkeypatch.setenv(name, value if value.isascii() else "sk-0123456789")
        return
    program, *arguments = shlex.split(line)
    if program == "make":
        goals = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(arguments) <= set(goals)
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extra in re.findall(r"\[([\w,-]+)\]", line):
            assert set(extra.split(",")) <= project["optional-dependencies"].keys()
    elif program == "python" and arguments[0].endswith(".py"):
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout
    elif program in ("torchrun", "python"):
        from trainer.config import parse

        if "trainer.show" in arguments:  # the trainer's flags, and three of its own
            from trainer.show import parsed

            parsed(arguments[arguments.index("trainer.show") + 1 :])
        elif "trainer.sample" in arguments:
            from trainer.sample import parser

            parser().parse_args(arguments[arguments.index("trainer.sample") + 1 :])
        else:
            program = next(word for word in arguments if word in ("trainer", "trainer.evaluate"))
            parse(arguments[arguments.index(program) + 1 :])
    elif arguments[:1] == ["loop"]:
        in_rounds(arguments[1:])
    elif arguments[:1] == ["view"]:
        look_at(arguments)
    elif "--ray" in arguments:  # tests/ray runs them
        on_ray(arguments)
    elif "--provider" in arguments:
        in_batches(arguments, monkeypatch)
    elif arguments[:2] == ["batch", "export"]:
        run(arguments)
        answer_elsewhere(Path(arguments[-1]), Path("answers.jsonl"))
    elif arguments[:2] == ["models", "fetch"]:
        assert arguments[2] in NAMES  # tests/engine/test_models.py fetches them
    else:
        assert program == "woolmill"
        run(substituted(arguments, address))


def substituted(arguments: list[str], address: str) -> list[str]:
    """The arguments with what a test cannot have replaced."""
    if arguments[0] != "generate":
        return arguments
    given = dict(pairwise(arguments))
    new = list(arguments)
    for i, (flag, value) in enumerate(pairwise(arguments), 1):
        if flag in ("--target", "--num_instructions_to_generate"):
            new[i] = str(min(int(value), MOST)) if int(value) > 100 else value
        elif flag == "--base-url":
            new[i] = address
        elif flag == "--model" and not given.keys().isdisjoint(SERVERS):
            new[i] = SERVED
        elif flag == "--backend":
            new[i] = "scripted"
        elif flag == "--model":
            new[i] = "scripted"
    chosen = not given.keys().isdisjoint(("--backend", "--config", *SERVERS))
    return new if chosen else [*new, "--backend", "scripted"]


def on_ray(arguments: list[str]) -> None:
    """Without a cluster the command is read, and what it asks for is settled."""
    command, *flags = arguments
    if command == "generate":
        given = generate.make_context("generate", flags).params
        assert load_config(given.pop("config_file"), given).ray == "auto"
    else:
        found = cli.get_command(click.Context(cli), command)
        assert found is not None
        assert found.make_context(command, flags).params["ray"] == "auto"


def in_rounds(arguments: list[str]) -> None:
    """What a loop leaves where its command line is right; tests/crash/test_loops.py plays one."""
    given = loop.make_context("loop", arguments).params
    config = load_loop(given.pop("config_file"), given)
    config.out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(config.out)
    ledger.begin(START)
    ledger.add(DONE)


def in_batches(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in batches, whose provider is a double, or this machine."""
    given = dict(pairwise(arguments))
    target = str(min(int(given["--target"]), MOST))
    if given["--provider"] == "file":
        run([*arguments, "--target", target])
        return
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with OpenAI() as provider:
        asked = [provider.url if each == given.get("--base-url") else each for each in arguments]
        if "--base-url" not in given:
            asked += ["--base-url", provider.url, "--tail", "batch"]
        run([*asked, "--target", target, "--poll", "0.05"])


def run(arguments: list[str]) -> None:
    """Run the command line in this process; near-duplicates by meaning need a model's time."""
    compares = arguments[0] in ("generate", "redecide", "merge")
    if compares and {"--no-semantic", "--drop-failed"}.isdisjoint(arguments):
        arguments = [*arguments, "--no-semantic"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    expected = (75,) if "--wait" in arguments else (0, None)
    assert ended.value.code in expected, f"exit status {ended.value.code}"


def look_at(arguments: list[str]) -> None:
    """Start the view as a person would, open its link, and end it with Ctrl-C."""
    command = [sys.executable, "-m", "engine", *arguments, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        link = process.stdout.readline().strip()
        with httpx.Client(trust_env=False, follow_redirects=True) as client:
            assert client.get(link).status_code == 200
            origin = link.split("/enter")[0]
            assert client.get(f"{origin}/api/state").json()["accepted"] > 0
        process.send_signal(signal.SIGINT)
    assert process.returncode in (0, 130)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_pictures_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_python_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(["generate", "--backend", "scripted", "--target", "5", "--out", "runs/first"])
    text = (ROOT / "docs" / "quick-start.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) >= 5


def test_the_batch_script_is_a_script_and_the_job_a_job(tmp_path: Path) -> None:
    """No cluster is at hand: bash reads the script, and the job's command line is parsed."""
    page = dict(steps(ROOT / "docs" / "deploying.md"))
    script = tmp_path / "woolmill.sbatch"
    script.write_text(page["woolmill.sbatch"])
    subprocess.run(["bash", "-n", script], check=True)
    job = yaml.safe_load(page["woolmill.yaml"])["spec"]["template"]["spec"]
    (container,) = job["containers"]
    command, *flags = container["args"]
    flags[flags.index("/settings/run.toml")] = str(tmp_path / "run.toml")
    (tmp_path / "run.toml").write_text(page["run.toml"])
    assert command == "generate"
    given = generate.make_context("generate", flags).params
    config = load_config(given.pop("config_file"), given)
    assert config.out == Path("/data/run")
    assert config.drain_timeout_s < job["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in job["volumes"]
    }
    assert config.key_env in {variable["name"] for variable in container["env"]}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_completion(shell: str) -> None:
    script = Path(sys.executable).with_name("woolmill")
    wanted = {"_WOOLMILL_COMPLETE": f"{shell}_source", "PATH": os.environ["PATH"]}
    done = subprocess.run([script], env=wanted, capture_output=True, text=True, check=True)
    assert "_woolmill_completion" in done.stdout


def test_the_pages_are_few_and_short() -> None:
    pages = sorted((ROOT / "docs").glob("*.md"))
    assert 0 < len(pages) <= 16
    lengths = {page.stem: len(page.read_text().splitlines()) for page in pages}
    del lengths["reference"]  # made from the code, to look things up in
    assert lengths.pop("training") < 265  # a program of its own, with tables of what it takes
    for page in ("writing-recipes", "staged-recipes", "python", "deploying", "running-large"):
        assert lengths.pop(page) < 210  # with whole files to copy
    assert max(lengths.values()) < 120
