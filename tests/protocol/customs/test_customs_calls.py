"""Submissions, uploads, the routing feed: each ends in an answer, or says that nobody knows."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from hsmtoll import (
    ApiRefused,
    HsmTollError,
    NetworkError,
    OutcomeUnknown,
    SubmissionFailed,
    TollClient,
    TryAgainLater,
    UsageError,
)
from hsmtoll.apis import named
from hsmtoll.app import App
from hsmtoll.customs.errors import status_error
from hsmtoll.customs.routing import Marker, routing
from hsmtoll.customs.submissions import LEVELS
from hsmtoll.settings import load
from hsmtoll.transport import HttpClient
from tests.kit.customs_messages import message, presentation

if TYPE_CHECKING:
    from pathlib import Path

    from hsmtoll.sandbox.server import Sandbox
    from hsmtoll.settings import Settings
    from hsmtoll.testing.clock import SettableClock

MODES = ("road", "air", "rail", "maritime")
ORG = "NTRSE-5566778899"


@pytest.fixture
def toll(toll_clock: SettableClock, toll_client: TollClient) -> TollClient:
    """A client whose waiting costs no time."""
    del toll_clock
    return toll_client


@pytest.mark.parametrize("level", ["transport", "master-consignment", "house-consignment"])
@pytest.mark.parametrize("api", MODES)
def test_what_is_submitted_gets_an_mrn_and_can_be_changed_and_deleted_by_it(
    toll: TollClient, api: str, level: str
) -> None:
    first = message(level)
    done = toll.submit(api, "POST", level, json=first)

    assert done.mrn is not None
    assert len(done.mrn) == 18
    changed = toll.submit(api, "PUT", level, json={**first, "extra": "x"}, mrn=done.mrn)
    assert changed.mrn == done.mrn
    assert changed.request_id != done.request_id
    toll.submit(api, "DELETE", level, json=message("any"), mrn=done.mrn)

    with pytest.raises(ApiRefused) as caught:
        toll.submit(api, "DELETE", level, json=message("any"), mrn=done.mrn)
    assert caught.value.code == "http-404"


@pytest.mark.parametrize("api", MODES)
def test_a_relation_gets_an_mrn_and_is_deleted_by_it(toll: TollClient, api: str) -> None:
    mrn = toll.submit(api, "POST", "relation", json=message("relation")).mrn
    assert toll.submit(api, "DELETE", "relation", json=message("any"), mrn=mrn).request_id
    with pytest.raises(ApiRefused) as gone:
        toll.submit(api, "DELETE", "relation", json=message("any"), mrn=mrn)
    assert gone.value.code == "http-404"

    # The guide says that the MRN is submitted, and not where: in the message it is taken as well.
    again = toll.submit(api, "POST", "relation", json=message("relation")).mrn
    assert toll.submit(api, "DELETE", "relation", json=message("any", mrn=again)).request_id
    with pytest.raises(UsageError, match="MRN"):
        toll.submit(api, "DELETE", "relation", json=message("any"))
    with pytest.raises(ApiRefused):
        toll.submit(api, "POST", "relation", json={**message("relation"), "childObjectType": "X"})


@pytest.mark.parametrize("level", LEVELS["presentation"])
def test_a_presentation_has_the_request_id_that_the_client_chose(
    toll: TollClient, level: str
) -> None:
    given = presentation(level)
    assert toll.submit("presentation", "POST", level, json=given).request_id == given["requestId"]

    with pytest.raises(ApiRefused):
        toll.submit("presentation", "POST", level, json=given)


def test_a_presentation_without_a_request_id_is_not_sent(
    toll: TollClient, toll_sandbox: Sandbox
) -> None:
    with pytest.raises(UsageError, match="requestId"):
        toll.submit("presentation", "POST", "container", json={})

    assert toll_sandbox.received == []


def test_errors_in_the_message_are_told_field_by_field(toll: TollClient) -> None:
    with pytest.raises(ApiRefused) as caught:
        toll.submit("road", "POST", "transport", json={"declarant": {}})

    lines = (caught.value.hint or "").splitlines()
    page = "https://toll.github.io/api/mo/sentrale-dataelementer-EN.html"
    assert f"documentIssueDate: must not be null (see {page})" in lines
    assert caught.value.correlation_id
    assert caught.value.exit_code == 71


def test_a_failure_found_later_is_told_with_its_reasons(toll: TollClient) -> None:
    given = message("house-consignment", consignee={"country": "XX"})
    with pytest.raises(SubmissionFailed) as caught:
        toll.submit("road", "POST", "house-consignment", json=given)

    (error,) = caught.value.errors
    assert error.startswith("consignee.country: Country is invalid (see https://toll.github.io/")
    assert caught.value.exit_code == 72


def test_the_request_id_is_told_before_the_first_question(
    toll: TollClient, toll_sandbox: Sandbox
) -> None:
    reported: list[tuple[str, int]] = []

    def accepted(request_id: str) -> None:
        calls = [each for each in toll_sandbox.received if each.kind == "call"]
        reported.append((request_id, len(calls)))

    done = toll.submit("road", "POST", "transport", json=message("transport"), accepted=accepted)

    assert reported == [(done.request_id, 1)]


@pytest.mark.parametrize("fault", ["reset", "reset-after", "500", "502", "503"])
def test_a_submission_without_an_answer_is_never_repeated(
    toll: TollClient, toll_sandbox: Sandbox, fault: str
) -> None:
    toll.token("road")
    toll_sandbox.fault(fault, "api", times=1)
    with pytest.raises(OutcomeUnknown) as caught:
        toll.submit("road", "POST", "transport", json=message("transport"))

    calls = [each for each in toll_sandbox.received if each.kind == "call"]
    assert [each.method for each in calls] == ["POST"]
    assert caught.value.exit_code == 73
    assert "do not send it again" in (caught.value.hint or "")


def test_a_connection_that_was_never_made_is_safe_to_try_again(
    toll: TollClient, toll_sandbox: Sandbox
) -> None:
    toll.token("road")
    toll_sandbox.fault("refuse", "api")
    with pytest.raises(NetworkError) as caught:
        toll.submit("road", "POST", "transport", json=message("transport"))

    assert caught.value.retryable
    toll_sandbox.clear_faults()
    assert toll.submit("road", "POST", "transport", json=message("transport")).mrn


@pytest.mark.parametrize("fault", ["reset", "500", "502", "503", "429", "html", "truncated"])
def test_trouble_while_asking_for_the_result_passes(
    toll: TollClient, toll_sandbox: Sandbox, fault: str
) -> None:
    query = "/api/movement/road/status/v2"
    toll_sandbox.fault(fault, query, times=3)

    assert toll.submit("road", "POST", "transport", json=message("transport")).mrn


def test_a_result_that_does_not_come_is_unknown_and_never_failed(
    toll: TollClient, toll_sandbox: Sandbox
) -> None:
    toll_sandbox.fault("503", "/api/movement/road/status/v2")
    with pytest.raises(OutcomeUnknown) as caught:
        toll.submit("road", "POST", "transport", json=message("transport"), timeout=30)

    (request_id,) = toll_sandbox.state.submissions
    assert request_id in str(caught.value)


def test_too_many_calls_is_try_again_later(toll: TollClient, toll_sandbox: Sandbox) -> None:
    toll_sandbox.fault("429-retry-after", "api", times=1, seconds=7)
    with pytest.raises(TryAgainLater) as caught:
        toll.submit("road", "POST", "transport", json=message("transport"))

    assert caught.value.retry_after == 7


@pytest.mark.parametrize(
    "asked",
    [
        ("document", "POST", "transport", None),
        ("road-query", "POST", "transport", None),
        ("road", "POST", "container", None),
        ("road", "PATCH", "transport", None),
        ("road", "PUT", "transport", None),
        ("road", "PUT", "transport", "not-an-mrn"),
        ("road", "POST", "transport", "26NO4TU2HUD59UCBT8"),
        ("road", "PUT", "relation", None),
        ("presentation", "DELETE", "container", None),
        ("declaration-feed", "POST", "transport", None),
        ("rode", "POST", "transport", None),
    ],
)
def test_what_cannot_be_submitted_is_told_before_a_byte_is_sent(
    toll: TollClient, toll_sandbox: Sandbox, asked: tuple[str, str, str, str | None]
) -> None:
    api, method, level, mrn = asked
    with pytest.raises(UsageError):
        toll.submit(api, method, level, json=message("transport"), mrn=mrn)

    assert toll_sandbox.received == []


@pytest.mark.timeout(400)
def test_500_house_consignments_cost_one_token_and_one_signature(
    toll_settings: Settings, toll_sandbox: Sandbox
) -> None:
    del toll_settings
    # Client and services share one interpreter here, which is not what is looked at.
    patient = load(timeout=100.0, deadline=300.0)

    async def all_of_them() -> tuple[list[str | None], int]:
        async with App(patient).aclient() as client:
            done = await asyncio.gather(
                *(
                    client.submit(
                        "road",
                        "POST",
                        "house-consignment",
                        json=message("house-consignment"),
                        timeout=600,
                    )
                    for _ in range(500)
                )
            )
            return [each.mrn for each in done], client.status().signatures

    mrns, signatures = asyncio.run(all_of_them())

    assert len(set(mrns)) == 500
    kinds = [each.kind for each in toll_sandbox.received]
    assert (kinds.count("grant"), kinds.count("exchange"), signatures) == (1, 1, 1)


def test_tasks_submit_as_threads_do(toll_settings: Settings, toll_sandbox: Sandbox) -> None:
    async def several() -> list[str | None]:
        async with App(toll_settings).aclient() as client:
            done = await asyncio.gather(
                *(
                    client.submit(
                        "road", "POST", "transport", json=message("transport"), timeout=20
                    )
                    for _ in range(5)
                )
            )
            with pytest.raises(ApiRefused):
                await client.submit("road", "POST", "transport", json={})
            return [each.mrn for each in done]

    mrns = asyncio.run(several())

    assert len(set(mrns)) == 5
    assert len([each for each in toll_sandbox.received if each.kind == "grant"]) == 1


_KILLED = """
import json, os, sys
import hsmtoll

def accepted(request_id):
    print(request_id, flush=True)
    sys.stdin.read()            # here the process is killed

with hsmtoll.connect() as toll:
    message = json.loads(os.environ["MESSAGE"])
    toll.submit("road", "POST", "transport", json=message, accepted=accepted)
"""


def test_a_process_killed_between_sending_and_answer_has_told_its_request_id(
    toll_settings: Settings, toll: TollClient, toll_sandbox: Sandbox
) -> None:
    del toll_settings
    environment = {**os.environ, "MESSAGE": json.dumps(message("transport"))}
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        request_id = child.stdout.readline().strip()
        child.send_signal(signal.SIGKILL)

    # What was told is enough to look the submission up, and it was sent once.
    toll_sandbox.state.submissions[request_id].ready_at = 0
    path = f"/api/movement/road/status/v2/transport/validation-status/{request_id}"
    assert toll.call("GET", path).json()["status"] == "SUCCESS"
    sent = [e for e in toll_sandbox.received if e.kind == "call" and e.method == "POST"]
    assert len(sent) == 1


def test_a_process_killed_before_the_answer_has_sent_once(
    toll_settings: Settings, toll_sandbox: Sandbox
) -> None:
    del toll_settings
    toll_sandbox.fault("slow", "/api/movement/road/v2", seconds=8)
    environment = {**os.environ, "MESSAGE": json.dumps(message("transport"))}
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED], env=environment, stdin=subprocess.PIPE
    ) as child:
        until = time.monotonic() + 30
        while not toll_sandbox.faults.active()[0].seen and time.monotonic() < until:
            time.sleep(0.05)
        child.send_signal(signal.SIGKILL)

    assert child.returncode == -signal.SIGKILL
    # Nothing was told, so nothing may be repeated: there is at most the one that was sent.
    assert len(toll_sandbox.state.submissions) <= 1


@pytest.mark.parametrize(("mode", "version"), [("road", "v2"), *((m, "v1") for m in MODES[1:])])
def test_what_was_submitted_is_found_by_its_query_api(
    toll: TollClient, mode: str, version: str
) -> None:
    mrn = toll.submit(mode, "POST", "transport", json=message("transport")).mrn
    base = f"/api/movement/{mode}/status/{version}"

    assert toll.call("GET", f"{base}/transport/{mrn}/status-with-descendants").json()["mrn"] == mrn
    assert toll.call("GET", f"{base}/entry/status/{mrn}").status_code == 200
    unknown = toll.call("GET", f"{base}/transport/26NO00000000000000/status-with-descendants")
    assert unknown.status_code == 404


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (400, "http-400", ApiRefused),
        (401, "http-401", ApiRefused),
        (403, "http-403", ApiRefused),
        (404, "http-404", ApiRefused),
        (409, "http-409", ApiRefused),
        (415, "http-415", ApiRefused),
        (429, "throttled", TryAgainLater),
        (500, "server-error", NetworkError),
        (503, "server-error", NetworkError),
        (599, "server-error", NetworkError),
    ],
)
def test_every_status_has_its_class_and_its_advice(status: int, code: str, error: type) -> None:
    headers = {"x-correlationid": "c-1", "retry-after": "9"}
    exc = status_error(httpx.Response(status, headers=headers), named("road"), now=0)

    assert type(exc) is error
    assert exc is not None
    assert (exc.code, exc.correlation_id) == (code, "c-1")
    assert exc.hint
    assert status_error(httpx.Response(204), named("road"), now=0) is None


def test_a_wrong_content_type_is_a_415(toll: TollClient) -> None:
    sent = toll.call("POST", "/api/movement/road/v2/transport", content=b"{}")
    error = status_error(sent, named("road"), now=0)

    assert error is not None
    assert error.code == "http-415"


def test_tasks_upload_and_follow_the_feed_as_threads_do(
    toll_settings: Settings, toll_sandbox: Sandbox, tmp_path: Path
) -> None:
    file = tmp_path / "a.pdf"
    file.write_bytes(b"x")
    sent = [toll_sandbox.signal(ORG) for _ in range(1200)]

    async def both() -> tuple[Any, list[int]]:
        async with App(toll_settings).aclient() as client:
            done = await client.upload(DECLARATION, file, document_type="invoice")
            with pytest.raises(UsageError):
                await client.upload(DECLARATION, file, document_type="selfie")
            feed = client.routing(tmp_path / "marker")
            return done.body["documentId"], [len(batch) async for batch in feed]

    document, sizes = asyncio.run(both())

    assert document
    assert sizes == [1000, 200]
    assert (tmp_path / "marker").read_text() == sent[-1]


DECLARATION = "123456789-01092026-1"


@pytest.mark.parametrize("name", ["a.pdf", "a.JPG", "b.png", "c.txt", "d.docx", "e.xlsx"])
def test_a_document_arrives_with_its_type_and_size(
    toll: TollClient, toll_sandbox: Sandbox, tmp_path: Path, name: str
) -> None:
    file = tmp_path / name
    file.write_bytes(b"x" * 1000)
    done = toll.upload(DECLARATION, file, document_type="freight invoice")

    assert done.body["documentId"]
    assert toll_sandbox.state.uploads == [(DECLARATION, "freight invoice", name, 1000)]


@pytest.mark.parametrize(
    "asked",
    [
        ("12345678-01092026-1", "a.pdf", 1, "invoice"),
        (f"{DECLARATION}/../x", "a.pdf", 1, "invoice"),
        (DECLARATION, "a.doc", 1, "invoice"),
        (DECLARATION, "a.exe", 1, "invoice"),
        (DECLARATION, "pdf", 1, "invoice"),
        (DECLARATION, "a.pdf", 0, "invoice"),
        (DECLARATION, "a.pdf", 10_000_001, "invoice"),
        (DECLARATION, "a.pdf", 1, "Invoice"),
        (DECLARATION, "a.pdf", 1, "selfie"),
    ],
)
def test_a_document_that_would_be_refused_is_not_sent(
    toll: TollClient,
    toll_sandbox: Sandbox,
    tmp_path: Path,
    asked: tuple[str, str, int, str],
) -> None:
    declaration, name, size, kind = asked
    file = tmp_path / name
    file.write_bytes(b"x" * size)
    with pytest.raises(UsageError):
        toll.upload(declaration, file, document_type=kind)

    assert toll_sandbox.received == []


def test_the_largest_document_is_taken(toll: TollClient, tmp_path: Path) -> None:
    file = tmp_path / "large.pdf"
    file.write_bytes(b"x" * 10_000_000)

    assert toll.upload(DECLARATION, file, document_type="invoice").body["documentId"]


def test_a_document_is_sent_again_after_a_401(
    toll: TollClient, toll_sandbox: Sandbox, toll_clock: SettableClock, tmp_path: Path
) -> None:
    file = tmp_path / "a.pdf"
    file.write_bytes(b"x")
    toll.token("document")
    toll_clock.advance(40)
    toll_sandbox.fault("401", "api", times=1)

    assert toll.upload(DECLARATION, file, document_type="invoice").body["documentId"]
    assert len([e for e in toll_sandbox.received if e.kind == "grant"]) == 2


@pytest.mark.parametrize(
    ("fault", "words"), [("reset-after", "no answer came"), ("html", "the answer was a web page")]
)
def test_an_upload_without_an_answer_of_customs_is_unknown(
    toll: TollClient, toll_sandbox: Sandbox, tmp_path: Path, fault: str, words: str
) -> None:
    file = tmp_path / "a.pdf"
    file.write_bytes(b"x")
    toll_sandbox.fault(fault, "api", times=1)
    with pytest.raises(OutcomeUnknown, match=words):
        toll.upload(DECLARATION, file, document_type="invoice")

    assert len([e for e in toll_sandbox.received if e.fault == fault]) == 1
    assert len([e for e in toll_sandbox.received if e.kind == "call"]) == 1


def test_the_routing_feed_is_taken_in_batches_from_the_marker_on(
    toll: TollClient, toll_sandbox: Sandbox, tmp_path: Path
) -> None:
    sent = [toll_sandbox.signal(ORG) for _ in range(2500)]
    toll_sandbox.signal("NTRSE-0000000000")
    marker = tmp_path / "marker"

    sizes = [len(batch) for batch in toll.routing(marker)]

    assert sizes == [1000, 1000, 500]
    assert marker.read_text() == sent[-1]
    assert marker.stat().st_mode & 0o777 == 0o600
    assert list(toll.routing(marker)) == []


def test_a_batch_that_was_not_taken_comes_again(
    toll: TollClient, toll_sandbox: Sandbox, tmp_path: Path
) -> None:
    for _ in range(1500):
        toll_sandbox.signal(ORG)
    marker = tmp_path / "marker"
    # The program dies with the second batch in its hands: it never asks for a third.
    first, second = itertools.islice(toll.routing(marker), 2)

    again = next(toll.routing(marker))

    assert first[0] != second[0]
    assert again == second


@pytest.mark.parametrize(
    "fault", ["html", "truncated", "redirect", "refuse", "reset", "503", "429"]
)
def test_only_an_empty_list_is_the_end_of_the_feed(
    toll: TollClient, toll_sandbox: Sandbox, tmp_path: Path, fault: str
) -> None:
    first = toll_sandbox.signal(ORG)
    marker = tmp_path / "marker"
    assert len(list(toll.routing(marker))) == 1
    second = toll_sandbox.signal(ORG)
    toll_sandbox.fault(fault, "api")
    with pytest.raises(HsmTollError):
        list(toll.routing(marker))
    # Nothing is taken that was not seen, and all of it comes when the trouble is over.
    assert marker.read_text() == first
    toll_sandbox.clear_faults()
    ((signal,),) = toll.routing(marker)
    assert signal["routingResult"]["id"] == second


def test_tasks_hear_of_a_feed_that_is_none_as_threads_do(
    toll_sandbox: Sandbox, toll_settings: Settings, tmp_path: Path
) -> None:
    async def taken() -> None:
        async with App(toll_settings).aclient() as toll:
            async for _ in toll.routing(tmp_path / "marker"):
                pass

    toll_sandbox.signal(ORG)
    for fault in ("html", "reset"):
        toll_sandbox.fault(fault, "api")
        with pytest.raises(NetworkError):
            asyncio.run(taken())
        toll_sandbox.clear_faults()
    assert not (tmp_path / "marker").exists()


class _SayingTheSame(BaseHTTPRequestHandler):
    body = b"[]"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args: object) -> None:
        del args


@pytest.mark.parametrize(
    ("reply", "batches", "words"),
    [
        ([], 0, ""),
        ([{"routingResult": {"id": "1-a"}}], 1, "the same batch again"),
        ([{"routingResult": {"id": "1\na"}}], 0, "without routingResult.id"),
        ([{"routingResult": {"id": ""}}], 0, "without routingResult.id"),
        ([{"routingResult": None}], 0, "without routingResult.id"),
        (["signal"], 0, "without routingResult.id"),
        ({"signals": []}, 0, "no list of signals"),
    ],
)
def test_a_feed_that_makes_no_sense_ends_in_an_error_and_not_in_a_loop(
    tmp_path: Path, reply: object, batches: int, words: str
) -> None:
    handler = type("", (_SayingTheSame,), {"body": json.dumps(reply).encode()})
    taken = []
    with (
        HTTPServer(("127.0.0.1", 0), handler) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{server.server_port}") as client,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        feed = routing(
            client,
            "transport",
            Marker(tmp_path / "marker"),
            now=lambda: 0.0,
            http_client=HttpClient(),
        )
        with pytest.raises(NetworkError, match=words) if words else contextlib.nullcontext():
            taken += list(feed)
            assert not words
        server.shutdown()
    assert (tmp_path / "marker").exists() == bool(batches)


@pytest.mark.parametrize("harm", ["two lines", "not-ascii", "a-directory", "no-place"])
def test_a_marker_that_cannot_be_used_is_said_so_before_anything_is_asked(
    toll: TollClient, toll_sandbox: Sandbox, tmp_path: Path, harm: str
) -> None:
    marker = tmp_path / "marker"
    if harm == "two lines":
        marker.write_text("one\ntwo")
    elif harm == "not-ascii":
        marker.write_bytes(b"\xc3\xa9")
    elif harm == "a-directory":
        marker.mkdir()
    else:
        marker = tmp_path / "nowhere" / "marker"
    toll_sandbox.signal(ORG)
    with pytest.raises(UsageError, match=r"marker .*: it cannot be used"):
        # Where it cannot be written, that is found when the first batch has been taken.
        list(toll.routing(marker))
    # The control: beside it, it can.
    assert len(list(toll.routing(tmp_path / "other"))) == 1


def test_a_403_says_who_must_act(toll: TollClient, toll_sandbox: Sandbox) -> None:
    toll_sandbox.fault("401", "api")
    with pytest.raises(ApiRefused) as caught:
        toll.submit("road", "POST", "transport", json=message("transport"))
    assert caught.value.code == "http-401"
    toll_sandbox.clear_faults()

    # A token of another API opens nothing here.
    with toll.api("air") as air:
        response = air.get(f"{toll_sandbox.customs}/api/movement/road/v2/test-auth")
    error = status_error(response, named("road"), now=0)
    assert error is not None
    assert (error.code, error.who) == ("http-403", "customs")
    assert "digitoll@toll.no" in (error.hint or "")


def test_every_error_of_a_call_is_one_of_ours(toll: TollClient, toll_sandbox: Sandbox) -> None:
    for fault in ("html", "truncated", "redirect", "echo", "429"):
        toll_sandbox.fault(fault, "api", times=1)
        with pytest.raises(HsmTollError):
            toll.submit("road", "POST", "transport", json=message("transport"))
        toll_sandbox.clear_faults()
