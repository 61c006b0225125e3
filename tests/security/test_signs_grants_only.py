"""
Attacks on what a device signs: grants, requests for a certificate of its own key, and its
self-test. Whoever has the device, or the pipe to its worker, gets no other signature.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import FrozenInstanceError, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from hsmtoll import enrolment, jws
from hsmtoll.app import App
from hsmtoll.errors import ConfigurationError, DeviceError, HsmTollError, PolicyDenied
from hsmtoll.hsm.signatures import SELF_TEST, Signable
from hsmtoll.jws import RsaPublicKey, SigningInput
from hsmtoll.settings import load
from tests.kit.grants import a_grant

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hsmtoll.hsm.device import Device
    from hsmtoll.settings import Settings
    from hsmtoll.testing.faults import Faults

NOW = datetime.now(UTC)
NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "attacker")])
SUBJECT = {
    "country": "SE",
    "organization": "Exempel AB",
    "common_name": "Exempel",
    "organization_identifier": "NTRSE-5566778899",
}


@pytest.fixture(params=["none", "process"])
def device(
    request: pytest.FixtureRequest, toll_settings: Settings, toll_faults: Faults
) -> Iterator[Device]:
    del toll_settings
    app = App(load(hsm__isolation=request.param))
    (made,) = app.devices
    assert made.key().public
    toll_faults.reset_counts()
    yield made
    app.close()


@pytest.fixture
def own(device: Device) -> rsa.RSAPublicKey:
    public = device.key().public
    assert public
    return rsa.RSAPublicNumbers(public.exponent, public.modulus).public_key()


@pytest.fixture
def audience(toll_settings: Settings) -> str:
    return str(toll_settings.endpoints.issuer)


@contextmanager
def nothing_signed(faults: Faults) -> Iterator[None]:
    before = faults.count("C_SignInit")
    yield
    assert faults.count("C_SignInit") == before


def tbs_certificate(key: rsa.RSAPublicKey) -> bytes:
    builder = x509.CertificateBuilder().subject_name(NAME).issuer_name(NAME).public_key(key)
    builder = builder.serial_number(1).not_valid_before(NOW).not_valid_after(NOW + timedelta(9))
    return builder.sign(
        rsa.generate_private_key(65537, 2048), hashes.SHA256()
    ).tbs_certificate_bytes


def request_info(key: rsa.RSAPublicKey | None = None, *, extended: bool = False) -> bytes:
    """Of *key*, whose private half is not known here: its bits stand where another's stood."""
    stranger = rsa.generate_private_key(65537, 2048)
    builder = x509.CertificateSigningRequestBuilder().subject_name(NAME)
    if extended:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
    info = builder.sign(stranger, hashes.SHA256()).tbs_certrequest_bytes
    return info if key is None else info.replace(_spki(stranger.public_key()), _spki(key))


def _spki(key: rsa.RSAPublicKey) -> bytes:
    return RsaPublicKey(key.public_numbers().n, key.public_numbers().e).spki()


def _changed(grant: bytes, header: dict[str, Any] | None = None, **claims: Any) -> bytes:
    first, _, second = grant.partition(b".")
    header_of_first = jws.read_segment(first.decode()) | (header or {})
    return jws.signing_input(header_of_first, jws.read_segment(second.decode()) | claims)


def not_grants(key: rsa.RSAPublicKey, grant: bytes) -> dict[str, Any]:
    head, _, body = grant.partition(b".")
    return {
        "bytes": b"transfer 1000 EUR",
        "nothing": b"",
        "a text": "header.payload",
        "None": None,
        "a number": 7,
        "a digest": bytes(32),
        "a TBSCertificate": tbs_certificate(key),
        "a CertificationRequestInfo": request_info(key),
        "the self-test": SELF_TEST,
        "a TLS 1.3 CertificateVerify": b" " * 64
        + b"TLS 1.3, client CertificateVerify\0"
        + bytes(32),
        "a JWT of another type": _changed(grant, {"typ": "at+jwt"}),
        "a JWT of another algorithm": _changed(grant, {"alg": "PS256"}),
        "a JWT without a signature": _changed(grant, {"alg": "none"}),
        "a JWT with a key of its own": _changed(grant, {"jwk": {"kty": "RSA"}}),
        "a JWT for somebody": _changed(grant, sub="somebody"),
        "a JWT that lives an hour": _changed(grant, exp=1_800_003_600),
        "a grant for another audience": a_grant(audience="https://elsewhere.example/"),
        "a grant without an audience": _changed(grant, aud=None),
        "a grant for two audiences": _changed(grant, aud=["https://elsewhere.example/"]),
        "a grant and more": grant + b"\n",
        "a grant twice": grant + b"." + body,
        "a grant in base64 with padding": head + b"=." + body,
    }


def test_nothing_but_a_grant_is_signed_as_one(
    device: Device, own: rsa.RSAPublicKey, audience: str, toll_faults: Faults
) -> None:
    grant = a_grant(audience=audience)
    for name, data in not_grants(own, grant).items():
        with nothing_signed(toll_faults), pytest.raises((PolicyDenied, DeviceError)) as caught:
            device.sign("RS256", data)
        # What is no text of any kind does not even cross the pipe.
        assert caught.value.code in {"not-allowed", "worker"}, name
        assert caught.value.__context__ is None or caught.value.__suppress_context__, name
    with nothing_signed(toll_faults), pytest.raises(PolicyDenied):
        device.sign("RS512", grant)
    # The control.
    assert device.sign("RS256", grant).by
    assert toll_faults.count("C_SignInit") == 1


def test_no_inner_part_signs_what_is_none_of_the_three(own: rsa.RSAPublicKey) -> None:
    """Everything on the way to C_Sign takes a Signable, and these make none."""
    public = RsaPublicKey(own.public_numbers().n, own.public_numbers().e)
    grant = a_grant()
    for name, data in not_grants(own, grant).items():
        if name in ("the self-test", "a grant for another audience"):
            continue
        with pytest.raises(PolicyDenied):
            Signable("RS256", data)
        if name != "a CertificationRequestInfo":
            with pytest.raises(PolicyDenied):
                Signable("RS256", data, request_for=public)
    for changed in (bytearray(grant), memoryview(grant), type("Bytes", (bytes,), {})(grant)):
        with pytest.raises(PolicyDenied):
            Signable("RS256", changed)  # type: ignore[arg-type]  # an attack
    liar = type("Liar", (), {"spki": lambda _: public.spki(), "verify": lambda *_: True})()
    with pytest.raises(PolicyDenied):
        Signable("RS256", request_info(own), request_for=liar)
    for alg in ("none", "PS256", "ES256", "HS256", ""):
        with pytest.raises(ConfigurationError):
            Signable(alg, grant)
    wanted = Signable("RS256", grant)
    with pytest.raises(FrozenInstanceError):
        wanted.data = b"another"  # type: ignore[misc]  # an attack
    with pytest.raises(PolicyDenied):
        replace(wanted, data=b"another")


def test_nothing_but_a_request_of_the_own_key_is_signed_as_one(
    device: Device, own: rsa.RSAPublicKey, audience: str, toll_faults: Faults
) -> None:
    public = RsaPublicKey(own.public_numbers().n, own.public_numbers().e)
    info = request_info(own)
    attempts = {
        "a grant": a_grant(audience=audience),
        "a TBSCertificate": tbs_certificate(own),
        "the self-test": SELF_TEST,
        "one of another key": request_info(),
        "one with attributes": request_info(own, extended=True),
        "one and more": info + b"\0",
        "one of another version": info.replace(b"\x02\x01\x00", b"\x02\x01\x01", 1),
        "one in BER": b"\x30\x83\x00" + len(info[4:]).to_bytes(2, "big") + info[4:],
        "None": None,
    }
    for name, data in attempts.items():
        with nothing_signed(toll_faults), pytest.raises((PolicyDenied, DeviceError)) as caught:
            device.sign_request("RS256", data, public=public)  # type: ignore[arg-type]  # an attack
        assert caught.value.code in {"not-allowed", "worker"}, name
    # For a key that is not this one, although the request says so too.
    other = rsa.generate_private_key(65537, 2048).public_key().public_numbers()
    stranger = RsaPublicKey(other.n, other.e)
    with nothing_signed(toll_faults), pytest.raises(PolicyDenied):
        device.sign_request("RS256", info.replace(public.spki(), stranger.spki()), public=stranger)
    # The control.
    assert public.verify("RS256", info, device.sign_request("RS256", info, public=public))
    request = x509.load_pem_x509_csr(enrolment.csr(device, **SUBJECT).encode())
    assert request.is_signature_valid


def test_the_self_test_takes_no_bytes_and_can_be_nothing_else(
    device: Device, toll_faults: Faults
) -> None:
    with nothing_signed(toll_faults), pytest.raises(TypeError):
        device.self_test("RS256", b"anything")  # type: ignore[call-arg, arg-type]  # an attack
    assert device.self_test("RS256")
    # DER begins with a tag, a JWS with ``eyJ`` and without blanks, TLS 1.3 with 64 blanks, and a
    # TLS 1.2 handshake with the type of its first message.
    assert SELF_TEST[0] not in {0x30, 0x31, *range(32), ord("e"), ord(" ")}
    assert b"." not in SELF_TEST


def test_the_pipe_to_a_worker_answers_the_same_questions_and_no_others(
    toll_settings: Settings, toll_faults: Faults
) -> None:
    """As somebody would speak to it who has taken over the process that asks."""
    app = App(load(hsm__isolation="process"))
    (device,) = app.devices
    ask: Any = device._ask  # type: ignore[attr-defined]  # the very pipe
    try:
        assert device.key().public
        grant = a_grant(audience=str(toll_settings.endpoints.issuer))
        for do in ("unverified", "_signed", "_ask", "writing", "__init__", "log_in", "inspect.x"):
            with nothing_signed(toll_faults), pytest.raises(HsmTollError):
                _asked(device, do, alg="RS256", unsigned=grant.decode(), candidates=[])
        for data in (b"bytes", SELF_TEST, a_grant(audience="https://elsewhere.example/")):
            with nothing_signed(toll_faults), pytest.raises(PolicyDenied):
                ask("signing", "sign", alg="RS256", unsigned=SigningInput(data), candidates=())
            with nothing_signed(toll_faults), pytest.raises(HsmTollError):
                _asked(device, "self_test", alg="RS256", unsigned=data.decode(), candidates=[])
        assert ask("signing", "sign", alg="RS256", unsigned=grant, candidates=()).value
    finally:
        app.close()


def _asked(device: Any, do: str, **arguments: Any) -> Any:
    reply, answer = device._result_of("signing", {"do": do, **arguments}, object, 0.0)
    if reply.error is not None:
        raise reply.error
    return answer
