"""Renewals, bundles and broken chains as they lie on devices and in files."""

from __future__ import annotations

import contextlib
import subprocess
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from pkcs11 import Attribute, ObjectClass
from pkcs11.constants import CertificateType

from hsmtoll import doctor, enrolment
from hsmtoll.errors import CertificateError, ConfigurationError
from hsmtoll.hsm.in_process import InProcessDevice
from hsmtoll.sandbox.pki import Authority, eseal_authority, norwegian_authority, pem
from tests.kit.own_device import Lab, make_lab

if TYPE_CHECKING:
    from pathlib import Path

    from cryptography import x509

    from hsmtoll.doctor.findings import Check
    from tests.softhsm.conftest import DeviceSoftHsm

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def lab(device_softhsm: DeviceSoftHsm) -> Lab:
    made = make_lab(device_softhsm.module, device_softhsm.environment, "beside")
    made.generate(acme={}, renewed={}, norsk={}, padded={})
    return made


@pytest.fixture(scope="module")
def authority() -> Authority:
    return eseal_authority()


@pytest.fixture(scope="module")
def spki(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    app = lab.app("acme", tmp_path_factory.mktemp("key"))
    public = app.devices[0].key().public
    app.close()
    assert public is not None
    return public.spki()


def examined(lab: Lab, where: Path, given: bytes, **hsm: str) -> dict[str, Check]:
    (where / "c.pem").write_bytes(given)
    app = lab.app("acme", where, hsm={"certificates": where / "c.pem", **hsm})
    try:
        return {each.check: each for each in doctor.run(app).checks}
    finally:
        app.close()


def test_a_broken_chain_is_the_chains_fault(
    lab: Lab, tmp_path: Path, authority: Authority, spki: bytes
) -> None:
    checks = examined(lab, tmp_path, pem(authority.issue(spki), authority.root))
    assert (checks["key"].verdict, checks["key-protection"].verdict) == ("ok", "ok")
    assert (checks["chain"].verdict, checks["chain"].code) == ("fail", "chain-incomplete")


def test_a_next_one_whose_issuer_is_missing_is_no_roll_over(
    lab: Lab, tmp_path: Path, authority: Authority, spki: bytes
) -> None:
    now = authority.issue(spki, not_before=NOW - 300 * DAY, not_after=NOW + 10 * DAY)
    new = eseal_authority("Ny Tillit")
    after = new.issue(spki, not_before=NOW + 5 * DAY)
    checks = examined(lab, tmp_path, pem(now, after, *authority.chain))
    assert checks["certificate-validity"].code == "certificate-ends-soon"
    assert "takes over" not in checks["roll-over"].line
    checks = examined(lab, tmp_path, pem(now, after, *authority.chain, *new.chain))
    assert checks["certificate-validity"].verdict == "ok"
    assert f"takes over at {NOW + 5 * DAY:%Y-%m-%d %H:%M}" in checks["roll-over"].line


def test_an_older_one_takes_over_at_the_end_of_the_newer(
    lab: Lab, tmp_path: Path, authority: Authority, spki: bytes
) -> None:
    newer = authority.issue(spki, not_before=NOW - 5 * DAY, not_after=NOW + 30 * DAY)
    older = authority.issue(spki, not_before=NOW - 200 * DAY, not_after=NOW + 300 * DAY)
    checks = examined(lab, tmp_path, pem(newer, older, *authority.chain))
    assert f"takes over at {NOW + 30 * DAY:%Y-%m-%d %H:%M}" in checks["roll-over"].line


def test_a_leaf_twice_in_the_file_is_one(
    lab: Lab, tmp_path: Path, authority: Authority, spki: bytes
) -> None:
    leaf = authority.issue(spki)
    with contextlib.closing(lab.app("acme", tmp_path)) as app:
        given = pem(leaf, leaf, *authority.chain)
        done = enrolment.import_chain(app.devices[0], given, now=NOW)
    assert len(done.written + done.present) == 3


def test_an_import_ends_where_the_settings_say(
    lab: Lab, tmp_path: Path, authority: Authority, spki: bytes
) -> None:
    """An import judges as the signer will."""
    leaf = authority.issue(spki)
    given = pem(leaf, *authority.chain)
    pinned = authority.intermediate.fingerprint(SHA256()).hex()
    with contextlib.closing(lab.app("acme", tmp_path)) as app:
        device = app.devices[0]
        done = enrolment.import_chain(device, given, now=NOW, root_sha256=pinned)
        assert [each.sha256 for each in done.chain.certificates][1:] == [pinned]
        with pytest.raises(CertificateError) as caught:
            enrolment.import_chain(device, given, now=NOW, root_sha256="00" * 32)
        assert caught.value.code == "chain-pin"
        alone = pem(eseal_authority("Alene").issue(spki))
        with pytest.raises(CertificateError) as caught:
            enrolment.import_chain(device, alone, now=NOW)
        assert caught.value.code == "chain-incomplete"


def test_a_leaf_is_imported_alone_where_it_is_sent_alone(lab: Lab, tmp_path: Path) -> None:
    with contextlib.closing(lab.app("norsk", tmp_path)) as app:
        device = app.devices[0]
        public = device.key().public
        assert public is not None
        given = pem(norwegian_authority("test").issue(public.spki()))
        with pytest.raises(CertificateError) as caught:
            enrolment.import_chain(device, given, now=NOW, identity="norwegian")
        assert caught.value.code == "chain-incomplete"
        done = enrolment.import_chain(device, given, now=NOW, identity="norwegian", mode="leaf")
        assert len(done.chain.certificates) == 1


def test_without_a_pin_a_renewed_leaf_in_the_file_is_seen(
    lab: Lab, tmp_path: Path, authority: Authority
) -> None:
    with lab.app("renewed", tmp_path).devices[0] as device:
        public = device.key().public
        assert public is not None
        old = authority.issue(public.spki(), not_before=NOW - 9 * DAY, not_after=NOW - DAY)
        device.store(((old.public_bytes(Encoding.DER), "renewed", b"\x41"),), hint="")
    new = authority.issue(public.spki())
    (tmp_path / "c.pem").write_bytes(pem(new, *authority.chain))
    app = lab.app("renewed", tmp_path, hsm={"pin": None, "certificates": tmp_path / "c.pem"})
    found = app.chain()
    app.close()
    assert found.leaf.der == new.public_bytes(Encoding.DER)


def test_certificates_are_found_where_a_card_filled_its_file_up(
    lab: Lab, tmp_path: Path, authority: Authority
) -> None:
    with lab.app("padded", tmp_path).devices[0] as device:
        public = device.key().public
        assert public is not None
        chain = [
            c.public_bytes(Encoding.DER) for c in (authority.issue(public.spki()), *authority.chain)
        ]
        filling = (bytes(300), b"\xff" * 300, b"\1" + bytes(300))
        filled = [der + more for der, more in zip(chain, filling, strict=True)]
        # The control: a field within it has another length, and no certificate is left.
        odd = chain[0].replace(b"\x17\x0d", b"\x17\x0e", 1)
        assert isinstance(device, InProcessDevice)
        with device._calls.writing("Writing as a card does") as (_, _, session):
            for value in (*filled, odd):
                session.create_object(
                    {
                        Attribute.CLASS: ObjectClass.CERTIFICATE,
                        Attribute.CERTIFICATE_TYPE: CertificateType.X_509,
                        Attribute.TOKEN: True,
                        Attribute.PRIVATE: False,
                        Attribute.LABEL: "padded",
                        Attribute.ID: b"\x43",
                        Attribute.SUBJECT: b"\x30\x00",
                        Attribute.VALUE: value,
                    }
                )
    with contextlib.closing(lab.app("padded", tmp_path)) as app:
        checks = {each.check: each for each in doctor.run(app).checks}
        assert [each.der for each in app.chain().certificates] == chain
    assert checks["chain"].verdict == "ok"
    assert "1 on the device cannot be read" in checks["certificate"].line


def test_comments_in_another_encoding_are_passed_over(
    lab: Lab, tmp_path: Path, authority: Authority, spki: bytes
) -> None:
    given = "subject=O=Exempel Åkeri AB\n".encode("latin-1") + pem(
        authority.issue(spki), *authority.chain
    )
    assert examined(lab, tmp_path, given)["chain"].verdict == "ok"


#: openssl's own commands: a leaf, its chain and a key in, a file of the named form out.
OPENSSL = {
    "p7b": "crl2pkcs7 -nocrl -certfile chain.pem -outform DER -out made",
    "p7b in pem": "crl2pkcs7 -nocrl -certfile chain.pem -out made",
    "trusted": "x509 -in chain.pem -trustout -setalias ours -addtrust serverAuth -out made",
    "der": "x509 -in chain.pem -outform DER -out made",
    "p12": "pkcs12 -export -nokeys -in chain.pem -passout pass:x -out made",
}


def made_by_openssl(form: str, where: Path, *certificates: x509.Certificate) -> Path:
    (where / "chain.pem").write_bytes(pem(*certificates))
    subprocess.run(["openssl", *OPENSSL[form].split()], cwd=where, check=True, capture_output=True)
    return where / "made"


@pytest.mark.parametrize(("form", "whole"), [("p7b", True), ("p7b in pem", True),
                                             ("trusted", False), ("der", False)])  # fmt: skip
def test_what_openssl_writes_is_taken_as_a_file_and_by_an_import_alike(
    lab: Lab, tmp_path: Path, authority: Authority, spki: bytes, form: str, *, whole: bool
) -> None:
    given = (authority.issue(spki), *authority.chain)
    made = made_by_openssl(form, tmp_path, *given)
    expected = [each.public_bytes(Encoding.DER) for each in (given if whole else given[:1])]
    with contextlib.closing(lab.app("acme", tmp_path, hsm={"certificates": made})) as app:
        assert sorted(each.der for each in app.signers.supplied().certificates) == sorted(expected)
        if not whole:
            # A leaf alone is imported where its issuers are there already.
            enrolment.import_chain(app.devices[0], pem(*given), now=NOW)
        done = enrolment.import_chain(app.devices[0], made.read_bytes(), now=NOW)
        stored = {each.der for each in app.devices[0].certificates()}
    assert {each.der for each in (*done.written, *done.present)} >= {*expected}
    assert stored >= {*expected}


def test_pkcs12_is_refused_by_both_in_the_same_words(
    lab: Lab, tmp_path: Path, authority: Authority, spki: bytes
) -> None:
    made = made_by_openssl("p12", tmp_path, authority.issue(spki), *authority.chain)
    with contextlib.closing(lab.app("acme", tmp_path, hsm={"certificates": made})) as app:
        for refuses in (
            app.signers.supplied,
            lambda: enrolment.import_chain(app.devices[0], made.read_bytes(), now=NOW),
        ):
            with pytest.raises(ConfigurationError, match="PKCS#12") as caught:
                refuses()
            assert "openssl pkcs12 -in FILE -nokeys" in str(caught.value.hint)
