"""Compiled code outlives a process: it is never older than its source, and never a fault."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import engine
from engine.dedup import code_cache
from tests.engine.stranger import as_stranger

pytestmark = pytest.mark.slow

ROOT = Path(engine.__file__).parents[1]
USE = """
from engine.dedup import code_cache, kernels
print(code_cache.folder())
print(kernels.f_measure(2, 4, 4), len(kernels.f_measure.stats.cache_hits))
"""
RIGHT = "0.5"


def use(
    home: Path | None,
    root: Path = ROOT,
    code: str = USE,
    *,
    env: dict[str, str] | None = None,
    stranger: bool = False,
) -> list[str]:
    """The lines that ``code`` prints in a process of its own; ``home`` is its WOOLMILL_HOME."""
    given = {"PATH": os.environ["PATH"], "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    given |= {"WOOLMILL_HOME": str(home)} if home else {}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(
        as_stranger(*command) if stranger else command,
        env=given | (env or {}),
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_person_is_told_once_that_it_compiles(tmp_path: Path) -> None:
    """What would look like a hang of half a minute."""
    told = "import logging, sys\nlogging.basicConfig(level=logging.INFO, stream=sys.stdout)\n" + USE
    first, second = use(tmp_path, code=told), use(tmp_path, code=told)
    said = [line for line in first if "compiling the search for near-duplicates" in line]
    assert len(said) == 1
    assert said[0].endswith("kept for later runs")
    assert not any("compiling" in line for line in second)


def test_the_second_process_reads_what_the_first_compiled(tmp_path: Path) -> None:
    """From a folder of this user's alone."""
    first, second = use(tmp_path), use(tmp_path)
    assert first == [str(Path(first[0])), f"{RIGHT} 0"]
    assert second == [first[0], f"{RIGHT} 1"]
    assert Path(first[0]).parent == tmp_path / "kernels"
    assert Path(first[0]).stat().st_mode & 0o777 == 0o700


def test_a_change_in_one_file_compiles_the_callers_in_others_again(tmp_path: Path) -> None:
    """A caller has the callee's code inlined: it must not keep the old one."""
    # Without the bytecode of this checkout, which Python takes where time and size are the same.
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "engine", tmp_path / "engine", ignore=without)
    package = tmp_path / "engine" / "dedup"
    (package / "caller.py").write_text(
        "from engine.dedup.kernels import compiled, f_measure\n\n\n"
        "@compiled\ndef call(lcs, m, n):\n    return f_measure(lcs, m, n)\n"
    )
    code = "from engine.dedup.caller import call\nprint(call(2, 4, 4), len(call.stats.cache_hits))"
    assert use(tmp_path, tmp_path, code) == [f"{RIGHT} 0"]
    assert use(tmp_path, tmp_path, code) == [f"{RIGHT} 1"]
    kernels = package / "kernels.py"
    before, state = kernels.read_text(), kernels.stat()
    assert "    if lcs == 0:\n        return 0.0\n" in before
    kernels.write_text(before.replace("    if lcs == 0:\n", "    if lcs >= 0:\n"))
    os.utime(kernels, ns=(state.st_atime_ns, state.st_mtime_ns))  # as an archive may unpack it
    assert use(tmp_path, tmp_path, code) == ["0.0 0"]


def test_without_a_home_the_place_is_temporary(tmp_path: Path) -> None:
    """No HOME and a user that has no name, as in a container, or homes that cannot be written."""
    tmp_path.chmod(0o777)
    uid = 54321 if os.geteuid() == 0 else os.geteuid()
    temporary = tmp_path / f"woolmill-{uid}" / "kernels"
    hits = 0
    for env in ({"HOME": "/proc/none"}, {"XDG_CACHE_HOME": "/proc/none"}, {"HOME": "/"}, {}):
        if env or os.geteuid() == 0:
            env |= {"TMPDIR": str(tmp_path)}
            where, said = use(None, env=env, stranger=True)
            assert (Path(where).parent, said) == (temporary, f"{RIGHT} {hits}"), env
            hits = 1


def test_without_a_safe_place_each_process_compiles_for_itself(tmp_path: Path) -> None:
    """A folder that others may have planted holds code that is not run."""
    assert use(None, env={"NUMBA_CACHE_DIR": "/proc/none"}) == ["None", f"{RIGHT} 0"]
    tmp_path.chmod(0o777)
    uid = 54321 if os.geteuid() == 0 else os.geteuid()
    (tmp_path / f"woolmill-{uid}").mkdir()
    (tmp_path / f"woolmill-{uid}").chmod(0o777)
    env = {"HOME": "/proc/none", "TMPDIR": str(tmp_path)}
    assert use(None, env=env, stranger=True) == ["None", f"{RIGHT} 0"]


def test_the_place_is_the_one_that_the_person_names(tmp_path: Path) -> None:
    """XDG_CACHE_HOME, and NUMBA_CACHE_DIR before it."""
    xdg = {"XDG_CACHE_HOME": str(tmp_path / "xdg")}
    (where, _) = use(None, env=xdg)
    assert Path(where).parent == tmp_path / "xdg" / "woolmill" / "kernels"
    (where, _) = use(None, env=xdg | {"NUMBA_CACHE_DIR": str(tmp_path / "numba")})
    assert Path(where).parent == tmp_path / "numba"


def test_a_folder_that_others_could_write_to_is_not_used(tmp_path: Path) -> None:
    """What is kept there is a pickle, and reading it runs what it says."""
    (where, _) = use(tmp_path)
    Path(where).chmod(0o777)
    assert use(tmp_path) == ["None", f"{RIGHT} 0"]
    shutil.rmtree(where)
    planted = tmp_path / "planted"
    planted.mkdir(mode=0o700)
    Path(where).symlink_to(planted)
    assert use(tmp_path) == ["None", f"{RIGHT} 0"]
    assert list(planted.iterdir()) == []


def test_damaged_files_are_made_again(tmp_path: Path) -> None:
    """A power cut may leave them empty: that costs a compilation, once."""
    (where, _) = use(tmp_path)
    for damage in (b"", b"not a pickle"):
        for file in Path(where).iterdir():
            file.write_bytes(damage)
        assert use(tmp_path) == [where, f"{RIGHT} 0"]
        assert use(tmp_path) == [where, f"{RIGHT} 1"]


def test_what_nobody_has_run_for_long_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another checkout's code stays while it is in use; what is not ours stays anyway."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    old, recent, foreign = tmp_path / "woolmill-old", tmp_path / "woolmill-new", tmp_path / "other"
    for path in (old, recent, foreign):
        path.mkdir()
        (path / "x.nbi").write_bytes(b"x")
    long_ago = time.time() - code_cache.UNUSED_S - 60
    for path in (old, foreign):
        os.utime(path, (long_ago, long_ago))
    made = code_cache.folder.__wrapped__()
    assert made is not None
    assert sorted(tmp_path.iterdir()) == sorted([recent, foreign, made])
