"""Bad input to the real command: one line, the exit code, nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.trainer.conftest import toy_records, write_records
from tests.trainer.launch import finish, start

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        ("no model", 78, "there is no such folder; check --model_name_or_path"),
        ("no hub", 69, "is no folder, and the model hub cannot be reached"),
        ("no tokenizer", 78, "holds no tokenizer that transformers can load"),
        ("no weights", 78, "holds no model that transformers can load"),
        ("torn weights", 65, "its weights are damaged"),
        ("foreign tokenizer", 78, "the two do not belong together"),
        ("wrong layer", 78, "has no 'OPTDecoderLayer'; did you mean 'LlamaDecoderLayer'?"),
        ("no data", 78, "there is no such file; check --data_path"),
        ("bad record", 65, "data.json#0: output is missing, not text"),
        ("all too long", 65, "records were dropped (too_long)"),
        ("output is a file", 73, "cannot be created"),
        ("output is taken", 73, "holds an earlier run (config.json)"),
        ("odd replicas", 78, "--replicas 3 does not divide 1 processes"),
        ("no tensorboard", 78, "--report_to trackio: pip install trackio"),
    ],
)
def test_bad_input_ends_in_one_line(
    llama: Path, tmp_path: Path, damage: str, code: int, message: str
) -> None:
    """What, where, what to do next."""
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    data = write_records(tmp_path / "data.json", toy_records(4))
    out = tmp_path / "out"
    more: list[str] = []
    if damage == "no model":
        shutil.rmtree(model)
    elif damage == "no hub":
        model = Path("someone/something")
    elif damage == "no tokenizer":
        (model / "tokenizer.json").unlink()
    elif damage == "no weights":
        (model / "model.safetensors").unlink()
    elif damage == "torn weights":
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "foreign tokenizer":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"vocab_size": 60}))
    elif damage == "wrong layer":
        more = ["--fsdp_transformer_layer_cls_to_wrap", "OPTDecoderLayer"]
    elif damage == "no data":
        data.unlink()
    elif damage == "bad record":
        write_records(data, [{"instruction": "a"}])
    elif damage == "all too long":
        more = ["--model_max_length", "4"]
    elif damage == "output is a file":
        out.write_text("")
    elif damage == "output is taken":
        out.mkdir()
        (out / "config.json").write_text("{}")
    elif damage == "odd replicas":
        more = ["--replicas", "3"]
    elif damage == "no tensorboard":
        more = ["--report_to", "trackio"]
    arguments = [
        *("--model_name_or_path", str(model), "--data_path", str(data), "--output_dir", str(out)),
        *("--dataset_cache_dir", str(tmp_path / "cache"), *more),
    ]
    (done,) = finish(start(arguments, tmp_path / "logs"))
    assert done.exit_code == code, done.output
    lines = [line for line in done.output.splitlines() if line.startswith("trainer: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in done.output
    assert not list(out.glob("*.safetensors"))


def test_two_runs_in_one_folder(llama: Path, tmp_path: Path) -> None:
    """The second is told so (75), and the first is left alone."""
    import fcntl

    (tmp_path / "out").mkdir()
    data = write_records(tmp_path / "data.json", toy_records(4))
    arguments = [
        *("--model_name_or_path", str(llama), "--data_path", str(data)),
        *("--output_dir", str(tmp_path / "out"), "--dataset_cache_dir", str(tmp_path / "cache")),
    ]
    with (tmp_path / "out" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (done,) = finish(start(arguments, tmp_path / "logs"))
    assert done.exit_code == 75
    assert "another run is training there" in done.output
