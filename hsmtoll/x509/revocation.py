"""
Revocation status from CRLs and OCSP responses, with their signatures verified.

Parses bytes: no network, no file and no clock.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID

if TYPE_CHECKING:
    from datetime import datetime

    from hsmtoll.x509.certificate import Certificate

__all__ = ["MAX_ANSWER", "MAX_BYTES", "Status", "by_crl", "by_ocsp", "next_updates", "ocsp_url"]

#: Maximum bytes of a CRL.
MAX_BYTES = 1024 * 1024

#: Maximum bytes of an OCSP response. It is about one certificate; the time to parse the
#: certificates in it grows with the square of their number.
MAX_ANSWER = 64 * 1024


@dataclass(frozen=True, slots=True)
class Status:
    """
    The revocation status of one certificate. *revoked_at*: ``None`` if it is not revoked. *source*:
    ``CRL`` or ``OCSP``. *next_update*: end of validity of the answer; *stale*: that has passed.
    """

    source: str
    revoked_at: datetime | None = None
    reason: str | None = None
    next_update: datetime | None = None
    stale: bool = False


def by_crl(data: bytes, certificate: Certificate, issuer: Certificate, *, now: datetime) -> Status:
    """
    The status of *certificate* in a CRL, DER or PEM.

    Raises ValueError if *data* is not a CRL or is not signed by *issuer*.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES // 1024} KiB")
    try:
        armoured = data.lstrip().startswith(b"-----BEGIN")
        crl = (x509.load_pem_x509_crl if armoured else x509.load_der_x509_crl)(data)
        key: Any = load_der_public_key(issuer.spki_der)
        signed = crl.is_signature_valid(key)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as exc:
        raise ValueError("it is not a revocation list") from exc
    if not signed:
        raise ValueError(f"it is not signed by '{issuer.subject}'")
    found = crl.get_revoked_certificate_by_serial_number(certificate.serial)
    until = crl.next_update_utc
    stale = until is not None and until < now
    if found is None:
        return Status("CRL", next_update=until, stale=stale)
    try:
        reason = found.extensions.get_extension_for_class(x509.CRLReason).value.reason.value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        # It is revoked, even if the reason cannot be read.
        reason = None
    return Status("CRL", found.revocation_date_utc, reason, until, stale)


_CRL = re.compile(b"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", re.DOTALL)


def next_updates(data: bytes) -> list[datetime]:
    """
    When the CRLs in *data* (PEM, with anything between them) expire, unverified. ValueError if one
    of them is not a CRL.
    """
    lists = [x509.load_pem_x509_crl(block) for block in _CRL.findall(data)]
    return [each.next_update_utc for each in lists if each.next_update_utc is not None]


def ocsp_url(base: str, certificate: Certificate, issuer: Certificate) -> str:
    """The URL of an OCSP request by GET (RFC 6960 appendix A.1)."""
    builder = ocsp.OCSPRequestBuilder().add_certificate(
        x509.load_der_x509_certificate(certificate.der),
        x509.load_der_x509_certificate(issuer.der),
        hashes.SHA1(),  # noqa: S303 - only identifies the certificate; responders support it
    )
    request = base64.b64encode(builder.build().public_bytes(Encoding.DER)).decode("ascii")
    quoted = request.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
    return f"{base.rstrip('/')}/{quoted}"


def by_ocsp(data: bytes, certificate: Certificate, issuer: Certificate, *, now: datetime) -> Status:
    """
    The status of *certificate* in an OCSP response.

    It must be signed by *issuer*, or by a responder that *issuer* has authorised with a certificate
    (RFC 6960 section 4.2.2.2). Raises ValueError otherwise, and if the status is unknown.
    """
    if len(data) > MAX_ANSWER:
        raise ValueError(f"more than {MAX_ANSWER // 1024} KiB")
    try:
        answer = ocsp.load_der_ocsp_response(data)
        if answer.response_status is not ocsp.OCSPResponseStatus.SUCCESSFUL:
            raise ValueError(f"the responder said {answer.response_status.name.lower()}")
        if answer.serial_number != certificate.serial:
            raise ValueError("it is about another certificate")
        if not _is_authorized(answer, issuer, now):
            raise ValueError(f"it is not signed by '{issuer.subject}'")
        status, until = answer.certificate_status, answer.next_update_utc
        stale = until is not None and until < now
        if status is ocsp.OCSPCertStatus.GOOD:
            return Status("OCSP", next_update=until, stale=stale)
        if status is ocsp.OCSPCertStatus.REVOKED:
            reason = answer.revocation_reason
            why = reason.value if reason else None
            return Status("OCSP", answer.revocation_time_utc, why, until, stale)
    except (TypeError, UnsupportedAlgorithm) as exc:
        raise ValueError("it is not an OCSP answer") from exc
    raise ValueError("the responder does not know the certificate")


def _is_authorized(answer: ocsp.OCSPResponse, issuer: Certificate, now: datetime) -> bool:
    """Whether *issuer*, or a responder that it has authorised, has signed *answer*."""
    key: Any = load_der_public_key(issuer.spki_der)
    if _verified(key, answer):
        return True
    above = x509.load_der_x509_certificate(issuer.der)
    for delegate in answer.certificates:
        try:
            delegate.verify_directly_issued_by(above)
            purposes = delegate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
            continue
        valid = delegate.not_valid_before_utc <= now <= delegate.not_valid_after_utc
        for_ocsp = ExtendedKeyUsageOID.OCSP_SIGNING in purposes
        if valid and for_ocsp and _verified(delegate.public_key(), answer):
            return True
    return False


def _verified(key: Any, answer: ocsp.OCSPResponse) -> bool:
    digest = answer.signature_hash_algorithm
    if digest is None:
        return False
    try:
        if isinstance(key, rsa.RSAPublicKey):
            key.verify(answer.signature, answer.tbs_response_bytes, padding.PKCS1v15(), digest)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(answer.signature, answer.tbs_response_bytes, ec.ECDSA(digest))
        else:
            return False
    except (InvalidSignature, UnsupportedAlgorithm):
        return False
    return True
