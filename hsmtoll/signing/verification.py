"""
Verifies a grant that a signing host has signed: claims, signature, certificates, time. No I/O.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from hsmtoll.errors import CertificateError, ClockError, DeviceError, PolicyDenied, sanitized
from hsmtoll.jsonio import read_strict
from hsmtoll.jws import ALGS
from hsmtoll.signing.grant import LIFETIME, MIN_LEFT, SignedGrant
from hsmtoll.x509 import path_building
from hsmtoll.x509.certificate import Certificate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hsmtoll.apis import Identity
    from hsmtoll.jws import RsaPublicKey
    from hsmtoll.token import TokenRequest

__all__ = ["MAX_CLOCK_DIFFERENCE", "Expected", "verification_error", "verify_grant", "wrong_clock"]

#: Seconds. Maximum difference between the host's clock and Maskinporten's (M53).
MAX_CLOCK_DIFFERENCE: Final = 10.0

#: Characters. An assertion with a chain of certificates is some ten kilobytes.
_LARGEST: Final = 64 * 1024
_CERTIFICATES: Final = 10

_COMPACT: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_THUMBPRINT: Final = re.compile(r"[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """
    Expected properties of every grant.

    *audience* is the environment's issuer byte for byte. *issuer* (iss), *kid* (or
    ``thumbprint``), *public_key*, *organization* (organizationIdentifier, or the Norwegian
    organisation number) and the SHA-256s (hex) of root and leaf are compared where they are set.
    """

    audience: str
    family: Identity
    issuer: str | None = None
    kid: str | None = None
    public_key: RsaPublicKey | None = None
    organization: str | None = None
    root_sha256: str | None = None
    certificate_sha256: str | None = None


class _VerificationFailed(Exception):
    """The reason why a grant failed verification; *code* is stable."""

    def __init__(self, what: str, code: str) -> None:
        super().__init__(what)
        self.code = code


def verify_grant(
    assertion: object,
    request: TokenRequest,
    expected: Expected,
    *,
    sent: float,
    received: float,
    name: str = "the signing host",
) -> tuple[SignedGrant, str | None]:
    """
    Verify *assertion*: returns the grant and the organisation that it is signed for (``None`` with
    a kid). PolicyDenied if it is not the grant that was requested.

    *sent*, *received*: time of request and response by Maskinporten's clock, in epoch seconds.
    ClockError if only the time is wrong.
    """
    try:
        header, claims, unsigned, signature = _parts(assertion)
        identity, leaf = _signed_by(header, unsigned, signature, expected, received)
        _check_claims(claims, request, expected)
    except _VerificationFailed as exc:
        # `from None`: keep the rejected values out of tracebacks.
        raise verification_error(name, str(exc), exc.code) from None
    _check_times(claims, sent=sent, received=received, name=name)
    grant = SignedGrant(
        str(assertion),
        jti=claims["jti"],
        scope=claims["scope"],
        issued_at=claims["iat"],
        expires_at=claims["exp"],
        identity=identity,
        not_after=leaf.not_after if leaf is not None else None,
    )
    return grant, leaf.consumer_id(expected.family) if leaf is not None else None


def verification_error(name: str, what: str, code: str) -> PolicyDenied:
    """The error for a grant of the host *name* that failed verification."""
    return PolicyDenied(
        f"{name}: its grant failed verification: {what}",
        hint="nothing was sent on; ask the host's custodian what signs there",
        code=code,
        who="you",
    )


def _parts(assertion: object) -> tuple[dict[str, Any], dict[str, Any], bytes, bytes]:
    """Header, claims, signing input and signature of a compact JWS (RFC 7515 section 7.1)."""
    if (
        not isinstance(assertion, str)
        or len(assertion) > _LARGEST
        or not _COMPACT.fullmatch(assertion)
    ):
        raise _VerificationFailed("there is no assertion in its answer", "grant-form")
    head, body, signature = assertion.split(".")
    unsigned = f"{head}.{body}".encode("ascii")
    return _object(head, "header"), _object(body, "payload"), unsigned, _unb64url(signature)


def _object(part: str, name: str) -> dict[str, Any]:
    try:
        # Strictly: Maskinporten may take the other value of a duplicate member.
        value = read_strict(_unb64url(part))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise _VerificationFailed(f"the {name} of its assertion is not a JSON object", "grant-form")
    return value


def _unb64url(part: str) -> bytes:
    raw = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)) if len(part) % 4 != 1 else b""
    if base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii") != part:
        raise _VerificationFailed("its assertion is not base64url as RFC 7515 has it", "grant-form")
    return raw


def _signed_by(
    header: Mapping[str, Any], unsigned: bytes, signature: bytes, expected: Expected, now: float
) -> tuple[str, Certificate | None]:
    """Verify *signature*. Returns `SignedGrant.identity`, and the leaf (None with a kid)."""
    alg = header.get("alg")
    if alg not in ALGS:
        raise _VerificationFailed(f"alg is {sanitized(alg)}", "grant-header")
    if header.get("typ", "JWT") != "JWT" or header.keys() - {"alg", "typ", "kid", "x5c"}:
        raise _VerificationFailed("its header has members besides alg, kid or x5c", "grant-header")
    if ("kid" in header) == ("x5c" in header):
        raise _VerificationFailed(
            "its header has either both of kid and x5c, or neither", "grant-header"
        )
    if "kid" in header:
        return _known_by_kid(header["kid"], str(alg), unsigned, signature, expected), None
    if expected.kid is not None:
        raise _VerificationFailed(
            "it is signed by a certificate, and HSMTOLL_KID is set", "grant-header"
        )
    certificates = _certificates(header["x5c"])
    leaf = certificates[0]
    key = leaf.public_key
    if key is None or not key.verify(str(alg), unsigned, signature):
        raise _VerificationFailed(
            "its signature is not by the certificate that it shows", "grant-signature"
        )
    _verify_chain(certificates, expected, datetime.fromtimestamp(now, UTC))
    organization = leaf.consumer_id(expected.family)
    if organization is None:
        raise _VerificationFailed("its certificate names no organisation", "grant-organization")
    wanted = expected.organization
    if wanted is not None and wanted not in (*leaf.organization_identifiers, leaf.orgno()):
        raise _VerificationFailed(
            f"it is signed for {sanitized(organization)}, not for {sanitized(wanted)}",
            "grant-organization",
        )
    return leaf.sha256, leaf


def _known_by_kid(
    kid: object, alg: str, unsigned: bytes, signature: bytes, expected: Expected
) -> str:
    """The identity for a kid. Keys cannot be registered for an eSeal (M22)."""
    key, wanted = expected.public_key, expected.kid
    if expected.family == "eseal" or expected.organization is not None:
        raise _VerificationFailed("it shows a kid, and no certificate", "grant-header")
    if not isinstance(kid, str) or not kid:
        raise _VerificationFailed("its kid is not a text", "grant-header")
    if wanted == "thumbprint":
        wanted = key.thumbprint() if key is not None else None
        if wanted is None and not _THUMBPRINT.fullmatch(kid):
            raise _VerificationFailed(
                f"its kid {sanitized(kid)} is not a thumbprint (RFC 7638)", "grant-header"
            )
    elif wanted is None and key is None:
        raise _VerificationFailed(
            "it shows a kid, and neither HSMTOLL_KID nor HSMTOLL_HSM__PUBLIC_KEY says whose",
            "grant-header",
        )
    if wanted is not None and kid != wanted:
        raise _VerificationFailed(
            f"its kid is {sanitized(kid)}, not {sanitized(wanted)}", "grant-header"
        )
    if key is not None:
        if not key.verify(alg, unsigned, signature):
            raise _VerificationFailed(
                "its signature is not by HSMTOLL_HSM__PUBLIC_KEY", "grant-signature"
            )
        return hashlib.sha256(key.spki()).hexdigest()
    # Without the public key only Maskinporten can verify the signature; a kid alone gives nothing.
    return hashlib.sha256(f"kid {kid}".encode()).hexdigest()


def _certificates(x5c: object) -> tuple[Certificate, ...]:
    if not isinstance(x5c, list) or not 1 <= len(x5c) <= _CERTIFICATES:
        raise _VerificationFailed("its x5c is not a list of certificates", "grant-certificate")
    try:
        ders = [base64.b64decode(each.encode("ascii"), validate=True) for each in x5c]
        return tuple(Certificate.load(der) for der in ders)
    except (AttributeError, ValueError, binascii.Error):
        raise _VerificationFailed("its x5c cannot be read", "grant-certificate") from None


def _verify_chain(certificates: tuple[Certificate, ...], expected: Expected, now: datetime) -> None:
    """Verify that x5c is exactly the chain of its first certificate (M26)."""
    leaf = certificates[0]
    pin = expected.certificate_sha256
    if pin is not None and leaf.sha256 != pin:
        raise _VerificationFailed(
            "its certificate is not HSMTOLL_HSM__CERTIFICATE_SHA256", "grant-certificate"
        )
    if not leaf.valid_at(now):
        raise _VerificationFailed(
            f"its certificate '{leaf.subject}' is not valid now", "grant-certificate"
        )
    try:
        chain = path_building.build(leaf, certificates, now=now, root_sha256=expected.root_sha256)
    except CertificateError as exc:
        raise _VerificationFailed(str(exc), "grant-certificate") from None
    if chain.certificates != certificates:
        raise _VerificationFailed(
            "its x5c is not a chain, each issued by the next", "grant-certificate"
        )


def _check_claims(claims: Mapping[str, Any], request: TokenRequest, expected: Expected) -> None:
    """Verify that the claims are those that were requested, and no others."""
    requested: dict[str, Any] = {"aud": expected.audience, "scope": request.scope}
    if expected.issuer is not None:
        requested["iss"] = expected.issuer
    if request.resource:
        requested["resource"] = list(request.resource)
    if request.consumer_org is not None:
        requested["consumer_org"] = request.consumer_org
    if request.authorization_details:
        requested["authorization_details"] = request.details
    for name, value in requested.items():
        if claims.get(name) != value:
            raise _VerificationFailed(
                f"{name} is {sanitized(claims.get(name))}, not {sanitized(value)}", f"grant-{name}"
            )
    more = claims.keys() - requested.keys() - {"iss", "iat", "exp", "jti"}
    if more:
        raise _VerificationFailed(
            f"not requested: {sanitized(', '.join(sorted(more)))}", "grant-claims"
        )
    jti, iss = claims.get("jti"), claims.get("iss")
    for name, text in (("jti", jti), ("iss", iss)):
        if not isinstance(text, str) or not text:
            raise _VerificationFailed(f"{name} is not a text", f"grant-{name}")
    iat, exp = claims.get("iat"), claims.get("exp")
    if type(iat) is not int or type(exp) is not int or not MIN_LEFT <= exp - iat <= LIFETIME:
        raise _VerificationFailed(
            f"iat and exp are not whole seconds, {MIN_LEFT} to {LIFETIME} apart", "grant-lifetime"
        )


def _check_times(claims: Mapping[str, Any], *, sent: float, received: float, name: str) -> None:
    ahead, behind = claims["iat"] - received, sent - claims["iat"]
    if max(ahead, behind) > MAX_CLOCK_DIFFERENCE:
        raise wrong_clock(name, ahead if ahead > 0 else -behind)
    if claims["exp"] - received < MIN_LEFT:
        raise DeviceError(
            f"{name}: its grant came too late: {claims['exp'] - received:.0f} s are left of it",
            hint=f"a grant lives {LIFETIME} s; look at its device and the way to it",
            code="device-slow",
        )


def wrong_clock(name: str, ahead: float) -> ClockError:
    """The error for a host whose clock is *ahead* seconds ahead of this machine's; < 0: behind."""
    side = "ahead of" if ahead > 0 else "behind"
    return ClockError(
        f"clock: {name} is {abs(ahead):.0f} s {side} this machine",
        hint="synchronise the host's clock (NTP), which is never corrected; or this machine's, "
        "if that is the wrong one",
        code="host-clock",
        who="you",
    )
