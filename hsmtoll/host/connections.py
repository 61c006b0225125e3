"""
Listening sockets, connections and their limits, and the syntax of a request.

    accept ──► TLS handshake ──► peer ──► limits ──► one request within 5 s ──► handler
       └─ too many: close the oldest        └─ over: 503   └─ late: close

One connection carries one request. Authorization is not done here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import math
import os
import re
import socket
import ssl
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from hsmtoll import files
from hsmtoll.errors import (
    ConfigurationError,
    HsmTollError,
    PolicyDenied,
    UsageError,
    foreign,
)
from hsmtoll.files import check_trusted
from hsmtoll.host import peers
from hsmtoll.host.policy import GrantRequest
from hsmtoll.jsonio import read_strict
from hsmtoll.signing import replies
from hsmtoll.token import details_text

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hsmtoll.host.peers import Peer
    from hsmtoll.host.policy import Mode

__all__ = [
    "Listener",
    "RequestRejected",
    "json_reply",
    "listen_tcp",
    "listen_unix",
    "mark_complete",
    "read_request",
    "reply_to",
    "server_context",
]

_log = logging.getLogger("hsmtoll.host")

#: Version of the protocol, in a header of every reply.
VERSION: Final = "1"

#: Connections at once: of a listener, of one caller, and of those being rejected with 503.
_MAX_CONNECTIONS: Final = 64
MAX_PER_CALLER: Final = 8
_MAX_REJECTING: Final = 64
#: TLS handshakes at once. Anyone who can connect can begin one, so the limit is high; above it
#: the oldest handshake is closed.
_MAX_HANDSHAKES: Final = 512
#: Length of the kernel's queue (listen(2)), and connections accepted in one callback.
_BACKLOG: Final = 4096
_ACCEPTS_PER_CALL: Final = 64

#: The account of connections that have their reply; they count against no caller's limit.
_ANSWERED: Final = "answered"

#: Seconds to send a request, TLS handshake included; and to read the reply.
_REQUEST_TIMEOUT: Final = 5.0
#: Seconds between two warnings of the same kind.
_WARNING_INTERVAL: Final = 60.0
#: Seconds that a rejected client has to read its reply before the socket is closed.
_LINGER: Final = 1.0
#: Seconds before the next accept(2) after one has failed.
_ACCEPT_RETRY_DELAY: Final = 0.1

_MAX_BODY: Final = 16 * 1024
_MAX_LINE: Final = 4096
_MAX_TEXT: Final = 256
_MAX_RESOURCES: Final = 16
_PATHS: Final[dict[str, Mode]] = {"/v1/grant": "grant", "/v1/token": "token"}
_MEMBERS: Final = frozenset(
    {"profile", "scope", "consumer_org", "resource", "authorization_details"}
)


class RequestRejected(Exception):
    """A request rejected before authorization: HTTP *status* and error *code* of the reply."""

    def __init__(self, status: int, code: str, description: str, hint: str) -> None:
        super().__init__(description)
        self.status = status
        self.code = code
        self.hint = hint


# ---------------------------------------------------------------------- requests and replies


async def read_request(request: web.BaseRequest) -> tuple[Mode, GrantRequest]:
    """The mode and the parsed body of *request*. Raises RequestRejected for any malformed one."""
    if request.raw_path not in _PATHS or request.method != "POST":
        raise RequestRejected(404, "not_found", "no such request", "POST /v1/grant or /v1/token")
    if request.content_type != "application/json" or request.headers.get("Content-Encoding"):
        raise RequestRejected(
            415, "unsupported_media_type", "the body is not plain JSON",
            "Content-Type: application/json, and no Content-Encoding",
        )  # fmt: skip
    if (request.content_length or 0) > _MAX_BODY:
        raise _too_large()
    raw = bytearray()
    try:
        async for part in request.content.iter_any():
            raw += part
            if len(raw) > _MAX_BODY:
                raise _too_large()
    except (ConnectionError, web.RequestPayloadError) as exc:
        # The client closed the connection, or sent an invalid chunk: not an error of the host.
        raise _bad("the body did not come whole") from exc
    return _PATHS[request.raw_path], parse_body(bytes(raw))


def parse_body(raw: bytes) -> GrantRequest:
    """The request in a body. Raises RequestRejected for a malformed one."""
    try:
        members = read_strict(raw)
    except ValueError:
        raise _bad("the body is not a JSON object with each member once") from None
    if not isinstance(members, dict):
        raise _bad("the body is not a JSON object")
    unknown = sorted(members.keys() - _MEMBERS)
    if unknown:
        raise _bad(f"unknown member {foreign(unknown[0])}")
    resource = members.get("resource")
    listed = [] if resource is None else [resource] if isinstance(resource, str) else resource
    if not isinstance(listed, list) or len(listed) > _MAX_RESOURCES:
        raise _bad("resource is null, a string, or a list of few strings")
    consumer_org = members.get("consumer_org")
    if consumer_org is not None and not (
        isinstance(consumer_org, str)
        and len(consumer_org) == 9
        and consumer_org.isascii()
        and consumer_org.isdigit()
    ):
        raise _bad("consumer_org is null or nine digits")
    return GrantRequest(
        _text(members, "profile"),
        _text(members, "scope"),
        consumer_org,
        tuple(_text({"resource": each}, "resource") for each in listed),
        _details(members.get("authorization_details")),
    )


def _details(given: object) -> str:
    try:
        return details_text(given)
    except UsageError:
        raise _bad(
            "authorization_details is null or a list of objects, each with its type"
        ) from None


def _text(members: dict[str, Any], name: str) -> str:
    value = members.get(name)
    if (
        not isinstance(value, str)
        or not 0 < len(value) <= _MAX_TEXT
        or not (value.isprintable() and value.isascii())
    ):
        raise _bad(f"{name} is not a word of printable ASCII")
    return value


def _bad(description: str) -> RequestRejected:
    members = ", ".join(sorted(_MEMBERS))
    return RequestRejected(400, "bad_request", description, f"the members are {members}")


def _too_large() -> RequestRejected:
    kib = _MAX_BODY // 1024
    return RequestRejected(
        413, "too_large", f"the body is larger than {kib} KiB", "a request is small"
    )


def reply_to(exc: Exception) -> web.Response:
    """The reply for *exc*. The text of an unexpected error is never part of it."""
    if isinstance(exc, RequestRejected):
        return _error(exc.status, exc.code, str(exc), exc.hint, None)
    if not isinstance(exc, HsmTollError):
        text = "internal error of the host; its log has the place"
        return _error(500, "internal", text, "report it to the host's administrator", None)
    reply = replies.reply_to(exc)
    wait = exc.retry_after
    if reply.status in (429, 503) and wait is None:
        wait = _REQUEST_TIMEOUT
    return _error(reply.status, reply.word, foreign(exc), foreign(exc.hint or ""), wait)


def _error(status: int, code: str, text: str, hint: str, wait: float | None) -> web.Response:
    response = json_reply({"error": code, "error_description": text, "hint": hint}, status=status)
    if wait is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(wait)))
    return response


def json_reply(body: dict[str, Any], *, status: int = 200) -> web.Response:
    """A JSON reply."""
    headers = {"Hsmtoll-Version": VERSION, "Cache-Control": "no-store"}
    return web.json_response(body, status=status, headers=headers)


def _busy() -> bytes:
    body = json.dumps(
        {
            "error": "busy",
            "error_description": "too many connections at once",
            "hint": "try again",
        }
    )
    return (
        f"HTTP/1.1 503 Service Unavailable\r\nHsmtoll-Version: {VERSION}\r\nRetry-After: 1\r\n"
        f"Content-Type: application/json; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
        f"Connection: close\r\n\r\n{body}"
    ).encode("ascii")


# ---------------------------------------------------------------------- connections


@dataclass(slots=True, eq=False)
class _Connection:
    """
    One connection: the *account* whose limit it counts against, and its deadline (*until*, in the
    loop's time). *peer* is a PolicyDenied if the peer cannot be identified. Once
    *request_complete*, it is not closed before its reply.
    """

    account: str
    peer: Peer | PolicyDenied | None
    until: float = 0.0
    timer: asyncio.TimerHandle | None = None
    request_complete: bool = False


class _Protocol(web.RequestHandler):
    """aiohttp's handler of one request, with error replies of ours."""

    __slots__ = ("_listener", "connection")

    def __init__(self, manager: web.Server, connection: _Connection, listener: Listener) -> None:
        super().__init__(
            manager,
            loop=asyncio.get_running_loop(),
            access_log=_silent,
            logger=_silent,
            max_line_size=_MAX_LINE,
            max_field_size=_MAX_LINE,
            max_headers=64,
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
        self._listener.established(self.connection, transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Connection closed, by either side."""
        self._listener.ended(self.connection)
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Reply to what aiohttp could not parse, without its message, which may quote input."""
        del request, exc, message
        malformed = status < 500
        response = reply_to(_bad("not a valid HTTP/1.1 request") if malformed else RuntimeError())
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
        *,
        tls: Callable[[], ssl.SSLContext] | None = None,
        peers_known: bool = True,
    ) -> None:
        self._listening = listening
        self._handler = handler
        self._tls = tls
        self._peers_known = peers_known
        self._server = web.Server(self._handled)
        self._open: dict[_Connection, asyncio.BaseTransport | None] = {}
        # Oldest first.
        self._handshakes: dict[_Connection, asyncio.Task[None]] = {}
        #: Connections closed because of a limit.
        self.dropped = 0
        self._per_account: Counter[str] = Counter()
        self._rejecting: set[asyncio.Task[None]] = set()
        # Text of a warning → the loop's time from which it may be logged again.
        self._warn_after: dict[str, float] = {}
        self._establishing: set[asyncio.Task[None]] = set()
        self._empty = asyncio.Event()
        listening.setblocking(False)

    def open(self) -> None:
        """Start accepting connections."""
        asyncio.get_running_loop().add_reader(self._listening, self._accept)

    async def close(self, *, grace: float) -> None:
        """Stop accepting; wait up to *grace* seconds for replies to complete requests."""
        asyncio.get_running_loop().remove_reader(self._listening)
        self._listening.close()
        for task in (*self._rejecting, *self._establishing):
            task.cancel()
        for connection, transport in list(self._open.items()):
            # An incomplete request is not served any more.
            if not connection.request_complete and transport is not None:
                _abort_transport(transport)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while self._open:
                    self._empty.clear()
                    await self._empty.wait()
        for transport in list(self._open.values()):
            if transport is not None:
                _abort_transport(transport)
        await asyncio.gather(*self._rejecting, *self._establishing, return_exceptions=True)

    @property
    def open_connections(self) -> int:
        """Number of connections and TLS handshakes at this moment."""
        return len(self._open) + len(self._handshakes)

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
        connection = self._identify(accepted)
        connection.until = loop.time() + _REQUEST_TIMEOUT
        if self._tls is None and not self._try_admit(connection):
            self._reject(accepted)
            return
        task = loop.create_task(self._establish(accepted, connection))
        self._establishing.add(task)
        task.add_done_callback(self._establishing.discard)
        if self._tls is not None:
            if len(self._handshakes) >= _MAX_HANDSHAKES:
                self._handshakes.pop(next(iter(self._handshakes))).cancel()
                self._count_dropped("too many TLS handshakes at once; the oldest was ended")
            self._handshakes[connection] = task

    def _try_admit(self, connection: _Connection) -> bool:
        """
        Count *connection* against the limits; False if it has to be rejected. Above the total
        limit the oldest connection without a complete request is closed instead; the limit of
        one account is checked before that.
        """
        if self._per_account[connection.account] >= MAX_PER_CALLER:
            return False
        if len(self._open) >= _MAX_CONNECTIONS:
            silent = (each for each in self._open if not each.request_complete)
            oldest = next(silent, None)
            if oldest is None:
                return False
            transport = self._open[oldest]
            self.ended(oldest)
            if transport is not None:
                _abort_transport(transport)
            self._count_dropped("too many connections at once; the oldest silent one was ended")
        self._open[connection] = None
        self._per_account[connection.account] += 1
        return True

    def _count_dropped(self, why: str) -> None:
        self.dropped += 1
        self._warn(why)

    def _resume(self) -> None:
        if self._listening.fileno() >= 0:
            self.open()

    def _identify(self, accepted: socket.socket) -> _Connection:
        if not self._peers_known:
            return _Connection("anybody", None)
        if self._tls is not None:
            # Before the handshake the address stands for the caller.
            try:
                return _Connection(f"address:{accepted.getpeername()[0]}", None)
            except OSError:
                return _Connection("address:gone", None)
        try:
            peer = peers.of_socket(accepted)
        except PolicyDenied as exc:
            return _Connection("unknown", exc)
        except OSError:
            unknown = PolicyDenied("caller: its account cannot be learned", code="caller-unknown")
            return _Connection("unknown", unknown)
        return _Connection(peer.account, peer)

    async def _establish(self, accepted: socket.socket, connection: _Connection) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: _Protocol(self._server, connection, self),
                accepted,
                ssl=self._tls() if self._tls else None,
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

    def _warn(self, why: str) -> None:
        # A missing revocation list rejects every client, which sees a TLS alert at most, so the
        # log has to say it; but anyone can cause a rejection, so it is rate-limited.
        now = asyncio.get_running_loop().time()
        if now >= self._warn_after.get(why, now):
            self._warn_after[why] = now + _WARNING_INTERVAL
            _log.warning("listener: %s", why)

    def established(self, connection: _Connection, transport: asyncio.BaseTransport) -> None:
        """Start the deadline of an established connection; over TLS, identify its peer."""
        loop = asyncio.get_running_loop()
        if self._tls is None:
            if connection not in self._open:
                # Closed in favour of a newer connection before it was established.
                _abort_transport(transport)
                return
            self._open[connection] = transport
            connection.timer = loop.call_at(connection.until, _abort_transport, transport)
            return
        self._handshakes.pop(connection, None)
        shown = transport.get_extra_info("ssl_object")
        der = shown.getpeercert(binary_form=True)
        # The context requires a client certificate.
        peer = peers.of_certificate(shown.getpeercert() or {}, der or b"")
        connection.peer, connection.account = peer, peer.account
        connection.timer = loop.call_at(connection.until, _abort_transport, transport)
        if self._try_admit(connection):
            self._open[connection] = transport
            return
        connection.peer = PolicyDenied("caller: too many connections at once", code="share")
        if isinstance(transport, asyncio.WriteTransport):
            transport.write(_busy())
        transport.close()

    def ended(self, connection: _Connection) -> None:
        """Forget a closed connection. May be called more than once."""
        if connection.timer is not None:
            connection.timer.cancel()
        self._handshakes.pop(connection, None)
        if connection not in self._open:
            return
        del self._open[connection]
        self._release_account(connection.account)
        if not self._open:
            self._empty.set()

    def _release_account(self, account: str) -> None:
        self._per_account[account] -= 1
        # Free the memory of accounts without connections.
        if not self._per_account[account]:
            del self._per_account[account]

    def _reject(self, accepted: socket.socket) -> None:
        if len(self._rejecting) >= _MAX_REJECTING:
            accepted.close()
            return
        task = asyncio.create_task(_send_busy_and_close(accepted))
        self._rejecting.add(task)
        task.add_done_callback(self._rejecting.discard)

    async def _handled(self, request: web.BaseRequest) -> web.Response:
        connection = _connection_of(request)
        try:
            response = await self._handler(request, connection.peer)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the caller is answered
            if not isinstance(exc, HsmTollError | RequestRejected):
                _log.error("internal error: %s; please report it", _origin(exc))
            response = reply_to(exc)
        response.force_close()
        if request.transport is not None:
            # Bounded time to read the reply. The connection leaves its caller's limit now, so the
            # caller can open the next one before this one is closed.
            mark_complete(request)
            self._release_account(connection.account)
            connection.account = _ANSWERED
            self._per_account[_ANSWERED] += 1
            connection.timer = asyncio.get_running_loop().call_later(
                _REQUEST_TIMEOUT, _abort_transport, request.transport
            )
        return response


def _connection_of(request: web.BaseRequest) -> _Connection:
    protocol = request.protocol
    if not isinstance(protocol, _Protocol):
        raise TypeError("a request of another server")
    return protocol.connection


def mark_complete(request: web.BaseRequest) -> None:
    """Note that *request* was received completely, and stop its deadline."""
    connection = _connection_of(request)
    connection.request_complete = True
    if connection.timer is not None:
        connection.timer.cancel()
        connection.timer = None


def _origin(exc: Exception) -> str:
    at = exc.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    place = f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}" if at else "?"
    return f"{type(exc).__name__} at {place}"


def _abort_transport(transport: asyncio.BaseTransport) -> None:
    if isinstance(transport, asyncio.WriteTransport):
        transport.abort()
    else:
        transport.close()


async def _send_busy_and_close(accepted: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    with accepted, contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_LINGER):
            await loop.sock_sendall(accepted, _busy())
            accepted.shutdown(socket.SHUT_WR)
            # close(2) with unread data resets the connection, and the reply would be lost.
            while await loop.sock_recv(accepted, 65536):
                pass


# ---------------------------------------------------------------------- sockets


def listen_unix(path: Path, name: str) -> socket.socket:
    """
    Listen on a Unix socket, created with mode 0660 and the directory's group. A missing directory
    is created with 0750; one that others may write raises ConfigurationError. *name* is the
    setting, for messages.
    """
    directory = path.parent
    try:
        if not directory.exists():
            directory.mkdir(mode=0o750)
            _log.warning(
                "%s: %s was missing; it is made for the group %d, and callers must be its members",
                name, foreign(directory), directory.stat().st_gid,
            )  # fmt: skip
        seen = directory.stat()
    except OSError as exc:
        raise ConfigurationError(
            f"{name} {foreign(path)}: no directory for it ({exc.strerror})",
            hint="make it for the host's account and the group of its callers, as root: install -d "
            f"-o ACCOUNT -g GROUP -m 2750 {foreign(directory)}",
        ) from exc
    check_trusted(directory, f"directory of {name}")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    before = os.umask(0o117)
    try:
        _remove_stale_socket(path)
        listening.bind(str(path))
        with contextlib.suppress(PermissionError):
            os.chown(path, -1, seen.st_gid)
        listening.listen(_BACKLOG)
    except OSError as exc:
        listening.close()
        raise ConfigurationError(
            f"{name} {foreign(path)}: cannot be listened on ({exc.strerror or exc})"
        ) from exc
    finally:
        os.umask(before)
    return listening


def _remove_stale_socket(path: Path) -> None:
    """Remove the socket file that an ended host has left. OSError if anything else is there."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError(errno.EEXIST, "something else is there")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise OSError(errno.EADDRINUSE, "another host listens there")
    path.unlink()


def listen_tcp(address: str, name: str, *, local: bool = False) -> socket.socket:
    """Listen on TCP ``HOST:PORT``; with *local*, ConfigurationError unless it is loopback."""
    host, colon, port = address.rpartition(":")
    host = host.strip("[]")
    if not (colon and host and re.fullmatch("[0-9]{1,5}", port) and int(port) < 2**16):
        raise ConfigurationError(f"{name}: HOST:PORT is expected")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        family, kind, proto, _, where = found[0]
        if local and not _is_loopback(str(where[0])):
            raise ConfigurationError(
                f"{name}: {foreign(address)} is not on the loopback",
                hint="127.0.0.1:PORT, [::1]:PORT or unix:///PATH",
            )
        listening = socket.socket(family, kind | socket.SOCK_CLOEXEC, proto)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
        listening.listen(_BACKLOG)
    except (OSError, UnicodeError) as exc:
        # UnicodeError: a host name with an empty label, or one of more than 63 characters.
        why = getattr(exc, "strerror", None) or "no such address"
        raise ConfigurationError(
            f"{name}: {foreign(address)} cannot be listened on ({why})"
        ) from exc
    return listening


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")


def server_context(cert: Path, key: Path, client_ca: Path, crl: Path | None) -> ssl.SSLContext:
    """
    TLS 1.3 with required client certificates from *client_ca*. If there are revocation lists (in
    *crl* or in the file of the CA), every CA of a client's path needs a current one; otherwise
    the client is rejected. Raises ConfigurationError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    # A resumed session would skip the check of the revocation list.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
    doing = "CERT and HSMTOLL_HOST__KEY"
    files.read(cert, "HSMTOLL_HOST__CERT")
    files.read(key, "HSMTOLL_HOST__KEY", secret=True)
    files.read(client_ca, "HSMTOLL_HOST__CLIENT_CA")
    if crl is not None:
        files.read(crl, "HSMTOLL_HOST__CLIENT_CRL")
    try:
        # Without a password callback OpenSSL prompts on the terminal.
        context.load_cert_chain(cert, key, password=lambda: b"")
        doing = "CLIENT_CA"
        context.load_verify_locations(cafile=client_ca)
        doing = "CLIENT_CRL"
        if crl is not None:
            context.load_verify_locations(cafile=crl)
    except (OSError, ValueError) as exc:
        raise ConfigurationError(
            f"HSMTOLL_HOST__{doing}: cannot be used ({foreign(exc)})",
            hint="PEM files, and a key without passphrase that fits the certificate",
        ) from exc
    if context.cert_store_stats()["crl"]:
        # The whole path: a revoked CA could issue client certificates that are on no list.
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    elif crl is not None:
        raise ConfigurationError(f"HSMTOLL_HOST__CLIENT_CRL {foreign(crl)}: no revocation list")
    else:
        # An intermediate CA in CLIENT_CA is a trust anchor, too. Not with revocation lists:
        # OpenSSL would end the path there and not check whether its issuer has revoked it.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context
