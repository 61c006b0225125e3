"""
Calls to the Customs APIs that end in an answer: submissions, uploads, the routing feed.

Each is a conversation written once: it yields what to send or how long to wait and is handed
the answers; one driver a colour speaks it. How a token is had never enters.
"""

from __future__ import annotations

import http
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx

from hsmtoll import apis, files
from hsmtoll.clock import retry_after
from hsmtoll.deadline import Deadline
from hsmtoll.errors import (
    ApiRefused,
    HsmTollError,
    NetworkError,
    OutcomeUnknown,
    SubmissionFailed,
    TryAgainLater,
    UsageError,
    foreign,
)
from hsmtoll.http_messages import read_json
from hsmtoll.suggestions import did_you_mean

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping

    from hsmtoll.apis import Api
    from hsmtoll.transport import Wire

__all__ = [
    "DOCUMENT_TYPES",
    "LEVELS",
    "SAFE",
    "Lost",
    "Marker",
    "Receipt",
    "aasked",
    "abounded",
    "arouting",
    "asked",
    "aspoken",
    "bounded",
    "check",
    "lost",
    "marker_of",
    "refused",
    "routing",
    "spoken",
    "submission",
    "upload",
]

_ALL: Final = ("POST", "PUT", "DELETE")
_MOVEMENT: Final = {
    **dict.fromkeys(("transport", "master-consignment", "house-consignment"), _ALL),
    "relation": ("POST", "DELETE"),
}

#: What can be submitted to which API, and by which methods: the catalogue of Customs' guide.
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

#: PROTOCOL C.12, as of January 2026.
DOCUMENT_TYPES: Final = (
    "invoice",
    "permits",
    "freight invoice",
    "proof of origin documentation",
    "waybill",
    "export documentation",
)
_MEDIA: Final = {
    "pdf": "application/pdf",
    "jpg": "image/jpeg",
    "png": "image/png",
    "txt": "text/plain",
    "docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    "xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
}
#: Bytes. "10 MB" is documented, and not whether MiB are meant: the smaller is safe.
_LARGEST_FILE: Final = 10_000_000
_DECLARATION = re.compile(r"\d{9}-\d{8}-\d+")
_MRN = re.compile(r"\d{2}NO[A-Z0-9]{14}")
#: A UUID is documented; whatever else it may become, it goes into a query and a file.
_MARKER = re.compile(r"[\x21-\x7e]{1,256}")

#: Seconds between questions for a result: usually there after one or two (PROTOCOL C.8, C20).
_PAUSES: Final = (1.0, 2.0, 3.0, 5.0, 8.0)


@dataclass(frozen=True, slots=True)
class Send:
    """One request; *json* is a message, *content* with *media* anything else."""

    method: str
    path: str
    content: bytes | None = None
    media: str = "application/json"


@dataclass(frozen=True, slots=True)
class Wait:
    """Seconds to let pass."""

    seconds: float


class Lost(Exception):
    """
    No whole answer came to a request. *unsent*: nothing of it was sent, for certain.

    The text says why; *code* and *hint* as in an error of ours.
    """

    def __init__(
        self, why: str, *, code: str = "unreachable", hint: str | None = None, unsent: bool = False
    ) -> None:
        super().__init__(why)
        self.code = code
        self.hint = hint
        self.unsent = unsent


#: What a conversation is told after each step: an answer, why none came, or nothing.
Told = httpx.Response | Lost | HsmTollError | None


@dataclass(frozen=True, slots=True)
class Receipt:
    """
    What became of a submission or an upload.

    *request_id* is Customs' (the client's own for presentation), *mrn* the 18 characters by
    which it can be changed and deleted, *body* the whole last answer.
    """

    request_id: str | None
    mrn: str | None
    body: Mapping[str, Any]


if TYPE_CHECKING:
    Talk = Generator[Send | Wait, Told, Receipt]


def submission(
    api: Api,
    method: str,
    level: str,
    message: Mapping[str, Any],
    *,
    mrn: str | None = None,
    now: Callable[[], float],
    patience: float = 120.0,
    accepted: Callable[[str], None] = lambda _: None,
    waiting: Callable[[float], None] = lambda _: None,
) -> Talk:
    """
    POST, PUT or DELETE of a message, then questions until the result is there.

    *accepted* is told the requestId before the first question, so that nothing is lost if the
    process dies; *waiting* is told before each pause how many seconds have passed. *patience*
    is how many seconds the result may take, of pauses and questions together; the last question
    may end after it. *now* is a clock, in seconds, that tells how long a question took.

    Raises UsageError before anything is sent; ApiRefused for a message with errors (they are
    in the hint, field by field); SubmissionFailed for a result FAILURE, OutcomeUnknown where
    nobody knows: that is to be looked up and never repeated.
    """
    send = _checked(api, method, level, message, mrn)
    request_id = _accepted((yield send), api, level, message)
    accepted(request_id)
    question = _question(api, level, request_id)
    waited, asked = 0.0, 0
    while True:
        pause = _PAUSES[min(asked, len(_PAUSES) - 1)]
        if waited + pause > patience:
            raise _unknown(f"no result after {waited:.0f} s", api, request_id)
        waiting(waited)
        yield Wait(pause)
        began, asked = now(), asked + 1
        answer = yield Send("GET", question)
        waited += pause + now() - began
        result = _result(answer, api, request_id)
        if result is not None:
            return _judged(result, request_id, _bearer(answer))


def _question(api: Api, level: str, request_id: str) -> str:
    """The path at which the result is asked for."""
    if api.name == "presentation":
        return f"{api.base}/validation-status"
    # Arrival has no query API beside it.
    base = api.base if api.name == "arrival" else apis.named(f"{api.name}-query").base
    return f"{base}/{level}/validation-status/{request_id}"


def upload(declaration_id: str, name: str, content: bytes, document_type: str) -> Talk:
    """
    One document to one declaration. *name* is the file's.

    Everything documented is checked before a byte is sent (PROTOCOL C.12, C22): UsageError.
    An upload whose answer never came is OutcomeUnknown.
    """
    api = apis.named("document")
    _check_upload(declaration_id, name, content, document_type)
    media = _MEDIA[name.rpartition(".")[2].lower()]
    # The order of the parts is part of the rules: metadata, then file (T24).
    form = httpx.Request(
        "POST",
        "https://unused/",
        files=[
            ("metadata", (None, json.dumps({"documentType": document_type}), "application/json")),
            ("file", (name, content, media)),
        ],
    )
    path = f"{api.base}/declaration-id/{declaration_id}/document"
    answer = yield Send("POST", path, form.read(), form.headers["content-type"])
    response = _answered(answer, api, None)
    return Receipt(None, None, _json(response) or {})


def _checked(
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
            f"submit to {api.name}: there is no level {foreign(level)}",
            hint=did_you_mean(level, levels, f"levels: {', '.join(levels)}"),
        )
    methods = levels[level]
    if method not in methods:
        raise UsageError(
            f"{foreign(method)} {api.name} {level}: {' or '.join(methods)} is expected"
        )
    # The guide says that a relation's MRN is submitted, and not where: it may stand in the message.
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


def _accepted(
    answer: Told,
    api: Api,
    level: str,
    message: Mapping[str, Any],
) -> str:
    body = _json(_answered(answer, api, None)) or {}
    # Until 2022 it was called lrn; presentation answers with what the client chose.
    found = body.get("requestId") or body.get("lrn") or message.get("requestId")
    fits = isinstance(found, str) and re.fullmatch(r"[0-9A-Za-z-]{1,64}", found)
    # It is shown and asked with: what repeats the token is no id.
    if not fits or foreign(found, _bearer(answer)) != found:
        raise _unknown(f"{level} was accepted without a requestId", api, None)
    return str(found)


def _answered(answer: Told, api: Api, request_id: str | None) -> httpx.Response:
    """The answer to something that must not be sent twice."""
    if isinstance(answer, HsmTollError):
        # No token was had, so nothing was taken in.
        raise answer
    if isinstance(answer, Lost):
        raise lost(answer, api, "POST", request_id) from answer
    assert answer is not None  # noqa: S101 - a Send is always answered
    if answer.status_code >= 500:
        raise _unknown(f"the answer was {answer.status_code}", api, request_id, answer)
    if 300 <= answer.status_code < 400:
        raise _elsewhere(api)
    error = refused(answer, api, now=0.0)
    if error is not None:
        raise error
    if answer.headers.get("content-type", "").lower().startswith("text/html"):
        # What Customs answers is not documented everywhere, but it is no page for people.
        raise _unknown("the answer was a web page", api, request_id, answer)
    return answer


def _result(answer: Told, api: Api, request_id: str) -> Mapping[str, Any] | None:
    """The result, or ``None`` while there is none: 404 is "not yet", and trouble passes."""
    if not isinstance(answer, httpx.Response):
        return None
    if answer.status_code in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN):
        raise _unknown(f"asking for the result: {answer.status_code}", api, request_id, answer)
    if not answer.is_success:
        return None
    body: Mapping[str, Any] | None = _json(answer)
    if api.name == "presentation":
        body = _of_request(body or {"requests": _list(answer)}, request_id)
    return body if body is not None and body.get("status") in ("SUCCESS", "FAILURE") else None


def _of_request(body: Mapping[str, Any], request_id: str) -> Mapping[str, Any] | None:
    """The entry of *request_id* in the status of all presentation requests."""
    if body.get("requestId") == request_id:
        return body
    for value in body.values():
        for entry in value if isinstance(value, list) else ():
            if isinstance(entry, dict) and entry.get("requestId") == request_id:
                return entry
    return None


def _judged(result: Mapping[str, Any], request_id: str, bearer: str) -> Receipt:
    mrn = result.get("mrn") or result.get("masterReferenceNumber")
    receipt = Receipt(request_id, mrn if isinstance(mrn, str) else None, result)
    if result["status"] == "SUCCESS":
        return receipt
    lines = _errors(result.get("validationErrorList"), bearer)
    error = SubmissionFailed(
        f"submission {request_id}: FAILURE with {len(lines)} error(s)",
        hint="\n".join(lines) or "Customs names no reason",
        code="validation",
        who="you",
    )
    error.errors = tuple(lines)
    raise error


#: Errors of an answer that are shown; the rest is counted.
_MOST_ERRORS: Final = 10


def _errors(listed: object, bearer: str) -> list[str]:
    """What an answer says is wrong, a line each: ten at most, and how many more there are."""
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
    words = foreign(entry.get("description") or entry.get("error"), bearer)
    # The sandbox names the page of the guide that says so.
    page = entry.get("see")
    source = f" (see {foreign(page, bearer)})" if isinstance(page, str) else ""
    return f"{foreign(place, bearer)}: {words}{source}"


def _unknown(
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


def _check_upload(declaration_id: str, name: str, content: bytes, document_type: str) -> None:
    if not _DECLARATION.fullmatch(declaration_id):
        raise UsageError(
            f"upload to {foreign(declaration_id)}: that is not a declaration id",
            hint="<declarant, 9 digits>-<ddmmyyyy>-<sequence>, such as 123456789-01092026-1",
        )
    if document_type not in DOCUMENT_TYPES:
        raise UsageError(
            f"upload of type {foreign(document_type)}: Customs knows no such type",
            hint=did_you_mean(document_type, DOCUMENT_TYPES, f"types: {', '.join(DOCUMENT_TYPES)}"),
        )
    extension = name.rpartition(".")[2].lower() if "." in name else ""
    if extension not in _MEDIA:
        raise UsageError(
            f"upload of {foreign(name)}: Customs takes {', '.join(_MEDIA)}",
            hint="doc and xls are no longer taken; save as docx, xlsx or pdf",
        )
    if not 0 < len(content) <= _LARGEST_FILE:
        raise UsageError(
            f"upload of {foreign(name)}: {len(content)} bytes, 1 to {_LARGEST_FILE} are taken",
            hint="split what is larger",
        )


#: Methods that may be repeated, whatever became of the first (RFC 9110 section 9.2.1).
SAFE: Final = ("GET", "HEAD", "OPTIONS")


def lost(exc: Lost, api: Api, method: str, request_id: str | None = None) -> HsmTollError:
    """What it means that no answer came: OutcomeUnknown for what may have been received."""
    if not exc.unsent and method.upper() not in SAFE:
        return _unknown(f"no answer came ({exc})", api, request_id)
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
    Raise what an answer to a call means if it is no success. *now*: seconds, UTC.

    As for a submission, a 5xx to what must not be sent twice is OutcomeUnknown (PROTOCOL C21).
    """
    safe = response.request.method in SAFE
    if response.status_code >= 500 and not safe:
        raise _unknown(f"the answer was {response.status_code}", api, None, response)
    error = refused(response, api, now=now)
    if error is not None:
        raise error
    if response.is_redirect and safe:
        raise NetworkError(
            f"API {api.name}: a redirect, which is not followed with a token",
            hint="something between may have answered: check HSMTOLL_PROXY and the endpoints",
            code="redirect",
        )
    if response.is_redirect:
        raise _elsewhere(api)


def _elsewhere(api: Api) -> ApiRefused:
    return ApiRefused(f"API {api.name}: a redirect, which is not followed with a token")


def refused(response: httpx.Response, api: Api, *, now: float) -> HsmTollError | None:
    """What an answer that is not 2xx means (PROTOCOL C.10), or ``None``. *now*: seconds, UTC."""
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
    lines = _errors((_json(response) or {}).get("validationErrors"), _bearer(response))
    return ApiRefused(
        what + (f", {len(lines)} error(s) in the message" if lines else ""),
        hint="\n".join(lines) or _HINTS.get(status, "Customs' pages describe the API"),
        code=f"http-{status}",
        who="customs" if status == http.HTTPStatus.FORBIDDEN else "you",
        correlation_id=correlation,
    )


_HINTS: Final = {
    400: "Customs cannot read the message",
    401: "a token that was just issued is refused as well: check HSMTOLL_ENVIRONMENT",
    403: "the token's scope does not open this API, or Customs has not opened it to this "
    "organisation: `hsmtoll apis` shows which scope opens what; then ask digitoll@toll.no",
    404: "nothing lies there: check the path and the identifier in it",
    415: "the Content-Type is not taken: APIs take application/json, document upload a form",
}


def _correlation(response: httpx.Response) -> str | None:
    said = response.headers.get("x-correlationid") or response.headers.get("x-request-id")
    return foreign(said, _bearer(response)) if said else None


def _bearer(answer: object) -> str:
    """The token that was sent for *answer*, to be left out of what it says; empty without one."""
    try:
        sent = answer.request if isinstance(answer, httpx.Response) else None
    except RuntimeError:
        # An answer that was made by hand knows of no request.
        return ""
    return "" if sent is None else sent.headers.get("authorization", "").removeprefix("Bearer ")


def _json(response: httpx.Response) -> dict[str, Any] | None:
    value = read_json(response.content)
    return value if isinstance(value, dict) else None


def _list(response: httpx.Response) -> list[Any]:
    value = read_json(response.content)
    return value if isinstance(value, list) else []


#: Bytes, unpacked. Documents are of 10 MB at most, and a batch of the feed is less.
_LARGEST_ANSWER: Final = 64 * 1024 * 1024

#: Where an answer that is a redirect says where to.
_LOCATION: Final = "hsmtoll.location"


def _lost(wire: Wire, deadline: Deadline, exc: httpx.HTTPError | TimeoutError) -> Lost:
    """Why no answer came."""
    if isinstance(exc, TimeoutError) or (deadline.cut and isinstance(exc, httpx.TimeoutException)):
        return Lost(
            f"not whole within {deadline.seconds:.0f} s",
            code="deadline",
            hint="HSMTOLL_DEADLINE sets how long to wait",
            unsent=not deadline.sent,
        )
    reason = wire.reason(exc, str(exc.request.url), past_proxy=deadline.past_proxy)
    before = httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout | httpx.ProxyError
    unsent = not deadline.sent or isinstance(exc, before)
    return Lost(str(reason), code=reason.code, hint=reason.hint, unsent=unsent)


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
        raise Lost("packed in a way that was not asked for", code="answer-compressed")
    return bytearray()


#: What httpx may unpack. Other words, such as the utf-8 of a server set up wrongly, it passes over.
_PACKINGS: Final = ("gzip", "deflate", "br", "zstd")


def _grown(body: bytearray, part: bytes) -> None:
    body += part
    if len(body) > _LARGEST_ANSWER:
        raise Lost(f"larger than {_LARGEST_ANSWER >> 20} MiB", code="answer-too-large")


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


def bounded(client: httpx.Client) -> httpx.Client:
    """Let *client* take no answer that is larger than 64 MiB; `asked` raises Lost for one."""
    client.event_hooks = {"response": [_received]}
    return client


def abounded(client: httpx.AsyncClient) -> httpx.AsyncClient:
    """As bounded, for tasks."""
    client.event_hooks = {"response": [_areceived]}
    return client


def _whole(response: httpx.Response) -> httpx.Response:
    if _LOCATION in response.extensions:
        response.headers["location"] = response.extensions.pop(_LOCATION)
    return response


def asked(
    client: httpx.Client, method: str, url: str, *, wire: Wire, **request: Any
) -> httpx.Response:
    """
    One request over *client*, which *wire* has made, and its whole answer, within its deadline.

    Raises Lost where there is none, and what having a token raises. Arguments as for
    httpx.Client.request.
    """
    deadline = Deadline(wire.deadline)
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
        raise _lost(wire, deadline, exc) from exc


async def aasked(
    client: httpx.AsyncClient, method: str, url: str, *, wire: Wire, **request: Any
) -> httpx.Response:
    """As asked, for tasks."""
    import asyncio  # noqa: PLC0415 - threads need none of it

    deadline, scope = Deadline(wire.deadline), asyncio.timeout(None)
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
        raise _lost(wire, deadline, exc) from exc
    except TimeoutError as exc:
        if not scope.expired():
            raise
        raise _lost(wire, deadline, exc) from exc


def spoken(
    talk: Talk,
    ask: Callable[..., httpx.Response],
    origin: str,
    sleep: Callable[[float], None],
) -> Receipt:
    """Hold a conversation; *ask* is one request to *origin* with its answer."""
    told: Told = None
    try:
        while True:
            step = talk.send(told)
            if isinstance(step, Wait):
                sleep(step.seconds)
                told = None
                continue
            try:
                told = ask(step.method, origin + step.path, **_sent(step))
            except (Lost, HsmTollError) as exc:
                told = exc
    except StopIteration as end:
        receipt: Receipt = end.value
        return receipt


async def aspoken(
    talk: Talk,
    ask: Callable[..., Awaitable[httpx.Response]],
    origin: str,
    sleep: Callable[[float], Awaitable[None]],
) -> Receipt:
    """As spoken, for tasks."""
    told: Told = None
    try:
        while True:
            step = talk.send(told)
            if isinstance(step, Wait):
                await sleep(step.seconds)
                told = None
                continue
            try:
                told = await ask(step.method, origin + step.path, **_sent(step))
            except (Lost, HsmTollError) as exc:
                told = exc
    except StopIteration as end:
        receipt: Receipt = end.value
        return receipt


def _sent(step: Send) -> dict[str, Any]:
    if step.content is None:
        return {}
    return {"content": step.content, "headers": {"content-type": step.media}}


class Marker:
    """
    How far a routing feed was taken, kept in a file (0600): the id of the last signal. Without a
    *path* nothing is kept, and the feed begins anew.

    It is written after the caller has taken a batch, never before (PROTOCOL C24): a program
    that dies in between sees the batch again.
    """

    def __init__(self, path: Path | str | None) -> None:
        self._path = None if path is None else Path(path)

    def read(self) -> str | None:
        """The id, or ``None`` at the beginning. UsageError for a file that has none in it."""
        if self._path is None:
            return None
        try:
            said = self._path.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as exc:
            raise self._unusable(exc) from exc
        if said and not _MARKER.fullmatch(said):
            raise self._unusable(None)
        return said or None

    def write(self, marker: str) -> None:
        """
        Keep *marker*, whole and on the disk before the next batch is asked for. UsageError where
        that cannot be done.
        """
        if self._path is None:
            return
        try:
            files.replace(self._path, marker.encode("ascii"))
        except OSError as exc:
            raise self._unusable(exc) from exc

    def _unusable(self, exc: Exception | None) -> UsageError:
        why = (isinstance(exc, OSError) and exc.strerror) or "not the id of a signal"
        return UsageError(
            f"marker {foreign(self._path)}: it cannot be used ({why})",
            hint="a file of this program's own; without it the feed begins anew",
        )


def _batch(
    response: httpx.Response, api: Api, at: str | None, now: float
) -> tuple[tuple[Any, ...], str | None]:
    """
    The signals after *at*, and the marker of the last; no marker, and none, at the end of the feed.

    Only an empty list is the end: what anything else says in its place is an error.
    """
    error = refused(response, api, now=now)
    if error is not None:
        raise error
    signals = read_json(response.content)
    if response.status_code != http.HTTPStatus.OK or not isinstance(signals, list):
        raise _no_feed(api, f"{response.status_code}, and no list of signals")
    if not signals:
        return (), None
    marker = marker_of(signals[-1])
    if marker is None:
        raise _no_feed(api, "a signal without routingResult.id")
    if marker == at:
        raise _no_feed(api, "the same batch again")
    return tuple(signals), marker


def marker_of(signal: Any) -> str | None:
    """The id that a marker is, of one signal."""
    result = signal.get("routingResult") if isinstance(signal, dict) else None
    marker = result.get("id") if isinstance(result, dict) else None
    return marker if isinstance(marker, str) and _MARKER.fullmatch(marker) else None


def _no_feed(api: Api, why: str) -> NetworkError:
    return NetworkError(
        f"API {api.name}: {why}",
        hint="a proxy or gateway may have answered; what came before is taken, ask again later",
        code="feed",
        retryable=True,
    )


def _no_answer(api: Api, exc: Lost) -> NetworkError:
    return NetworkError(
        f"API {api.name}: no answer came ({exc})",
        hint=f"what came before is taken; it is safe to ask again\n{exc.hint or ''}".rstrip(),
        code=exc.code,
        retryable=True,
    )


def routing(
    client: httpx.Client,
    level: str,
    marker: Marker,
    *,
    now: Callable[[], float],
    wire: Wire,
) -> Iterator[tuple[Any, ...]]:
    """
    Batches of routing signals since *marker*, at most 1,000 each, until there are none.

    At least once: a batch counts as taken when the next one is asked for. The deadline of
    *wire* bounds each question with its answer. Raises what a call does, UsageError for a marker
    that cannot be used, NetworkError for what is no feed.
    """
    api = apis.named("routing")
    at = marker.read()
    while True:
        try:
            params = {"marker": at} if at else {}
            response = asked(client, "GET", f"/{level}", wire=wire, params=params)
        except Lost as exc:
            raise _no_answer(api, exc) from exc
        signals, last = _batch(response, api, at, now())
        if last is None:
            return
        yield signals
        marker.write(last)
        at = last


async def arouting(
    client: httpx.AsyncClient,
    level: str,
    marker: Marker,
    *,
    now: Callable[[], float],
    wire: Wire,
) -> AsyncIterator[tuple[Any, ...]]:
    """As routing, for tasks."""
    api = apis.named("routing")
    at = marker.read()
    while True:
        try:
            params = {"marker": at} if at else {}
            response = await aasked(client, "GET", f"/{level}", wire=wire, params=params)
        except Lost as exc:
            raise _no_answer(api, exc) from exc
        signals, last = _batch(response, api, at, now())
        if last is None:
            return
        yield signals
        marker.write(last)
        at = last
