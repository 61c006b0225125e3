"""A new certificate or key takes over by itself, and steps back once if it is not taken yet."""

from __future__ import annotations

import base64
import json
import logging
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from hsmtoll.clock import Skew
from hsmtoll.errors import CertificateError, GrantRefused
from hsmtoll.hsm.device import DeviceSettings
from hsmtoll.hsm.in_process import InProcessDevice
from hsmtoll.sandbox import Sandbox
from hsmtoll.sandbox.pki import Authority, eseal_authority, pem
from hsmtoll.signing.device_chain import DeviceChain, KeyListState
from hsmtoll.signing.failover import FailoverSigner
from hsmtoll.signing.local import LocalSigner
from hsmtoll.token import TokenRequest
from hsmtoll.x509.certificate_files import Bundle
from tests.kit.own_device import Lab, MovedClock, make_lab

if TYPE_CHECKING:
    from pathlib import Path

    from hsmtoll.hsm.facts import StoredCertificate
    from hsmtoll.x509.certificate import Certificate
    from tests.softhsm.conftest import DeviceSoftHsm

DAY = timedelta(days=1)
START = datetime.now(UTC).replace(microsecond=0)
ROAD = TokenRequest("toll:eu/movement/road/v2")


class Counting(InProcessDevice):
    """A device that counts how often its certificates are read."""

    reads = 0

    def certificates(
        self, *, near: bool = False, force_login: bool = False
    ) -> tuple[StoredCertificate, ...]:
        self.reads += 1
        return super().certificates(near=near, force_login=force_login)


@pytest.fixture(scope="module")
def lab(device_softhsm: DeviceSoftHsm) -> Lab:
    made = make_lab(device_softhsm.module, device_softhsm.environment, "rollover")
    made.generate(old={}, new={})
    return made


@pytest.fixture(scope="module")
def authority() -> Authority:
    return eseal_authority()


@pytest.fixture
def clock() -> MovedClock:
    return MovedClock(START.timestamp())


class Bench:
    """Signers over the lab's keys with certificates as given."""

    def __init__(self, lab: Lab, state: Path, clock: MovedClock, authority: Authority) -> None:
        self.lab, self.state, self.clock, self.authority = lab, state, clock, authority
        self.key_list_state = KeyListState()

    def device(self, key: str) -> Counting:
        made = self.lab.app(key, self.state)
        (plain,) = made.devices
        return Counting(
            DeviceSettings(self.lab.module, plain.uri),
            pin=made.hsm.pin(plain.uri),
            pin_log=made.hsm.pin_log,
        )

    def issue(self, key: str, **options: Any) -> x509.Certificate:
        with self.device(key) as device:
            public = device.key().public
        assert public is not None
        return self.authority.issue(public.spki(), **options)

    def signer(self, key: str, *leaves: x509.Certificate, **options: Any) -> LocalSigner:
        supplied = Bundle(tuple(_ours(each) for each in (*leaves, *self.authority.chain)))
        device = options.pop("device", None) or self.device(key)
        chain = DeviceChain(
            device,
            identity="eseal",
            clock=self.clock,
            supplied=lambda: supplied,
            key_list_state=self.key_list_state,
            **options,
        )
        return LocalSigner(
            device,
            chain,
            audience="https://test.maskinporten.no/",
            clock=self.clock,
            skew=Skew(),
        )


@pytest.fixture
def bench(lab: Lab, tmp_path: Path, clock: MovedClock, authority: Authority) -> Bench:
    return Bench(lab, tmp_path, clock, authority)


def _ours(certificate: x509.Certificate) -> Certificate:
    from hsmtoll.x509.certificate import Certificate

    return Certificate.load(certificate.public_bytes(Encoding.DER))


def sent(signer: LocalSigner | FailoverSigner) -> x509.Certificate:
    """The leaf of an assertion; its key verified the signature before it left."""
    header = signer.sign(ROAD, jti="1").assertion.split(".")[0]
    first = json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))["x5c"][0]
    return x509.load_der_x509_certificate(base64.b64decode(first))


def rejected(signer: LocalSigner | FailoverSigner, code: str) -> bool:
    """What the signer says to a grant that Maskinporten rejects with *code*."""
    return signer.rejected(signer.sign(ROAD, jti="1"), code)


def test_a_new_certificate_takes_over_when_it_becomes_valid(bench: Bench) -> None:
    old = bench.issue("old", not_before=START - 300 * DAY, not_after=START + 20 * DAY)
    new = bench.issue("old", not_before=START + timedelta(seconds=30))
    signer = bench.signer("old", old, new)
    assert sent(signer) == old
    # A minute is not awaited: the moment is known from the certificate itself.
    bench.clock.move(29)
    assert sent(signer) == old
    bench.clock.move(1)
    assert sent(signer) == new
    # It stays when the old one ends, and without it the end is an end.
    bench.clock.move(21 * 86_400)
    assert sent(signer) == new
    alone = Bench(bench.lab, bench.state, bench.clock, bench.authority).signer("old", old)
    with pytest.raises(CertificateError, match="expired"):
        sent(alone)


def test_a_certificate_of_another_organisation_never_takes_over(bench: Bench) -> None:
    old = bench.issue("old", not_before=START - 300 * DAY, not_after=START + 20 * DAY)
    other = bench.issue("old", not_before=START + DAY, organization_id="NTRSE-0000000001")
    signer = bench.signer("old", old, other)
    assert sent(signer) == old
    bench.clock.move(2 * 86_400)
    assert sent(signer) == old
    bench.clock.move(20 * 86_400)
    with pytest.raises(CertificateError) as caught:
        sent(signer)
    assert caught.value.code == "certificate-orgid"


def test_a_pinned_certificate_stays(bench: Bench) -> None:
    old = bench.issue("old", not_before=START - 300 * DAY, not_after=START + 20 * DAY)
    new = bench.issue("old", not_before=START - DAY)
    assert sent(bench.signer("old", old, new)) == new
    pinned = bench.signer("old", old, new, certificate_sha256=_ours(old).sha256)
    assert sent(pinned) == old


def test_the_next_key_of_the_list_takes_over_and_the_old_one_stands_in(bench: Bench) -> None:
    old = bench.issue("old", not_before=START - 300 * DAY, not_after=START + 20 * DAY)
    new = bench.issue("new", not_before=START + DAY)
    both = FailoverSigner([bench.signer("new", new), bench.signer("old", old)])
    assert sent(both) == old
    bench.clock.move(86_400)
    assert sent(both) == new


def test_the_next_key_is_of_the_same_organisation_or_is_passed_over(bench: Bench) -> None:
    old = bench.issue("old", not_before=START - 300 * DAY)
    other = bench.issue("new", not_before=START + DAY, organization_id="NTRSE-0000000001")
    both = FailoverSigner([bench.signer("new", other), bench.signer("old", old)])
    assert sent(both) == old
    bench.clock.move(2 * 86_400)
    assert sent(both) == old


def test_a_new_certificate_that_is_refused_steps_back_once_for_its_first_day(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    old = bench.issue("old", not_before=START - 300 * DAY)
    new = bench.issue("old", not_before=START - timedelta(hours=1))
    signer = bench.signer("old", old, new)
    assert sent(signer) == new
    with caplog.at_level(logging.WARNING, "hsmtoll.signing.device_chain"):
        assert rejected(signer, "MP-120")
    assert "certificate-refused" in caplog.text
    assert sent(signer) == old
    # Once: what is said to the old one is an answer.
    assert not rejected(signer, "MP-120")
    assert sent(signer) == old
    bench.clock.move(86_400)
    assert sent(signer) == new
    assert not rejected(signer, "MP-120")
    assert sent(signer) == new


def test_a_grant_of_a_certificate_that_stepped_back_meanwhile_is_worth_another(
    bench: Bench,
) -> None:
    old = bench.issue("old", not_before=START - 300 * DAY)
    new = bench.issue("old", not_before=START - timedelta(hours=1))
    signer = bench.signer("old", old, new)
    grants = [signer.sign(ROAD, jti=jti) for jti in ("1", "2")]
    assert signer.rejected(grants[0], "MP-120")
    assert sent(signer) == old
    # Of two renewals at once the second is told later, and may use the older one as well.
    assert signer.rejected(grants[1], "MP-120")
    # The control: the older one is the last.
    assert not rejected(signer, "MP-120")


def test_without_an_older_one_there_is_nothing_to_fall_back_on(bench: Bench) -> None:
    new = bench.issue("old", not_before=START - timedelta(hours=1))
    signer = bench.signer("old", new)
    assert sent(signer) == new
    assert not rejected(signer, "MP-120")
    assert sent(signer) == new


def test_a_refused_certificate_of_a_new_key_gives_way_to_the_old_key(bench: Bench) -> None:
    old = bench.issue("old", not_before=START - 300 * DAY)
    new = bench.issue("new", not_before=START - timedelta(hours=1))
    both = FailoverSigner([bench.signer("new", new), bench.signer("old", old)])
    assert sent(both) == new
    assert rejected(both, "MP-124")
    assert sent(both) == old
    assert not rejected(both, "MP-124")
    bench.clock.move(86_400)
    assert sent(both) == new


def test_the_chain_is_proven_once_a_minute(bench: Bench) -> None:
    old = bench.issue("old", not_before=START - 300 * DAY)
    device = bench.device("old")
    signer = bench.signer("old", old, device=device)
    for _ in range(5):
        sent(signer)
    assert device.reads == 1
    bench.clock.move(61)
    sent(signer)
    assert device.reads == 2
    # Opened again, it is looked at again: another device may be in the slot.
    device.close()
    sent(signer)
    sent(signer)
    assert device.reads in (3, 4)


@pytest.mark.parametrize("older", [True, False])
def test_no_call_fails_when_maskinporten_does_not_take_the_new_certificate(
    lab: Lab, tmp_path: Path, authority: Authority, *, older: bool
) -> None:
    bench = Bench(lab, tmp_path, MovedClock(START.timestamp()), authority)
    old = bench.issue("old", not_before=START - 300 * DAY)
    new = bench.issue("old", not_before=START - timedelta(hours=1))
    path = tmp_path / "chain.pem"
    path.write_bytes(pem(*((new, old) if older else (new,)), *authority.chain))
    with Sandbox(trust=[authority], signing_bits=2048) as sandbox:
        sandbox.revoke(new)
        endpoints = {
            "issuer": sandbox.issuer,
            "token": sandbox.token_endpoint,
            "customs": sandbox.customs,
        }
        app = lab.app(
            "old", tmp_path, environment="sandbox", endpoints=endpoints, ca_file=sandbox.ca_file,
            hsm={"certificates": path},
        )  # fmt: skip
        with app.client() as client:
            if not older:
                with pytest.raises(GrantRefused, match="MP-120"):
                    client.token("road")
                return
            assert client.token("road").value
        grants = [one.status for one in sandbox.received if one.kind == "grant"]
        assert grants == [400, 200]
