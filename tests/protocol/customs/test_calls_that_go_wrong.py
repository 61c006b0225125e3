"""However an API answers, a call ends in time, within its size, and in an error of ours."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from hsmtoll import (
    ApiRefused,
    AsyncTollClient,
    NetworkError,
    OutcomeUnknown,
    TollClient,
    apis,
)
from hsmtoll.customs.conversation import Wait
from hsmtoll.customs.errors import check
from hsmtoll.customs.submissions import submission
from hsmtoll.transport import CONNECTIONS
from tests.kit import commands
from tests.kit.raw_services import CALL, RawServices, dripping, http_reply
from tests.kit.soft_client import token_service_of

if TYPE_CHECKING:
    import ssl
    import subprocess
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hsmtoll.tokens.token_service import TokenService

SUBMIT = "/api/movement/road/v2/transport"


@pytest.fixture
def services(tmp_path: Path) -> Iterator[RawServices]:
    with RawServices(tmp_path) as running:
        yield running


def called(
    token_service: TokenService, colour: str, *asked: tuple[str, str], **request: Any
) -> httpx.Response:
    """The last answer to the calls, which are made one after the other by one client."""
    if colour == "threads":
        with TollClient(token_service) as toll:
            return [toll.call(*each, **request) for each in asked][-1]

    async def tasks() -> httpx.Response:
        async with AsyncTollClient(token_service) as toll:
            return [await toll.call(*each, **request) for each in asked][-1]

    return asyncio.run(tasks())


def silent(connection: ssl.SSLSocket, asked: bytes) -> None:
    del asked
    connection.settimeout(20)
    connection.recv(1)


LOST: dict[str, Callable[..., bytes | None]] = {
    "the end": lambda *_: None,
    "silence": silent,
    "garbage": lambda *_: b"garbage\r\n\r\n",
    "half": lambda *_: http_reply(b"x" * 100)[:-50],
    "broken packing": lambda *_: http_reply(b"no gzip at all", "200 OK", "content-encoding: gzip"),
}


def lost_then_closed(how: Callable[..., bytes | None]) -> Callable[..., bytes | None]:
    def answer(connection: ssl.SSLSocket, asked: bytes) -> bytes | None:
        if (raw := how(connection, asked)) is not None:
            connection.sendall(raw)
        return None

    return answer


@pytest.mark.parametrize("colour", ["threads", "tasks"])
@pytest.mark.parametrize("how", list(LOST))
def test_an_answer_that_is_lost_may_be_asked_for_again_or_is_unknown(
    services: RawServices, how: str, colour: str
) -> None:
    token_service, _ = token_service_of(services, timeout=1.0)
    services.api = lost_then_closed(LOST[how])
    slow = how == "silence"
    for method in ("GET",) if slow else ("GET", "HEAD", "OPTIONS"):
        # What has no body loses none.
        if method == "HEAD" and how in ("half", "broken packing"):
            continue
        with pytest.raises(NetworkError) as asked:
            called(token_service, colour, (method, CALL))
        assert asked.value.retryable
    for method in ("POST",) if slow else ("POST", "PUT", "PATCH", "DELETE", "post"):
        with pytest.raises(OutcomeUnknown) as sent:
            called(token_service, colour, (method, SUBMIT), content=b"{}")
        assert "do not send it again" in (sent.value.hint or "")
    # The control: the same calls have answers.
    services.api = lambda *_: http_reply(b"{}")
    assert called(token_service, colour, ("GET", CALL), ("POST", SUBMIT)).json() == {}


@pytest.mark.parametrize("colour", ["threads", "tasks"])
def test_what_was_certainly_not_sent_may_be_sent_again(services: RawServices, colour: str) -> None:
    token_service, _ = token_service_of(services)
    TollClient(token_service).token("road")
    services.hang_up()
    with pytest.raises(NetworkError, match="no answer came") as caught:
        called(token_service, colour, ("POST", SUBMIT), content=b"{}")
    assert "nothing was sent" in (caught.value.hint or "")


@pytest.mark.parametrize(("method", "code"), [("GET", 80), ("POST", 73)])
@pytest.mark.parametrize("how", ["the end", "500"])
def test_the_command_tells_what_became_of_a_call(
    services: RawServices, toll_settings: object, method: str, code: int, how: str
) -> None:
    del toll_settings
    services.api = LOST.get(how, lambda *_: http_reply(b"", "500 Trouble"))
    done = hsmtoll(services, "call", method, SUBMIT)
    assert done.returncode == code
    assert "mistake" not in done.stderr
    services.api = lambda *_: http_reply(b"{}")
    assert hsmtoll(services, "call", method, SUBMIT).stdout == "{}"


def hsmtoll(services: RawServices, *argv: str) -> subprocess.CompletedProcess[str]:
    return commands.hsmtoll(*argv, env={**os.environ, **services.environ()})


@pytest.mark.parametrize(
    ("status", "code"), [("200 Fine", 0), ("202 Accepted", 80), ("204 Empty", 80), ("302 F", 80)]
)
def test_only_200_is_a_success_of_the_test_call(
    services: RawServices, toll_settings: object, status: str, code: int
) -> None:
    del toll_settings
    services.api = lambda *_: http_reply(b"", status)
    done = hsmtoll(services, "test-auth", "road")
    assert done.returncode == code
    assert done.stdout == ("" if code else "200 OK\n")


def test_what_customs_calls_a_declaration_is_shown_as_foreign_words(
    services: RawServices, toll_settings: object
) -> None:
    del toll_settings
    shown = []
    for mrn in ("26NO4TU2HUD59UCBT8", "\x1b[31m26NO"):
        services.api = judging(json.dumps({"status": "SUCCESS", "mrn": mrn}).encode())
        shown.append(hsmtoll(services, "submit", "road", "POST", "transport", "{}").stdout)
    assert shown == ["SUCCESS 26NO4TU2HUD59UCBT8\n", "SUCCESS \\x1b[31m26NO\n"]


def judging(result: bytes) -> Callable[..., bytes]:
    def answer(connection: ssl.SSLSocket, asked: bytes) -> bytes:
        del connection
        return http_reply(b'{"requestId": "abc-1"}' if asked.startswith(b"POST") else result)

    return answer


@pytest.mark.parametrize("colour", ["threads", "tasks"])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    ("head", "drop"),
    [
        (b"HTTP/1.1 200 OK\r\nx-a: ", b"a"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\n\r\n", b" "),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["header", "body", "body without a length", "interim answers"],
)
def test_a_call_ends_at_the_deadline_on_a_new_connection_and_on_one_that_was_kept(
    services: RawServices, head: bytes, drop: bytes, kept: bool, colour: str
) -> None:
    token_service, _ = token_service_of(services, timeout=60.0, deadline=1.5)
    drip = dripping(head, drop)
    services.api = lambda connection, asked: (
        http_reply(b"{}") if asked.startswith(b"OPTIONS") else drip(connection, asked)
    )
    before = (("OPTIONS", CALL),) if kept else ()
    # Nothing else ends it: the server goes on for as long as the connection stands.
    with pytest.raises(NetworkError) as caught:
        called(token_service, colour, *before, ("GET", CALL))
    assert caught.value.code == "deadline"
    if kept:
        with pytest.raises(OutcomeUnknown):
            called(token_service, colour, *before, ("POST", SUBMIT))


@pytest.mark.parametrize("colour", ["threads", "tasks"])
def test_the_time_that_a_token_takes_is_not_the_calls(services: RawServices, colour: str) -> None:
    grant = services.token

    def slowly(connection: ssl.SSLSocket, asked: bytes) -> bytes | None:
        time.sleep(3.5)
        return grant(connection, asked)

    def call(connection: ssl.SSLSocket, asked: bytes) -> bytes:
        del connection, asked
        time.sleep(3.5)
        return http_reply(b"{}")

    # Each is below the deadline, both together are not.
    services.token, services.api = slowly, call
    token_service, _ = token_service_of(services, deadline=6.0)
    assert called(token_service, colour, ("GET", CALL)).status_code == 200


MIB = 1024 * 1024


@pytest.mark.parametrize("colour", ["threads", "tasks"])
@pytest.mark.parametrize("status", ["200 OK", "401 No"])
def test_an_answer_has_a_limit_packed_or_not(
    services: RawServices, status: str, colour: str
) -> None:
    token_service, _ = token_service_of(services)
    packed = gzip.compress(bytes(65 * MIB))
    twice = gzip.compress(packed)
    for raw in (
        http_reply(bytes(65 * MIB), status),
        http_reply(packed, status, "content-encoding: gzip"),
        http_reply(twice, status, "content-encoding: gzip, gzip"),
        http_reply(b"x", status, "content-encoding: br"),
    ):
        services.api = lambda *_, raw=raw: raw
        with pytest.raises(NetworkError) as caught:
            called(token_service, colour, ("GET", CALL))
        assert caught.value.code in ("answer-too-large", "answer-compressed")


@pytest.mark.parametrize("colour", ["threads", "tasks"])
def test_an_answer_below_the_limit_is_had_whole_and_unpacked(
    services: RawServices, colour: str
) -> None:
    token_service, _ = token_service_of(services)
    body = os.urandom(1000) * 12_000
    services.api = lambda *_: http_reply(gzip.compress(body), "200 OK", "content-encoding: gzip")
    answer = called(token_service, colour, ("GET", CALL))
    assert answer.content == body
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.elapsed
    assert b"accept-encoding: gzip, deflate\r\n" in services.calls[0].lower()


@pytest.mark.parametrize("colour", ["threads", "tasks"])
def test_words_that_pack_nothing_and_answers_without_a_body_are_taken(
    services: RawServices, colour: str
) -> None:
    token_service, _ = token_service_of(services)
    for word in ("utf-8", "", "identity"):
        services.api = lambda *_, word=word: http_reply(
            b"{}", "200 OK", f"content-encoding: {word}"
        )
        assert called(token_service, colour, ("POST", SUBMIT)).json() == {}
    services.api = lambda *_: http_reply(b"", "200 OK", "content-encoding: br")
    assert called(token_service, colour, ("HEAD", CALL)).status_code == 200
    # The control: a body that would be unpacked without a bound.
    with pytest.raises(OutcomeUnknown):
        called(token_service, colour, ("POST", SUBMIT))


@pytest.mark.parametrize("colour", ["threads", "tasks"])
def test_who_traces_a_call_is_told_of_it(services: RawServices, colour: str) -> None:
    token_service, _ = token_service_of(services)
    seen: list[str] = []

    async def tell(event: str, _: object) -> None:
        seen.append(event)

    trace = tell if colour == "tasks" else lambda event, _: seen.append(event)
    called(token_service, colour, ("GET", CALL), extensions={"trace": trace})
    assert "http11.send_request_headers.started" in seen
    # The control: nobody is told of a call that is not traced.
    seen.clear()
    called(token_service, colour, ("GET", CALL))
    assert not seen


def test_a_client_that_is_lent_is_the_users_own_business(services: RawServices) -> None:
    token_service, _ = token_service_of(services, deadline=3.0)
    services.api = lambda *_: http_reply(b"x" * 100)
    with TollClient(token_service) as toll:
        road = toll.api("road")
        assert not any(road.event_hooks.values())
        with road.stream("GET", "test-auth") as response:
            time.sleep(3.5)
            assert response.read() == b"x" * 100


@pytest.mark.parametrize("colour", ["threads", "tasks"])
@pytest.mark.parametrize("where", ["mailto:a", "https://xn--/", "https://good.invalid/"])
def test_a_redirect_is_an_answer_wherever_it_leads_and_nobody_goes_there(
    services: RawServices, where: str, colour: str
) -> None:
    token_service, _ = token_service_of(services)
    services.api = lambda *_: http_reply(b"", "302 Found", f"location: {where}")
    answer = called(token_service, colour, ("GET", CALL), follow_redirects=True)
    assert (answer.status_code, answer.headers["location"]) == (302, where)
    assert len(services.calls) == 1
    with pytest.raises(NetworkError) as caught:
        check(answer, apis.named("road"), now=0.0)
    assert caught.value.code == "redirect"
    # What was to be taken in went elsewhere, and was not.
    with pytest.raises(ApiRefused, match="redirect"):
        check(called(token_service, colour, ("POST", SUBMIT)), apis.named("road"), now=0.0)
    with pytest.raises(ApiRefused, match="redirect"), TollClient(token_service) as toll:
        toll.submit("road", "POST", "transport", json={})


def test_the_timeout_for_a_result_counts_what_the_questions_take() -> None:
    def asked(each: float) -> int:
        """How often it asks, where a question takes *each* seconds, before it gives up."""
        at, often = 0.0, 0
        talk = submission(apis.named("road"), "POST", "transport", {}, now=lambda: at, timeout=30.0)
        next(talk)
        response: httpx.Response | None = httpx.Response(202, json={"requestId": "a-1"})
        try:
            while True:
                step = talk.send(response)
                if isinstance(step, Wait):
                    at, response = at + step.seconds, None
                else:
                    at, often, response = at + each, often + 1, httpx.Response(404)
        except OutcomeUnknown as exc:
            assert f"no result after {at:.0f} s" in str(exc)  # noqa: PT017 - as it ends, so it says
        return often

    assert asked(0.0) == 6
    assert asked(10.0) == 3


@pytest.mark.timeout(600)
class Crowded:
    """An API that counts who is being answered at once."""

    def __init__(self, seconds: float = 0.01) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._now = 0
        self.most = 0

    def __call__(self, connection: ssl.SSLSocket, asked: bytes) -> bytes:
        del connection, asked
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(self._seconds)
        with self._lock:
            self._now -= 1
        return http_reply(b"{}")


def test_a_thousand_tasks_wait_for_their_turn_however_long(services: RawServices) -> None:
    services.api = api = Crowded(0.25)
    # A thousand on 20 connections are 50 rounds of a quarter of a second: the last of them wait
    # longer than the deadline of one call, and than the time-out, which each alone is far from.
    token_service, signer = token_service_of(services, timeout=10.0, deadline=10.0)

    async def crowd() -> list[int]:
        async with AsyncTollClient(token_service) as toll:
            answers = await asyncio.gather(*(toll.call("GET", CALL) for _ in range(1000)))
            return [each.status_code for each in answers]

    assert asyncio.run(crowd()) == [200] * 1000
    assert len(signer.signed) == 1
    # One that was idle for long may have been opened again.
    assert api.most <= CONNECTIONS


@pytest.mark.parametrize("colour", ["threads", "tasks"])
def test_a_crowd_takes_turns_on_the_connections_that_there_are(
    services: RawServices, colour: str
) -> None:
    """Queues are ours: that of the connections loses a call now and then."""
    token_service, _ = token_service_of(services)
    services.api = crowded = Crowded()
    if colour == "threads":
        with TollClient(token_service) as toll, ThreadPoolExecutor(100) as pool:
            answers = list(pool.map(lambda _: toll.call("GET", CALL).status_code, range(300)))
    else:

        async def tasks() -> list[int]:
            async with AsyncTollClient(token_service) as toll:
                calls = [toll.call("GET", CALL) for _ in range(300)]
                return [each.status_code for each in await asyncio.gather(*calls)]

        answers = asyncio.run(tasks())
    assert answers == [200] * 300
    assert 1 < crowded.most <= CONNECTIONS
    assert services.connections <= CONNECTIONS + 2
    assert len(services.grants) == 1
