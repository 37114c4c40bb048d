"""``woolmill doctor``: what is installed, what would run, and what the machine's limits are.

It reads the run's input and asks its servers which models they serve, as the run does at its start;
it generates nothing and loads no model. Versions come from the packages' metadata.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio
import click
import orjson

from engine import models
from engine.backends.fleet import FileFleet
from engine.backends.settings import ray_address
from engine.decide.decider import uses_semantic
from engine.embeddings.asker import backend_of
from engine.errors import ConfigError, WoolmillError
from engine.run.servers import LOCAL_IS_MISSING
from engine.secrets import DEFAULT_VARIABLE, keep_from_children
from engine.settings import EMBEDDED_MODEL, EndpointConfig, RunConfig, load_config
from engine.store.space import RESERVE_BYTES, unsafe_filesystem
from engine.surroundings import cache_homes, cores, spelt_out
from engine.text import counted, visible

__all__ = ["diagnose", "doctor"]

EXTRAS = {
    "local": ("transformers", "torch", "faiss-cpu", "onnxruntime", "gguf", "accelerate"),
    "vllm": ("vllm",),
    "ray": ("ray",),
    "train": ("torch", "transformers", "safetensors", "pyarrow"),
    "report": ("vl-convert-python", "scikit-learn", "spacy"),
    "view": ("starlette", "uvicorn"),
    "parquet": ("pyarrow",),
    "tiktoken": ("tiktoken",),
    "repair": ("json-repair",),
    "verify": ("math-verify",),
}
IN_PROCESS = ("torch", "transformers")
"""Without these, nothing generates in this process."""
FILES_WANTED = 4096
"""Open files that a thousand connections beside the store need, with room."""


def diagnose(config_file: Path | None = None, ray: str | None = None) -> dict[str, Any]:
    """Everything that is found out, as plain JSON values; ``problems`` is for the person.

    ``ray``: the address of a cluster to look at; by default that of the settings, if there is one.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    extras = {name: {p: _version(p) for p in packages} for name, packages in EXTRAS.items()}
    run = _would_run(config_file)
    start = {} if "error" in run else _could_start(config_file)
    out = Path(run["out"]) if "out" in run else Path()
    where = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(where).free
    found: dict[str, Any] = {
        "woolmill": metadata.version("woolmill"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": cores(),
        "memory_gib": _memory_gib(),
        "gpus": sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*")),
        "open_files": {"now": soft, "most": hard},
        "disk_free_gib": round(free / 2**30, 1),
        "extras": extras,
        "models": {name: _state(name) for name in models.NAMES},
        "run": run,
        "start": start,
    }
    if address := ray or run.get("ray"):
        found["cluster"] = _cluster(address)
    found["problems"] = list(_problems(found, free, where))
    return found


def _cluster(address: str) -> dict[str, Any]:
    """What is seen of a Ray cluster, or the ``error`` that hides it."""
    from engine.backends.vllm.ray_fleet import look_at

    try:
        return {"address": address, **look_at(address)}
    except WoolmillError as error:
        return {"address": address, "error": str(error)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _state(name: str) -> str:
    """Whether a model that can be fetched is here, with every file as it must be."""
    if models.find(name) is not None:
        return "here"
    places = (home / "models" / name for home in cache_homes())
    return "damaged" if any(place.exists() for place in places) else "not here"


def _memory_gib() -> float | None:
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
    return round(pages / 2**30, 1)


def _would_run(config_file: Path | None) -> dict[str, Any]:
    """What ``woolmill generate`` would do with these settings; or the ``error`` and the ``status``
    that it would end with.
    """
    chosen: dict[str, Any] = {}
    try:
        config = load_config(config_file, {})
        endpoints = _endpoints(config)
        for endpoint in endpoints:
            keep_from_children(endpoint.key_env)  # what is no name must not be shown as one
        if config.semantic_key_env is not None:
            keep_from_children(config.semantic_key_env)
        has_rows = config.rows is not None or config.make_recipe([]).rows_path is not None
        chosen = {
            "backend": config.chosen_backend,
            "model": config.model
            or ("the model served" if config.chosen_backend == "http" else EMBEDDED_MODEL),
            "endpoints": [endpoint.url for endpoint in endpoints],
            "keys": {endpoint.key_env: endpoint.key_env in os.environ for endpoint in endpoints},
            "semantic": _compares(config) and uses_semantic(config),
            "embeddings": backend_of(config, None).name if config.semantic_url else None,
            "target": config.target
            if "target" in config.model_fields_set or not has_rows
            else None,
            "out": str(config.out),
        }
        if config.ray is not None:
            chosen |= {"ray": config.ray, "model_at": "servers that Ray places"}
        elif config.chosen_backend in ("transformers", "vllm"):
            # Only the default is got by itself.
            coming = config.model is None and models.find(EMBEDDED_MODEL) is None
            chosen["model_at"] = (
                "this machine, once it is downloaded"
                if coming
                else models.locate(config.model or EMBEDDED_MODEL)
            )
        if config.endpoints_file is not None and not endpoints:
            chosen["model_at"] = f"{config.endpoints_file}, which lists no server yet"
        if lack := _lack(config):
            raise ConfigError(lack)
    except WoolmillError as exc:
        return {**chosen, "error": str(exc), "status": exc.exit_code}
    return chosen


def _could_start(config_file: Path | None) -> dict[str, Any]:
    """What the start of the run comes to as far as it is free: what its input holds and its servers
    say; and the ``error`` and the ``status`` where it ends with one.
    """
    from engine.run.rehearsal import ask_servers, read_input, settled_stages

    came: dict[str, Any] = {}
    try:
        chain = settled_stages(load_config(config_file, {}))
        came["seeds"] = len(chain[0].tasks)
        came["rows"] = read_input(chain[0])
        if (rows := chain[0].rows) is not None:
            came |= {"more_rows": rows.count is None, "bad_rows": rows.bad.count}
        came["servers"] = [asdict(served) for served in anyio.run(ask_servers, chain)]
    except WoolmillError as exc:
        came |= {"error": str(exc), "status": exc.exit_code}
    return came


def _compares(config: RunConfig) -> bool:
    """Whether any stage of the recipe looks for near-duplicates at all."""
    return any(stage.compares for stage in config.make_recipe([]).stages)


def _endpoints(config: RunConfig) -> Sequence[EndpointConfig]:
    """Those that a run would ask now."""
    if config.endpoints_file is not None:
        return [config.endpoint_at(url) for url in FileFleet(config.endpoints_file).urls]
    return config.endpoints()


def _lack(config: RunConfig) -> str | None:
    """What the run needs and is not there, with how to get it."""
    for endpoint in _endpoints(config):
        name = endpoint.key_env
        if name != DEFAULT_VARIABLE and name not in os.environ and endpoint.key_file is None:
            return f"the environment variable {name} is not set; set it to the key"
    if (own := config.semantic_key_env) is not None and own not in os.environ:
        return f"the environment variable {own} is not set; set it to the key of --semantic-url"
    if config.ray is not None:
        return None  # vLLM is on the nodes
    if config.chosen_backend == "vllm" and _lacks_vllm(config.vllm_python):
        return "vllm is not installed here; see --vllm-python"
    if config.chosen_backend == "transformers" and not all(map(find_spec, IN_PROCESS)):
        return LOCAL_IS_MISSING
    return None


def _lacks_vllm(python: Path | None) -> bool:
    """Whether vLLM cannot be started; of another environment only that its interpreter runs."""
    return _version("vllm") is None if python is None else not os.access(python, os.X_OK)


def _problems(found: Mapping[str, Any], free: int, where: Path) -> Iterator[str]:
    for part in (found["run"], found["start"]):
        if "error" in part:
            yield str(part["error"])
    for served in found["start"].get("servers", ()):
        if served["failure"]:
            yield served["failure"]  # it names the server
    for name, state in found["models"].items():
        if state == "damaged":
            yield f"the model {name} is damaged; get it again with: woolmill models fetch {name}"
    if "error" in found.get("cluster", {}):
        yield str(found["cluster"]["error"])
    most = found["open_files"]["most"]
    if most != resource.RLIM_INFINITY and most < FILES_WANTED:  # a run raises the other itself
        yield (
            f"no more than {most} open files are allowed (ulimit -Hn); a thousand requests at once"
            f" need {FILES_WANTED}"
        )
    if free < 4 * RESERVE_BYTES:
        yield f"{where}: only {free >> 20} MiB are free"
    if warning := unsafe_filesystem(where):
        yield warning
    if not os.access(where, os.W_OK):
        yield f"{where}: cannot be written"
    if not os.access(tempfile.gettempdir(), os.W_OK):
        yield f"{tempfile.gettempdir()}: cannot be written; set TMPDIR"


def _address(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    try:
        return value and ray_address(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@click.option("--config", "config_file", type=click.Path(path_type=Path, dir_okay=False),
              help="Settings of the run that is meant.")  # fmt: skip
@click.option("--ray", metavar="auto|HOST:PORT", callback=_address,
              help="A Ray cluster to look at. [that of the settings]")  # fmt: skip
@click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text",
              show_default=True)  # fmt: skip
def doctor(config_file: Path | None, ray: str | None, format_: str) -> None:
    """Say what is installed, what would run, and what the limits are. The input's first rows are
    read, and servers are asked which models they serve; nothing is generated. Ends with the status
    of a run that could not begin (78: settings, 65: input, 69: no server, 77: key), or with 1 on
    another problem.

    \b
    woolmill doctor
    woolmill doctor --config woolmill.toml
    """
    found = diagnose(config_file, ray)
    if format_ == "json":
        click.echo(orjson.dumps(spelt_out(found), option=orjson.OPT_INDENT_2))
    else:
        for line in _lines(found):
            click.echo(visible(" ".join(line.splitlines())))  # servers name their models
    if found["problems"]:
        status = found["run"].get("status") or found["start"].get("status", 1)
        click.get_current_context().exit(status)


def _start_lines(start: Mapping[str, Any]) -> Iterator[str]:
    if start.get("seeds"):
        yield f"  {counted(start['seeds'], 'seed task')} read"
    if start.get("rows") is not None:
        which = f"the first {start['rows']:,}" if start["more_rows"] else f"all {start['rows']:,}"
        bad = f", {start['bad_rows']:,} are left out that cannot" if start["bad_rows"] else ""
        yield f"  {which} input rows can be read{bad}"
    for served in start.get("servers", ()):
        if served["failure"]:
            continue
        context = served["context_length"]
        what = f"serves {served['model']}" + (f", context {context:,} tokens" if context else "")
        unlisted = (
            f"answers, and does not list {served['model']}: only a request tells if it is there"
        )
        yield f"  {served['server']} {what if served['listed'] else unlisted}"


def _files(most: int) -> str:
    return "any number of" if most == resource.RLIM_INFINITY else f"{most}"


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"woolmill {found['woolmill']}, Python {found['python']}, {found['system']}"
    files = _files(found["open_files"]["most"])
    yield (
        f"{found['cpus']} CPUs, {len(found['gpus']) or 'no'} GPUs, {found['memory_gib']} GiB of"
        f" memory, {found['disk_free_gib']} GiB of disk free, {files} open files allowed"
    )
    for extra, packages in found["extras"].items():
        missing = [name for name, version in packages.items() if version is None]
        have = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
        state = f"install with: pip install 'woolmill[{extra}]'" if missing else have
        yield f"  {'-' if missing else '+'} {extra:9} {state}"
    for name, state in found["models"].items():
        how = "" if state == "here" else f"; get it with: woolmill models fetch {name}"
        yield f"  {'+' if state == 'here' else '-'} {name:14} {state}{how}"
    cluster = found.get("cluster", {})
    if "nodes" in cluster:
        yield (
            f"  Ray {cluster['ray']} at {cluster['address']}: {counted(cluster['nodes'], 'node')},"
            f" {counted(cluster['CPU'], 'CPU')}, {counted(cluster['GPU'], 'GPU')}"
        )
    run = found["run"]
    if "error" not in run:
        where = ", ".join(run["endpoints"]) or run.get("model_at", "this process")
        what = f"make {run['target']} rows" if run["target"] else "decide every input row"
        yield f"woolmill generate would {what} with {run['model']} by {run['backend']} ({where})"
        for name, is_set in run["keys"].items():
            yield f"  the key is {'' if is_set else 'not '}set ({name})"
        refused = "refused" if run["semantic"] else "not looked for"
        elsewhere = run["semantic"] and run["embeddings"]
        where = f", by embeddings of {run['embeddings']}" if elsewhere else ""
        yield f"  near-duplicates by meaning are {refused}{where}"
        yield from _start_lines(found["start"])
    for problem in found["problems"]:
        yield f"problem: {problem}"
