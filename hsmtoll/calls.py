"""
The calls of both clients to Customs: single calls, submissions, uploads, the routing feed.

The sequences of requests are in customs; here they are sent over httpx clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Unpack

from hsmtoll import apis
from hsmtoll.auth import AsyncTollAuth, TollAuth
from hsmtoll.customs.conversation import NoResponse, arun_conversation, run_conversation
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
from hsmtoll.errors import UsageError, foreign
from hsmtoll.fork import notice_fork
from hsmtoll.transport import CONNECTIONS

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

    import httpx

    from hsmtoll.apis import Api
    from hsmtoll.customs.conversation import Conversation, Receipt
    from hsmtoll.token import Details, ForWhom, TokenRequest
    from hsmtoll.tokens.token_service import TokenService

__all__ = ["AsyncCalls", "Calls"]


class Calls(Protocol):
    """For threads."""

    _token_service: TokenService
    # By API.
    _clients: dict[str, tuple[httpx.Client, threading.Semaphore]]
    _open_clients: list[httpx.Client]

    def api(self, name: str) -> httpx.Client:
        """An httpx.Client for the API called *name*."""

    def _open(self, base: str) -> httpx.Client:
        """One that puts no bearer on."""

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
    ) -> httpx.Response:
        """
        One call; the scope is found from *path*. With *scope*, *path* is any below Customs'
        origin, whether the catalogue has it or not. For whom, as for `TollClient.token`; other
        arguments as for httpx.Client.request.

        Returns the complete response, of at most 64 MiB, within HSMTOLL_DEADLINE; the caller checks
        its status. Without a response: NetworkError for GET, HEAD, OPTIONS and for requests that
        were not sent, OutcomeUnknown for the others. The number of concurrent calls per API is
        limited; further calls wait.
        """
        api = apis.at(path) if scope else apis.api_of_path(path)
        wanted = self._token_service.request(
            scope or api.name,
            consumer_org=consumer_org,
            resource=resource,
            authorization_details=authorization_details,
        )
        url = f"{self._token_service.endpoints.customs}{path}"
        try:
            return self._send(api, wanted, method, url, **request)
        except NoResponse as exc:
            raise no_response_error(exc, api, method) from exc

    def _send(
        self, api: Api, wanted: TokenRequest, method: str, url: str, **request: Any
    ) -> httpx.Response:
        client, turn = self._pooled_client(api)
        # One pool of connections serves all whom it is for.
        request["auth"] = TollAuth(self._token_service, wanted)
        # Where hundreds wait in the pool itself, it now and then closes a connection that it has
        # just lent: that call would be lost, and a submission's fate unknown.
        with turn:
            return send_with_deadline(
                client, method, url, http_client=self._token_service.http_client, **request
            )

    def _pooled_client(self, api: Api) -> tuple[httpx.Client, threading.Semaphore]:
        """One client an API, and a turn for each of its connections."""
        notice_fork()
        if api.name not in self._clients:
            base = f"{self._token_service.endpoints.customs}{api.base}"
            made = limit_response_size(self._open(base)), threading.Semaphore(CONNECTIONS)
            self._clients.setdefault(api.name, made)
        return self._clients[api.name]

    def submit(
        self,
        api: str,
        method: str,
        level: str,
        *,
        json: Mapping[str, Any],
        mrn: str | None = None,
        patience: float = 120.0,
        accepted: Callable[[str], None] = lambda _: None,
        waiting: Callable[[float], None] = lambda _: None,
        scope: str | None = None,
        **whom: Unpack[ForWhom],
    ) -> Receipt:
        """
        A submission and its result: see `hsmtoll.customs.submissions`. *json*: the message.
        *scope*: another one than the API's own; *whom* as for `TollClient.token`.
        """
        conversation = submission(
            apis.named(api), method, level, json, mrn=mrn, patience=patience,
            now=lambda: self._token_service.clock.now().boot,
            accepted=accepted, waiting=waiting,
        )  # fmt: skip
        wanted = self._token_service.request(scope or api, **whom)
        return self._run_conversation(api, wanted, conversation)

    def upload(
        self, declaration_id: str, file: str | os.PathLike[str], *, document_type: str
    ) -> Receipt:
        """A document to a declaration, checked before it is sent: see `hsmtoll.customs.uploads`."""
        path = Path(file)
        conversation = upload(declaration_id, path.name, _content(path), document_type)
        return self._run_conversation(
            "document", self._token_service.request("document"), conversation
        )

    def _run_conversation(
        self, api: str, wanted: TokenRequest, conversation: Conversation
    ) -> Receipt:
        token_service = self._token_service
        ask = partial(self._send, apis.named(api), wanted)
        return run_conversation(
            conversation, ask, token_service.endpoints.customs, token_service.clock.sleep
        )

    def routing(
        self, marker: str | os.PathLike[str] | None, *, level: str = "house-consignment"
    ) -> Iterator[tuple[Any, ...]]:
        """
        Routing signals in batches; *marker* is the file that says how far they were taken, and
        ``None`` none.
        """
        clock, http_client = self._token_service.clock, self._token_service.http_client
        at = Marker(None if marker is None else Path(marker))
        with limit_response_size(self.api("routing")) as client:
            yield from routing(
                client, level, at, now=lambda: clock.now().wall, http_client=http_client
            )

    def _close_clients(self) -> None:
        notice_fork()
        self._clients.clear()
        while self._open_clients:
            self._open_clients.pop().close()


class AsyncCalls(Protocol):
    """For tasks."""

    _token_service: TokenService
    # By API, and by loop: connections belong to the loop that they were made in.
    _clients: dict[tuple[str, int], tuple[httpx.AsyncClient, asyncio.Semaphore]]
    _open_clients: list[httpx.AsyncClient]

    def api(self, name: str) -> httpx.AsyncClient:
        """An httpx.AsyncClient for the API called *name*."""

    def _open(self, base: str) -> httpx.AsyncClient:
        """One that puts no bearer on."""

    async def call(
        self,
        method: str,
        path: str,
        *,
        scope: str | None = None,
        consumer_org: str | None = None,
        resource: Sequence[str] | str | None = None,
        authorization_details: Details | None = None,
        **request: Any,
    ) -> httpx.Response:
        """As TollClient.call; tasks wait for their turn, as many as there may be."""
        api = apis.at(path) if scope else apis.api_of_path(path)
        wanted = self._token_service.request(
            scope or api.name,
            consumer_org=consumer_org,
            resource=resource,
            authorization_details=authorization_details,
        )
        url = f"{self._token_service.endpoints.customs}{path}"
        try:
            return await self._send(api, wanted, method, url, **request)
        except NoResponse as exc:
            raise no_response_error(exc, api, method) from exc

    async def _send(
        self, api: Api, wanted: TokenRequest, method: str, url: str, **request: Any
    ) -> httpx.Response:
        client, turn = self._pooled_client(api)
        request["auth"] = AsyncTollAuth(self._token_service, wanted)
        # The pool looks through all that wait, each time that one is done.
        async with turn:
            return await asend_with_deadline(
                client, method, url, http_client=self._token_service.http_client, **request
            )

    def _pooled_client(self, api: Api) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        """One client an API, and a turn for each of its connections."""
        notice_fork()
        key = (api.name, id(asyncio.get_running_loop()))
        if key not in self._clients:
            base = f"{self._token_service.endpoints.customs}{api.base}"
            made = alimit_response_size(self._open(base)), asyncio.Semaphore(CONNECTIONS)
            self._clients.setdefault(key, made)
        return self._clients[key]

    async def submit(
        self,
        api: str,
        method: str,
        level: str,
        *,
        json: Mapping[str, Any],
        mrn: str | None = None,
        patience: float = 120.0,
        accepted: Callable[[str], None] = lambda _: None,
        waiting: Callable[[float], None] = lambda _: None,
        scope: str | None = None,
        **whom: Unpack[ForWhom],
    ) -> Receipt:
        """As TollClient.submit."""
        conversation = submission(
            apis.named(api), method, level, json, mrn=mrn, patience=patience,
            now=lambda: self._token_service.clock.now().boot,
            accepted=accepted, waiting=waiting,
        )  # fmt: skip
        wanted = self._token_service.request(scope or api, **whom)
        return await self._run_conversation(api, wanted, conversation)

    async def upload(
        self, declaration_id: str, file: str | os.PathLike[str], *, document_type: str
    ) -> Receipt:
        """As TollClient.upload."""
        path = Path(file)
        conversation = upload(declaration_id, path.name, _content(path), document_type)
        return await self._run_conversation(
            "document", self._token_service.request("document"), conversation
        )

    async def _run_conversation(
        self, api: str, wanted: TokenRequest, conversation: Conversation
    ) -> Receipt:
        origin = self._token_service.endpoints.customs

        ask = partial(self._send, apis.named(api), wanted)
        return await arun_conversation(conversation, ask, origin, asyncio.sleep)

    async def routing(
        self, marker: str | os.PathLike[str] | None, *, level: str = "house-consignment"
    ) -> AsyncIterator[tuple[Any, ...]]:
        """As TollClient.routing."""
        clock, http_client = self._token_service.clock, self._token_service.http_client
        at = Marker(None if marker is None else Path(marker))
        async with alimit_response_size(self.api("routing")) as client:
            feed = arouting(
                client, level, at, now=lambda: clock.now().wall, http_client=http_client
            )
            async for batch in feed:
                yield batch

    async def _close_clients(self) -> None:
        notice_fork()
        self._clients.clear()
        while self._open_clients:
            # One that was used in a loop that is over has no connection left to close.
            with contextlib.suppress(RuntimeError):
                await self._open_clients.pop().aclose()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise UsageError(f"upload of {foreign(path)}: cannot be read ({exc.strerror})") from exc
