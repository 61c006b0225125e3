"""
Submission of a message to Customs, and polling for its result.
"""

from __future__ import annotations

import http
import json
import re
from typing import TYPE_CHECKING, Any, Final

import httpx

from hsmtoll import apis
from hsmtoll.customs.conversation import Outcome, Receipt, Send, Wait
from hsmtoll.customs.errors import (
    bearer_of,
    checked_response,
    field_errors,
    list_of,
    object_of,
    outcome_unknown_error,
)
from hsmtoll.errors import SubmissionFailed, UsageError, sanitized
from hsmtoll.suggestions import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hsmtoll.apis import Api
    from hsmtoll.customs.conversation import Conversation

__all__ = ["LEVELS", "submission"]

_ALL: Final = ("POST", "PUT", "DELETE")

_MOVEMENT: Final = {
    **dict.fromkeys(("transport", "master-consignment", "house-consignment"), _ALL),
    "relation": ("POST", "DELETE"),
}

#: API → level → methods, as in Customs' guide.
LEVELS: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    **dict.fromkeys(("road", "air", "rail", "maritime"), _MOVEMENT),
    "presentation": dict.fromkeys(
        (
            "house-consignment",
            "master-consignment",
            "container",
            "receptacle",
            "entry-summary-declaration",
        ),
        ("POST",),
    ),
    "arrival": {"arrival": ("POST",)},
    "maritime-ssnn": {
        "transport": _ALL,
        "declaration-of-goods": _ALL,
        "relationship": ("POST", "PUT"),
    },
}

_MRN = re.compile(r"\d{2}NO[A-Z0-9]{14}")

#: Polling intervals in seconds: the result is usually there after one or two (C20).
_PAUSES: Final = (1.0, 2.0, 3.0, 5.0, 8.0)


def submission(
    api: Api,
    method: str,
    level: str,
    message: Mapping[str, Any],
    *,
    mrn: str | None = None,
    now: Callable[[], float],
    timeout: float = 120.0,
    accepted: Callable[[str], None] = lambda _: None,
    waiting: Callable[[float], None] = lambda _: None,
) -> Conversation:
    """
    POST, PUT or DELETE a message, then poll until the result is there.

    *accepted* is called with the requestId before the first poll, so that it is known even if the
    process is killed. *waiting* is called before each pause with the seconds passed. *timeout*:
    seconds until polling gives up, pauses and requests together; the last poll may end later.
    *now*: a clock in seconds, to measure the requests.

    Raises UsageError before anything is sent; ApiRefused for a message with errors (listed in the
    hint, by field); SubmissionFailed for the result FAILURE; OutcomeUnknown if the result is not
    known: it must be looked up, and the submission not repeated.
    """
    send = _request(api, method, level, message, mrn)
    request_id = _request_id((yield send), api, level, message)
    accepted(request_id)
    path = _result_path(api, level, request_id)
    waited, polls = 0.0, 0
    while True:
        pause = _PAUSES[min(polls, len(_PAUSES) - 1)]
        if waited + pause > timeout:
            raise outcome_unknown_error(f"no result after {waited:.0f} s", api, request_id)
        waiting(waited)
        yield Wait(pause)
        began, polls = now(), polls + 1
        answer = yield Send("GET", path)
        waited += pause + now() - began
        result = _result(answer, api, request_id)
        if result is not None:
            return _receipt(result, request_id, bearer_of(answer))


def _result_path(api: Api, level: str, request_id: str) -> str:
    """The path for polling."""
    if api.name == "presentation":
        return f"{api.base}/validation-status"
    # There is no query API for arrival.
    base = api.base if api.name == "arrival" else apis.named(f"{api.name}-query").base
    return f"{base}/{level}/validation-status/{request_id}"


def _request(
    api: Api, method: str, level: str, message: Mapping[str, Any], mrn: str | None
) -> Send:
    levels = LEVELS.get(api.name)
    if levels is None:
        raise UsageError(
            f"submit to {api.name}: nothing is submitted there",
            hint=f"submissions go to {', '.join(LEVELS)}",
        )
    if level not in levels:
        raise UsageError(
            f"submit to {api.name}: there is no level {sanitized(level)}",
            hint=did_you_mean(level, levels, f"levels: {', '.join(levels)}"),
        )
    methods = levels[level]
    if method not in methods:
        raise UsageError(
            f"{sanitized(method)} {api.name} {level}: {' or '.join(methods)} is expected"
        )
    # The guide does not say where a relation's MRN is submitted: it may be in the message.
    inside = level == "relation" and mrn is None and isinstance(message.get("mrn"), str)
    by_mrn = method != "POST" and not inside
    if by_mrn and (mrn is None or not _MRN.fullmatch(mrn)):
        raise UsageError(
            f"{method} {api.name} {level}: the MRN of what is meant is required",
            hint="18 characters such as 26NO4TU2HUD59UCBT8, as the submission returned it (--mrn)",
        )
    if method == "POST" and mrn is not None:
        raise UsageError(f"{method} {api.name} {level}: takes no MRN")
    if api.name == "presentation" and not isinstance(message.get("requestId"), str):
        raise UsageError(
            f"submit to {api.name}: the message names no requestId",
            hint="for presentation the client chooses it: a new UUID each time",
        )
    path = f"{api.base}/{level}" + (f"/{mrn}" if by_mrn else "")
    return Send(method, path, json.dumps(message, ensure_ascii=False).encode())


def _request_id(
    answer: Outcome,
    api: Api,
    level: str,
    message: Mapping[str, Any],
) -> str:
    body = object_of(checked_response(answer, api, None)) or {}
    # Named lrn until 2022; for presentation it is the id that the client chose.
    found = body.get("requestId") or body.get("lrn") or message.get("requestId")
    fits = isinstance(found, str) and re.fullmatch(r"[0-9A-Za-z-]{1,64}", found)
    # The id is printed and used in URLs, so it must not contain the token.
    if not fits or sanitized(found, bearer_of(answer)) != found:
        raise outcome_unknown_error(f"{level} was accepted without a requestId", api, None)
    return str(found)


def _result(answer: Outcome, api: Api, request_id: str) -> Mapping[str, Any] | None:
    """The result, or ``None`` while there is none: 404 and transient errors mean "not yet"."""
    if not isinstance(answer, httpx.Response):
        return None
    if answer.status_code in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN):
        raise outcome_unknown_error(
            f"asking for the result: {answer.status_code}", api, request_id, answer
        )
    if not answer.is_success:
        return None
    body: Mapping[str, Any] | None = object_of(answer)
    if api.name == "presentation":
        body = _of_request(body or {"requests": list_of(answer)}, request_id)
    return body if body is not None and body.get("status") in ("SUCCESS", "FAILURE") else None


def _of_request(body: Mapping[str, Any], request_id: str) -> Mapping[str, Any] | None:
    """The entry for *request_id* in the status list of presentation requests."""
    if body.get("requestId") == request_id:
        return body
    for value in body.values():
        for entry in value if isinstance(value, list) else ():
            if isinstance(entry, dict) and entry.get("requestId") == request_id:
                return entry
    return None


def _receipt(result: Mapping[str, Any], request_id: str, bearer: str) -> Receipt:
    mrn = result.get("mrn") or result.get("masterReferenceNumber")
    receipt = Receipt(request_id, mrn if isinstance(mrn, str) else None, result)
    if result["status"] == "SUCCESS":
        return receipt
    lines = field_errors(result.get("validationErrorList"), bearer)
    error = SubmissionFailed(
        f"submission {request_id}: FAILURE with {len(lines)} error(s)",
        hint="\n".join(lines) or "Customs names no reason",
        code="validation",
        who="you",
    )
    error.errors = tuple(lines)
    raise error
