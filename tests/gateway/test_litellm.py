"""A real LiteLLM proxy in front of a double: both APIs, streams, a fallback, errors translated.

``make test-gateway`` builds the environment; WOOLMILL_GATEWAY_PYTHON names its interpreter.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.backends.base import Failure, Verdict
from engine.backends.openai.access import Access
from engine.backends.openai.backend import HttpBackend
from engine.errors import AuthError
from engine.records import Api, Completion
from engine.secrets import Secret
from engine.store import RunStore
from tests.engine.hosts.double import KEY, Answer, Double, Refusal, openai_error
from tests.engine.wire import prompt

pytestmark = [pytest.mark.gateway, pytest.mark.anyio, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
GATEWAY_KEY = "sk-gateway-77d1c0a95b3e42f8"
START_S = 180
LONG = (
    "This model's maximum context length is 4096 tokens. However, your messages resulted in 5000 "
    "tokens. Please reduce the length of the messages."
)
ERRORS: dict[str, Refusal] = {
    "refuses": (400, openai_error("Invalid value: 'tone'.", param="tone", code="invalid_value")),
    "no-key": (401, openai_error("Incorrect API key provided: abc.", code="invalid_api_key")),
    "busy": (429, openai_error("Rate limit reached.", "tokens", code="rate_limit_exceeded")),
    "short": (400, openai_error(LONG, param="messages", code="context_length_exceeded")),
}
"""Models that fail, and how the double behind the proxy says so."""


class Upstream(Double):
    """What stands behind the proxy."""

    row = ""
    model = "toy"
    completions = True

    def refusal(self, body: Answer, query: Mapping[str, str]) -> tuple[str, Refusal] | None:
        name = body["model"]
        if name == "flaky" and not self.refused["flaky"]:
            return name, (500, openai_error("The server had an error.", "server_error"))
        return (name, ERRORS[name]) if name in ERRORS else None


def config(upstream: str) -> dict[str, Any]:
    """The proxy's: an alias of each model, no retries of its own, and a way out for ``flaky``."""
    models = {name: f"openai/{name}" for name in ("flaky", *ERRORS)}
    models |= {"my-alias": "openai/toy", "my-text": "text-completion-openai/toy"}
    place = {"api_base": f"{upstream}/v1", "api_key": KEY}
    return {
        "model_list": [
            {"model_name": name, "litellm_params": {"model": model, **place}}
            for name, model in models.items()
        ],
        "router_settings": {
            "num_retries": 0,
            "disable_cooldowns": True,
            "fallbacks": [{"flaky": ["my-alias"]}],
        },
        "litellm_settings": {"num_retries": 0, "telemetry": False},
        "general_settings": {"master_key": GATEWAY_KEY},
    }


@pytest.fixture(scope="module")
def upstream() -> Iterator[Double]:
    with Upstream() as double:
        yield double


@pytest.fixture(scope="module")
def gateway(upstream: Double, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a LiteLLM proxy."""
    if (python := os.environ.get("WOOLMILL_GATEWAY_PYTHON")) is None:
        pytest.skip("WOOLMILL_GATEWAY_PYTHON is not set; run make test-gateway")
    folder = tmp_path_factory.mktemp("gateway")
    (folder / "config.yaml").write_text(json.dumps(config(upstream.url)))  # JSON is YAML
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = [str(Path(python).with_name("litellm")), "--config", "config.yaml", "--port", port]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    environment |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # nothing is fetched at its start
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            [*program, "--host", "127.0.0.1", "--telemetry", "False"],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            base = f"http://127.0.0.1:{port}"
            wait_for(base, process, folder / "log")
            yield f"{base}/v1"
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(base: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the proxy answers."""
    deadline_s = time.monotonic() + START_S
    with httpx.Client(trust_env=False) as client:
        while time.monotonic() < deadline_s and process.poll() is None:
            try:
                if client.get(f"{base}/health/liveliness").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
    pytest.fail(f"the proxy did not start:\n{log.read_text(errors='replace')[-3000:]}")


async def outcome(
    gateway: str, model: str, api: Api = "chat", *, stream: bool = True, key: str = GATEWAY_KEY
) -> Completion | Verdict:
    """What one prompt comes to."""
    backend = HttpBackend(gateway, model, access=Access(key=Secret(key)), stream=stream)
    await backend.start()
    try:
        (found,) = await backend.complete([prompt(api=api)])
    except Failure as failure:
        found = failure
    finally:
        await backend.aclose()
    if isinstance(found, Failure):
        return found.verdict
    assert isinstance(found, Completion)
    return found


@pytest.mark.parametrize(("model", "api"), [("my-alias", "chat"), ("my-text", "completions")])
async def test_an_answer_is_the_same_whole_and_streamed(gateway: str, model: str, api: Api) -> None:
    streamed = await outcome(gateway, model, api, stream=True)
    whole = await outcome(gateway, model, api, stream=False)
    assert isinstance(streamed, Completion)
    assert isinstance(whole, Completion)
    assert streamed.text == whole.text
    assert "Instruction:" in whole.text
    assert streamed.finish_reason == whole.finish_reason == "stop"
    assert streamed.ttft_s is not None
    assert not whole.usage.estimated
    assert streamed.usage.completion_tokens > 0


async def test_a_fallback_answers_where_the_first_failed(gateway: str, upstream: Double) -> None:
    """One fault of the host behind is no fault of the proxy's."""
    assert isinstance(await outcome(gateway, "flaky"), Completion)
    assert upstream.refused["flaky"] == 1


TRANSLATED = [
    ("refuses", "settings", "http_400"),
    ("no-key", "settings", "http_401"),
    ("busy", "throttled", "http_429"),
    ("short", "overflow", "context_overflow"),
]


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize(("model", "kind", "reason"), TRANSLATED)
async def test_errors_keep_their_meaning(
    gateway: str, model: str, kind: str, reason: str, stream: bool
) -> None:
    """LiteLLM puts its own words before the host's; the verdict is that of the host's."""
    verdict = await outcome(gateway, model, stream=stream)
    assert isinstance(verdict, Verdict)
    assert (verdict.kind, verdict.reason) == (kind, reason)
    if model == "short":
        assert (verdict.context_length, verdict.prompt_tokens) == (4096, 5000)


async def test_a_wrong_key_of_the_proxy_s_own(gateway: str) -> None:
    verdict = await outcome(gateway, "my-alias", key="sk-wrong-0123456789abcdef")
    assert isinstance(verdict, Verdict)
    assert (verdict.kind, verdict.reason) == ("settings", "http_401")
    assert isinstance(verdict.error, AuthError)
    assert "0123456789abcdef" not in str(verdict.error)


@pytest.mark.parametrize(("model", "api"), [("my-alias", "chat"), ("my-text", "completions")])
def test_generate(gateway: str, tmp_path: Path, model: str, api: str) -> None:
    """``woolmill generate`` to its target through the proxy."""
    command = ["generate", "--base-url", gateway, "--model", model, "--api", api]
    command += ["--key-env", "LITELLM_API_KEY", "--target", "20", "--no-semantic"]
    done = subprocess.run(
        [sys.executable, "-m", "engine", *command, "--no-progress", "--out", tmp_path / "run"],
        cwd=ROOT,
        env=os.environ | {"LITELLM_API_KEY": GATEWAY_KEY},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with RunStore.read(tmp_path / "run") as store:
        assert store.counts().accepted == 20
        assert not store.manifest.learnt
    assert len(json.loads((tmp_path / "run" / "alpaca_data.json").read_text())) == 20
