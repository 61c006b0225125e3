"""
TollClient and AsyncTollClient: tokens and calls, for threads and for tasks.

Both share the token service. PKCS#11, environment variables and argv are not used here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, Unpack

import httpx

from hsmtoll import apis
from hsmtoll.auth import AsyncTollAuth, TollAuth
from hsmtoll.calls import AsyncCalls, Calls
from hsmtoll.errors import ConfigurationError
from hsmtoll.fork import after_fork
from hsmtoll.metrics import Status, status_of
from hsmtoll.tokens.refresher import BackgroundRefresher

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from hsmtoll.token import AccessToken, ForWhom
    from hsmtoll.tokens.token_service import TokenService

__all__ = ["AsyncTollClient", "TollClient"]


class _Shared:
    """The common part of the sync and the async client."""

    def __init__(
        self, token_service: TokenService, *, close: Callable[[], None] = lambda: None
    ) -> None:
        self._token_service = token_service
        self._close = close
        self._refreshers: list[BackgroundRefresher] = []
        self._forget_clients()
        after_fork(self._forget_clients)

    def _forget_clients(self) -> None:
        # A TLS connection cannot be shared with a forked child, nor closed by it.
        # Any: httpx.Client in TollClient, httpx.AsyncClient in AsyncTollClient.
        self._clients: dict[Any, Any] = {}
        self._open_clients: list[Any] = []

    @property
    def token_service(self) -> TokenService:
        """Where the tokens of this client come from; for this package's own use."""
        return self._token_service

    def status(self) -> Status:
        """The current state; uses neither the device nor the network."""
        return status_of(self._token_service)

    def keep_fresh(self, *scopes: str) -> BackgroundRefresher:
        """
        Renew tokens in the background until stopped, so that no call has to wait: for long-running
        programs. *scopes*: APIs or scopes; none means the default. UsageError for an unknown one.
        """
        token_service = self._token_service
        refresher = BackgroundRefresher(
            token_service, [token_service.request(scope) for scope in scopes or (None,)]
        )
        self._refreshers.append(refresher)
        return refresher

    def _track_client(self, client: Any) -> None:
        """Remember *client*, to close it with this one unless it is closed before."""
        self._open_clients = [*(each for each in self._open_clients if not each.is_closed), client]

    def _release(self) -> None:
        while self._refreshers:
            self._refreshers.pop().stop()
        self._close()

    def _base(self, name: str) -> str:
        api = apis.named(name)
        if not api.base:
            # One that is not ready says so.
            api.scope(self._token_service.family)
            raise ConfigurationError(f"API {name}: a self-test at Maskinporten, nothing to call")
        return f"{self._token_service.endpoints.customs}{api.base}"


class TollClient(_Shared, Calls):
    """
    Customs tokens and calls, for threads. Opens neither device nor connection before first use.

    Every method raises the errors of `hsmtoll.errors`, each with an exit code and a hint.
    """

    def token(
        self,
        scope: str | None = None,
        *,
        min_life: float = 0.0,
        renew: bool = False,
        **whom: Unpack[ForWhom],
    ) -> AccessToken:
        """
        An unexpired Customs token for an API or a scope.

        *min_life*: minimum remaining lifetime in seconds. *renew*: obtain a new token in any case.
        *whom*: see `hsmtoll.token.ForWhom`; each combination has a token of its own.
        """
        token_service = self._token_service
        request = token_service.request(scope, **whom)
        return token_service.token(request, token_service.requirements(min_life, renew=renew))

    def auth(
        self,
        scope: str | None = None,
        **whom: Unpack[ForWhom],
    ) -> TollAuth:
        """
        httpx.Auth that puts the token on requests to Customs' own origin, and nowhere else. *whom*
        as for `token`.
        """
        request = self._token_service.request(scope, **whom)
        return TollAuth(self._token_service, request)

    def api(
        self,
        name: str,
        *,
        scope: str | None = None,
        **whom: Unpack[ForWhom],
    ) -> httpx.Client:
        """
        An httpx.Client for the API called *name*: base URL, bearer token, proxy, CA. It is closed
        with this client at the latest. *scope*: instead of the API's own; *whom* as for `token`.
        """
        base = self._base(name)
        auth = self.auth(scope or name, **whom)
        return self._open(base, auth)

    def _open(self, base: str, auth: TollAuth | None = None) -> httpx.Client:
        made = self._token_service.http_client.client(base, base_url=base, auth=auth)
        self._track_client(made)
        return made

    def close(self) -> None:
        """Close the device and the connections. Tokens in a shared cache are kept."""
        self._close_clients()
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncTollClient(_Shared, AsyncCalls):
    """As TollClient, for tasks: tokens in memory are returned at once, waiting blocks no thread."""

    async def token(
        self,
        scope: str | None = None,
        *,
        min_life: float = 0.0,
        renew: bool = False,
        **whom: Unpack[ForWhom],
    ) -> AccessToken:
        """As TollClient.token."""
        token_service = self._token_service
        request = token_service.request(scope, **whom)
        return await token_service.atoken(
            request, token_service.requirements(min_life, renew=renew)
        )

    def auth(
        self,
        scope: str | None = None,
        **whom: Unpack[ForWhom],
    ) -> AsyncTollAuth:
        """As TollClient.auth."""
        request = self._token_service.request(scope, **whom)
        return AsyncTollAuth(self._token_service, request)

    def api(
        self,
        name: str,
        *,
        scope: str | None = None,
        **whom: Unpack[ForWhom],
    ) -> httpx.AsyncClient:
        """As TollClient.api."""
        base = self._base(name)
        auth = self.auth(scope or name, **whom)
        return self._open(base, auth)

    def _open(self, base: str, auth: AsyncTollAuth | None = None) -> httpx.AsyncClient:
        made = httpx.AsyncClient(
            base_url=base, auth=auth, **self._token_service.http_client.options(base)
        )
        self._track_client(made)
        return made

    async def aclose(self) -> None:
        """As TollClient.close."""
        await self._close_clients()
        self._release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()
