"""
Maps responses of Customs, and missing responses, to the errors of this package.
"""

from __future__ import annotations

import http
from typing import TYPE_CHECKING, Any, Final

import httpx

from hsmtoll.clock import retry_after
from hsmtoll.customs.conversation import NoResponse, Outcome
from hsmtoll.errors import (
    ApiRefused,
    HsmTollError,
    NetworkError,
    OutcomeUnknown,
    TryAgainLater,
    sanitized,
)
from hsmtoll.jsonio import read_lenient

if TYPE_CHECKING:
    from hsmtoll.apis import Api

__all__ = [
    "SAFE",
    "bearer_of",
    "check",
    "checked_response",
    "field_errors",
    "list_of",
    "no_response_error",
    "object_of",
    "outcome_unknown_error",
    "status_error",
]

#: Safe methods (RFC 9110 section 9.2.1): they may be repeated.
SAFE: Final = ("GET", "HEAD", "OPTIONS")

#: Maximum number of errors shown from one response; the rest is counted.
_MOST_ERRORS: Final = 10

_HINTS: Final = {
    400: "Customs cannot read the message",
    401: "a token that was just issued is refused as well: check HSMTOLL_ENVIRONMENT",
    403: "the token's scope does not open this API, or Customs has not opened it to this "
    "organisation: `hsmtoll apis` shows which scope opens what; then ask digitoll@toll.no",
    404: "nothing lies there: check the path and the identifier in it",
    415: "the Content-Type is not taken: APIs take application/json, document upload a form",
}


def no_response_error(
    exc: NoResponse, api: Api, method: str, request_id: str | None = None
) -> HsmTollError:
    """The error for a missing response: OutcomeUnknown if Customs may have received the request."""
    if not exc.unsent and method.upper() not in SAFE:
        return outcome_unknown_error(f"no answer came ({exc})", api, request_id)
    return NetworkError(
        f"API {api.name}: no answer came ({exc})",
        hint="\n".join(
            filter(
                None,
                (f"{'nothing was sent; ' if exc.unsent else ''}it is safe to try again", exc.hint),
            )
        ),
        code=exc.code,
        retryable=True,
    )


def check(response: httpx.Response, api: Api, *, now: float) -> None:
    """
    Raise the error for an unsuccessful response. *now*: epoch seconds.

    As for a submission, a 5xx for a method that is not safe is OutcomeUnknown (C21).
    """
    safe = response.request.method in SAFE
    if response.status_code >= 500 and not safe:
        raise outcome_unknown_error(f"the answer was {response.status_code}", api, None, response)
    error = status_error(response, api, now=now)
    if error is not None:
        raise error
    if response.is_redirect and safe:
        raise NetworkError(
            f"API {api.name}: a redirect, which is not followed with a token",
            hint="a proxy or gateway may have answered: check HSMTOLL_PROXY and the endpoints",
            code="redirect",
        )
    if response.is_redirect:
        raise _redirect_error(api)


def status_error(response: httpx.Response, api: Api, *, now: float) -> HsmTollError | None:
    """The error for a status of 400 or more, or ``None``. *now*: epoch seconds."""
    status = response.status_code
    if 200 <= status < 400:
        return None
    phrase = http.HTTPStatus(status).phrase if status in set(http.HTTPStatus) else "unknown"
    what = f"API {api.name}: {status} {phrase}"
    correlation = _correlation(response)
    if status == http.HTTPStatus.TOO_MANY_REQUESTS:
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
            hint="try again later; Customs asks for the correlation id",
            code="server-error",
            correlation_id=correlation,
            retryable=True,
        )
    lines = field_errors((object_of(response) or {}).get("validationErrors"), bearer_of(response))
    return ApiRefused(
        what + (f", {len(lines)} error(s) in the message" if lines else ""),
        hint="\n".join(lines) or _HINTS.get(status, "Customs' pages describe the API"),
        code=f"http-{status}",
        who="customs" if status == http.HTTPStatus.FORBIDDEN else "you",
        correlation_id=correlation,
    )


def checked_response(answer: Outcome, api: Api, request_id: str | None) -> httpx.Response:
    """The response to a request that must not be repeated; raises if it is not a success."""
    if isinstance(answer, HsmTollError):
        # There was no token, so nothing was sent.
        raise answer
    if isinstance(answer, NoResponse):
        raise no_response_error(answer, api, "POST", request_id) from answer
    if answer is None:
        raise TypeError("a request has no outcome")
    if answer.status_code >= 500:
        raise outcome_unknown_error(f"the answer was {answer.status_code}", api, request_id, answer)
    if 300 <= answer.status_code < 400:
        raise _redirect_error(api)
    error = status_error(answer, api, now=0.0)
    if error is not None:
        raise error
    if answer.headers.get("content-type", "").lower().startswith("text/html"):
        # The format is not documented everywhere, but an HTML page is never from the API.
        raise outcome_unknown_error("the answer was a web page", api, request_id, answer)
    return answer


def outcome_unknown_error(
    why: str, api: Api, request_id: str | None, answer: httpx.Response | None = None
) -> OutcomeUnknown:
    named = f"requestId {request_id}: " if request_id else ""
    return OutcomeUnknown(
        f"submission to {api.name}: {named}{why}; it may have been received",
        hint=(
            f"do not send it again: ask for requestId {request_id} with `hsmtoll call GET "
            "…/validation-status/…`"
            if request_id
            else "do not send it again: look it up by its document number first"
        ),
        code="outcome-unknown",
        correlation_id=_correlation(answer) if answer is not None else None,
    )


def _redirect_error(api: Api) -> ApiRefused:
    return ApiRefused(f"API {api.name}: a redirect, which is not followed with a token")


def field_errors(listed: object, bearer: str) -> list[str]:
    """The validation errors of a response, one line each: at most ten, and the number of others."""
    entries = [
        each for each in (listed if isinstance(listed, list) else ()) if isinstance(each, dict)
    ]
    lines = [_error(entry, bearer) for entry in entries[:_MOST_ERRORS]]
    if len(entries) > _MOST_ERRORS:
        lines.append(f"and {len(entries) - _MOST_ERRORS} more errors")
    return lines


def _error(entry: dict[str, Any], bearer: str) -> str:
    pointer = entry.get("pointer")
    place = pointer.get("messageElementPath") if isinstance(pointer, dict) else None
    place = place or entry.get("field") or "message"
    words = sanitized(entry.get("description") or entry.get("error"), bearer)
    # The sandbox adds the page of Customs' guide with the rule.
    page = entry.get("see")
    source = f" (see {sanitized(page, bearer)})" if isinstance(page, str) else ""
    return f"{sanitized(place, bearer)}: {words}{source}"


def _correlation(response: httpx.Response) -> str | None:
    found = response.headers.get("x-correlationid") or response.headers.get("x-request-id")
    return sanitized(found, bearer_of(response)) if found else None


def bearer_of(answer: object) -> str:
    """The token sent with the request of *answer*, to redact it in messages; ``""`` if none."""
    try:
        sent = answer.request if isinstance(answer, httpx.Response) else None
    except RuntimeError:
        # A response constructed in a program has no request.
        return ""
    return "" if sent is None else sent.headers.get("authorization", "").removeprefix("Bearer ")


def object_of(response: httpx.Response) -> dict[str, Any] | None:
    value = read_lenient(response.content)
    return value if isinstance(value, dict) else None


def list_of(response: httpx.Response) -> list[Any]:
    value = read_lenient(response.content)
    return value if isinstance(value, list) else []
