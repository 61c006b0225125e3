"""
How bytes travel to a token endpoint: one leg a call, our own TLS, one deadline for all of it.

Nothing is known here of what a leg means; the user's own httpx clients never carry one.
"""

from __future__ import annotations

import contextlib
import http.cookiejar
import socket
import ssl
import threading
from typing import TYPE_CHECKING, Any, Final, Self

import httpx

from hsmtoll import exchange
from hsmtoll.errors import ConfigurationError, NetworkError, foreign

if TYPE_CHECKING:
    from pathlib import Path

    from hsmtoll.exchange import Answer, Post

__all__ = ["Wire"]

#: Bytes. An answer of a token endpoint is some kilobytes; more is not one (DESIGN 4.14).
_LARGEST: Final = 1024 * 1024


def tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """
    The one TLS context of ours: the system's roots and *ca_file*, TLS 1.2 or newer, verified.

    Made by hand: ``ssl.create_default_context`` would write session keys to wherever
    SSLKEYLOGFILE points. Raises ConfigurationError for a file that holds no certificates.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_default_certs()
    if ca_file is not None:
        try:
            context.load_verify_locations(cafile=ca_file)
        except (OSError, ssl.SSLError) as exc:
            raise ConfigurationError(
                f"HSMTOLL_CA_FILE {ca_file}: cannot be read as PEM certificates",
                hint="it is a file with one or more -----BEGIN CERTIFICATE----- blocks",
            ) from exc
    return context


class Wire:
    """
    How bytes travel: one leg a call, no redirects, no cookies, one total deadline.

    *timeout* bounds each wait for the network, in seconds; *deadline* bounds the whole leg.
    *proxy* is a URL, ``environment``, or ``None`` for none.
    """

    def __init__(
        self,
        *,
        ca_file: Path | None = None,
        proxy: str | None = None,
        timeout: float = 10.0,
        deadline: float = 60.0,
    ) -> None:
        self._ca_file = ca_file
        self._proxy = proxy
        self._timeout = timeout
        self._deadline = deadline
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None

    def options(self) -> dict[str, Any]:
        """Keyword arguments for every httpx client of ours, for tokens and for calls alike."""
        with self._lock:
            if self._context is None:
                self._context = tls_context(self._ca_file)
        jar = http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
        named = self._proxy if self._proxy != "environment" else None
        return {
            "verify": self._context,
            "proxy": named,
            "trust_env": self._proxy == "environment",
            "timeout": self._timeout,
            "follow_redirects": False,
            "cookies": jar,
        }

    def post(self, post: Post) -> Answer:
        """
        Send one leg and read its answer, whatever its status.

        Raises NetworkError: refused, unknown host, untrusted certificate, broken off, too
        slow, too large. Those that a new attempt may cure are retryable.
        """
        host = httpx.URL(post.url).host
        guard = _Guard(self._deadline)
        try:
            # A client a leg: nothing of one leg, no cookie and no connection, is left for the next.
            with httpx.Client(**self.options()) as client, guard:
                request = client.build_request(
                    "POST",
                    post.url,
                    data=dict(post.form),
                    headers={"accept": "application/json", "accept-encoding": "identity"},
                    extensions={"trace": guard.trace},
                )
                response = client.send(request, stream=True)
                return _read(response, post.leg)
        except httpx.HTTPError as exc:
            if guard.struck:
                raise NetworkError(
                    f"{post.leg} ({host}): no whole answer within {self._deadline:.0f} s",
                    hint="HSMTOLL_DEADLINE sets how long to wait",
                    code="deadline",
                    retryable=False,
                ) from exc
            raise _named(exc, post.leg, host, self._timeout) from exc


def _read(response: httpx.Response, leg: str) -> Answer:
    with contextlib.closing(response):
        headers = {name.lower(): value for name, value in response.headers.items()}
        if headers.get("content-encoding", "identity") != "identity":
            raise NetworkError(f"{leg}: the answer is compressed, which was not asked for")
        body = bytearray()
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > _LARGEST:
                raise NetworkError(
                    f"{leg}: the answer is larger than {_LARGEST // 1024} KiB",
                    hint="that is not a token endpoint: check HSMTOLL_PROXY and the endpoints",
                    code="answer-too-large",
                )
        return exchange.Answer(response.status_code, headers, bytes(body))


class _Guard:
    """
    Ends a leg at its deadline, whatever it is busy with.

    Time-outs of the network bound each wait, and a server that sends a byte now and then
    meets them all. So the socket itself is shut down under the reader.
    """

    def __init__(self, seconds: float) -> None:
        self.struck = False
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._strike)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._timer.cancel()

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """Called by httpcore at each step; connecting is the one that brings a socket."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            found = info["return_value"].get_extra_info("socket")
            if isinstance(found, socket.socket):
                self._sockets.append(found)

    def _strike(self) -> None:
        self.struck = True
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def _named(exc: httpx.HTTPError, leg: str, host: str, timeout: float) -> NetworkError:
    where = f"{leg} ({host})"
    said = str(exc)
    if isinstance(exc, httpx.ProxyError):
        return NetworkError(
            f"{where}: the proxy refused, {foreign(said)}", hint="check HSMTOLL_PROXY"
        )
    if "CERTIFICATE_VERIFY_FAILED" in said or "certificate verify failed" in said:
        return NetworkError(
            f"{where}: its TLS certificate is not trusted",
            hint="where a company proxy inspects TLS, set HSMTOLL_CA_FILE to its CA certificate",
            code="tls-untrusted",
        )
    if isinstance(exc, httpx.ConnectError):
        text, code = next(
            (known for part, known in _REASONS.items() if part in said.lower()),
            ("cannot be reached", "unreachable"),
        )
        return NetworkError(
            f"{where}: {text}",
            hint="check the network, HSMTOLL_PROXY and the firewall; nothing was sent",
            code=code,
            retryable=code != "unknown-host",
        )
    if isinstance(exc, httpx.TimeoutException):
        return NetworkError(
            f"{where}: no answer within {timeout:.0f} s",
            hint="HSMTOLL_TIMEOUT sets how long to wait",
            code="timeout",
            retryable=True,
        )
    return NetworkError(
        f"{where}: the connection broke ({type(exc).__name__})",
        hint="try again; if it stays, look at what lies between",
        code="broken",
        retryable=True,
    )


_REASONS: Final = {
    "connection refused": ("connection refused", "refused"),
    "name or service not known": ("unknown host", "unknown-host"),
    "nodename nor servname": ("unknown host", "unknown-host"),
    "temporary failure in name resolution": ("its name cannot be looked up", "unreachable"),
    "no address associated": ("unknown host", "unknown-host"),
    "ssl": ("no TLS connection came about", "tls"),
}
