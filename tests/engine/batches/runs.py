"""Runs of ``woolmill generate`` against a double, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from engine.export import dataset_of
from engine.store import RunReader
from tests.engine.batches.world import KEY, Provider

__all__ = ["command", "environment", "exported", "generate", "live_export"]

ROOT = Path(__file__).parents[3]
PATIENCE = """
from engine.cli.main import main
from engine.run.batches import bulk, order
order.LISTING_S = bulk.REFUSED_S = 1.0
main()
"""
"""The command line, with less patience than providers need."""


def environment(**more: str) -> dict[str, str]:
    """With the key, and without what the surroundings say."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OPENAI_API_KEY": KEY, **more}


def command(provider: Provider, out: Path, *options: str, target: int = 24) -> list[str]:
    """A run in batches alone, unless ``options`` say otherwise."""
    return [
        *(sys.executable, "-c", PATIENCE, "generate", "--backend", "batch"),
        *("--provider", provider.name, "--base-url", provider.url, "--model", "m"),
        *("--tail", "batch", "--poll", "0.05", "--target", str(target), "--out", str(out)),
        *("--no-semantic", "--no-progress", *options),
    ]


def generate(
    provider: Provider, out: Path, *options: str, target: int = 24, failpoint: str = ""
) -> subprocess.CompletedProcess[str]:
    more = {"WOOLMILL_FAILPOINT": failpoint} if failpoint else {}
    return subprocess.run(
        command(provider, out, *options, target=target),
        env=environment(**more),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def live_export(provider: Provider, out: Path, *options: str, target: int = 24) -> bytes:
    """The dataset of a run that asks the same provider one by one."""
    run = subprocess.run(
        [
            *(sys.executable, "-m", "engine", "generate", "--base-url", provider.url),
            *("--model", "m", "--api", "chat", "--target", str(target), "--out", str(out)),
            *("--no-semantic", "--no-progress", *options),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return exported(out)


def exported(out: Path) -> bytes:
    """The dataset that the run left in its folder."""
    with RunReader(out) as run:
        return (out / dataset_of(run.manifest)[1]).read_bytes()
