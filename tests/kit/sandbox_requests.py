"""Speaking to the sandbox with httpx and hand-made grants, without any code of the client."""

from __future__ import annotations

import base64
import json
import ssl
import time
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import httpx

from hsmtoll.sandbox.server import Sandbox
from tests.kit.rule_cases import NOW, TokenRequestParts, clients, enterprise, eseal, seals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Wire:
    """One sandbox and one HTTP client."""

    def __init__(self, sandbox: Sandbox, http: httpx.Client, clock: Callable[[], float]) -> None:
        self.sandbox, self.http, self.clock = sandbox, http, clock

    def grant(self, ask: TokenRequestParts | None = None, **claims: Any) -> httpx.Response:
        """Posts a grant, with a new jti and fresh times where the ask has them at all."""
        ask = ask or eseal()
        now = int(self.clock())
        fresh: dict[str, Any] = {"iat": now, "exp": now + 120, "jti": str(uuid.uuid4())}
        return self.send(ask.but(claims=fresh | claims))

    def send(self, ask: TokenRequestParts) -> httpx.Response:
        """Posts a grant as it is."""
        headers = {"Content-Type": ask.media_type}
        if ask.authorization:
            headers["Authorization"] = "Basic eDp5"
        form = ask.form(self.sandbox.issuer)
        return self.http.request(
            ask.method, self.sandbox.token_endpoint, content=urlencode(form), headers=headers
        )

    def exchange(self, subject: str, **changes: str) -> httpx.Response:
        """Posts the exchange."""
        form = {
            "grant_type": "token-exchange",
            "subject_token_type": "access_token",
            "subject_token": subject,
        }
        return self.http.post(self.sandbox.exchange_endpoint, data=form | changes)

    def bearer(
        self, scope: str = "toll:eu/movement/road/v2", ask: TokenRequestParts | None = None
    ) -> str:
        """A Customs token."""
        access = self.grant(ask, scope=scope).json()["access_token"]
        return str(self.exchange(access).json()["access_token"])

    def call(self, method: str, path: str, token: str | None, **options: Any) -> httpx.Response:
        """An API call."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        headers |= options.pop("headers", {})
        return self.http.request(
            method, f"{self.sandbox.customs}{path}", headers=headers, **options
        )


@contextmanager
def wire(**settings: Any) -> Iterator[Wire]:
    """A sandbox that trusts the twins' authorities; a small signing key unless told otherwise."""
    begin = time.monotonic()

    def clock() -> float:
        # The twins were made at NOW, however long ago that was.
        return NOW + time.monotonic() - begin

    settings = {"signing_bits": 2048, "polling_delay": 0.0, **settings}
    with Sandbox(
        trust=[seals(), enterprise()], clients=clients(), clock=clock, **settings
    ) as sandbox:
        context = ssl.create_default_context(cafile=str(sandbox.ca_file))
        with httpx.Client(verify=context, timeout=10, trust_env=False) as http:
            yield Wire(sandbox, http, clock)


def claims_of(token: str) -> dict[str, Any]:
    """The payload of a JWT, unverified."""
    part = token.split(".")[1]
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return found
