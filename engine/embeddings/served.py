"""What the server of ``semantic_url`` serves, found out before anything is asked or paid."""

from __future__ import annotations

from collections.abc import Callable

import anyio

from engine.embeddings.asker import Asker, backend_of
from engine.embeddings.kept import TemporaryVectors
from engine.embeddings.remote import RemoteEncoder
from engine.errors import UnavailableError
from engine.secrets import read_key
from engine.settings import RunConfig, config_of

__all__ = ["encoder_at", "with_served"]

ASKED_EVERY_S = 2.0
"""How often a server that is waited for is asked whether it is there."""


async def with_served(
    config: RunConfig, note: Callable[[str], None] = lambda _note: None
) -> RunConfig:
    """The settings with the model and the dimension of the embeddings that a server gives, where
    these are not known yet. Waits for it as for the servers that answer (``wait_for_server_s``).

    Raises WoolmillError where it is not there, serves several models of which none is named, or
    does not embed.
    """
    if config.semantic_url is None:
        return config
    backend = backend_of(config, read_key(env=config.semantic_key_env))
    if config.semantic_model is not None and config.semantic_dimension is not None:
        await backend.aclose()
        return config
    asker = Asker(backend, config.max_outage_s, note)
    waiting_since_s, said = anyio.current_time(), False
    try:
        while True:
            try:
                await asker.begin()
                break
            except UnavailableError as error:
                left_s = waiting_since_s + config.wait_for_server_s - anyio.current_time()
                if left_s <= 0:
                    raise
                if not said:
                    note(f"{error} Waiting up to {left_s:.0f} s (--wait-for-server)")
                said = True
            await anyio.sleep(min(ASKED_EVERY_S, left_s))
    finally:
        await asker.aclose()
    found = {"semantic_model": backend.model, "semantic_dimension": backend.dimension}
    return config.model_copy(update=found)


def encoder_at(
    url: str,
    *,
    model: str | None = None,
    key_env: str | None = None,
    insecure_http: bool = False,
    note: Callable[[str], None],
) -> RemoteEncoder:
    """The encoder of a server for a command that keeps nothing. Raises as ``with_served`` does."""
    config = config_of(
        {
            "semantic_url": url,
            "semantic_model": model,
            "semantic_key_env": key_env,
            "insecure_http": insecure_http,
        }
    )
    settled = anyio.run(with_served, config, note)
    return RemoteEncoder(settled, read_key(env=key_env), TemporaryVectors(), note)
