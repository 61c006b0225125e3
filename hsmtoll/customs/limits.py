"""
One request over an httpx client, and its whole answer: bounded in time and in size.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

import httpx

from hsmtoll.customs.conversation import NoResponse
from hsmtoll.deadline import Deadline

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hsmtoll.transport import HttpClient

__all__ = [
    "alimit_response_size",
    "asend_with_deadline",
    "limit_response_size",
    "send_with_deadline",
]

#: Bytes, unpacked. Documents are of 10 MB at most, and a batch of the feed is less.
_LARGEST_ANSWER: Final = 64 * 1024 * 1024

#: Where an answer that is a redirect says where to.
_LOCATION: Final = "hsmtoll.location"

#: What httpx may unpack. Other words, such as the utf-8 of a server set up wrongly, it passes over.
_PACKINGS: Final = ("gzip", "deflate", "br", "zstd")


def limit_response_size(client: httpx.Client) -> httpx.Client:
    """Refuse responses of more than 64 MiB; `send_with_deadline` raises NoResponse for them."""
    client.event_hooks = {"response": [_received]}
    return client


def alimit_response_size(client: httpx.AsyncClient) -> httpx.AsyncClient:
    """As bounded, for tasks."""
    client.event_hooks = {"response": [_areceived]}
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
    theirs = _extensions(request).get("trace")

    def trace(event: str, info: Mapping[str, Any]) -> None:
        deadline.trace(event, info)
        if theirs is not None:
            theirs(event, info)

    prepared = _prepared(request, trace)
    try:
        with deadline.binding():
            return _whole(client.request(method, url, **prepared))
    except httpx.HTTPError as exc:
        raise _no_response(http_client, deadline, exc) from exc


async def asend_with_deadline(
    client: httpx.AsyncClient, method: str, url: str, *, http_client: HttpClient, **request: Any
) -> httpx.Response:
    """As asked, for tasks."""
    deadline, scope = Deadline(http_client.deadline), asyncio.timeout(None)
    theirs = _extensions(request).get("trace")

    async def trace(event: str, info: Mapping[str, Any]) -> None:
        before = deadline.end
        deadline.trace(event, info)
        if deadline.end != before and not scope.expired():
            left = None if deadline.end is None else deadline.end - time.monotonic()
            scope.reschedule(None if left is None else asyncio.get_running_loop().time() + left)
        if theirs is not None:
            await theirs(event, info)

    prepared = _prepared(request, trace)
    try:
        async with scope:
            return _whole(await client.request(method, url, **prepared))
    except httpx.HTTPError as exc:
        raise _no_response(http_client, deadline, exc) from exc
    except TimeoutError as exc:
        if not scope.expired():
            raise
        raise _no_response(http_client, deadline, exc) from exc


def _no_response(
    http_client: HttpClient, deadline: Deadline, exc: httpx.HTTPError | TimeoutError
) -> NoResponse:
    """Why no answer came."""
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


def _prepared(request: dict[str, Any], trace: Callable[..., Any]) -> dict[str, Any]:
    headers = httpx.Headers(request.pop("headers", None))
    # What is unpacked piece by piece, each into no more than a thousand times its size.
    headers["accept-encoding"] = "gzip, deflate"
    extensions = {**_extensions(request), "trace": trace}
    return {**request, "headers": headers, "extensions": extensions}


def _extensions(request: Mapping[str, Any]) -> Mapping[str, Any]:
    return request.get("extensions") or {}


def _begun(response: httpx.Response) -> bytearray:
    """Before a body is read: what httpx would follow or unpack without a bound."""
    if response.is_redirect and "location" in response.headers:
        # It is not followed, and httpx would fail on what is no address.
        response.extensions[_LOCATION] = response.headers.pop("location")
    words = response.headers.get("content-encoding", "").lower().split(",")
    packings = [word.strip() for word in words if word.strip() in _PACKINGS]
    bodiless = response.request.method == "HEAD"
    if not bodiless and packings not in ([], ["gzip"], ["deflate"]):
        raise NoResponse("packed in a way that was not asked for", code="answer-compressed")
    return bytearray()


def _grown(body: bytearray, part: bytes) -> None:
    body += part
    if len(body) > _LARGEST_ANSWER:
        raise NoResponse(f"larger than {_LARGEST_ANSWER >> 20} MiB", code="answer-too-large")


def _received(response: httpx.Response) -> None:
    body = _begun(response)
    for part in response.iter_bytes():
        _grown(body, part)
    response._content = bytes(body)  # noqa: SLF001 - as its read() does, which has no bound


async def _areceived(response: httpx.Response) -> None:
    body = _begun(response)
    async for part in response.aiter_bytes():
        _grown(body, part)
    response._content = bytes(body)  # noqa: SLF001 - as above


def _whole(response: httpx.Response) -> httpx.Response:
    if _LOCATION in response.extensions:
        response.headers["location"] = response.extensions.pop(_LOCATION)
    return response
