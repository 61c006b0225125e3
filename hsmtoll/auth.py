"""
The bearer on Customs' own origin, and nowhere else: httpx.Auth in both colours.

How a token is had is decided elsewhere; assertion and subject token never come here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx

from hsmtoll.errors import ConfigurationError, UsageError, foreign

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator

    from hsmtoll.client import Engine
    from hsmtoll.tokens import AccessToken, TokenRequest

__all__ = ["AsyncTollAuth", "TollAuth"]


class _Bearing(httpx.Auth):
    def __init__(self, engine: Engine, request: TokenRequest) -> None:
        self._engine = engine
        self._request = request
        self._origin = _origin(httpx.URL(engine.endpoints.customs))

    def _check(self, request: httpx.Request) -> None:
        """Before a token is asked for: is this Customs, and the request as we would send it?"""
        if _origin(request.url) != self._origin:
            raise ConfigurationError(
                f"call to {foreign(request.url.host)}: the token is for {self._origin[1]} alone",
                hint="use a client of your own for other hosts",
                code="foreign-origin",
            )
        if "authorization" in request.headers:
            raise UsageError(
                "call: it has an Authorization header of its own",
                hint="leave it out; hsmtoll sets it",
            )
        if request.headers.get("host", "").lower() != request.url.netloc.decode("ascii").lower():
            raise UsageError(
                "call: it has a Host header of its own",
                hint="leave it out; it would send the token to another server behind the address",
            )

    def _again(self, request: httpx.Request, response: httpx.Response, token: AccessToken) -> bool:
        """Whether a 401 is worth a new token, and the request can be sent a second time."""
        return (
            response.status_code == httpx.codes.UNAUTHORIZED
            # A body that streams is gone; sending half of it again would be worse than a 401.
            and isinstance(request.stream, httpx.ByteStream)
            and self._engine.worth_renewing(token.value, self._request)
        )


class TollAuth(_Bearing):
    """For httpx.Client. Raises what `TollClient.token` raises."""

    def sync_auth_flow(
        self, request: httpx.Request
    ) -> Generator[httpx.Request, httpx.Response, None]:
        """Bearer on; after a 401, once more with a renewed one."""
        self._check(request)
        engine = self._engine
        key = engine.key(self._request)
        token = engine.cache.held(key) or engine.cache.get(key, engine.fetch(self._request))
        request.headers["Authorization"] = f"Bearer {token.value}"
        response = yield request
        if self._again(request, response, token):
            token = engine.cache.get(key, engine.fetch(self._request), avoid=token.value)
            request.headers["Authorization"] = f"Bearer {token.value}"
            yield request


class AsyncTollAuth(_Bearing):
    """For httpx.AsyncClient. Raises what `AsyncTollClient.token` raises."""

    def __init__(
        self,
        engine: Engine,
        request: TokenRequest,
        key: Callable[[TokenRequest], Awaitable[str]],
    ) -> None:
        super().__init__(engine, request)
        self._key = key

    async def async_auth_flow(
        self, request: httpx.Request
    ) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """Bearer on; after a 401, once more with a renewed one."""
        self._check(request)
        engine = self._engine
        key = await self._key(self._request)
        token = engine.cache.held(key)
        if token is None:
            token = await engine.cache.aget(key, engine.fetch(self._request))
        request.headers["Authorization"] = f"Bearer {token.value}"
        response = yield request
        if self._again(request, response, token):
            token = await engine.cache.aget(key, engine.fetch(self._request), avoid=token.value)
            request.headers["Authorization"] = f"Bearer {token.value}"
            yield request


def _origin(url: httpx.URL) -> tuple[str, str, int]:
    return url.scheme, url.host, url.port or (443 if url.scheme == "https" else 80)
