"""One request through the proxy: admitted, sent with the bearer, and the answer streamed back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from typing import TYPE_CHECKING, Final

import httpx
from aiohttp import web

from hsmtoll.auth import AsyncTollAuth
from hsmtoll.customs.conversation import NoResponse
from hsmtoll.customs.errors import no_response_error
from hsmtoll.customs.limits import keep_location, location_of, within_deadline
from hsmtoll.errors import (
    ConfigurationError,
    ExchangeRefused,
    GrantRefused,
    HsmTollError,
    NetworkError,
    OutcomeUnknown,
    PolicyDenied,
    ScopeNotGranted,
    UsageError,
    sanitized,
)
from hsmtoll.proxy.admission import Rejected, request_headers, response_headers
from hsmtoll.transport import CONNECTIONS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hsmtoll.proxy.admission import Admission, Target
    from hsmtoll.proxy.measures import Measures
    from hsmtoll.token import TokenRequest
    from hsmtoll.tokens.token_service import TokenService

__all__ = ["Forwarder", "error_reply"]

_log = logging.getLogger("hsmtoll.proxy")

#: Bytes of a body that is held, to be sent again where Customs refuses a token before its end.
#: Larger ones are streamed.
_HELD: Final = 256 * 1024


class Forwarder:
    """Sends admitted requests to Customs, `CONNECTIONS` at once; the others wait for their turn."""

    def __init__(
        self, token_service: TokenService, admission: Admission, measures: Measures
    ) -> None:
        self._token_service = token_service
        self._admission = admission
        self._measures = measures
        self._turn = asyncio.Semaphore(CONNECTIONS)
        #: The last request for which no token could be had, for a reason that concerns others too.
        self._failed: TokenRequest | None = None
        customs = token_service.endpoints.customs
        self._client = httpx.AsyncClient(
            **token_service.http_client.options(customs), event_hooks={"response": [keep_location]}
        )

    async def close(self) -> None:
        """Close the connections to Customs."""
        await self._client.aclose()

    async def not_ready(self) -> list[str]:
        """Why no token can be had; empty if one can, or if none has been missed."""
        if self._failed is not None:
            try:
                await self._token_service.atoken(self._failed)
            except HsmTollError as exc:
                return [f"{exc.code}: {sanitized(exc)}"]
            self._failed = None
        return []

    async def handle(self, request: web.BaseRequest, caller: str) -> web.StreamResponse:
        """
        Answer one request of *caller* (for the log), with Customs' answer or an error of our own,
        which has the header Hsmtoll-Error. Logs one line.
        """
        began = time.monotonic()
        label, note, trace = "none", "", None
        try:
            self._admission.check_origin(request.headers)
            target = self._admission.target(request.method, request.raw_path, request.headers)
            label = target.api.name
            response, note = await self._forward(request, target)
        except (Rejected, HsmTollError) as exc:
            response, note = error_reply(exc), f", {exc.code}: {sanitized(exc)}"
            trace = getattr(exc, "trace_id", None)
        took = time.monotonic() - began
        self._measures.count(label, request.method, response.status, took)
        _log.info(
            "%s %s: %d in %d ms, %s%s",
            sanitized(request.method), sanitized(request.raw_path.partition("?")[0]),
            response.status, round(took * 1000), caller, note,
            extra={"event": "request", "caller": caller, "trace": trace},
        )  # fmt: skip
        return response

    async def _forward(
        self, request: web.BaseRequest, target: Target
    ) -> tuple[web.StreamResponse, str]:
        """Customs' answer, and a note for the log if it broke off."""
        wanted = self._token_service.request(target.scope, **target.whom)
        customs = self._token_service.endpoints.customs
        http_client = self._token_service.http_client
        content = await _content(request, http_client.deadline)
        response: web.StreamResponse | None = None
        try:
            async with self._turn, within_deadline(http_client) as trace:
                sent = httpx.Request(
                    request.method,
                    f"{customs}{target.path}",
                    headers=request_headers(request.raw_headers),
                    content=content,
                    extensions={"timeout": self._client.timeout.as_dict(), "trace": trace},
                )
                auth = AsyncTollAuth(self._token_service, wanted)
                answer = await self._client.send(sent, auth=auth, stream=True)
                async with contextlib.aclosing(answer):
                    headers = response_headers(answer.headers.raw, location_of(answer), customs)
                    response = web.StreamResponse(status=answer.status_code, headers=headers)
                    await _stream(request, response, answer)
        except NoResponse as exc:
            if response is not None and response.prepared:
                # Part of the answer is out: only a closed connection says that it is not whole.
                _abort(request)
                return response, f", broken off: {sanitized(exc)}"
            raise no_response_error(exc, target.api, request.method) from exc
        except HsmTollError as exc:
            if exc.scope != "request":
                self._failed = wanted
            raise
        return response, ""


async def _content(request: web.BaseRequest, seconds: float) -> bytes | AsyncIterator[bytes] | None:
    """
    The body: whole if it is small, within *seconds*; otherwise as a stream; ``None`` if there is
    none.
    """
    try:
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not request.body_exists:
            return None
        length = request.content_length
        if length is None or length > _HELD:
            return _parts(request)
        async with asyncio.timeout(seconds):
            return await request.read()
    except (ConnectionError, web.RequestPayloadError, TimeoutError) as exc:
        raise _incomplete() from exc


async def _parts(request: web.BaseRequest) -> AsyncIterator[bytes]:
    try:
        async for part in request.content.iter_any():
            yield part
    except (ConnectionError, web.RequestPayloadError) as exc:
        raise _incomplete() from exc


def _incomplete() -> Rejected:
    return Rejected(
        400,
        "body-incomplete",
        "the request body is incomplete",
        "Customs received no complete request",
    )


async def _stream(
    request: web.BaseRequest, response: web.StreamResponse, answer: httpx.Response
) -> None:
    """Send Customs' *answer* on, its body as it comes and in the coding it has."""
    try:
        await response.prepare(request)
        async for part in answer.aiter_raw():
            await response.write(part)
        await response.write_eof()
    except ConnectionError:
        # The caller has closed its connection; nobody reads the rest.
        _abort(request)


def _abort(request: web.BaseRequest) -> None:
    if request.transport is not None:
        request.transport.abort()


#: Of several rows the first that fits.
_STATUS: Final = (
    (OutcomeUnknown, 504),
    (PolicyDenied, 403),
    (UsageError, 400),
    (ConfigurationError, 500),
    (ScopeNotGranted | GrantRefused | ExchangeRefused, 502),
    (NetworkError, 502),
)


def error_reply(exc: Rejected | HsmTollError) -> web.Response:
    """
    A JSON object for an error of the proxy's own, told from Customs' by the header Hsmtoll-Error.
    503: neither the request nor Customs is at fault, and trying later may help.
    """
    status = exc.status if isinstance(exc, Rejected) else _status(exc)
    hint = (exc.hint or "").replace("\n", "; ")
    body = {"error": exc.code, "error_description": sanitized(exc), "hint": sanitized(hint)}
    headers = {"Hsmtoll-Error": exc.code, "Cache-Control": "no-store", "Server": "hsmtoll"}
    wait = None if isinstance(exc, Rejected) else exc.retry_after
    if wait is not None or status == 503:
        headers["Retry-After"] = str(max(1, math.ceil(5.0 if wait is None else wait)))
    return web.json_response(body, status=status, headers=headers)


def _status(exc: HsmTollError) -> int:
    if isinstance(exc, NetworkError) and exc.code == "deadline":
        return 504
    return next((status for kind, status in _STATUS if isinstance(exc, kind)), 503)
