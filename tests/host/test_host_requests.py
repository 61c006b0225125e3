"""Whatever is sent, it is a request or a refusal, and only a request reaches the device."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hsmtoll.host.messages import RequestRejected, parse_body
from hsmtoll.host.policy import GrantRequest
from tests.kit.accounts import OTHER, importable
from tests.kit.signing_host import ROAD, raw_request

if TYPE_CHECKING:
    from tests.kit.signing_host import RunningHost

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)
MEMBERS = st.sampled_from(["profile", "scope", "consumer_org", "resource", "claims", "iat", ""])


@given(st.binary(max_size=400) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_body_is_a_request_or_a_refusal_of_one_line(raw: bytes) -> None:
    try:
        assert isinstance(parse_body(raw), GrantRequest)
    except RequestRejected as exc:
        refused = exc
    else:
        return
    assert (refused.status, refused.code) == (400, "bad_request")
    assert "\n" not in str(refused)


@given(st.dictionaries(MEMBERS, JSON))
def test_what_is_taken_is_exactly_what_was_said(changes: dict[str, Any]) -> None:
    body = {**ROAD, **changes}
    try:
        ask = parse_body(json.dumps(body).encode())
    except RequestRejected:
        return
    members = {"profile", "scope", "consumer_org", "resource", "authorization_details"}
    assert body.keys() <= members
    assert (ask.profile, ask.scope, ask.consumer_org) == (
        body["profile"], body["scope"], body.get("consumer_org"),
    )  # fmt: skip
    resource = body.get("resource")
    listed = [resource] if isinstance(resource, str) else resource or []
    assert list(ask.resource) == listed


@pytest.mark.parametrize(
    "raw",
    [
        b'{"profile":"acme","profile":"acme","scope":"road"}',
        b'{"profile":"acme","scope":"road","iat":1}',
        b'{"profile":"acme","scope":NaN}',
        b'{"profile":"acme","scope":"ro\\u0000ad"}',
        b'{"profile":"acme"}',
        b"[" * 9000,
        b"",
        json.dumps({**ROAD, "resource": ["https://a.example"] * 17}).encode(),
        json.dumps({**ROAD, "scope": "x" * 257}).encode(),
        json.dumps({**ROAD, "consumer_org": "98765432٥"}).encode(),
        json.dumps({**ROAD, "authorization_details": [{"ID": "1"}]}).encode(),
        json.dumps({**ROAD, "authorization_details": "x"}).encode(),
    ],
)
def test_each_of_these_differs_from_a_request_in_one_thing(raw: bytes) -> None:
    with pytest.raises(RequestRejected):
        parse_body(raw)
    twin = {**ROAD, "consumer_org": None, "resource": None}
    assert parse_body(json.dumps(twin).encode()) == GrantRequest("acme", "road")


def sent(host: RunningHost, raw: bytes, *, hang_up: bool = False) -> bytes:
    """What comes back, until the host has closed the connection; *hang_up*: nothing more comes."""
    with socket.socket(socket.AF_UNIX) as one:
        one.settimeout(60)
        one.connect(str(host.socket))
        reply = bytearray()
        try:
            one.sendall(raw)
            if hang_up:
                one.shutdown(socket.SHUT_WR)
            while part := one.recv(65536):
                reply += part
        except (BrokenPipeError, ConnectionResetError):
            pass
        return bytes(reply)


def test_noise_on_the_wire_reaches_neither_device_nor_audit(running_host: RunningHost) -> None:
    before = running_host.signatures(), len(running_host.records())
    whole = raw_request()

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(whole) - 1), st.binary(min_size=1, max_size=40))
    def noise(at: int, put: bytes) -> None:
        assume(not (whole[:at] + put).startswith(whole))
        reply = sent(running_host, whole[:at] + put, hang_up=True)
        assert reply == b"" or reply.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), reply[:80]

    noise()
    assert (running_host.signatures(), len(running_host.records())) == before
    assert b"200 OK" in sent(running_host, whole)
    assert "Traceback" not in running_host.log()


def post(headers: bytes, body: bytes = b"") -> bytes:
    return (
        b"POST /v1/grant HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        + headers
        + b"\r\n\r\n"
        + body
    )


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET /live HTTP/1.1\r\nHost: a\r\n\r\n", b"404"),
        (post(b"Content-Length: 99999"), b"413"),
        (post(b"Transfer-Encoding: chunked", (b"1000\r\n" + b" " * 4096 + b"\r\n") * 5), b"413"),
        (post(b"Content-Encoding: gzip\r\nContent-Length: 2", b"{}"), b"415"),
        (post(b"X: " + b"y" * 9000), b"400"),
        (b"nonsense\r\n\r\n", b"400"),
    ],
    ids=["live", "long", "chunked", "gzip", "header", "nonsense"],
)
def test_it_is_turned_away_with_a_word(
    running_host: RunningHost, raw: bytes, status: bytes
) -> None:
    before = running_host.signatures()
    reply = sent(running_host, raw)
    assert reply.split(b" ", 2)[1] == status
    assert b"Hsmtoll-Version: 1\r\n" in reply
    assert b'"hint"' in reply
    assert running_host.signatures() == before


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (raw_request()[:-10], b""),
        (post(b"Transfer-Encoding: chunked"), b"zz\r\nfoo\r\n0\r\n\r\n"),
    ],
    ids=["hang-up", "chunk"],
)
def test_a_body_that_does_not_come_whole_is_nobodys_mistake_here(
    running_host: RunningHost, first: bytes, then: bytes
) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.settimeout(60)
        one.connect(str(running_host.socket))
        one.sendall(first)
        # Once another one was answered, the host has begun to wait for the rest of this one.
        assert running_host.ask(scope="air").status == 403
        if then:
            one.sendall(then)
            assert b"200" not in one.recv(65536)
    assert running_host.ask().status == 200
    assert "mistake" not in running_host.log()
    assert len(running_host.records("intent")) == 1


#: A second request that a body or its framing could hide.
HIDDEN = raw_request(keep=True)


@pytest.mark.parametrize(
    "raw",
    [
        # Rejected before the body was read: what is left of it is no request.
        post(b"Content-Encoding: gzip\r\nContent-Length: %d" % len(HIDDEN), HIDDEN),
        b"POST /v1/no HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
        post(b"Content-Length: %d" % len(HIDDEN), HIDDEN),
        # Two readers could see two ends (RFC 9112 section 6.3).
        post(b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"0\r\n\r\n" + HIDDEN),
        post(b"Transfer-Encoding: chunked\r\nContent-Length: 5", b"0\r\n\r\n" + HIDDEN),
        post(b"Content-Length: 0\r\nContent-Length: %d" % len(HIDDEN), HIDDEN),
        post(b"Content-Length: +0", HIDDEN),
        post(b"Transfer-Encoding: xchunked", b"0\r\n\r\n" + HIDDEN),
        post(b"Transfer-Encoding : chunked", b"0\r\n\r\n" + HIDDEN),
        post(b"X: y\r\n Content-Length: 0", HIDDEN),
    ],
)
def test_no_body_hides_a_second_request(running_host: RunningHost, raw: bytes) -> None:
    before = running_host.signatures(), len(running_host.records())
    reply = sent(running_host, raw, hang_up=True)
    assert len(re.findall(rb"HTTP/1\.[01] [0-9]{3} ", reply)) <= 1
    assert reply == b"" or reply.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), reply[:80]
    assert (running_host.signatures(), len(running_host.records())) == before


def test_two_requests_that_follow_each_other_are_two(running_host: RunningHost) -> None:
    """The control of hidden ones."""
    assert sent(running_host, HIDDEN + raw_request()).count(b"200 OK") == 2


def test_a_client_that_waits_before_it_sends_the_body_is_told_to_go_on(
    running_host: RunningHost,
) -> None:
    head, _, body = raw_request().partition(b"\r\n\r\n")
    with socket.socket(socket.AF_UNIX) as one:
        one.settimeout(60)
        one.connect(str(running_host.socket))
        one.sendall(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert one.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        one.sendall(body)
        assert one.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile": ...}, "missing member: profile"),
        ({"profile": ..., "scope": ...}, "missing member: profile, scope"),
        ({"iat": 1}, "unknown member: iat"),
        ({"profile": None}, "profile is null; a string is expected"),
        ({"scope": 7}, "scope is a number; a string is expected"),
        ({"scope": ["road"]}, "scope is an array; a string is expected"),
        ({"scope": True}, "scope is a boolean; a string is expected"),
        ({"scope": ""}, "scope is not 1 to 256 characters of printable ASCII"),
        ({"consumer_org": 987654325}, "consumer_org is a number; a string or null is expected"),
        ({"consumer_org": "98765432"}, "consumer_org is not nine digits"),
        ({"resource": {}}, "resource is an object; a string, an array or null is expected"),
        ({"resource": [1]}, "resource is a number; a string is expected"),
        (
            {"authorization_details": {"type": "a"}},
            "authorization_details is an object; an array of objects or null is expected",
        ),
    ],
)
def test_what_is_wrong_with_a_request_is_named(changes: dict[str, Any], message: str) -> None:
    members = {name: value for name, value in {**ROAD, **changes}.items() if value is not ...}
    with pytest.raises(RequestRejected) as caught:
        parse_body(json.dumps(members).encode())
    assert str(caught.value) == message


_SILENT = """
import socket, sys
from tests.kit.accounts import become
become(int(sys.argv[2]))
held = [socket.socket(socket.AF_UNIX) for _ in range(8)]
for one in held:
    one.connect(sys.argv[1])
print("here", flush=True)
sys.stdin.read()
"""


@pytest.mark.needs_root
def test_accounts_that_send_nothing_keep_no_other_out(running_host: RunningHost) -> None:
    running_host.open_to_all()
    with contextlib.ExitStack() as held:
        for number in range(8):
            argv = [sys.executable, "-c", _SILENT, str(running_host.socket), str(OTHER + number)]
            one = held.enter_context(
                subprocess.Popen(
                    argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    env=os.environ | importable(),
                )
            )  # fmt: skip
            assert one.stdout is not None
            assert one.stdout.readline() == b"here\n"
        assert running_host.ask().status == 200
