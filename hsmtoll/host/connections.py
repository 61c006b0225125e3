"""
Connections to the signing host, from accept(2) to their end.

    accept ──► TLS handshake ──► peer ──► place ──► request within 5 s ──► handler ──► reply
                                  │ none free        └─ late: close                      │
                                  ├─► wait, unread    ┌──────────── next request ◄──── idle
                                  └─► too many: 503   └─ after 60 s, or needed by another: close

Requests of one connection are served one after the other. Who gets a place is decided in `places`.
Authorization is not done here: each request is handed on with the peer of its connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aiohttp import web

from hsmtoll.errors import HsmTollError, PolicyDenied
from hsmtoll.host import peers
from hsmtoll.host.authorize import busy
from hsmtoll.host.messages import RequestRejected, malformed, reply_to
from hsmtoll.host.places import Connection, Places

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    from hsmtoll.host.peers import Peer
    from hsmtoll.host.places import Limits

__all__ = ["Listener", "mark_complete", "silent_log"]

_log = logging.getLogger("hsmtoll.host")

#: TLS handshakes at once. Anyone who can connect can begin one, so the limit is high; above it
#: the oldest handshake is closed.
_MAX_HANDSHAKES: Final = 512
#: Connections accepted in one callback.
_ACCEPTS_PER_CALL: Final = 64

#: Seconds to send a request, TLS handshake included; and to read the last reply.
_REQUEST_TIMEOUT: Final = 5.0
#: Seconds between two requests of one connection.
_IDLE_TIMEOUT: Final = 60.0
#: Seconds after which a connection is not kept for another request: the certificate of its caller
#: may have expired since the handshake.
_MAX_AGE: Final = 300.0
#: Seconds between two warnings of the same kind.
_WARNING_INTERVAL: Final = 60.0
#: Seconds for a client to read what was sent before its connection is closed.
_LINGER: Final = 1.0
#: Seconds before the next accept(2) after one has failed.
_ACCEPT_RETRY_DELAY: Final = 0.1

#: Bytes of a header line, and number of header lines.
_MAX_LINE: Final = 4096
_MAX_HEADERS: Final = 64


class _Protocol(web.RequestHandler):
    """aiohttp's handler of one connection, with error replies of ours."""

    __slots__ = ("_listener", "connection")

    def __init__(self, manager: web.Server, connection: Connection, listener: Listener) -> None:
        super().__init__(
            manager,
            loop=asyncio.get_running_loop(),
            access_log=silent_log,
            logger=silent_log,
            max_line_size=_MAX_LINE,
            max_field_size=_MAX_LINE,
            max_headers=_MAX_HEADERS,
            auto_decompress=False,
            # Time for a client to read a rejection that is sent before its body was read.
            lingering_time=_LINGER,
            tcp_keepalive=False,
        )
        self.connection = connection
        self._listener = listener

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connection established (after the TLS handshake)."""
        super().connection_made(transport)
        if isinstance(transport, asyncio.Transport):
            self._listener.established(self.connection, transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Connection closed, by either side."""
        self._listener.ended(self.connection)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A part of a request."""
        if data:
            self._listener.receiving(self.connection)
        super().data_received(data)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Reply to what aiohttp could not parse, without its message, which may quote input."""
        del request, exc, message
        response = reply_to(malformed() if status < 500 else RuntimeError())
        response.force_close()
        return response


# Discards aiohttp's log: it quotes input that could not be parsed.
silent_log = logging.getLogger("hsmtoll.host.http")
silent_log.addHandler(logging.NullHandler())
silent_log.propagate = False
silent_log.setLevel(logging.CRITICAL)


class Listener:
    """
    One listening socket. *handler* gets each request with its peer: a PolicyDenied if the peer
    cannot be identified, ``None`` without *peers_known*. *tls* returns the context for each new
    connection. *refused* is called with the reason for each connection that is not served:
    ``crowded`` (closed to make room), ``busy`` (above a limit) or ``handshake`` (of TLS).
    """

    def __init__(
        self,
        listening: socket.socket,
        handler: Callable[[web.BaseRequest, Peer | PolicyDenied | None], Awaitable[web.Response]],
        limits: Limits,
        *,
        tls: Callable[[], ssl.SSLContext] | None = None,
        peers_known: bool = True,
        refused: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._listening = listening
        self._handler = handler
        self._limits = limits
        self._tls = tls
        self._peers_known = peers_known
        self._server = web.Server(self._handled)
        self._places = Places(limits)
        # The oldest first.
        self._handshakes: dict[Connection, asyncio.Task[None]] = {}
        self._refused = refused
        # Text of a warning → the loop's time from which it may be logged again.
        self._warn_after: dict[str, float] = {}
        self._establishing: set[asyncio.Task[None]] = set()
        self._ending = False
        self._empty = asyncio.Event()
        listening.setblocking(False)

    def open(self) -> None:
        """Start accepting connections."""
        asyncio.get_running_loop().add_reader(self._listening, self._accept)

    async def close(self, *, grace: float) -> None:
        """Stop accepting; wait up to *grace* seconds for replies to complete requests."""
        self._ending = True
        asyncio.get_running_loop().remove_reader(self._listening)
        self._listening.close()
        for task in self._establishing:
            task.cancel()
        for connection in (*self._places.waiting, *self._places.rejected):
            _abort(connection)
        for connection in tuple(self._places.served):
            # An incomplete request is not served any more.
            if not connection.request_complete and connection.transport is not None:
                connection.transport.close()
                self._set_timer(connection, _REQUEST_TIMEOUT)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while self._places.served:
                    self._empty.clear()
                    await self._empty.wait()
        for connection in tuple(self._places.served):
            _abort(connection)
        await asyncio.gather(*self._establishing, return_exceptions=True)

    def close_outdated(self) -> None:
        """
        Close idle and waiting connections whose handshake used certificates or revocation lists
        that have been replaced. A connection with a running request closes after its reply.
        """
        idle = (each for each in self._places.served if each.idle)
        for connection in (*self._places.waiting, *idle):
            if self._is_outdated(connection):
                self._close(connection)

    # ------------------------------------------------------------------ accept

    def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(_ACCEPTS_PER_CALL):
            try:
                accepted, _ = self._listening.accept()
            except OSError as exc:
                # Out of file descriptors, unless the client closed before accept(2).
                if exc.errno not in (errno.EAGAIN, errno.ECONNABORTED, errno.EPROTO):
                    _log.warning("listener: cannot accept connections (%s)", exc.strerror)
                    loop.remove_reader(self._listening)
                    loop.call_later(_ACCEPT_RETRY_DELAY, self._resume)
                return
            self._on_accepted(accepted)

    def _on_accepted(self, accepted: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        accepted.setblocking(False)
        connection = self._identify(accepted, loop.time())
        if self._tls is None and not self._place(connection):
            self._refused("busy")
            accepted.close()
            return
        task = loop.create_task(self._establish(accepted, connection))
        self._establishing.add(task)
        task.add_done_callback(self._establishing.discard)
        if self._tls is not None:
            if len(self._handshakes) >= _MAX_HANDSHAKES:
                self._handshakes.pop(next(iter(self._handshakes))).cancel()
                self._count_dropped("too many TLS handshakes at once; the oldest was closed")
            self._handshakes[connection] = task

    def _resume(self) -> None:
        if self._listening.fileno() >= 0:
            self.open()

    def _identify(self, accepted: socket.socket, now: float) -> Connection:
        if not self._peers_known:
            return Connection("anybody", None, now)
        if self._tls is not None:
            # Before the handshake the address stands for the caller.
            try:
                return Connection(f"address:{accepted.getpeername()[0]}", None, now)
            except OSError:
                return Connection("address:gone", None, now)
        try:
            peer = peers.of_socket(accepted)
        except PolicyDenied as exc:
            return Connection("unknown", exc, now)
        except OSError:
            unknown = PolicyDenied(
                "caller: its account cannot be determined", code="caller-unknown"
            )
            return Connection("unknown", unknown, now)
        return Connection(peer.account, peer, now)

    async def _establish(self, accepted: socket.socket, connection: Connection) -> None:
        connection.context = self._tls() if self._tls else None
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: _Protocol(self._server, connection, self),
                accepted,
                ssl=connection.context,
                ssl_handshake_timeout=_REQUEST_TIMEOUT if self._tls else None,
                ssl_shutdown_timeout=_LINGER if self._tls else None,
            )
        except BaseException as exc:
            accepted.close()
            self.ended(connection)
            if not isinstance(exc, OSError):
                raise
            self._refused("handshake")
            # Mostly clients without a valid certificate. Anyone can cause it: not always a warning.
            _log.debug("listener: connection failed (%s)", type(exc).__name__)
            if isinstance(exc, ssl.SSLCertVerificationError):
                self._warn(f"a client certificate was rejected ({exc.verify_message})")

    def established(self, connection: Connection, transport: asyncio.Transport) -> None:
        """Start reading requests, or the wait for a place; over TLS, identify the peer first."""
        connection.transport = transport
        if self._tls is not None:
            self._handshakes.pop(connection, None)
            shown = transport.get_extra_info("ssl_object")
            # The context requires a client certificate.
            der = shown.getpeercert(binary_form=True) or b""
            connection.peer = peers.of_certificate(shown.getpeercert() or {}, der)
            connection.account = connection.peer.account
            self._place(connection)
        if connection in self._places.waiting:
            if self._tls is not None:
                transport.pause_reading()
            else:
                # Not yet: Python 3.11.2 begins to read after connection_made, paused or not.
                asyncio.get_running_loop().call_soon(self._pause, connection)
            self._set_timer(connection, self._limits.max_wait)
        elif connection in self._places.served or connection in self._places.rejected:
            spent = asyncio.get_running_loop().time() - connection.since
            self._set_timer(connection, _REQUEST_TIMEOUT - spent)
        else:
            # No place, or closed in favour of another one before it was established.
            transport.abort()

    # ------------------------------------------------------------------ limits

    def _place(self, connection: Connection) -> bool:
        """Give *connection* a place, let it wait, or have it answered 503; False: close it."""
        other = self._places.to_close_for(connection.account)
        if other is not None:
            if not other.idle:
                self._count_dropped(
                    "too many connections at once; the oldest without a request was closed"
                )
            self._close(other)
        return self._places.add(connection)

    def _serve_waiting(self) -> None:
        if not self._ending:
            for connection in self._places.serve_waiting():
                self._read(connection)

    def _pause(self, connection: Connection) -> None:
        if connection in self._places.waiting and connection.transport is not None:
            connection.transport.pause_reading()

    def _read(self, connection: Connection) -> None:
        """Read the request of a connection that has waited."""
        if connection.transport is not None:
            connection.transport.resume_reading()
            self._set_timer(connection, _REQUEST_TIMEOUT)

    def _count_dropped(self, why: str) -> None:
        self._refused("crowded")
        self._warn(why)

    def _warn(self, why: str) -> None:
        # A missing revocation list rejects every client, which sees a TLS alert at most, so the
        # log has to say it; but anyone can cause a rejection, so it is rate-limited.
        now = asyncio.get_running_loop().time()
        if now >= self._warn_after.get(why, now):
            self._warn_after[why] = now + _WARNING_INTERVAL
            _log.warning("listener: %s", why)

    # ------------------------------------------------------------------ time limits and ends

    def _set_timer(self, connection: Connection, seconds: float) -> None:
        if connection.timer is not None:
            connection.timer.cancel()
        loop = asyncio.get_running_loop()
        connection.timer = loop.call_later(seconds, self._expired, connection)

    def _expired(self, connection: Connection) -> None:
        if connection in self._places.waiting:
            self._places.reject(connection)
            self._read(connection)
        else:
            _abort(connection)

    def _close(self, connection: Connection) -> None:
        """Close *connection*, whose last reply may be on its way."""
        self.ended(connection)
        if connection.transport is not None:
            connection.transport.close()
            asyncio.get_running_loop().call_later(_LINGER, _abort, connection)

    def ended(self, connection: Connection) -> None:
        """Forget a closed connection. May be called more than once."""
        if connection.timer is not None:
            connection.timer.cancel()
        self._handshakes.pop(connection, None)
        if self._places.remove(connection):
            self._serve_waiting()
            if not self._places.served:
                self._empty.set()

    # ------------------------------------------------------------------ requests

    def receiving(self, connection: Connection) -> None:
        """Start the time limit of a further request."""
        if connection.idle:
            connection.idle = False
            self._set_timer(connection, _REQUEST_TIMEOUT)

    async def _handled(self, request: web.BaseRequest) -> web.Response:
        connection = _connection_of(request)
        self.receiving(connection)
        try:
            response = await self._reply(request, connection)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the caller is answered
            if not isinstance(exc, HsmTollError | RequestRejected):
                _log.error("internal error: %s; please report it", _origin(exc))
            response = reply_to(exc)
        if connection in self._places.served:
            self._answered(connection, response, keep=request.keep_alive)
        else:
            response.force_close()
        return response

    async def _reply(self, request: web.BaseRequest, connection: Connection) -> web.Response:
        if connection in self._places.rejected:
            self._refused("busy")
            raise busy("too many connections at once")
        return await self._handler(request, connection.peer)

    def _answered(self, connection: Connection, response: web.Response, *, keep: bool) -> None:
        """Keep *connection* for the next request if nothing is against it; else close it."""
        keep = keep and connection.request_complete and self._may_keep(connection)
        self._places.used(connection)
        if keep:
            response.headers["Keep-Alive"] = f"timeout={_IDLE_TIMEOUT:.0f}"
            self._set_timer(connection, _IDLE_TIMEOUT)
            return
        # The caller can open the next connection before this one is closed.
        response.force_close()
        self._places.closing(connection)
        self._set_timer(connection, _REQUEST_TIMEOUT)
        self._serve_waiting()

    def _may_keep(self, connection: Connection) -> bool:
        old = asyncio.get_running_loop().time() - connection.since > _MAX_AGE
        outdated = self._is_outdated(connection)
        return not (self._ending or old or outdated or self._places.is_wanted(connection))

    def _is_outdated(self, connection: Connection) -> bool:
        return self._tls is not None and connection.context is not self._tls()


def _connection_of(request: web.BaseRequest) -> Connection:
    protocol = request.protocol
    if not isinstance(protocol, _Protocol):
        raise TypeError("a request of another server")
    return protocol.connection


def mark_complete(request: web.BaseRequest) -> None:
    """Note that *request* was received completely, and stop its time limit."""
    connection = _connection_of(request)
    connection.request_complete = True
    if connection.timer is not None:
        connection.timer.cancel()


def _origin(exc: Exception) -> str:
    at = exc.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    place = f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}" if at else "?"
    return f"{type(exc).__name__} at {place}"


def _abort(connection: Connection) -> None:
    if connection.transport is not None:
        connection.transport.abort()
