"""
Connections to the signing host and their limits.

    accept ──► TLS handshake ──► peer ──► place ──► request within 5 s ──► handler ──► reply
                                  │ none free        └─ late: close                      │
                                  ├─► wait, unread    ┌──────────── next request ◄──── idle
                                  └─► too many: 503   └─ after 60 s, or needed by another: close

Requests of one connection are served one after the other. Authorization is not done here: each
request is handed on with the peer of its connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import ssl
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aiohttp import web

from hsmtoll.errors import HsmTollError, PolicyDenied
from hsmtoll.host import peers
from hsmtoll.host.authorize import busy
from hsmtoll.host.messages import RequestRejected, malformed, reply_to

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    from hsmtoll.host.peers import Peer

__all__ = ["Limits", "Listener", "mark_complete"]

_log = logging.getLogger("hsmtoll.host")

#: TLS handshakes at once. Anyone who can connect can begin one, so the limit is high; above it
#: the oldest handshake is closed.
_MAX_HANDSHAKES: Final = 512
#: Connections that wait for a place: in all, and of one caller. Above that they get 503.
_MAX_WAITING: Final = 256
_MAX_WAITING_PER_CALLER: Final = 64
#: Connections at once that get 503. Above that they are closed without a reply.
_MAX_REJECTED: Final = 64
#: Connections accepted in one callback.
_ACCEPTS_PER_CALL: Final = 64

#: The account of connections that close after their reply; they count against no caller's limit.
_CLOSING: Final = "closing"

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


@dataclass(frozen=True, slots=True)
class Limits:
    """
    Connections that are served at once, in all and of one caller. Further ones wait up to
    *patience* seconds.
    """

    connections: int
    per_caller: int
    patience: float


@dataclass(slots=True, eq=False)
class _Connection:
    """
    One connection. *account*: whose limit it counts against. *peer*: a PolicyDenied if the peer
    cannot be identified. *since*: when it was accepted, in the loop's time. *context*: what its
    TLS handshake was checked by.
    """

    account: str
    peer: Peer | PolicyDenied | None
    since: float
    context: ssl.SSLContext | None = None
    transport: asyncio.Transport | None = None
    timer: asyncio.TimerHandle | None = None
    #: A whole request is there that has no reply yet: the connection is not closed before that.
    request_complete: bool = False
    #: The last request has its reply, and nothing was received since.
    idle: bool = False


class _Protocol(web.RequestHandler):
    """aiohttp's handler of one connection, with error replies of ours."""

    __slots__ = ("_listener", "connection")

    def __init__(self, manager: web.Server, connection: _Connection, listener: Listener) -> None:
        super().__init__(
            manager,
            loop=asyncio.get_running_loop(),
            access_log=_silent,
            logger=_silent,
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
_silent = logging.getLogger("hsmtoll.host.http")
_silent.addHandler(logging.NullHandler())
_silent.propagate = False
_silent.setLevel(logging.CRITICAL)


class Listener:
    """
    One listening socket. *handler* gets each request with its peer: a PolicyDenied if the peer
    cannot be identified, ``None`` without *peers_known*. *tls* returns the context for each new
    connection.
    """

    def __init__(
        self,
        listening: socket.socket,
        handler: Callable[[web.BaseRequest, Peer | PolicyDenied | None], Awaitable[web.Response]],
        limits: Limits,
        *,
        tls: Callable[[], ssl.SSLContext] | None = None,
        peers_known: bool = True,
    ) -> None:
        self._listening = listening
        self._handler = handler
        self._limits = limits
        self._tls = tls
        self._peers_known = peers_known
        self._server = web.Server(self._handled)
        # A connection is in one of these. They are dicts for their order.
        self._handshakes: dict[_Connection, asyncio.Task[None]] = {}
        self._waiting: dict[_Connection, None] = {}
        self._rejected: dict[_Connection, None] = {}
        #: Those that have a place, the least recently used first.
        self._open: dict[_Connection, None] = {}
        self._per_account: Counter[str] = Counter()
        #: Connections closed because of a limit.
        self.dropped = 0
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
        for connection in (*self._waiting, *self._rejected):
            _abort(connection)
        for connection in tuple(self._open):
            # An incomplete request is not served any more.
            if not connection.request_complete and connection.transport is not None:
                connection.transport.close()
                self._set_timer(connection, _REQUEST_TIMEOUT)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while self._open:
                    self._empty.clear()
                    await self._empty.wait()
        for connection in tuple(self._open):
            _abort(connection)
        await asyncio.gather(*self._establishing, return_exceptions=True)

    def close_outdated(self) -> None:
        """
        Close what is idle or waits and was checked by certificates or revocation lists that have
        been replaced. A request that is being served is finished; its connection closes after it.
        """
        for connection in (*self._open, *self._waiting):
            if (connection.idle or connection in self._waiting) and self._is_outdated(connection):
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
            accepted.close()
            return
        task = loop.create_task(self._establish(accepted, connection))
        self._establishing.add(task)
        task.add_done_callback(self._establishing.discard)
        if self._tls is not None:
            if len(self._handshakes) >= _MAX_HANDSHAKES:
                self._handshakes.pop(next(iter(self._handshakes))).cancel()
                self._count_dropped("too many TLS handshakes at once; the oldest was ended")
            self._handshakes[connection] = task

    def _resume(self) -> None:
        if self._listening.fileno() >= 0:
            self.open()

    def _identify(self, accepted: socket.socket, now: float) -> _Connection:
        if not self._peers_known:
            return _Connection("anybody", None, now)
        if self._tls is not None:
            # Before the handshake the address stands for the caller.
            try:
                return _Connection(f"address:{accepted.getpeername()[0]}", None, now)
            except OSError:
                return _Connection("address:gone", None, now)
        try:
            peer = peers.of_socket(accepted)
        except PolicyDenied as exc:
            return _Connection("unknown", exc, now)
        except OSError:
            unknown = PolicyDenied("caller: its account cannot be learned", code="caller-unknown")
            return _Connection("unknown", unknown, now)
        return _Connection(peer.account, peer, now)

    async def _establish(self, accepted: socket.socket, connection: _Connection) -> None:
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
            # Clients without a valid certificate end here; only some of it is logged as a warning.
            _log.info("listener: connection failed (%s)", type(exc).__name__)
            if isinstance(exc, ssl.SSLCertVerificationError):
                self._warn(f"a caller's certificate is not taken ({exc.verify_message})")

    def established(self, connection: _Connection, transport: asyncio.Transport) -> None:
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
        if connection in self._waiting:
            transport.pause_reading()
            self._set_timer(connection, self._limits.patience)
        elif connection in self._open or connection in self._rejected:
            spent = asyncio.get_running_loop().time() - connection.since
            self._set_timer(connection, _REQUEST_TIMEOUT - spent)
        else:
            # No place, or closed in favour of another one before it was established.
            transport.abort()

    # ------------------------------------------------------------------ limits

    def _place(self, connection: _Connection) -> bool:
        """Give *connection* a place, let it wait, or have it answered 503; False: close it."""
        if self._make_room(connection.account):
            self._open[connection] = None
            self._per_account[connection.account] += 1
        elif (
            len(self._waiting) < _MAX_WAITING
            and self._waiting_of(connection.account) < _MAX_WAITING_PER_CALLER
        ):
            self._waiting[connection] = None
        elif len(self._rejected) < _MAX_REJECTED:
            self._rejected[connection] = None
        else:
            return False
        return True

    def _make_room(self, account: str) -> bool:
        """
        Whether there is a place for *account*, after closing another connection if need be: at
        the limit of one account an idle one of its own, at the total limit the oldest that has no
        complete request.
        """
        if self._per_account[account] >= self._limits.per_caller:
            candidates = (each for each in self._open if each.idle and each.account == account)
        elif len(self._open) >= self._limits.connections:
            candidates = (each for each in self._open if not each.request_complete)
        else:
            return True
        oldest = next(candidates, None)
        if oldest is None:
            return False
        if not oldest.idle:
            self._count_dropped("too many connections at once; the oldest silent one was ended")
        self._close(oldest)
        # Its place may have gone to one that waits.
        return self._has_room(account)

    def _has_room(self, account: str) -> bool:
        return (
            len(self._open) < self._limits.connections
            and self._per_account[account] < self._limits.per_caller
        )

    def _waiting_of(self, account: str) -> int:
        return sum(each.account == account for each in self._waiting)

    def _serve_waiting(self) -> None:
        """Give free places to those that wait, first come, first served."""
        for connection in tuple(self._waiting):
            if self._has_room(connection.account) and not self._ending:
                del self._waiting[connection]
                self._open[connection] = None
                self._per_account[connection.account] += 1
                self._read(connection)

    def _read(self, connection: _Connection) -> None:
        """Read the request of a connection that has waited."""
        if connection.transport is not None:
            connection.transport.resume_reading()
            self._set_timer(connection, _REQUEST_TIMEOUT)

    def _count_dropped(self, why: str) -> None:
        self.dropped += 1
        self._warn(why)

    def _warn(self, why: str) -> None:
        # A missing revocation list rejects every client, which sees a TLS alert at most, so the
        # log has to say it; but anyone can cause a rejection, so it is rate-limited.
        now = asyncio.get_running_loop().time()
        if now >= self._warn_after.get(why, now):
            self._warn_after[why] = now + _WARNING_INTERVAL
            _log.warning("listener: %s", why)

    # ------------------------------------------------------------------ time limits and ends

    def _set_timer(self, connection: _Connection, seconds: float) -> None:
        if connection.timer is not None:
            connection.timer.cancel()
        loop = asyncio.get_running_loop()
        connection.timer = loop.call_later(seconds, self._expired, connection)

    def _expired(self, connection: _Connection) -> None:
        if connection not in self._waiting:
            _abort(connection)
            return
        del self._waiting[connection]
        self._rejected[connection] = None
        self._read(connection)

    def _close(self, connection: _Connection) -> None:
        """Close *connection*, whose last reply may be on its way."""
        self.ended(connection)
        if connection.transport is not None:
            connection.transport.close()
            asyncio.get_running_loop().call_later(_LINGER, _abort, connection)

    def ended(self, connection: _Connection) -> None:
        """Forget a closed connection. May be called more than once."""
        if connection.timer is not None:
            connection.timer.cancel()
        for others in (self._handshakes, self._waiting, self._rejected):
            others.pop(connection, None)
        if connection not in self._open:
            return
        del self._open[connection]
        self._release_account(connection.account)
        self._serve_waiting()
        if not self._open:
            self._empty.set()

    def _release_account(self, account: str) -> None:
        self._per_account[account] -= 1
        # Free the memory of accounts without connections.
        if not self._per_account[account]:
            del self._per_account[account]

    # ------------------------------------------------------------------ requests

    def receiving(self, connection: _Connection) -> None:
        """Start the time limit of a further request."""
        if connection.idle:
            connection.idle = False
            self._set_timer(connection, _REQUEST_TIMEOUT)

    async def _handled(self, request: web.BaseRequest) -> web.Response:
        connection = _connection_of(request)
        self.receiving(connection)
        try:
            if connection in self._rejected:
                raise busy("too many connections at once")  # noqa: TRY301
            response = await self._handler(request, connection.peer)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the caller is answered
            if not isinstance(exc, HsmTollError | RequestRejected):
                _log.error("internal error: %s; please report it", _origin(exc))
            response = reply_to(exc)
        if connection in self._open:
            self._answered(connection, response, keep=request.keep_alive)
        else:
            response.force_close()
        return response

    def _answered(self, connection: _Connection, response: web.Response, *, keep: bool) -> None:
        """Keep *connection* for the next request if nothing is against it; else close it."""
        keep = keep and connection.request_complete and self._may_keep(connection)
        connection.request_complete, connection.idle = False, True
        # To the end: it was used last.
        self._open[connection] = self._open.pop(connection)
        if keep:
            response.headers["Keep-Alive"] = f"timeout={_IDLE_TIMEOUT:.0f}"
            self._set_timer(connection, _IDLE_TIMEOUT)
            return
        # The caller can open the next connection before this one is closed.
        response.force_close()
        self._release_account(connection.account)
        connection.account = _CLOSING
        self._per_account[_CLOSING] += 1
        self._set_timer(connection, _REQUEST_TIMEOUT)
        self._serve_waiting()

    def _may_keep(self, connection: _Connection) -> bool:
        age = asyncio.get_running_loop().time() - connection.since
        return not (
            self._ending
            or age > _MAX_AGE
            or self._is_outdated(connection)
            or len(self._open) >= self._limits.connections
            or self._waiting_of(connection.account)
        )

    def _is_outdated(self, connection: _Connection) -> bool:
        return self._tls is not None and connection.context is not self._tls()


def _connection_of(request: web.BaseRequest) -> _Connection:
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


def _abort(connection: _Connection) -> None:
    if connection.transport is not None:
        connection.transport.abort()
