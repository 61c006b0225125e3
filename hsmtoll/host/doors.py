"""
The doors: sockets, their limits, and what a request must look like before anybody asks for whom.

    accept ──► TLS handshake ──► peer ──► its share? ──► one request within 5 s ──► handler
       └─ too many: the oldest goes          └─ no: 503       └─ no: cut off

One connection carries one request. Who may have what is not decided here.
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
from hsmtoll.host.policy import Ask
from hsmtoll.jsonio import read_strict
from hsmtoll.signing import replies
from hsmtoll.token import details_text

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hsmtoll.host.peers import Peer
    from hsmtoll.host.policy import Mode

__all__ = [
    "Door",
    "Refused",
    "answer",
    "complete",
    "listen_tcp",
    "listen_unix",
    "read_ask",
    "reply_to",
    "server_context",
]

_log = logging.getLogger("hsmtoll.host")

#: The wire's version, told with every reply.
VERSION: Final = "1"

#: Connections at once: at a door, of one caller, and of those turned away who are still told so.
_CONNECTIONS: Final = 64
OF_ONE: Final = 8
_TURNED_AWAY: Final = 64
#: TLS handshakes at once: whoever can connect can begin one, so there is room for many, and the
#: oldest one ends where there is none left.
_HANDSHAKES: Final = 512
#: Connections that wait in the kernel, and those that are taken from it in one turn of the loop.
_BACKLOG: Final = 4096
_IN_A_TURN: Final = 64

#: Whose share a connection counts against once it has its reply: nobody's.
_ANSWERED: Final = "answered"

#: Seconds to complete a request, TLS included; and to take the reply.
_PATIENCE: Final = 5.0
#: Seconds between two warnings of the same kind.
_QUIET: Final = 60.0
#: Seconds that one who was turned away is given to read it.
_GOODBYE: Final = 1.0
#: Seconds without taking connections where none can be taken.
_PAUSE: Final = 0.1

_LARGEST_BODY: Final = 16 * 1024
_LARGEST_LINE: Final = 4096
_LONGEST_WORD: Final = 256
_MOST_RESOURCES: Final = 16
_PATHS: Final[dict[str, Mode]] = {"/v1/grant": "grant", "/v1/token": "token"}
_MEMBERS: Final = frozenset(
    {"profile", "scope", "consumer_org", "resource", "authorization_details"}
)


class Refused(Exception):
    """A request that is turned away at the door: *status* and *word* of the reply."""

    def __init__(self, status: int, word: str, description: str, hint: str) -> None:
        super().__init__(description)
        self.status = status
        self.word = word
        self.hint = hint


# ---------------------------------------------------------------------- requests and replies


async def read_ask(request: web.BaseRequest) -> tuple[Mode, Ask]:
    """The mode and what is asked for. Refused for everything that is not exactly a request."""
    if request.raw_path not in _PATHS or request.method != "POST":
        raise Refused(404, "not_found", "no such request", "POST /v1/grant or /v1/token")
    if request.content_type != "application/json" or request.headers.get("Content-Encoding"):
        raise Refused(
            415, "unsupported_media_type", "the body is not plain JSON",
            "Content-Type: application/json, and no Content-Encoding",
        )  # fmt: skip
    if (request.content_length or 0) > _LARGEST_BODY:
        raise _too_large()
    raw = bytearray()
    try:
        async for part in request.content.iter_any():
            raw += part
            if len(raw) > _LARGEST_BODY:
                raise _too_large()
    except (ConnectionError, web.RequestPayloadError) as exc:
        # Who hung up, or sent what is no chunk: nobody's mistake here.
        raise _bad("the body did not come whole") from exc
    return _PATHS[request.raw_path], parsed(bytes(raw))


def parsed(raw: bytes) -> Ask:
    """A body as what it asks for; Refused for any other."""
    try:
        said = read_strict(raw)
    except ValueError:
        raise _bad("the body is not a JSON object with each member once") from None
    if not isinstance(said, dict):
        raise _bad("the body is not a JSON object")
    unknown = sorted(said.keys() - _MEMBERS)
    if unknown:
        raise _bad(f"unknown member {foreign(unknown[0])}")
    resource = said.get("resource")
    listed = [] if resource is None else [resource] if isinstance(resource, str) else resource
    if not isinstance(listed, list) or len(listed) > _MOST_RESOURCES:
        raise _bad("resource is null, a string, or a list of few strings")
    consumer_org = said.get("consumer_org")
    if consumer_org is not None and not (
        isinstance(consumer_org, str)
        and len(consumer_org) == 9
        and consumer_org.isascii()
        and consumer_org.isdigit()
    ):
        raise _bad("consumer_org is null or nine digits")
    return Ask(
        _word(said, "profile"),
        _word(said, "scope"),
        consumer_org,
        tuple(_word({"resource": each}, "resource") for each in listed),
        _details(said.get("authorization_details")),
    )


def _details(given: object) -> str:
    try:
        return details_text(given)
    except UsageError:
        raise _bad(
            "authorization_details is null or a list of objects, each with its type"
        ) from None


def _word(said: dict[str, Any], name: str) -> str:
    value = said.get(name)
    if (
        not isinstance(value, str)
        or not 0 < len(value) <= _LONGEST_WORD
        or not (value.isprintable() and value.isascii())
    ):
        raise _bad(f"{name} is not a word of printable ASCII")
    return value


def _bad(description: str) -> Refused:
    members = ", ".join(sorted(_MEMBERS))
    return Refused(400, "bad_request", description, f"the members are {members}")


def _too_large() -> Refused:
    kib = _LARGEST_BODY // 1024
    return Refused(413, "too_large", f"the body is larger than {kib} KiB", "a request is small")


def reply_to(exc: Exception) -> web.Response:
    """The reply to a request that failed; nothing of an unexpected error's text is in it."""
    if isinstance(exc, Refused):
        return _error(exc.status, exc.word, str(exc), exc.hint, None)
    if not isinstance(exc, HsmTollError):
        said = "the host made a mistake; its log says where"
        return _error(500, "internal", said, "report it to who runs the host", None)
    reply = replies.reply_to(exc)
    wait = exc.retry_after
    if reply.status in (429, 503) and wait is None:
        wait = _PATIENCE
    return _error(reply.status, reply.word, foreign(exc), foreign(exc.hint or ""), wait)


def _error(status: int, word: str, said: str, hint: str, wait: float | None) -> web.Response:
    response = answer({"error": word, "error_description": said, "hint": hint}, status=status)
    if wait is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(wait)))
    return response


def answer(body: dict[str, Any], *, status: int = 200) -> web.Response:
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
class _Visit:
    """
    One connection: whose share it counts against, and when it is cut off. *peer* is the refusal
    itself for one that nobody knows. *complete*: its request is, and it will be answered.
    """

    account: str
    peer: Peer | PolicyDenied | None
    until: float = 0.0
    timer: asyncio.TimerHandle | None = None
    complete: bool = False


class _Protocol(web.RequestHandler):
    """aiohttp's, for one request, with errors of ours and a word when it is over."""

    __slots__ = ("_door", "visit")

    def __init__(self, manager: web.Server, visit: _Visit, door: Door) -> None:
        super().__init__(
            manager,
            loop=asyncio.get_running_loop(),
            access_log=_silent,
            logger=_silent,
            max_line_size=_LARGEST_LINE,
            max_field_size=_LARGEST_LINE,
            max_headers=64,
            auto_decompress=False,
            # Who is refused before its body was read gets to read why.
            lingering_time=_GOODBYE,
            tcp_keepalive=False,
        )
        self.visit = visit
        self._door = door

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The visit begins; over TLS, its handshake is done."""
        super().connection_made(transport)
        self._door.met(self.visit, transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """The visit is over."""
        self._door.left(self.visit)
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What aiohttp could not read as a request: its words may quote it, ours do not."""
        del request, exc, message
        malformed = status < 500
        response = reply_to(_bad("not HTTP as it is spoken here") if malformed else RuntimeError())
        response.force_close()
        return response


# aiohttp logs what it could not parse, with pieces of it.
_silent = logging.getLogger("hsmtoll.host.http")
_silent.addHandler(logging.NullHandler())
_silent.propagate = False
_silent.setLevel(logging.CRITICAL)


class Door:
    """
    One listening socket. *handler* gets each request with the peer: the refusal itself for one
    that nobody knows, ``None`` on a door where nobody is asked. *tls* gives the context for each
    new connection.
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
        self._visits: dict[_Visit, asyncio.BaseTransport | None] = {}
        # Oldest first.
        self._handshakes: dict[_Visit, asyncio.Task[None]] = {}
        #: Connections that were ended for want of room.
        self.dropped = 0
        self._shares: Counter[str] = Counter()
        self._turned_away: set[asyncio.Task[None]] = set()
        # When each is said again, by OpenSSL's own words.
        self._warned: dict[str, float] = {}
        self._arrivals: set[asyncio.Task[None]] = set()
        self._empty = asyncio.Event()
        listening.setblocking(False)

    def open(self) -> None:
        """Take connections from now on."""
        asyncio.get_running_loop().add_reader(self._listening, self._accept)

    async def close(self, *, patience: float) -> None:
        """Take no more; who is being answered is, within *patience* seconds."""
        asyncio.get_running_loop().remove_reader(self._listening)
        self._listening.close()
        for task in (*self._turned_away, *self._arrivals):
            task.cancel()
        for visit, transport in list(self._visits.items()):
            # A request that is not complete yet is not begun any more.
            if not visit.complete and transport is not None:
                _abort(transport)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while self._visits:
                    self._empty.clear()
                    await self._empty.wait()
        for transport in list(self._visits.values()):
            if transport is not None:
                _abort(transport)
        await asyncio.gather(*self._turned_away, *self._arrivals, return_exceptions=True)

    @property
    def visits(self) -> int:
        """Connections at this moment."""
        return len(self._visits) + len(self._handshakes)

    def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(_IN_A_TURN):
            try:
                connection, _ = self._listening.accept()
            except OSError as exc:
                # Out of descriptors, or one who left before it was met.
                if exc.errno not in (errno.EAGAIN, errno.ECONNABORTED, errno.EPROTO):
                    _log.warning("door: no connection can be taken (%s)", exc.strerror)
                    loop.remove_reader(self._listening)
                    loop.call_later(_PAUSE, self._resume)
                return
            self._taken(connection)

    def _taken(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        connection.setblocking(False)
        visit = self._visit(connection)
        visit.until = loop.time() + _PATIENCE
        if self._tls is None and not self._admitted(visit):
            self._turn_away(connection)
            return
        task = loop.create_task(self._arrive(connection, visit))
        self._arrivals.add(task)
        task.add_done_callback(self._arrivals.discard)
        if self._tls is not None:
            if len(self._handshakes) >= _HANDSHAKES:
                self._handshakes.pop(next(iter(self._handshakes))).cancel()
                self._dropped("too many TLS handshakes at once; the oldest was ended")
            self._handshakes[visit] = task

    def _admitted(self, visit: _Visit) -> bool:
        """
        Whether there is room for one who is known, and for one more of its account. Who has sent
        no whole request yet gives way, the oldest first, but not to more of a crowd of its own.
        """
        if self._shares[visit.account] >= OF_ONE:
            return False
        if len(self._visits) >= _CONNECTIONS:
            silent = (each for each in self._visits if not each.complete)
            oldest = next(silent, None)
            if oldest is None:
                return False
            transport = self._visits[oldest]
            self.left(oldest)
            if transport is not None:
                _abort(transport)
            self._dropped("too many connections at once; the oldest silent one was ended")
        self._visits[visit] = None
        self._shares[visit.account] += 1
        return True

    def _dropped(self, why: str) -> None:
        self.dropped += 1
        self._warn(why)

    def _resume(self) -> None:
        if self._listening.fileno() >= 0:
            self.open()

    def _visit(self, connection: socket.socket) -> _Visit:
        if not self._peers_known:
            return _Visit("anybody", None)
        if self._tls is not None:
            # Before the handshake a caller is the address it comes from.
            try:
                return _Visit(f"address:{connection.getpeername()[0]}", None)
            except OSError:
                return _Visit("address:gone", None)
        try:
            peer = peers.of_socket(connection)
        except PolicyDenied as exc:
            return _Visit("unknown", exc)
        except OSError:
            unknown = PolicyDenied("caller: its account cannot be learned", code="caller-unknown")
            return _Visit("unknown", unknown)
        return _Visit(peer.account, peer)

    async def _arrive(self, connection: socket.socket, visit: _Visit) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: _Protocol(self._server, visit, self),
                connection,
                ssl=self._tls() if self._tls else None,
                ssl_handshake_timeout=_PATIENCE if self._tls else None,
                ssl_shutdown_timeout=_GOODBYE if self._tls else None,
            )
        except BaseException as exc:
            connection.close()
            self.left(visit)
            if not isinstance(exc, OSError):
                raise
            # Whoever has no certificate of ours ends here; what it sent is not worth a line each.
            _log.info("door: a connection was not made (%s)", type(exc).__name__)
            if isinstance(exc, ssl.SSLCertVerificationError):
                self._warn(f"a caller's certificate is not taken ({exc.verify_message})")

    def _warn(self, why: str) -> None:
        # A list that is missing turns everybody away, who hear of it by an alert at most; but
        # whoever can connect can be turned away.
        now = asyncio.get_running_loop().time()
        if now >= self._warned.get(why, now):
            self._warned[why] = now + _QUIET
            _log.warning("door: %s", why)

    def met(self, visit: _Visit, transport: asyncio.BaseTransport) -> None:
        """A connection is there: its time runs, and a certificate says who it is."""
        loop = asyncio.get_running_loop()
        if self._tls is None:
            if visit not in self._visits:
                # It gave way before it was here.
                _abort(transport)
                return
            self._visits[visit] = transport
            visit.timer = loop.call_at(visit.until, _abort, transport)
            return
        self._handshakes.pop(visit, None)
        shown = transport.get_extra_info("ssl_object")
        der = shown.getpeercert(binary_form=True)
        # The context lets nobody in without one.
        peer = peers.of_certificate(shown.getpeercert() or {}, der or b"")
        visit.peer, visit.account = peer, peer.account
        visit.timer = loop.call_at(visit.until, _abort, transport)
        if self._admitted(visit):
            self._visits[visit] = transport
            return
        visit.peer = PolicyDenied("caller: too many connections at once", code="share")
        if isinstance(transport, asyncio.WriteTransport):
            transport.write(_busy())
        transport.close()

    def left(self, visit: _Visit) -> None:
        """A connection is gone; a second time changes nothing."""
        if visit.timer is not None:
            visit.timer.cancel()
        self._handshakes.pop(visit, None)
        if visit not in self._visits:
            return
        del self._visits[visit]
        self._give_back(visit.account)
        if not self._visits:
            self._empty.set()

    def _give_back(self, account: str) -> None:
        self._shares[account] -= 1
        # A name that is not here any more costs no memory.
        if not self._shares[account]:
            del self._shares[account]

    def _turn_away(self, connection: socket.socket) -> None:
        if len(self._turned_away) >= _TURNED_AWAY:
            connection.close()
            return
        task = asyncio.create_task(_say_goodbye(connection))
        self._turned_away.add(task)
        task.add_done_callback(self._turned_away.discard)

    async def _handled(self, request: web.BaseRequest) -> web.Response:
        visit = _visit_of(request)
        try:
            response = await self._handler(request, visit.peer)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the caller is answered
            if not isinstance(exc, HsmTollError | Refused):
                _log.error("unexpected %s: a mistake in hsmtoll, please report it", _where(exc))
            response = reply_to(exc)
        response.force_close()
        if request.transport is not None:
            # Time to take the reply, and no more. Its caller may come again before this one is
            # closed: what is answered is no part of a share.
            complete(request)
            self._give_back(visit.account)
            visit.account = _ANSWERED
            self._shares[_ANSWERED] += 1
            visit.timer = asyncio.get_running_loop().call_later(
                _PATIENCE, _abort, request.transport
            )
        return response


def _visit_of(request: web.BaseRequest) -> _Visit:
    protocol = request.protocol
    if not isinstance(protocol, _Protocol):
        raise TypeError("a request of another server")
    return protocol.visit


def complete(request: web.BaseRequest) -> None:
    """The request is whole: its time is the device's from now on."""
    visit = _visit_of(request)
    visit.complete = True
    if visit.timer is not None:
        visit.timer.cancel()
        visit.timer = None


def _where(exc: Exception) -> str:
    at = exc.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    place = f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}" if at else "?"
    return f"{type(exc).__name__} at {place}"


def _abort(transport: asyncio.BaseTransport) -> None:
    if isinstance(transport, asyncio.WriteTransport):
        transport.abort()
    else:
        transport.close()


async def _say_goodbye(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    with connection, contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_GOODBYE):
            await loop.sock_sendall(connection, _busy())
            connection.shutdown(socket.SHUT_WR)
            # Closed with its request unread, it would see an error instead of the reply.
            while await loop.sock_recv(connection, 65536):
                pass


# ---------------------------------------------------------------------- sockets


def listen_unix(path: Path, name: str) -> socket.socket:
    """
    A Unix socket, 0660 from its first moment, in a directory of ours: made with 0750 where it is
    missing, refused where others may write. Its group is the directory's. *name* is the setting.
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
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    before = os.umask(0o117)
    try:
        _make_room(path)
        one.bind(str(path))
        with contextlib.suppress(PermissionError):
            os.chown(path, -1, seen.st_gid)
        one.listen(_BACKLOG)
    except OSError as exc:
        one.close()
        raise ConfigurationError(
            f"{name} {foreign(path)}: cannot be listened on ({exc.strerror or exc})"
        ) from exc
    finally:
        os.umask(before)
    return one


def _make_room(path: Path) -> None:
    """A socket that nobody listens on any more goes."""
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
    """A TCP socket on ``HOST:PORT``; *local*: on this machine's loopback alone."""
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
        one = socket.socket(family, kind | socket.SOCK_CLOEXEC, proto)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(where)
        one.listen(_BACKLOG)
    except (OSError, UnicodeError) as exc:
        # A name that cannot be one: an empty label, or one of more than 63 characters.
        said = getattr(exc, "strerror", None) or "no such address"
        raise ConfigurationError(
            f"{name}: {foreign(address)} cannot be listened on ({said})"
        ) from exc
    return one


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")


def server_context(cert: Path, key: Path, client_ca: Path, crl: Path | None) -> ssl.SSLContext:
    """
    TLS 1.3, and nobody without a certificate of *client_ca*. Where there are revocation lists, in
    *crl* or beside the CA, that of each CA on the way to a caller is asked; one that is missing or
    has expired lets nobody in.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    # A session that is resumed would not look at the revocation list again.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
    doing = "CERT and HSMTOLL_HOST__KEY"
    files.read(cert, "HSMTOLL_HOST__CERT")
    files.read(key, "HSMTOLL_HOST__KEY", secret=True)
    files.read(client_ca, "HSMTOLL_HOST__CLIENT_CA")
    if crl is not None:
        files.read(crl, "HSMTOLL_HOST__CLIENT_CRL")
    try:
        # Asked for at a terminal otherwise.
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
        # Whoever has the key of a CA that was revoked makes callers that are on no list.
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    elif crl is not None:
        raise ConfigurationError(f"HSMTOLL_HOST__CLIENT_CRL {foreign(crl)}: no revocation list")
    else:
        # A CA that is named is trusted, root or not. Not where there are lists: OpenSSL would end
        # at such a CA, and not ask whether the one above has revoked it.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context
