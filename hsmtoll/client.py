"""
TollClient and AsyncTollClient: tokens and calls to Customs, for threads and for tasks.

Their common base has the code that does not depend on threads or tasks; the sequences of requests
are in customs. PKCS#11, environment variables and argv are not used here.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, Unpack

import httpx

from hsmtoll import apis
from hsmtoll.auth import AsyncTollAuth, TollAuth, with_httpx2
from hsmtoll.customs.conversation import NoResponse, Receipt, arun_conversation, run_conversation
from hsmtoll.customs.errors import no_response_error
from hsmtoll.customs.limits import (
    alimit_response_size,
    asend_with_deadline,
    limit_response_size,
    send_with_deadline,
)
from hsmtoll.customs.routing import Marker, arouting, routing
from hsmtoll.customs.submissions import submission
from hsmtoll.customs.uploads import upload
from hsmtoll.errors import ConfigurationError, UsageError, sanitized
from hsmtoll.event_loop import running_loop
from hsmtoll.fork import after_fork, notice_fork
from hsmtoll.metrics import Status, status_of
from hsmtoll.token import AccessToken
from hsmtoll.tokens.refresher import BackgroundRefresher
from hsmtoll.transport import CONNECTIONS

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

    from hsmtoll.apis import Api
    from hsmtoll.customs.conversation import Conversation
    from hsmtoll.token import Details, ForWhom, TokenRequest, TokenRequirements
    from hsmtoll.tokens.token_service import TokenService

__all__ = ["AsyncTollClient", "TollClient"]

# For threads, results; for tasks, httpx.AsyncClient and coroutines of the same results.
_HttpxClient = TypeVar("_HttpxClient", httpx.Client, httpx.AsyncClient)
_Token = TypeVar("_Token")
_Response = TypeVar("_Response")
_Receipt = TypeVar("_Receipt")


class _Client(ABC, Generic[_HttpxClient, _Token, _Response, _Receipt]):
    """The common part of the sync and the async client."""

    def __init__(
        self, token_service: TokenService, *, close: Callable[[], None] = lambda: None
    ) -> None:
        self._token_service = token_service
        self._close = close
        self._refreshers: list[BackgroundRefresher] = []
        self._forget_connections()
        after_fork(self._forget_connections)

    def _forget_connections(self) -> None:
        # A forked child can neither use nor close the TLS connections of its parent.
        # By API and event loop: connections belong to the loop in which they were opened.
        self._pools: dict[tuple[str, int], tuple[_HttpxClient, Any]] = {}
        self._open_clients: list[_HttpxClient] = []

    @property
    def token_service(self) -> TokenService:
        """The service that obtains this client's tokens; internal."""
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

    def token(
        self,
        scope: str | None = None,
        *,
        min_life: float = 0.0,
        renew: bool = False,
        **whom: Unpack[ForWhom],
    ) -> _Token:
        """
        An unexpired Customs token for an API or a scope.

        *min_life*: minimum remaining lifetime in seconds. *renew*: obtain a new token in any case.
        *whom*: see `hsmtoll.token.ForWhom`; each combination has a token of its own.
        """
        request = self._token_service.request(scope, **whom)
        return self._obtain(request, self._token_service.requirements(min_life, renew=renew))

    def auth(self, scope: str | None = None, **whom: Unpack[ForWhom]) -> TollAuth:
        """
        httpx.Auth that puts the token on requests to Customs' own origin, and nowhere else. It is
        an httpx2.Auth as well where httpx2 is installed. *whom* as for `token`.
        """
        return with_httpx2(TollAuth)(
            self._token_service, self._token_service.request(scope, **whom)
        )

    def api(self, name: str, *, scope: str | None = None, **whom: Unpack[ForWhom]) -> _HttpxClient:
        """
        An httpx client for the API called *name*: base URL, bearer token, proxy, CA. It is closed
        with this client at the latest. *scope*: instead of the API's own; *whom* as for `token`.
        """
        api = apis.named(name)
        if not api.base:
            # Raises for an API that is not available yet.
            api.scope(self._token_service.family)
            raise ConfigurationError(f"API {name}: a self-test at Maskinporten, nothing to call")
        return self._open(api, self.auth(scope or name, **whom))

    def call(
        self,
        method: str,
        path: str,
        *,
        scope: str | None = None,
        consumer_org: str | None = None,
        resource: Sequence[str] | str | None = None,
        authorization_details: Details | None = None,
        **request: Any,
    ) -> _Response:
        """
        Send one request; the scope follows from *path*. With *scope*, *path* may be any path at
        Customs' origin, even if the catalogue does not have it. *consumer_org*, *resource* and
        *authorization_details* as for `token`, other arguments as for httpx.Client.request.

        Returns the complete response, of at most 64 MiB, within HSMTOLL_DEADLINE; the caller checks
        its status. Without a response: NetworkError for GET, HEAD, OPTIONS and for requests that
        were not sent, OutcomeUnknown for the others. The number of concurrent calls per API is
        limited; further calls wait.
        """
        api = apis.at(path) if scope else apis.api_of_path(path)
        token_request = self._token_service.request(
            scope or api.name,
            consumer_org=consumer_org,
            resource=resource,
            authorization_details=authorization_details,
        )
        url = f"{self._token_service.endpoints.customs}{path}"
        return self._called(api, token_request, method, url, **request)

    def submit(
        self,
        api: str,
        method: str,
        level: str,
        *,
        json: Mapping[str, Any],
        mrn: str | None = None,
        timeout: float = 120.0,
        accepted: Callable[[str], None] = lambda _: None,
        waiting: Callable[[float], None] = lambda _: None,
        scope: str | None = None,
        **whom: Unpack[ForWhom],
    ) -> _Receipt:
        """
        A submission and its result: see `hsmtoll.customs.submissions`. *json*: the message.
        *scope*: another one than the API's own; *whom* as for `token`.
        """
        named = apis.named(api)
        conversation = submission(
            named, method, level, json, mrn=mrn, timeout=timeout,
            now=lambda: self._token_service.clock.now().boot,
            accepted=accepted, waiting=waiting,
        )  # fmt: skip
        token_request = self._token_service.request(scope or api, **whom)
        return self._run_conversation(named, token_request, conversation)

    def upload(
        self, declaration_id: str, file: str | os.PathLike[str], *, document_type: str
    ) -> _Receipt:
        """A document to a declaration, checked before it is sent: see `hsmtoll.customs.uploads`."""
        path = Path(file)
        try:
            content = path.read_bytes()
        except OSError as exc:
            raise UsageError(
                f"upload of {sanitized(path)}: cannot be read ({exc.strerror})"
            ) from exc
        conversation = upload(declaration_id, path.name, content, document_type)
        token_request = self._token_service.request("document")
        return self._run_conversation(apis.named("document"), token_request, conversation)

    def _feed(self, marker: str | os.PathLike[str] | None) -> dict[str, Any]:
        """Arguments for `routing` and `arouting` besides the client and the level."""
        clock = self._token_service.clock
        return {
            "marker": Marker(None if marker is None else Path(marker)),
            "now": lambda: clock.now().wall,
            "http_client": self._token_service.http_client,
        }

    def _open(self, api: Api, auth: TollAuth | None = None) -> _HttpxClient:
        """A client for *api*, which is closed with this client at the latest."""
        made = self._new_client(f"{self._token_service.endpoints.customs}{api.base}", auth)
        self._open_clients = [each for each in self._open_clients if not each.is_closed]
        self._open_clients.append(made)
        return made

    def _pool(self, api: Api, loop: int = 0) -> tuple[_HttpxClient, Any]:
        """One client for all calls to *api*, and a semaphore with a permit for each connection."""
        # If hundreds of calls wait in httpx's pool, it sometimes closes a connection that it has
        # just assigned: that call would fail, and the outcome of a submission would be unknown.
        notice_fork()
        key = api.name, loop
        if key not in self._pools:
            self._pools.setdefault(key, self._limited(self._open(api)))
        return self._pools[key]

    def _release(self) -> list[_HttpxClient]:
        """Close everything except the httpx clients, which are returned."""
        notice_fork()
        while self._refreshers:
            self._refreshers.pop().stop()
        self._close()
        left = self._open_clients
        self._forget_connections()
        return left

    @abstractmethod
    def _obtain(self, request: TokenRequest, requirements: TokenRequirements) -> _Token:
        """The token."""

    @abstractmethod
    def _new_client(self, base: str, auth: TollAuth | None) -> _HttpxClient:
        """A new httpx client."""

    @abstractmethod
    def _limited(self, client: _HttpxClient) -> tuple[_HttpxClient, Any]:
        """*client* with a limit for the size of responses, and its semaphore."""

    @abstractmethod
    def _called(
        self, api: Api, token_request: TokenRequest, method: str, url: str, **request: Any
    ) -> _Response:
        """The response. Without one, NetworkError or OutcomeUnknown."""

    @abstractmethod
    def _run_conversation(
        self, api: Api, token_request: TokenRequest, conversation: Conversation
    ) -> _Receipt:
        """The result of *conversation* with *api*."""


class TollClient(_Client[httpx.Client, AccessToken, httpx.Response, Receipt]):
    """
    Customs tokens and calls, for threads. Opens neither device nor connection before first use.

    Every method raises the errors of `hsmtoll.errors`, each with an exit code and a hint.
    """

    def routing(
        self, marker: str | os.PathLike[str] | None, *, level: str = "house-consignment"
    ) -> Iterator[tuple[Any, ...]]:
        """
        Routing signals in batches. *marker*: the file with the position up to which signals were
        processed; ``None``: from the beginning, without a file.
        """
        with limit_response_size(self.api("routing")) as client:
            yield from routing(client, level, **self._feed(marker))

    def close(self) -> None:
        """Close the device and the connections. Tokens in a shared cache are kept."""
        for client in self._release():
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _obtain(self, request: TokenRequest, requirements: TokenRequirements) -> AccessToken:
        return self._token_service.token(request, requirements)

    def _new_client(self, base: str, auth: TollAuth | None) -> httpx.Client:
        return self._token_service.http_client.client(base, base_url=base, auth=auth)

    def _limited(self, client: httpx.Client) -> tuple[httpx.Client, threading.Semaphore]:
        return limit_response_size(client), threading.Semaphore(CONNECTIONS)

    def _called(
        self, api: Api, token_request: TokenRequest, method: str, url: str, **request: Any
    ) -> httpx.Response:
        try:
            return self._send(api, token_request, method, url, **request)
        except NoResponse as exc:
            raise no_response_error(exc, api, method) from exc

    def _send(
        self, api: Api, token_request: TokenRequest, method: str, url: str, **request: Any
    ) -> httpx.Response:
        client, permit = self._pool(api)
        # Requests for different organisations share the connections.
        request["auth"] = TollAuth(self._token_service, token_request)
        with permit:
            return send_with_deadline(
                client, method, url, http_client=self._token_service.http_client, **request
            )

    def _run_conversation(
        self, api: Api, token_request: TokenRequest, conversation: Conversation
    ) -> Receipt:
        send = partial(self._send, api, token_request)
        origin = self._token_service.endpoints.customs
        return run_conversation(conversation, send, origin, self._token_service.clock.sleep)


class AsyncTollClient(
    _Client[
        httpx.AsyncClient,
        Coroutine[Any, Any, AccessToken],
        Coroutine[Any, Any, httpx.Response],
        Coroutine[Any, Any, Receipt],
    ]
):
    """As TollClient, for tasks: tokens in memory are returned at once, waiting blocks no thread."""

    def auth(self, scope: str | None = None, **whom: Unpack[ForWhom]) -> AsyncTollAuth:
        """As TollClient.auth."""
        token_request = self._token_service.request(scope, **whom)
        return with_httpx2(AsyncTollAuth)(self._token_service, token_request)

    async def routing(
        self, marker: str | os.PathLike[str] | None, *, level: str = "house-consignment"
    ) -> AsyncIterator[tuple[Any, ...]]:
        """As TollClient.routing."""
        async with alimit_response_size(self.api("routing")) as client:
            async for batch in arouting(client, level, **self._feed(marker)):
                yield batch

    async def aclose(self) -> None:
        """As TollClient.close."""
        for client in self._release():
            # If its event loop is closed, so are its connections.
            with contextlib.suppress(RuntimeError):
                await client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def _obtain(self, request: TokenRequest, requirements: TokenRequirements) -> AccessToken:
        return await self._token_service.atoken(request, requirements)

    def _new_client(self, base: str, auth: TollAuth | None) -> httpx.AsyncClient:
        options = self._token_service.http_client.options(base)
        return httpx.AsyncClient(base_url=base, auth=auth, **options)

    def _limited(self, client: httpx.AsyncClient) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        return alimit_response_size(client), asyncio.Semaphore(CONNECTIONS)

    async def _called(
        self, api: Api, token_request: TokenRequest, method: str, url: str, **request: Any
    ) -> httpx.Response:
        try:
            return await self._send(api, token_request, method, url, **request)
        except NoResponse as exc:
            raise no_response_error(exc, api, method) from exc

    async def _send(
        self, api: Api, token_request: TokenRequest, method: str, url: str, **request: Any
    ) -> httpx.Response:
        client, permit = self._pool(api, id(running_loop()))
        request["auth"] = AsyncTollAuth(self._token_service, token_request)
        async with permit:
            return await asend_with_deadline(
                client, method, url, http_client=self._token_service.http_client, **request
            )

    async def _run_conversation(
        self, api: Api, token_request: TokenRequest, conversation: Conversation
    ) -> Receipt:
        send = partial(self._send, api, token_request)
        origin = self._token_service.endpoints.customs
        return await arun_conversation(conversation, send, origin, asyncio.sleep)
