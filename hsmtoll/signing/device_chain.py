"""
The certificate chain of a device's key: chosen, verified, cached, and chosen again after
Maskinporten has rejected a new leaf.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from hsmtoll.errors import CertificateError, HsmTollError
from hsmtoll.signing.device_certificates import (
    public_keys,
    read_certificates_and_key,
    readable,
    unread_of,
)
from hsmtoll.x509 import leaf_choice
from hsmtoll.x509.certificate_files import Bundle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from hsmtoll.apis import Identity
    from hsmtoll.clock import Clock
    from hsmtoll.hsm.device import Device
    from hsmtoll.hsm.facts import KeyFacts, StoredCertificate
    from hsmtoll.jws import RsaPublicKey
    from hsmtoll.signing.grant import Grant, SignedGrant
    from hsmtoll.token import ClockReading, TokenRequest
    from hsmtoll.x509 import path_building
    from hsmtoll.x509.certificate import Certificate

__all__ = ["CERTIFICATE_CACHE_TTL", "DeviceChain", "KeyListState", "ProvenChain"]

_log = logging.getLogger(__name__)

#: Seconds. Certificates are read from the device at most this often.
CERTIFICATE_CACHE_TTL: Final = 60.0

#: Seconds after it became active in which a rejected certificate gives way to an older one.
_NEW_CERTIFICATE_PERIOD: Final = 86_400.0


@dataclass(slots=True)
class KeyListState:
    """
    State shared by all keys of HSMTOLL_HSM__KEY. *organization*: for which all of them must sign,
    that of the first leaf used. *refused*: SHA-256 of each new leaf that Maskinporten has rejected
    → time (epoch seconds) until which an older leaf is preferred.
    """

    organization: str | None = None
    refused: dict[str, float] = field(default_factory=dict)

    def unwanted(self, now: float) -> frozenset[str]:
        """SHA-256 of the leaves to avoid at *now* (epoch seconds)."""
        return frozenset(sha256 for sha256, until in self.refused.items() if now < until)


@dataclass(frozen=True, slots=True)
class ProvenChain:
    """
    A verified chain and its *x5c*. It may be used without reading the device again before *boot*
    (boot clock, seconds) and *wall* (epoch seconds; then a known certificate becomes valid or
    expires), while `Device.generation`, the leaves to avoid and the supplied bundle stay the same.
    *grants* caches the unsigned grants with this x5c.
    """

    chain: path_building.Chain
    x5c: tuple[str, ...]
    boot: float
    wall: float
    generation: int
    unwanted: frozenset[str]
    supplied: Bundle
    grants: dict[TokenRequest, Grant] = field(default_factory=dict)


class DeviceChain:
    """
    The chain of the key of *device*, built from the certificates on the device and those of
    *supplied*, which returns another bundle when they have changed.

    *identity*: the rules for the leaf. *root_sha256*, *certificate_sha256*: the only root and leaf
    that are accepted, where they are set.
    """

    def __init__(
        self,
        device: Device,
        *,
        identity: Identity,
        clock: Clock,
        x5c: path_building.X5cMode = "full",
        supplied: Callable[[], Bundle] = Bundle,
        root_sha256: str | None = None,
        certificate_sha256: str | None = None,
        key_list_state: KeyListState | None = None,
    ) -> None:
        self._device = device
        self.family = identity
        self._clock = clock
        self._x5c = x5c
        self._supplied = supplied
        self._root_sha256 = root_sha256
        self._certificate_sha256 = certificate_sha256
        self._key_list_state = key_list_state or KeyListState()
        self._proven: ProvenChain | None = None
        # The bundle of the last valid chain, and the newer one that gave none.
        self._last_valid_bundle: Bundle | None = None
        self._rejected_bundle: Bundle | None = None
        # Since when (epoch seconds) each leaf has been in use instead of an older one.
        self._since: dict[str, float] = {}
        #: The leaf in use; None before the first chain.
        self.leaf: Certificate | None = None
        #: Public keys that may be the device's, if the device hides its own.
        self.candidate_keys: tuple[RsaPublicKey, ...] = ()
        #: The one of them that has verified a signature.
        self.verified_key: RsaPublicKey | None = None

    def forget(self) -> None:
        """Read the device again next time."""
        self._proven = None

    def current(self) -> ProvenChain:
        """
        The verified chain; CertificateError if there is none, and the errors of the device.

        Read again every 60 s, after the device was reopened, and when a certificate becomes valid
        or expires, so that a new certificate is used without a restart.
        """
        now = self._clock.now()
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
        for stored, key in read_certificates_and_key(self._device, given, near=True):
            # If the device hides the public key, the grant's signature shows which leaf is right.
            self.candidate_keys = () if key.public else public_keys([*readable(stored), *given])
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
        self._proven = known = ProvenChain(
            chain,
            chain.x5c(self._x5c),
            boot=now.boot + CERTIFICATE_CACHE_TTL,
            wall=min(
                (edge for edge in edges if edge > now.wall),
                default=now.wall + CERTIFICATE_CACHE_TTL,
            ),
            generation=self._device.generation,
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
        """The chain of *key* with *supplied*, and all certificates that were considered."""
        pool = [*readable(stored), *supplied.certificates]
        public = key.public or self.verified_key
        leaves = (
            leaf_choice.for_key(pool, public)
            if public
            else self._candidate_leaves(stored, supplied, key)
        )
        unread = unread_of(stored, supplied, key)
        chain = self._choose_chain(leaves, pool, supplied, at, unwanted=unwanted, unread=unread)
        return chain, pool

    def _cached_chain(self, now: ClockReading, unwanted: frozenset[str]) -> ProvenChain | None:
        """The last chain, if it may be used without reading the device again."""
        known = self._proven
        fresh = known is not None and (
            now.boot < known.boot
            and now.wall < known.wall
            and known.unwanted == unwanted
            and known.generation == self._device.generation
            and known.supplied is self._supplied()
        )
        return known if fresh else None

    def _candidate_leaves(
        self, stored: Sequence[StoredCertificate], supplied: Bundle, key: KeyFacts
    ) -> list[Certificate]:
        """Leaves that match the key by CKA_ID, else by label, else all leaves."""
        for certificates in (
            readable(each for each in stored if key.id and each.id == key.id),
            readable(each for each in stored if key.label and each.label == key.label),
            [*readable(stored), *supplied.certificates],
        ):
            found = [each for each in certificates if each.public_key and not each.is_ca]
            if found:
                return found
        return []

    def _set_active_leaf(self, leaf: Certificate, now: float) -> None:
        before, self.leaf = self.leaf, leaf
        if before is not None and before != leaf:
            _log.info("certificate %s takes over from %s", leaf.sha256[:16], before.sha256[:16])
        newer = before is not None and before.not_before < leaf.not_before
        self._since.setdefault(leaf.sha256, now if newer else 0.0)
        if self._key_list_state.organization is None:
            self._key_list_state.organization = leaf.consumer_id(self.family)

    def rejected(self, grant: SignedGrant, code: str) -> bool:
        """
        As `Signer.rejected`. If the rejected leaf became active less than 24 h ago, an older valid
        leaf is preferred from now on, with a warning. Returns whether the device has one.
        """
        leaf, now = self.leaf, self._clock.now().wall
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
            "is used if there is a valid one: run `hsmtoll doctor`",
            leaf.sha256[:16],
            code,
        )
        try:
            return self.current().chain.leaf != leaf
        except HsmTollError:
            return False

    def rejected_lately(self) -> bool:
        """Whether the leaf in use was rejected within 24 h of becoming active. Without I/O."""
        unwanted = self._key_list_state.unwanted(self._clock.now().wall)
        return self.leaf is not None and self.leaf.sha256 in unwanted

    def without_pin(self) -> path_building.Chain:
        """
        The chain without login: the leaf is chosen by the label or id of the key, and *not
        verified* to belong to the private key.
        """
        stored = self._device.certificates()
        supplied = self._supplied()
        uri = self._device.uri
        named = [each for each in stored if uri.matches(object=each.label, id=each.id)]
        pool = [*readable(stored), *supplied.certificates]
        leaves = readable(named)
        keys = {each.public_key for each in leaves if each.public_key and not each.is_ca}
        # A renewed certificate may be in the file only.
        leaves += [each for each in supplied.certificates if each.public_key in keys]
        leaves = leaves or [each for each in pool if not each.is_ca]
        now = datetime.fromtimestamp(self._clock.now().wall, UTC)
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
            identity=self.family,
            now=now,
            mode=self._x5c,
            root_sha256=self._root_sha256,
            preferred=frozenset(certificate.sha256 for certificate in supplied.certificates),
            pinned_sha256=self._certificate_sha256,
            organization=self._key_list_state.organization,
            refused=unwanted,
            unread=unread,
        )
