"""
The process of the device signs grants that the policy file allows, whatever the daemon asks: what
follows speaks to it as somebody would who has taken over the daemon's end of its pipe.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import pytest

from hsmtoll import apis, jws
from hsmtoll.errors import DeviceError, PolicyDenied
from hsmtoll.hsm.pool import WorkerDevice
from hsmtoll.jws import SigningInput
from hsmtoll.signing.grant import Grant, read_grant
from tests.kit.signing_host import ME, ROAD_SCOPE, RunningHost, entry

if TYPE_CHECKING:
    from tests.kit.signing_host import RunningService

AIR_SCOPE: Final = apis.scope_of("air", "eseal")


class Taken:
    """The daemon's end of the pipe, and a grant that the policy allows."""

    def __init__(self, service: RunningService) -> None:
        profile = service.profile()
        (device,) = profile.app.devices
        assert isinstance(device, WorkerDevice)
        self.device = device
        signed = profile.app.signer.sign(profile.app.token_service.request(ROAD_SCOPE), jti="first")
        header, claims = jws.read_unverified(signed.assertion)
        self.header, self.claims = header, claims

    def ask(self, unsigned: bytes, alg: str = "RS256") -> bytes:
        return self.device.sign(alg, SigningInput(unsigned)).value

    def refused(self, unsigned: bytes, alg: str = "RS256") -> str:
        with pytest.raises(PolicyDenied) as caught:
            self.ask(unsigned, alg)
        assert caught.value.code == "not-allowed"
        return str(caught.value)

    def grant(self, **claims: Any) -> bytes:
        """A grant of now, with other *claims*; ``None`` leaves one out."""
        now = int(time.time())
        whole = self.claims | {"iat": now, "exp": now + 120, "jti": "another"} | claims
        return jws.signing_input(self.header, {k: v for k, v in whole.items() if v is not None})


@pytest.fixture
def taken(service: RunningService) -> Taken:
    return Taken(service)


def test_what_is_no_grant_is_not_signed(taken: Taken) -> None:
    assert taken.ask(taken.grant())
    plain = taken.grant()
    head, _, body = plain.partition(b".")
    for unsigned in (
        b"pay 1000 EUR",
        b".",
        b"\x30\x82\x01\x00",
        b"e30.e30",
        plain + b".",
        plain + b"\n",
        head + b"." + jws.segment({"scope": ROAD_SCOPE}),
        jws.segment(taken.header | {"typ": "JWT"}) + b"." + body,
        jws.segment({"alg": "none"}) + b"." + body,
        jws.segment({"alg": "RS256", "x5c": ["AAAA"]}) + b"." + body,
        jws.segment({"alg": "RS256", "kid": "somebody"}) + b"." + body,
    ):
        assert taken.refused(unsigned), unsigned
    # Two readers could take it for different things.
    twice = jws.segment(taken.claims).replace(b"=", b"")
    assert taken.refused(head + b"." + twice + b"AA")
    assert taken.refused(plain, alg="RS512")
    assert taken.ask(taken.grant())


def test_nor_is_a_grant_of_another_audience_issuer_scope_or_time(taken: Taken) -> None:
    now = int(time.time())
    for claims, word in (
        ({"aud": "https://example.org/"}, "aud"),
        ({"scope": AIR_SCOPE}, "no caller"),
        ({"scope": f"{ROAD_SCOPE} {AIR_SCOPE}"}, "no caller"),
        ({"consumer_org": "987654321"}, "no caller"),
        ({"resource": ["https://example.org"]}, "no caller"),
        ({"iat": now, "exp": now + 121}, "not those of a grant"),
        ({"iat": now - 3600, "exp": now - 3480}, "iat"),
        ({"iat": now + 3600, "exp": now + 3720}, "iat"),
        ({"sub": "somebody"}, "not those of a grant"),
        ({"jti": None}, "missing"),
        ({"jti": ""}, "missing"),
        ({"iat": str(now)}, "missing"),
        ({"exp": None}, "not those of a grant"),
    ):
        message = taken.refused(taken.grant(**claims))
        assert word in message, (claims, message)
    assert taken.ask(taken.grant())


def test_what_it_may_sign_follows_the_policy_file_and_nothing_that_the_daemon_says(
    taken: Taken, host: RunningHost
) -> None:
    air = taken.grant(scope=AIR_SCOPE)
    taken.refused(air)
    host.write_policy(entry(ME, scopes=["air"]))
    assert taken.ask(air)
    assert "no caller" in taken.refused(taken.grant())
    # What cannot be used changes nothing.
    host.policy.write_text("[[", encoding="utf-8")
    assert taken.ask(air)
    host.write_policy(entry(ME))
    host.policy.chmod(0o666)
    assert taken.ask(air)
    taken.refused(taken.grant())
    host.policy.chmod(0o644)
    assert taken.ask(taken.grant())
    taken.refused(air)


def test_nor_does_it_answer_what_signing_grants_does_not_need(taken: Taken) -> None:
    public = taken.device.key().public
    assert public is not None
    pair = {"bits": 2048, "label": "another", "key_id": None, "always_authenticate": False}
    asked: dict[str, dict[str, Any]] = {
        "sign_request": {"alg": "RS256", "info": b"\x30\x00", "public": public},
        "generate": pair,
        "store": {"certificates": (), "hint": ""},
        "private_keys": {},
        "inspect": {},
        "token_users": {},
    }
    for do, arguments in asked.items():
        with pytest.raises(DeviceError) as caught:
            taken.device._ask("asking", do, **arguments)
        assert (caught.value.code, "does not answer" in str(caught.value)) == ("worker", True), do
    # The control: what it needs is answered.
    assert taken.device.self_test("RS256") == public
    assert taken.ask(taken.grant())


def test_a_grant_is_read_back_as_it_was_made(taken: Taken) -> None:
    read = read_grant("RS256", taken.grant())
    assert (read.grant.request.scope, read.jti) == (ROAD_SCOPE, "another")
    again = replace(read.grant).unsigned(now=read.iat, jti=read.jti)
    assert again == taken.grant(iat=read.iat, exp=read.iat + 120)
    assert isinstance(read.grant, Grant)
