"""
The effects of faults on a request: a wait, another reply, a corrupted reply or transmission.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from aiohttp import web

from hsmtoll.sandbox.services import Reply, json_reply

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp.web_request import BaseRequest

    from hsmtoll.sandbox.faults import Fault
    from hsmtoll.sandbox.services import Request

__all__ = ["Gates", "corrupted", "replacement", "send"]

_HTML: Final = b"<html><head><title>Gateway</title></head><body><h1>Sorry</h1></body></html>\n"
_TEXT_HTML: Final = {"Content-Type": "text/html"}

#: Seconds for which a request is held at most.
_LONGEST_HOLD: Final = 30.0


class Gates:
    """For each ``hold`` fault, the event for which its requests wait."""

    def __init__(self) -> None:
        self._events: dict[Fault, asyncio.Event] = {}

    async def wait(self, fault: Fault) -> None:
        """Wait until as many requests are here as the fault says."""
        gate = self._events.setdefault(fault, asyncio.Event())
        fault.seen += 1
        if fault.seen >= int(fault.options.get("callers", 2)):
            gate.set()
        with suppress(TimeoutError):
            await asyncio.wait_for(gate.wait(), _LONGEST_HOLD)


#: Faults that always answer the same.
_REPLIES: Final[Mapping[str, Reply]] = {
    "reset": Reply(500),
    "html": Reply(200, _HTML, _TEXT_HTML),
    "429": Reply(429),
    "500": json_reply(500, {"error": "server_error"}),
    "502": Reply(502, _HTML, _TEXT_HTML),
    "503": Reply(503, _HTML, _TEXT_HTML),
    "401": Reply(401),
    "endless": Reply(200, b" ", {"Content-Type": "application/json"}),
}


def replacement(fault: Fault | None, request: Request) -> Reply | None:
    """The reply of a fault that replaces the real one; the request then has no effect."""
    if fault is None:
        return None
    match fault.name:
        case "429-retry-after":
            return Reply(429, b"", {"Retry-After": str(int(fault.seconds(2)))})
        case "redirect":
            where = str(fault.options.get("location", "https://elsewhere.invalid/"))
            return Reply(302, b"", {"Location": where})
        case "echo":
            text = request.body.decode("latin-1")
            error = {"error": "invalid_request", "error_description": text}
            return json_reply(400, error)
    return _REPLIES.get(fault.name)


def corrupted(fault: Fault | None, reply: Reply) -> Reply:
    """The real reply, with the wrong value of the fault, if it has one."""
    if fault is None or reply.status != 200 or fault.name not in {"newline-token", "expires-in"}:
        return reply
    try:
        content = json.loads(reply.body)
    except ValueError:
        return reply
    if fault.name == "newline-token":
        content["access_token"] = f"{content['access_token'][:20]}\n{content['access_token'][20:]}"
    else:
        content["expires_in"] = fault.options.get("value")
    return replace(reply, body=json.dumps(content).encode())


async def send(
    request: BaseRequest, reply: Reply, headers: Mapping[str, str], fault: Fault | None
) -> web.StreamResponse:
    """Send *reply* as the fault says: whole, in part, slowly, or not at all."""
    name = fault.name if fault else ""
    if name in {"reset", "reset-after"}:
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=reply.status)
    if fault is None or name not in {"drip", "truncated", "endless"}:
        return web.Response(status=reply.status, body=reply.body, headers=dict(headers))
    response = web.StreamResponse(status=reply.status, headers=dict(headers))
    if name != "endless":
        response.content_length = len(reply.body)
    await response.prepare(request)
    with suppress(ConnectionError):
        await _write(response, reply.body, fault)
        if name == "truncated" and request.transport is not None:
            request.transport.close()
    return response


async def _write(response: web.StreamResponse, body: bytes, fault: Fault) -> None:
    if fault.name == "truncated":
        await response.write(body[: len(body) // 2])
    elif fault.name == "drip":
        for at in range(len(body)):
            await response.write(body[at : at + 1])
            await asyncio.sleep(fault.seconds(0.05))
        await response.write_eof()
    else:
        while True:
            await response.write(b" " * 65536)
            await asyncio.sleep(0)
