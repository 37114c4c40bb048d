"""Commands that a person may follow to the letter: each names every setting that it needs.

A run does not go on under other settings than those that its decisions follow from; ``redecide``
takes such up, and must be given all that differ. Then the run goes on under those alone, and
``generate`` must be given all that it would not settle so by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from engine.errors import ConfigError, WoolmillError
from engine.languages import ENGLISH
from engine.recipes.load import ALPACA
from engine.recipes.seeds import KEPT
from engine.run.manifest import DECISION, FREE, make_manifest
from engine.run.settings import ShowSection
from engine.run.settle import answered_by, settle, stages_of
from engine.sections import Flag, flag_of
from engine.settings import RunConfig, flag_name
from engine.stages import BELOW, root_of, stages_of_run
from engine.store import Manifest, RunReader
from engine.text import as_word

__all__ = ["REDECIDES", "as_flags", "generate_again", "refuse_other_settings"]

REDECIDES = frozenset(
    "recipe seeds scope carry language semantic_threshold semantic semantic_model semantic_url"
    " semantic_key_env rouge_threshold target".split()
)
"""Settings that are flags of ``woolmill redecide``."""
OF_SEMANTIC = ("semantic_threshold", "semantic_model", "semantic_precision")
"""Settings that a run without comparison by meaning keeps empty."""
TOLD_ELSEWHERE = frozenset(("out", "recipe_spec", "rows_identity", *ShowSection.model_fields))
"""Of the free settings: those that are written otherwise, or change nothing but what is shown."""


def refuse_other_settings(folder: Path, was: Manifest, now: Manifest) -> None:
    """Raises ConfigError where a run that was started with ``was`` cannot go on with ``now``."""
    differences = was.differences(now)
    if not differences:
        return
    anew = ""
    if was.decides_otherwise(now) and (command := _redecide(folder, was, now)):
        anew = f"decide its answers anew with the new ones ({command}, which asks nothing), "
    raise ConfigError(
        f"{folder}: the run was started with other settings ({'; '.join(differences)})"
        f"; resume with those, {anew}or start a new run"
    )


def generate_again(folder: Path) -> str:
    """The command by which the run in ``folder``, or in that of one of its stages, goes on."""
    root = root_of(folder)
    end = f"--out {as_word(root)}"
    with RunReader(root) as run:
        last = run.manifest
    try:
        where = _where(root)
        settled = _by_itself(root, where)
    except (WoolmillError, OSError, ValueError):
        return f"woolmill generate … {as_flags(_decided_by(last))} {end}"
    needed: dict[str, Any] = dict(where)
    for stage, by_itself in zip(stages_of_run(root), settled, strict=False):
        with RunReader(stage.folder) as run:
            stored = run.manifest
        needed |= _fixed(root, by_itself, stored) | _changes(by_itself, stored)
    needed.pop("out", None)
    config = "" if not last.free.get("endpoint") else "--config FILE "
    return f"woolmill generate {config}{as_flags(needed)} {end}"


def as_flags(settings: Mapping[str, Any]) -> str:
    """Settings as flags of the command line."""
    return " ".join(word for name, value in settings.items() for word in _words(name, value))


def _words(name: str, value: Any) -> Iterator[str]:
    field = RunConfig.model_fields[name]
    flag, shown = flag_of(field) or Flag(""), flag_name(name)
    if isinstance(value, bool):
        yield shown if value else f"--no-{shown.removeprefix('--')}"
    elif flag.metavar == "JSON":
        yield f"{shown} {as_word(orjson.dumps(value).decode())}"
    elif isinstance(value, Mapping):
        yield from (f"{shown} {as_word(f'{key}={each}')}" for key, each in value.items())
    elif not isinstance(value, list | tuple):
        yield f"{shown} {as_word(value)}"
    elif flag.metavar is not None and flag.metavar.endswith(",…"):
        yield f"{shown} {as_word(','.join(map(str, value)))}"
    else:
        yield from (f"{shown} {as_word(each)}" for each in value)


def _redecide(folder: Path, was: Manifest, now: Manifest) -> str | None:
    """The command that decides the run in ``folder`` by ``now``; None where no flags say it."""
    changes = _changes(was, now)
    if not changes or not changes.keys() <= REDECIDES or None in changes.values():
        return None
    run, stage = as_word(folder), ""
    if folder.absolute().parent.name == BELOW:
        run = as_word(folder.parent.parent)
        if "carry" in changes:  # which all stages take up together
            changes = {"carry": changes["carry"]}
        else:
            stage = f" --stage {as_word(folder.name)}"
    return f"woolmill redecide {run}{stage} {as_flags(changes)}"


def _changes(was: Manifest, now: Manifest) -> dict[str, Any]:
    """The settings by which ``now`` decides otherwise than ``was``."""
    changes: dict[str, Any] = {}
    for name in sorted(DECISION | {"recipe_source"}):
        before, value = was.decision.get(name), now.decision.get(name)
        if _plain(before) == _plain(value) or name == "semantic_dimension":  # a server tells it
            continue
        if name in OF_SEMANTIC:
            is_off = not now.decision.get("semantic")
            if is_off or (before is None and value in (None, _default(name))):
                continue
        if name == "recipe_source":
            changes["recipe"] = _shortest(str(now.free.get("recipe_spec") or ALPACA))
        elif name == "carry":
            changes[name] = value or [""]
        elif name == "language":
            changes[name] = value or ENGLISH
        else:
            changes[name] = value
    for name in ("semantic_url", "semantic_key_env"):
        if now.decision.get("semantic") and was.free.get(name) != now.free.get(name):
            changes[name] = now.free.get(name)
    return changes


def _decided_by(stored: Manifest) -> dict[str, Any]:
    """What a run is decided by, other than by default."""
    plain = Manifest(fixed={}, decision={"language": stored.decision.get("language")})
    return _changes(plain, stored)


def _where(root: Path) -> dict[str, Any]:
    """Who answers the run in ``root``, about what, and until when."""
    stages = stages_of_run(root)
    found: dict[str, Any] = {}
    with RunReader(root) as run:
        last = run.manifest
    with RunReader(stages[0].folder) as run:
        first = run.manifest
    if first.free.get("models"):
        last = first  # which may be answered by one of them, and not by who else answers
    if last.free.get("recipe_spec"):
        found["recipe"] = _shortest(str(last.free["recipe_spec"]))
    if first.free.get("rows"):
        found["rows"] = first.free["rows"]
    backend = "batch" if last.free.get("provider") else str(last.fixed["backend"])
    if backend != "http":
        found["backend"] = backend
    if backend != "scripted":
        found["model"] = last.fixed["model"]
    for name in sorted(FREE - TOLD_ELSEWHERE - found.keys()):
        value = last.free.get(name)
        if flag_of(RunConfig.model_fields[name]) is None or value in (None, [], {}):
            continue
        if _plain(value) != _plain(_default(name)):
            found[name] = value
    return found


def _by_itself(root: Path, where: Mapping[str, Any]) -> list[Manifest]:
    """What ``generate`` would settle for each stage, if it were told no more than ``where``."""
    with RunReader(root) as run:
        stored = run.manifest
    known = {**where, "out": root, "endpoint": stored.free.get("endpoint") or ()}
    config = RunConfig.model_validate(known)
    manifests = []
    for settled in stages_of(settle(config, asks=False)):
        with RunReader(settled.config.out) as run:
            model = str(run.manifest.fixed["model"])
        settled = answered_by(settled, model, None)
        manifests.append(make_manifest(settled.config, settled.recipe, settled.tasks, model))
    return manifests


def _fixed(root: Path, by_itself: Manifest, stored: Manifest) -> dict[str, Any]:
    """The settings of the requests that ``generate`` must be given."""
    found: dict[str, Any] = {}
    for name in sorted(by_itself.fixed.keys() | stored.fixed.keys()):
        value = stored.fixed.get(name)
        if _plain(by_itself.fixed.get(name)) == _plain(value) or value is None:
            continue
        field = RunConfig.model_fields.get(name)
        if name == "seeds":
            found[name] = root / KEPT
        elif field is not None and flag_of(field) is not None and name not in ("recipe", "backend"):
            found[name] = value
    return found


def _shortest(spec: str) -> str:
    """A recipe's name as it can be given in this folder."""
    here = f"{Path.cwd()}/"
    return spec.removeprefix(here)


def _default(name: str) -> Any:
    return RunConfig.model_fields[name].default


def _plain(value: Any) -> Any:
    """As it reads after a round trip through JSON, so that tuples equal lists."""
    return orjson.loads(orjson.dumps(value, default=str))
