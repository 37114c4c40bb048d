"""Runs in batches at each provider: the dataset of a live run, every answer paid once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.store import RunReader
from tests.engine.batches.runs import command, environment, exported, generate, live_export
from tests.engine.batches.shapes import PROVIDERS, Anthropic, Gemini, OpenAI
from tests.engine.batches.world import Provider

pytestmark = pytest.mark.slow

each_provider = pytest.mark.parametrize("kind", PROVIDERS, ids=lambda kind: kind.name)


def paid_once(provider: Provider, out: Path) -> None:
    """Every answer was paid once, and stands in the store."""
    assert set(provider.paid.values()) <= {1}
    with RunReader(out) as run:
        answered = sum(answer.completion is not None for answer, _ in run.all_answers())
        assert run.counts().wasted == 0
    assert answered == sum(provider.paid.values()) + sum(provider.live.values())


@each_provider
def test_the_dataset_is_that_of_a_live_run(kind: type[Provider], tmp_path: Path) -> None:
    """Answers come in any order and some of them twice; a new batch is listed late."""
    out = tmp_path / "run"
    with kind(listed_late=1, twice=3) as provider:
        run = generate(provider, out)
        assert run.returncode == 0, run.stderr
        assert not provider.live
        paid_once(provider, out)
        assert exported(out) == live_export(provider, tmp_path / "live")
        left = [batch for batch in provider.batches.values() if not batch.deleted]
        assert not provider.files or kind is Anthropic
        assert not left or kind is not Anthropic
    assert not list((out / "batches").iterdir())


@each_provider
def test_what_an_expired_batch_has_is_kept(kind: type[Provider], tmp_path: Path) -> None:
    """Only what its provider did not answer is asked again. Gemini's gives nothing."""
    out = tmp_path / "run"
    with kind(expires=0.5) as provider:
        run = generate(provider, out)
        assert run.returncode == 0, run.stderr
        assert "expired" in run.stderr or kind is Anthropic
        assert "4 unsent" in run.stderr or kind is Gemini
        if kind is not Gemini:
            paid_once(provider, out)
        assert exported(out) == live_export(provider, tmp_path / "live")


@each_provider
def test_a_cut_file_is_fetched_again(kind: type[Provider], tmp_path: Path) -> None:
    out = tmp_path / "run"
    with kind(cut=2) as provider:
        run = generate(provider, out)
        assert run.returncode == 0, run.stderr
        paid_once(provider, out)
        assert exported(out) == live_export(provider, tmp_path / "live")


@each_provider
def test_a_batch_whose_creation_was_not_confirmed_is_found(
    kind: type[Provider], tmp_path: Path
) -> None:
    """The connection breaks after the provider has made it, and its list lags behind."""
    out = tmp_path / "run"
    with kind(lost_creates=1, listed_late=2) as provider:
        run = generate(provider, out)
        assert run.returncode == 0, run.stderr
        paid_once(provider, out)


@each_provider
def test_refused_lines_and_faults(kind: type[Provider], tmp_path: Path) -> None:
    """A flagged line fails for good; one that met a fault is asked again; neither stops the run."""
    out = tmp_path / "run"
    with kind(flag=7, faults=5) as provider:
        run = generate(provider, out)
        assert run.returncode == 3, run.stderr
        paid_once(provider, out)
    with RunReader(out) as store:
        failures = {answer.failure for answer, _ in store.all_answers() if answer.failure}
    assert failures == {"content_filter"}


def test_a_late_quota_failure_waits_and_shrinks(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with OpenAI(quota=1) as provider:
        run = generate(provider, out)
        assert run.returncode == 0, run.stderr
        assert "refuses a batch for now" in run.stderr
        assert "handing over a batch of 4 requests" in run.stderr
        paid_once(provider, out)


def test_a_field_that_is_refused_is_learnt_from_free_lines(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with OpenAI(unknown_fields={"top_p", "stop"}) as provider:
        run = generate(provider, out)
        assert run.returncode == 0, run.stderr
        assert "does not take stop" in run.stderr
        assert "does not take top_p" in run.stderr
        paid_once(provider, out)


def test_bulk_in_batches_and_tail_live(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with OpenAI() as provider:
        run = generate(provider, out, "--tail", "live", target=1500)
        assert run.returncode == 0, run.stderr
        paid_once(provider, out)
        live, batched = sum(provider.live.values()), sum(provider.paid.values())
        assert 1 <= live <= 0.1 * (live + batched)
        with RunReader(out) as store:
            assert store.counts().accepted == 1500
        assert exported(out) == live_export(provider, tmp_path / "live", target=1500)


def test_wait_0_submits_and_leaves(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with OpenAI(looks=10**6) as provider:
        first = generate(provider, out, "--wait", "0")
        assert first.returncode == 75, first.stderr
        assert "come back with the same command" in first.stderr
        assert "left running" in first.stderr
        assert "dropped" not in first.stdout
        provider.looks = 2
        run = generate(provider, out)
        assert run.returncode == 0, run.stderr
        assert "sending again" not in run.stderr
        paid_once(provider, out)


@each_provider
def test_a_cancelled_batch_gives_what_it_has(kind: type[Provider], tmp_path: Path) -> None:
    """The provider is asked to stop; the run's own command collects what was paid by then and asks
    for the rest again."""
    out = tmp_path / "run"
    with kind(looks=10**6) as provider:
        first = generate(provider, out, "--wait", "0")
        assert first.returncode == 75, first.stderr
        told = subprocess.run(
            [*(sys.executable, "-m", "engine", "batches", str(out)), "--cancel"],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert told.returncode == 0, told.stderr
        assert {batch.state for batch in provider.batches.values()} == {"cancelling"}
        provider.looks = 2
        run = generate(provider, out)
        assert run.returncode == 0, run.stderr
        if kind is not Gemini:
            assert "2 answered, 6 unsent" in run.stderr
            paid_once(provider, out)
        assert exported(out) == live_export(provider, tmp_path / "live")


def test_ctrl_c_leaves_batches_running(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with OpenAI(looks=10**6) as provider:
        run = subprocess.Popen(
            command(provider, out), env=environment(), stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 60
        while not any(batch.looks > 1 for batch in provider.batches.values()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=30)
        assert run.returncode == 130, said
        assert "1 batch with 8 requests left running" in said
        provider.looks = 2
        assert generate(provider, out).returncode == 0
        paid_once(provider, out)


def test_a_budget_holds_at_batch_prices(tmp_path: Path) -> None:
    """What is reserved is half of what live requests reserve, and answers are booked likewise."""
    out = tmp_path / "run"
    prices = ("--price-prompt", "1", "--price-completion", "2", "--max-tokens", "1000")
    with OpenAI() as provider:
        run = generate(provider, out, *prices, "--max-cost", "0.01", target=300)
        assert run.returncode == 75, run.stderr
        assert "budget has no room for another batch" in run.stderr
        prompt = sum(len(asked) // 4 for asked, _ in provider.paid)
    with RunReader(out) as store:
        counts = store.counts()
    assert counts.prompt_tokens == prompt
    cost = 0.5 * (counts.prompt_tokens * 1 + counts.completion_tokens * 2) / 1e6
    assert counts.stated_nano == pytest.approx(cost * 1e9, rel=1e-6)
    assert 0 < cost <= 0.01


def test_a_live_run_does_not_ask_for_what_is_in_a_batch(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with OpenAI(looks=10**6) as provider:
        assert generate(provider, out, "--wait", "0").returncode == 75
        live = subprocess.run(
            [
                *(sys.executable, "-m", "engine", "generate"),
                *("--base-url", provider.url, "--model", "m"),
                "--target", "24", "--out", str(out), "--no-semantic", "--no-progress",
            ],
            env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert live.returncode == 78
        assert "batches are open at openai" in live.stderr
        assert not provider.live
