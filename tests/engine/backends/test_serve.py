"""Starting, watching and stopping servers, with small real servers in vLLM's place.

``tests/vllm`` has the same with vLLM itself.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from engine.backends.base import Failure
from engine.backends.vllm import servers as serve_module
from engine.backends.vllm.command import serve
from engine.backends.vllm.servers import ServedBackend, Server, plan, serving
from engine.errors import ConfigError, UnavailableError
from engine.run.display import SilentDisplay
from engine.run.generate import generate
from engine.settings import RunConfig, load_config
from engine.store import RunStore
from tests.engine.backends.test_vllm import prompt, wait_for_end

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]

# Answers every path with its process id; ``--dtype`` says how it fails.
FAKE_SERVER = """
import http.server, json, os, sys
sys.path.insert(0, ROOT)
from engine.backends.scripted import alpaca_text
print(f"process {os.getpid()}", file=sys.stderr)
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if options.get("--dtype") == "wrong":
    sys.exit("OSError: model not found")
if options.get("--dtype") == "large":
    sys.exit("torch.OutOfMemoryError: CUDA out of memory")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = options["--served-model-name"]
        card = {"id": name, "root": name, "max_model_len": 4096}
        models = json.dumps({"data": [card]})
        self.say(models if self.path.endswith("/models") else f"{os.getpid()} {name}")
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompts = asked["prompt"] if isinstance(asked["prompt"], list) else [asked["prompt"]]
        choices = [
            {"index": n, "text": alpaca_text(text, seed=asked["seed"]), "finish_reason": "stop"}
            for n, text in enumerate(prompts)
        ]
        usage = {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}
        self.say(json.dumps({"model": asked["model"], "choices": choices, "usage": usage}))
    def say(self, text):
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
http.server.ThreadingHTTPServer(("127.0.0.1", int(options["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter with which ``-m vllm.entrypoints.openai.api_server`` is the fake server."""
    monkeypatch.setattr(
        "engine.backends.vllm.servers.engine_arguments", dict
    )  # eager mode is a flag alone
    monkeypatch.setenv("WOOLMILL_HOME", str(tmp_path / "home"))
    program = tmp_path / "server.py"
    program.write_text(FAKE_SERVER.replace("ROOT", repr(str(ROOT))))
    path = tmp_path / "python"
    path.write_text(
        f'#!/bin/sh\nshift 3\nexec {shlex.quote(sys.executable)} {shlex.quote(str(program))} "$@"\n'
    )
    path.chmod(0o755)
    return path


def ask(server: Server) -> tuple[int, str]:
    """Process id and model name that the server answers with; waits while it is restarted."""
    url = server.base_url.removesuffix("/v1")
    while True:
        try:
            with urllib.request.build_opener().open(url) as answer:
                pid, name = answer.read().decode().split()
                return int(pid), name
        except OSError:
            assert not server.gone.is_set()


def test_replicas_are_endpoints_that_end_with_the_context(python: Path, tmp_path: Path) -> None:
    """Each listens on a port of its own with the model's name, and none is left."""
    with serving(str(tmp_path), python=python, replicas=2) as servers:
        answers = [ask(server) for server in servers]
        assert {name for _, name in answers} == {str(tmp_path)}
        assert len({server.base_url for server in servers}) == 2
        assert all(server.log_file.is_file() for server in servers)
    for pid, _ in answers:
        wait_for_end(pid)


def test_a_killed_server_comes_back_three_times(python: Path, tmp_path: Path) -> None:
    """It is the same endpoint again; the fourth death is the last."""
    with serving(str(tmp_path), python=python) as [server]:
        seen = set()
        for _ in range(4):
            pid, _ = ask(server)
            assert not server.gone.is_set()
            seen.add(pid)
            os.kill(pid, signal.SIGKILL)
            wait_for_end(pid)
        server.gone.wait()
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("dtype", "error", "says"),
    [("wrong", ConfigError, "model not found"), ("large", UnavailableError, "out of memory")],
)
def test_a_server_that_does_not_start(
    python: Path, tmp_path: Path, dtype: str, error: type[Exception], says: str
) -> None:
    """One line with the cause from the log, and where the log is."""
    with (
        pytest.raises(error, match=says) as caught,
        serving(str(tmp_path), python=python, args={"dtype": dtype}),
    ):
        pass
    assert "\n" not in str(caught.value)
    assert "vllm-" in str(caught.value)


def test_what_cannot_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter that is none, more GPUs than there are, code that comes with a model."""
    with (
        pytest.raises(ConfigError, match="is no program"),
        serving(str(tmp_path), python=tmp_path / "none"),
    ):
        pass
    monkeypatch.setattr(serve_module, "_gpus", lambda: ["0", "1"])
    with (
        pytest.raises(ConfigError, match="there are 2"),
        serving(str(tmp_path), replicas=2, args={"tensor_parallel_size": "2"}),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="never run"),
        serving(str(tmp_path), args={"trust_remote_code": "true"}),
    ):
        pass
    result = CliRunner().invoke(serve, [str(tmp_path), "--vllm-arg", "dtype"])
    assert result.exit_code == 2
    assert "is not KEY=VALUE" in result.output


def test_flags() -> None:
    """Arguments become the server's flags, switches with their negation."""
    given = {"enforce_eager": True, "enable_prefix_caching": False, "dtype": "float32", "seed": 3}
    assert serve_module.flags_of(given) == [
        "--enforce-eager", "--no-enable-prefix-caching", "--dtype", "float32", "--seed", "3"
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_servers_end_with_the_command(python: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, SIGTERM and kill -9 of ``woolmill serve`` leave no server behind."""
    program = (
        "import sys; import engine.backends.vllm.servers as s; s.engine_arguments = dict; "
        "from engine.backends.vllm.command import serve; "
        "serve.main(sys.argv[1:], standalone_mode=False)"
    )
    command = [sys.executable, "-c", program, str(tmp_path), "--vllm-python", str(python)]
    woolmill = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
    )
    assert woolmill.stdout is not None
    url = woolmill.stdout.readline().strip().removesuffix("/v1")
    with urllib.request.urlopen(url) as answer:
        pid = int(answer.read().split()[0])
    woolmill.send_signal(number)
    woolmill.wait()
    woolmill.stdout.close()
    wait_for_end(pid)


def run_of(python: Path, tmp_path: Path, **changed: Any) -> RunConfig:
    """Settings of a run on two servers; the model is a folder with nothing in it."""
    settings = {
        "backend": "vllm",
        "model": str(tmp_path),
        "serve": True,
        "replicas": 2,
        "vllm_python": python,
        "out": tmp_path / "run",
        "target": 12,
        "max_tokens": 256,
        "semantic": False,
    }
    return RunConfig.model_validate(settings | changed)


@pytest.mark.anyio
async def test_a_run_on_servers_of_its_own(python: Path, tmp_path: Path) -> None:
    """Two replicas answer over HTTP, both are used, and none is left when the run has ended."""
    config = run_of(python, tmp_path)
    result = await generate(config, SilentDisplay())
    assert result.stop.reached
    with RunStore.read(config.out) as store:
        assert len({row.record["instruction"] for row, _ in store.accepted() if row.record}) == 12
    logs = sorted(config.out.glob("vllm-*.log"))
    asked = [re.findall(r"POST .*completions", log.read_text()) for log in logs]
    assert len(asked) == 2
    assert all(asked)
    for log in logs:
        pid = re.search(r"process (\d+)", log.read_text())
        assert pid is not None
        await asyncio.to_thread(wait_for_end, int(pid[1]))


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("dtype", "error", "says"),
    [("wrong", ConfigError, "model not found"), ("large", UnavailableError, "not memory enough")],
)
async def test_a_run_whose_server_does_not_start(
    python: Path, tmp_path: Path, dtype: str, error: type[Exception], says: str
) -> None:
    """The run ends with the server's own cause before anything is asked."""
    config = run_of(python, tmp_path, vllm_arg={"dtype": dtype})
    with pytest.raises(error, match=says):
        await generate(config, SilentDisplay())


@pytest.mark.anyio
async def test_a_run_whose_servers_are_gone_for_good(python: Path, tmp_path: Path) -> None:
    """Nobody waits for an outage to end that cannot: exit code 69, with the log."""
    server, *_ = fleet = plan(str(tmp_path), python=python, log_dir=tmp_path)
    backend = ServedBackend(server, fleet, str(tmp_path))
    await backend.start()
    try:
        for _ in range(4):
            pid, _ = await asyncio.to_thread(ask, server)
            os.kill(pid, signal.SIGKILL)
            await asyncio.to_thread(wait_for_end, pid)
        await asyncio.to_thread(server.gone.wait)
        with pytest.raises(Failure) as caught:
            await backend.complete([prompt("Hello")])
    finally:
        await backend.aclose()
    assert caught.value.verdict.kind == "fatal"
    assert isinstance(caught.value.verdict.error, UnavailableError)
    assert "died 4 times: it died by SIGKILL" in str(caught.value)


def test_what_serve_goes_with() -> None:
    """A server of its own makes sense for vllm alone, which need not be said."""
    assert load_config(None, {"serve": True}).chosen_backend == "vllm"
    with pytest.raises(ConfigError, match="serve goes with backend vllm"):
        load_config(None, {"serve": True, "backend": "scripted"})
