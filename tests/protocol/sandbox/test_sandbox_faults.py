"""Every network fault by name, seen from outside, and the admin endpoint that sets them."""

from __future__ import annotations

import threading
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from hsmtoll.sandbox.faults import NAMES
from tests.kit.sandbox_requests import Wire, wire

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def sandbox_shared() -> Iterator[Wire]:
    with wire() as found:
        yield found


@pytest.fixture
def sandbox_faulty(sandbox_shared: Wire) -> Iterator[Wire]:
    yield sandbox_shared
    sandbox_shared.sandbox.clear_faults()
    assert sandbox_shared.grant().status_code == 200


@pytest.mark.parametrize(
    ("name", "status", "kind"),
    [
        ("html", 200, "text/html"),
        ("429", 429, None),
        ("429-retry-after", 429, None),
        ("500", 500, "application/json"),
        ("502", 502, "text/html"),
        ("503", 503, "text/html"),
        ("401", 401, None),
        ("redirect", 302, None),
    ],
)
def test_a_fault_strikes_as_often_as_told(
    sandbox_faulty: Wire, name: str, status: int, kind: str | None
) -> None:
    sandbox_faulty.sandbox.fault(name, "token", times=1)
    answer = sandbox_faulty.grant()
    assert answer.status_code == status
    assert kind is None or kind in answer.headers["content-type"]
    assert ("retry-after" in answer.headers) == (name == "429-retry-after")
    assert sandbox_faulty.sandbox.received[-1].fault == name
    assert sandbox_faulty.grant().status_code == 200


@pytest.mark.parametrize("name", ["reset", "reset-after", "truncated"])
def test_a_broken_line_is_an_error_of_transport(sandbox_faulty: Wire, name: str) -> None:
    sandbox_faulty.sandbox.fault(name, "token", times=1)
    with pytest.raises(httpx.TransportError):
        sandbox_faulty.grant()
    assert sandbox_faulty.sandbox.received[-1].fault == name


def test_refuse_closes_one_host_and_not_the_other(sandbox_faulty: Wire) -> None:
    token = sandbox_faulty.bearer()
    sandbox_faulty.sandbox.fault("refuse", "token")
    with pytest.raises(httpx.ConnectError):
        sandbox_faulty.grant()
    path = "/api/movement/road/v2/test-auth"
    assert sandbox_faulty.call("GET", path, token).status_code == 200


@pytest.mark.parametrize("name", ["slow", "drip"])
def test_a_late_answer_is_whole(sandbox_faulty: Wire, name: str) -> None:
    sandbox_faulty.sandbox.fault(name, "token", times=1, seconds=0.0001)
    assert sandbox_faulty.grant().json()["token_type"] == "Bearer"


def test_an_endless_body_outlasts_a_mebibyte(sandbox_faulty: Wire) -> None:
    sandbox_faulty.sandbox.fault("endless", "jwk", times=1)
    seen = 0
    with sandbox_faulty.http.stream("GET", f"{sandbox_faulty.sandbox.issuer}jwk") as answer:
        for chunk in answer.iter_raw():
            seen += len(chunk)
            if seen > 2**20:
                break
    assert seen > 2**20


def test_values_can_be_wrong(sandbox_faulty: Wire) -> None:
    wrong: list[Any] = ["600", 600.5, None, True, -1, 0, 10**9, [], {}]
    for value in wrong:
        sandbox_faulty.sandbox.fault("expires-in", "token", times=1, value=value)
        assert sandbox_faulty.grant().json()["expires_in"] == value
    sandbox_faulty.sandbox.fault("newline-token", "token", times=1)
    assert "\n" in sandbox_faulty.grant().json()["access_token"]
    sandbox_faulty.sandbox.fault("echo", "token", times=1)
    assert "assertion=eyJ" in sandbox_faulty.grant().json()["error_description"]


def test_a_wrong_clock_shows_in_date_and_in_judgement(sandbox_faulty: Wire) -> None:
    sandbox_faulty.sandbox.fault("clock", "token", seconds=-100)
    answer = sandbox_faulty.grant()
    assert answer.status_code == 400
    assert "future" in answer.json()["error_description"]
    assert parsedate_to_datetime(answer.headers["date"]).timestamp() < time.time() - 50


def test_a_rotated_key_is_published_beside_the_old_one(sandbox_faulty: Wire) -> None:
    before = sandbox_faulty.grant().json()["access_token"]
    sandbox_faulty.sandbox.fault("rotate-keys", "token", times=1)
    after = sandbox_faulty.grant().json()["access_token"]
    assert before.split(".")[0] != after.split(".")[0]
    assert sandbox_faulty.exchange(before).status_code == 200
    assert sandbox_faulty.exchange(after).status_code == 200


def test_a_token_can_die_in_mid_life(sandbox_faulty: Wire) -> None:
    token, path = sandbox_faulty.bearer(), "/api/movement/road/v2/test-auth"
    assert sandbox_faulty.call("GET", path, token).status_code == 200
    sandbox_faulty.sandbox.fault("401", "api", times=1)
    assert sandbox_faulty.call("GET", path, token).status_code == 401
    assert sandbox_faulty.call("GET", path, token).status_code == 401
    assert sandbox_faulty.call("GET", path, sandbox_faulty.bearer()).status_code == 200


def test_held_requests_go_on_together(sandbox_faulty: Wire) -> None:
    sandbox_faulty.sandbox.fault("hold", "token", times=2, callers=2)
    answers: list[int] = []
    first = threading.Thread(target=lambda: answers.append(sandbox_faulty.grant().status_code))
    first.start()
    first.join(0.2)
    assert not answers
    answers.append(sandbox_faulty.grant().status_code)
    first.join()
    assert answers == [200, 200]


def test_the_admin_endpoint_sets_tells_and_clears(sandbox_faulty: Wire) -> None:
    box, http = sandbox_faulty.sandbox, sandbox_faulty.http
    headers = {"Authorization": f"Bearer {box.admin_secret}"}
    assert http.get(f"{box.admin}/faults").status_code == 401
    body = {"name": "503", "endpoint": "token", "times": 1}
    assert http.post(f"{box.admin}/faults", json=body, headers=headers).status_code == 201
    assert sandbox_faulty.grant().status_code == 503
    bad = http.post(f"{box.admin}/faults", json={"name": "flood"}, headers=headers)
    assert bad.status_code == 400
    assert "drip" in bad.json()["error"]
    sandbox_faulty.grant()
    seen = http.get(f"{box.admin}/received", headers=headers).json()
    assert seen[-1]["claims"]["scope"] == "toll:eu/movement/road/v2"
    assert set(http.get(f"{box.admin}/faults", headers=headers).json()["known"]) == set(NAMES)
    assert "M54" in http.get(f"{box.admin}/rules", headers=headers).json()
    assert http.delete(f"{box.admin}/faults", headers=headers).status_code == 200
