"""Children: one place starts them, with an environment that holds no key and no stranger's code."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import secrets
from engine.backends.openai.address import read_headers
from engine.backends.vllm.backend import VllmBackend
from engine.backends.vllm.servers import Server, plan
from engine.decide.process import Deciding
from engine.processes import children as processes
from engine.processes.children import environment, python_command
from engine.settings import RunConfig
from engine.store import Manifest, RunStore
from tests.engine.backends.test_vllm import child_pid

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STARTS = re.compile(
    r"(.*\.)?(subprocess|multiprocessing|concurrent)\..*"
    r"|os\.(system|popen|exec|spawn|posix_spawn|fork|startfile)\w*"
    r"|(.*\.)?(create_subprocess_\w+|subprocess_(exec|shell)|open_process|run_process|Popen)"
    r"|(.*\.)?ProcessPoolExecutor"
)
ALONE = {ROOT / "engine/processes/children.py", ROOT / "engine/processes/tether.py"}
"""The second is a program of its own in a child whose environment is already the allowed one."""

KEYS = {
    "MISTRAL": "0f9e8d7c6b5a4938271605canary",
    "DATABASE_URL": "postgres://user:hunter2canary@db/x",
    "PGPASS": "canary-pgpass-1",
    "PGPASSWORD": "canary-pgpass-2",
    "OPENAI_API_KEY": "sk-canary0123456789",
    "AWS_SECRET_ACCESS_KEY": "canary-aws-1234",
    "GITHUB_PAT": "ghp_canary123456",
    "VLLM_API_KEY": "canary-vllm-1234",
    "NUMBA_BORROWED": "token=0f9e8d7c6b5a4938271605canary",
    "ORG_OF_MINE": "Bearer 77canary0918273645",
    "CUDA_BORROWED": "77canary0918273645",
    "HF_TOKEN": "hf_canary123456",
    "PIP_INDEX_URL": "http://user:canary-pip-12@127.0.0.1:1/simple",
}
"""Variables that the person has; a run reads its key from MISTRAL, and one repeats that key."""


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The person's environment, and a key that was read."""
    monkeypatch.setattr(secrets, "_variables", set())
    monkeypatch.setattr(secrets, "_keys", set())
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    secrets.read_key(env="MISTRAL")
    read_headers(["X-Org=env:ORG_OF_MINE"])


def environ_of(pid: int) -> dict[str, str]:
    """The environment that the kernel gave to the process."""
    while not (raw := Path(f"/proc/{pid}/environ").read_bytes()):
        continue  # it is on its way from one program to the next
    entries = raw.decode(errors="replace").split("\0")
    return dict(entry.partition("=")[::2] for entry in entries if entry)


def told(pid: int) -> set[str]:
    """Which of ``KEYS`` a process knows, by name or by value."""
    seen = environ_of(pid)
    assert seen["PATH"] == os.environ["PATH"]
    return {n for n, value in KEYS.items() if n in seen or value in seen.values()}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "engine").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_nothing_else_starts_a_process(path: Path) -> None:
    """What starts one without a list of what it may see would be found here."""
    if path in ALONE:
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert not STARTS.fullmatch(name), f"{path}:{node.lineno}: {name}"
        elif isinstance(node, ast.ImportFrom) and node.module in ("subprocess", "multiprocessing"):
            assert {alias.name for alias in node.names} <= {"PIPE", "DEVNULL"}, path


def test_the_list_is_of_what_is_allowed(keys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody thought of stays out; what computing needs goes on."""
    needed = {
        "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS",
        "HF_HOME", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "VLLM_CPU_KVCACHE_SPACE",
        "XDG_CACHE_HOME", "LC_ALL", "TMPDIR", "WOOLMILL_HOME", "TRANSFORMERS_CACHE",
    }  # fmt: skip
    others = {"SOME_SERVICE", "WOOLMILL_VIEW_TOKEN", "PYTHONSTARTUP", "PYTHONINSPECT", "BASH_ENV"}
    proxies = {"HTTPS_PROXY", "no_proxy", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"}
    for name in needed | others | proxies:
        monkeypatch.setenv(name, "/x")
    for needs in ((), ("engine",), ("hub",), ("pip",), ("engine", "hub")):
        seen = environment(*needs)
        assert needed <= set(seen)
        assert not others & set(seen)
        assert proxies <= set(seen) if {"hub", "pip"} & set(needs) else not proxies & set(seen)
        assert ("HF_TOKEN" in seen) == ("hub" in needs)
        assert ("PIP_INDEX_URL" in seen) == ("pip" in needs)
        assert not set(seen) & (set(KEYS) - {"HF_TOKEN", "PIP_INDEX_URL"})
        assert seen["PYTHONSAFEPATH"] == "1"


def test_an_empty_entry_of_the_module_path_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands for the folder one is in, and is mostly a slip: ``PYTHONPATH=$PYTHONPATH:/x``."""
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}/x{os.pathsep}")
    assert environment("engine")["PYTHONPATH"] == f"{ROOT}{os.pathsep}/x"
    assert "PYTHONPATH" not in environment("hub")
    assert "PYTHONPATH" not in environment("pip")


@pytest.mark.parametrize("name", ["pip", "engine", "orjson", "sitecustomize", "signal"])
def test_a_python_child_imports_nothing_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Nor do the processes that it starts in its turn."""
    (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    inner = f"import {name}" if name != "sitecustomize" else "import site"
    code = f"import subprocess, sys\n{inner}\nsubprocess.run([sys.executable, '-c', {inner!r}])"
    done = processes.run(python_command("-c", code), environment("engine"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "RAN").exists()


@pytest.mark.anyio
async def test_the_process_that_decides(keys: None, tmp_path: Path) -> None:
    """It asks nobody anything, and gets no key at all."""
    config = RunConfig(backend="scripted", semantic=False, out=tmp_path / "run", key_env="MISTRAL")
    RunStore.open(config.out, Manifest(fixed={})).close()
    deciding = Deciding(config, [], lambda note: None)
    await deciding.start()
    try:
        assert deciding._process is not None
        assert told(deciding._process.pid) == set()
    finally:
        await deciding.aclose()


@pytest.fixture
def sleeper(tmp_path: Path) -> Path:
    """An interpreter that only waits, whatever it is told to run."""
    path = tmp_path / "python"
    path.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "import time; time.sleep(50)"\n'
    )
    path.chmod(0o755)
    return path


@pytest.mark.anyio
async def test_vllm_s_child(keys: None, tmp_path: Path, sleeper: Path) -> None:
    """It may fetch its model from the hub, and gets the hub's token alone."""
    backend = VllmBackend(str(tmp_path), python=sleeper)
    starting = asyncio.get_running_loop().create_task(backend.start())
    while backend._child is None:  # noqa: ASYNC110 - the backend tells nobody that it has a child
        await asyncio.sleep(0)
    pid = child_pid(backend)
    assert told(pid) == {"HF_TOKEN"}
    os.kill(pid, signal.SIGKILL)
    await asyncio.wait([starting])
    assert starting.exception() is not None


def test_vllm_s_servers(keys: None, tmp_path: Path, sleeper: Path) -> None:
    """As its child, and the tether beside them."""
    [server] = plan(str(tmp_path), python=sleeper, log_dir=tmp_path, replicas=1)
    assert server._command.count("-P") == 2
    server.launch()
    try:
        assert told(server._process.pid) == {"HF_TOKEN"}
        assert told(child_of(server)) == {"HF_TOKEN"}
    finally:
        server.stop()


def child_of(server: Server) -> int:
    """The process that the tether has started."""
    children = Path(f"/proc/{server._process.pid}/task/{server._process.pid}/children")
    while not (text := children.read_text().split()):
        assert server._process.poll() is None
    return int(text[0])


@pytest.fixture
def silent_index() -> Iterator[tuple[str, threading.Event]]:
    """A package index that takes a connection and never answers; set when one has come."""
    came = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def take() -> None:
            connection, _ = listening.accept()
            came.set()
            with connection:
                while connection.recv(4096):
                    pass

        threading.Thread(target=take, daemon=True).start()
        yield f"http://user:canary-pip-12@127.0.0.1:{listening.getsockname()[1]}/simple", came


def test_pip(
    keys: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    silent_index: tuple[str, threading.Event],
) -> None:
    """It gets what it needs to reach its index, and no key of a model's host."""
    url, came = silent_index
    monkeypatch.setitem(KEYS, "PIP_INDEX_URL", url)
    code = "from engine import models, secrets\n"
    code += "from engine.backends.openai.address import read_headers\n"
    code += "secrets.read_key(env='MISTRAL')\nread_headers(['X-Org=env:ORG_OF_MINE'])\n"
    code += "models.fetch('minilm')"
    more = {"PIP_INDEX_URL": url, "PIP_RETRIES": "0", "WOOLMILL_HOME": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        env=os.environ | more | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    ) as fetching:
        try:
            assert came.wait(30)
            children = Path(f"/proc/{fetching.pid}/task/{fetching.pid}/children").read_text()
            pip = int(children.split()[0])
            assert told(pip) == {"PIP_INDEX_URL"}
            assert environ_of(pip)["PIP_INDEX_URL"] == url
            assert Path(f"/proc/{pip}/cwd").resolve().is_relative_to(tmp_path / "models")
            os.kill(pip, signal.SIGKILL)
            fetching.wait()
        finally:
            fetching.kill()


FORKS = """
import os, sys
from pathlib import Path

import engine

os.register_at_fork(after_in_child=lambda: Path(sys.argv[2]).touch())
if __name__ == "__main__":
    rows = engine.generate(
        "alpaca", backend="scripted", target=3, semantic=False, out=sys.argv[1], progress=False
    )
    print(len(list(rows)))
"""


def test_no_python_runs_between_a_fork_and_a_child_s_program(tmp_path: Path) -> None:
    """What a program or its libraries would do there may wait for a lock that another thread held,
    for ever. The run itself is in a thread of the program, on uvloop.
    """
    (tmp_path / "program.py").write_text(FORKS)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py", tmp_path / "run", tmp_path / "mark"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout == "3\n", done.stderr
    assert not (tmp_path / "mark").exists()
