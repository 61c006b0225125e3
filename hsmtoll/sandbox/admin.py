"""
The sandbox's admin endpoint: faults, received requests, delegations and the rules, over HTTP.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from hsmtoll.sandbox.faults import NAMES, Faults
from hsmtoll.sandbox.rules import SENTENCES, TABLE
from hsmtoll.sandbox.services import json_reply
from hsmtoll.sandbox.state import Received, State

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp.web_request import BaseRequest

__all__ = ["Admin", "read_body"]

#: Bytes.
_LARGEST_BODY: Final = 64 * 2**20


class Admin:
    """
    GET /faults, POST /faults {name, endpoint, times, after, …}, DELETE /faults,
    GET /received[?after=N], DELETE /received,
    POST /delegations {consumer_org, supplier, scopes}, GET /rules.

    Each request has ``Authorization: Bearer`` with *secret*. *apply* is awaited after a change of
    faults: it closes or reopens ports.
    """

    def __init__(
        self,
        state: State,
        faults: Faults,
        secret: str,
        apply: Callable[[], Awaitable[None]],
    ) -> None:
        self._state, self._faults = state, faults
        self._expected = f"Bearer {secret}".encode()
        self._apply = apply

    async def handle(self, request: BaseRequest) -> web.StreamResponse:
        """401 without the secret, 400 for a body that cannot be used, 404 for another path."""
        given = request.headers.get("Authorization", "").encode()
        if not secrets.compare_digest(given, self._expected):
            return web.Response(status=401)
        body = await read_body(request) or b""
        try:
            status, content = await self._answer(request, body)
        except (ValueError, TypeError) as error:
            status, content = 400, {"error": str(error)}
        reply = json_reply(status, content)
        return web.Response(status=reply.status, body=reply.body, headers=dict(reply.headers))

    async def _answer(self, request: BaseRequest, body: bytes) -> tuple[int, object]:
        match request.method, request.path:
            case "GET", "/faults":
                active = [asdict(fault) for fault in self._faults.active()]
                return 200, {"active": active, "known": dict(NAMES)}
            case "POST", "/faults":
                fault = self._faults.set(**_object(body, "a JSON object with at least a name"))
                await self._apply()
                return 201, asdict(fault)
            case "DELETE", "/faults":
                self._faults.clear()
                await self._apply()
                return 200, {}
            case "GET", "/received":
                after = int(request.query.get("after", "0"))
                with self._state.lock:
                    return 200, [_shown(one) for one in self._state.received[after:]]
            case "DELETE", "/received":
                with self._state.lock:
                    self._state.received.clear()
                return 200, {}
            case "POST", "/delegations":
                self._delegate(body)
                return 201, {}
            case "GET", "/rules":
                return 200, _rules()
        return 404, {"error": "no such path"}

    def _delegate(self, body: bytes) -> None:
        expected = "a JSON object with consumer_org, supplier and scopes"
        given = _object(body, expected)
        scopes = given.get("scopes")
        if not isinstance(scopes, list):
            raise TypeError(expected)
        consumer, supplier = str(given.get("consumer_org")), str(given.get("supplier"))
        self._state.delegate(consumer, supplier, map(str, scopes))


def _object(body: bytes, expected: str) -> dict[str, Any]:
    found = json.loads(body)
    if not isinstance(found, dict):
        raise TypeError(expected)
    return found


def _shown(one: Received) -> dict[str, Any]:
    shown = {name: getattr(one, name) for name in Received.__slots__}
    return shown | {"body": one.body.decode("utf-8", "replace")[:10_000]}


def _rules() -> dict[str, dict[str, object]]:
    return {
        rule.id: {
            "says": rule.sentence,
            "basis": rule.basis,
            "kind": rule.kind,
            "source": SENTENCES.get(rule.id),
        }
        for rule in TABLE.values()
    }


async def read_body(request: BaseRequest) -> bytes | None:
    """The whole body; None for one of more than 64 MiB."""
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > _LARGEST_BODY:
            return None
    return bytes(body)
