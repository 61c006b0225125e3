"""
Which requests may pass the proxy, with which token, and which headers go along. No I/O.

Programs on this machine are served; pages in a browser on this machine are not, as they would speak
with the company's key for whoever wrote them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from hsmtoll import apis
from hsmtoll.errors import ConfigurationError, UsageError, sanitized
from hsmtoll.jsonio import read_strict

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "Admission",
    "Rejected",
    "Target",
    "paths_by_prefix",
    "request_headers",
    "response_headers",
]

#: Methods that are forwarded.
METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

#: Characters of a request target that are looked at.
_MAX_TARGET: Final = 4096

#: The headers by which a request says for whom its token is; they stay here.
_CONSUMER: Final = "hsmtoll-consumer-org"
_RESOURCE: Final = "hsmtoll-resource"
_DETAILS: Final = "hsmtoll-authorization-details"
_OWN: Final = "hsmtoll-"

#: RFC 9110 section 7.6.1: of one connection, and never forwarded.
_HOP_BY_HOP: Final = frozenset(
    {
        "connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding",
        "upgrade", "proxy-authenticate", "proxy-authorization", "proxy-authentication-info",
    }
)  # fmt: skip
#: What else is not Customs' business: cookies of other programs at this address, the handshake for
#: a body (it is answered here), and what the HTTP client sets itself.
_NOT_SENT: Final = _HOP_BY_HOP | {"host", "authorization", "cookie", "expect"}
_NOT_RETURNED: Final = _HOP_BY_HOP | {"set-cookie", "location"}

#: RFC 9110 section 5.5 allows no control character but the tab; the HTTP server sends none.
_CONTROL: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class Rejected(Exception):
    """A request that does not pass: HTTP *status*, error *code*, and what to do."""

    def __init__(self, status: int, code: str, description: str, hint: str) -> None:
        super().__init__(description)
        self.status = status
        self.code = code
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request goes (*path* with its query), and the token that it needs."""

    api: apis.Api
    path: str
    scope: str
    whom: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Admission:
    """
    What may pass. *hosts*: values of the header Host, in small letters; ``None`` for any.
    *paths*: prefix of a path → API or scope, for paths that are not in the catalogue.
    """

    hosts: frozenset[str] | None
    paths: Mapping[str, str]

    def check_origin(self, headers: Mapping[str, str]) -> None:
        """Reject what a page in a browser sent, or a name that was pointed at this address."""
        host = headers.get("Host", "").lower()
        if self.hosts is not None and host not in self.hosts:
            raise Rejected(
                403, "host-refused", "the header Host names another server",
                f"use the address that the proxy listens on: {min(self.hosts, key=len)}",
            )  # fmt: skip
        # Browsers set Sec-Fetch-Site where they set no Origin, as for an image; "none" is the user.
        if "Origin" in headers or headers.get("Sec-Fetch-Site", "none") != "none":
            raise Rejected(
                403, "origin-refused", "a page in a browser sent it",
                "the proxy serves programs; call it from the server of the page",
            )  # fmt: skip

    def target(self, method: str, raw_path: str, headers: Mapping[str, str]) -> Target:
        """Where to send a request. Raises Rejected for what may not pass."""
        if method not in METHODS:
            raise Rejected(
                405, "method-unknown", f"method {sanitized(method)}: not forwarded",
                f"one of {', '.join(METHODS)}",
            )  # fmt: skip
        if "Authorization" in headers:
            raise Rejected(
                400, "authorization-given", "it has an Authorization header of its own",
                "leave it out; the proxy sets it",
            )  # fmt: skip
        if headers.get("Transfer-Encoding", "chunked").lower() != "chunked":
            raise Rejected(
                400, "request-invalid", "its body has a transfer coding that is not forwarded",
                "chunked alone; Content-Encoding goes through unchanged",
            )  # fmt: skip
        path = _checked_path(raw_path)
        for prefix, scope in self.paths.items():
            if path == prefix or path.startswith(f"{prefix}/"):
                # Not the caller's path: metrics have a label for each API.
                return Target(apis.at(prefix), raw_path, scope, _whom(headers))
        try:
            api = apis.api_of_path(path)
        except UsageError as exc:
            raise Rejected(
                404, "path-unknown", str(exc),
                "`hsmtoll apis` lists the paths; HSMTOLL_LOCAL_PROXY__PATHS allows others",
            ) from exc  # fmt: skip
        return Target(api, raw_path, api.name, _whom(headers))


def paths_by_prefix(words: Iterable[str]) -> dict[str, str]:
    """The prefixes of HSMTOLL_LOCAL_PROXY__PATHS; ConfigurationError for a word of another form."""
    found: dict[str, str] = {}
    for word in words:
        prefix, equals, scope = word.partition("=")
        if not (
            equals and scope and re.fullmatch(r"(?:/(?!\.\.?(?:/|$))[\w.~-]+)+", prefix, re.ASCII)
        ):
            raise ConfigurationError(
                f"HSMTOLL_LOCAL_PROXY__PATHS: {sanitized(word)}: not a prefix with its scope",
                hint="PREFIX=API or PREFIX=SCOPE, as /api/movement/ferry/v1=toll:movement/ferry",
            )
        found[prefix] = scope
    return found


def _checked_path(raw: str) -> str:
    """The path of *raw*, without its query, if no server reads it as another one."""
    path = raw.partition("?")[0]
    if len(raw) > _MAX_TARGET or not re.fullmatch(r"/(?!/)[!-\[\]-~]*", raw) or "#" in raw:
        raise Rejected(
            404, "path-invalid", f"request target {sanitized(path)}: a path is expected",
            "such as /api/movement/road/v2/test-auth, in ASCII and without a host",
        )  # fmt: skip
    # A server may resolve dot segments, some with parameters ("..;"), and the token's scope was
    # chosen by the path as written.
    if {".", ".."} & {part.partition(";")[0] for part in re.split(r"[/\\]", unquote(path))}:
        raise Rejected(
            404, "path-invalid", f"path {sanitized(path)}: it has dot segments",
            "write the path that is meant",
        )  # fmt: skip
    return path


def _whom(headers: Mapping[str, str]) -> dict[str, Any]:
    """For whom the token is: keyword arguments of `TokenService.request`."""
    given = sorted(name.lower() for name, _ in headers.items() if name.lower().startswith(_OWN))
    if given and (
        len(set(given)) < len(given) or not {_CONSUMER, _RESOURCE, _DETAILS}.issuperset(given)
    ):
        # One that was left out silently would make the call for somebody else.
        raise Rejected(
            400, "usage", f"headers {sanitized(', '.join(given))}: unknown, or given twice",
            f"{_CONSUMER}, {_RESOURCE} and {_DETAILS} say for whom the token is",
        )  # fmt: skip
    details: Any = None
    if (text := headers.get(_DETAILS)) is not None:
        try:
            details = read_strict(text)
        except ValueError as exc:
            raise Rejected(
                400, "usage", f"header {_DETAILS}: that is not JSON", "a list of objects (RFC 9396)"
            ) from exc
    return {
        "consumer_org": headers.get(_CONSUMER),
        "resource": headers.get(_RESOURCE),
        "authorization_details": details,
    }


def _end_to_end(raw: Iterable[tuple[bytes, bytes]], left_out: frozenset[str]) -> list[Any]:
    """The headers of *raw* without those of the connection (RFC 9110, 7.6.1) and *left_out*."""
    headers = [(name.decode("latin-1").lower(), name, value) for name, value in raw]
    named = {
        word.strip().lower()
        for name, _, value in headers
        if name == "connection"
        for word in value.decode("latin-1").split(",")
    }
    return [
        (name, value)
        for lower, name, value in headers
        if lower not in left_out and lower not in named and not lower.startswith(_OWN)
    ]


def request_headers(raw: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers of a caller's request that Customs gets."""
    return _end_to_end(raw, _NOT_SENT)


def response_headers(
    raw: Iterable[tuple[bytes, bytes]], location: str | None, customs: str
) -> list[tuple[str, str]]:
    """
    The headers of Customs' answer that the caller gets. A *location* below the origin *customs* is
    given as a path, so that the caller goes on through the proxy.
    """
    raw = list(raw)
    left_out = _NOT_RETURNED
    if any(name.lower() == b"transfer-encoding" for name, _ in raw):
        # RFC 9112 section 6.3: the length of the body is another one then.
        left_out |= {"content-length"}
    headers = [
        (name.decode("latin-1"), _text(value))
        for name, value in _end_to_end(raw, left_out)
        if not _CONTROL.search(value)
    ]
    if location is not None and location.isprintable():
        rest = location.removeprefix(customs)
        # Another host may follow: "https://customs.example" begins "https://customs.example.org".
        below = rest != location and re.fullmatch(r"(/(?!/).*)?", rest)
        headers.append(("Location", (rest or "/") if below else location))
    if not any(name.lower() == "server" for name, _ in headers):
        # Otherwise the HTTP library adds its name and version.
        headers.append(("Server", "hsmtoll"))
    return headers


def _text(value: bytes) -> str:
    """The HTTP server sends it as UTF-8."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode("latin-1")
