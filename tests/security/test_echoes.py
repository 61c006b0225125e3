"""
A server that repeats a secret in words of its own makes no log and no error show it.

The secrets are opaque here: nothing leaves them out but who knows what was sent. Each test has
its control: an id that is none of them is told as it is.
"""

from __future__ import annotations

import itertools
import json
import traceback
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from hsmtoll import HsmTollError, TollClient, apis
from hsmtoll.customs.errors import status_error
from hsmtoll.errors import OutcomeUnknown, SubmissionFailed
from hsmtoll.http_messages import HttpResponse, Post
from hsmtoll.tokens.exchange import read_issued, read_subject
from tests.kit.raw_services import BEARER, SUBJECT, RawServices, http_reply
from tests.kit.soft_client import token_service_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ID = "1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed"
SECRET = SUBJECT


def shown(secret: str, where: str) -> bool:
    """Whether any run of 12 characters of *secret* is in *where*."""
    return any(secret[at : at + 12] in where for at in range(len(secret) - 11))


def text_of(exc: BaseException) -> str:
    """All that can be read off an error."""
    return "".join([*traceback.format_exception(exc), repr(vars(exc))])


@pytest.mark.parametrize("read", [read_subject, read_issued])
@pytest.mark.parametrize("status", [200, 302, 400, 429, 500])
@pytest.mark.parametrize("name", ["x-correlationid", "x-request-id"])
@pytest.mark.parametrize("echo", [SECRET, SECRET[5:25], f"id {SECRET} of yours"])
def test_an_id_that_repeats_what_was_posted_is_left_out(
    read: Callable[[HttpResponse, Post], Any], status: int, name: str, echo: str
) -> None:
    for word in (echo, ID):
        answer = HttpResponse(status, {name: word}, b"no")
        with pytest.raises(HsmTollError) as caught:
            read(answer, Post("server", "https://server.invalid/", {}, SECRET))
        assert not shown(SECRET, text_of(caught.value))
    if not (read is read_subject and status == 400):
        # The control: the last one was an id. A refused grant has its trace id instead.
        assert caught.value.correlation_id == ID


@pytest.mark.parametrize("read", [read_subject, read_issued])
def test_an_id_that_is_the_token_of_an_answer_that_is_not_taken_is_left_out(
    read: Callable[[HttpResponse, Post], Any],
) -> None:
    body = {"access_token": BEARER, "token_type": "Bearer", "expires_in": "soon"}
    answer = HttpResponse(200, {"x-correlationid": BEARER}, json.dumps(body).encode())
    with pytest.raises(HsmTollError) as caught:
        read(answer, Post("server", "https://server.invalid/", {}, SECRET))
    assert not shown(BEARER, text_of(caught.value))


@pytest.mark.parametrize("trace", [SECRET.replace(".", "-"), ID])
def test_a_trace_id_that_repeats_what_was_posted_is_left_out(trace: str) -> None:
    secret = SECRET.replace(".", "-")
    body = json.dumps({"error": "x", "error_description": f"no (trace_id: {trace})"}).encode()
    with pytest.raises(HsmTollError) as caught:
        read_subject(
            HttpResponse(400, {}, body), Post("server", "https://server.invalid/", {}, secret)
        )
    assert not shown(secret, text_of(caught.value))
    assert (caught.value.trace_id == ID) == (trace == ID)


def test_an_api_that_repeats_the_bearer_does_not_show_it() -> None:
    def error(word: str) -> HsmTollError:
        sent = httpx.Request(
            "GET", "https://api.invalid/", headers={"authorization": f"Bearer {BEARER}"}
        )
        body = {"validationErrors": [{"field": word, "error": f"Bearer {word}"}]}
        made = status_error(
            httpx.Response(400, json=body, headers={"x-correlationid": word}, request=sent),
            apis.named("road"),
            now=0.0,
        )
        assert made is not None
        return made

    assert not shown(BEARER, text_of(error(BEARER)))
    # The control.
    assert (error(ID).correlation_id, error(ID).hint) == (ID, f"{ID}: Bearer {ID}")


@pytest.fixture
def services(tmp_path: Path) -> Iterator[RawServices]:
    with RawServices(tmp_path) as running:
        yield running


def test_the_log_of_token_requests_shows_no_token_that_stands_for_an_id(
    services: RawServices, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[bytes] = []
    ids = itertools.cycle(["", ID])

    def issue(value: str) -> Callable[..., bytes]:
        def answer(connection: object, request: bytes) -> bytes:
            del connection
            asked.append(request)
            body = {"access_token": value, "token_type": "Bearer", "expires_in": 600}
            # What was posted and what is issued, both in the place of an id.
            posted = request.rpartition(b"=")[2].decode()
            echo = next(ids) or f"{posted[-60:]} {value}"
            return http_reply(body, "200 OK", f"x-correlationid: {echo}")

        return answer

    services.token, services.exchange = issue(SUBJECT), issue(BEARER)
    token_service, _ = token_service_of(services)
    with caplog.at_level("INFO", logger="hsmtoll"), TollClient(token_service) as toll:
        toll.token("road")
        ids = itertools.cycle([ID, ""])
        toll.token("road", renew=True)

    assertion = asked[0].rpartition(b"=")[2].decode()
    assert len(assertion) > 100
    for secret in (assertion, SUBJECT, BEARER):
        assert not shown(secret, caplog.text)
    # The control: an id is told.
    assert f"trace={ID}" in caplog.text


def test_a_submission_whose_answers_repeat_the_bearer_does_not_show_it(
    services: RawServices,
) -> None:
    bare = "".join(char for char in BEARER if char.isalnum())
    token_service, _ = token_service_of(services)
    services.exchange = lambda *_: http_reply(
        {"access_token": bare, "token_type": "Bearer", "expires_in": 600}
    )
    message = {"documentIssueDate": "2026-05-04T10:00:00Z"}

    def answer(request_id: str, word: str) -> Callable[..., bytes]:
        failed = {
            "status": "FAILURE",
            "validationErrorList": [{"field": word, "description": word}],
        }
        return lambda _, asked: http_reply(
            {"requestId": request_id} if asked.startswith(b"POST") else failed, "202 Accepted"
        )

    with TollClient(token_service) as toll:
        services.api = answer(bare, ID)
        with pytest.raises(OutcomeUnknown) as unknown:
            toll.submit("road", "POST", "transport", json=message)
        services.api = answer(ID, bare)
        with pytest.raises(SubmissionFailed) as failed:
            toll.submit("road", "POST", "transport", json=message)
        # The control.
        services.api = answer(ID, "weight")
        with pytest.raises(SubmissionFailed) as fine:
            toll.submit("road", "POST", "transport", json=message)

    for error in (unknown.value, failed.value):
        assert not shown(bare, text_of(error))
    assert fine.value.errors == ("weight: weight",)
