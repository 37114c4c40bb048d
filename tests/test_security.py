"""Lines of the security list that concern the whole tree."""

from __future__ import annotations

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from engine.dedup import code_cache

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for name in ("engine", "trainer") for path in (ROOT / name).rglob("*.py"))

EXECUTES_DATA = {
    "eval", "exec", "pickle.load", "pickle.loads", "marshal.load", "marshal.loads", "shelve.open",
    "yaml.load", "faiss.read_index", "dill.load", "dill.loads", "joblib.load", "os.system",
    "os.popen", "compile",
}  # fmt: skip
FLAG = "trust_remote_code"
FORBIDDEN_KEYWORDS = {("allow_pickle", True), (FLAG, True), ("shell", True)}


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_is_executed(path: Path) -> None:
    """No call in the tree can run code out of data; torch.load takes weights alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        where = f"{path.relative_to(ROOT)}:{node.lineno}: {called(node)}"
        assert called(node) not in EXECUTES_DATA, where
        keywords = {
            (word.arg, word.value.value)
            for word in node.keywords
            if isinstance(word.value, ast.Constant)
        }
        assert not keywords & FORBIDDEN_KEYWORDS, where
        if called(node) == "torch.load":
            assert ("weights_only", True) in keywords, where


OPENERS = {ROOT / "engine" / "pretrained.py", ROOT / "trainer" / "opening.py"}
OPENS_A_MODEL = re.compile(
    r"(.*\.)?(from_pretrained|from_config|pipeline|SentenceTransformer|CrossEncoder)"
    r"|(.*\.)?(torch\.hub|hub)\.load|load_dataset|spacy\.load"
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_models_are_opened_in_one_place_and_never_with_their_code(path: Path) -> None:
    """A call that lacks the flag would ask the person, and run what a folder brings on a yes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not OPENS_A_MODEL.fullmatch(called(node)):
            continue
        where = f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        if called(node) == "spacy.load":  # knows no such flag: only the folder with pinned hashes
            assert ast.unparse(node.args[0]) == "models.fetch(PARSER)", where
            continue
        assert path in OPENERS, where
        flags = [ast.unparse(word.value) for word in node.keywords if word.arg == FLAG]
        assert flags == ["False"], where


FORKS = ROOT / "engine" / "processes" / "tether.py"
"""A program of its own, before it starts its thread."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_processes_are_spawned_and_never_forked_fault_077(path: Path) -> None:
    """A fork after threads were started inherits locks that nobody holds."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and path != FORKS:
            assert called(node) not in ("os.fork", "os.forkpty"), f"{path}:{node.lineno}"
        if isinstance(node, ast.Constant):
            assert node.value not in ("fork", "forkserver"), f"{path}:{node.lineno}"


@pytest.mark.slow
def test_a_run_writes_in_its_own_folder_only(tmp_path: Path) -> None:
    """Of all files that a whole run opens for writing, none lies outside its folder."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    log = tmp_path / "calls"
    run, kernels = tmp_path / "run", code_cache.folder()
    assert kernels is not None
    done = subprocess.run(
        [
            *("strace", "-f", "-qq", "-y", "-e", "trace=openat,rename,renameat,renameat2,mkdir"),
            *("-o", str(log), sys.executable, "-m", "engine", "generate", "--backend=scripted"),
            *(f"--out={run}", "--target=20", "--no-semantic", "--no-progress"),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(tmp_path / "none")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = set()
    for line in log.read_text(errors="replace").splitlines():
        if re.search(r"O_WRONLY|O_RDWR|O_CREAT", line) and " = -1 " not in line:
            path = re.search(r'"([^"]*)"', line)
            assert path is not None
            written.add(path[1])
    assert any(name.endswith("run.sqlite") for name in written)
    outside = {
        name
        for name in written
        # Compiled kernels are kept among woolmill's own caches.
        if not name.startswith((str(run), str(kernels), "/dev/", "/proc/"))
    }
    assert outside == set()


def test_a_run_s_files_are_its_owner_s_alone(tmp_path: Path) -> None:
    """Store, log and lock can be read by the person alone; so can a folder made for them."""
    from engine.store import Manifest, RunStore

    store = RunStore.open(tmp_path / "run", Manifest(fixed={}))
    for path in [tmp_path / "run", *(tmp_path / "run").iterdir()]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    store.close()


def test_a_symbolic_link_in_a_store_s_place_is_refused(tmp_path: Path) -> None:
    """Whoever can make names in the folder cannot make the run write elsewhere."""
    from engine.errors import InputError, OutputError
    from engine.store import Manifest, RunStore

    target = tmp_path / "precious"
    target.write_bytes(b"")
    for name, error in {"run.sqlite": InputError, "run.lock": OutputError}.items():
        folder = tmp_path / f"with-{name}"
        folder.mkdir()
        (folder / name).symlink_to(target)
        with pytest.raises(error):
            RunStore.open(folder, Manifest(fixed={}))
    assert target.read_bytes() == b""
