"""
A Signer with the key of a PKCS#11 device: the leaf, the grant, the signature, the check.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from hsmtoll import jws
from hsmtoll.errors import CertificateError, ConfigurationError, DeviceError, HsmTollError
from hsmtoll.signing.device_certificates import public_keys, readable
from hsmtoll.signing.device_chain import CERTIFICATE_CACHE_TTL
from hsmtoll.signing.grant import LIFETIME, MIN_LEFT, Grant, SignedGrant

if TYPE_CHECKING:
    from collections.abc import Callable

    from hsmtoll.clock import Clock, Skew
    from hsmtoll.hsm.device import Device
    from hsmtoll.signing.device_chain import DeviceChain, ProvenChain
    from hsmtoll.token import ClockReading, TokenRequest
    from hsmtoll.x509.certificate import Certificate
    from hsmtoll.x509.path_building import Chain

__all__ = ["LocalSigner"]


class LocalSigner:
    """
    Signs on a PKCS#11 device.

    *kid* None means grants with x5c, the certificates of *chain*; ``thumbprint`` means the RFC 7638
    thumbprint of the device's key. *key_used* is called with the kid of each grant. Every signature
    is verified with the public key that the grant shows. Raises the errors of the device (exit
    codes 20, 21, 30), of certificates (40) and of settings (10).
    """

    def __init__(
        self,
        device: Device,
        chain: DeviceChain,
        *,
        audience: str,
        clock: Clock,
        skew: Skew,
        alg: str = "RS256",
        issuer: str | None = None,
        kid: str | None = None,
        key_used: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._device = device
        self._chain = chain
        self._audience = audience
        self._clock = clock
        self._skew = skew
        self._alg = alg
        self._issuer = issuer
        self._kid = kid
        self._key_used = key_used
        # With a kid: the public key, until when (boot clock), and for which handles of the device.
        self._bare_public_key: tuple[jws.RsaPublicKey, float, int] | None = None
        self._key_identity: str | None = None

    def known_identity(self) -> str | None:
        """As `Signer.known_identity`: of the key or certificate that was last read."""
        if self._kid is not None:
            return self._key_identity
        return self._chain.leaf.sha256 if self._chain.leaf is not None else None

    def chain(self) -> Chain:
        """The verified chain of the device's key; errors as `DeviceChain.current`."""
        return self._chain.current().chain

    def rejected(self, grant: SignedGrant, code: str) -> bool:
        """As `DeviceChain.rejected`."""
        return self._chain.rejected(grant, code)

    def rejected_lately(self) -> bool:
        """As `DeviceChain.rejected_lately`."""
        return self._chain.rejected_lately()

    def sign(self, request: TokenRequest, *, jti: str) -> SignedGrant:
        """
        Build a grant, sign it on the device, and verify the signature with the public key.

        ``iat`` is read after the login, which may take long. DeviceError (``device-slow``) if the
        grant has less than 30 s left after signing.
        """
        try:
            return self._sign_once(request, jti)
        except HsmTollError as exc:
            # Read the device again next time.
            self._chain.forget()
            self._bare_public_key = None
            if exc.code == "signature-wrong":
                self._chain.verified_key = None
            raise

    def _sign_once(self, request: TokenRequest, jti: str) -> SignedGrant:
        try:
            leaf, key, grant = self._prepare(request)
        except HsmTollError as exc:
            # The error occurred before signing.
            exc.signed = False
            raise
        began = self._clock.now()
        issued_at = int(began.wall + self._skew.seconds)
        unsigned = grant.unsigned(now=issued_at, jti=jti)
        made = self._device.sign(self._alg, unsigned, candidates=(key, *self._chain.candidate_keys))
        if made.by in self._chain.candidate_keys and made.by != key:
            self._chain.verified_key = made.by
            raise DeviceError(
                "signing: the signature belongs to another certificate than the one tried first",
                hint="the right one is known now: try again; or set HSMTOLL_HSM__PUBLIC_KEY",
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
        took = self._clock.now().boot - began.boot
        if LIFETIME - took < MIN_LEFT:
            raise DeviceError(
                f"signing: the device took {took:.0f} s, which leaves a grant too little time",
                hint=f"a grant lives {LIFETIME} s; look at the device and the way to it",
                code="device-slow",
            )
        if grant.kid is not None:
            self._key_used(grant.kid)
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
        """The leaf (None with a kid), the public key, and the unsigned grant."""
        if self._kid is not None:
            key = self._public_key()
            return None, key, self._grant_by_kid(request, key, self._kid)
        known = self._chain.current()
        leaf = known.chain.leaf
        return leaf, _key_of(leaf), self._grant_by_leaf(request, known)

    def _grant_by_kid(self, request: TokenRequest, key: jws.RsaPublicKey, kid: str) -> Grant:
        if self._issuer is None:
            raise _no_client_id()
        named = key.thumbprint() if kid == "thumbprint" else kid
        return Grant(self._alg, self._issuer, self._audience, request, kid=named)

    def _grant_by_leaf(self, request: TokenRequest, known: ProvenChain) -> Grant:
        made = known.grants.get(request)
        if made is not None:
            return made
        leaf, issuer = known.chain.leaf, self._issuer
        if issuer is None:
            if self._chain.family == "norwegian":
                raise _no_client_id()
            # Any name is accepted for an eSeal; that of the certificate is found in logs.
            issuer = leaf.organization_name or leaf.common_name or "hsmtoll"
        made = Grant(self._alg, issuer, self._audience, request, x5c=known.x5c)
        known.grants[request] = made
        return made

    def _public_key(self) -> jws.RsaPublicKey:
        """The public key, for a grant with kid; cached like a chain."""
        now = self._clock.now()
        known = self._cached_public_key(now)
        if known is not None:
            return known
        self._bare_public_key = None
        certificates = readable(self._device.certificates(near=True))
        facts = self._device.key(candidates=public_keys(certificates))
        if facts.public is None:
            raise DeviceError(
                "key: the device does not show its public half",
                hint="set HSMTOLL_HSM__PUBLIC_KEY to a PEM file with the public key",
                code="public-key-hidden",
            )
        self._bare_public_key = (
            facts.public,
            now.boot + CERTIFICATE_CACHE_TTL,
            self._device.generation,
        )
        self._key_identity = _sha256(facts.public)
        return facts.public

    def _cached_public_key(self, now: ClockReading) -> jws.RsaPublicKey | None:
        """The cached key of `_public_key`, if it may still be used."""
        if self._bare_public_key is None:
            return None
        key, until, generation = self._bare_public_key
        return key if now.boot < until and generation == self._device.generation else None


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
