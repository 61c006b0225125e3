"""
From a request to a signed assertion: the device's key, the proven chain, the grant, the check.

HTTP never enters. Nothing here takes bytes to sign from anybody.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Protocol

from hsmtoll import jws
from hsmtoll.errors import (
    CertificateError,
    ConfigurationError,
    DeviceError,
    GrantRefused,
    HsmTollError,
    UsageError,
    foreign,
)
from hsmtoll.signing.grant import LIFETIME, MIN_LEFT, Grant, SignedGrant
from hsmtoll.x509 import leaf_choice, path_building
from hsmtoll.x509.certificate import Certificate
from hsmtoll.x509.certificate_files import Bundle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from hsmtoll.apis import Identity
    from hsmtoll.clock import Clock, Skew
    from hsmtoll.hsm.device import Device
    from hsmtoll.hsm.facts import KeyFacts, StoredCertificate
    from hsmtoll.token import ClockReading, TokenRequest

__all__ = [
    "FailoverSigner",
    "KeyListState",
    "LocalSigner",
    "OneTimeAssertion",
    "Signer",
    "new_jti",
    "read_certificates_and_key",
    "readable",
    "unread_of",
]

_log = logging.getLogger("hsmtoll.signing.signer")

#: Seconds. Certificates are read from the device at most this often.
_CERTIFICATE_CACHE_TTL: Final = 60.0

#: Seconds. So long a certificate counts as new, and one that it replaced is fallen back on.
_NEW_CERTIFICATE_PERIOD: Final = 86_400.0


def new_jti() -> str:
    """A value for jti that no grant has had: 128 random bits, as 32 hexadecimal digits."""
    return os.urandom(16).hex()


class Signer(Protocol):
    """Makes signed grants, with a key here or elsewhere."""

    def known_identity(self) -> str | None:
        """`SignedGrant.identity` of the next grant, as far as it is known without any I/O."""

    def sign(self, request: TokenRequest, *, jti: str) -> SignedGrant:
        """One grant for *request*: a new signature each time."""

    def rejected(self, grant: SignedGrant, code: str) -> bool:
        """
        Called when Maskinporten rejected the certificate of *grant* with *code*. Returns whether a
        new grant may be accepted.
        """


@dataclass(slots=True)
class KeyListState:
    """
    State shared by all keys of HSMTOLL_HSM__KEY. *organization*: that they sign for, learned from
    the first certificate. *refused*: leaves that Maskinporten rejected, by SHA-256, with the time
    (epoch seconds) until which an older leaf is preferred.
    """

    organization: str | None = None
    refused: dict[str, float] = field(default_factory=dict)

    def unwanted(self, now: float) -> frozenset[str]:
        """The leaves that are not to be used at *now*."""
        return frozenset(sha256 for sha256, until in self.refused.items() if now < until)


@dataclass(frozen=True, slots=True)
class _ProvenChain:
    """
    A verified chain, its *x5c*, and the conditions for using it again without reading the device:
    before *boot* (boot clock) and *wall* (epoch seconds, when a known certificate becomes valid or
    expires), the same *generation* of device handles, and the same *supplied* bundle.
    """

    chain: path_building.Chain
    x5c: tuple[str, ...]
    boot: float
    wall: float
    generation: int
    unwanted: frozenset[str]
    supplied: Bundle
    grants: dict[TokenRequest, Grant] = field(default_factory=dict)


class LocalSigner:
    """
    Signs on a PKCS#11 device.

    *kid* ``None`` means certificates: the chain is built from the device's and those *supplied*
    (another bundle where they changed), and proven. ``thumbprint`` means the RFC 7638 thumbprint
    of the key found. Every signature is checked against the public key it claims before it
    leaves. Raises the errors of the device (20, 21, 30), of certificates (40) and of settings
    (10).
    """

    def __init__(
        self,
        device: Device,
        *,
        audience: str,
        identity: Identity,
        clock: Clock,
        skew: Skew,
        alg: str = "RS256",
        issuer: str | None = None,
        kid: str | None = None,
        x5c: path_building.X5cMode = "full",
        supplied: Callable[[], Bundle] = Bundle,
        root_sha256: str | None = None,
        certificate_sha256: str | None = None,
        key_list_state: KeyListState | None = None,
    ) -> None:
        self.device = device
        self._audience = audience
        self._family = identity
        self.clock = clock
        self._skew = skew
        self.alg = alg
        self._issuer = issuer
        self._kid = kid
        self._x5c = x5c
        self._supplied = supplied
        # What was supplied when the chain last held, and what came since and did not do.
        self._last_valid_bundle: Bundle | None = None
        self._rejected_bundle: Bundle | None = None
        self._root_sha256 = root_sha256
        self._certificate_sha256 = certificate_sha256
        self._key_list_state = key_list_state or KeyListState()
        self._proven: _ProvenChain | None = None
        # With a kid: the public key, until when (boot), and for which handles of the device.
        self._bare_public_key: tuple[jws.RsaPublicKey, float, int] | None = None
        # Public keys that may be the device's, where it does not tell which one is.
        self._candidate_keys: tuple[jws.RsaPublicKey, ...] = ()
        # The one of them that a signature showed to be it.
        self._verified_key: jws.RsaPublicKey | None = None
        # Who signs, once the key or the certificate was looked at.
        self._identity: str | None = None
        # The leaf in use, and since when each one seen took over from an older one here.
        self._leaf: Certificate | None = None
        self._since: dict[str, float] = {}

    def known_identity(self) -> str | None:
        """As `Signer.known_identity`: of the key or certificate that was last looked at."""
        return self._identity

    def chain(self) -> path_building.Chain:
        """
        The verified chain of the device's key; CertificateError if there is none.

        Read again every 60 s, after the device was reopened, and when a certificate becomes valid
        or expires, so that a new certificate is used without a restart.
        """
        return self._current_chain().chain

    def _current_chain(self) -> _ProvenChain:
        now = self.clock.now()
        unwanted = self._key_list_state.unwanted(now.wall)
        known = self._cached_chain(now, unwanted)
        if known is not None:
            return known
        self._proven = None
        supplied = self._supplied()
        before = self._last_valid_bundle if self._last_valid_bundle is not supplied else None
        given = [*supplied.certificates, *(before.certificates if before is not None else ())]
        at = datetime.fromtimestamp(now.wall, UTC)
        errors: list[CertificateError] = []
        for stored, key in read_certificates_and_key(self.device, given, near=True):
            # If the device hides the public key, the grant's signature shows which leaf is right.
            self._candidate_keys = () if key.public else _keys([*readable(stored), *given])
            try:
                chain, pool = self._build_with_fallback(
                    stored, key, at, unwanted, supplied=supplied, before=before
                )
                break
            except CertificateError as exc:
                errors.append(exc)
        else:
            # The first read may be incomplete; the second includes all certificates.
            raise errors[1]
        self._set_active_leaf(chain.leaf, now.wall)
        edges = {end.timestamp() for c in pool for end in (c.not_before, c.not_after)}
        self._proven = known = _ProvenChain(
            chain,
            chain.x5c(self._x5c),
            boot=now.boot + _CERTIFICATE_CACHE_TTL,
            wall=min(
                (edge for edge in edges if edge > now.wall),
                default=now.wall + _CERTIFICATE_CACHE_TTL,
            ),
            generation=self.device.generation,
            unwanted=unwanted,
            supplied=supplied,
        )
        return known

    def _build_with_fallback(
        self,
        stored: Sequence[StoredCertificate],
        key: KeyFacts,
        at: datetime,
        unwanted: frozenset[str],
        *,
        supplied: Bundle,
        before: Bundle | None,
    ) -> tuple[path_building.Chain, list[Certificate]]:
        """Build the chain with *supplied*; if that fails, with the bundle supplied *before*."""
        try:
            found = self._build_chain(supplied, stored, key, at, unwanted)
        except CertificateError as exc:
            if before is None:
                raise
            try:
                found = self._build_chain(before, stored, key, at, unwanted)
            except CertificateError:
                raise exc from None
            if self._rejected_bundle is not supplied:
                self._rejected_bundle = supplied
                _log.warning("%s; the certificates supplied before are kept", exc)
        else:
            self._last_valid_bundle, self._rejected_bundle = supplied, None
        return found

    def _build_chain(
        self,
        supplied: Bundle,
        stored: Sequence[StoredCertificate],
        key: KeyFacts,
        at: datetime,
        unwanted: frozenset[str],
    ) -> tuple[path_building.Chain, list[Certificate]]:
        """The chain of *key* with what was *supplied*, and all certificates that were looked at."""
        pool = [*readable(stored), *supplied.certificates]
        public = key.public or self._verified_key
        leaves = (
            leaf_choice.for_key(pool, public)
            if public
            else self._candidate_leaves(stored, supplied, key)
        )
        unread = unread_of(stored, supplied, key)
        chain = self._choose_chain(leaves, pool, supplied, at, unwanted=unwanted, unread=unread)
        return chain, pool

    def _cached_chain(self, now: ClockReading, unwanted: frozenset[str]) -> _ProvenChain | None:
        """What was proven, if nothing has to be looked at again."""
        known = self._proven
        fresh = known is not None and (
            now.boot < known.boot
            and now.wall < known.wall
            and known.unwanted == unwanted
            and known.generation == self.device.generation
            and known.supplied is self._supplied()
        )
        return known if fresh else None

    def _candidate_leaves(
        self, stored: Sequence[StoredCertificate], supplied: Bundle, key: KeyFacts
    ) -> list[Certificate]:
        """Leaves that match the key by CKA_ID, else by label, else all leaves."""
        for named in (
            readable(each for each in stored if key.id and each.id == key.id),
            readable(each for each in stored if key.label and each.label == key.label),
            [*readable(stored), *supplied.certificates],
        ):
            found = [each for each in named if each.public_key and not each.is_ca]
            if found:
                return found
        return []

    def _set_active_leaf(self, leaf: Certificate, now: float) -> None:
        before, self._leaf = self._leaf, leaf
        self._identity = leaf.sha256
        if before is not None and before != leaf:
            _log.info("certificate %s takes over from %s", leaf.sha256[:16], before.sha256[:16])
        newer = before is not None and before.not_before < leaf.not_before
        self._since.setdefault(leaf.sha256, now if newer else 0.0)
        if self._key_list_state.organization is None:
            self._key_list_state.organization = leaf.consumer_id(self._family)

    def rejected(self, grant: SignedGrant, code: str) -> bool:
        """
        As `Signer.rejected`. If the rejected leaf became active less than 24 h ago, an older valid
        leaf is preferred from now on, with a warning. Returns whether the device has one.
        """
        leaf, now = self._leaf, self.clock.now().wall
        if leaf is None:
            return False
        if leaf.sha256 != grant.identity or self.rejected_lately():
            # A concurrent renewal may have switched to an older leaf already.
            unwanted = self._key_list_state.unwanted(now)
            return grant.identity in unwanted and leaf.sha256 not in unwanted
        began = max(leaf.not_before.timestamp(), self._since[leaf.sha256])
        if now >= began + _NEW_CERTIFICATE_PERIOD:
            return False
        self._key_list_state.refused[leaf.sha256] = began + _NEW_CERTIFICATE_PERIOD
        _log.warning(
            "certificate-refused: Maskinporten refused the new certificate %s (%s); an older one "
            "is used where one lives: run `hsmtoll doctor`",
            leaf.sha256[:16],
            code,
        )
        try:
            return self.chain().leaf != leaf
        except HsmTollError:
            return False

    def rejected_lately(self) -> bool:
        """Whether the leaf in use was rejected in its first day; the device is not asked."""
        unwanted = self._key_list_state.unwanted(self.clock.now().wall)
        return self._leaf is not None and self._leaf.sha256 in unwanted

    def chain_without_pin(self) -> path_building.Chain:
        """
        The chain without login: the leaf is chosen by the label or id of the key, and *not
        verified* to belong to the private key.
        """
        stored = self.device.certificates()
        supplied = self._supplied()
        uri = self.device.uri
        named = [each for each in stored if uri.matches(object=each.label, id=each.id)]
        pool = [*readable(stored), *supplied.certificates]
        beside = readable(named)
        keys = {each.public_key for each in beside if each.public_key and not each.is_ca}
        # A renewed certificate may be in the file only.
        beside += [each for each in supplied.certificates if each.public_key in keys]
        leaves = beside or [each for each in pool if not each.is_ca]
        now = datetime.fromtimestamp(self.clock.now().wall, UTC)
        unread = unread_of(stored, supplied, named=named)
        return self._choose_chain(leaves, pool, supplied, now, unread=unread)

    def _choose_chain(
        self,
        leaves: Iterable[Certificate],
        pool: Iterable[Certificate],
        supplied: Bundle,
        now: datetime,
        *,
        unwanted: frozenset[str] = frozenset(),
        unread: Sequence[leaf_choice.Unread],
    ) -> path_building.Chain:
        return leaf_choice.checked(
            leaves,
            pool,
            identity=self._family,
            now=now,
            mode=self._x5c,
            root_sha256=self._root_sha256,
            preferred=frozenset(certificate.sha256 for certificate in supplied.certificates),
            pinned_sha256=self._certificate_sha256,
            organization=self._key_list_state.organization,
            refused=unwanted,
            unread=unread,
        )

    def sign(self, request: TokenRequest, *, jti: str) -> SignedGrant:
        """
        Build a grant, sign it on the device, and verify the signature with the public key.

        ``iat`` is taken once the device is unlocked; a grant with fewer than 30 s left after
        signing is not given out (RFC 7523 section 3).
        """
        try:
            return self._sign_once(request, jti)
        except HsmTollError as exc:
            # Read the device again next time.
            self._proven = self._bare_public_key = None
            if exc.code == "signature-wrong":
                self._verified_key = None
            raise

    def _sign_once(self, request: TokenRequest, jti: str) -> SignedGrant:
        try:
            leaf, key, grant = self._prepare(request)
        except HsmTollError as exc:
            # The error occurred before signing.
            exc.signed = False
            raise
        began = self.clock.now()
        issued_at = int(began.wall + self._skew.seconds)
        unsigned = grant.unsigned(now=issued_at, jti=jti)
        made = self.device.sign(self.alg, unsigned, candidates=(key, *self._candidate_keys))
        if made.by in self._candidate_keys and made.by != key:
            self._verified_key = made.by
            raise DeviceError(
                "signing: the signature belongs to another certificate than the one tried first",
                hint="it is known now which one: try again; or set HSMTOLL_HSM__PUBLIC_KEY",
                code="leaf-guessed",
                scope="attempt",
                retryable=True,
            )
        if made.by != key:
            raise DeviceError(
                "signing: the device's signature does not verify with the public key",
                hint="key and certificate may not belong together, or the device is faulty\n"
                "run `hsmtoll doctor`: it looks for the cause",
                code="signature-wrong",
            )
        took = self.clock.now().boot - began.boot
        if LIFETIME - took < MIN_LEFT:
            raise DeviceError(
                f"signing: the device took {took:.0f} s, which leaves a grant too little time",
                hint=f"a grant lives {LIFETIME} s; look at the device and the way to it",
                code="device-slow",
            )
        return SignedGrant(
            jws.compact(unsigned, made.value),
            jti=jti,
            scope=request.scope,
            issued_at=issued_at,
            expires_at=issued_at + LIFETIME,
            identity=leaf.sha256 if leaf is not None else _sha256(key),
            not_after=leaf.not_after if leaf is not None else None,
        )

    def _prepare(self, request: TokenRequest) -> tuple[Certificate | None, jws.RsaPublicKey, Grant]:
        """The leaf (``None`` with a kid), the key, and what is to be signed with it."""
        if self._kid is not None:
            key = self._public_key()
            return None, key, self._grant_by_kid(request, key, self._kid)
        known = self._current_chain()
        leaf = known.chain.leaf
        return leaf, _key_of(leaf), self._grant_by_leaf(request, known)

    def _grant_by_kid(self, request: TokenRequest, key: jws.RsaPublicKey, kid: str) -> Grant:
        if self._issuer is None:
            raise _no_client_id()
        named = key.thumbprint() if kid == "thumbprint" else kid
        return Grant(self.alg, self._issuer, self._audience, request, kid=named)

    def _grant_by_leaf(self, request: TokenRequest, known: _ProvenChain) -> Grant:
        made = known.grants.get(request)
        if made is not None:
            return made
        leaf, issuer = known.chain.leaf, self._issuer
        if issuer is None:
            if self._family == "norwegian":
                raise _no_client_id()
            # For an eSeal any name will do, and its own is the one to be found in a log.
            issuer = leaf.organization_name or leaf.common_name or "hsmtoll"
        made = Grant(self.alg, issuer, self._audience, request, x5c=known.x5c)
        known.grants[request] = made
        return made

    def _public_key(self) -> jws.RsaPublicKey:
        """The public key, for a grant with kid; read as often as a chain."""
        now = self.clock.now()
        known = self._cached_public_key(now)
        if known is not None:
            return known
        self._bare_public_key = None
        beside = readable(self.device.certificates(near=True))
        facts = self.device.key(candidates=_keys(beside))
        if facts.public is None:
            raise DeviceError(
                "key: the device does not show its public half",
                hint="set HSMTOLL_HSM__PUBLIC_KEY to a PEM file with the public key",
                code="public-key-hidden",
            )
        self._bare_public_key = (
            facts.public,
            now.boot + _CERTIFICATE_CACHE_TTL,
            self.device.generation,
        )
        self._identity = _sha256(facts.public)
        return facts.public

    def _cached_public_key(self, now: ClockReading) -> jws.RsaPublicKey | None:
        """That of `_public_key`, if it does not have to be read again."""
        if self._bare_public_key is None:
            return None
        key, until, generation = self._bare_public_key
        return key if now.boot < until and generation == self.device.generation else None


def _sha256(key: jws.RsaPublicKey) -> str:
    return hashlib.sha256(key.spki()).hexdigest()


def _key_of(leaf: Certificate) -> jws.RsaPublicKey:
    if leaf.public_key is None:
        raise CertificateError("the leaf's key is not RSA", code="certificate-key")
    return leaf.public_key


def _no_client_id() -> ConfigurationError:
    return ConfigurationError(
        "HSMTOLL_ISS: required with HSMTOLL_IDENTITY=norwegian",
        hint="set it to the client id from Samarbeidsportalen",
        code="setting-missing",
    )


def read_certificates_and_key(
    device: Device, given: Sequence[Certificate], *, near: bool = False
) -> Iterator[tuple[tuple[StoredCertificate, ...], KeyFacts]]:
    """
    What the *device* shows: its certificates, with *near* first those that lie with the key alone
    (`Device.certificates`), and its key. For those whom that does not do: the same after a login
    that its flags do not ask for; at last with the certificates of the module's other devices.
    *given* is what a file has.
    """

    def seen(*, near: bool = False) -> tuple[tuple[StoredCertificate, ...], KeyFacts]:
        stored = device.certificates(near=near)
        generation = device.generation
        key = device.key(candidates=_keys([*readable(stored), *given]))
        if device.generation != generation:
            # A login in between may have made more certificates visible.
            stored = device.certificates(near=near)
        return stored, key

    if near:
        yield seen(near=True)
    stored, key = seen()
    yield stored, key
    generation = device.generation
    device.certificates(force_login=True)
    if device.generation != generation:
        stored, key = seen()
        yield stored, key
    try:
        others = device.other_certificates()
    except DeviceError:
        return
    if others:
        _log.info("looking for certificates on the module's other devices")
        yield (*stored, *others), key


def readable(stored: Iterable[StoredCertificate]) -> list[Certificate]:
    """The certificates that can be parsed; others are skipped."""
    return [each for _, each, _ in _parsed(stored) if each is not None]


def _parsed(
    stored: Iterable[StoredCertificate],
) -> Iterator[tuple[StoredCertificate, Certificate | None, str]]:
    """Each with its certificate, or with why it cannot be read."""
    for one in stored:
        if one.problem is not None:
            yield one, None, one.problem
            continue
        try:
            yield one, Certificate.load(one.der), ""
        except ValueError as exc:
            _log.info("certificate %r is passed over: %s", foreign(one.label), exc)
            yield one, None, str(exc)


def unread_of(
    stored: Iterable[StoredCertificate],
    supplied: Bundle,
    key: KeyFacts | None = None,
    named: Sequence[StoredCertificate] = (),
) -> tuple[leaf_choice.Unread, ...]:
    """
    The certificates that do not parse. One is taken for the *key*'s own by CKA_ID, label or
    modulus, or where it is *named*.
    """
    modulus = None
    if key is not None and key.public is not None:
        modulus = key.public.modulus.to_bytes((key.public.bits + 7) // 8, "big")

    def of_key(raw: bytes) -> bool:
        return modulus is not None and modulus in raw

    found = []
    for each, certificate, why in _parsed(stored):
        if certificate is not None:
            continue
        own = each in named or of_key(each.der)
        if key is not None:
            own |= bool(key.id and each.id == key.id)
            own |= bool(key.label and each.label == key.label)
        where = f"certificate '{foreign(each.label)}' on the device"
        found.append(leaf_choice.Unread(where, why, own))
    found += [leaf_choice.Unread(u.where, u.why, of_key(u.der)) for u in supplied.unreadable]
    return tuple(found)


def _keys(certificates: Iterable[Certificate]) -> tuple[jws.RsaPublicKey, ...]:
    return tuple({c.public_key for c in certificates if c.public_key is not None})


#: Errors after which the next key is tried. A wrong PIN is not among them: the user must correct it
#: first.
_FAILOVER_ERRORS: Final = (DeviceError, CertificateError)


class FailoverSigner:
    """
    Several keys in order: the first usable one signs (device up, certificate valid now). One
    whose new certificate was rejected lately comes after the others. A device that is down is
    asked again after a back-off of its own: until then it answers ``device-down`` at once.
    """

    def __init__(self, signers: Sequence[LocalSigner]) -> None:
        self._signers = tuple(signers)
        self._in_use = self._signers[0] if self._signers else None

    def known_identity(self) -> str | None:
        """As `Signer.known_identity`, of the key that signed last."""
        return self._in_use.known_identity() if self._in_use is not None else None

    def sign(self, request: TokenRequest, *, jti: str) -> SignedGrant:
        """A grant of the first usable key; the first one's error if none is."""
        first: HsmTollError | None = None
        for signer in sorted(self._signers, key=LocalSigner.rejected_lately):
            try:
                grant = signer.sign(request, jti=jti)
            except _FAILOVER_ERRORS as exc:
                # The first key's error is raised if all fail.
                first = first or exc
                first.signed |= exc.signed
            else:
                self._log_change(signer, first)
                return grant
        raise first or ConfigurationError("HSMTOLL_HSM__KEY: no key is named")

    def rejected(self, grant: SignedGrant, code: str) -> bool:
        """As `LocalSigner.rejected`; another key of the list will do as well."""
        for signer in self._signers:
            if signer.known_identity() == grant.identity:
                before = signer.rejected_lately()
                if signer.rejected(grant, code):
                    return True
                return not before and signer.rejected_lately() and len(self._signers) > 1
        return False

    def _log_change(self, signer: LocalSigner, why: HsmTollError | None) -> None:
        """One line where another key takes over, and one when the first is back."""
        if signer is self._in_use:
            return
        self._in_use = signer
        number, of = self._signers.index(signer) + 1, len(self._signers)
        _log.warning("key %d of %d signs now%s", number, of, f": {why}" if why else "")


class OneTimeAssertion:
    """
    A grant that was signed elsewhere and read from stdin; it can be used once.

    UsageError for what is not an assertion, ConfigurationError (code ``audience``) for one that
    was made for another environment: it would be refused there, and told to a stranger on the way.
    """

    def __init__(self, assertion: str, *, audience: str) -> None:
        try:
            _, claims = jws.read_unverified(assertion)
        except ValueError as exc:
            raise UsageError(
                f"assertion on stdin: {exc}", hint="it is what `hsmtoll sign` prints"
            ) from None
        if claims.get("aud") != audience:
            raise ConfigurationError(
                f"assertion on stdin: made for {foreign(claims.get('aud'))}, not for {audience}",
                hint="sign and exchange with the same HSMTOLL_ENVIRONMENT",
                code="audience",
            )
        jti, iat, exp = (claims.get(name) for name in ("jti", "iat", "exp"))
        self.scope = str(claims.get("scope", ""))
        self._lock = threading.Lock()
        self._grant: SignedGrant | None = SignedGrant(
            assertion,
            jti=jti if isinstance(jti, str) else "",
            scope=self.scope,
            issued_at=iat if isinstance(iat, int) else 0,
            expires_at=exp if isinstance(exp, int) else 0,
            identity="",
            not_after=None,
        )

    def known_identity(self) -> None:
        """None: what is handed in is never cached."""

    def sign(self, request: TokenRequest, *, jti: str) -> SignedGrant:
        """The grant, the first time; GrantRefused (MP-012) after that."""
        del request, jti
        with self._lock:
            handed, self._grant = self._grant, None
        if handed is None:
            raise GrantRefused(
                "assertion on stdin: it was used, and a grant works once (MP-012)",
                hint="sign another one",
                code="MP-012",
            )
        return handed

    def rejected(self, grant: SignedGrant, code: str) -> bool:
        """False: there is no other one."""
        del grant, code
        return False
