"""
Path building: from an unordered pool, which may have unrelated certificates, to one verified chain.

Values only: no file, no clock and no device. Each link is verified by its signature; there is no
trust anchor, because Maskinporten decides about trust.

The rules of a path, from the leaf upwards. Each next certificate

* has the issuer name of the one below it as its subject (RFC 5280 section 7.1);
* is a CA (``cA`` true, ``keyCertSign`` if keyUsage is present, no unknown critical extension), or a
  root of version 1, which has no extensions;
* permits the path below it by ``pathLenConstraint`` (section 4.2.1.9) and by name constraints
  (section 4.2.1.10; directory names, those in subjectAltName included);
* has another name or key than each CA below it;
* has signed the one below it, without MD5 or SHA-1, and within the parameters of an RSASSA-PSS key
  (RFC 4055 section 3.3).

A path ends at a root, which is self-issued and signed by its own key, at the certificate pinned as
root, or where no certificate can follow; it has at most 10 certificates. The best path is chosen by
these criteria, in order: it ends at the pinned root; all its certificates are valid now; it ends at
a root; it has the most certificates of the preferred set; its earliest notAfter is the latest; it
is the shortest; its SHA-256s, from the leaf upwards, are the lowest.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from hsmtoll.errors import CertificateError
from hsmtoll.x509.signatures import is_signed_by

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from hsmtoll.x509.certificate import Certificate

__all__ = [
    "MAX_DEPTH",
    "MAX_STEPS",
    "MAX_VERIFICATIONS",
    "Chain",
    "X5cMode",
    "build",
    "gap",
    "normal_sha256",
]

#: Maximum certificates on a path; Norwegian chains have 3, eSeal chains 3 or 4.
MAX_DEPTH: Final = 10
#: Maximum signatures verified in one search.
MAX_VERIFICATIONS: Final = 2_000
#: Maximum steps of one search; without it, the time is factorial in the number of cross-signed CAs.
MAX_STEPS: Final = 10_000

#: The certificates in x5c; ``available`` is the chain if it is complete, else the leaf alone.
X5cMode = Literal["full", "without-root", "leaf", "available"]


@dataclass(frozen=True, slots=True)
class Chain:
    """
    A verified chain: leaf first, each certificate signed by the next.

    *complete*: the last one is a root. *unproven*: number of certificates with the issuer's name
    where an incomplete chain ends, none of which signed its last certificate. *verifications*:
    signatures verified in the search. *unused*: number of other certificates in the pool.
    *cut_short*: a bound ended the search, so a better path may exist.
    *notes*: why this leaf was chosen.
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
        """The earliest notAfter of the chain."""
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
        """Lines to print: the path from the leaf upwards, where it ends, and why this leaf."""
        lines = [
            f"{place + 1}. {certificate.subject} (until {certificate.not_after:%Y-%m-%d}, "
            f"sha256 {certificate.sha256[:16]})"
            for place, certificate in enumerate(self.certificates)
        ]
        lines.append("it ends at a root" if self.complete else gap(self))
        if self.unused == 1:
            lines.append("1 other certificate does not belong to it")
        elif self.unused:
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
    The verified chain of *leaf*. The order of *pool*, and unrelated certificates in it, do not
    matter.

    *root_sha256* pins the certificate where the chain must end. *preferred*: SHA-256s of the
    certificates that the user has supplied in a file. Without a root in *pool* the chain is
    incomplete; the caller checks that, and the validity.

    Raises CertificateError (``chain-pin``) if the pinned root is not reached.
    """
    return _Search(
        leaf, pool, now, normal_sha256(root_sha256), frozenset(map(normal_sha256, preferred))
    ).run()


class _Merit(NamedTuple):
    """The criteria between paths of the same validity and kind of end; more is better."""

    preferred: int
    weakest: datetime
    nearness: int

    def below(self, above: _Merit) -> _Merit:
        """The merit of these certificates together with those *above* them."""
        return _Merit(
            self.preferred + above.preferred,
            min(self.weakest, above.weakest),
            self.nearness + above.nearness,
        )


class _Search:
    """
    One search: first the verified links, then the best path along them, by branch and bound.

    The first three criteria divide the paths into classes, by the certificates on a path and its
    end; the first class that has a path is searched. A depth-first search leaves a branch if the
    upper bound of its merit (`_bounds`) is not better than the best path so far: otherwise six
    layers of twelve similar CAs have three million paths.
    """

    def __init__(
        self,
        leaf: Certificate,
        pool: Iterable[Certificate],
        now: datetime,
        pin: str | None,
        preferred: frozenset[str | None],
    ) -> None:
        # Sorted, so that the result does not depend on the order of the pool.
        self._others = sorted({*pool} - {leaf}, key=lambda certificate: certificate.sha256)
        self._leaf = leaf
        self._now = now
        self._pin = pin
        self._preferred = preferred
        self._keys: dict[bytes, Any] = {}
        self._proofs: dict[tuple[bytes, str], bool] = {}
        self._issuers: dict[Certificate, list[Certificate]] = {}
        self._ends: dict[Certificate, bool] = {}
        self._bounds: dict[Certificate, _Merit] = {}
        self._best: tuple[Certificate, ...] = ()
        self._best_merit = _Merit(0, now, 0)
        self._by_length = False
        self._steps = 0
        self._cut_short = False

    def run(self) -> Chain:
        self._link()
        self._find()
        if not self._best:
            raise CertificateError(
                f"building the chain of '{self._leaf.subject}': "
                f"it does not lead to the pinned root {str(self._pin)[:16]}…",
                code="chain-pin",
                hint="check HSMTOLL_HSM__ROOT_SHA256, and that this root and the intermediates "
                "are on the device or in the file of HSMTOLL_HSM__CERTIFICATES",
                who="you",
            )
        last = self._best[-1]
        complete = self._ends[last]
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
        # Issuers are looked up only for certificates that are verified to be above the leaf, so
        # that unrelated ones cost no verification.
        by_name: dict[tuple[Any, ...], list[Certificate]] = {}
        for other in self._others:
            if _is_ca(other) or _is_old_root(other):
                by_name.setdefault(other.subject_key, []).append(other)
        level = [self._leaf]
        self._ends[self._leaf] = self._is_end(self._leaf)
        for _ in range(MAX_DEPTH):
            self._issuers |= {subject: [] for subject in level}
            pairs = [
                (issuer, subject)
                for subject in level
                if not self._ends[subject]
                for issuer in by_name.get(subject.issuer_key, ())
            ]
            level = []
            for issuer, subject in sorted(pairs, key=self._order):
                # A root of version 1 has no basicConstraints: it must be self-signed or pinned.
                trusted = _is_ca(issuer) or self._is_end(issuer)
                if trusted and self._proven(issuer, subject):
                    self._issuers[subject].append(issuer)
                    if issuer not in self._ends:
                        # Now, before MAX_VERIFICATIONS is used up by others.
                        self._ends[issuer] = self._is_end(issuer)
                        level.append(issuer)

    def _order(self, pair: tuple[Certificate, Certificate]) -> tuple[Any, ...]:
        # The order matters because verifications are limited: first the supplied certificates, then
        # those with a matching key identifier (RFC 5280 section 4.2.1.1).
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
        # By key, not by certificate: cross-signed CAs share a key and need one verification.
        pair = (issuer.spki_der, subject.sha256)
        if pair not in self._proofs:
            if len(self._proofs) >= MAX_VERIFICATIONS:
                self._cut_short = True
                return False
            self._proofs[pair] = is_signed_by(subject, issuer, self._keys)
        return self._proofs[pair]

    def _find(self) -> None:
        for valid in (True, False):
            usable = [each for each in self._ends if not valid or each.valid_at(self._now)]
            roots = [
                each
                for each in usable
                if self._ends[each] and (self._pin is None or each.sha256 == self._pin)
            ]
            # Without a pin a path may also end at any certificate, if nothing can follow.
            for ends in [roots] if self._pin else [roots, usable]:
                # A short path first: it is the result if the search by all criteria is cut short.
                for self._by_length in (True, False):
                    self._set_bounds(usable, ends)
                    self._steps = 0
                    if self._best:
                        self._best_merit = reduce(_Merit.below, map(self._merit, self._best))
                    if self._leaf in self._bounds:
                        self._extend((self._leaf,), self._merit(self._leaf), frozenset(ends))
                if self._best:
                    return

    def _merit(self, certificate: Certificate) -> _Merit:
        if self._by_length:
            return _Merit(0, self._now, -1)
        return _Merit(int(certificate.sha256 in self._preferred), certificate.not_after, -1)

    def _set_bounds(self, usable: list[Certificate], ends: list[Certificate]) -> None:
        """
        Set the upper bound of the merit of all paths from each certificate over *usable* ones to
        *ends*. It ignores loops, pathLenConstraint and name constraints, so it is never too low.
        """
        self._bounds = own = {end: self._merit(end) for end in ends}
        for _ in range(MAX_DEPTH):
            before, self._bounds = self._bounds, dict(own)
            for subject in usable:
                above = [before[each] for each in self._issuers.get(subject, ()) if each in before]
                if above:
                    through = self._merit(subject).below(_upper_bound(above))
                    self._bounds[subject] = _upper_bound([own.get(subject, through), through])
            if self._bounds == before:
                return

    def _extend(
        self, path: tuple[Certificate, ...], so_far: _Merit, ends: frozenset[Certificate]
    ) -> None:
        following = self._following(path)
        if not following and path[-1] in ends and self._is_better(so_far, path):
            self._best, self._best_merit = path, so_far
        bounded = [
            (so_far.below(self._bounds[issuer]), issuer)
            for issuer in following
            if issuer in self._bounds
        ]
        # Highest bound first, lowest SHA-256 among equals: the sort is stable.
        for bound, issuer in sorted(bounded, key=lambda pair: pair[0], reverse=True):
            self._steps += 1
            if not self._is_better(bound, (*path, issuer)):
                continue
            if self._steps > MAX_STEPS:
                self._cut_short = True
                return
            self._extend((*path, issuer), so_far.below(self._merit(issuer)), ends)
            if self._by_length and self._best:
                return

    def _is_better(self, merit: _Merit, path: Sequence[Certificate]) -> bool:
        if not self._best or merit != self._best_merit:
            return not self._best or merit > self._best_merit
        # A path with an equal prefix may still become the lower one.
        mine = [certificate.sha256 for certificate in path]
        return mine <= [certificate.sha256 for certificate in self._best[: len(mine)]]

    def _following(self, path: tuple[Certificate, ...]) -> list[Certificate]:
        last = path[-1]
        if len(path) >= MAX_DEPTH or self._ends[last]:
            return []
        seen = {(passed.subject_key, passed.spki_der) for passed in path}
        # RFC 5280 section 4.2.1.9: self-issued certificates and the leaf do not count.
        counted = [passed for passed in path[1:] if not passed.self_issued]
        return sorted(
            (
                issuer
                for issuer in self._issuers.get(last, ())
                if (issuer.subject_key, issuer.spki_der) not in seen
                and (issuer.path_length is None or len(counted) <= issuer.path_length)
                and all(issuer.allows(each) for each in (path[0], *counted))
            ),
            key=lambda issuer: issuer.sha256,
        )


def _upper_bound(merits: Iterable[_Merit]) -> _Merit:
    preferred, weakest, nearness = zip(*merits, strict=True)
    return _Merit(max(preferred), max(weakest), max(nearness))


def _is_ca(certificate: Certificate) -> bool:
    # RFC 5280 section 4.2: an unknown critical extension makes a certificate unusable.
    return (
        certificate.is_ca
        and not certificate.unknown_critical
        and (certificate.key_usage is None or "keyCertSign" in certificate.key_usage)
    )


def _is_old_root(certificate: Certificate) -> bool:
    # Version 1 has no extensions; RFC 5280 section 6.1.1 (d) requires none of a trust anchor.
    return certificate.version == 1 and certificate.self_issued


def gap(chain: Chain) -> str:
    """The reason why a chain is incomplete, for messages."""
    last = chain.certificates[-1]
    if not chain.unproven:
        return f"no certificate of '{last.issuer}', which issued '{last.subject}', was found"
    return (
        f"'{last.subject}' names '{last.issuer}' as its issuer, "
        f"but none of the {chain.unproven} certificates of that name can have issued it "
        "(another key, a signature by MD5 or SHA-1, not a CA, an unknown critical extension, "
        "name constraints, or a path length constraint)"
    )


def normal_sha256(sha256: str | None) -> str | None:
    """A fingerprint in lower case without colons; tools print other forms as well."""
    return None if sha256 is None else sha256.replace(":", "").strip().lower()
