"""
A good setup of each family, and the same with exactly one thing wrong, as the doctor's facts.

Certificates are made by cryptography. Each setup also says what a client without any checks
would send, so that the sandbox can judge the very same thing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from hsmtoll.doctor.facts import Facts, Revocation, Seen, ServiceAnswers
from hsmtoll.errors import DeviceError, HsmTollError, PinIncorrect, PinNotTried
from hsmtoll.hsm.facts import KeyFacts, ModuleFacts, TokenFacts
from hsmtoll.hsm.uri import KeyUri
from hsmtoll.jws import RsaPublicKey
from hsmtoll.sandbox.pki import Authority, eseal_authority, norwegian_authority
from hsmtoll.settings import Settings
from hsmtoll.x509.certificate import Certificate
from hsmtoll.x509.revocation import by_crl

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NOW: Final = datetime.now(UTC).replace(microsecond=0)
DAY: Final = timedelta(days=1)
URI: Final = KeyUri.parse("pkcs11:token=customs;object=acme")
CLIENT: Final = "7a1c9d0e-0000-4000-8000-000000000001"
ROAD: Final = {"eseal": "toll:eu/movement/road/v2", "norwegian": "toll:movement/road/v2"}


@cache
def key(number: int = 0, bits: int = 2048) -> rsa.RSAPrivateKey:
    """Key *number* of this process; 0 is the one on the device."""
    del number
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


@cache
def curve_key() -> ec.EllipticCurvePrivateKey:
    """A P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


@cache
def seals() -> Authority:
    """An authority for eSeals."""
    return eseal_authority()


@cache
def twin_seals() -> Authority:
    """One with the same names and other keys."""
    return eseal_authority()


@cache
def late_seals() -> Authority:
    """One whose CA certificates have expired."""
    return eseal_authority("Gammel Tillit", not_after=NOW - DAY)


@cache
def enterprise() -> Authority:
    """A Norwegian authority for test."""
    return norwegian_authority("test")


def public(private: rsa.RSAPrivateKey) -> RsaPublicKey:
    """As our own value."""
    numbers = private.public_key().public_numbers()
    return RsaPublicKey(numbers.n, numbers.e)


def ours(certificate: x509.Certificate) -> Certificate:
    """As our own value."""
    return Certificate.load(certificate.public_bytes(Encoding.DER))


def key_facts(**changes: Any) -> KeyFacts:
    """What a good device says of the key."""
    return replace(
        KeyFacts(
            uri=URI,
            label="acme",
            id=b"\x01",
            key_type="rsa",
            bits=2048,
            public=public(key()),
            sensitive=True,
            always_sensitive=True,
            extractable=False,
            never_extractable=True,
            local=True,
            sign=True,
            always_authenticate=False,
            mechanisms=frozenset({"SHA256_RSA_PKCS", "RSA_PKCS"}),
            token_label="customs",
            manufacturer="Maker",
            model="Model",
            serial="1",
            firmware=(1, 0),
            library_manufacturer="Maker",
            library_description="Module",
            library_version=(1, 0),
        ),
        **changes,
    )


_TOKEN: Final = TokenFacts(
    uri=KeyUri.parse("pkcs11:token=customs;serial=1"),
    slot_id=0,
    slot_description="slot",
    initialized=True,
    login_required=True,
    pin_state="ok",
    firmware=(1, 0),
)


def token_facts(**changes: Any) -> TokenFacts:
    """What a good device says of itself."""
    return replace(_TOKEN, **changes)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """
    *code* is what the doctor shall find, None where all is well. *refused*: whether the
    sandbox says no to what a client without checks would send; None: it never comes so far.
    """

    facts: Facts
    code: str | None = None
    verdict: str = "fail"
    refused: bool | None = True
    x5c: tuple[x509.Certificate, ...] = ()
    claims: dict[str, Any]
    kid: str | None = None
    signer: rsa.RSAPrivateKey
    revoked: x509.Certificate | None = None


def setup(
    code: str | None = None,
    *,
    family: str = "eseal",
    verdict: str = "fail",
    refused: bool | None = True,
    settings: dict[str, Any] | None = None,
    scope: str | None = None,
    authority: Authority | None = None,
    leaf: x509.Certificate | None = None,
    above: Sequence[x509.Certificate] | None = None,
    signer: rsa.RSAPrivateKey | None = None,
    seen: dict[str, Any] | None = None,
    on_key: dict[str, Any] | None = None,
    error: HsmTollError | None = None,
    answers: ServiceAnswers | None = None,
    revoked: bool = False,
    now: datetime = NOW,
    **issued: Any,
) -> Setup:
    """The good setup of *family* with what is named changed; *issued* is told to the issuer."""
    signing = signer or key()
    ca = authority or (seals() if family == "eseal" else enterprise())
    cert = leaf or ca.issue(issued.pop("public_key", signing.public_key()), **issued)
    chain = tuple(ca.chain if above is None else above)
    chosen: dict[str, Any] = {
        "environment": "test",
        "identity": family,
        "scope": scope or "road",
        **({"iss": CLIENT} if family == "norwegian" else {}),
        **(settings or {}),
    }
    checked = Settings.model_validate({k: v for k, v in chosen.items() if v is not None})
    facts = key_facts(**{"public": public(signing), "bits": signing.key_size, **(on_key or {})})
    shown: dict[str, Any] = {
        "uri": URI,
        "token": token_facts(),
        "module": ModuleFacts(
            path="/usr/lib/module.so",
            manufacturer="Maker",
            description="Module",
            version=(1, 0),
            cryptoki=(2, 40),
            tokens=(),
        ),
        "pin_given": True,
        "logged_in": True,
        "key": None if error else facts,
        "error": error,
        "certificates": tuple(ours(each) for each in (cert, *chain)),
        **(seen or {}),
    }
    learned = _learned(ca, cert, now) if revoked else None
    claims: dict[str, Any] = {
        "iss": chosen.get("iss") or "Example",
        "scope": scope if scope and ":" in scope else ROAD[family],
    }
    if checked.consumer_org:
        claims["consumer_org"] = checked.consumer_org
    return Setup(
        facts=Facts(
            settings=checked,
            now=now,
            seen=(Seen(**shown),),
            answers=answers,
            revocation=learned,
        ),
        code=code,
        verdict=verdict,
        refused=False if code is None else refused,
        x5c=(cert,) if checked.x5c == "leaf" else (cert, *chain),
        claims=claims,
        kid=checked.kid,
        signer=signing,
        revoked=cert if revoked else None,
    )


def revocation_list(
    authority: Authority, *revoked: x509.Certificate, next_update: datetime = NOW + DAY
) -> x509.CertificateRevocationList:
    """A CRL of the intermediate."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.intermediate.subject)
        .last_update(NOW - 2 * DAY)
        .next_update(next_update)
    )
    for each in revoked:
        entry = (
            x509.RevokedCertificateBuilder()
            .serial_number(each.serial_number)
            .revocation_date(NOW - DAY)
            .add_extension(x509.CRLReason(x509.ReasonFlags.key_compromise), critical=False)
        )
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(authority._key, hashes.SHA256())


def _learned(authority: Authority, cert: x509.Certificate, now: datetime) -> tuple[Revocation, ...]:
    data = revocation_list(authority, cert).public_bytes(Encoding.DER)
    status = by_crl(data, ours(cert), ours(authority.intermediate), now=now)
    return (Revocation(certificate=ours(cert), status=status),)


def _device(code: str, kind: type[HsmTollError] = DeviceError) -> Callable[[], Setup]:
    """The device itself says no, so that nothing is ever sent."""
    return lambda: setup(code, refused=None, error=kind("it said no", code=code))


def _self_signed() -> x509.Certificate:
    return seals().issue(key().public_key(), self_signed_by=key())


_WITHOUT_POLICY: Final = ("0.4.0.2042.1.1",)
_PROD_POLICY: Final = ("2.16.578.1.29.13.210.1.0",)
_METADATA: Final = {
    "issuer": "https://test.maskinporten.no/",
    "token_endpoint": "https://test.maskinporten.no/token",
}


def _answers(**changes: Any) -> ServiceAnswers:
    usual: dict[str, Any] = {
        "metadata": _METADATA,
        "offset": 0.4,
        "health": 200,
        "consumer": "NTRSE-5566778899",
        "amr": "CForESeal",
    }
    return ServiceAnswers(**{**usual, **changes})


GOOD: Final[dict[str, Callable[[], Setup]]] = {
    "an eSeal": setup,
    "a qualified eSeal": lambda: setup(qualified=True),
    "an eSeal for RS512": lambda: setup(settings={"alg": "RS512"}),
    "an eSeal that says nonRepudiation alone": lambda: setup(key_usage=["nonRepudiation"]),
    "an eSeal whose organizationIdentifier is of a national scheme": lambda: setup(
        organization_id="EI:SE-5567 A"
    ),
    "an eSeal asked online": lambda: setup(answers=_answers()),
    "an enterprise certificate": lambda: setup(family="norwegian"),
}

#: What is wrong → the setup, with the doctor's code and whether the sandbox sees it.
BROKEN: Final[dict[str, Callable[[], Setup]]] = {
    # the leaf
    "expired": lambda: setup("certificate-expired", not_after=NOW - timedelta(hours=1)),
    "not yet valid": lambda: setup("certificate-not-yet-valid", not_before=NOW + DAY),
    "no organizationIdentifier": lambda: setup("certificate-orgid", organization_id=None),
    "two organizationIdentifiers": lambda: setup(
        "certificate-orgid", organization_id=["NTRSE-5566778899", "VATSE-556677889901"]
    ),
    "for encryption": lambda: setup("certificate-usage", key_usage=["keyEncipherment"]),
    "a CA's certificate": lambda: setup("certificate-kind", ca=True),
    "self-signed": lambda: setup("certificate-kind", leaf=_self_signed()),
    "a small key in the certificate alone": lambda: setup(
        "certificate-key", signer=key(2, 1024), on_key={"public": None}, verdict="fail"
    ),
    "a certificate of another key": lambda: setup(
        "certificate-missing", leaf=seals().issue(key(1).public_key())
    ),
    "qualified for signatures of persons": lambda: setup(
        "certificate-not-eseal", qualified=True, qc_type="esign"
    ),
    "qualified for web sites": lambda: setup(
        "certificate-not-eseal", qualified=True, qc_type="web"
    ),
    "an unknown critical extension": lambda: setup(
        "certificate-critical", unknown_critical=True, refused=False
    ),
    "not the pinned certificate": lambda: setup(
        "certificate-pin", settings={"hsm": {"certificate_sha256": "ab" * 32}}, refused=False
    ),
    "revoked": lambda: setup("certificate-revoked", revoked=True),
    # the chain
    "no intermediate": lambda: setup("chain-incomplete", above=[seals().root]),
    "nothing above the leaf": lambda: setup("chain-incomplete", above=[]),
    "no root": lambda: setup("chain-incomplete", above=[seals().intermediate], refused=False),
    "an intermediate of the same name and another key": lambda: setup(
        "chain-broken", above=twin_seals().chain
    ),
    "an expired intermediate": lambda: setup("chain-expired", authority=late_seals()),
    "not the pinned root": lambda: setup(
        "chain-pin", settings={"hsm": {"root_sha256": "ab" * 32}}, refused=False
    ),
    "an eSeal sent alone": lambda: setup("chain-incomplete", settings={"x5c": "leaf"}),
    # Norwegian certificates
    "a production certificate in test": lambda: setup(
        "certificate-environment", family="norwegian", policies=_PROD_POLICY, verdict="warn"
    ),
    "no accepted policy": lambda: setup(
        "certificate-policy", family="norwegian", policies=_WITHOUT_POLICY, verdict="warn"
    ),
    "the Norwegian certificate for signing": lambda: setup(
        "certificate-usage", family="norwegian", key_usage=["nonRepudiation"]
    ),
    "the Norwegian certificate for encryption": lambda: setup(
        "certificate-usage", family="norwegian", key_usage=["keyEncipherment", "keyAgreement"]
    ),
    "a critical extension in a Norwegian certificate": lambda: setup(
        "certificate-critical", family="norwegian", unknown_critical=True
    ),
    "no organisation number": lambda: setup(
        "certificate-orgid", family="norwegian", organization_id=None
    ),
    "a Norwegian keyUsage that is not critical": lambda: setup(
        "certificate-usage-critical",
        family="norwegian",
        verdict="warn",
        refused=False,
        critical_usage=False,
    ),
    # claims and settings
    "a Norwegian scope for an eSeal": lambda: setup("scope-family", scope="toll:movement/air"),
    "an eSeal's scope for a Norwegian client": lambda: setup(
        "scope-family", family="norwegian", scope="toll:eu/movement/air"
    ),
    "its own organisation as consumer_org": lambda: setup(
        "consumer-org-own", family="norwegian", settings={"consumer_org": "987654325"}
    ),
    "a kid for an eSeal": lambda: setup("kid-eseal", settings={"kid": "acme-2026"}),
    "no client id": lambda: setup("setting-missing", family="norwegian", settings={"iss": None}),
    "no environment": lambda: setup(
        "setting-missing", settings={"environment": None}, refused=None
    ),
    # the device
    "no module": _device("module-path"),
    "a module that does not load": _device("module-load"),
    "no device of that name": _device("device-missing"),
    "two devices of that name": _device("device-ambiguous"),
    "a wrong PIN": _device("pin-incorrect", PinIncorrect),
    "a PIN refused before": _device("pin-refused", PinNotTried),
    "a locked PIN": _device("pin-locked", PinNotTried),
    "one try left": _device("pin-final-try", PinNotTried),
    "no PIN": _device("not-logged-in"),
    "no key of that name": _device("key-missing"),
    "two keys of that name": _device("key-ambiguous"),
    "an EC key": _device("key-type"),
    "a small key": _device("key-size"),
    "a key that may not sign": _device("key-sign"),
    "an exportable key": _device("key-exportable"),
    "pkcs11-spy in between": lambda: setup("module-spy", seen={"spied": True}, refused=False),
    "a wrong PIN since the last login": lambda: setup(
        "pin-count-low",
        verdict="warn",
        seen={"token": token_facts(pin_state="count-low")},
        refused=False,
    ),
    "an imported key": lambda: setup(
        "key-imported",
        verdict="warn",
        on_key={"local": False, "warnings": ("key-imported",)},
        refused=False,
    ),
    "a hidden public half": lambda: setup(
        "public-key-hidden", verdict="warn", on_key={"public": None}, refused=False
    ),
    "no mechanism": lambda: setup(
        "mechanism", on_key={"mechanisms": frozenset({"AES_CBC"})}, refused=False
    ),
    # time
    "thirty days left": lambda: setup(
        "certificate-ends-soon", verdict="warn", not_after=NOW + 30 * DAY, refused=False
    ),
    # what the services say
    "a clock ten minutes slow": lambda: setup(
        "clock-skew", answers=_answers(offset=600.0), refused=False
    ),
    "a clock a minute fast": lambda: setup(
        "clock-differs", verdict="warn", answers=_answers(offset=-60.0), refused=False
    ),
    "an issuer without its slash": lambda: setup(
        "metadata-differs",
        answers=_answers(metadata={**_METADATA, "issuer": "https://test.maskinporten.no"}),
        refused=False,
    ),
    "bad health": lambda: setup(
        "health-bad", verdict="warn", answers=_answers(health=503), refused=False
    ),
    "another consumer than predicted": lambda: setup(
        "prediction-differs", verdict="warn", answers=_answers(consumer="NTRSE-1"), refused=False
    ),
}
