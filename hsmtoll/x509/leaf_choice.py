"""
Choice of the signing certificate of a key: acceptable to Maskinporten, with a verified chain.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hsmtoll.errors import CertificateError, sanitized
from hsmtoll.x509.certificate_checks import Fault, chain_faults, leaf_faults
from hsmtoll.x509.path_building import build, normal_sha256

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from hsmtoll.apis import Identity
    from hsmtoll.jws import RsaPublicKey
    from hsmtoll.x509.certificate import Certificate
    from hsmtoll.x509.path_building import Chain, X5cMode

__all__ = ["ALONE", "Unread", "checked", "choose", "for_key", "ranked"]


def for_key(pool: Iterable[Certificate], key: RsaPublicKey) -> tuple[Certificate, ...]:
    """The certificates in *pool* for this public key, each once, in a fixed order."""
    found = {certificate.der: certificate for certificate in pool if certificate.public_key == key}
    return tuple(sorted(found.values(), key=lambda certificate: certificate.sha256))


def ranked(
    candidates: Iterable[Certificate],
    *,
    identity: Identity,
    now: datetime,
    pinned_sha256: str | None = None,
    organization: str | None = None,
    refused: frozenset[str] = frozenset(),
) -> tuple[Certificate, ...]:
    """
    The usable certificates among *candidates*, which are for one key, best first; never empty.

    A certificate is usable if it has no `leaf_faults`, is the pinned one if there is a pin, and has
    the `Certificate.consumer_id` *organization* if that is given. Order: latest ``notBefore``, then
    digitalSignature before nonRepudiation alone, then latest ``notAfter``. *refused*: SHA-256s that
    Maskinporten rejected recently; they come last.

    Raises CertificateError: ``certificate-missing``, ``certificate-pin``, the first fault of the
    certificate that is closest to usable, or ``certificate-orgid`` if usable ones are for different
    organisations and *organization* is not given.
    """
    pin = normal_sha256(pinned_sha256)
    given = {certificate.der: certificate for certificate in candidates}
    wanted = [c for c in given.values() if pin is None or c.sha256 == pin]
    if not wanted:
        raise (_no_pinned(pin) if pin is not None and given else _missing_fault()).error()
    judged = [(leaf_faults(c, identity=identity, now=now), c) for c in wanted]
    usable = [c for faults, c in judged if not faults]
    if not usable:
        # Report the certificate that the user probably means, not a device attestation: the one
        # with the fewest faults other than validity, then the one closest to its validity.
        faults, _ = min(judged, key=lambda pair: _distance(pair[0], pair[1], now))
        raise faults[0].error()
    names = {c.consumer_id(identity) for c in usable}
    if organization is not None:
        usable = [c for c in usable if c.consumer_id(identity) == organization]
    if not usable or (organization is None and len(names) > 1):
        raise _other_organization(names, organization).error()
    return tuple(sorted(usable, key=lambda c: _preference(c, refused)))


def choose(
    candidates: Iterable[Certificate],
    *,
    identity: Identity,
    now: datetime,
    pinned_sha256: str | None = None,
    organization: str | None = None,
    refused: frozenset[str] = frozenset(),
) -> Certificate:
    """The first of `ranked`, with its errors."""
    return ranked(
        candidates,
        identity=identity,
        now=now,
        pinned_sha256=pinned_sha256,
        organization=organization,
        refused=refused,
    )[0]


#: For Norwegian clients: Customs' guide documents the leaf alone, Digdir's page the chain.
ALONE: Final = "the certificate is sent without its chain: the issuer's certificates are missing"


def checked(
    candidates: Iterable[Certificate],
    pool: Iterable[Certificate],
    *,
    identity: Identity,
    now: datetime,
    mode: X5cMode = "full",
    root_sha256: str | None = None,
    preferred: frozenset[str] = frozenset(),
    pinned_sha256: str | None = None,
    organization: str | None = None,
    refused: frozenset[str] = frozenset(),
    unread: Sequence[Unread] = (),
) -> Chain:
    """
    The chain to sign with: that of the best of *candidates* whose chain passes all checks.

    *candidates*: certificates of the key (`for_key`). *pool*: all certificates that were parsed.
    *unread*: those that could not be parsed; errors name them if one of them may be the cause. A
    new certificate without its issuers does not displace an older one that is still valid.

    With *mode* ``available``, a leaf with a complete chain is preferred to a newer one without.

    Raises CertificateError as `ranked`, `build` and `chain_faults`, for the best candidate.
    """
    given, everything = tuple(candidates), tuple(pool)
    if mode == "available":
        checked_by = partial(
            checked, given, everything, identity=identity, now=now, root_sha256=root_sha256,
            preferred=preferred, pinned_sha256=pinned_sha256, organization=organization,
            refused=refused, unread=unread,
        )  # fmt: skip
        try:
            return checked_by(mode="full")
        except CertificateError as exc:
            if exc.code not in ("chain-incomplete", "chain-broken") or identity != "norwegian":
                raise
        chain = checked_by(mode="leaf")
        return replace(chain, notes=(*chain.notes, ALONE))
    if not given:
        raise _missing_fault(unread, everything, preferred).error()
    leaves = ranked(
        given,
        identity=identity,
        now=now,
        pinned_sha256=pinned_sha256,
        organization=organization,
        refused=refused,
    )
    first: CertificateError | None = None
    for leaf in leaves:
        try:
            chain = build(leaf, everything, now=now, root_sha256=root_sha256, preferred=preferred)
        except CertificateError as exc:
            first = first or exc
            continue
        faults = chain_faults(chain, identity=identity, now=now, mode=mode)
        if not faults:
            notes = _notes_on_others(leaf, given, leaves, identity=identity, now=now)
            return replace(chain, notes=notes)
        first = first or _with_unread(faults[0], unread).error()
    raise first or _missing_fault().error()


def _notes_on_others(
    leaf: Certificate,
    given: Sequence[Certificate],
    leaves: Sequence[Certificate],
    *,
    identity: Identity,
    now: datetime,
) -> tuple[str, ...]:
    """Why each other certificate of the key was not chosen."""
    notes: list[str] = []
    better = leaves[: leaves.index(leaf)]
    for other in sorted({c.der: c for c in given}.values(), key=lambda c: c.sha256):
        if other == leaf:
            continue
        faults = leaf_faults(other, identity=identity, now=now)
        if faults:
            reason = faults[0].message.rpartition(": ")[2]
        elif other in better:
            reason = "its chain cannot be used"
        elif other in leaves:
            reason = (
                "Maskinporten refused it lately"
                if other.not_before > leaf.not_before
                else "it is older"
            )
        else:
            reason = "it is not the pinned one, or is for another organisation"
        notes.append(f"not used: {other.subject} (sha256 {other.sha256[:16]}): {reason}")
    return tuple(notes)


def _preference(certificate: Certificate, refused: frozenset[str]) -> tuple[Any, ...]:
    signs = certificate.key_usage is None or "digitalSignature" in certificate.key_usage
    return (
        certificate.sha256 in refused,
        -certificate.not_before.timestamp(),
        not signs,
        -certificate.not_after.timestamp(),
        certificate.sha256,
    )


_VALIDITY_CODES: Final = ("certificate-expired", "certificate-not-yet-valid")


def _distance(
    faults: tuple[Fault, ...], certificate: Certificate, now: datetime
) -> tuple[Any, ...]:
    """Faults other than validity, then the time from *now* to the validity; less is better."""
    lasting = [fault for fault in faults if fault.code not in _VALIDITY_CODES]
    since_end = now - certificate.not_after
    until_begin = certificate.not_before - now
    return (len(lasting), max(since_end, until_begin), certificate.sha256)


class Unread(NamedTuple):
    """An unparsable certificate: *where* it is, the reason, whether it is probably the key's."""

    where: str
    why: str
    of_key: bool = False


def _missing_fault(
    unread: Sequence[Unread] = (),
    pool: Sequence[Certificate] = (),
    supplied: frozenset[str] = frozenset(),
) -> Fault:
    """
    No certificate is for the key. *pool*: all others; *supplied*: SHA-256s of those of a file.
    """
    looking = "looking for the certificate of the key"
    own = next((each for each in unread if each.of_key), None)
    if own is not None:
        return Fault(
            "certificate-missing",
            f"{looking}: {sanitized(own.where)} cannot be read: {sanitized(own.why)}",
            "give the file that the issuer sent: hsmtoll key import, or name it in "
            "HSMTOLL_HSM__CERTIFICATES",
        )
    fault = Fault(
        "certificate-missing",
        f"{looking}: {_searched(pool, supplied)}",
        "import it to the device (hsmtoll key import), or name a PEM file in "
        "HSMTOLL_HSM__CERTIFICATES; a key registered with a kid needs HSMTOLL_KID instead",
    )
    return _with_unread(fault, unread)


def _searched(pool: Sequence[Certificate], supplied: frozenset[str]) -> str:
    if not pool:
        return "there is no certificate, on the device or in a file"
    filed = sum(each.sha256 in supplied for each in pool)
    places = {"on the device": len(pool) - filed, "in HSMTOLL_HSM__CERTIFICATES": filed}
    there = [
        f"{number} certificate{'' if number == 1 else 's'} {place}"
        for place, number in places.items()
        if number
    ]
    return f"{' and '.join(there)}, none for this key"


def _with_unread(fault: Fault, unread: Sequence[Unread]) -> Fault:
    """*fault*; its message also names unparsable certificates if they may be the cause."""
    if not unread or fault.code not in _UNREAD_MAY_BE_THE_CAUSE:
        return fault
    first = unread[0]
    number = "1 certificate" if len(unread) == 1 else f"{len(unread)} certificates"
    return replace(
        fault,
        message=f"{fault.message}; {number} cannot be read: {sanitized(first.where)}: "
        f"{sanitized(first.why)}",
    )


#: Codes of faults that an unparsable certificate may cause.
_UNREAD_MAY_BE_THE_CAUSE: Final = frozenset(
    {"certificate-missing", "chain-broken", "chain-incomplete"}
)


def _no_pinned(pin: str) -> Fault:
    return Fault(
        "certificate-pin",
        f"looking for the certificate {pin[:16]}…: the key has others, but not the pinned one",
        "check HSMTOLL_HSM__CERTIFICATE_SHA256 (hsmtoll objects lists what is there)",
    )


def _other_organization(names: set[str | None], wanted: str | None) -> Fault:
    listed = sanitized(", ".join(sorted(name for name in names if name)))
    if wanted is None:
        return Fault(
            "certificate-orgid",
            f"choosing a certificate: the key has certificates of several organisations: {listed}",
            "pin the right one with HSMTOLL_HSM__CERTIFICATE_SHA256",
        )
    return Fault(
        "certificate-orgid",
        f"choosing a certificate of {sanitized(wanted)}: the key has one of {listed}",
        "all certificates of one service have the same organizationIdentifier: "
        "use a separate profile for another organisation",
    )
