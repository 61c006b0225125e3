"""
Sends one request over an httpx client and reads the response, with limits for time and size.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any, Final

import httpx

from hsmtoll.customs.conversation import NoResponse
from hsmtoll.deadline import Deadline

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from hsmtoll.transport import HttpClient

    _Trace = Callable[[str, Mapping[str, Any]], Awaitable[None]]

__all__ = [
    "alimit_response_size",
    "asend_with_deadline",
    "keep_location",
    "limit_response_size",
    "location_of",
    "send_with_deadline",
    "within_deadline",
]

#: Bytes, decompressed. Documents have 10 MB at most, a batch of the feed less.
_LARGEST_ANSWER: Final = 64 * 1024 * 1024

#: Name of the response extension that keeps the Location header of a redirect.
_LOCATION: Final = "hsmtoll.location"

#: Content codings that httpx may decode. It ignores others, such as a wrongly configured "utf-8".
_PACKINGS: Final = ("gzip", "deflate", "br", "zstd")


def limit_response_size(client: httpx.Client) -> httpx.Client:
    """Refuse responses of more than 64 MiB; `send_with_deadline` raises NoResponse for them."""
    client.event_hooks = {"response": [_read_limited]}
    return client


def alimit_response_size(client: httpx.AsyncClient) -> httpx.AsyncClient:
    """As limit_response_size, for tasks."""
    client.event_hooks = {"response": [_aread_limited]}
    return client


def send_with_deadline(
    client: httpx.Client, method: str, url: str, *, http_client: HttpClient, **request: Any
) -> httpx.Response:
    """
    Send one request and read the whole response, within the deadline of *http_client*, which made
    *client*.

    Raises NoResponse if there is none, and what obtaining a token raises. Arguments as for
    httpx.Client.request.
    """
    deadline = Deadline(http_client.deadline)
    user_trace = _extensions(request).get("trace")

    def trace(event: str, info: Mapping[str, Any]) -> None:
        deadline.trace(event, info)
        if user_trace is not None:
            user_trace(event, info)

    prepared = _request_options(request, trace)
    try:
        with deadline.binding():
            return _with_location(client.request(method, url, **prepared))
    except httpx.HTTPError as exc:
        raise _no_response(http_client, deadline, exc) from exc


async def asend_with_deadline(
    client: httpx.AsyncClient, method: str, url: str, *, http_client: HttpClient, **request: Any
) -> httpx.Response:
    """As send_with_deadline, for tasks."""
    async with within_deadline(http_client, _extensions(request).get("trace")) as trace:
        prepared = _request_options(request, trace)
        return _with_location(await client.request(method, url, **prepared))


@contextlib.asynccontextmanager
async def within_deadline(
    http_client: HttpClient, user_trace: _Trace | None = None
) -> AsyncIterator[_Trace]:
    """
    Bound one request of a task, and the reading of its response, by the deadline of *http_client*.

    Gives the extension ``trace`` of the request, which calls *user_trace* as well. Raises
    NoResponse if there is no whole response, and what obtaining a token raises.
    """
    deadline, scope = Deadline(http_client.deadline), asyncio.timeout(None)

    async def trace(event: str, info: Mapping[str, Any]) -> None:
        before = deadline.end
        deadline.trace(event, info)
        if deadline.end != before and not scope.expired():
            left = None if deadline.end is None else deadline.end - time.monotonic()
            scope.reschedule(None if left is None else asyncio.get_running_loop().time() + left)
        if user_trace is not None:
            await user_trace(event, info)

    try:
        async with scope:
            yield trace
    except httpx.HTTPError as exc:
        raise _no_response(http_client, deadline, exc) from exc
    except TimeoutError as exc:
        if not scope.expired():
            raise
        raise _no_response(http_client, deadline, exc) from exc


def _no_response(
    http_client: HttpClient, deadline: Deadline, exc: httpx.HTTPError | TimeoutError
) -> NoResponse:
    """The reason why there is no response."""
    if isinstance(exc, TimeoutError) or (deadline.cut and isinstance(exc, httpx.TimeoutException)):
        return NoResponse(
            f"not whole within {deadline.seconds:.0f} s",
            code="deadline",
            hint="HSMTOLL_DEADLINE sets how long to wait",
            unsent=not deadline.sent,
        )
    reason = http_client.reason(exc, str(exc.request.url), past_proxy=deadline.past_proxy)
    before = httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout | httpx.ProxyError
    unsent = not deadline.sent or isinstance(exc, before)
    return NoResponse(str(reason), code=reason.code, hint=reason.hint, unsent=unsent)


def _request_options(request: dict[str, Any], trace: Callable[..., Any]) -> dict[str, Any]:
    headers = httpx.Headers(request.pop("headers", None))
    # Codings that httpx decodes in chunks, each to at most a thousand times its size.
    headers["accept-encoding"] = "gzip, deflate"
    extensions = {**_extensions(request), "trace": trace}
    return {**request, "headers": headers, "extensions": extensions}


def _extensions(request: Mapping[str, Any]) -> Mapping[str, Any]:
    return request.get("extensions") or {}


def _start_body(response: httpx.Response) -> bytearray:
    """Before the body is read: remove the redirect, refuse codings that httpx decodes unbounded."""
    _keep_location(response)
    words = response.headers.get("content-encoding", "").lower().split(",")
    packings = [word.strip() for word in words if word.strip() in _PACKINGS]
    bodiless = response.request.method == "HEAD"
    if not bodiless and packings not in ([], ["gzip"], ["deflate"]):
        raise NoResponse("packed in a way that was not asked for", code="answer-compressed")
    return bytearray()


def _append(body: bytearray, part: bytes) -> None:
    body += part
    if len(body) > _LARGEST_ANSWER:
        raise NoResponse(f"larger than {_LARGEST_ANSWER >> 20} MiB", code="answer-too-large")


def _read_limited(response: httpx.Response) -> None:
    body = _start_body(response)
    for part in response.iter_bytes():
        _append(body, part)
    _set_content(response, body)


async def _aread_limited(response: httpx.Response) -> None:
    body = _start_body(response)
    async for part in response.aiter_bytes():
        _append(body, part)
    _set_content(response, body)


def _set_content(response: httpx.Response, body: bytearray) -> None:
    response._content = bytes(body)  # noqa: SLF001 - as its read() does, which has no bound


def _keep_location(response: httpx.Response) -> None:
    if response.is_redirect and "location" in response.headers:
        # Redirects are not followed, and httpx raises on a malformed Location.
        response.extensions[_LOCATION] = response.headers.pop("location")


async def keep_location(response: httpx.Response) -> None:
    """Response hook of an AsyncClient: keep a redirect's address from httpx; see `location_of`."""
    _keep_location(response)


def location_of(response: httpx.Response) -> str | None:
    """The header Location of a response that `keep_location` has seen."""
    kept: str | None = response.extensions.get(_LOCATION, response.headers.get("location"))
    return kept


def _with_location(response: httpx.Response) -> httpx.Response:
    if _LOCATION in response.extensions:
        response.headers["location"] = response.extensions.pop(_LOCATION)
    return response
