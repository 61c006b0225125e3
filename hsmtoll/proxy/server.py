"""
The daemon: listens on the loopback or a Unix socket, until SIGTERM or SIGINT.

`/live`, `/ready` and `/metrics` are answered here; Customs' paths begin with `/api/`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aiohttp import web

from hsmtoll.errors import ConfigurationError, sanitized
from hsmtoll.host import system
from hsmtoll.host.connections import silent_log
from hsmtoll.host.sockets import listen_tcp, listen_unix
from hsmtoll.hsm.protect import keep_secrets_in_memory
from hsmtoll.peer_credentials import OVERFLOW, credentials
from hsmtoll.proxy.admission import Admission, Rejected, paths_by_prefix
from hsmtoll.proxy.forward import Forwarder, error_reply
from hsmtoll.proxy.measures import Measures

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hsmtoll.client import AsyncTollClient
    from hsmtoll.settings import LocalProxy

__all__ = ["serve"]

_log = logging.getLogger("hsmtoll.proxy")

_LISTEN: Final = "HSMTOLL_LOCAL_PROXY__LISTEN"

#: Connections at once. Further ones take the place of the one that has been without a request
#: longest.
_CONNECTIONS: Final = 512
#: Seconds for the headers of a request to come, and between two requests.
_IDLE_TIMEOUT: Final = 60.0
#: Seconds at the end for the last bytes of answers.
_LINGER: Final = 1.0


def serve(
    client: AsyncTollClient,
    settings: LocalProxy,
    *,
    grace: float,
    ready: Callable[[str], None] = lambda _: None,
) -> int:
    """
    Serve until SIGTERM or SIGINT; requests that have begun get *grace* seconds then.

    *ready* is called with the address once connections are accepted. Raises ConfigurationError if
    the proxy cannot listen or *settings* do not fit together. Returns 0.
    """
    keep_secrets_in_memory()
    given = [each.socket for each in system.given_sockets()]
    for each in given:
        _check_local(each)
    listening = given or [_listen(settings.listen)]
    try:
        with contextlib.ExitStack() as made:
            # The service manager's own sockets stay.
            if not given and _is_unix(listening[0]):
                made.callback(Path(listening[0].getsockname()).unlink, missing_ok=True)
            asyncio.run(_Proxy(client, settings, listening).run(grace, ready, made.close))
    finally:
        for each in listening:
            each.close()
    return 0


def _check_local(given: socket.socket) -> None:
    """ConfigurationError for a socket of the service manager that other machines reach."""
    if not _is_unix(given) and not ipaddress.ip_address(given.getsockname()[0]).is_loopback:
        raise ConfigurationError(
            "LISTEN_FDS: a socket is not on the loopback",
            hint="in the .socket unit: ListenStream=/PATH or 127.0.0.1:PORT",
        )


def _is_unix(listening: socket.socket) -> bool:
    return listening.family == socket.AF_UNIX


def _listen(where: str) -> socket.socket:
    if where.startswith("unix:"):
        path = where.removeprefix("unix:").removeprefix("//")
        if not path.startswith("/"):
            raise ConfigurationError(
                f"{_LISTEN}: {sanitized(where)}: an absolute path is expected", hint="unix:/PATH"
            )
        return listen_unix(Path(path), _LISTEN)
    return listen_tcp(where, _LISTEN, local=True)


class _Proxy:
    """Event loop, connections and the pages of the proxy itself, around one `Forwarder`."""

    def __init__(
        self, client: AsyncTollClient, settings: LocalProxy, listening: list[socket.socket]
    ) -> None:
        self._client = client
        self._listening = listening
        self._callers = frozenset({os.geteuid(), 0, *settings.uids}) - OVERFLOW
        self._admission = Admission(_hosts(listening), paths_by_prefix(settings.paths))
        self._measures = Measures(client.status)

    async def run(
        self, grace: float, ready: Callable[[str], None], remove: Callable[[], object]
    ) -> None:
        """Serve until a signal ends it; *remove* then removes the file of a socket."""
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ended.set)
        async with self._client, contextlib.AsyncExitStack() as stack:
            forwarder = Forwarder(self._client.token_service, self._admission, self._measures)
            stack.push_async_callback(forwarder.close)
            server = _Server(partial(self._answer, forwarder))
            servers = [await loop.create_server(server, sock=each) for each in self._listening]
            system.notify("READY=1")
            ready(", ".join(map(_shown, self._listening)))
            await ended.wait()
            system.notify("STOPPING=1")
            # Before it is closed: until then no other proxy takes the path over.
            remove()
            for each in servers:
                each.close()
            await server.drain(grace)

    async def _answer(self, forwarder: Forwarder, request: web.BaseRequest) -> web.StreamResponse:
        try:
            caller = self._caller(request)
            page = request.raw_path.partition("?")[0]
            if request.method in ("GET", "HEAD") and page in ("/live", "/ready", "/metrics"):
                self._admission.check_origin(request.headers)
                return await self._page(forwarder, page, request)
        except Rejected as exc:
            _log.warning("%s: %s", exc.code, exc, extra={"event": "refused"})
            return error_reply(exc)
        return await forwarder.handle(request, caller)

    def _caller(self, request: web.BaseRequest) -> str:
        """Who asks, for the log. Raises Rejected for an account that may not."""
        connection = request.get_extra_info("socket")
        if connection is None:
            raise Rejected(403, "caller-refused", "the caller has left", "call again")
        if not _is_unix(connection):
            return "on the loopback"
        known = credentials(connection)
        if known is None or known[0] not in self._callers:
            name = "unknown" if known is None else f"uid {known[0]}"
            raise Rejected(
                403, "caller-refused", f"account {name}: may not call here",
                "HSMTOLL_LOCAL_PROXY__UIDS lists who may, beside the proxy's own account and root",
            )  # fmt: skip
        return f"uid {known[0]}"

    async def _page(
        self, forwarder: Forwarder, page: str, request: web.BaseRequest
    ) -> web.Response:
        headers = {"Cache-Control": "no-store", "Server": "hsmtoll"}
        if page == "/metrics":
            body, kind = self._measures.exposition(request.headers.get("Accept", ""))
            return web.Response(body=body, headers={**headers, "Content-Type": kind})
        if page == "/live":
            return web.json_response({"live": True}, headers=headers)
        why = await forwarder.not_ready()
        return web.json_response(
            {"ready": not why, "why": why}, status=503 if why else 200, headers=headers
        )


class _Server(web.Server):
    """Connections with replies of ours to what is not HTTP, and bodies as they come."""

    def __init__(self, handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]) -> None:
        # A request goes on when its caller leaves: a cancelled one may leave its connection taken
        # in the pool of the HTTP client, and nobody would learn what Customs answered.
        super().__init__(self._served)
        self._handler = handler
        #: Connections without a request, in the order in which that began.
        self._idle: dict[web.RequestHandler, None] = {}
        self._ending = False
        self._busy = 0
        self._quiet = asyncio.Event()

    def __call__(self) -> web.RequestHandler:
        return _Handler(
            self,
            loop=asyncio.get_running_loop(),
            access_log=silent_log,
            logger=silent_log,
            auto_decompress=False,
            keepalive_timeout=_IDLE_TIMEOUT,
        )

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        """Take the place of an idle connection where all are taken; close where none is idle."""
        super().connection_made(handler, transport)
        self._idle[handler] = None
        if len(self.connections) > _CONNECTIONS:
            next(iter(self._idle)).force_close()

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        """Forget a connection."""
        super().connection_lost(handler, exc)
        self._idle.pop(handler, None)

    async def _served(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        self._idle.pop(connection, None)
        self._busy += 1
        try:
            return await self._handler(request)
        finally:
            self._busy -= 1
            if connection.transport is not None:
                self._idle[connection] = None
            if self._ending:
                connection.close()
                if not self._busy:
                    self._quiet.set()

    async def drain(self, grace: float) -> None:
        """Close idle connections; give requests that have begun *grace* seconds."""
        self._ending = True
        for connection in tuple(self._idle):
            connection.force_close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace if self._busy else 0):
                await self._quiet.wait()
        await self.shutdown(_LINGER)


class _Handler(web.RequestHandler):
    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Reply without the message of the library, which may quote what was sent."""
        del message
        if status < 500:
            wrong = Rejected(400, "request-invalid", "not a valid HTTP/1.1 request", "see RFC 9112")
        else:
            _log.error("%s: internal error (%s)", request.method, type(exc).__name__)
            wrong = Rejected(500, "internal", "internal error of the proxy", "its log has the kind")
        response = error_reply(wrong)
        response.force_close()
        return response


def _hosts(listening: list[socket.socket]) -> frozenset[str]:
    """What the header Host may be: names of this machine's loopback, with the port if it is TCP."""
    names = ("localhost", "127.0.0.1", "[::1]")
    hosts: set[str] = set()
    for each in listening:
        if _is_unix(each):
            hosts.update(names)
        else:
            address, port = each.getsockname()[:2]
            literal = f"[{address}]" if ":" in address else address
            hosts.update(f"{name}:{port}" for name in (*names, literal))
            if port == 80:
                # Clients leave the default port out.
                hosts.update((*names, literal))
    return frozenset(hosts)


def _shown(listening: socket.socket) -> str:
    if _is_unix(listening):
        return f"unix:{listening.getsockname()}"
    address, port = listening.getsockname()[:2]
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
