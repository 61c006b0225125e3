"""
Calls to the Customs APIs, and what their answers mean.

How a token is had never enters; a bearer is put on by auth.
"""

from __future__ import annotations

import http
from typing import TYPE_CHECKING

from hsmtoll.errors import ApiRefused, HsmTollError, NetworkError, TryAgainLater, foreign
from hsmtoll.exchange import retry_after

if TYPE_CHECKING:
    import httpx

    from hsmtoll.apis import Api

__all__ = ["refused"]


def refused(response: httpx.Response, api: Api, *, now: float) -> HsmTollError | None:
    """What an answer that is not 2xx means (PROTOCOL C.10), or ``None``. *now*: seconds, UTC."""
    status = response.status_code
    if 200 <= status < 300:
        return None
    phrase = http.HTTPStatus(status).phrase if status in set(http.HTTPStatus) else "unknown"
    what = f"API {api.name}: {status} {phrase}"
    correlation = foreign(response.headers.get("x-correlationid", "")) or None
    if status == 429:
        return TryAgainLater(
            f"{what}, too many calls",
            hint="wait before the next call",
            code="throttled",
            correlation_id=correlation,
            retry_after=retry_after(response.headers, now=now),
            retryable=True,
        )
    if status >= 500:
        return NetworkError(
            f"{what}, trouble on Customs' side",
            hint=f"try again later; Customs asks for the correlation id {correlation}",
            code="server-error",
            correlation_id=correlation,
            retryable=True,
        )
    return ApiRefused(
        what,
        hint=_HINTS.get(status, "look at the request; Customs' pages describe the API"),
        code=f"http-{status}",
        who="customs" if status == http.HTTPStatus.FORBIDDEN else "you",
        correlation_id=correlation,
    )


_HINTS = {
    400: "the message has errors; they are in the answer's body",
    401: "a token was just renewed and still refused: check HSMTOLL_ENVIRONMENT",
    403: "the token's scope does not open this API, or Customs has not opened it for this "
    "organisation: `hsmtoll apis` shows which scope opens what; then ask digitoll@toll.no",
    404: "nothing lies there: check the path and the identifier in it",
    415: "the body's Content-Type is not taken: APIs take application/json, document upload a form",
}
