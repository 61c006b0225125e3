"""
HTTP transport for the token endpoints: one request per call, our own TLS context, one deadline.

The content of requests is not interpreted here. The user's httpx clients are never used for them.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import http
import http.cookiejar
import ipaddress
import os
import re
import ssl
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.request import getproxies_environment, proxy_bypass

import httpx

from hsmtoll import tls
from hsmtoll.deadline import Deadline, Transport
from hsmtoll.errors import ConfigurationError, NetworkError, sanitized
from hsmtoll.http_messages import HttpResponse
from hsmtoll.once import made_once

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hsmtoll.http_messages import Post

__all__ = ["CONNECTIONS", "ConnectionOptions", "HttpClient", "Reason"]

#: Maximum connections of one client: hundreds of tasks must not cause hundreds of TLS handshakes.
CONNECTIONS: Final = 20

#: Maximum bytes of a response; those of token endpoints have a few kilobytes.
_LARGEST: Final = 1024 * 1024

_JSON: Final = {"accept": "application/json", "accept-encoding": "identity"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionOptions:
    """
    Connection to a signing host: over a Unix socket (*uds*, its path), or with its own TLS
    *context*. *check_connection* is called with the connection before anything is sent on it; it
    raises to reject the connection.
    """

    uds: Path | None = None
    context: Callable[[], ssl.SSLContext] | None = None
    check_connection: Callable[[socket.socket], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """
    Why a request failed. *proxy* is the proxy, if it failed there; the others as in HsmTollError.
    """

    text: str
    code: str
    hint: str
    retryable: bool = True
    proxy: str | None = None

    def __str__(self) -> str:
        return f"{self.proxy}: {self.text}" if self.proxy else self.text


class HttpClient:
    """
    Sends single requests: no redirects, no cookies, one total deadline.

    *timeout* bounds each wait for the network, in seconds; *deadline* the whole request. *proxy* is
    a URL, ``environment``, or ``None`` for none. *connection_options*: for a signing host.
    """

    def __init__(
        self,
        *,
        ca_file: Path | None = None,
        proxy: str | None = None,
        timeout: float = 10.0,
        deadline: float = 60.0,
        connection_options: ConnectionOptions | None = None,
    ) -> None:
        self._ca_file = ca_file
        self._proxy = proxy
        # A single wait must not exceed the deadline of the request.
        self._timeout = min(timeout, deadline)
        #: Seconds for one request, from connecting to the end of the response.
        self.deadline = deadline
        self._connection_options = connection_options or ConnectionOptions()

    def options(self, url: str = "https://") -> dict[str, Any]:
        """
        Keyword arguments for httpx clients that connect to *url*, for token requests and calls.

        Raises ConfigurationError for a CA file or a proxy that cannot be used; sends nothing.
        """
        jar = http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
        name, via = self._proxy_for(url)
        return {
            "verify": self._context,
            "proxy": via and _proxy(name, via, self._context),
            # Proxies of the environment are looked up above: httpx would use its own TLS context.
            "trust_env": False,
            # A wait for a free connection of the pool is not a network time-out.
            "timeout": httpx.Timeout(self._timeout, pool=self.deadline),
            "limits": httpx.Limits(max_connections=CONNECTIONS),
            "follow_redirects": False,
            "cookies": jar,
        }

    @made_once
    def _context(self) -> ssl.SSLContext:
        if self._connection_options.uds is not None:
            # It is not used on a Unix socket, and an empty one is created quickly.
            return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        create = self._connection_options.context
        return create() if create else tls.client_context(self._ca_file)

    def _proxy_for(self, url: str) -> tuple[str, str | None]:
        """The variable that names the proxy for *url*, and its value; ``None`` for none."""
        if self._proxy == "environment":
            return _of_environment(url)
        return "HSMTOLL_PROXY", self._proxy

    def unused_proxy(self, url: str) -> str | None:
        """The variable with a proxy for *url* that is ignored because HSMTOLL_PROXY is not set."""
        if self._proxy is not None or self._connection_options != ConnectionOptions():
            return None
        try:
            name, found = _of_environment(url)
        except ConfigurationError:
            return None
        # Programs read the variable in upper or lower case.
        spellings = (each for each in os.environ if each.upper() == name and os.environ[each])
        return next(spellings, None) if found else None

    def reason(self, exc: httpx.HTTPError, url: str, *, past_proxy: bool) -> Reason:
        """Why a request to *url* failed; *past_proxy*: the proxy, if any, set up the connection."""
        name, via = self._proxy_for(url)
        proxy = httpx.Proxy(via) if via and not past_proxy else None
        found = _reason(exc, self._timeout, name if proxy else None, _secrets(proxy))
        if proxy is not None:
            return replace(found, proxy=_shown(proxy))
        unused = self.unused_proxy(url)
        return replace(found, hint=f"{found.hint}\n{_UNUSED.format(unused)}") if unused else found

    def post(self, post: Post) -> HttpResponse:
        """
        Send a token request and read the response, whatever its status.

        Raises NetworkError: connection refused, unknown host, untrusted certificate, connection
        lost, deadline exceeded, response too large. Transient errors are retryable.
        """
        return self._send(post.server, "POST", post.url, data=dict(post.form), headers=_JSON)

    def post_json(
        self, url: str, value: object, *, server: str, headers: dict[str, str]
    ) -> HttpResponse:
        """Send *value* as JSON and read the response, as post. *server*: its name in errors."""
        return self._send(server, "POST", url, json=value, headers=_JSON | headers)

    def get(self, url: str, *, server: str, public: bool = False) -> HttpResponse:
        """
        GET *url*, for the doctor. *server*: its name in errors. Raises as post, and for an invalid
        URL.

        *public*: for URLs from certificates. Connections to addresses of this machine or its own
        network are refused then, whatever the name resolves to (``address-private``).
        """
        try:
            host = httpx.URL(url).host
            named = ipaddress.ip_address(host) if public else None
        except httpx.InvalidURL as exc:
            raise NetworkError(f"{server}: its URL is invalid", code="unreachable") from exc
        except ValueError:
            named = None
        if named is not None and not named.is_global:
            raise _private(server)
        # With a proxy, the address of the connection is the proxy's, which may be private.
        guard = public and self._proxy is None
        headers = {"accept": "*/*", "accept-encoding": "identity"}
        check_connection = (
            partial(_is_public, server=server)
            if guard
            else self._connection_options.check_connection
        )
        return self._send(server, "GET", url, check_connection=check_connection, headers=headers)

    def client(
        self,
        url: str,
        *,
        check_connection: Callable[[socket.socket], None] | None = None,
        **more: Any,
    ) -> httpx.Client:
        """
        An httpx client for *url*, for threads, with `options` and *more* keyword arguments. It
        observes the current `Deadline`, and calls *check_connection* with each new connection.
        Raises as `options`.
        """
        options = self.options(url)
        own = {name: options.pop(name) for name in ("verify", "proxy", "limits")}
        if self._connection_options.uds is not None:
            own["uds"] = str(self._connection_options.uds)
        return httpx.Client(
            transport=Transport(check_connection=check_connection, **own), **options, **more
        )

    def _send(
        self,
        server: str,
        method: str,
        url: str,
        *,
        check_connection: Callable[[socket.socket], None] | None = None,
        **request: Any,
    ) -> HttpResponse:
        deadline, hooks = Deadline(self.deadline), {"response": [_strip_location]}
        try:
            # One client per request: no cookie and no connection is shared between services.
            with (
                self.client(
                    url,
                    check_connection=check_connection or self._connection_options.check_connection,
                    event_hooks=hooks,
                ) as client,
                deadline.binding(),
            ):
                built = client.build_request(
                    method, url, extensions={"trace": deadline.trace}, **request
                )
                answer = _read(client.send(built, stream=True), server)
        except httpx.HTTPError as exc:
            if isinstance(exc, httpx.TimeoutException) and deadline.cut:
                raise self._too_slow(server, url, sent=deadline.sent) from exc
            raise self._failed(exc, server, url, past_proxy=deadline.past_proxy) from exc
        if (
            answer.status == http.HTTPStatus.PROXY_AUTHENTICATION_REQUIRED
            and self._proxy_for(url)[1]
        ):
            # Without TLS the proxy itself receives the request and may respond.
            refused = httpx.ProxyError("407 Proxy Authentication Required")
            raise self._failed(refused, server, url, past_proxy=False)
        return answer

    def _failed(
        self, exc: httpx.HTTPError, server: str, url: str, *, past_proxy: bool
    ) -> NetworkError:
        reason, to = (
            self.reason(exc, url, past_proxy=past_proxy),
            f"{server} ({httpx.URL(url).host})",
        )
        return NetworkError(
            f"{reason}, on the way to {to}" if reason.proxy else f"{to}: {reason}",
            hint=reason.hint,
            code=reason.code,
            retryable=reason.retryable,
            signed=not isinstance(exc, _NOTHING_SENT),
        )

    def _too_slow(self, server: str, url: str, *, sent: bool) -> NetworkError:
        hints = ["HSMTOLL_DEADLINE sets how long to wait"]
        if unused := self.unused_proxy(url):
            hints.append(_UNUSED.format(unused))
        return NetworkError(
            f"{server} ({httpx.URL(url).host}): no complete answer within {self.deadline:.0f} s",
            hint="\n".join(hints),
            code="deadline",
            signed=sent,
        )


def _of_environment(url: str) -> tuple[str, str | None]:
    """The variable with the proxy for *url*, and its value; ``None`` for none."""
    proxies, to = getproxies_environment(), httpx.URL(url)
    name = to.scheme if proxies.get(to.scheme) else "all"
    found = proxies.get(name)
    if not found:
        return "", None
    excepted = [each.strip() for each in proxies.get("no", "").split(",")]
    if not all(_EXCEPTED.fullmatch(each) and "://" not in each for each in excepted):
        raise ConfigurationError(
            "NO_PROXY: not a list of hosts",
            hint="names or addresses, separated by commas, such as localhost,.acme.example",
            code="proxy-environment",
        )
    # The standard library recognises an IPv6 address only in brackets.
    if "*" in excepted or to.host in excepted or proxy_bypass(to.netloc.decode("ascii")):
        return "", None
    return f"{name.upper()}_PROXY", found if "://" in found else f"http://{found}"


_EXCEPTED: Final = re.compile(r"[\w.*:/-]*|\[[0-9A-Fa-f:.]+\](:\d+)?")


def _proxy(name: str, url: str, context: ssl.SSLContext) -> httpx.Proxy:
    """The proxy at *url*, with our TLS context; *name*: the setting or variable that names it."""
    try:
        made = httpx.Proxy(url)
        if made.url.scheme == "https":
            made.ssl_context = context
        # Fail here for a missing library, not after a signature has been spent.
        httpx.HTTPTransport(verify=context, proxy=made, trust_env=False).close()
    except (ValueError, ImportError, httpx.InvalidURL):
        # `from None`: the original message contains the URL, which may have a password.
        raise ConfigurationError(
            f"{name}: not the URL of a proxy that can be used",
            hint="http://host:port, or https://…"
            + ("; or environment, to use its variables" if name == "HSMTOLL_PROXY" else ""),
            code="proxy" if name == "HSMTOLL_PROXY" else "proxy-environment",
        ) from None
    return made


def _secrets(proxy: httpx.Proxy | None) -> tuple[str, ...]:
    """Credentials for the proxy, which its errors may repeat: in plain text and encoded."""
    if proxy is None or proxy.auth is None:
        return ()
    sent = base64.b64encode(":".join(proxy.auth).encode()).decode()
    return sent, proxy.auth[1]


def _strip_location(response: httpx.Response) -> None:
    """Remove Location: redirects are not followed, and httpx raises on a malformed one."""
    response.headers.pop("location", None)


def _causes(exc: BaseException) -> Iterator[BaseException]:
    """*exc* and its chain of causes."""
    found: BaseException | None = exc
    while found is not None:
        yield found
        if isinstance(found, BaseExceptionGroup):
            yield from found.exceptions
        found = found.__cause__ or found.__context__


def _is_public(connection: socket.socket, server: str) -> None:
    # Check the peer of the open connection: a second name resolution may differ (DNS rebinding).
    if not ipaddress.ip_address(connection.getpeername()[0]).is_global:
        raise _private(server)


def _private(server: str) -> NetworkError:
    return NetworkError(
        f"{server}: its address is on this machine or its own network, and is not requested",
        hint="the URL is in a certificate: ask its issuer",
        code="address-private",
    )


def _read(response: httpx.Response, server: str) -> HttpResponse:
    with contextlib.closing(response):
        headers = {name.lower(): value for name, value in response.headers.items()}
        if headers.get("content-encoding", "identity") != "identity":
            raise NetworkError(
                f"{server}: the answer is compressed, which was not asked for",
                hint="a proxy or gateway may have answered: check HSMTOLL_PROXY and the endpoints",
                code="answer-compressed",
            )
        body = bytearray()
        # Responses of httpx mocks have been read already; real ones are streamed.
        parts = (response.content,) if response.is_stream_consumed else response.iter_raw()
        for chunk in parts:
            body += chunk
            if len(body) > _LARGEST:
                raise NetworkError(
                    f"{server}: the answer is larger than {_LARGEST // 1024} KiB",
                    hint="that is not a token endpoint: check HSMTOLL_PROXY and the endpoints",
                    code="answer-too-large",
                )
        return HttpResponse(response.status_code, headers, bytes(body))


#: Errors after which the request has certainly not reached the server.
_NOTHING_SENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)

_UNUSED: Final = "{} is set and not used: HSMTOLL_PROXY=environment uses it"


def _shown(proxy: httpx.Proxy) -> str:
    """The proxy for messages, without user and password."""
    port = proxy.url.port or (443 if proxy.url.scheme == "https" else 80)
    return f"proxy {sanitized(proxy.url.host)}:{port}"


def _reason(
    exc: httpx.HTTPError, timeout: float, proxy: str | None, secrets: tuple[str, ...]
) -> Reason:
    """The reason for *exc*. *proxy*: the setting with the proxy, if the request failed there."""
    message = str(exc)
    # For tasks, the system's error text is only in the cause.
    causes = " ".join(map(str, _causes(exc)))
    if isinstance(exc, httpx.ProxyError):
        return _refused_by_proxy(message, proxy, secrets)
    if "certificate verify failed" in causes.lower():
        return _not_trusted(causes, proxy, secrets)
    if isinstance(exc, httpx.ConnectError):
        return _not_connected(causes.lower(), proxy)
    if isinstance(exc, httpx.TimeoutException):
        return _no_answer(message, timeout, proxy, secrets)
    return Reason(
        text=f"the connection broke ({type(exc).__name__})",
        code="broken",
        hint=f"check {proxy}: perhaps the server is not an HTTP proxy, or its URL must be https://"
        if proxy
        else "try again; if it persists, check firewalls and gateways on the path",
    )


def _refused_by_proxy(message: str, proxy: str | None, secrets: tuple[str, ...]) -> Reason:
    hint = f"{proxy} names it"
    if message.startswith(f"{http.HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:d}"):
        hint += (
            "; it rejects the user and password of that URL, or Basic authentication"
            if secrets
            else "; it requires a user and a password: http://USER:PASSWORD@HOST:PORT"
        )
    text = f"it refused, {sanitized(message, *secrets)}"
    return Reason(text=text, code="proxy-refused", hint=hint, retryable=False)


def _not_trusted(causes: str, proxy: str | None, secrets: tuple[str, ...]) -> Reason:
    found = _VERIFY.search(causes)
    why = found[1] if found else ""
    ca = "set HSMTOLL_CA_FILE to the CA that issued it" if proxy else _CA
    return Reason(
        text="its TLS certificate is not trusted"
        + (f": {sanitized(why, *secrets)}" if why else ""),
        code="tls-untrusted",
        hint=next((hint for part, hint in _UNTRUSTED.items() if part in why.lower()), ca),
        retryable=False,
    )


def _not_connected(causes: str, proxy: str | None) -> Reason:
    text, code = next(
        (known for part, known in _NOT_CONNECTED.items() if part in causes),
        ("cannot be reached", "unreachable"),
    )
    check = "check the network, HSMTOLL_PROXY and the firewall"
    if proxy:
        plain = "; the URLs of most proxies begin with http://" if code == "tls" else ""
        check = f"check {proxy}, which names the proxy{plain}"
    return Reason(
        text=text,
        code=code,
        hint=f"{check}; nothing was sent",
        retryable=code != "unknown-host",
    )


def _no_answer(message: str, timeout: float, proxy: str | None, secrets: tuple[str, ...]) -> Reason:
    if message and "timed out" not in message.lower():
        # Not a network time-out: pytest-httpx raises this for a request without a mocked response.
        return Reason(
            text=f"no answer: {sanitized(message, *secrets)}",
            code="mocked",
            hint="this program mocks the network: exclude this host",
            retryable=False,
        )
    hint = "HSMTOLL_TIMEOUT sets how long to wait" + (f"; {proxy} names the proxy" if proxy else "")
    return Reason(text=f"no answer within {timeout:.0f} s", code="timeout", hint=hint)


#: OpenSSL's reason, as Python quotes it.
_VERIFY: Final = re.compile(r"verify failed: (.{1,200}?)(?: \(_ssl|\Z)")
_CA: Final = (
    "where a company proxy inspects TLS, set HSMTOLL_CA_FILE to its CA certificate; "
    "`openssl s_client -showcerts -connect HOST:PORT` shows the server's certificates"
)
_UNTRUSTED: Final = {
    "expired": "the server's operator must renew it, unless this machine's clock is wrong",
    "not yet valid": "this machine's clock may be wrong",
    "mismatch": "it was issued for another name: check the URL, and any proxy or gateway before it",
}
#: Part of an error text of the system, asyncio or OpenSSL, in lower case → text and code.
_NOT_CONNECTED: Final = {
    f"[errno {errno.ECONNREFUSED}]": ("connection refused", "refused"),
    "connection refused": ("connection refused", "refused"),
    "name or service not known": ("unknown host", "unknown-host"),
    "nodename nor servname": ("unknown host", "unknown-host"),
    "temporary failure in name resolution": ("its name cannot be looked up", "unreachable"),
    "no address associated": ("unknown host", "unknown-host"),
    "ssl": ("the TLS handshake failed", "tls"),
}
