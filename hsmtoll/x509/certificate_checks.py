"""
Checks for everything that makes Maskinporten reject a certificate or its chain.

Checks return faults and raise nothing: a signer raises the first fault, the doctor shows all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hsmtoll.errors import CertificateError, sanitized
from hsmtoll.x509.path_building import gap

if TYPE_CHECKING:
    from datetime import datetime

    from hsmtoll.apis import Identity
    from hsmtoll.errors import Who
    from hsmtoll.x509.certificate import Certificate
    from hsmtoll.x509.path_building import Chain, X5cMode

__all__ = ["Fault", "chain_faults", "leaf_faults"]


@dataclass(frozen=True, slots=True)
class Fault:
    """A reason for Maskinporten to reject the certificate: stable code, message, hint."""

    code: str
    message: str
    hint: str
    who: Who = "you"

    def error(self) -> CertificateError:
        """The fault as an exception."""
        return CertificateError(self.message, code=self.code, hint=self.hint, who=self.who)


_WHICH: Final = (
    "Norwegian sets hold three certificates: take the one for authentication "
    "(keyUsage digitalSignature)"
)


def leaf_faults(leaf: Certificate, *, identity: Identity, now: datetime) -> tuple[Fault, ...]:
    """
    All reasons for Maskinporten to reject *leaf*, validity last; empty if there are none.

    `checked` raises the first and the doctor shows all, so the two cannot disagree.
    """
    found = (
        _key_fault(leaf),
        _kind_fault(leaf),
        _identifier_fault(leaf, identity),
        _usage_fault(leaf, identity),
        _critical_fault(leaf, identity),
        _validity_fault(leaf, now),
    )
    return tuple(fault for fault in found if fault is not None)


def _key_fault(leaf: Certificate) -> Fault | None:
    # M20, M33.
    if leaf.key_type != "rsa":
        happened = f"its key is {leaf.key_type}"
    elif leaf.key_bits < 2048:
        happened = f"its RSA key has {leaf.key_bits} bits"
    else:
        return None
    return Fault(
        "certificate-key",
        f"using the certificate '{leaf.subject}': {sanitized(happened)}",
        "Maskinporten takes RS256, RS384 and RS512 only: order a certificate for an RSA key of "
        "2048 bits or more (3072 is a good choice)",
    )


def _kind_fault(leaf: Certificate) -> Fault | None:
    # M34.
    if not leaf.is_ca and not leaf.self_issued:
        return None
    kind = "is self-signed" if leaf.self_issued else "belongs to a CA"
    return Fault(
        "certificate-kind",
        f"using the certificate '{leaf.subject}': it {kind}",
        "Maskinporten wants the certificate that an issuer gave to your organisation",
    )


def _identifier_fault(leaf: Certificate, identity: Identity) -> Fault | None:
    # M74, M75; B.2.
    if leaf.consumer_id(identity) is not None:
        return None
    count = len(leaf.organization_identifiers)
    if identity == "norwegian":
        happened = "its subject names no Norwegian organisation number"
        hint = (
            "take the enterprise certificate (virksomhetssertifikat); "
            "for an eSeal set HSMTOLL_IDENTITY=eseal"
        )
    elif count > 1:
        happened = f"its subject has {count} organizationIdentifiers (2.5.4.97)"
        hint = "ask the issuer for a certificate with one (EN 319 412-3)"
    else:
        happened = "its subject has no organizationIdentifier (2.5.4.97)"
        hint = "Maskinporten knows an eSeal by it: ask the issuer for an eSeal of a legal person"
    return Fault("certificate-orgid", f"using the certificate '{leaf.subject}': {happened}", hint)


def _usage_fault(leaf: Certificate, identity: Identity) -> Fault | None:
    # B.1 and B.4: of ETSI's keyUsage categories only E (encipherment only) cannot seal.
    usage = leaf.key_usage
    if identity == "norwegian":
        if usage is not None and "digitalSignature" in usage:
            return None
        hint = _WHICH
    else:
        if usage is None or usage & {"digitalSignature", "nonRepudiation"}:
            return None
        hint = "take the certificate for sealing or signing, not the one for encryption"
    named = "is not there" if usage is None else f"is {', '.join(sorted(usage)) or 'empty'}"
    return Fault(
        "certificate-usage", f"using the certificate '{leaf.subject}': its keyUsage {named}", hint
    )


def _critical_fault(leaf: Certificate, identity: Identity) -> Fault | None:
    # M35: for Norwegian certificates, Digdir's validator accepts only these two as critical.
    refused = leaf.unknown_critical
    if identity == "norwegian":
        refused = tuple(sorted(leaf.critical - {"2.5.29.15", "2.5.29.19"}))
    if not refused:
        return None
    return Fault(
        "certificate-critical",
        f"using the certificate '{leaf.subject}': "
        f"its extension {sanitized(', '.join(refused))} is critical",
        "Maskinporten refuses critical extensions that it does not know: ask the issuer",
        who="issuer",
    )


def _validity_fault(certificate: Certificate, now: datetime) -> Fault | None:
    if now > certificate.not_after:
        return Fault(
            "certificate-expired",
            f"using the certificate '{certificate.subject}': "
            f"it expired at {certificate.not_after:%Y-%m-%d %H:%M} UTC",
            "order a new one; it may be for the same key or a new one",
        )
    if now < certificate.not_before:
        return Fault(
            "certificate-not-yet-valid",
            f"using the certificate '{certificate.subject}': "
            f"it is valid from {certificate.not_before:%Y-%m-%d %H:%M} UTC",
            "wait, or check the clock of this machine",
        )
    return None


def chain_faults(
    chain: Chain, *, identity: Identity, now: datetime, mode: X5cMode = "full"
) -> tuple[Fault, ...]:
    """
    All reasons for Maskinporten to reject *chain* above the leaf; empty if there are none.

    *mode*: the certificates that x5c will have. ``leaf`` needs no issuer, ``without-root`` needs an
    issuer, ``full`` a root (M26 to M28).
    """
    if mode == "available" and not chain.complete:
        mode = "leaf"
    if mode == "leaf":
        if identity == "norwegian":
            return ()
        return (
            Fault(
                "chain-incomplete",
                f"building the chain of '{chain.leaf.subject}': HSMTOLL_X5C=leaf leaves it out",
                "Maskinporten wants the entire chain of an eSeal: unset HSMTOLL_X5C",
            ),
        )
    faults = [
        Fault(
            "chain-expired" if now > above.not_after else "chain-not-yet-valid",
            f"building the chain of '{chain.leaf.subject}': '{above.subject}' "
            + (
                f"expired at {above.not_after:%Y-%m-%d %H:%M} UTC"
                if now > above.not_after
                else f"is valid from {above.not_before:%Y-%m-%d %H:%M} UTC"
            ),
            "get the issuer's current CA certificates and name them in HSMTOLL_HSM__CERTIFICATES",
        )
        for above in chain.certificates[1:]
        if not above.valid_at(now)
    ]
    if not chain.complete and (mode == "full" or len(chain.certificates) == 1):
        alone = "; or unset HSMTOLL_X5C, to send what is there" if identity == "norwegian" else ""
        faults.append(
            Fault(
                "chain-broken" if chain.unproven else "chain-incomplete",
                f"building the chain of '{chain.leaf.subject}': {gap(chain)}",
                "get the CA certificates from the issuer's site, put them into one PEM file and "
                f"name it in HSMTOLL_HSM__CERTIFICATES{alone}",
            )
        )
    return tuple(faults)
