"""What the trainer never does with what it is given: each line a rule."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.launch import finish, start
from trainer.checkpoint import Damaged, read_manifest, verify

pytestmark = pytest.mark.slow

SOURCES = sorted((Path(__file__).parents[2] / "trainer").rglob("*.py"))


def names(tree: ast.AST) -> set[str]:
    """Every imported module and every dotted name that is called."""
    out: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            out |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call):
            out.add(ast.unparse(node.func))
    return out


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_security_19_the_source_executes_no_data(path: Path) -> None:
    """No pickle, eval, exec, torch.load, remote code or shell; and nothing of the engine."""
    tree = ast.parse(path.read_text())
    forbidden = {"eval", "exec", "torch.load", "os.system", "yaml.load", "joblib.load"}
    for name in names(tree):
        assert name not in forbidden
        assert name.split(".")[0] not in {"pickle", "dill", "marshal", "shelve", "engine"}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in {
            "trust_remote_code", "allow_pickle", "shell",
        }:  # fmt: skip
            assert ast.unparse(node.value) == "False"


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("bomb-went-off"),)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, llama: Path, records_file: Path) -> Path:
    """A real checkpoint of two ranks."""
    root = tmp_path_factory.mktemp("checkpoint")
    arguments = [
        *("--model_name_or_path", str(llama), "--data_path", str(records_file)),
        *("--output_dir", str(root / "out"), "--dataset_cache_dir", str(root / "cache")),
        *("--max_steps", "1", "--save_steps", "1", "--model_max_length", "200"),
        *("--global_batch_size", "2", "--per_device_train_batch_size", "1"),
    ]
    done = finish(start(arguments, root / "logs", ranks=2))
    assert [rank.exit_code for rank in done] == [0, 0], done[0].output
    return root / "out" / "checkpoint-1"


def test_a_checkpoint_is_safetensors_and_a_manifest(checkpoint: Path) -> None:
    """Nothing in it can execute."""
    assert sorted(path.suffix for path in checkpoint.iterdir()) == [
        ".json", ".safetensors", ".safetensors",
    ]  # fmt: skip
    assert verify(checkpoint) == read_manifest(checkpoint)
    assert read_manifest(checkpoint).world_size == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "safetensors: No such file or directory"),
        ("flipped", "its SHA-256 is not the manifest's"),
        ("truncated", "its SHA-256 is not the manifest's"),
        ("manifest missing", "manifest.json: No such file"),
        ("manifest torn", "manifest.json is torn or altered"),
        ("manifest edited", "manifest.json is torn or altered"),
        ("planted", "evil.safetensors is not in the manifest"),
    ],
)
def test_fault_124_every_kind_of_damage_is_seen(
    checkpoint: Path, tmp_path: Path, damage: str, message: str
) -> None:
    """Missing, flipped, truncated, torn, edited, or with a file too many."""
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    manifest = tmp_path / "manifest.json"
    shard = min(tmp_path.glob("*.safetensors"))
    body = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "flipped":
        body[len(body) // 2] ^= 4
        shard.write_bytes(body)
    elif damage == "truncated":
        shard.write_bytes(body[:-1])
    elif damage == "manifest missing":
        manifest.unlink()
    elif damage == "manifest torn":
        manifest.write_text(manifest.read_text()[:-9])
    elif damage == "manifest edited":
        manifest.write_text(manifest.read_text().replace('"step": 1', '"step": 2'))
    else:
        (tmp_path / "evil.safetensors").write_bytes(body)
    with pytest.raises(Damaged) as caught:
        verify(tmp_path)
    assert message in str(caught.value)


def test_security_20_pickles_planted_in_a_checkpoint_are_never_opened(
    checkpoint: Path, records_file: Path, llama: Path, tmp_path: Path
) -> None:
    """DCP's own .metadata and .distcp are pickles: beside a whole checkpoint they are ignored."""
    out = tmp_path / "out" / "checkpoint-1"
    out.mkdir(parents=True)
    for path in checkpoint.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    for name in (".metadata", "__0_0.distcp", "optimizer.pt"):
        (out / name).write_bytes(pickle.dumps(Bomb()))
    arguments = [
        *("--model_name_or_path", str(llama), "--data_path", str(records_file), "--resume"),
        *("--output_dir", str(tmp_path / "out"), "--dataset_cache_dir", str(tmp_path / "cache")),
        *("--max_steps", "1", "--save_steps", "1", "--model_max_length", "200"),
        *("--global_batch_size", "2", "--per_device_train_batch_size", "1"),
    ]
    (done,) = finish(start(arguments, tmp_path / "logs"))
    assert done.exit_code == 0, done.output
    assert "resumed from checkpoint-1, written by 2 processes" in done.output
    assert not list(tmp_path.rglob("bomb-went-off"))
    assert not Path("bomb-went-off").exists()


def test_security_22_a_pickled_model_does_not_execute(
    llama: Path, records_file: Path, tmp_path: Path
) -> None:
    """A model folder with a malicious pytorch_model.bin, and none of safetensors, is refused (78)
    and nothing of it runs.
    """
    for path in llama.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    arguments = [
        *("--model_name_or_path", str(tmp_path), "--data_path", str(records_file)),
        *("--output_dir", str(tmp_path / "out"), "--dataset_cache_dir", str(tmp_path / "cache")),
    ]
    (done,) = finish(start(arguments, tmp_path / "logs"))
    assert done.exit_code == 78, done.output
    assert "holds no model that transformers can load" in done.output
    assert not Path("bomb-went-off").exists()
