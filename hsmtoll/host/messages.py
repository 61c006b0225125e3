"""
Requests to a signing host and its replies: JSON over HTTP/1.1, as docs/openapi.yaml describes them.

A malformed request is rejected here, before it is authorized.
"""

from __future__ import annotations

import ipaddress
import json
import math
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from aiohttp import web

from hsmtoll.errors import HsmTollError, UsageError, sanitized
from hsmtoll.host.policy import GrantRequest
from hsmtoll.jsonio import read_strict
from hsmtoll.signing import replies
from hsmtoll.token import details_text

if TYPE_CHECKING:
    from hsmtoll.host.policy import Mode

__all__ = [
    "HEADERS",
    "RequestRejected",
    "busy_reply",
    "check_host",
    "error_word",
    "json_reply",
    "malformed",
    "not_found",
    "parse_body",
    "read_request",
    "reply_to",
    "wrong_method",
]

#: In every reply: the version of the protocol; and no version of software.
HEADERS: Final = {"Server": "hsmtoll", "Hsmtoll-Version": "1", "Cache-Control": "no-store"}

#: Seconds, for the Retry-After of an error that names none.
_RETRY_AFTER: Final = 5.0

_MAX_BODY: Final = 16 * 1024
_MAX_TEXT: Final = 256
_MAX_RESOURCES: Final = 16
_PATHS: Final[dict[str, Mode]] = {"/v1/grant": "grant", "/v1/token": "token"}
_REQUIRED: Final = ("profile", "scope")
_OPTIONAL: Final = ("consumer_org", "resource", "authorization_details")

#: The names of JSON's types (RFC 8259 section 1) for the values that Python reads.
_TYPES: Final = {
    dict: "an object", list: "an array", str: "a string", bool: "a boolean",
    int: "a number", float: "a number", type(None): "null",
}  # fmt: skip


class RequestRejected(Exception):
    """
    A request rejected before authorization: HTTP *status* and error *code* of the reply. *allow*:
    the methods that the path has, for 405.
    """

    def __init__(
        self, status: int, code: str, description: str, hint: str, *, allow: str | None = None
    ) -> None:
        super().__init__(description)
        self.status = status
        self.code = code
        self.hint = hint
        self.allow = allow


# ---------------------------------------------------------------------- requests


async def read_request(request: web.BaseRequest) -> tuple[Mode, GrantRequest]:
    """The mode and the parsed body of *request*. Raises RequestRejected for any malformed one."""
    mode = _PATHS.get(request.raw_path)
    if mode is None:
        raise not_found("POST /v1/grant or /v1/token")
    if request.method != "POST":
        raise wrong_method(request, "POST")
    if request.content_type != "application/json" or request.headers.get("Content-Encoding"):
        raise RequestRejected(
            415, "unsupported_media_type", "the body is not plain JSON",
            "Content-Type: application/json, and no Content-Encoding",
        )  # fmt: skip
    if (request.content_length or 0) > _MAX_BODY:
        raise _too_large()
    if request.headers.get("Expect", "").lower() == "100-continue":
        # The client waits for this before it sends the body (RFC 9110 section 10.1.1).
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
    raw = bytearray()
    try:
        async for part in request.content.iter_any():
            raw += part
            if len(raw) > _MAX_BODY:
                raise _too_large()
    except (ConnectionError, web.RequestPayloadError) as exc:
        # The client closed the connection, or sent an invalid chunk: not an error of the host.
        raise _bad("the body is incomplete") from exc
    return mode, parse_body(bytes(raw))


def parse_body(raw: bytes) -> GrantRequest:
    """The request in a body. Raises RequestRejected for a malformed one."""
    try:
        members = read_strict(raw)
    except ValueError:
        raise _bad("the body is not a JSON object with each member once") from None
    if not isinstance(members, dict):
        raise _bad(f"the body is {_TYPES[type(members)]}; an object is expected")
    unknown = sorted(members.keys() - {*_REQUIRED, *_OPTIONAL})
    if unknown:
        raise _bad(f"unknown member: {sanitized(unknown[0])}")
    missing = [name for name in _REQUIRED if name not in members]
    if missing:
        raise _bad(f"missing member: {', '.join(missing)}")
    return GrantRequest(
        _text("profile", members["profile"]),
        _text("scope", members["scope"]),
        _consumer_org(members.get("consumer_org")),
        _resource(members.get("resource")),
        _details(members.get("authorization_details")),
    )


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _bad(f"{name} is {_TYPES[type(value)]}; a string is expected")
    if not 0 < len(value) <= _MAX_TEXT or not (value.isprintable() and value.isascii()):
        raise _bad(f"{name} is not 1 to {_MAX_TEXT} characters of printable ASCII")
    return value


def _consumer_org(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise _bad(f"consumer_org is {_TYPES[type(value)]}; a string or null is expected")
    if len(value) != 9 or not (value.isascii() and value.isdigit()):
        raise _bad("consumer_org is not nine digits")
    return value


def _resource(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (_text("resource", value),)
    if not isinstance(value, list):
        raise _bad(f"resource is {_TYPES[type(value)]}; a string, an array or null is expected")
    if len(value) > _MAX_RESOURCES:
        raise _bad(f"resource has more than {_MAX_RESOURCES} strings")
    return tuple(_text("resource", each) for each in value)


def _details(value: object) -> str:
    if value is not None and not isinstance(value, list):
        raise _bad(
            f"authorization_details is {_TYPES[type(value)]}; an array of objects or null is "
            "expected"
        )
    try:
        return details_text(value)
    except UsageError:
        raise _bad("authorization_details is not an array of objects, each with its type") from None


def _bad(description: str) -> RequestRejected:
    hint = f"required: {', '.join(_REQUIRED)}; optional: {', '.join(_OPTIONAL)}"
    return RequestRejected(400, "bad_request", description, hint)


def malformed() -> RequestRejected:
    """The rejection of what HTTP cannot parse."""
    return RequestRejected(
        400, "bad_request", "not a valid HTTP/1.1 request",
        "at most 64 header lines of at most 4096 bytes",
    )  # fmt: skip


def check_host(header: str) -> None:
    """
    Reject a request whose *header* Host is a name, not an address or localhost. In a browser, a
    page can point a name of its own at the loopback (DNS rebinding), and read what answers.
    """
    try:
        name = urlsplit(f"//{header}").hostname
        if name not in (None, "localhost"):
            ipaddress.ip_address(name)
    except ValueError:
        raise RequestRejected(
            403,
            "host_refused",
            "the header Host is neither an address nor localhost",
            "ask 127.0.0.1 or localhost; HSMTOLL_HOST__METRICS_PUBLIC=true allows any name",
        ) from None


def not_found(hint: str) -> RequestRejected:
    """The rejection of an unknown path; *hint* has those that are known."""
    return RequestRejected(404, "not_found", "no such path", hint)


def wrong_method(request: web.BaseRequest, allow: str) -> RequestRejected:
    """The rejection of a method that the path does not have; *allow* has those that it has."""
    what = f"{sanitized(request.method)} is not a method of this path"
    return RequestRejected(405, "method_not_allowed", what, f"use {allow}", allow=allow)


def _too_large() -> RequestRejected:
    kib = _MAX_BODY // 1024
    return RequestRejected(
        413, "too_large", f"the body is larger than {kib} KiB", "a request is small"
    )


# ---------------------------------------------------------------------- replies


def json_reply(body: dict[str, Any], *, status: int = 200) -> web.Response:
    """A JSON reply."""
    return web.json_response(body, status=status, headers=HEADERS)


def reply_to(exc: Exception) -> web.Response:
    """The reply for *exc*. The text of an unexpected error is never part of it."""
    if isinstance(exc, RequestRejected):
        response = _error(exc.status, exc.code, str(exc), exc.hint)
        if exc.allow is not None:
            response.headers["Allow"] = exc.allow
        return response
    if not isinstance(exc, HsmTollError):
        text = "internal error of the host; its log has the place"
        return _error(500, "internal", text, "report it to the host's administrator")
    reply = replies.reply_to(exc)
    response = _error(reply.status, reply.word, sanitized(exc), sanitized(exc.hint or ""))
    if reply.status in (429, 503) or exc.retry_after is not None:
        wait = _RETRY_AFTER if exc.retry_after is None else exc.retry_after
        response.headers["Retry-After"] = str(max(1, math.ceil(wait)))
    return response


def error_word(exc: Exception) -> str:
    """The member `error` of the reply for *exc*."""
    if isinstance(exc, RequestRejected):
        return exc.code
    return replies.reply_to(exc).word if isinstance(exc, HsmTollError) else "internal"


def _error(status: int, code: str, text: str, hint: str) -> web.Response:
    return json_reply({"error": code, "error_description": text, "hint": hint}, status=status)


def busy_reply() -> bytes:
    """The whole reply to a connection above the limits, whose request is not read."""
    body = json.dumps(
        {
            "error": "busy",
            "error_description": "too many connections at once",
            "hint": "try again",
        }
    )
    headers = {
        **HEADERS,
        "Retry-After": "1",
        "Content-Type": "application/json; charset=utf-8",
        "Content-Length": str(len(body)),
        "Connection": "close",
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 503 Service Unavailable\r\n{lines}\r\n{body}".encode("ascii")
