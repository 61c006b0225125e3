"""
A deadline for a whole request, even if the peer sends or accepts only a byte now and then.

Network time-outs limit single waits only. Here each wait of a thread (connect, TLS handshake, proxy
tunnel, send, receive) gets at most the time that is left for the request. Tasks use
asyncio.timeout. Neither can interrupt the system's name resolution, which runs in a thread.
"""

from __future__ import annotations

import contextlib
import ssl
import time
from contextvars import ContextVar
from functools import partial
from socket import SOCK_STREAM, getaddrinfo, socket
from typing import TYPE_CHECKING, Any, Final, TypeVar

import httpcore
import httpx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

__all__ = ["Deadline", "Transport"]

_T = TypeVar("_T")

#: Bytes per write, one TLS record at most: httpcore applies the whole time-out to each write.
_PART: Final = 16_384

_current: ContextVar[Deadline | None] = ContextVar("hsmtoll-deadline", default=None)


class Deadline:
    """
    The maximum duration of one request in *seconds*, from connecting to the end of the response;
    and the progress of the request.

    A token renewal before the request, or after a 401, does not count: httpcore calls `trace` when
    a request begins and ends. *sent*: part of the request was sent. *past_proxy*: the proxy, if
    there is one, has set up the connection. *cut*: the last wait was limited by this deadline and
    not by a network time-out.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.end: float | None = None
        self.sent = False
        self.past_proxy = False
        self.cut = False

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """The extension ``trace`` of a request."""
        sending = event.endswith("send_request_headers.started")
        # The CONNECT request to a proxy contains nothing of the request itself.
        self.sent |= sending and info["request"].method != b"CONNECT"
        # The prefix of the event distinguishes TLS inside the tunnel from TLS to the proxy.
        self.past_proxy |= self.sent or event == "proxy.start_tls.started"
        if event.endswith("response_closed.started"):
            self.end = None
        elif self.end is None and (sending or event.endswith(_CONNECTING)):
            self.end = time.monotonic() + self.seconds

    def left(self, wait: float | None) -> float | None:
        """*wait* (seconds or None) cut at the deadline; TimeoutException of httpcore after it."""
        if self.end is None:
            return wait
        left = self.end - time.monotonic()
        self.cut = wait is None or left < wait
        if left <= 0:
            raise httpcore.TimeoutException("timed out")
        return left if self.cut else wait

    @contextlib.contextmanager
    def binding(self) -> Iterator[None]:
        """Apply the deadline to the requests of this thread over a `Transport`, in the context."""
        before = _current.set(self)
        try:
            yield
        finally:
            _current.reset(before)


_CONNECTING: Final = ("connect_tcp.started", "connect_unix_socket.started")


def _left(wait: float | None) -> float | None:
    deadline = _current.get()
    return wait if deadline is None else deadline.left(wait)


class Transport(httpx.HTTPTransport):
    """
    httpx.HTTPTransport whose waits end at the current `Deadline` of the thread.

    *check_connection* is called with each new connection before anything is sent on it; it raises
    to reject the connection.
    """

    def __init__(
        self, *, check_connection: Callable[[socket], None] | None, **options: Any
    ) -> None:
        super().__init__(trust_env=False, **options)
        self._pool._network_backend = _Backend(check_connection)  # noqa: SLF001 - httpx has no public argument for it


class _Backend(httpcore.SyncBackend):
    """Opens connections whose waits end at the current deadline."""

    def __init__(self, check_connection: Callable[[socket], None] | None) -> None:
        self._check_connection = check_connection

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address that answers; *timeout* is for all addresses together."""
        try:
            found = getaddrinfo(host, port, type=SOCK_STREAM)
        except OSError as exc:
            raise httpcore.ConnectError(exc) from exc
        first: Exception | None = None
        for *_, address in found:
            wait = _left(timeout)
            try:
                stream = super().connect_tcp(
                    str(address[0]), port, wait, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
                first = first or exc
            else:
                return self._checked(stream)
        raise first or httpcore.ConnectError(f"no address for {host}")

    def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the Unix socket at *path*."""
        try:
            stream = super().connect_unix_socket(path, _left(timeout), socket_options)
        except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
            # httpcore 1.0 does not close the socket after a failure: the traceback's frame keeps
            # it open as long as the exception exists, and exceptions are cached.
            step = exc.__traceback__
            while step is not None:
                unclosed = step.tb_frame.f_locals.get("sock")
                if isinstance(unclosed, socket):
                    unclosed.close()
                step = step.tb_next
            raise
        return self._checked(stream)

    def _checked(self, stream: httpcore.NetworkStream) -> httpcore.NetworkStream:
        if self._check_connection is not None:
            try:
                self._check_connection(stream.get_extra_info("socket"))
            except BaseException:
                stream.close()
                raise
        return _Stream(stream)


class _Stream(httpcore.NetworkStream):
    """A connection, with or without *tls*."""

    def __init__(self, below: httpcore.NetworkStream, *, tls: bool = False) -> None:
        self._below = below
        self._tls = tls

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read at most *max_bytes*."""
        return self._below.read(max_bytes, _left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Write all of *buffer*."""
        for at in range(0, len(buffer), _PART):
            self._below.write(buffer[at : at + _PART], _left(timeout))

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        """Start TLS on the connection."""
        if self._tls:
            return _Tunnelled(self, ssl_context, server_hostname, timeout)
        # The time-out limits the handshake as a whole: Python's ssl counts it down.
        below = self._below.start_tls(ssl_context, server_hostname, _left(timeout))
        return _Stream(below, tls=True)

    def close(self) -> None:
        """Close the connection."""
        self._below.close()

    def get_extra_info(self, info: str) -> Any:
        """As the connection below."""
        return self._below.get_extra_info(info)


class _Tunnelled(httpcore.NetworkStream):
    """
    TLS inside the TLS connection to a proxy. httpcore's own class applies the time-out to each
    part of a record separately.
    """

    def __init__(
        self,
        below: _Stream,
        context: ssl.SSLContext,
        server_hostname: str | None,
        timeout: float | None,
    ) -> None:
        self._below = below
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_hostname=server_hostname
        )
        try:
            self._run(self._tls.do_handshake, timeout)
        except OSError as exc:
            below.close()
            raise httpcore.ConnectError(exc) from exc
        except BaseException:
            below.close()
            raise

    def _run(self, step: Callable[[], _T], timeout: float | None) -> _T:
        """Run *step* of TLS, and transfer records between it and the connection."""
        while True:
            try:
                done = step()
            except ssl.SSLWantReadError:
                self._below.write(self._outgoing.read(), timeout)
                part = self._below.read(_PART, timeout)
                if part:
                    self._incoming.write(part)
                else:
                    self._incoming.write_eof()
            else:
                self._below.write(self._outgoing.read(), timeout)
                return done

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """As `_Stream.read`."""
        try:
            return self._run(partial(self._tls.read, max_bytes), timeout)
        except OSError as exc:
            raise httpcore.ReadError(exc) from exc

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """As `_Stream.write`."""
        try:
            while buffer:
                buffer = buffer[self._run(partial(self._tls.write, buffer), timeout) :]
        except OSError as exc:
            raise httpcore.WriteError(exc) from exc

    def close(self) -> None:
        """As `_Stream.close`."""
        self._below.close()

    def get_extra_info(self, info: str) -> Any:
        """As `_Stream.get_extra_info`; ``ssl_object`` is the inner TLS."""
        return self._tls if info == "ssl_object" else self._below.get_extra_info(info)
