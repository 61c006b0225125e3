"""
Certificates in any order, with strangers → the one proven chain, and the leaf to use.

Values only: no file, no clock and no device. Nothing is trusted here, trust is
Maskinporten's part; every link is proven by a signature.

The rules of a path, from the leaf upwards. Each next certificate

* bears the name that the one before it calls its issuer (RFC 5280 section 7.1),
* is a CA (``cA`` true, ``keyCertSign`` where keyUsage is there, no critical extension that
  RFC 5280 does not know), or a root of version 1, which cannot say so; its
  ``pathLenConstraint`` leaves room (section 4.2.1.9) and its name constraints leave the names
  below (section 4.2.1.10, directory names, in the subjectAltName too), and it is no CA, by name
  and key, that is on the path already,
* made the signature of the one before it, without MD5 or SHA-1, and as the parameters of an
  RSASSA-PSS key allow (RFC 4055 section 3.3).

A path ends at a root, which is self-issued and signed by its own key, or at the
certificate pinned as root, or where nothing can follow; it has at most 10 certificates.
Of all such paths one is taken, by these criteria in this order: it ends at the pinned
root; all of it is valid now; it ends at a root; it has more certificates from the
preferred set; its first expiry is latest; it is shortest; its SHA-256s, read from the
leaf upwards, are lowest.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from hsmtoll.errors import CertificateError, foreign

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hsmtoll.apis import Identity
    from hsmtoll.certificate import Certificate, Signature
    from hsmtoll.errors import Who
    from hsmtoll.jws import RsaPublicKey

__all__ = [
    "MAX_DEPTH",
    "MAX_STEPS",
    "MAX_VERIFICATIONS",
    "Chain",
    "Fault",
    "Unread",
    "X5cMode",
    "build",
    "chain_faults",
    "checked",
    "choose",
    "for_key",
    "leaf_faults",
    "ranked",
]

#: Certificates on a path; Norwegian chains have 3 (PROTOCOL B.3), eSeal chains 3 or 4.
MAX_DEPTH: Final = 10
#: Signatures of certificates looked at in one search (DESIGN 4.5).
MAX_VERIFICATIONS: Final = 2_000
#: Links followed in one search. Without it, cross-signed CAs cost a factorial of their number.
MAX_STEPS: Final = 5_000

_NEVER: Final = datetime.max.replace(tzinfo=UTC)

#: What the header carries; ``available`` is the chain if it is complete, else the leaf alone.
X5cMode = Literal["full", "without-root", "leaf", "available"]


@dataclass(frozen=True, slots=True)
class Chain:
    """
    Leaf first, each proven to be signed by the next.

    *complete* says that the last one is a root. *unproven* counts the certificates that
    bear the name looked for where an incomplete chain ends, and did not sign it.
    *verifications* is what the search cost, *unused* how many others it was given;
    *cut_short* that a bound ended it, so that a better proven path may exist.
    *notes* say why this leaf was taken.
    """

    certificates: tuple[Certificate, ...]
    complete: bool
    unproven: int = 0
    unused: int = 0
    verifications: int = 0
    cut_short: bool = False
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def leaf(self) -> Certificate:
        """The certificate of the key that signs."""
        return self.certificates[0]

    @property
    def root(self) -> Certificate | None:
        """The last certificate, if it is a root."""
        return self.certificates[-1] if self.complete else None

    @property
    def weakest_not_after(self) -> datetime:
        """When the first of them expires."""
        return min(certificate.not_after for certificate in self.certificates)

    def x5c(self, mode: X5cMode = "full") -> tuple[str, ...]:
        """The entries of the ``x5c`` header: standard base64 of DER (RFC 7515 section 4.1.6)."""
        sent = self.sent(mode)
        return tuple(base64.b64encode(certificate.der).decode("ascii") for certificate in sent)

    def sent(self, mode: X5cMode = "full") -> tuple[Certificate, ...]:
        """The certificates that `x5c` carries."""
        if mode == "leaf" or (mode == "available" and not self.complete):
            return self.certificates[:1]
        if mode == "without-root" and self.complete and len(self.certificates) > 1:
            return self.certificates[:-1]
        return self.certificates

    def explain(self) -> tuple[str, ...]:
        """Lines for a person: the way up, where it ends, and why this leaf."""
        lines = [
            f"{place + 1}. {certificate.subject} (until {certificate.not_after:%Y-%m-%d}, "
            f"sha256 {certificate.sha256[:16]})"
            for place, certificate in enumerate(self.certificates)
        ]
        lines.append("it ends at a root" if self.complete else _gap(self))
        if self.unused:
            lines.append(f"{self.unused} other certificates do not belong to it")
        if self.cut_short:
            lines.append("the search was cut short: name the chain in HSMTOLL_HSM__CERTIFICATES")
        return (*lines, *self.notes)


def build(
    leaf: Certificate,
    pool: Iterable[Certificate],
    *,
    now: datetime,
    root_sha256: str | None = None,
    preferred: frozenset[str] = frozenset(),
) -> Chain:
    """
    The one proven chain of *leaf*, whatever the order of *pool* and whoever else is in it.

    *root_sha256* pins the certificate where it must end, *preferred* are the SHA-256s of the
    certificates a user gave by name (the PEM file). Without a root in *pool* the chain is
    not complete, which is for the caller to judge, as is its validity.

    Raises CertificateError (``chain-pin``) if the pinned root is not reached.
    """
    return _Search(leaf, pool, now, _hex(root_sha256), frozenset(map(_hex, preferred))).run()


class _Merit(NamedTuple):
    """The criteria of a path in their order; more is better."""

    pinned: bool
    valid: bool
    rooted: bool
    preferred: int
    weakest: datetime
    nearness: int

    def after(self, other: _Merit) -> _Merit:
        """What *other* is worth when these certificates stand before it."""
        return _Merit(
            other.pinned,
            self.valid and other.valid,
            other.rooted,
            self.preferred + other.preferred,
            min(self.weakest, other.weakest),
            self.nearness + other.nearness,
        )


class _Search:
    """
    One search: the proven links first, then the best path over them.

    The second half is a depth-first walk that leaves a branch when the best it could
    still come to (`_outlook`, which ignores loops and pathLenConstraint and so is never
    too low) is not better than what was found.
    """

    def __init__(
        self,
        leaf: Certificate,
        pool: Iterable[Certificate],
        now: datetime,
        pin: str | None,
        preferred: frozenset[str | None],
    ) -> None:
        others = {certificate.der: certificate for certificate in pool}
        others.pop(leaf.der, None)
        # From here on nothing depends on the order in which they came.
        self._others = sorted(others.values(), key=lambda certificate: certificate.sha256)
        self._leaf = leaf
        self._now = now
        self._pin = pin
        self._preferred = preferred
        self._keys: dict[bytes, Any] = {}
        self._proofs: dict[tuple[bytes, str], bool] = {}
        self._issuers: dict[str, list[Certificate]] = {}
        self._ends: dict[str, bool] = {}
        self._outlooks: dict[str, dict[tuple[bool, bool, bool], _Merit]] = {}
        self._best: tuple[Certificate, ...] = ()
        self._best_merit: _Merit | None = None
        self._steps = 0
        self._coarse = False
        self._cut_short = False

    def run(self) -> Chain:
        self._link()
        # First by pin, validity, root and length alone: the outlook is then exact but for
        # loops, and what is found keeps the real search short, or stands if that is cut off.
        for self._coarse in (True, False):
            self._outlooks, self._steps = {}, 0
            self._look_ahead()
            self._best_merit = self._merit(self._best) if self._best else None
            self._walk((self._leaf,), self._worth(self._leaf))
        last = self._best[-1]
        if self._pin is not None and (last.sha256 != self._pin or not self._ends[last.sha256]):
            raise CertificateError(
                f"building the chain of '{self._leaf.subject}': "
                f"it does not lead to the pinned root {self._pin[:16]}…",
                code="chain-pin",
                hint="check HSMTOLL_HSM__ROOT_SHA256, and that this root and the intermediates "
                "are on the device or in the file of HSMTOLL_HSM__CERTIFICATES",
                who="you",
            )
        complete = self._ends[last.sha256]
        named = [other for other in self._others if other.subject_key == last.issuer_key]
        return Chain(
            self._best,
            complete,
            unproven=0 if complete else len([other for other in named if other != last]),
            unused=len(self._others) - len(self._best) + 1,
            verifications=len(self._proofs),
            cut_short=self._cut_short,
        )

    def _link(self) -> None:
        # Only certificates that are proven to stand above the leaf are asked for issuers of
        # their own, so strangers cost nothing, however many sign each other.
        by_name: dict[tuple[Any, ...], list[Certificate]] = {}
        for other in self._others:
            if _is_ca(other) or _is_old_root(other):
                by_name.setdefault(other.subject_key, []).append(other)
        level = [self._leaf]
        self._ends[self._leaf.sha256] = self._is_end(self._leaf)
        for _ in range(MAX_DEPTH):
            self._issuers |= {subject.sha256: [] for subject in level}
            found: dict[str, Certificate] = {}
            pairs = [
                (issuer, subject)
                for subject in level
                if not self._ends[subject.sha256]
                for issuer in by_name.get(subject.issuer_key, ())
            ]
            for issuer, subject in sorted(pairs, key=self._order):
                # A root of version 1 cannot say that it is a CA: its own signature has to.
                trusted = _is_ca(issuer) or self._is_end(issuer)
                if trusted and self._proven(issuer, subject):
                    self._issuers[subject.sha256].append(issuer)
                    found[issuer.sha256] = issuer
                    # At once: behind many others there may be nothing left to spend.
                    self._ends.setdefault(issuer.sha256, self._is_end(issuer))
            level = [found[sha256] for sha256 in sorted(found) if sha256 not in self._issuers]

    def _order(self, pair: tuple[Certificate, Certificate]) -> tuple[Any, ...]:
        # Which is looked at first, for there is a bound: what a user named, then what key
        # identifiers hint at (RFC 5280 section 4.2.1.1). A signature decides.
        issuer, subject = pair
        return (
            -sum(each.sha256 in self._preferred for each in pair),
            issuer.subject_key_id != subject.authority_key_id,
            subject.sha256,
            issuer.sha256,
        )

    def _is_end(self, certificate: Certificate) -> bool:
        if certificate.sha256 == self._pin and certificate != self._leaf:
            return True
        return certificate.self_issued and self._proven(certificate, certificate)

    def _proven(self, issuer: Certificate, subject: Certificate) -> bool:
        # By key, not by certificate: cross-signed CAs share one key and cost one proof.
        asked = (issuer.spki_der, subject.sha256)
        if asked not in self._proofs:
            if len(self._proofs) >= MAX_VERIFICATIONS:
                self._cut_short = True
                return False
            self._proofs[asked] = _signed(issuer, subject, self._keys)
        return self._proofs[asked]

    def _worth(self, certificate: Certificate) -> _Merit:
        return _Merit(
            pinned=False,
            valid=certificate.valid_at(self._now),
            rooted=False,
            preferred=int(not self._coarse and certificate.sha256 in self._preferred),
            weakest=_NEVER if self._coarse else certificate.not_after,
            nearness=-1,
        )

    def _end(self, certificate: Certificate) -> _Merit:
        return self._worth(certificate)._replace(
            pinned=certificate.sha256 == self._pin, rooted=self._ends.get(certificate.sha256, False)
        )

    def _merit(self, path: Sequence[Certificate]) -> _Merit:
        merit = self._end(path[-1])
        for certificate in reversed(path[:-1]):
            merit = self._worth(certificate).after(merit)
        return merit

    def _look_ahead(self) -> None:
        nodes = {other.sha256: other for other in (self._leaf, *self._others)}
        known = {sha256: nodes[sha256] for sha256 in self._issuers}
        for sha256, certificate in known.items():
            end = self._end(certificate)
            self._outlooks[sha256] = {end[:3]: end}
        for _ in range(MAX_DEPTH):
            changed = False
            for sha256, certificate in known.items():
                mine = self._outlooks[sha256]
                for issuer in self._issuers[sha256]:
                    for other in tuple(self._outlooks.get(issuer.sha256, {}).values()):
                        changed |= _widen(mine, self._worth(certificate).after(other))
            if not changed:
                break

    def _outlook(self, so_far: _Merit, certificate: Certificate) -> _Merit:
        outlooks = self._outlooks.get(certificate.sha256)
        ahead = outlooks.values() if outlooks else (self._end(certificate),)
        return max(so_far.after(other) for other in ahead)

    def _walk(self, path: tuple[Certificate, ...], so_far: _Merit) -> None:
        following = self._following(path)
        if not following:
            merit = self._merit(path)
            if self._better(merit, path):
                self._best, self._best_merit = path, merit
            return
        hopes = [(self._outlook(so_far, issuer), issuer) for issuer in following]
        # Best hope first, lowest SHA-256 among equals: the sort is stable.
        for hope, issuer in sorted(hopes, key=lambda pair: pair[0], reverse=True):
            self._steps += 1
            if self._best and not self._better(hope, (*path, issuer)):
                continue
            if self._best and self._steps > MAX_STEPS:
                self._cut_short = True
                return
            self._walk((*path, issuer), so_far.after(self._worth(issuer)))

    def _better(self, merit: _Merit, path: Sequence[Certificate]) -> bool:
        if self._best_merit is None or merit != self._best_merit:
            return self._best_merit is None or merit > self._best_merit
        # A beginning that is equal so far may still become the lower one.
        mine = [certificate.sha256 for certificate in path]
        return mine <= [certificate.sha256 for certificate in self._best[: len(mine)]]

    def _following(self, path: tuple[Certificate, ...]) -> list[Certificate]:
        last = path[-1]
        if len(path) >= MAX_DEPTH or self._ends.get(last.sha256, False):
            return []
        seen = {(passed.subject_key, passed.spki_der) for passed in path}
        # RFC 5280 section 4.2.1.9: self-issued certificates and the leaf do not count.
        counted = [passed for passed in path[1:] if not passed.self_issued]
        return sorted(
            (
                issuer
                for issuer in self._issuers.get(last.sha256, ())
                if (issuer.subject_key, issuer.spki_der) not in seen
                and (issuer.path_length is None or len(counted) <= issuer.path_length)
                and all(issuer.allows(each) for each in (path[0], *counted))
            ),
            key=lambda issuer: issuer.sha256,
        )


def _widen(mine: dict[tuple[bool, bool, bool], _Merit], other: _Merit) -> bool:
    """Let *mine* promise at least what *other* does; whether that changed it."""
    kind = other[:3]
    old = mine.get(kind)
    new = other
    if old is not None:
        new = _Merit(
            *kind,
            max(old.preferred, other.preferred),
            max(old.weakest, other.weakest),
            max(old.nearness, other.nearness),
        )
    mine[kind] = new
    return new != old


def _is_ca(certificate: Certificate) -> bool:
    # RFC 5280 section 4.2: what is critical and not understood makes a certificate unusable.
    return (
        certificate.is_ca
        and not certificate.unknown_critical
        and (certificate.key_usage is None or "keyCertSign" in certificate.key_usage)
    )


def _is_old_root(certificate: Certificate) -> bool:
    # Version 1 has no extensions; of a trust anchor RFC 5280 section 6.1.1 (d) asks for none.
    return certificate.version == 1 and certificate.self_issued


def _signed(issuer: Certificate, subject: Certificate, keys: dict[bytes, Any]) -> bool:
    """Whether *issuer*'s key made *subject*'s signature."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm  # noqa: PLC0415 - 35 ms
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415 - as above
    from cryptography.hazmat.primitives.asymmetric import (  # noqa: PLC0415 - as above
        ec,
        ed448,
        ed25519,
        padding,
        rsa,
    )
    from cryptography.hazmat.primitives.serialization import load_der_public_key  # noqa: PLC0415 - as above

    how = subject.signature
    digests: dict[str, hashes.HashAlgorithm] = {
        "sha224": hashes.SHA224(),
        "sha256": hashes.SHA256(),
        "sha384": hashes.SHA384(),
        "sha512": hashes.SHA512(),
    }
    if issuer == subject:
        # A root's signature over itself carries no trust, and old roots still stand on these.
        digests.update(sha1=hashes.SHA1(), md5=hashes.MD5())  # noqa: S303 - see above
    try:
        if issuer.spki_der not in keys:
            # An RSA key by its numbers: a modulus that lacks its leading zero is used as well.
            keys[issuer.spki_der] = (
                rsa.RSAPublicNumbers(
                    issuer.public_key.exponent, issuer.public_key.modulus
                ).public_key()
                if issuer.public_key is not None
                else load_der_public_key(issuer.spki_der)
            )
        match keys[issuer.spki_der], how.scheme:
            case ed25519.Ed25519PublicKey() as key, "ed25519":
                key.verify(how.value, subject.tbs)
            case ed448.Ed448PublicKey() as key, "ed448":
                key.verify(how.value, subject.tbs)
            case ec.EllipticCurvePublicKey() as key, "ecdsa":
                key.verify(how.value, subject.tbs, ec.ECDSA(digests[how.digest]))
            case rsa.RSAPublicKey() as key, "pkcs1v15" if issuer.key_type == "rsa":
                key.verify(how.value, subject.tbs, padding.PKCS1v15(), digests[how.digest])
            case rsa.RSAPublicKey() as key, "pss" if _pss_allowed(issuer, how):
                pss = padding.PSS(padding.MGF1(digests[how.mask_digest]), how.salt)
                key.verify(how.value, subject.tbs, pss, digests[how.digest])
            case _:
                return False
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, KeyError, OverflowError):
        return False
    return True


def _pss_allowed(issuer: Certificate, how: Signature) -> bool:
    # RFC 4055 section 3.3: the parameters of the key bind its signatures; of salt, no less.
    key = issuer.pss
    return key is None or (
        (key.digest, key.mask_digest) == (how.digest, how.mask_digest) and how.salt >= key.salt
    )


# ----- which leaf, and whether all of it will do ------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    """One reason why Maskinporten would refuse: a stable code, what is so, what to do."""

    code: str
    message: str
    hint: str
    who: Who = "you"

    def error(self) -> CertificateError:
        """The error that says this."""
        return CertificateError(self.message, code=self.code, hint=self.hint, who=self.who)


_WHICH: Final = (
    "Norwegian sets hold three certificates: take the one for authentication "
    "(keyUsage digitalSignature)"
)


def leaf_faults(leaf: Certificate, *, identity: Identity, now: datetime) -> tuple[Fault, ...]:
    """
    Everything about *leaf* that Maskinporten refuses, validity last; empty if it will do.

    `checked` raises the first of them and a doctor shows all: they cannot disagree.
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
        f"using the certificate '{leaf.subject}': {foreign(happened)}",
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
    # B.1 and B.4: of ETSI's categories only E (encipherment alone) cannot seal.
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
    # M35: Digdir's validator takes these two and no other for Norwegian certificates.
    refused = leaf.unknown_critical
    if identity == "norwegian":
        refused = tuple(sorted(leaf.critical - {"2.5.29.15", "2.5.29.19"}))
    if not refused:
        return None
    return Fault(
        "certificate-critical",
        f"using the certificate '{leaf.subject}': "
        f"its extension {foreign(', '.join(refused))} is critical",
        "Maskinporten refuses what it must not ignore and does not know: ask the issuer",
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
    Everything about *chain* above the leaf that Maskinporten refuses; empty if it will do.

    *mode* is what the header will carry: with ``leaf`` nothing above it is judged, with
    ``without-root`` an issuer is needed and with ``full`` a root (M26 to M28).
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
            "get the issuer's present CA certificates and name them in HSMTOLL_HSM__CERTIFICATES",
        )
        for above in chain.certificates[1:]
        if not above.valid_at(now)
    ]
    if not chain.complete and (mode == "full" or len(chain.certificates) == 1):
        alone = "; or unset HSMTOLL_X5C, to send what is there" if identity == "norwegian" else ""
        faults.append(
            Fault(
                "chain-broken" if chain.unproven else "chain-incomplete",
                f"building the chain of '{chain.leaf.subject}': {_gap(chain)}",
                "get the CA certificates from the issuer's site, put them into one PEM file and "
                f"name it in HSMTOLL_HSM__CERTIFICATES{alone}",
            )
        )
    return tuple(faults)


def _gap(chain: Chain) -> str:
    last = chain.certificates[-1]
    if not chain.unproven:
        return f"no certificate of '{last.issuer}', which issued '{last.subject}', was found"
    return (
        f"'{last.subject}' names '{last.issuer}' as its issuer, "
        f"but none of the {chain.unproven} certificates of that name can have issued it "
        "(another key, a signature by MD5 or SHA-1, not a CA, a critical extension that is not "
        "known, names it may not issue for, or no room for it)"
    )


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
    The usable ones of several certificates for one key, best first; never empty.

    Usable is what has no `leaf_faults`, is the pinned one if there is a pin, and has
    *organization* as its `Certificate.consumer_id` if that is given. The newest
    ``notBefore`` is best, then digitalSignature before nonRepudiation alone, then the
    later end. *refused* are SHA-256s that Maskinporten refused lately: they come last.

    Raises CertificateError: ``certificate-missing``, ``certificate-pin``, the fault of the
    certificate that comes closest, or ``certificate-orgid`` when usable ones name
    different organisations and nothing says which is meant.
    """
    pin = _hex(pinned_sha256)
    given = {certificate.der: certificate for certificate in candidates}
    wanted = [c for c in given.values() if pin is None or c.sha256 == pin]
    if not wanted:
        raise (_no_pinned(pin) if pin is not None and given else _missing()).error()
    judged = [(leaf_faults(c, identity=identity, now=now), c) for c in wanted]
    usable = [c for faults, c in judged if not faults]
    if not usable:
        # What is wrong with the certificate meant, not with an attestation beside it: fewest
        # faults that time does not heal, then the newest.
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


#: Of a Norwegian client. Customs' guide documents the certificate alone, Digdir's page the chain.
ALONE: Final = "the certificate is sent alone: its issuer's certificates are not here"


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
    The chain to sign with: the best of *candidates* whose chain holds, all checks passed.

    *candidates* are the certificates of the key (`for_key`), *pool* is everything there is that
    can be read; *unread* is what cannot, and is named where that may be why something is missing.
    A new certificate whose issuers are not there yet does not displace a living old one.

    With *mode* ``available`` a complete chain is taken before a newer leaf without one.

    Raises CertificateError: those of `ranked`, `build` and `chain_faults`, for the best one.
    """
    given, everything = tuple(candidates), tuple(pool)
    if mode == "available":
        again = partial(
            checked, given, everything, identity=identity, now=now, root_sha256=root_sha256,
            preferred=preferred, pinned_sha256=pinned_sha256, organization=organization,
            refused=refused, unread=unread,
        )  # fmt: skip
        try:
            return again(mode="full")
        except CertificateError as exc:
            if exc.code not in ("chain-incomplete", "chain-broken") or identity != "norwegian":
                raise
        chain = again(mode="leaf")
        return replace(chain, notes=(*chain.notes, ALONE))
    if not given:
        raise _missing(unread, everything, preferred).error()
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
            notes = _why(leaf, given, leaves, identity=identity, now=now)
            return replace(chain, notes=notes)
        first = first or _beside(faults[0], unread).error()
    raise first or _missing().error()


def _why(
    leaf: Certificate,
    given: Sequence[Certificate],
    leaves: Sequence[Certificate],
    *,
    identity: Identity,
    now: datetime,
) -> tuple[str, ...]:
    notes: list[str] = []
    better = leaves[: leaves.index(leaf)]
    for other in sorted({c.der: c for c in given}.values(), key=lambda c: c.sha256):
        if other == leaf:
            continue
        faults = leaf_faults(other, identity=identity, now=now)
        if faults:
            reason = faults[0].message.rpartition(": ")[2]
        elif other in better:
            reason = "its chain does not hold"
        elif other in leaves:
            reason = (
                "it was refused lately" if other.not_before > leaf.not_before else "it is older"
            )
        else:
            reason = "it is not the one pinned or of another organisation"
        notes.append(f"not taken: {other.subject} (sha256 {other.sha256[:16]}): {reason}")
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


_TIMES: Final = ("certificate-expired", "certificate-not-yet-valid")


def _distance(
    faults: tuple[Fault, ...], certificate: Certificate, now: datetime
) -> tuple[Any, ...]:
    lasting = [fault for fault in faults if fault.code not in _TIMES]
    gone = now - certificate.not_after
    ahead = certificate.not_before - now
    return (len(lasting), max(gone, ahead), certificate.sha256)


class Unread(NamedTuple):
    """A certificate that cannot be read: where it is, why, and whether it seems the key's own."""

    where: str
    why: str
    of_key: bool = False


def _missing(
    unread: Sequence[Unread] = (),
    pool: Sequence[Certificate] = (),
    supplied: frozenset[str] = frozenset(),
) -> Fault:
    """*pool* is what there is instead, *supplied* are the SHA-256s of those from a file."""
    looking = "looking for the certificate of the key"
    own = next((each for each in unread if each.of_key), None)
    if own is not None:
        return Fault(
            "certificate-missing",
            f"{looking}: {foreign(own.where)} cannot be read: {foreign(own.why)}",
            "give the file that the issuer sent: hsmtoll key import, or name it in "
            "HSMTOLL_HSM__CERTIFICATES",
        )
    fault = Fault(
        "certificate-missing",
        f"{looking}: {_none_of(pool, supplied)}",
        "import it to the device (hsmtoll key import), or name a PEM file in "
        "HSMTOLL_HSM__CERTIFICATES; a key registered with a kid needs HSMTOLL_KID instead",
    )
    return _beside(fault, unread)


def _none_of(pool: Sequence[Certificate], supplied: frozenset[str]) -> str:
    if not pool:
        return "there is none, on the device or in a file"
    filed = sum(each.sha256 in supplied for each in pool)
    places = {"on the device": len(pool) - filed, "in HSMTOLL_HSM__CERTIFICATES": filed}
    there = [
        f"{number} certificate{'' if number == 1 else 's'} {place}"
        for place, number in places.items()
        if number
    ]
    return f"{' and '.join(there)}, none of this key"


def _beside(fault: Fault, unread: Sequence[Unread]) -> Fault:
    """*fault*, with a word about certificates that cannot be read where they may be the cause."""
    if not unread or fault.code not in _FOR_WANT_OF_ONE:
        return fault
    first = unread[0]
    number = "1 certificate" if len(unread) == 1 else f"{len(unread)} certificates"
    return replace(
        fault,
        message=f"{fault.message}; {number} cannot be read: {foreign(first.where)}: "
        f"{foreign(first.why)}",
    )


#: What is said where a certificate is not there, or is not the one that is needed.
_FOR_WANT_OF_ONE: Final = frozenset({"certificate-missing", "chain-broken", "chain-incomplete"})


def _no_pinned(pin: str) -> Fault:
    return Fault(
        "certificate-pin",
        f"looking for the certificate {pin[:16]}…: the key has others, but not the pinned one",
        "check HSMTOLL_HSM__CERTIFICATE_SHA256 (hsmtoll objects lists what is there)",
    )


def _other_organization(names: set[str | None], wanted: str | None) -> Fault:
    listed = foreign(", ".join(sorted(name for name in names if name)))
    if wanted is None:
        return Fault(
            "certificate-orgid",
            f"choosing a certificate: the key has some of different organisations: {listed}",
            "pin the one that is meant with HSMTOLL_HSM__CERTIFICATE_SHA256",
        )
    return Fault(
        "certificate-orgid",
        f"choosing a certificate of {foreign(wanted)}: the key has one of {listed}",
        "the certificates of one service carry the same organizationIdentifier: "
        "use a profile of its own for another organisation",
    )


def _hex(sha256: str | None) -> str | None:
    # Tools print fingerprints in capitals and with colons.
    return None if sha256 is None else sha256.replace(":", "").strip().lower()
