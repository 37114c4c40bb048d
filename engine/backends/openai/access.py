"""By what a host lets one in: a key and further headers, which may not travel in plain sight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import httpx

from engine.backends.masking import Masking
from engine.backends.openai.address import Address, Header, is_loopback
from engine.errors import ConfigError
from engine.secrets import Secret

__all__ = ["Access"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What is sent with every request to one host.

    Attributes:
        key: goes as ``Authorization: Bearer``, or as Azure's ``api-key``.
        headers: further headers; one of them may bring the key in another form.
        insecure_http: a key may go over plain http to another machine too.
    """

    key: Secret | None = None
    headers: Mapping[str, Header] = field(default_factory=dict)
    insecure_http: bool = False

    @property
    def masking(self) -> Masking:
        """What takes the keys out of the host's words."""
        return Masking(self._secrets)

    def check(self, url: httpx.URL) -> None:
        """Raises ConfigError where a key would travel unencrypted."""
        plain = url.scheme == "http" and not is_loopback(url.host)
        if self._secrets and plain and not self.insecure_http:
            raise ConfigError(
                f"{url.host}: the key would travel unencrypted; use https, "
                "or --insecure-http if the network is yours"
            )

    def revealed(self, address: Address) -> dict[str, Callable[[], str]]:
        """The headers, each with what gives its value when it is sent: no key stands in an object
        that a traceback may show.
        """
        found = {name: header.reveal for name, header in self.headers.items()}
        key = self.key
        if key is not None and not {"authorization", "api-key"} & {n.lower() for n in found}:
            if address.deployment:
                found["api-key"] = key.reveal
            else:
                found["Authorization"] = lambda: f"Bearer {key.reveal()}"
        return found

    @property
    def _secrets(self) -> list[Secret]:
        own = [self.key] if self.key is not None else []
        return own + [h.secret for h in self.headers.values() if h.secret is not None]
