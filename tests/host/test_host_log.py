"""What a signing host logs: refusals, reloads and readiness, in bounds and never with a secret."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hsmtoll.errors import HsmTollError, PolicyDenied
from hsmtoll.host.peers import Peer
from hsmtoll.host.policy import GrantRequest
from hsmtoll.settings import load
from hsmtoll.testing.clock import SettableClock
from tests.kit.signing_host import ME, PATIENCE, POLICY, PROFILE, RunningService, entry, eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.kit.signing_host import RunningHost


def events(host: RunningHost, name: str) -> list[dict[str, Any]]:
    """The JSON objects of that event. Whatever is no JSON fails the test."""
    found = [json.loads(line) for line in host.log().splitlines()]
    assert all({"time", "level", "event", "message"} <= each.keys() for each in found)
    return [each for each in found if each["event"] == name]


@pytest.fixture
def json_host(make_host: Callable[..., RunningHost]) -> RunningHost:
    host = make_host()
    host.environ["HSMTOLL_LOG"] = "json"
    return host.start()


def test_refusals_reloads_and_readiness_are_logged_as_json(json_host: RunningHost) -> None:
    eventually(lambda: events(json_host, "ready"))
    assert events(json_host, "ready")[0]["message"] == "signing host: ready"
    assert json_host.ask(scope="air").status == 403
    (refused,) = events(json_host, "refused")
    assert (refused["level"], refused["caller"], refused["profile"]) == ("warning", ME, "acme")
    assert "policy: " in refused["message"]
    json_host.reload()
    assert len(events(json_host, "policy-reloaded")) == 1
    assert len(events(json_host, "certificates-reloaded")) == 1
    json_host.say("no = [table")
    json_host.reload()
    (kept,) = events(json_host, "policy-kept")
    assert kept["level"] == "error"
    json_host.stop_file.touch()
    eventually(lambda: events(json_host, "not-ready"))
    (stopped,) = events(json_host, "not-ready")
    assert stopped["message"] == "not ready: stopped: the stop file is there"
    assert "profile" not in stopped
    json_host.stop_file.unlink()
    eventually(lambda: len(events(json_host, "ready")) == 2)
    # The control: what was granted needs no line.
    json_host.say(POLICY)
    json_host.reload()
    before = json_host.log()
    assert json_host.ask().status == 200
    assert events(json_host, "signed") == []
    assert json_host.log().startswith(before)

    json_host.faults.set("token-removed")
    assert json_host.ask().status == 503
    eventually(lambda: len(events(json_host, "not-ready")) == 2)
    assert events(json_host, "not-ready")[1]["profile"] == "acme"


def test_text_is_as_before_and_without_v_refusals_and_reloads_are_in_it(
    make_host: Callable[..., RunningHost],
) -> None:
    host = make_host().start()
    assert host.ask(scope="air").status == 403
    host.reload()
    eventually(lambda: "hsmtoll: signing host: ready\n" in host.log())
    assert f"hsmtoll: warning: refused: caller {ME}, profile acme, scope " in host.log()
    assert "hsmtoll: info: policy reloaded: " in host.log()


def test_what_a_caller_writes_cannot_forge_a_line(json_host: RunningHost) -> None:
    forged = '", "event": "ready"}\n{"event": "forged"}\nhsmtoll: error: forged\u2028\u202e'
    statuses = [
        json_host.ask(**members).status
        for text in (forged, '", "event": "forged', "\ud800")
        for members in ({"scope": text}, {"profile": text}, {"resource": [text]})
    ]
    assert set(statuses) <= {400, 403}
    assert events(json_host, "forged") == []
    assert all(line.isprintable() and line.isascii() for line in json_host.log().splitlines())
    assert len(events(json_host, "refused")) == statuses.count(403) > 0


_UNSYNCHRONISED = """
import hsmtoll.host.system
hsmtoll.host.system.clock_is_synchronised = lambda: False
from hsmtoll.cli import run
run(["serve"])
"""


def test_a_host_whose_clock_is_not_synchronised_says_so(
    make_host: Callable[..., RunningHost],
) -> None:
    host = make_host()
    host.say("\n".join([PROFILE.replace("sandbox", "test"), entry(ME)]))
    removed = (
        "HSMTOLL_ENDPOINTS__ISSUER",
        "HSMTOLL_ENDPOINTS__TOKEN",
        "HSMTOLL_ENDPOINTS__CUSTOMS",
    )
    environ = {
        name: value for name, value in host.environ.items()
        if name not in {*removed, "HSMTOLL_ENVIRONMENT"}
    }  # fmt: skip
    with (
        host.stderr.open("wb") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", _UNSYNCHRONISED], env=environ, stderr=stderr
        ) as one,
    ):
        try:
            eventually(lambda: "not ready: profile acme: the clock is not" in host.log())
        finally:
            one.send_signal(signal.SIGTERM)
            one.wait(PATIENCE)
    assert host.log().count("not ready: ") == 1


def test_refusals_of_an_account_are_logged_60_a_minute_and_the_rest_is_counted(
    host: RunningHost, caplog: pytest.LogCaptureFixture
) -> None:
    assert host.policy.exists()
    clock = SettableClock.at_real_time()
    one = RunningService(load(), clock=clock)
    try:
        authorizer = one.parts.authorizer
        denied = PolicyDenied("not allowed", code="policy")
        caplog.set_level(logging.WARNING, "hsmtoll.host")

        def logged(word: str) -> int:
            return sum(word in each.getMessage() for each in caplog.records)

        for _ in range(100):
            authorizer.refuse(denied, "uid:1")
        authorizer.refuse(denied, "uid:2")
        assert (logged("caller uid:1: policy"), logged("caller uid:2: policy")) == (60, 1)
        clock.advance(59)
        authorizer.log_left_out()
        assert logged("left out") == 0
        clock.advance(1)
        for _ in range(2):
            authorizer.log_left_out()
        assert logged("caller uid:1: 40 more within a minute") == 1
        assert logged("left out") == 1
        authorizer.refuse(denied, "uid:1")
        assert logged("caller uid:1: policy") == 61
        # The next record of the audit has the number as well, once.
        counted = [e for e in host.records("refused") if "40 earlier ones were not" in e["outcome"]]
        assert len(counted) == 1
        authorizer.log_left_out()
        assert logged("left out") == 1
    finally:
        one.close()


def test_with_vv_each_signature_has_its_jti_and_no_line_a_secret(
    service: RunningService, host: RunningHost, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "hsmtoll")
    peer = Peer(frozenset({ME}))
    request = GrantRequest("acme", "road")
    granted = service.grant(peer, request, gone=lambda: False).result(PATIENCE)
    token = service.token(peer, request, gone=lambda: False).result(PATIENCE)["access_token"]
    host.faults.set("wrong-signature")
    with pytest.raises(HsmTollError):
        service.grant(peer, request, gone=lambda: False).result(PATIENCE)

    def of(event: str, member: str) -> set[object]:
        """What the records of *event* have as *member*."""
        found = [vars(each) for each in caplog.records]
        return {each.get(member) for each in found if each.get("event") == event}

    assert granted["jti"] in of("signed", "jti")
    assert of("not-signed", "profile") == of("signed", "profile") == {"acme"}
    # One request to Maskinporten and one to Customs; Customs' has no jti.
    assert len(of("token-request", "jti")) == 2
    shown = "\n".join(f"{each.msg} {each.args}" for each in caplog.records)
    pin = Path(host.environ["HSMTOLL_HSM__PIN_FILE"]).read_text().strip()
    assert not [secret for secret in (granted["assertion"], token, pin, "eyJ") if secret in shown]
