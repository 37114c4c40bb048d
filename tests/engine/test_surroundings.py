"""Users without a home, homes that cannot be written, and who else could write there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import models
from engine.errors import ConfigError, OutputError
from engine.settings import load_config
from engine.surroundings import cache_homes, is_private, writable_cache_home
from tests.engine.stranger import as_stranger

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_the_first_choice_is_the_person_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """WOOLMILL_HOME alone, else the cache of the desktop's specification, else the home's."""
    temporary = Path("/") / f"woolmill-{os.geteuid()}"
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    temporary = tmp_path / f"woolmill-{os.geteuid()}"
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.delenv("WOOLMILL_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert list(cache_homes()) == [Path("/h/.cache/woolmill"), temporary]
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert list(cache_homes()) == [Path("/x/woolmill"), temporary]
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert list(cache_homes()) == [Path("/h/.cache/woolmill"), temporary]
    monkeypatch.setenv("WOOLMILL_HOME", "~/w")
    assert list(cache_homes()) == [Path("/h/w")]


def test_a_named_place_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error with a name, and nothing goes elsewhere in silence."""
    monkeypatch.setenv("WOOLMILL_HOME", "/proc/none")
    with pytest.raises(OutputError, match="/proc/none; set WOOLMILL_HOME"):
        writable_cache_home()


def test_a_model_that_others_put_there_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image may bring models that its user can read and not write."""
    folder = tmp_path / "models" / "smollm2"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    done = subprocess.run(
        as_stranger(
            *(sys.executable, "-P", "-c"),
            "from engine import models; print(models.fetch('smollm2'), models.locate('smollm2'))",
        ),
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "WOOLMILL_HOME": str(tmp_path)},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [str(folder)] * 2, done.stderr


def test_whose_a_folder_is(tmp_path: Path) -> None:
    """Made where it is not there; a link, a file or what others can write to is none."""
    assert is_private(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder").stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "new")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o770)
    for name in ("link", "dangling", "file", "open", "file/below"):
        assert not is_private(tmp_path / name), name
    assert not (tmp_path / "nothing").exists()


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("home", "by_meaning"), [(None, True), ("/proc/none", False)])
def test_a_run_of_a_user_without_a_home(tmp_path: Path, home: str | None, by_meaning: bool) -> None:
    """It ends with every record, near-duplicates by meaning included; nothing is written but the
    run and what is temporary.
    """
    here, temporary = tmp_path / "here", tmp_path / "tmp"
    for folder in (tmp_path, here, temporary):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    env |= {"HOME": home} if home else {}
    model = models.find("minilm")
    assert model is not None, "make setup"
    command = [sys.executable, "-P", "-m", "engine", "generate", "--backend=scripted"]
    command += [f"--semantic-model={model}" if by_meaning else "--no-semantic"]
    command += ["--target=5", "--no-progress", "--out=run"]
    done = subprocess.run(
        as_stranger(*command), env=env, cwd=here, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads((here / "run" / "alpaca_data.json").read_text())) == 5
    assert [path.name for path in here.iterdir()] == ["run"]


def woolmill(*arguments: str | bytes, cwd: Path | bytes, **env: str) -> str:
    """The whole command in ``cwd``; what it prints, once it has ended as it should."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "engine", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode(errors="replace")


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    """Every command works on a run, a dataset and a folder whose names hold odd bytes."""
    here = os.fsencode(tmp_path) + b"/in \xff"
    os.mkdir(here)
    Path(os.fsdecode(here + b"/s\xfe.jsonl")).write_bytes(
        (ROOT / "engine/data/seed_tasks.jsonl").read_bytes()
    )
    settings = ("--backend=scripted", "--no-semantic", "--no-progress", b"--seeds=s\xfe.jsonl")
    woolmill("generate", *settings, "--target=3", b"--out=r\xff", cwd=here)
    more = (b"--metrics-file=m\xff", "--target=4")
    woolmill("generate", *settings, *more, b"--out=r\xff", cwd=here)  # goes on
    against = b"--against=s\xfe.jsonl"
    woolmill("generate", *settings, against, "--target=1", b"--out=a\xff", cwd=here)
    woolmill("verify", b"r\xff", cwd=here)
    for _ in range(2):  # the second replaces what the first wrote
        woolmill("export", b"r\xff", "--format=alpaca", b"-o", b"e\xff.json", cwd=here)
    told = json.loads(woolmill("report", b"r\xff", "--format=json", cwd=here))
    assert told["accepted"] == 4
    woolmill("report", b"r\xff", "-o", b"r\xff.md", cwd=here)
    woolmill("compare", b"r\xff", b"r\xff", "--format=json", cwd=here)
    woolmill("salvage", b"r\xff", "-o", b"s\xff", cwd=here)
    woolmill("merge", b"r\xff", b"s\xff", "-o", b"m\xffx", cwd=here)
    woolmill(
        *("dedup", b"e\xff.json", "-o", b"u\xff.json", "--no-semantic"),
        *(b"--decisions=d\xff.jsonl", b"--against=e\xff.json"),
        cwd=here,
    )
    woolmill("init", b"i\xff.toml", cwd=here)
    json.loads(woolmill("doctor", b"--config=i\xff.toml", "--format=json", cwd=here))


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "env",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
    ],
)
def test_a_terminal_that_takes_ascii_alone(tmp_path: Path, env: dict[str, str]) -> None:
    """What it cannot show is replaced, and nothing ends for it."""
    run = os.fsencode(tmp_path) + "/é".encode()
    settings = ("--backend=scripted", "--no-semantic", "--target=3")
    woolmill("generate", *settings, b"--out=" + run, cwd=tmp_path, **env)
    woolmill("verify", run, cwd=tmp_path, **env)
    woolmill("report", run, "--format=md", cwd=tmp_path, **env)
    woolmill("doctor", cwd=tmp_path, **env)


def test_a_model_s_name_is_text() -> None:
    """It is sent and kept as such; other bytes are a wrong setting and not a bug."""
    with pytest.raises(ConfigError, match=r"--model: m\\udcff holds bytes") as caught:
        load_config(None, {"model": "m\udcff", "backend": "scripted"})
    str(caught.value).encode()


def test_open_files_are_as_many_as_a_process_may_have() -> None:
    """A run starts with the soft limit of any shell, and raises it as far as it may."""
    lines = [
        "import resource, sys",
        "from engine.surroundings import allow_open_files",
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, int(sys.argv[1])))",
        "allow_open_files()",
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))",
    ]
    for most, allowed in ((2048, 2048), (256, 256)):
        command = [sys.executable, "-P", "-c", "\n".join(lines), str(most)]
        env = {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [str(allowed), str(most)]
